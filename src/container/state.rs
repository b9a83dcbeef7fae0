//! What the runtimes have in common: the kernel's word for a container's state, and what its logs say.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::time::Instant;

use super::{Cgroup, ContainerId, ContainerStatus, Error, POLL, command::log_errors};

/// How long a container may take to freeze: runc itself gives up after 10 s.
pub(super) const FREEZE_LIMIT: Duration = Duration::from_secs(15);
/// How long killed tasks may take to be gone.
pub(super) const GONE_LIMIT: Duration = Duration::from_secs(10);

/// Waits for the kernel to say that all tasks of a container are frozen, or thawed.
pub(super) async fn wait_frozen(id: &ContainerId, cgroup: &Cgroup, wanted: bool) -> Result<(), Error> {
    let deadline = Instant::now() + FREEZE_LIMIT;
    while cgroup.is_frozen()? != wanted {
        if Instant::now() >= deadline {
            return Err(Error::TimedOut {
                program: "the kernel".to_owned(),
                what: format!("{} container {id}", if wanted { "freeze" } else { "thaw" }),
                limit: FREEZE_LIMIT,
                detail: String::new(),
            });
        }
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

/// An operation on a container that is not in the state for it.
pub(super) fn wrong_state(id: &ContainerId, what: &'static str, status: ContainerStatus) -> Error {
    let wanted = match what {
        "checkpoint" => "paused and frozen",
        "pre-dump" => "running",
        _ => "running or paused",
    };
    Error::WrongState { id: id.to_string(), what, status: status.to_string(), wanted }
}

/// A log of an earlier try must not explain this one.
pub(super) fn remove_old(log: &Path) -> Result<(), Error> {
    match std::fs::remove_file(log) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", log)(e)),
        _ => Ok(()),
    }
}

/// Adds what criu's log says to an error: it knows more than runc does.
pub(super) fn with_log(error: Error, log: &Path) -> Error {
    let told = log_errors(log);
    match error {
        Error::Failed { program, what, status, .. } if !told.is_empty() => {
            Error::Failed { program, what, status, detail: told }
        }
        // runc's words for it: its connection to criu was closed.
        Error::Failed { program, what, status, detail } if detail.contains("unixpacket") => {
            let detail = format!("criu was ended before it was done; see {}", log.display());
            Error::Failed { program, what, status, detail }
        }
        Error::TimedOut { program, what, limit, .. } => {
            let detail = if told.is_empty() { format!("; see {}", log.display()) } else { format!(": {told}") };
            Error::TimedOut { program, what, limit, detail }
        }
        other => other,
    }
}

/// A path to the network namespace of a process, unless it is the one that we are in: `named` where that is the same (it
/// outlives the process), the one below `/proc` otherwise.
pub(super) fn own_netns(pid: u32, named: Option<PathBuf>) -> Result<Option<PathBuf>, Error> {
    let inode = |path: &Path| {
        use std::os::unix::fs::MetadataExt;
        std::fs::metadata(path).map(|m| (m.dev(), m.ino())).map_err(Error::io("look at", path))
    };
    let theirs = PathBuf::from(format!("/proc/{pid}/ns/net"));
    let namespace = inode(&theirs)?;
    if namespace == inode(Path::new("/proc/self/ns/net"))? {
        return Ok(None);
    }
    Ok(Some(named.filter(|path| inode(path).is_ok_and(|i| i == namespace)).unwrap_or(theirs)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_explains_a_failure_better_than_the_program() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("dump.log");
        let failed = |detail: &str| Error::Failed {
            program: "runc".into(),
            what: "checkpoint container web".into(),
            status: "exit status: 1".into(),
            detail: detail.into(),
        };
        assert!(with_log(failed("type NOTIFY errno 0"), &log).to_string().ends_with("errno 0"));
        let died = with_log(failed("read unixpacket @->@: EOF"), &log).to_string();
        assert!(died.contains("criu was ended") && died.contains("dump.log"), "{died}");
        std::fs::write(&log, "(00.1) Error (criu/net.c:1): no\n").unwrap();
        let text = with_log(failed("type NOTIFY errno 0"), &log).to_string();
        assert_eq!(text, "cannot checkpoint container web: runc failed (exit status: 1): (criu/net.c:1): no");
    }
}
