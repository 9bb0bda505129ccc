//! Files of a backup made usable, and a private server on them that a log is played back into.

use std::ffi::CString;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{Clock, Code, Error, Progress, Result};
use rustix::fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, Uid, chownat, fchown, open, openat, statat};
use rustix::io::Errno;
use rustix::process::Signal;
use tempfile::TempDir;
use zeroize::Zeroizing;

use super::address::Address;
use super::programs::{Login, Options, last_words};
use super::wire::Connection;
use crate::flow::Flow;
use crate::process::Program;

/// A server that recovers may take its time.
const START_LIMIT: Duration = Duration::from_secs(3600);
const END_LIMIT: Duration = Duration::from_secs(600);
const ASK_EVERY: Duration = Duration::from_millis(50);
const USER: &str = "mainstay-recovery";
/// A server's directories are not nearly as deep.
const DEPTH_MAX: usize = 32;

/// Whom the server's files have to belong to: the user `mysql`, when we are root.
fn server_user() -> Option<(u32, u32)> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let users = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let fields = users.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let mut found = fields.filter(|fields| fields.first() == Some(&"mysql"));
    let fields = found.next()?;
    Some((fields.get(2)?.parse().ok()?, fields.get(3)?.parse().ok()?))
}

/// Has `mariadb-backup` make the files of a backup consistent.
pub fn prepare(directory: &Path, clock: &dyn Clock, progress: &dyn Progress) -> Result<()> {
    let target = format!("--target-dir={}", directory.display());
    let program =
        Program::new("mariadb-backup", Duration::MAX).arguments(["--no-defaults", "--prepare", &target]);
    let flow = Flow::start(&program, Stdio::null(), Stdio::null());
    let flow = flow.map_err(|error| error.hint("apt-get install mariadb-backup, of the server's version"))?;
    let (status, said) = flow.wait(clock, progress)?;
    if status != Some(0) || !said.contains("completed OK!") {
        return Err(Error::new(
            Code::Io,
            format!("mariadb-backup cannot prepare the files: {}", last_words(&said)),
        ));
    }
    Ok(())
}

/// Hands files to the server's user, when we are root. Nothing may be written among them by path any more, since that user
/// can put links there from now on.
///
/// Errors: [`Code::Refused`] for a file that has other names as well.
pub fn give_to_server(directory: &Path) -> Result<()> {
    server_user().map_or(Ok(()), |user| hand_over(directory, user))
}

fn hand_over(path: &Path, user: (u32, u32)) -> Result<()> {
    let failed = |errno: Errno| Error::io(format!("cannot hand {} over", path.display()), errno.into());
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = open(path, flags, Mode::empty()).map_err(failed)?;
    let other_names =
        hand_over_open(&directory, (Uid::from_raw(user.0), Gid::from_raw(user.1)), 0).map_err(failed)?;
    match other_names {
        None => Ok(()),
        Some(name) => Err(Error::new(
            Code::Refused,
            format!("{name:?} in {} has another name elsewhere, and is not handed over", path.display()),
        )),
    }
}

/// Children first, so that the new owner can move nothing while we are below; nothing is followed. The first file that is
/// known by other names too.
fn hand_over_open(
    directory: &OwnedFd,
    user: (Uid, Gid),
    depth: usize,
) -> rustix::io::Result<Option<CString>> {
    if depth > DEPTH_MAX {
        return Err(Errno::LOOP);
    }
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let found = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
        if FileType::from_raw_mode(found.st_mode) == FileType::Directory {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let below = openat(directory, name, flags, Mode::empty())?;
            if let Some(name) = hand_over_open(&below, user, depth + 1)? {
                return Ok(Some(name));
            }
        } else if found.st_nlink > 1 {
            return Ok(Some(name.to_owned()));
        } else {
            chownat(directory, name, Some(user.0), Some(user.1), AtFlags::SYMLINK_NOFOLLOW)?;
        }
    }
    fchown(directory, Some(user.0), Some(user.1))?;
    Ok(None)
}

/// A server on prepared files that nobody else can reach: on a socket in a private directory, without log, events and
/// replication. Dropped, it is killed; [`PrivateServer::stop`] ends it in order.
pub struct PrivateServer {
    flow: Option<Flow>,
    login: Login,
    directory: TempDir,
    clock: Arc<dyn Clock>,
}

impl PrivateServer {
    /// Starts it and waits until it answers. With `read_only` nothing in its tables changes.
    ///
    /// Errors: [`Code::Unsupported`] where the server's program is missing.
    pub fn start(
        data: &Path,
        read_only: bool,
        clock: &Arc<dyn Clock>,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("ms-maria-").tempdir();
        let directory = directory.map_err(|error| Error::io("cannot make a private directory", error))?;
        let place = directory.path();
        let user = server_user();
        let password = random()?;
        let sql = format!(
            "CREATE OR REPLACE USER '{USER}'@localhost IDENTIFIED BY '{}';\nGRANT ALL ON *.* TO '{USER}'@localhost WITH GRANT OPTION;\n",
            password.as_str()
        );
        private_file(&place.join("init.sql"), sql.as_bytes(), user)?;
        let mut words = vec![format!("--defaults-file={}", own_options(data, place, user)?.display())];
        if let Some(user) = user {
            hand_over(place, user)?;
        }
        words.extend([
            format!("--datadir={}", absolute(data)?.display()),
            format!("--socket={}", place.join("s").display()),
            format!("--pid-file={}", place.join("pid").display()),
            format!("--init-file={}", place.join("init.sql").display()),
            format!("--tmpdir={}", place.display()),
        ]);
        let fixed = [
            "--skip-networking",
            "--skip-log-bin",
            "--skip-slave-start",
            "--event-scheduler=OFF",
            "--max-allowed-packet=1G",
        ];
        words.extend(fixed.map(str::to_owned));
        words.extend(read_only.then(|| "--read-only".to_owned()));
        words.extend(user.map(|_| "--user=mysql".to_owned()));
        let program = Program::new("mariadbd", Duration::MAX).arguments(words);
        let flow = Flow::start(&program, Stdio::null(), Stdio::null());
        let flow =
            flow.map_err(|error| error.hint("apt-get install mariadb-server, of the server's version"))?;
        let address = Address { host: None, port: 0, socket: place.join("s"), user: None };
        let login = Login {
            address,
            user: USER.into(),
            password: Some(Zeroizing::new(password.as_bytes().to_vec())),
        };
        let mut this = Self { flow: Some(flow), login, directory, clock: Arc::clone(clock) };
        this.wait_until_it_answers(progress)?;
        Ok(this)
    }

    fn wait_until_it_answers(&mut self, progress: &dyn Progress) -> Result<()> {
        let began = self.clock.monotonic();
        loop {
            progress.check()?;
            if let Ok(_connection) = self.connect() {
                return Ok(());
            }
            let ended = self.flow.as_mut().map(Flow::has_ended).transpose()?.unwrap_or(true);
            if ended || self.clock.monotonic().saturating_sub(began) > START_LIMIT {
                let said = self.flow.take().map(|flow| flow.wait(&*self.clock, progress)).transpose()?;
                let said = said.map(|(_, said)| said).unwrap_or_default();
                return Err(Error::new(
                    Code::Io,
                    format!("the private server does not start: {}", last_words(&said)),
                ));
            }
            self.clock.sleep(ASK_EVERY);
        }
    }

    /// As whom to speak to it.
    pub fn login(&self) -> &Login {
        &self.login
    }

    pub fn connect(&self) -> Result<Connection> {
        let password = self.login.password.as_ref().map(|password| password.as_slice());
        Connection::open(&self.login.address, &self.login.user, password)
    }

    /// Where its socket is.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Has MariaDB's own program check every table. What it complains of.
    pub fn check_tables(&self, progress: &dyn Progress) -> Result<Vec<String>> {
        let options = Options::of(&self.login)?;
        let program = Program::new("mariadb-check", Duration::MAX).arguments([
            options.argument(),
            "--all-databases".into(),
            "--check".into(),
            "--extended".into(),
        ]);
        let mut flow = Flow::start(&program, Stdio::null(), Stdio::piped())?;
        let mut said = String::new();
        std::io::Read::read_to_string(&mut flow.output()?, &mut said)
            .map_err(|error| Error::io("cannot hear mariadb-check", error))?;
        let (status, errors) = flow.wait(&*self.clock, progress)?;
        let mut found: Vec<String> = complaints(&said);
        if status != Some(0) && found.is_empty() {
            found.push(last_words(&errors));
        }
        Ok(found)
    }

    /// Takes our account out again and ends the server in order, so that another can be started on the files.
    pub fn stop(mut self, progress: &dyn Progress) -> Result<()> {
        self.connect()?.query(&format!("DROP USER '{USER}'@localhost"))?;
        let Some(mut flow) = self.flow.take() else { return Ok(()) };
        flow.ask(Signal::TERM);
        let began = self.clock.monotonic();
        while !flow.has_ended()? {
            if self.clock.monotonic().saturating_sub(began) > END_LIMIT {
                return Err(Error::new(Code::Io, "the private server does not end"));
            }
            self.clock.sleep(ASK_EVERY);
        }
        let (status, said) = flow.wait(&*self.clock, progress)?;
        match status {
            Some(0) => Ok(()),
            _ => Err(Error::new(
                Code::Io,
                format!("the private server did not end well: {}", last_words(&said)),
            )),
        }
    }
}

/// Lines of `mariadb-check` that tell of something wrong: `error`, or `warning` below the name of a table.
fn complaints(said: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut table = "";
    for line in said.lines() {
        let is_bad = ["error", "Error", "Corrupt"].iter().any(|word| line.trim_start().starts_with(word));
        if is_bad {
            found.push(format!("{}: {}", table.escape_debug(), line.trim().escape_debug()));
        } else if !line.starts_with(' ') {
            table = line.split_whitespace().next().unwrap_or_default();
        }
    }
    found
}

/// What of the server's settings its files depend on, as the backup recorded it.
fn own_options(data: &Path, place: &Path, user: Option<(u32, u32)>) -> Result<PathBuf> {
    let recorded = std::fs::read_to_string(data.join("backup-my.cnf")).unwrap_or_default();
    let mut text = String::from("[mariadbd]\n");
    for line in recorded.lines() {
        let name = line.split('=').next().unwrap_or_default().trim();
        // Nothing that would have it load something, or look elsewhere.
        let known = [
            "innodb_page_size",
            "innodb_data_file_path",
            "innodb_undo_tablespaces",
            "innodb_checksum_algorithm",
        ];
        if known.contains(&name) {
            text.push_str(line.trim());
            text.push('\n');
        }
    }
    let path = place.join("server.cnf");
    private_file(&path, text.as_bytes(), user)?;
    Ok(path)
}

fn private_file(path: &Path, text: &[u8], user: Option<(u32, u32)>) -> Result<()> {
    let failed = |error| Error::io("cannot write a private file", error);
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(path).map_err(failed)?;
    file.write_all(text).map_err(failed)?;
    match user {
        Some(user) if file.metadata().map_err(failed)?.uid() != user.0 => {
            std::os::unix::fs::fchown(&file, Some(user.0), Some(user.1)).map_err(failed)
        }
        _ => Ok(()),
    }
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(|error| Error::io("cannot find out where we are", error))
}

fn random() -> Result<Zeroizing<String>> {
    let mut bytes = Zeroizing::new([0_u8; 24]);
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        let read = rustix::rand::getrandom(rest, rustix::rand::GetRandomFlags::empty());
        filled += read.map_err(|errno| Error::io("the system has no random numbers", errno.into()))?;
    }
    Ok(Zeroizing::new(bytes.iter().map(|byte| format!("{byte:02x}")).collect()))
}

/// Plays files of a binary log back into a server: from a place in the first to a place in the last of them.
pub fn replay(
    server: &PrivateServer,
    files: &[PathBuf],
    from: u64,
    until: u64,
    clock: &dyn Clock,
    progress: &dyn Progress,
) -> Result<()> {
    let options = Options::of(server.login())?;
    let reader = Program::new("mariadb-binlog", Duration::MAX)
        .arguments([
            "--no-defaults".into(),
            format!("--start-position={from}"),
            format!("--stop-position={until}"),
        ])
        .arguments(files);
    let mut reader = Flow::start(&reader, Stdio::null(), Stdio::piped())
        .map_err(|error| error.hint("apt-get install mariadb-client, of the server's version"))?;
    let writer = Program::new("mariadb", Duration::MAX).arguments([
        options.argument(),
        "--binary-mode".into(),
        "--max-allowed-packet=1G".into(),
    ]);
    let writer = Flow::start(&writer, Stdio::from(reader.output()?), Stdio::null())?;
    let written = writer.wait(clock, progress)?;
    let read = reader.wait(clock, progress)?;
    for (name, (status, said)) in [("mariadb", written), ("mariadb-binlog", read)] {
        if status != Some(0) {
            return Err(Error::new(
                Code::Io,
                format!("the log cannot be played back: {name}: {}", last_words(&said)),
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt as _, symlink};

    use mainstay_core::Code;

    use super::hand_over;

    #[test]
    fn what_is_handed_over_is_what_lies_there_and_nothing_that_links_lead_to() {
        let directory = tempfile::tempdir().unwrap();
        let (data, outside) = (directory.path().join("data"), directory.path().join("outside"));
        std::fs::create_dir_all(data.join("shop")).unwrap();
        std::fs::write(data.join("shop/item.ibd"), "rows").unwrap();
        std::fs::write(&outside, "secret").unwrap();
        symlink(&outside, data.join("shop/link")).unwrap();
        let own = std::fs::metadata(&outside).unwrap();
        // Whoever is not root can only hand to themselves.
        let user = if own.uid() == 0 { (12_345, 12_345) } else { (own.uid(), own.gid()) };
        hand_over(&data, user).unwrap();
        for path in ["", "shop", "shop/item.ibd", "shop/link"] {
            assert_eq!(data.join(path).symlink_metadata().unwrap().uid(), user.0, "{path}");
        }
        assert_eq!(std::fs::metadata(&outside).unwrap().uid(), own.uid());
        std::fs::hard_link(&outside, data.join("shop/name")).unwrap();
        assert_eq!(hand_over(&data, user).unwrap_err().code(), Code::Refused);
        assert_eq!(std::fs::metadata(&outside).unwrap().uid(), own.uid());
        symlink(&data, directory.path().join("way")).unwrap();
        hand_over(&directory.path().join("way"), user).unwrap_err();
    }
}
