//! The node's side of the guard: one is started when there is none, and it outlives the node.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::Error;
use super::lease_file::{GuardLease, is_guarded};
use crate::container::Cgroup;

/// How long a guard that was started may take until it guards: milliseconds, but on a host that is busy with other things.
const READY_WITHIN: Duration = Duration::from_secs(10);
const READY_PAUSE: Duration = Duration::from_millis(5);

/// Where guards live, so that what ends the node's group (a service manager, say) does not end them.
const GUARDS_GROUP: &str = "/lazy-migrate-guard";

/// Who guards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a guard that had to be started may follow one that froze the container when it was ended"]
pub enum Guarding {
    /// The guard of before.
    Already,
    /// A new one. The one before, if there was any, may have frozen the container when it ended.
    Started,
}

/// Sees to it that somebody guards the container in `cgroup` by the lease file at `lease`, and returns when it is so.
/// Cheap when a guard is there; otherwise this program is started as one, which writes to `log` (appended), and that
/// may take up to two seconds: not for a thread that others wait for.
pub fn ensure(lease: &Path, cgroup: &Cgroup, log: &Path) -> Result<Guarding, Error> {
    // What runs now, though another may have taken its name.
    ensure_by(Path::new("/proc/self/exe"), lease, cgroup, log)
}

/// The same by another program than this one, which must be `lazy-migrate`.
pub fn ensure_by(program: &Path, lease: &Path, cgroup: &Cgroup, log: &Path) -> Result<Guarding, Error> {
    if is_guarded(lease) {
        return Ok(Guarding::Already);
    }
    // Refused here rather than in a log.
    GuardLease::open(lease)?;
    let child = start(program, lease, cgroup, log)?;
    leave_own_group(child.id());
    wait_until_ready(child, lease, log)
}

fn start(program: &Path, lease: &Path, cgroup: &Cgroup, log: &Path) -> Result<Child, Error> {
    let log_file: File =
        OpenOptions::new().append(true).create(true).mode(0o600).open(log).map_err(Error::io("open", log))?;
    // It goes to `/` and into a session of its own by itself.
    let lease = std::path::absolute(lease).map_err(Error::io("find", lease))?;
    Command::new(program)
        // For whoever looks at the list of processes.
        .arg0("lazy-migrate")
        .arg("guard")
        .arg("--lease")
        .arg(lease)
        .args(["--cgroup", cgroup.path()])
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log_file)
        .spawn()
        .map_err(Error::io("start a guard by", program))
}

fn wait_until_ready(mut child: Child, lease: &Path, log: &Path) -> Result<Guarding, Error> {
    let begun = Instant::now();
    let ready = loop {
        if is_guarded(lease) {
            break Ok(Guarding::Started);
        }
        match child.try_wait() {
            // Another may have been quicker, and this one is superfluous.
            Ok(Some(_)) if is_guarded(lease) => return Ok(Guarding::Started),
            Ok(Some(status)) => return Err(Error::Ended { status, log: log.to_owned() }),
            Err(error) => break Err(Error::io("wait for the guard of", lease)(error)),
            Ok(None) if begun.elapsed() >= READY_WITHIN => {
                break Err(Error::NotReady { within: READY_WITHIN, log: log.to_owned() });
            }
            Ok(None) => std::thread::sleep(READY_PAUSE),
        }
    };
    // It may take long until it ends, and it must not stay a zombie. When the node ends first, init reaps it.
    let reaper = std::thread::Builder::new().name("guard-reaper".into()).stack_size(64 * 1024);
    if let Err(error) = reaper.spawn(move || child.wait()) {
        tracing::warn!(%error, "a guard will stay a zombie when it ends: no thread to wait for it");
    }
    ready
}

/// Moves the guard out of the node's group. If that cannot be, it guards nevertheless.
fn leave_own_group(pid: u32) {
    let leave = || -> Result<(), Error> {
        let own = Path::new("/proc/self/cgroup");
        let groups = std::fs::read_to_string(own).map_err(Error::io("read", own))?;
        if groups.lines().find_map(|line| line.strip_prefix("0::")).is_none_or(|path| path == "/") {
            return Ok(());
        }
        let directory = Cgroup::at(GUARDS_GROUP)?.dir()?;
        match std::fs::create_dir(&directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(Error::io("create", &directory)(error));
            }
            _ => {}
        }
        let processes = directory.join("cgroup.procs");
        std::fs::write(&processes, pid.to_string()).map_err(Error::io("write", &processes))
    };
    if let Err(error) = leave() {
        tracing::warn!(%error, "the guard stays in the node's own group: what ends that group ends the guard");
    }
}
