//! The one place that maps failures to exit codes.
//!
//! A layer has its own small error type; at the node's rim each becomes a [`Failure`]: a kind, which decides the exit
//! code, and one line for a person, which says what was tried, on what, why it failed and what to do next. A failure
//! crosses the control socket as JSON, so that the command prints exactly what the node said.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What kind of failure it is: the documented exit codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// It was tried and failed.
    Failed,
    /// The arguments make no sense.
    Usage,
    /// It would be unsafe, or the phase is wrong.
    Refused,
    /// The peer or the node cannot be reached.
    Unreachable,
    /// It did not become true in time.
    TimedOut,
}

impl Kind {
    /// The exit code of the command.
    pub fn exit_code(self) -> u8 {
        match self {
            Kind::Failed => 1,
            Kind::Usage => 2,
            Kind::Refused => 3,
            Kind::Unreachable => 4,
            Kind::TimedOut => 5,
        }
    }
}

/// A failure as a user sees it: one line and an exit code.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Decides the exit code.
    pub kind: Kind,
    /// One line: what was tried, on what, why it failed, what to do next.
    pub message: String,
    /// For a refusal that will pass: milliseconds until the same command is safe.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
}

impl Failure {
    /// Of the given kind.
    pub fn new(kind: Kind, message: impl fmt::Display) -> Self {
        // One line is promised, and causes come from commands' stderr.
        let message = message.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        Self { kind, message, retry_after_ms: None }
    }

    /// It was tried and failed.
    pub fn failed(message: impl fmt::Display) -> Self {
        Self::new(Kind::Failed, message)
    }

    /// The arguments make no sense.
    pub fn usage(message: impl fmt::Display) -> Self {
        Self::new(Kind::Usage, message)
    }

    /// It would be unsafe, or the phase is wrong.
    pub fn refused(message: impl fmt::Display) -> Self {
        Self::new(Kind::Refused, message)
    }

    /// The peer or the node cannot be reached.
    pub fn unreachable(message: impl fmt::Display) -> Self {
        Self::new(Kind::Unreachable, message)
    }

    /// It did not become true in time.
    pub fn timed_out(message: impl fmt::Display) -> Self {
        Self::new(Kind::TimedOut, message)
    }

    /// Puts what was being done before the cause.
    pub fn context(mut self, what: impl fmt::Display) -> Self {
        self.message = format!("{what}: {}", self.message);
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

/// Everything that a user's command can end with.
pub type Outcome<T> = Result<T, Failure>;

/// An error and all its causes in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        // Many errors repeat their cause in their own text.
        if !line.contains(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        cause = error.source();
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_the_documented_ones() {
        let codes = [Kind::Failed, Kind::Usage, Kind::Refused, Kind::Unreachable, Kind::TimedOut].map(Kind::exit_code);
        assert_eq!(codes, [1, 2, 3, 4, 5]);
    }

    #[test]
    fn a_message_is_one_line() {
        assert_eq!(Failure::failed("a\nb  c\n").message, "a b c");
    }
}
