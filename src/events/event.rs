//! An event, and which of them lie between two looks at a disk. Pure.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::control::api::{MigrateEvent, MigrateReport};
use crate::control::status::DiskStatus;
use crate::error::Failure;
use crate::migration::driver::ContainerState;

/// One thing that happened to one disk. Kinds and fields are added, never renamed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Rises by one with each event of a node, also over restarts.
    pub seq: u64,
    /// Milliseconds since 1970, by this host's clock.
    pub at_ms: u64,
    /// The disk.
    pub disk: String,
    /// Its role then: `local`, `pull`, `source` or `destination`.
    pub role: String,
    /// Its phase then.
    pub phase: String,
    /// Its epoch then.
    pub epoch: u64,
    /// What it was.
    #[serde(flatten)]
    pub kind: EventKind,
}

/// What happened. Times in a `migrate` are milliseconds since that command.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum EventKind {
    /// The node serves it: it is new, or the node has started.
    Opened {
        /// Bytes.
        size: u64,
        /// Bytes that are in the local store.
        present_bytes: u64,
    },
    /// The node does not serve it any more: it was removed, or the node stops.
    Closed,
    /// Its phase or its role is another.
    Phase {
        /// The phase before.
        from: String,
    },
    /// The other host is heard.
    LinkUp,
    /// The other host is not heard.
    LinkDown,
    /// A block device serves it.
    Attached {
        /// The device.
        device: PathBuf,
    },
    /// No block device serves it any more.
    Detached {
        /// The device.
        device: PathBuf,
    },
    /// Its NBD clients come or go: only the first and the last are told.
    Clients {
        /// How many there are.
        count: u64,
    },
    /// Where it comes from answers, or does not.
    Upstream {
        /// As in the status.
        state: String,
    },
    /// The background pull stands still.
    PullPaused {
        /// Why.
        why: String,
    },
    /// It goes on.
    PullResumed,
    /// What the container does that came here with it.
    Container {
        /// As in the status; none once it is not looked after any more.
        state: Option<ContainerState>,
    },
    /// Something went wrong; nothing is lost by it.
    Error {
        /// One line.
        message: String,
    },
    /// `migrate`: the destination is ready.
    Prepared {
        /// Since the command.
        after_ms: u64,
    },
    /// `migrate`: a round of the memory was copied; the container runs on.
    Precopied {
        /// Since the command.
        after_ms: u64,
        /// Which; the first is 1.
        round: u32,
        /// Its size.
        image_bytes: u64,
    },
    /// `migrate`: the container stands still.
    Frozen {
        /// Since the command.
        after_ms: u64,
    },
    /// `migrate`: the checkpoint is at the destination.
    Checkpointed {
        /// Since the command.
        after_ms: u64,
        /// Its size.
        image_bytes: u64,
    },
    /// `migrate`: the destination owns the disk.
    HandedOver {
        /// Since the command.
        after_ms: u64,
    },
    /// `migrate`: the container runs at the destination.
    Resumed {
        /// Since the command.
        after_ms: u64,
        /// From frozen to resumed.
        frozen_ms: u64,
    },
    /// `migrate`: everything is at the destination, and the source released.
    Migrated(MigrateReport),
    /// `migrate`: it was not done.
    MigrateFailed {
        /// Why, and how things stand.
        failure: Failure,
    },
}

impl EventKind {
    /// What a step of a `migrate` is here; progress is none.
    pub fn of_migrate(step: &MigrateEvent) -> Option<EventKind> {
        Some(match step.clone() {
            MigrateEvent::Prepared { at_ms } => EventKind::Prepared { after_ms: at_ms },
            MigrateEvent::Precopied { at_ms, round, image_bytes } => {
                EventKind::Precopied { after_ms: at_ms, round, image_bytes }
            }
            MigrateEvent::Frozen { at_ms } => EventKind::Frozen { after_ms: at_ms },
            MigrateEvent::Checkpointed { at_ms, image_bytes } => {
                EventKind::Checkpointed { after_ms: at_ms, image_bytes }
            }
            MigrateEvent::HandedOver { at_ms } => EventKind::HandedOver { after_ms: at_ms },
            MigrateEvent::Resumed { at_ms, frozen_ms } => EventKind::Resumed { after_ms: at_ms, frozen_ms },
            MigrateEvent::Progress { .. } => return None,
            MigrateEvent::Complete(report) => EventKind::Migrated(report),
            MigrateEvent::Failed(failure) => EventKind::MigrateFailed { failure },
        })
    }
}

/// What happened between two looks at the same disk, in the order in which it is told.
pub fn diff(before: &DiskStatus, after: &DiskStatus) -> Vec<EventKind> {
    let mut events = Vec::new();
    if (&before.phase, &before.role, before.epoch) != (&after.phase, &after.role, after.epoch) {
        events.push(EventKind::Phase { from: before.phase.clone() });
    }
    if before.link != after.link {
        match after.link.as_str() {
            "up" => events.push(EventKind::LinkUp),
            // A link that nobody needs any more is not a lost one.
            "down" if before.link == "up" => events.push(EventKind::LinkDown),
            _ => {}
        }
    }
    if before.device != after.device {
        events.extend(before.device.clone().map(|device| EventKind::Detached { device }));
        events.extend(after.device.clone().map(|device| EventKind::Attached { device }));
    }
    if (before.clients == 0) != (after.clients == 0) {
        events.push(EventKind::Clients { count: after.clients });
    }
    if before.upstream != after.upstream {
        events.push(EventKind::Upstream { state: after.upstream.clone() });
    }
    match (&before.paused, &after.paused) {
        (None, Some(why)) => events.push(EventKind::PullPaused { why: why.clone() }),
        (Some(_), None) => events.push(EventKind::PullResumed),
        _ => {}
    }
    if before.container_state != after.container_state {
        events.push(EventKind::Container { state: after.container_state });
    }
    if before.last_error != after.last_error {
        events.extend(after.last_error.clone().map(|message| EventKind::Error { message }));
    }
    events
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in super::super) fn status() -> DiskStatus {
        serde_json::from_value(serde_json::json!({
            "name": "web", "role": "destination", "phase": "active", "epoch": 3, "size": 4096, "block_size": 4096,
            "present_bytes": 0, "dirty_bytes": 0, "missing_bytes": 4096, "pulled_bytes": 0, "skipped_bytes": 0,
            "pull_rate": 0, "eta_s": null, "faults": { "count": 0, "p50_us": 0, "p99_us": 0, "max_us": 0 },
            "stalled_us": 0, "lease_remaining_ms": 900, "link": "up", "frozen_ms": null, "upstream": "connected",
            "clients": 0, "device": null, "peer": "10.0.0.1:10810", "container": null, "container_state": null,
            "paused": null, "last_error": null
        }))
        .unwrap()
    }

    #[test]
    fn figures_that_move_all_the_time_are_no_events() {
        let before = status();
        let mut after = before.clone();
        (after.present_bytes, after.missing_bytes, after.pull_rate, after.eta_s) = (4096, 0, 9, Some(0));
        (after.lease_remaining_ms, after.stalled_us, after.faults.count) = (Some(1), 5, 1);
        assert_eq!(diff(&before, &after), []);
    }

    #[test]
    fn each_change_is_told_once_and_its_end_too() {
        let before = status();
        let mut after = before.clone();
        (after.phase, after.link) = ("fenced".into(), "down".into());
        (after.clients, after.device) = (2, Some("/dev/nbd1".into()));
        (after.upstream, after.paused) = ("connecting".into(), Some("no space".into()));
        after.container_state = Some(ContainerState::Frozen);
        after.last_error = Some("gone".into());
        let there = [
            EventKind::Phase { from: "active".into() },
            EventKind::LinkDown,
            EventKind::Attached { device: "/dev/nbd1".into() },
            EventKind::Clients { count: 2 },
            EventKind::Upstream { state: "connecting".into() },
            EventKind::PullPaused { why: "no space".into() },
            EventKind::Container { state: Some(ContainerState::Frozen) },
            EventKind::Error { message: "gone".into() },
        ];
        assert_eq!(diff(&before, &after), there);
        assert_eq!(diff(&after, &after), []);
        let back = [
            EventKind::Phase { from: "fenced".into() },
            EventKind::LinkUp,
            EventKind::Detached { device: "/dev/nbd1".into() },
            EventKind::Clients { count: 0 },
            EventKind::Upstream { state: "connected".into() },
            EventKind::PullResumed,
            EventKind::Container { state: None },
        ];
        assert_eq!(diff(&after, &before), back);
    }

    #[test]
    fn a_link_that_is_not_needed_any_more_is_not_lost() {
        let before = status();
        let mut after = before.clone();
        (after.phase, after.link) = ("complete".into(), "none".into());
        assert_eq!(diff(&before, &after), [EventKind::Phase { from: "active".into() }]);
    }

    #[test]
    fn a_line_says_what_it_is_and_when() {
        let event = Event {
            seq: 7,
            at_ms: 1,
            disk: "web".into(),
            role: "source".into(),
            phase: "frozen".into(),
            epoch: 2,
            kind: EventKind::Frozen { after_ms: 12 },
        };
        let line = serde_json::to_value(&event).unwrap();
        let expected = serde_json::json!({
            "seq": 7, "at_ms": 1, "disk": "web", "role": "source", "phase": "frozen", "epoch": 2, "event": "frozen",
            "after_ms": 12
        });
        assert_eq!(line, expected);
        assert_eq!(serde_json::from_value::<Event>(line).unwrap(), event);
    }
}
