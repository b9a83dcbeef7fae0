//! The background pull: in which order the rest comes ([`order`], pure), and what the upstream tells about it.

mod maps;
pub mod order;
pub(crate) mod puller;

use serde::{Deserialize, Serialize};

pub(crate) use maps::CONTEXTS;
pub use order::{Order, PullOrder, Step};

/// How the pull goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PullState {
    /// The background pull is switched off: only what clients ask for comes.
    Off,
    /// It goes on (or waits for the upstream, see there).
    Pulling,
    /// The store takes no more bytes; it is tried again every second.
    PausedNoSpace,
    /// Every block is present and durable; the upstream is not needed any more.
    Complete,
}
