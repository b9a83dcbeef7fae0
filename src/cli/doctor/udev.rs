//! udev rules that open NBD devices behind our back.
//!
//! With the option `watch` udev looks at a device again each time a writer closes it: it reads signatures (which, on a
//! device that fills lazily, are fetches), and holds the device open for a moment, so that a detach finds it busy.

use std::collections::BTreeMap;
use std::path::Path;

use super::finding::Finding;

/// Where rules are, those that count most first.
const DIRECTORIES: [&str; 4] =
    ["/etc/udev/rules.d", "/run/udev/rules.d", "/usr/local/lib/udev/rules.d", "/usr/lib/udev/rules.d"];
/// A rules file is small; nothing that is larger is one.
const FILE_LIMIT: u64 = 1 << 20;

/// How udev is set up.
pub(super) struct Facts {
    /// Whether its daemon runs.
    pub(super) runs: bool,
    /// The rules in force, by file name, in their order.
    pub(super) rules: BTreeMap<String, String>,
}

impl Facts {
    /// Reads the rules.
    pub(super) fn gather() -> Self {
        let mut rules = BTreeMap::new();
        for directory in DIRECTORIES {
            for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                let small = entry.metadata().is_ok_and(|metadata| metadata.len() <= FILE_LIMIT);
                if name.ends_with(".rules") && small && !rules.contains_key(&name) {
                    // One that is linked to /dev/null, or cannot be read, hides those of the same name below.
                    rules.insert(name, std::fs::read_to_string(entry.path()).unwrap_or_default());
                }
            }
        }
        Self { runs: Path::new("/run/udev/control").exists(), rules }
    }
}

/// Whether NBD devices are watched.
pub(super) fn verdict(facts: &Facts) -> Finding {
    const CHECK: &str = "udev";
    if !facts.runs {
        return Finding::ok(CHECK, "udev does not run");
    }
    let mut watched_by = None;
    for (file, content) in &facts.rules {
        // A backslash at its end continues a line.
        let content = content.replace("\\\n", " ");
        for rule in content.lines().map(str::trim).filter(|rule| !rule.starts_with('#') && names_nbd(rule)) {
            if option(rule, "nowatch") {
                watched_by = None;
            } else if option(rule, "watch") {
                watched_by = Some(file);
            }
        }
    }
    match watched_by {
        None => Finding::ok(CHECK, "no rule watches nbd devices"),
        Some(file) => Finding::warn(
            CHECK,
            format!("{file} watches nbd devices"),
            "udev reads a device each time a writer closes it: fetches that nobody needs, and a detach may find it busy",
            "write SUBSYSTEM==\"block\", KERNEL==\"nbd*\", OPTIONS+=\"nowatch\" to \
             /etc/udev/rules.d/99-lazy-migrate.rules, then udevadm control --reload",
        ),
    }
}

/// Whether a rule is about nbd devices: a `KERNEL==` or `SUBSYSTEM==`-only rule for all block devices does not say so, and
/// distributions' rules name the drivers that they watch.
fn names_nbd(rule: &str) -> bool {
    values(rule, "KERNEL==").any(|value| value.split('|').any(|name| name == "*" || name.starts_with("nbd")))
}

fn option(rule: &str, wanted: &str) -> bool {
    values(rule, "OPTIONS").any(|value| value.split(',').any(|option| option.trim() == wanted))
}

/// The quoted values that follow a key.
fn values<'a>(rule: &'a str, key: &'a str) -> impl Iterator<Item = &'a str> {
    rule.match_indices(key).filter_map(move |(at, _)| rule[at + key.len()..].split('"').nth(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::finding::Level;

    /// As systemd ships it, in short.
    const BLOCK: &str = "# watch metadata changes\n\
        ACTION!=\"remove\", SUBSYSTEM==\"block\", \\\n  KERNEL==\"loop*|sd*|nbd*|zd*\", \\\n  OPTIONS+=\"watch\"\n";

    fn level(runs: bool, rules: &[(&str, &str)]) -> Level {
        let rules = rules.iter().map(|(name, content)| (name.to_string(), content.to_string())).collect();
        verdict(&Facts { runs, rules }).level
    }

    #[test]
    fn a_rule_that_watches_is_a_warning_until_a_later_one_takes_it_back() {
        let off = "SUBSYSTEM==\"block\", KERNEL==\"nbd*\", OPTIONS+=\"nowatch\"";
        assert_eq!(level(true, &[("60-block.rules", BLOCK)]), Level::Warn);
        assert_eq!(level(false, &[("60-block.rules", BLOCK)]), Level::Ok);
        assert_eq!(level(true, &[("60-block.rules", BLOCK), ("99-x.rules", off)]), Level::Ok);
        assert_eq!(level(true, &[("10-x.rules", off), ("60-block.rules", BLOCK)]), Level::Warn);
    }

    #[test]
    fn rules_of_other_devices_and_comments_count_for_nothing() {
        assert_eq!(level(true, &[("60-block.rules", &BLOCK.replace("nbd*|", ""))]), Level::Ok);
        assert_eq!(level(true, &[("60-block.rules", &BLOCK.replace("nbd*|", "xnbd*|"))]), Level::Ok);
        assert_eq!(level(true, &[("60-x.rules", "#KERNEL==\"nbd*\", OPTIONS+=\"watch\"")]), Level::Ok);
    }
}
