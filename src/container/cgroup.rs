//! Control groups (version 2 only): whether a container's tasks are frozen, and ending what a failed restore left.

use std::{
    io,
    path::{Component, Path, PathBuf},
    time::Duration,
};

use super::Error;

/// A control group by its path below the cgroup file system, for example `/lazy-migrate/web`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroup {
    path: String,
}

impl Cgroup {
    /// The group at `path` (absolute within the cgroup file system). It need not exist.
    pub fn at(path: &str) -> Result<Self, Error> {
        let bad = |why: &str| Error::Cgroup { what: format!("{path:?}"), why: why.to_owned() };
        // The path goes into criu's configuration file, where white space and '#' have a meaning.
        if !path.starts_with('/') || path.len() < 2 || path.len() > 1024 {
            return Err(bad("the path must be absolute, and not the root"));
        }
        if !path.chars().all(|c| c.is_ascii_alphanumeric() || "/_.+-:@".contains(c)) {
            return Err(bad("the path may hold only [A-Za-z0-9_.+:@-] and '/'"));
        }
        if Path::new(path).components().any(|c| c == Component::ParentDir) {
            return Err(bad("it is outside of what this host can see"));
        }
        Ok(Self { path: path.to_owned() })
    }

    /// The group of a process, from `/proc/PID/cgroup`.
    pub fn of_process(pid: u32) -> Result<Self, Error> {
        let file = PathBuf::from(format!("/proc/{pid}/cgroup"));
        let text = std::fs::read_to_string(&file).map_err(Error::io("read", &file))?;
        let path = text.lines().find_map(|l| l.strip_prefix("0::")).ok_or_else(|| Error::Cgroup {
            what: format!("process {pid}"),
            why: "it has none of version 2; this host must use cgroup v2 (the unified hierarchy)".to_owned(),
        })?;
        Self::at(path.trim_end_matches(" (deleted)"))
    }

    /// The path within the cgroup file system, as criu and runc want it.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The directory that holds its files: `cgroup.freeze`, `cgroup.events` and so on.
    /// Fails when no cgroup v2 file system is mounted.
    pub fn dir(&self) -> Result<PathBuf, Error> {
        Ok(mount_point()?.join(self.path.trim_start_matches('/')))
    }

    /// Asks the kernel to freeze or thaw its tasks, and does not wait: tasks in uninterruptible I/O follow when that ends.
    pub fn set_frozen(&self, frozen: bool) -> Result<(), Error> {
        let file = self.dir()?.join("cgroup.freeze");
        std::fs::write(&file, if frozen { "1" } else { "0" }).map_err(Error::io("write", &file))
    }

    /// Makes it, if it is not there.
    pub(crate) fn make(&self) -> Result<(), Error> {
        let dir = self.dir()?;
        std::fs::create_dir_all(&dir).map_err(Error::io("create the control group", dir))
    }

    /// Whether `other` is it, or is below it.
    pub fn holds(&self, other: &Cgroup) -> bool {
        Path::new(&other.path).starts_with(&self.path)
    }

    /// The processes in it and below it; one that does not exist has none.
    pub(crate) fn processes(&self) -> Result<Vec<u32>, Error> {
        let (mut found, mut next) = (Vec::new(), vec![self.dir()?]);
        while let Some(dir) = next.pop() {
            let file = dir.join("cgroup.procs");
            let text = match std::fs::read_to_string(&file) {
                Err(e) if gone(&e) => continue,
                other => other.map_err(Error::io("read", &file))?,
            };
            found.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()));
            let below = std::fs::read_dir(&dir).into_iter().flatten().flatten();
            next.extend(below.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()));
        }
        Ok(found)
    }

    /// Whether every task in it has stopped in the freezer (`frozen 1` in `cgroup.events`).
    pub fn is_frozen(&self) -> Result<bool, Error> {
        self.event("frozen")
    }

    /// Whether a live task is in it or below it; a group that does not exist has none.
    pub fn is_populated(&self) -> Result<bool, Error> {
        match self.event("populated") {
            Err(Error::Io { source, .. }) if gone(&source) => Ok(false),
            other => other,
        }
    }

    /// Kills all tasks in it, frozen ones too, and does not wait: those in uninterruptible I/O die when that ends. Nothing to
    /// do when it is gone.
    pub fn kill(&self) -> Result<(), Error> {
        let kill = self.dir()?.join("cgroup.kill");
        match std::fs::write(&kill, "1") {
            Err(e) if !gone(&e) => Err(Error::io("write", kill)(e)),
            _ => Ok(()),
        }
    }

    /// Kills all tasks in it, frozen ones too, and removes it and the groups below it. Nothing to do when it is gone.
    pub(crate) async fn destroy(&self, limit: Duration) -> Result<(), Error> {
        let dir = self.dir()?;
        self.kill()?;
        let deadline = tokio::time::Instant::now() + limit;
        loop {
            match remove_groups(&dir) {
                Ok(()) => return Ok(()),
                Err(e) if tokio::time::Instant::now() >= deadline => return Err(Error::io("remove", dir)(e)),
                Err(_) => tokio::time::sleep(super::POLL).await,
            }
        }
    }

    fn event(&self, key: &str) -> Result<bool, Error> {
        let file = self.dir()?.join("cgroup.events");
        let text = std::fs::read_to_string(&file).map_err(Error::io("read", &file))?;
        parse_event(&text, key).ok_or_else(|| Error::Cgroup {
            what: self.path.clone(),
            why: format!("{} has no line {key:?}", file.display()),
        })
    }
}

fn parse_event(text: &str, key: &str) -> Option<bool> {
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '))?;
    Some(value.trim() == "1")
}

fn gone(error: &io::Error) -> bool {
    // ENODEV: the group went away while its file was open.
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(nix::libc::ENODEV)
}

fn remove_groups(dir: &Path) -> io::Result<()> {
    let entries = match std::fs::read_dir(dir) {
        Err(e) if gone(&e) => return Ok(()),
        other => other?,
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            remove_groups(&entry.path())?;
        }
    }
    match std::fs::remove_dir(dir) {
        Err(e) if !gone(&e) => Err(e),
        _ => Ok(()),
    }
}

fn mount_point() -> Result<PathBuf, Error> {
    let file = "/proc/self/mountinfo";
    let text = std::fs::read_to_string(file).map_err(Error::io("read", file))?;
    find_mount(&text).ok_or_else(|| Error::Cgroup {
        what: "this host".to_owned(),
        why: "no cgroup2 file system is mounted; mount one at /sys/fs/cgroup".to_owned(),
    })
}

fn find_mount(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        (right.split(' ').next()? == "cgroup2").then(|| left.split(' ').nth(4).map(PathBuf::from))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_read_by_key() {
        assert_eq!(parse_event("populated 1\nfrozen 0\n", "frozen"), Some(false));
        assert_eq!(parse_event("populated 0\nfrozen 1\n", "frozen"), Some(true));
        assert_eq!(parse_event("populated 1\n", "frozen"), None);
    }

    #[test]
    fn the_unified_mount_is_found() {
        let text = "25 1 0:22 / /proc rw - proc proc rw\n\
            31 25 0:27 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(find_mount(text), Some(PathBuf::from("/sys/fs/cgroup")));
        assert_eq!(find_mount("31 25 0:27 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"), None);
    }

    #[test]
    fn a_group_holds_what_is_below_it_only() {
        let at = |path| Cgroup::at(path).unwrap();
        assert!(at("/web").holds(&at("/web")) && at("/web").holds(&at("/web/a/b")));
        assert!(!at("/web").holds(&at("/website")) && !at("/web/a").holds(&at("/web")));
    }

    #[test]
    fn paths_that_leave_the_tree_or_break_a_file_are_refused() {
        for bad in ["", "/", "web", "/../up", "/a/../../b", "/a b", "/a\nlog-file /etc/passwd", "/a#b"] {
            assert!(matches!(Cgroup::at(bad), Err(Error::Cgroup { .. })), "{bad:?} was taken");
        }
    }
}
