//! What the node may do: its user, the memory that it may lock, the files that it may open.
//!
//! They are those of the running node, whose process the control socket names; without one, those of whoever runs this.

use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

use super::finding::Finding;

/// What the guard locks: its own few pages, and the program's text; generously.
const LOCKED_BYTES: u64 = 64 << 20;
/// Descriptors that a disk takes: its store, map, journal, device, and connections.
const FILES_PER_DISK: u64 = 16;
/// Enough for this many disks.
const DISKS: u64 = 64;

/// What a process may do.
pub(super) struct Facts {
    /// Whose figures they are.
    pub(super) whose: &'static str,
    /// Its user's number, from `/proc/PID/status`.
    pub(super) user: Option<u32>,
    /// Its limits, from `/proc/PID/limits`.
    pub(super) limits: String,
}

impl Facts {
    /// Asks the kernel who listens on the control socket.
    pub(super) fn gather(control: &Path) -> Self {
        let node = UnixStream::connect(control).ok().and_then(|stream| getsockopt(&stream, PeerCredentials).ok());
        let (whose, process) =
            node.map_or(("this shell's", "self".to_owned()), |node| ("the node's", node.pid().to_string()));
        let read = |name: &str| std::fs::read_to_string(format!("/proc/{process}/{name}")).unwrap_or_default();
        let user =
            read("status").lines().find_map(|line| line.strip_prefix("Uid:")?.split_whitespace().nth(1)?.parse().ok());
        Self { whose, user, limits: read("limits") }
    }

    /// The soft and the hard limit of that name; none where it is not told, `u64::MAX` where there is none.
    fn limit(&self, name: &str) -> Option<(u64, u64)> {
        let line = self.limits.lines().find_map(|line| line.strip_prefix(name))?;
        let mut figures = line
            .split_whitespace()
            .map(|figure| if figure == "unlimited" { Some(u64::MAX) } else { figure.parse().ok() });
        Some((figures.next()??, figures.next()??))
    }
}

/// Devices, mounts, control groups and criu are root's.
pub(super) fn privilege(facts: &Facts) -> Finding {
    const CHECK: &str = "user";
    match facts.user {
        Some(0) => Finding::ok(CHECK, format!("root, {}", facts.whose)),
        user => Finding::warn(
            CHECK,
            format!("user {}, {}", user.map_or("unknown".into(), |user| user.to_string()), facts.whose),
            "attaching devices, mounting, freezing and criu need root; only exports can be served without",
            "run the node, and this check, as root",
        ),
    }
}

/// The guard must not be swapped out when it is needed.
pub(super) fn memory(facts: &Facts) -> Finding {
    const CHECK: &str = "locked-memory";
    match facts.limit("Max locked memory") {
        _ if facts.user == Some(0) => Finding::ok(CHECK, "root locks what it needs"),
        Some((soft, _)) if soft >= LOCKED_BYTES => Finding::ok(CHECK, format!("{soft} bytes, {}", facts.whose)),
        found => Finding::warn(
            CHECK,
            format!("{} bytes, {}", found.map_or("unknown".into(), |(soft, _)| soft.to_string()), facts.whose),
            "the guard that freezes a container when its lease ends may wait for swap, and come too late",
            "LimitMEMLOCK=infinity in the service's unit, or ulimit -l unlimited",
        ),
    }
}

/// Each disk takes some.
pub(super) fn files(facts: &Facts) -> Finding {
    const CHECK: &str = "open-files";
    match facts.limit("Max open files") {
        Some((_, hard)) if hard / FILES_PER_DISK >= DISKS => {
            Finding::ok(CHECK, format!("up to {hard}, {}: some {} disks", facts.whose, hard / FILES_PER_DISK))
        }
        found => Finding::warn(
            CHECK,
            format!("up to {}, {}", found.map_or("unknown".into(), |(_, hard)| hard.to_string()), facts.whose),
            format!("a disk takes up to {FILES_PER_DISK}, and a client that cannot be accepted waits"),
            "LimitNOFILE=65536 in the service's unit, or ulimit -n 65536",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::finding::Level;

    fn facts(user: u32, locked: &str, open: &str) -> Facts {
        let limits = format!(
            "Limit                     Soft Limit           Hard Limit           Units\n\
             Max open files            1024                 {open}              files\n\
             Max locked memory         {locked}             {locked}            bytes\n"
        );
        Facts { whose: "the node's", user: Some(user), limits }
    }

    #[test]
    fn root_needs_no_limit_of_locked_memory_others_do() {
        assert_eq!(memory(&facts(0, "65536", "1024")).level, Level::Ok);
        assert_eq!(memory(&facts(1000, "65536", "1024")).level, Level::Warn);
        assert_eq!(memory(&facts(1000, "unlimited", "1024")).level, Level::Ok);
        assert_eq!(
            (privilege(&facts(0, "0", "0")).level, privilege(&facts(1, "0", "0")).level),
            (Level::Ok, Level::Warn)
        );
    }

    #[test]
    fn the_hard_limit_of_files_counts() {
        assert_eq!(files(&facts(0, "0", "1023")).level, Level::Warn);
        assert_eq!(files(&facts(0, "0", "1024")).level, Level::Ok);
        assert_eq!(files(&Facts { whose: "x", user: None, limits: String::new() }).level, Level::Warn);
    }

    #[test]
    fn this_process_has_a_user_and_limits() {
        let found = Facts::gather(Path::new("/nonexistent/control.sock"));
        assert!(found.user.is_some() && found.limit("Max open files").is_some(), "{}", found.limits);
    }
}
