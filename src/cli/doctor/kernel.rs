//! The kernel's NBD device, and what takes its place where the kernel has none.

use std::path::Path;
use std::time::Duration;

use super::finding::Finding;
use super::tool::{Asked, ask};

const LIMIT: Duration = Duration::from_secs(10);
/// Programs and device nodes that the way by FUSE and loop needs, with the package or module that brings each.
const FALLBACK: [(&str, &str); 3] = [("nbdfuse", "libnbd-bin"), ("fusermount3", "fuse3"), ("losetup", "mount")];

/// What is known of NBD devices.
pub(super) struct Facts {
    /// The running kernel's release.
    pub(super) release: String,
    /// Whether the module is loaded or built in.
    pub(super) loaded: bool,
    /// What loading it would come to (`modprobe --dry-run`).
    pub(super) loadable: Asked,
    /// The module's parameters, where it is loaded.
    pub(super) nbds_max: Option<u64>,
    /// Partitions that the kernel looks for on each device.
    pub(super) max_part: Option<u64>,
    /// What the other way lacks, with what brings it.
    pub(super) fallback_lacks: Vec<String>,
}

impl Facts {
    /// Looks; loads nothing.
    pub(super) async fn gather() -> Self {
        let number = |name: &str| {
            let text = std::fs::read_to_string(Path::new("/sys/module/nbd/parameters").join(name)).ok()?;
            text.trim().parse().ok()
        };
        let mut lacks = Vec::new();
        for (program, package) in FALLBACK {
            if ask(program, &["--version"], LIMIT).await == Asked::Missing {
                lacks.push(format!("{program} (package {package})"));
            }
        }
        for (node, module) in [("/dev/fuse", "fuse"), ("/dev/loop-control", "loop")] {
            if !Path::new(node).exists() && ask("modprobe", &["--dry-run", module], LIMIT).await.said().is_none() {
                lacks.push(format!("{node} (kernel module {module})"));
            }
        }
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Self {
            release: release.trim().to_owned(),
            loaded: Path::new("/sys/module/nbd").exists() || Path::new("/sys/block/nbd0").exists(),
            loadable: ask("modprobe", &["--dry-run", "nbd"], LIMIT).await,
            nbds_max: number("nbds_max"),
            max_part: number("max_part"),
            fallback_lacks: lacks,
        }
    }
}

/// The kernel's own device.
pub(super) fn nbd(facts: &Facts) -> Finding {
    const CHECK: &str = "kernel-nbd";
    let shown = |value: Option<u64>| value.map_or("its default".to_owned(), |value| value.to_string());
    if facts.loaded {
        return Finding::ok(
            CHECK,
            format!("loaded; nbds_max {}, max_part {}", shown(facts.nbds_max), shown(facts.max_part)),
        );
    }
    let (found, advice) = match &facts.loadable {
        Asked::Said(_) => {
            return Finding::warn(
                CHECK,
                "not loaded, but it can be",
                "the node may run without the right to load modules",
                "modprobe nbd, and for the next boot: echo nbd > /etc/modules-load.d/nbd.conf",
            );
        }
        Asked::Missing => (
            format!("not loaded, and there is no modprobe (kernel {})", facts.release),
            "install the package kmod, then run this again".to_owned(),
        ),
        Asked::Failed(why) => (
            format!("the kernel {} has no nbd module ({why})", facts.release),
            "install a kernel with CONFIG_BLK_DEV_NBD (Debian's linux-image-amd64 has it)".to_owned(),
        ),
    };
    if facts.fallback_lacks.is_empty() {
        let why = "devices come by FUSE and a loop device instead, which is slower and stops when its helper is killed";
        return Finding::warn(CHECK, found, why, advice);
    }
    Finding::fail(CHECK, found, "no export can be attached here, so no container can use one", advice)
}

/// By FUSE and a loop device.
pub(super) fn fallback(facts: &Facts) -> Finding {
    const CHECK: &str = "fuse-fallback";
    let lacks = facts.fallback_lacks.join(", ");
    match (facts.fallback_lacks.is_empty(), facts.loaded || facts.loadable.said().is_some()) {
        (true, _) => Finding::ok(CHECK, "nbdfuse, FUSE and loop devices are there"),
        (false, true) => {
            Finding::ok(CHECK, format!("not complete and not needed, as the kernel has nbd; it lacks {lacks}"))
        }
        (false, false) => Finding::fail(
            CHECK,
            format!("it lacks {lacks}"),
            "without the kernel's nbd it is the only way to attach an export",
            "apt install libnbd-bin fuse3 mount; modprobe -a fuse loop",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::finding::Level;

    fn facts(loaded: bool, loadable: Asked, lacks: &[&str]) -> Facts {
        Facts {
            release: "6.1".into(),
            loaded,
            loadable,
            nbds_max: Some(16),
            max_part: Some(0),
            fallback_lacks: lacks.iter().map(ToString::to_string).collect(),
        }
    }

    #[test]
    fn a_loaded_module_is_well_and_says_its_parameters() {
        let found = nbd(&facts(true, Asked::Missing, &["nbdfuse"]));
        assert_eq!((found.level, found.found.as_str()), (Level::Ok, "loaded; nbds_max 16, max_part 0"));
    }

    #[test]
    fn a_module_that_could_be_loaded_is_a_warning_with_the_command() {
        let found = nbd(&facts(false, Asked::Said(String::new()), &[]));
        assert!(found.level == Level::Warn && found.advice.unwrap().starts_with("modprobe nbd"));
    }

    #[test]
    fn without_a_module_it_depends_on_the_fallback() {
        let none = Asked::Failed("not found".into());
        assert_eq!(nbd(&facts(false, none.clone(), &[])).level, Level::Warn);
        assert_eq!(fallback(&facts(false, none.clone(), &[])).level, Level::Ok);
        let lacking = facts(false, none, &["nbdfuse (package libnbd-bin)"]);
        assert_eq!((nbd(&lacking).level, fallback(&lacking).level), (Level::Fail, Level::Fail));
        assert!(fallback(&lacking).found.contains("libnbd-bin"));
    }
}
