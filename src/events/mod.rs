//! What happened, for those who were not looking: scripts that follow a node, pages that draw a migration, reports.
//!
//! Nobody who does something tells of it here. Each disk has an observer that looks at its status whenever
//! something of it changes, and a few times a second while data moves: the differences are events ([`diff`]), the figures a
//! [`History`]. Only the steps of a `migrate`, which may be shorter than a look, come from the command itself.

mod event;
mod history;
mod log;
mod observer;

pub use event::{Event, EventKind, diff};
pub use history::{History, Sample};
pub use log::EventLog;
pub(crate) use log::{now_ms, read};
pub(crate) use observer::watch;
