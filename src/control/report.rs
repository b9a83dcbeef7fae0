//! `GET /v1/disks/NAME/report`: all that is known of a migration or a pull, in one piece, for a page or a script.

use serde::{Deserialize, Serialize};

use super::status::DiskStatus;
use super::summary::Summary;
use crate::error::{Failure, Outcome};
use crate::events::{self, Event, Sample};
use crate::export::Overview;
use crate::fetch::wait_limit_us;
use crate::node::Disk;

/// The shape of a report; it rises when a field is renamed or leaves.
const SCHEMA: u32 = 1;

/// See the module's text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The version of this shape.
    pub schema: u32,
    /// The program's version.
    pub version: String,
    /// When it was made, in milliseconds since 1970.
    pub made_at_ms: u64,
    /// The disk as it is now.
    pub status: DiskStatus,
    /// Its last migration or pull in a few figures.
    pub summary: Summary,
    /// All that happened to it, the oldest first.
    pub events: Vec<Event>,
    /// How it filled.
    pub history: Vec<Sample>,
    /// How long requests waited for missing blocks, since the node's start.
    pub waits: Vec<Waits>,
    /// The map now.
    pub map: Overview,
}

/// How many requests waited so long. Lengths that nobody waited are left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waits {
    /// At most this long, in microseconds, and longer than the length before.
    pub up_to_us: u64,
    /// So many.
    pub count: u64,
}

/// Gathers it. It reads files and goes over the whole map: not for a thread that others wait for.
pub fn gather(disk: &Disk, cells: usize) -> Report {
    let counts = disk.export.wait_counts().into_iter().enumerate().filter(|(_, count)| *count > 0);
    let (status, events, history) = (disk.status(), events::read(&disk.directory), disk.history().samples().to_vec());
    Report {
        schema: SCHEMA,
        version: env!("CARGO_PKG_VERSION").into(),
        made_at_ms: events::now_ms(),
        summary: Summary::of(&status, &events, &history),
        status,
        events,
        history,
        waits: counts.map(|(bucket, count)| Waits { up_to_us: wait_limit_us(bucket), count }).collect(),
        map: disk.export.overview(cells),
    }
}

/// Runs what takes long on a thread of its own.
pub(super) async fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Outcome<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Failure::failed(format!("the answer could not be made: {error}; look at the node's log")))
}
