//! CRIU, and the runtimes that call it.

use std::time::Duration;

use super::finding::Finding;
use super::tool::{Asked, ask};

const LIMIT: Duration = Duration::from_secs(10);
/// Its first run after a boot learns the kernel's features.
const CRIU_LIMIT: Duration = Duration::from_secs(60);
/// The oldest CRIU that the tests have run with: Debian 12's.
const CRIU_TESTED: (u32, u32) = (3, 17);

/// What the programs say of themselves.
pub(super) struct Facts {
    /// `criu --version`.
    pub(super) criu: Asked,
    /// `criu check`.
    pub(super) criu_check: Asked,
    /// `runc --version`.
    pub(super) runc: Asked,
    /// `runc checkpoint --help`.
    pub(super) runc_checkpoint: Asked,
    /// `crun --version`.
    pub(super) crun: Asked,
    /// `podman --version`.
    pub(super) podman: Asked,
}

impl Facts {
    /// Asks them.
    pub(super) async fn gather() -> Self {
        Self {
            criu: ask("criu", &["--version"], CRIU_LIMIT).await,
            criu_check: ask("criu", &["check"], CRIU_LIMIT).await,
            runc: ask("runc", &["--version"], LIMIT).await,
            runc_checkpoint: ask("runc", &["checkpoint", "--help"], LIMIT).await,
            crun: ask("crun", &["--version"], LIMIT).await,
            podman: ask("podman", &["--version"], LIMIT).await,
        }
    }

    /// CRIU first, then each runtime.
    pub(super) fn verdicts(&self) -> Vec<Finding> {
        vec![criu(self), runc(self), crun(self), podman(self)]
    }

    fn any(&self) -> bool {
        [&self.runc, &self.crun, &self.podman].iter().any(|asked| **asked != Asked::Missing)
    }
}

fn criu(facts: &Facts) -> Finding {
    const CHECK: &str = "criu";
    const WHY: &str = "without it no container's memory can be saved or restored here";
    let said = match &facts.criu {
        Asked::Missing => return Finding::fail(CHECK, "not installed", WHY, "install the package criu"),
        Asked::Failed(why) => {
            return Finding::fail(CHECK, format!("it does not run ({why})"), WHY, "run `criu --version` and see why");
        }
        Asked::Said(said) => said,
    };
    let version = said.lines().find_map(|line| line.strip_prefix("Version:")).unwrap_or(said).trim();
    if let Asked::Failed(why) = &facts.criu_check {
        return Finding::fail(
            CHECK,
            format!("version {version}; `criu check` fails ({why})"),
            "this kernel, or whoever runs this, lacks something that a checkpoint needs",
            "run `criu check` as root and see what it names; a distribution's own kernel has all of it",
        );
    }
    if numbers(version).is_some_and(|version| version < CRIU_TESTED) {
        let (major, minor) = CRIU_TESTED;
        return Finding::warn(
            CHECK,
            format!("version {version}"),
            format!("it is older than {major}.{minor}, with which this program is tested"),
            "install a newer criu, the same on all hosts",
        );
    }
    Finding::ok(CHECK, format!("version {version}; `criu check` is content"))
}

fn runc(facts: &Facts) -> Finding {
    const CHECK: &str = "runc";
    match (&facts.runc, &facts.runc_checkpoint) {
        (Asked::Missing, _) => absent(CHECK, facts.any(), "runc"),
        (Asked::Failed(why), _) => broken(CHECK, why),
        (Asked::Said(said), Asked::Said(_)) => Finding::ok(CHECK, format!("{}; it can checkpoint", first(said))),
        (Asked::Said(said), _) => Finding::warn(
            CHECK,
            format!("{}, without `checkpoint`", first(said)),
            "this build cannot move containers",
            "install the distribution's package runc",
        ),
    }
}

fn crun(facts: &Facts) -> Finding {
    const CHECK: &str = "crun";
    match &facts.crun {
        Asked::Missing => absent(CHECK, facts.any(), "crun"),
        Asked::Failed(why) => broken(CHECK, why),
        Asked::Said(said) if said.contains("+CRIU") => {
            Finding::ok(CHECK, format!("{}; it can checkpoint", first(said)))
        }
        Asked::Said(said) => Finding::warn(
            CHECK,
            format!("{}, built without CRIU", first(said)),
            "containers that it runs cannot be moved",
            "run those that shall move with runc, or install a crun whose `crun --version` shows +CRIU",
        ),
    }
}

/// Podman checkpoints by the runtime below it.
fn podman(facts: &Facts) -> Finding {
    const CHECK: &str = "podman";
    match &facts.podman {
        Asked::Missing => absent(CHECK, facts.any(), "podman"),
        Asked::Failed(why) => broken(CHECK, why),
        Asked::Said(said) => {
            let able = facts.runc_checkpoint.said().is_some() && facts.runc.said().is_some()
                || facts.crun.said().is_some_and(|said| said.contains("+CRIU"));
            if able {
                return Finding::ok(CHECK, first(said));
            }
            Finding::warn(
                CHECK,
                first(said),
                "no runtime below it can checkpoint",
                "install runc, and run containers that shall move with `podman --runtime runc`",
            )
        }
    }
}

/// One runtime is enough.
fn absent(check: &'static str, others: bool, package: &str) -> Finding {
    if others {
        return Finding::ok(check, "not installed; another runtime is");
    }
    Finding::warn(
        check,
        "not installed, nor is another runtime",
        "only disks, and services with hooks of their own, can move from and to this host",
        format!("install the package {package}, or another runtime, if containers shall move"),
    )
}

fn broken(check: &'static str, why: &str) -> Finding {
    Finding::warn(
        check,
        format!("it does not run ({why})"),
        "its containers cannot be moved",
        format!("run `{check} --version` and see why"),
    )
}

fn first(said: &str) -> &str {
    said.lines().next().unwrap_or_default()
}

/// `3.17.1` as (3, 17).
fn numbers(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::finding::Level;

    fn good() -> Facts {
        Facts {
            criu: Asked::Said("Version: 3.17.1".into()),
            criu_check: Asked::Said("Looks good.".into()),
            runc: Asked::Said("runc version 1.1.5\nspec: 1.0.2".into()),
            runc_checkpoint: Asked::Said("NAME: runc checkpoint".into()),
            crun: Asked::Missing,
            podman: Asked::Missing,
        }
    }

    fn level(facts: &Facts, check: &str) -> Level {
        facts.verdicts().into_iter().find(|found| found.check == check).unwrap().level
    }

    #[test]
    fn criu_has_to_be_there_to_run_and_to_be_content() {
        assert_eq!(criu(&good()), Finding::ok("criu", "version 3.17.1; `criu check` is content"));
        assert_eq!(level(&Facts { criu: Asked::Missing, ..good() }, "criu"), Level::Fail);
        let uneasy = Facts { criu_check: Asked::Failed("1: no dirty tracking".into()), ..good() };
        assert!(level(&uneasy, "criu") == Level::Fail && criu(&uneasy).found.contains("no dirty tracking"));
        assert_eq!(level(&Facts { criu: Asked::Said("Version: 3.9".into()), ..good() }, "criu"), Level::Warn);
        assert_eq!(level(&Facts { criu: Asked::Said("Version: 4.0".into()), ..good() }, "criu"), Level::Ok);
    }

    #[test]
    fn one_runtime_is_enough_and_none_is_a_warning() {
        let facts = good();
        assert!(facts.verdicts().iter().all(|found| found.level == Level::Ok));
        let none = Facts { runc: Asked::Missing, ..good() };
        assert!(["runc", "crun", "podman"].iter().all(|check| level(&none, check) == Level::Warn));
    }

    #[test]
    fn a_crun_without_criu_can_move_nothing_nor_can_podman_on_it() {
        let crun = |said: &str| Facts {
            runc: Asked::Missing,
            crun: Asked::Said(said.into()),
            podman: Asked::Said("podman version 4.3.1".into()),
            ..good()
        };
        let without = crun("crun version 1.8.1\n+SYSTEMD +SELINUX");
        assert_eq!((level(&without, "crun"), level(&without, "podman")), (Level::Warn, Level::Warn));
        let with = crun("crun version 1.8.1\n+SYSTEMD +CRIU");
        assert_eq!((level(&with, "crun"), level(&with, "podman")), (Level::Ok, Level::Ok));
    }
}
