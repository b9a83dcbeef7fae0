//! A block device without the kernel's NBD: nbdfuse shows the export as a file, and a loop device over that file.
//!
//! nbdfuse is a process of its own, in its own process group, so that a Ctrl-C at the node's terminal does not end it. It
//! does **not** reconnect: when the node dies, I/O on the device fails, and all that is left is to detach it. The file
//! lies below the attachment's own directory:
//!
//! ```text
//! DIRECTORY/mount/disk    the export, while nbdfuse runs
//! DIRECTORY/ready         nbdfuse's process number, once it serves
//! DIRECTORY/log           what nbdfuse had to say
//! ```

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::time::timeout_at;

use super::command::{Running, Tool, one_line};
use super::{AttachRequest, Attached, DeviceError, How, block, blocking, mounts, number_of};

/// What a loop device's path begins with.
pub(super) const DEVICE_PREFIX: &str = "/dev/loop";

const NBDFUSE: Tool = Tool { program: "nbdfuse", package: "libnbd-bin" };
const LOSETUP: Tool = Tool { program: "losetup", package: "mount" };
const MODPROBE: Tool = Tool { program: "modprobe", package: "kmod" };
const FUSERMOUNT: Tool = Tool { program: "fusermount3", package: "fuse3" };

/// Device nodes that are needed, and the modules that bring them where nothing else loads them.
const MODULES: [(&str, &str); 2] = [("/dev/fuse", "fuse"), ("/dev/loop-control", "loop")];
/// How long loading a module may take.
const MODULE_LIMIT: Duration = Duration::from_secs(10);

/// How often a state that changes is looked at.
const POLL_INTERVAL: Duration = Duration::from_millis(10);
/// How long each part may take to vanish when it is taken down.
const GONE_LIMIT: Duration = Duration::from_secs(10);
/// The name of the file that shows the export.
const FILE: &str = "disk";

/// An attached loop device over nbdfuse.
#[derive(Debug)]
pub struct FuseDevice {
    record: Attached,
    /// None while a part of it is being taken down by a call that was dropped, and after that.
    session: Option<Session>,
}

impl FuseDevice {
    pub(super) async fn attach(request: &AttachRequest) -> Result<Self, DeviceError> {
        if let Some(device) = request.device.as_ref().filter(|device| number_of(device, DEVICE_PREFIX).is_none()) {
            let wanted = "without the kernel's NBD a loop device, /dev/loopN,";
            return Err(DeviceError::BadDevice { device: device.clone(), wanted });
        }
        let deadline = Instant::now() + request.limit;
        let job = request.clone();
        let (pending, device) = blocking(move || {
            let mut pending = Pending(Some(Session::start(&job, deadline)?));
            let session = pending.0.as_mut().ok_or(DeviceError::Stopped)?;
            let device = session.make_loop(job.device.as_deref(), job.read_only, deadline)?;
            Ok((pending, device))
        })
        .await?;
        let (path, size) = (device.clone(), request.size);
        let read = blocking(move || {
            let found = block::size_of(&path)?;
            if found != size - size % 512 {
                let source = io::Error::other(format!("it has {found} bytes instead of {size}"));
                return Err(DeviceError::Io { what: "use", path, source });
            }
            block::read_first(&path, size)
        });
        match timeout_at(deadline.into(), read).await {
            Ok(read) => read?,
            // Dropping `pending` ends nbdfuse, which makes the read fail and frees its thread.
            Err(_) => return Err(too_slow(device, request.limit)),
        }
        let session = pending.keep().ok_or(DeviceError::Stopped)?;
        let how = How::Fuse { pid: session.pid, started: session.started, directory: session.directory.clone() };
        let record = Attached { name: request.name.clone(), device, size: request.size, how };
        Ok(Self { record, session: Some(session) })
    }

    /// A device that an earlier process attached.
    pub(super) fn from_record(record: Attached, session: Session) -> Self {
        Self { record, session: Some(session) }
    }

    /// Whether its nbdfuse lives.
    pub(super) fn is_running(&mut self) -> bool {
        self.session.as_mut().is_some_and(Session::is_running)
    }

    pub(super) fn record(&self) -> &Attached {
        &self.record
    }

    pub(super) async fn detach(&mut self, limit: Duration) -> Result<(), DeviceError> {
        let device = self.record.device.clone();
        let Some(session) = &self.session else { return Ok(()) };
        let inherited = session.child.is_none();
        let claim = match session.has_loop(&device) {
            true => match block::claim_and_try_to_sync(&device, limit).await? {
                (claim, Ok(())) => Some(claim),
                // Its server was the process before, and nbdfuse does not reconnect: nobody will ever take it.
                (claim, Err(lost)) if inherited => {
                    tracing::warn!("{lost}: what was written to it after its node had ended is lost");
                    Some(claim)
                }
                (_, Err(failed)) => return Err(failed),
            },
            false => None,
        };
        self.take_down(move |session| {
            // The loop device ends when the claim, its last user, is dropped; nobody can mount it in between.
            if claim.is_some() {
                session.drop_loop(&device)?;
            }
            drop(claim);
            session.wait_without_loop(&device)?;
            session.unmount()?;
            session.end_process(None)?;
            session.remove_files()
        })
        .await
    }

    pub(super) async fn abandon(&mut self) -> Result<(), DeviceError> {
        self.take_down(Session::tear_down).await
    }

    /// Runs a part of the end in a blocking thread and puts the session back when it failed.
    async fn take_down(
        &mut self,
        work: impl FnOnce(&mut Session) -> Result<(), DeviceError> + Send + 'static,
    ) -> Result<(), DeviceError> {
        let Some(mut session) = self.session.take() else { return Ok(()) };
        let (session, result) = blocking(move || {
            let result = work(&mut session);
            Ok((session, result))
        })
        .await?;
        if result.is_err() {
            self.session = Some(session);
        }
        result
    }
}

/// The nbdfuse process and its directory. All calls block.
#[derive(Debug)]
pub struct Session {
    pid: u32,
    started: u64,
    directory: PathBuf,
    /// Known only to the process that started it, and needed there, or it would stay as a zombie.
    child: Option<Child>,
    /// A tool that did not end in time and was killed. It waits for nbdfuse in the kernel.
    stuck: Option<Running>,
}

impl Session {
    /// One that an earlier process started.
    pub(super) fn new(pid: u32, started: u64, directory: PathBuf) -> Self {
        Self { pid, started, directory, child: None, stuck: None }
    }

    /// Starts nbdfuse and waits until it serves the file. Leaves nothing behind when it fails.
    fn start(request: &AttachRequest, deadline: Instant) -> Result<Self, DeviceError> {
        load_modules();
        let failed = |what, path: &Path, source| DeviceError::Io { what, path: path.to_owned(), source };
        // As the kernel will name it.
        let directory = DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(request.directory.join("mount"))
            .and_then(|()| fs::canonicalize(&request.directory))
            .map_err(|error| failed("make the directory", &request.directory, error))?;
        let directory = &directory;
        let mount = directory.join("mount");
        let log = File::create(directory.join("log")).map_err(|error| failed("write a log in", directory, error))?;
        let ready = directory.join("ready");
        let mut command = NBDFUSE.command();
        if request.read_only {
            command.arg("--readonly");
        }
        command.arg("--pidfile").arg(&ready).arg(mount.join(FILE)).arg(&request.uri);
        command.stdout(Stdio::null()).stderr(log).process_group(0);
        let child = match command.spawn() {
            Ok(child) => child,
            Err(error) => {
                let nothing = Session::new(0, 0, directory.clone());
                let _ = nothing.remove_files();
                return Err(NBDFUSE.not_started(error));
            }
        };
        let pid = child.id();
        let started = start_time(pid).unwrap_or(0);
        let mut session = Session::new(pid, started, directory.clone());
        session.child = Some(child);
        let mut pending = Pending(Some(session));
        let session = pending.0.as_mut().ok_or(DeviceError::Stopped)?;
        while fs::metadata(&ready).map_or(0, |file| file.len()) == 0 {
            if let Some(status) = session.exit_status() {
                return Err(DeviceError::Failed {
                    command: format!("nbdfuse {}", request.uri),
                    status,
                    output: one_line(&fs::read(directory.join("log")).unwrap_or_default()),
                });
            }
            if Instant::now() >= deadline {
                return Err(too_slow(directory.clone(), request.limit));
            }
            thread::sleep(POLL_INTERVAL);
        }
        pending.keep().ok_or(DeviceError::Stopped)
    }

    fn file(&self) -> PathBuf {
        self.directory.join("mount").join(FILE)
    }

    /// Sets a loop device up over the file; direct I/O, so that an fsync on it reaches the export.
    fn make_loop(&mut self, device: Option<&Path>, read_only: bool, deadline: Instant) -> Result<PathBuf, DeviceError> {
        let file = self.file();
        let mut arguments: Vec<&OsStr> = vec!["--direct-io=on".as_ref()];
        if read_only {
            arguments.push("--read-only".as_ref());
        }
        match device {
            Some(device) => {
                arguments.extend([device.as_os_str(), file.as_os_str()]);
                self.run(LOSETUP, &arguments, deadline)?;
                Ok(device.to_owned())
            }
            None => {
                arguments.extend(["--find".as_ref(), "--show".as_ref(), file.as_os_str()]);
                Ok(PathBuf::from(self.run(LOSETUP, &arguments, deadline)?))
            }
        }
    }

    /// Whether a loop device is (still) set up over our file.
    fn has_loop(&self, device: &Path) -> bool {
        let Ok(directory) = mounts::sysfs_directory(device) else { return false };
        let backing = fs::read_to_string(directory.join("loop/backing_file")).unwrap_or_default();
        // A file that cannot be reached any more is shown with a remark behind it.
        backing.trim_end().strip_suffix(" (deleted)").unwrap_or(backing.trim_end()) == self.file().to_string_lossy()
    }

    fn drop_loop(&mut self, device: &Path) -> Result<(), DeviceError> {
        self.run(LOSETUP, &["--detach".as_ref(), device.as_os_str()], Instant::now() + GONE_LIMIT).map(drop)
    }

    /// Runs a tool that touches the file, and so may wait for a server that does not answer.
    fn run(&mut self, tool: Tool, arguments: &[&OsStr], deadline: Instant) -> Result<String, DeviceError> {
        let limit = deadline.saturating_duration_since(Instant::now());
        tool.start(arguments)?.finish(deadline).unwrap_or_else(|stuck| {
            self.stuck = Some(stuck);
            Err(DeviceError::TooSlow {
                what: "setting up or removing the loop device over",
                path: self.file(),
                limit,
                next: "the export does not answer; see whether its source can be reached (lazy-migrate status)",
            })
        })
    }

    fn wait_without_loop(&self, device: &Path) -> Result<(), DeviceError> {
        let next = "end what still has it open, then detach again";
        wait(|| !self.has_loop(device)).then_some(()).ok_or_else(|| gone_too_slowly(device, next))
    }

    /// Takes the file away. The kernel lets go of it shortly after the loop device is gone.
    fn unmount(&mut self) -> Result<(), DeviceError> {
        let mount = self.directory.join("mount");
        let arguments: [&OsStr; 2] = ["-u".as_ref(), mount.as_os_str()];
        let deadline = Instant::now() + GONE_LIMIT;
        while self.is_mounted()? {
            match self.run(FUSERMOUNT, &arguments, deadline) {
                Ok(_) => break,
                Err(error @ DeviceError::Failed { .. }) if Instant::now() < deadline => {
                    tracing::debug!("{} is not free yet: {error}", mount.display());
                    thread::sleep(POLL_INTERVAL);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn is_mounted(&self) -> Result<bool, DeviceError> {
        let mount = self.directory.join("mount");
        Ok(mounts::all()?.iter().any(|mounted| mounted.directory == mount))
    }

    /// Waits for nbdfuse's end, which the unmount brings about, or a signal.
    fn end_process(&mut self, signal: Option<Signal>) -> Result<(), DeviceError> {
        if let (Some(signal), true) = (signal, self.is_running()) {
            // It may end by itself in between.
            let _ = kill(Pid::from_raw(self.pid as i32), signal);
        }
        let next = "nbdfuse does not end; look at its log in that directory";
        let directory = self.directory.clone();
        wait(|| !self.is_running()).then_some(()).ok_or_else(|| gone_too_slowly(&directory, next))
    }

    /// Whether nbdfuse runs. A process of that number that started at another time is somebody else's.
    fn is_running(&mut self) -> bool {
        if self.child.is_some() {
            return self.exit_status().is_none();
        }
        start_time(self.pid) == Some(self.started)
    }

    /// How our own child ended, if it has.
    fn exit_status(&mut self) -> Option<String> {
        match self.child.as_mut()?.try_wait() {
            Ok(status) => status.map(|status| status.to_string()),
            Err(error) => Some(error.to_string()),
        }
    }

    /// Removes exactly what [`Session::start`] made.
    fn remove_files(&self) -> Result<(), DeviceError> {
        let absent = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
        for name in ["ready", "log"] {
            let path = self.directory.join(name);
            match fs::remove_file(&path) {
                Err(source) if !absent(&source) => return Err(DeviceError::Io { what: "remove", path, source }),
                _ => {}
            }
        }
        for path in [self.directory.join("mount"), self.directory.clone()] {
            match fs::remove_dir(&path) {
                Err(source) if !absent(&source) => return Err(DeviceError::Io { what: "remove", path, source }),
                _ => {}
            }
        }
        Ok(())
    }

    /// Takes everything down by force: all I/O under way fails.
    fn tear_down(&mut self) -> Result<(), DeviceError> {
        // First, because everything else would wait for I/O that nobody answers.
        self.end_process(Some(Signal::SIGKILL))?;
        if let Some(stuck) = self.stuck.take() {
            self.stuck = stuck.finish(Instant::now() + GONE_LIMIT).err();
        }
        if let Some(device) = loop_over(self) {
            // Where somebody still uses it, it ends with its last user.
            self.drop_loop(&device)?;
        }
        if self.is_mounted()? {
            let mount = self.directory.join("mount");
            let arguments: [&OsStr; 3] = ["-u".as_ref(), "-z".as_ref(), mount.as_os_str()];
            self.run(FUSERMOUNT, &arguments, Instant::now() + GONE_LIMIT)?;
        }
        self.remove_files()
    }
}

/// A session that is not attached yet: taken down when dropped.
struct Pending(Option<Session>);

impl Pending {
    fn keep(mut self) -> Option<Session> {
        self.0.take()
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        let Some(mut session) = self.0.take() else { return };
        let undo = move || {
            if let Err(error) = session.tear_down() {
                tracing::warn!("a failed attach could not be undone: {error}");
            }
        };
        // In a thread of its own: it may be dropped on a runtime's thread, which must not wait.
        if let Err(error) = thread::Builder::new().name("detach".to_owned()).spawn(undo) {
            tracing::warn!("a failed attach could not be undone: {error}");
        }
    }
}

/// The loop device over a session's file, if there is one.
fn loop_over(session: &Session) -> Option<PathBuf> {
    let entries = fs::read_dir("/sys/block").ok()?;
    let devices = entries.flatten().map(|entry| Path::new("/dev").join(entry.file_name()));
    devices.filter(|device| number_of(device, DEVICE_PREFIX).is_some()).find(|device| session.has_loop(device))
}

/// Loads what is missing. Where that does not help, nbdfuse or losetup say what they miss.
fn load_modules() {
    for (_, module) in MODULES.iter().filter(|(node, _)| !Path::new(node).exists()) {
        let loaded = MODPROBE.start(&[module.as_ref()]).map(|running| running.finish(Instant::now() + MODULE_LIMIT));
        match loaded {
            Ok(Ok(Ok(_))) => {}
            Ok(Ok(Err(error))) | Err(error) => tracing::debug!("cannot load {module}: {error}"),
            Ok(Err(_)) => tracing::debug!("cannot load {module}: modprobe hangs"),
        }
    }
}

/// When a process started, in clock ticks since boot; none when there is no such process, or it has ended already.
fn start_time(pid: u32) -> Option<u64> {
    let text = fs::read(format!("/proc/{pid}/stat")).ok()?;
    // The command's name may hold anything, but it is the last thing in parentheses.
    let end = text.iter().rposition(|&byte| byte == b')')?;
    let fields: Vec<_> = std::str::from_utf8(&text[end + 1..]).ok()?.split_ascii_whitespace().collect();
    if matches!(fields.first(), Some(&"Z" | &"X")) { None } else { fields.get(19)?.parse().ok() }
}

/// Waits until something is true, for a bounded time.
fn wait(mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + GONE_LIMIT;
    loop {
        if condition() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(POLL_INTERVAL);
    }
}

fn too_slow(path: PathBuf, limit: Duration) -> DeviceError {
    let next = "see whether the source can be reached (lazy-migrate status), then attach again";
    DeviceError::TooSlow { what: "attaching", path, limit, next }
}

fn gone_too_slowly(path: &Path, next: &'static str) -> DeviceError {
    DeviceError::TooSlow { what: "detaching", path: path.to_owned(), limit: GONE_LIMIT, next }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_start() {
        let own = start_time(std::process::id()).unwrap();
        let mut session = Session::new(std::process::id(), own, PathBuf::from("/none"));
        assert!(session.is_running());
        let mut other = Session::new(std::process::id(), own + 1, PathBuf::from("/none"));
        assert!(!other.is_running(), "its number was used again");
        assert_eq!(start_time(u32::MAX), None);
        session.started = 0;
        assert!(!session.is_running());
    }

    #[test]
    fn removing_files_leaves_what_is_not_ours() {
        let directory = tempfile::tempdir().unwrap();
        let own = directory.path().join("own");
        fs::create_dir_all(own.join("mount")).unwrap();
        fs::write(own.join("log"), "x").unwrap();
        fs::write(own.join("other"), "x").unwrap();
        let session = Session::new(0, 0, own.clone());
        assert!(session.remove_files().is_err(), "the directory is not empty");
        assert!(own.join("other").exists() && !own.join("log").exists());
        fs::remove_file(own.join("other")).unwrap();
        session.remove_files().unwrap();
        session.remove_files().unwrap();
        assert!(!own.exists());
    }
}
