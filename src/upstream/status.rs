//! What people are told about the upstream.

use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

/// The state of the connection that demand fetches use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LinkState {
    /// There is none, and none is needed: a local image, or everything is here.
    #[default]
    None,
    /// Being dialled for the first time.
    Connecting,
    /// Works.
    Connected,
    /// Lost; dialled again and again, readers of missing blocks wait.
    Lost,
    /// The upstream is another disk; nothing is taken from it.
    WrongDisk,
}

impl std::fmt::Display for LinkState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            LinkState::None => "none",
            LinkState::Connecting => "connecting",
            LinkState::Connected => "connected",
            LinkState::Lost => "lost",
            LinkState::WrongDisk => "wrong-disk",
        })
    }
}

/// The state with the last error, for `status`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpstreamStatus {
    /// Where it leads; empty when there is none.
    pub target: String,
    /// How it goes.
    pub state: LinkState,
    /// The last error of any connection or request, also when it was overcome.
    pub last_error: Option<String>,
    /// Requests that the upstream answered with an error.
    pub refused: u64,
}

/// The cell that lanes report to.
#[derive(Default)]
pub(crate) struct LinkReport(Mutex<UpstreamStatus>);

impl LinkReport {
    pub(crate) fn update(&self, change: impl FnOnce(&mut UpstreamStatus)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }

    pub(crate) fn get(&self) -> UpstreamStatus {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
