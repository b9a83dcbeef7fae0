//! Looks at a disk: whenever its migration or its pull says that something changed, and all the time while data moves.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch::Receiver;
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::event::{EventKind, diff};
use super::history::{History, Sample};
use super::log::{EventLog, now_ms};
use crate::control::status::DiskStatus;
use crate::fetch::percentile;
use crate::files;
use crate::migration::driver::{DestinationView, SourceView};
use crate::node::{Disk, Role};
use crate::pull::PullState;

/// How often a disk is looked at where data moves.
const LOOK: Duration = Duration::from_millis(250);
/// How often one is where nothing does: devices and clients come and go there.
const IDLE_LOOKS: u32 = 12;
/// How often the history is written down.
const WRITE_EVERY: Duration = Duration::from_secs(60);

const HISTORY: &str = "history.json";

/// Runs until the disk is stopped.
pub(crate) async fn watch(disk: Arc<Disk>, log: Arc<EventLog>) {
    let mut before = disk.status();
    let opened = EventKind::Opened { size: before.size, present_bytes: before.present_bytes };
    log.tell(&before, &disk.directory, opened).await;
    disk.with_history(|history| *history = read(&disk.directory));
    let mut tick = interval(LOOK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut idle, mut figures, mut written) = (0, Figures::default(), Instant::now());
    let mut roles = disk.role_set.subscribe();
    let mut changes = Changes::of(&disk);
    let mut moves = data_moves(&before);
    loop {
        let looked = tokio::select! {
            () = disk.stop.cancelled() => break,
            () = changes.next() => false,
            // Its teller is the disk itself.
            _ = roles.changed() => {
                changes = Changes::of(&disk);
                false
            }
            _ = tick.tick() => true,
        };
        idle = if looked { idle + 1 } else { 0 };
        if looked && !moves && idle % IDLE_LOOKS != 0 {
            continue;
        }
        let status = disk.status();
        for kind in diff(&before, &status) {
            log.tell(&status, &disk.directory, kind).await;
        }
        let moved = std::mem::replace(&mut moves, data_moves(&status));
        // The beginning and the end are in it, however short it was.
        if (looked && moves) || moved != moves {
            let sample = figures.sample(&disk, &status);
            disk.with_history(|history| history.add(sample));
        }
        if (moved && !moves) || (moves && written.elapsed() >= WRITE_EVERY) {
            write(&disk).await;
            written = Instant::now();
        }
        if status.epoch == 0 {
            // For its lines in the log. In a migration the driver says it, and sooner.
            tracing::Span::current().record("phase", status.phase.as_str());
        }
        before = status;
    }
    if moves {
        write(&disk).await;
    }
    log.tell(&disk.status(), &disk.directory, EventKind::Closed).await;
}

/// Whether there is something to draw over time.
fn data_moves(status: &DiskStatus) -> bool {
    status.link != "none" || (status.missing_bytes > 0 && status.phase != "discarded")
}

/// What says that a disk may have changed.
struct Changes {
    pull: Option<Receiver<PullState>>,
    source: Option<Receiver<SourceView>>,
    destination: Option<Receiver<DestinationView>>,
}

impl Changes {
    fn of(disk: &Disk) -> Self {
        let (source, destination) = match disk.role() {
            Role::Idle => (None, None),
            Role::Source(source, _) => (Some(source.watch()), None),
            Role::Destination(destination) => (None, Some(destination.watch())),
        };
        Self { pull: Some(disk.export.complete()), source, destination }
    }

    async fn next(&mut self) {
        tokio::select! {
            () = changed(&mut self.pull) => {}
            () = changed(&mut self.source) => {}
            () = changed(&mut self.destination) => {}
        }
    }
}

/// One whose teller has gone changes no more.
async fn changed<T>(receiver: &mut Option<Receiver<T>>) {
    if let Some(watched) = receiver
        && watched.changed().await.is_ok()
    {
        return;
    }
    *receiver = None;
    std::future::pending().await
}

/// The figures of the last look, for what is told of the time since.
#[derive(Default)]
struct Figures {
    waits: Vec<u64>,
    stalled_us: u64,
}

impl Figures {
    fn sample(&mut self, disk: &Disk, status: &DiskStatus) -> Sample {
        let data = disk.export.status();
        let waits = disk.export.wait_counts();
        let fresh: Vec<u64> =
            waits.iter().enumerate().map(|(at, count)| count - self.waits.get(at).unwrap_or(&0)).collect();
        let mut sample = Sample {
            at_ms: now_ms(),
            present_bytes: status.present_bytes,
            dirty_bytes: status.dirty_bytes,
            pulled_bytes: status.pulled_bytes,
            skipped_bytes: status.skipped_bytes,
            demand_fetches: data.demand_fetches,
            background_fetches: data.background_fetches,
            waits: fresh.iter().sum(),
            wait_p99_us: percentile(&fresh, 99),
            stalled_us: status.stalled_us.saturating_sub(self.stalled_us),
            lease_remaining_ms: status.lease_remaining_ms,
            link_up: status.link != "down",
        };
        if let Role::Source(source, _) = disk.role() {
            // What there is to see is at the destination, as it was last heard.
            let there = source.view().progress;
            (sample.present_bytes, sample.dirty_bytes) = (there.present_bytes, there.dirty_bytes);
            (sample.pulled_bytes, sample.skipped_bytes) = (there.pulled_bytes, there.skipped_bytes);
            sample.demand_fetches = there.demand_fetches;
        }
        (self.waits, self.stalled_us) = (waits, status.stalled_us);
        sample
    }
}

/// Nothing depends on it: a file that is not there or cannot be read is an empty history.
fn read(directory: &Path) -> History {
    let text = std::fs::read(directory.join(HISTORY)).unwrap_or_default();
    serde_json::from_slice(&text).unwrap_or_default()
}

async fn write(disk: &Arc<Disk>) {
    let (text, path) = (serde_json::to_vec(&disk.history()), disk.directory.join(HISTORY));
    let written = tokio::task::spawn_blocking(move || files::write_atomically(&path, &text?));
    if let Ok(Err(error)) = written.await {
        tracing::debug!(disk = %disk.name(), %error, "the history is not in the disk's directory");
    }
}
