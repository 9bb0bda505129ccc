//! One run: the doors, the words, the places, and an open repository.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::tz::TimeZone;
use mainstay_core::{Code, Error, Result, Time};
use mainstay_engine::address;
use mainstay_engine::view::PointView;
use mainstay_engine::vm::{self, MachineView, compose, newer_files};
use mainstay_repository::keys::kit::Kit;
use mainstay_repository::{Options, PointInfo, Repository, Tuning, Unlock, store};

use crate::args::{self, Global};
use crate::doors::Doors;
use crate::inside::Looking;
use crate::places::Places;
use crate::report::lines::Line;
use crate::report::machines::Composed;
use crate::report::{Report, RunProgress};
use crate::secrets::{self, KeyFile};

/// What every verb works with.
pub(crate) struct Session {
    pub global: Global,
    pub doors: Doors,
    pub report: Arc<Report>,
    pub zone: TimeZone,
}

impl Session {
    pub(crate) fn places(&self) -> Result<Places> {
        Places::find(&self.global, &self.doors)
    }

    pub(crate) fn progress(&self) -> Arc<RunProgress> {
        self.report.progress()
    }

    pub(crate) fn now(&self) -> Time {
        self.doors.clock.now()
    }

    /// Seconds since `began`, a reading of the monotonic clock.
    pub(crate) fn seconds_since(&self, began: Duration) -> f64 {
        self.doors.clock.monotonic().saturating_sub(began).as_secs_f64()
    }

    /// The key file that the person named.
    pub(crate) fn key_file(&self) -> Option<PathBuf> {
        let named = self.global.key_file.as_ref().or(self.doors.environment.key_file.as_ref());
        named.map(|path| self.doors.directory.join(path))
    }

    /// What a repository is opened with.
    pub(crate) fn options(&self, places: &Places) -> Options {
        Options {
            clock: Arc::clone(&self.doors.clock),
            state: places.state.clone(),
            tuning: Tuning::default(),
        }
    }

    /// Opens the repository with whatever key there is.
    ///
    /// Errors: [`Code::NoRepository`], [`Code::WrongKey`].
    pub(crate) fn open(&mut self) -> Result<Repository> {
        let places = self.places()?;
        let store = store::open(&places.repository).map_err(|error| no_repository(error, &places))?;
        let options = self.options(&places);
        let family = Repository::identify(store.as_ref()).map_err(|error| no_repository(error, &places))?;
        let open = |unlock: &Unlock<'_>| Repository::open(Arc::clone(&store), unlock, &options);
        if let Some(path) = &self.global.with_kit {
            let path = self.doors.directory.join(path);
            let text = std::fs::read_to_string(&path)
                .map_err(|error| Error::io(format!("cannot read {}", path.display()), error))?;
            return open(&Unlock::Kit(&Kit::parse(&text)?));
        }
        if let Some(path) = self.key_file() {
            return open_with_file(&path, &open);
        }
        if let Some(passphrase) = secrets::passphrase_of_environment(&self.doors)? {
            return open(&Unlock::Passphrase(&passphrase));
        }
        if let Some(default) = places.key_file(&family).ok().filter(|path| path.exists()) {
            return open_with_file(&default, &open);
        }
        let passphrase = secrets::ask(&mut self.doors, &places.repository)?;
        open(&Unlock::Passphrase(&passphrase))
    }

    /// Finds the point that the text names.
    pub(crate) fn point(&self, text: &str, points: &[PointInfo]) -> Result<PointInfo> {
        address::find_point(text, points, &self.zone).cloned()
    }

    /// Opens the repository and what can be browsed in the point that the text names: its items, or the files on the
    /// disks of a machine, with newer files over them unless only the image is wanted.
    pub(crate) fn open_view(
        &mut self,
        text: &str,
        image_only: bool,
        within: &args::Within,
    ) -> Result<(Repository, Arc<dyn PointView>)> {
        let repository = self.open()?;
        let view = self.view(&repository, text, image_only, within)?;
        Ok((repository, view))
    }

    /// As [`Session::open_view`], of a repository that is open already.
    pub(crate) fn view(
        &mut self,
        repository: &Repository,
        text: &str,
        image_only: bool,
        within: &args::Within,
    ) -> Result<Arc<dyn PointView>> {
        let points = repository.points()?;
        let (point, until) = address::find_as_of(text, &points, &self.zone)?;
        let reader = repository.read(&point.id)?;
        if point.workload.kind.0 != vm::KIND {
            return Ok(Arc::new(reader));
        }
        let looking = Looking::within(within, &mut self.doors)?;
        let view = looking.with(|inside| MachineView::open(reader, inside))?;
        for note in view.notes() {
            self.report.say(note);
        }
        let newer = until.filter(|_| !image_only).map(|until| newer_files(point, &points, until));
        let composed = compose(repository, view, &newer.unwrap_or_default())?;
        self.say_composed(point, &composed.files, &composed.notes);
        Ok(composed.view)
    }

    /// Says which points are shown together, if it is more than one.
    pub(crate) fn say_composed(&self, image: &PointInfo, files: &[PointInfo], notes: &[String]) {
        notes.iter().for_each(|note| self.report.note(note));
        if !files.is_empty() {
            self.report.aside(&Line::Composed(Composed::of(image, files)));
        }
    }

    /// Asks before something is destroyed or overwritten.
    ///
    /// Errors: [`Code::Usage`] when nobody can be asked, [`Code::Cancelled`] when the answer is no.
    pub(crate) fn confirm(&mut self, yes: bool, question: &str) -> Result<()> {
        if yes {
            return Ok(());
        }
        if !self.doors.terminal.input || self.report.json() {
            return Err(Error::new(Code::Usage, format!("{question}: there is nobody to ask"))
                .hint("--yes answers the question, --dry-run only shows what would happen"));
        }
        let answer = self.doors.person.line(&format!("{question}? [y/N] "))?;
        if matches!(answer.trim(), "y" | "Y" | "yes") {
            return Ok(());
        }
        Err(Error::new(Code::Cancelled, "nothing was changed, as you wished"))
    }

    /// Errors: [`Code::Cancelled`] once a signal has asked for it.
    pub(crate) fn check_cancelled(&self) -> Result<()> {
        match self.doors.cancel.asked() {
            true => Err(Error::new(Code::Cancelled, "stopped before it was done")),
            false => Ok(()),
        }
    }
}

fn open_with_file(
    path: &std::path::Path,
    open: &dyn Fn(&Unlock<'_>) -> Result<Repository>,
) -> Result<Repository> {
    let opened = match secrets::read_key_file(path)? {
        KeyFile::Key(key) => open(&Unlock::KeyFile(&key)),
        KeyFile::Credential(ring) => open(&Unlock::Ring(ring)),
    };
    opened.map_err(|error| match error.code() {
        Code::WrongKey => error.during(format!("cannot open the repository with {}", path.display())),
        _ => error,
    })
}

fn no_repository(error: Error, places: &Places) -> Error {
    if error.code() != Code::NoRepository {
        return error;
    }
    let hint = if places.chosen {
        format!("make one there: mainstay -r {} init", places.repository)
    } else {
        "make one: mainstay backup PATH, or mainstay init; or name another with --repository".to_owned()
    };
    error.hint(hint)
}
