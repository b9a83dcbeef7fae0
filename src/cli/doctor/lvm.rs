//! LVM and multipath: whoever scans all block devices finds those inside a container's disk, and holds them open.

use std::path::Path;

use super::finding::Finding;

/// What scans block devices here. `None`: not installed.
pub(super) struct Facts {
    /// `/etc/lvm/lvm.conf`.
    pub(super) lvm: Option<String>,
    /// Whether `/etc/lvm/devices/system.devices` is there.
    pub(super) devices_file: bool,
    /// `/etc/multipath.conf`; empty when multipath runs without one.
    pub(super) multipath: Option<String>,
}

impl Facts {
    /// Reads the files.
    pub(super) fn gather() -> Self {
        let there = |programs: &[&str]| programs.iter().any(|program| Path::new(program).exists());
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        Self {
            lvm: there(&["/usr/sbin/lvm", "/sbin/lvm"]).then(|| read("/etc/lvm/lvm.conf")),
            devices_file: Path::new("/etc/lvm/devices/system.devices").exists(),
            multipath: there(&["/usr/sbin/multipathd", "/sbin/multipathd"]).then(|| read("/etc/multipath.conf")),
        }
    }

    /// Both.
    pub(super) fn verdicts(&self) -> Vec<Finding> {
        vec![lvm(self), multipath(self)]
    }
}

fn lvm(facts: &Facts) -> Finding {
    const CHECK: &str = "lvm";
    let Some(config) = &facts.lvm else { return Finding::ok(CHECK, "not installed") };
    // Without a word of the file, a version that knows devices files uses them where there is one.
    if facts.devices_file && setting(config, "use_devicesfile").is_none_or(|value| value.trim() == "1") {
        return Finding::ok(CHECK, "uses only the devices of its devices file");
    }
    for key in ["global_filter", "filter"] {
        if setting(config, key).is_some_and(|value| rejects_nbd(&value)) {
            return Finding::ok(CHECK, format!("its {key} leaves nbd devices alone"));
        }
    }
    Finding::warn(
        CHECK,
        "it scans nbd devices",
        "a volume group inside a container's disk is activated on this host too, which pins the device and may write to it",
        "in /etc/lvm/lvm.conf, in the section devices: global_filter = [ \"r|^/dev/nbd|\", \"a|.*|\" ]",
    )
}

/// The value of a setting, with what comments there are taken out; arrays to their end.
fn setting(config: &str, key: &str) -> Option<String> {
    let plain: Vec<_> = config.lines().map(|line| line.split('#').next().unwrap_or_default()).collect();
    let plain = plain.join("\n");
    let (at, _) = plain.match_indices(key).find(|(at, _)| {
        let before = plain[..*at].chars().next_back();
        before.is_none_or(|c| c.is_whitespace() || "{/".contains(c))
            && plain[at + key.len()..].trim_start().starts_with('=')
    })?;
    let (_, value) = plain[at..].split_once('=')?;
    let value = value.trim_start();
    let end = if value.starts_with('[') { value.find(']')? + 1 } else { value.find('\n').unwrap_or(value.len()) };
    Some(value[..end].to_owned())
}

/// Whether a filter rejects `/dev/nbd0`: the first pattern that matches decides, and what matches none is accepted.
///
/// Patterns are regular expressions; those that people write for this are known by their look: the device by name, or all.
fn rejects_nbd(filter: &str) -> bool {
    for pattern in filter.split('"').skip(1).step_by(2) {
        let mut letters = pattern.chars();
        let (action, delimiter) = (letters.next(), letters.next());
        let body = letters.as_str().trim_end_matches(|c| Some(c) == delimiter);
        let body = body.trim_start_matches('^').trim_end_matches('$').trim_end_matches(".*").trim_end_matches('*');
        if body.contains("nbd") || ["", ".", "/", "/dev", "/dev/"].contains(&body) {
            return action == Some('r');
        }
    }
    false
}

fn multipath(facts: &Facts) -> Finding {
    const CHECK: &str = "multipath";
    let Some(config) = &facts.multipath else { return Finding::ok(CHECK, "not installed") };
    let plain: Vec<_> = config.lines().map(|line| line.split(['#', '!']).next().unwrap_or_default()).collect();
    let plain = plain.join("\n");
    let exceptions = plain.find("blacklist_exceptions").and_then(|at| plain[at..].split(['{', '}']).nth(1));
    let excepted = exceptions.is_some_and(|section| {
        section.lines().filter(|line| line.trim_start().starts_with("devnode")).any(|line| {
            let pattern = line.split('"').nth(1).unwrap_or_default();
            pattern.contains("nbd") || [".*", "^.*", "*", "^"].contains(&pattern)
        })
    });
    if excepted {
        return Finding::warn(
            CHECK,
            "its blacklist_exceptions let nbd devices in",
            "a path that multipath claims is held open, and the container's file system cannot be mounted",
            "name only your own devices in blacklist_exceptions of /etc/multipath.conf, then multipathd reconfigure",
        );
    }
    Finding::ok(CHECK, "leaves nbd devices alone")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::finding::Level;

    fn lvm_level(config: &str, devices_file: bool) -> Level {
        lvm(&Facts { lvm: Some(config.into()), devices_file, multipath: None }).level
    }

    #[test]
    fn lvm_that_scans_everything_is_a_warning() {
        assert_eq!(lvm(&Facts { lvm: None, devices_file: false, multipath: None }).level, Level::Ok);
        assert_eq!(lvm_level("", false), Level::Warn);
        assert_eq!(lvm_level("devices {\n # global_filter = [ \"r|nbd|\" ]\n}", false), Level::Warn);
        assert_eq!(lvm_level("devices {\n filter = [ \"a|.*|\" ]\n}", false), Level::Warn);
        assert_eq!(lvm_level("devices {\n filter = [ \"a|.*|\", \"r|/dev/nbd|\" ]\n}", false), Level::Warn);
    }

    #[test]
    fn lvm_with_a_filter_or_a_devices_file_is_well() {
        assert_eq!(lvm_level("devices {\n global_filter = [ \"r|^/dev/nbd|\", \"a|.*|\" ]\n}", false), Level::Ok);
        assert_eq!(lvm_level("devices { filter = [\n \"a|/dev/sda.*|\",\n \"r|.*|\" ] }", false), Level::Ok);
        assert_eq!(lvm_level("devices/global_filter=[ \"r|nbd.*|\" ]", false), Level::Ok);
        assert_eq!(lvm_level("", true), Level::Ok);
        assert_eq!(lvm_level("devices {\n use_devicesfile = 0\n}", true), Level::Warn);
    }

    #[test]
    fn multipath_takes_nbd_devices_only_when_told_to() {
        let level = |config: Option<&str>| {
            multipath(&Facts { lvm: None, devices_file: false, multipath: config.map(Into::into) }).level
        };
        assert_eq!(level(None), Level::Ok);
        assert_eq!(level(Some("defaults { }")), Level::Ok);
        assert_eq!(level(Some("blacklist_exceptions {\n devnode \"^sd[a-z]\"\n}")), Level::Ok);
        assert_eq!(level(Some("blacklist_exceptions {\n devnode \".*\"\n}")), Level::Warn);
        assert_eq!(level(Some("blacklist_exceptions {\n devnode \"^(nbd)[0-9]\"\n}")), Level::Warn);
    }
}
