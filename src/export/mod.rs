//! A virtual disk as NBD clients see it: a local image, or one that fills itself from an upstream.
//!
//! [`LazyExport`] implements the nbd crate's export trait; `docs/architecture.md` draws the way of a read. A request is
//! answered inside the connection's task wherever the blocks are present; what must wait is a future of that task.
//!
//! - `lazy`: construction, start and shutdown
//! - `requests`: the trait's methods
//! - `mutation`: writes, trims and zeroings, and how they meet missing blocks
//! - `sparse`: reads that need no upstream, and their holes
//! - `flush`: FLUSH and FUA, shared by all connections
//! - `pace`: writing out while somebody writes, before the freeze point
//! - `contexts`: BLOCK_STATUS
//! - `gate`: who may do what at the moment (freeze point, fencing)
//! - `overview`: the map as a picture
//! - `home`: the thread where its clients are served

mod config;
mod contexts;
mod flush;
mod gate;
mod home;
mod lazy;
mod mutation;
mod overview;
mod pace;
mod promised;
mod requests;
mod sparse;
mod status;

pub use config::{ExportConfig, ExportError};
pub use gate::{Clock, Gate, GateMode, boottime_clock};
pub use home::Home;
pub use lazy::LazyExport;
pub use overview::Overview;
pub use status::DataStatus;

pub use crate::pull::PullState;

#[cfg(test)]
mod large_read_tests;
#[cfg(test)]
mod pull_thread_tests;
#[cfg(test)]
mod returning_tests;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod traffic_tests;
