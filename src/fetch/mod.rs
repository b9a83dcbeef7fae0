//! Getting missing blocks from the upstream.
//!
//! [`queue`] decides, purely: what flies, in which class, who waits for it, and that a local write wins.
//! [`Fetcher`] is that queue with a map, a store and waiters around it; a lane executes flights over one connection at a
//! time: one lane for demand, others for the background.

mod assemble;
mod fetcher;
mod landing;
pub(crate) mod lane;
pub(crate) mod links;
pub mod queue;
mod ranges;
mod stats;
pub(crate) mod threads;
mod traffic;
mod waiters;
mod window;
pub(crate) mod write_out;

pub use assemble::Fetched;
pub use fetcher::{ClaimGuard, Fetcher, Waiting};
pub use queue::{Class, Ticket};
pub use stats::{Fault, FaultStats, FaultSummary, PullCounters, WaitHistogram, percentile, wait_limit_us};
pub use traffic::Traffic;
