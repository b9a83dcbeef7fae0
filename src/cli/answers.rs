//! How a command prints its one answer: a line for a person, or JSON.

use std::io::{IsTerminal, Write};

use serde::Serialize;

use crate::error::{Failure, Outcome};

/// The chosen form.
pub(super) struct Answer {
    /// JSON instead of text.
    pub(super) json: bool,
}

impl Answer {
    /// Prints `value` as JSON, or `text`.
    pub(super) fn print(&self, value: &impl Serialize, text: impl FnOnce() -> String) -> Outcome<()> {
        let line = if self.json {
            serde_json::to_string(value).map_err(|error| Failure::failed(format!("cannot print JSON: {error}")))?
        } else {
            text()
        };
        let mut out = std::io::stdout().lock();
        match writeln!(out, "{line}").and_then(|()| out.flush()) {
            Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
                Err(Failure::failed(format!("cannot write the answer: {error}")))
            }
            _ => Ok(()),
        }
    }
}

/// Whether a person watches what goes to stderr.
pub(super) fn watched() -> bool {
    std::io::stderr().is_terminal()
}

/// `1.5 GiB`.
pub(super) fn bytes(count: u64) -> String {
    indicatif::BinaryBytes(count).to_string()
}
