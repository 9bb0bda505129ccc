//! Commands of the person's own that bring an application to rest before files are read, and let it go again.

use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{Code, Progress, Result};

use crate::armed::Armed;
use crate::process::Program;

/// Lines for `/bin/sh`. They see `MAINSTAY_WORKLOAD`, the workload's name, and `MAINSTAY_HOOK`, `quiesce` or `thaw`.
#[derive(Clone, Debug)]
pub struct Hooks {
    /// The name of the workload, for the commands to tell their callers apart.
    pub workload: String,
    pub quiesce: Option<String>,
    /// Run once what was quiesced may go on, whatever happened in between, a failed `quiesce` included.
    pub thaw: Option<String>,
    /// How long each of the two may take.
    pub limit: Duration,
    /// Capture the files even if `quiesce` fails; the point then says so.
    pub go_on: bool,
    /// When this is cancelled, `quiesce` is killed. `thaw` never is.
    pub run: Option<Arc<dyn Progress>>,
}

impl Default for Hooks {
    fn default() -> Self {
        Self {
            workload: String::new(),
            quiesce: None,
            thaw: None,
            limit: Duration::from_secs(60),
            go_on: false,
            run: None,
        }
    }
}

impl Hooks {
    fn quiesce(&self) -> Result<()> {
        self.call("quiesce", self.quiesce.as_ref(), self.run.as_ref())
    }

    fn thaw(&self) -> Result<()> {
        self.call("thaw", self.thaw.as_ref(), None)
    }

    fn call(&self, hook: &str, line: Option<&String>, run: Option<&Arc<dyn Progress>>) -> Result<()> {
        let Some(line) = line else { return Ok(()) };
        Program::shell(line, self.limit)
            .part_of(run.cloned())
            .variable("MAINSTAY_WORKLOAD", &self.workload)
            .variable("MAINSTAY_HOOK", hook)
            .run_well()
            .map(drop)
            .map_err(|error| match error.code() {
                Code::Cancelled => error,
                _ => error.during(format!("the {hook} command failed")),
            })
    }
}

/// Something that is at rest. Dropped, it is let go: on an error and in a panic too.
pub(super) struct Quiesced {
    hooks: Option<Hooks>,
    /// What has no thaw command needs nobody to wait for it.
    _armed: Option<Armed>,
}

impl Quiesced {
    /// Runs the quiesce command. Also returns why it failed, when the rules are to go on all the same.
    pub(super) fn begin(hooks: Hooks) -> Result<(Self, Option<mainstay_core::Error>)> {
        hooks.run.as_ref().map_or(Ok(()), |run| run.check())?;
        // Armed before the command runs: one that fails half way may have stopped half of the application.
        let _armed = hooks.thaw.is_some().then(|| Armed::new("the thaw command"));
        let quiesced = Self { hooks: Some(hooks.clone()), _armed };
        match hooks.quiesce() {
            Ok(()) => Ok((quiesced, None)),
            Err(error) if error.code() == Code::Cancelled => Err(error),
            Err(error) if hooks.go_on => Ok((quiesced, Some(error))),
            Err(error) => {
                let hint = "mend the command, or allow the run to go on without it";
                Err(if error.next_step().is_none() { error.hint(hint) } else { error })
            }
        }
    }

    /// Lets go, and says if that failed.
    pub(super) fn thaw(mut self) -> Result<()> {
        self.hooks.take().map_or(Ok(()), |hooks| hooks.thaw())
    }
}

impl Drop for Quiesced {
    fn drop(&mut self) {
        if let Some(hooks) = self.hooks.take() {
            // Nobody is left to be told; the error that led here is on its way already.
            let _unheard = hooks.thaw();
        }
    }
}
