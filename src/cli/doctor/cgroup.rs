//! Control groups: version 2 is needed, for its freezer.

use std::path::Path;

use super::finding::Finding;

/// How control groups are set up.
pub(super) struct Facts {
    /// `/proc/self/mounts`, the lines of control groups only.
    pub(super) mounts: String,
    /// Whether groups have the file `cgroup.freeze`; none when there is no group yet (the root never has it).
    pub(super) freezer: Option<bool>,
}

impl Facts {
    /// Looks.
    pub(super) fn gather() -> Self {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let mounts: Vec<_> = mounts.lines().filter(|line| kind(line).starts_with("cgroup")).collect();
        let root = mounts.iter().find(|line| kind(line) == "cgroup2").and_then(|line| line.split(' ').nth(1));
        let freezer = root.and_then(|root| has_freezer(Path::new(root)));
        Self { mounts: mounts.join("\n"), freezer }
    }
}

/// Any group will do.
fn has_freezer(root: &Path) -> Option<bool> {
    let mut entries = std::fs::read_dir(root).into_iter().flatten().flatten();
    let group = entries.find(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))?;
    Some(group.path().join("cgroup.freeze").exists())
}

fn kind(mount: &str) -> &str {
    mount.split(' ').nth(2).unwrap_or_default()
}

/// Whether containers can be frozen.
pub(super) fn verdict(facts: &Facts) -> Finding {
    const CHECK: &str = "cgroup";
    const WHY: &str = "containers are frozen, and guarded when their lease ends, by the freezer of version 2";
    const ADVICE: &str = "boot with systemd.unified_cgroup_hierarchy=1 (and without cgroup_enable=... for version 1)";
    let version_1 = facts.mounts.lines().filter(|line| kind(line) == "cgroup").count();
    let version_2 = facts.mounts.lines().any(|line| kind(line) == "cgroup2");
    match (version_2, version_1, facts.freezer) {
        (false, 0, _) => Finding::fail(CHECK, "no cgroup file system is mounted", WHY, ADVICE),
        (false, _, _) => Finding::fail(CHECK, "version 1 only", WHY, ADVICE),
        (true, _, Some(false)) => {
            Finding::fail(CHECK, "version 2, without a freezer", WHY, "use a kernel of 5.2 or later")
        }
        (true, 0, _) => Finding::ok(CHECK, "version 2"),
        (true, _, _) => Finding::warn(
            CHECK,
            format!("version 2 beside {version_1} controllers of version 1"),
            "runtimes choose version 1 on such a host, and then a container cannot be frozen or guarded",
            ADVICE,
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::finding::Level;

    #[test]
    fn only_version_2_with_a_freezer_is_well() {
        let level = |mounts: &str, freezer| verdict(&Facts { mounts: mounts.into(), freezer }).level;
        let (one, two) = ("cgroup /sys/fs/cgroup/pids cgroup rw 0 0", "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0");
        assert_eq!(level("", None), Level::Fail);
        assert_eq!(level(one, None), Level::Fail);
        assert_eq!(level(two, Some(false)), Level::Fail);
        assert_eq!((level(two, Some(true)), level(two, None)), (Level::Ok, Level::Ok));
        assert_eq!(level(&format!("{one}\n{two}"), Some(true)), Level::Warn);
    }
}
