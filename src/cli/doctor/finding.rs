//! One thing that was looked at, and how it is told.

use serde::Serialize;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Level {
    /// As it should be.
    Ok,
    /// It works, but something should be known or done.
    Warn,
    /// Migrations from or to this host do not work, or are not safe.
    Fail,
}

impl Level {
    fn name(self) -> &'static str {
        match self {
            Level::Ok => "ok",
            Level::Warn => "warn",
            Level::Fail => "FAIL",
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Finding {
    /// What: a name that stays.
    pub(super) check: &'static str,
    /// How bad it is.
    pub(super) level: Level,
    /// What was found.
    pub(super) found: String,
    /// Why that matters; nothing where all is well.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) why: Option<String>,
    /// What to do about it; nothing where all is well.
    #[serde(rename = "do", skip_serializing_if = "Option::is_none")]
    pub(super) advice: Option<String>,
}

impl Finding {
    /// All is well.
    pub(super) fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, level: Level::Ok, found: line(found), why: None, advice: None }
    }

    /// Something should be known or done.
    pub(super) fn warn(
        check: &'static str,
        found: impl Into<String>,
        why: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        let (why, advice) = (Some(line(why)), Some(line(advice)));
        Self { check, level: Level::Warn, found: line(found), why, advice }
    }

    /// It does not work like this.
    pub(super) fn fail(
        check: &'static str,
        found: impl Into<String>,
        why: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Self { level: Level::Fail, ..Self::warn(check, found, why, advice) }
    }
}

/// Programs that are quoted write several lines, and control characters for terminals.
fn line(text: impl Into<String>) -> String {
    let text: String = text.into().chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// One line a check, with what to do below it.
pub(super) fn text(checks: &[Finding]) -> String {
    let width = checks.iter().map(|check| check.check.len()).max().unwrap_or(0);
    let mut lines = Vec::new();
    for Finding { check, level, found, why, advice } in checks {
        let why = why.as_deref().map(|why| format!(": {why}")).unwrap_or_default();
        lines.push(format!("{:<4}  {check:<width$}  {found}{why}", level.name()));
        lines.extend(advice.as_deref().map(|advice| format!("      do: {advice}")));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checks_are_aligned_and_advice_stands_below() {
        let told = text(&[
            Finding::ok("clock", "tsc"),
            Finding::fail("kernel-nbd", "no\nmodule", "nothing is attached", "install it"),
        ]);
        assert_eq!(
            told,
            "ok    clock       tsc\n\
             FAIL  kernel-nbd  no module: nothing is attached\n      do: install it"
        );
    }
}
