//! What a disk's events and history say of its last migration or pull, in a few figures. Pure.

use serde::{Deserialize, Serialize};

use super::status::DiskStatus;
use crate::events::{Event, EventKind, Sample};

/// See the module's text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    /// How it stands.
    pub outcome: Ending,
    /// Why it failed, if it did and that is known.
    pub why: Option<String>,
    /// When it began, in milliseconds since 1970.
    pub began_ms: u64,
    /// When it ended, if it has.
    pub ended_ms: Option<u64>,
    /// From the beginning to the end, in milliseconds.
    pub took_ms: Option<u64>,
    /// How long the container stood still, once known; only the source knows.
    pub frozen_ms: Option<u64>,
    /// Bytes that came over the link.
    pub pulled_bytes: u64,
    /// Bytes that did not have to: holes and zeroes.
    pub skipped_bytes: u64,
    /// Requests to the source because a reader waited.
    pub demand_fetches: u64,
    /// Requests to the source in the background; only the destination knows.
    pub background_fetches: u64,
    /// When something stood still, the earliest first.
    pub windows: Vec<Window>,
}

/// How a migration or a pull stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ending {
    /// There was none, or it does not go on by itself.
    None,
    /// It goes on.
    UnderWay,
    /// All is at the destination.
    Complete,
    /// It was cancelled, rolled back or given up.
    Failed,
}

/// A time in which something stood still.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// What.
    pub kind: Still,
    /// From when, in milliseconds since 1970.
    pub from_ms: u64,
    /// Until when; none while it goes on.
    pub to_ms: Option<u64>,
}

/// What stood still.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Still {
    /// The container, between the hosts.
    Frozen,
    /// The disk at the destination: its lease was not renewed.
    Fenced,
    /// The other host was not heard.
    LinkDown,
    /// The background pull.
    Paused,
}

impl Summary {
    /// Of a disk as it is now. What was before the last migration began does not count.
    pub fn of(status: &DiskStatus, events: &[Event], history: &[Sample]) -> Self {
        let begins = |event: &Event| matches!(&event.kind, EventKind::Phase { .. }) && event.phase == "preparing";
        let first = events.iter().rposition(begins);
        let outcome = ending(status, first.is_some());
        let events = &events[first.unwrap_or(0)..];
        let began_ms = events.iter().map(|event| event.at_ms).chain(history.first().map(|sample| sample.at_ms)).next();
        let began_ms = began_ms.unwrap_or(0);
        let ends = |event: &&Event| {
            matches!(&event.kind, EventKind::Phase { .. })
                && matches!(event.phase.as_str(), "complete" | "released" | "discarded" | "rolled-back" | "serving")
        };
        let ended = events.iter().rfind(ends).map(|event| event.at_ms);
        let ended_ms = ended.filter(|_| matches!(outcome, Ending::Complete | Ending::Failed));
        let after: Vec<&Sample> = history.iter().filter(|sample| sample.at_ms >= began_ms).collect();
        // At the source the counters of the status are those of a disk that is all there.
        let own = |count: u64| if status.role == "source" { 0 } else { count };
        Self {
            why: (outcome == Ending::Failed).then(|| why(events)).flatten(),
            outcome,
            began_ms,
            ended_ms,
            took_ms: ended_ms.map(|end| end.saturating_sub(began_ms)),
            frozen_ms: events.iter().rev().find_map(frozen_ms).or(status.frozen_ms),
            pulled_bytes: grown(&after, |sample| sample.pulled_bytes).max(own(status.pulled_bytes)),
            skipped_bytes: grown(&after, |sample| sample.skipped_bytes).max(own(status.skipped_bytes)),
            demand_fetches: grown(&after, |sample| sample.demand_fetches).max(own(status.faults.count)),
            background_fetches: grown(&after, |sample| sample.background_fetches),
            windows: windows(events),
        }
    }

    /// How long something stood still altogether, in milliseconds; what goes on counts until `now_ms`.
    pub fn still_ms(&self, kind: Still, now_ms: u64) -> u64 {
        let those = self.windows.iter().filter(|window| window.kind == kind);
        those.map(|window| window.to_ms.unwrap_or(now_ms).saturating_sub(window.from_ms)).sum()
    }
}

fn ending(status: &DiskStatus, migrated: bool) -> Ending {
    match (status.role.as_str(), status.phase.as_str()) {
        (_, "complete" | "released") => Ending::Complete,
        (_, "discarded" | "rolled-back") => Ending::Failed,
        (_, "serving") if migrated => Ending::Failed,
        (_, "serving") => Ending::None,
        _ => Ending::UnderWay,
    }
}

fn why(events: &[Event]) -> Option<String> {
    let failure = events.iter().rev().find_map(|event| match &event.kind {
        EventKind::MigrateFailed { failure } => Some(failure.to_string()),
        _ => None,
    });
    failure.or_else(|| {
        events.iter().rev().find_map(|event| match &event.kind {
            EventKind::Error { message } => Some(message.clone()),
            _ => None,
        })
    })
}

fn frozen_ms(event: &Event) -> Option<u64> {
    match &event.kind {
        EventKind::Resumed { frozen_ms, .. } => Some(*frozen_ms),
        EventKind::Migrated(report) => Some(report.frozen_ms),
        _ => None,
    }
}

/// How much a counter grew that begins anew with the node's process.
fn grown(samples: &[&Sample], count: impl Fn(&Sample) -> u64) -> u64 {
    let mut before = 0;
    samples.iter().fold(0, |sum, sample| {
        let now = count(sample);
        let more = if now >= before { now - before } else { now };
        before = now;
        sum + more
    })
}

fn windows(events: &[Event]) -> Vec<Window> {
    let mut windows: Vec<Window> = Vec::new();
    for event in events {
        let mut end = |kind: Still| {
            let open = windows.iter_mut().filter(|window| window.kind == kind && window.to_ms.is_none());
            open.for_each(|window| window.to_ms = Some(event.at_ms));
        };
        let begun = match &event.kind {
            EventKind::Frozen { .. } => Some(Still::Frozen),
            EventKind::Resumed { .. } | EventKind::MigrateFailed { .. } => {
                end(Still::Frozen);
                None
            }
            EventKind::LinkDown => Some(Still::LinkDown),
            EventKind::LinkUp => {
                end(Still::LinkDown);
                None
            }
            EventKind::PullPaused { .. } => Some(Still::Paused),
            EventKind::PullResumed => {
                end(Still::Paused);
                None
            }
            EventKind::Phase { .. } => {
                end(Still::Fenced);
                if matches!(event.phase.as_str(), "complete" | "released" | "discarded" | "rolled-back" | "serving") {
                    [Still::LinkDown, Still::Paused].into_iter().for_each(&mut end);
                }
                (event.phase == "fenced").then_some(Still::Fenced)
            }
            // What was while the node did not run is not known.
            EventKind::Opened { .. } | EventKind::Closed => {
                [Still::Frozen, Still::Fenced, Still::LinkDown, Still::Paused].into_iter().for_each(&mut end);
                None
            }
            _ => None,
        };
        windows.extend(begun.map(|kind| Window { kind, from_ms: event.at_ms, to_ms: None }));
    }
    windows
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Failure;

    fn status(role: &str, phase: &str) -> DiskStatus {
        serde_json::from_value(serde_json::json!({
            "name": "web", "role": role, "phase": phase, "epoch": 1, "size": 4096, "block_size": 4096,
            "present_bytes": 4096, "dirty_bytes": 0, "missing_bytes": 0, "pulled_bytes": 0, "skipped_bytes": 0,
            "pull_rate": 0, "eta_s": null, "faults": { "count": 0, "p50_us": 0, "p99_us": 0, "max_us": 0 },
            "stalled_us": 0, "lease_remaining_ms": null, "link": "none", "frozen_ms": null, "upstream": "none",
            "clients": 0, "device": null, "peer": null, "container": null, "container_state": null,
            "paused": null, "last_error": null
        }))
        .unwrap()
    }

    /// One event each ten milliseconds.
    fn events(of: &[(&str, EventKind)]) -> Vec<Event> {
        let event = |(at, (phase, kind)): (usize, &(&str, EventKind))| Event {
            seq: at as u64 + 1,
            at_ms: 1000 + 10 * at as u64,
            disk: "web".into(),
            role: "source".into(),
            phase: (*phase).into(),
            epoch: 1,
            kind: kind.clone(),
        };
        of.iter().enumerate().map(event).collect()
    }

    fn phase(from: &str) -> EventKind {
        EventKind::Phase { from: from.into() }
    }

    #[test]
    fn a_migration_is_told_from_its_beginning_to_its_end_and_the_one_before_is_not() {
        let happened = events(&[
            ("serving", EventKind::Opened { size: 1, present_bytes: 1 }),
            ("preparing", phase("serving")),
            ("serving", EventKind::MigrateFailed { failure: Failure::failed("before") }),
            ("serving", phase("preparing")),
            ("preparing", phase("serving")),
            ("preparing", EventKind::Frozen { after_ms: 5 }),
            ("handed-over", phase("preparing")),
            ("handed-over", EventKind::Resumed { after_ms: 50, frozen_ms: 45 }),
            ("handed-over", EventKind::LinkDown),
            ("released", phase("handed-over")),
        ]);
        let sample = |at_ms, pulled_bytes| Sample { at_ms, pulled_bytes, ..Sample::default() };
        // The counter began anew in between, and the first sample is of the migration before.
        let history = [sample(1001, 999), sample(1050, 10), sample(1060, 30), sample(1070, 5)];
        let found = Summary::of(&status("source", "released"), &happened, &history);
        assert_eq!((found.outcome, found.why, found.frozen_ms), (Ending::Complete, None, Some(45)));
        assert_eq!((found.began_ms, found.ended_ms, found.took_ms), (1040, Some(1090), Some(50)));
        assert_eq!(found.pulled_bytes, 35);
        let windows = [
            Window { kind: Still::Frozen, from_ms: 1050, to_ms: Some(1070) },
            Window { kind: Still::LinkDown, from_ms: 1080, to_ms: Some(1090) },
        ];
        assert_eq!(found.windows, windows);
    }

    #[test]
    fn a_failure_says_why_and_the_container_stood_still_until_then() {
        let happened = events(&[
            ("preparing", phase("serving")),
            ("preparing", EventKind::Frozen { after_ms: 5 }),
            ("preparing", EventKind::Error { message: "not this".into() }),
            ("preparing", EventKind::MigrateFailed { failure: Failure::failed("criu said no") }),
            ("serving", phase("preparing")),
        ]);
        let found = Summary::of(&status("source", "serving"), &happened, &[]);
        assert_eq!((found.outcome, found.why.as_deref()), (Ending::Failed, Some("criu said no")));
        assert_eq!((found.still_ms(Still::Frozen, 9999), found.took_ms), (20, Some(40)));
    }

    #[test]
    fn what_goes_on_has_no_end() {
        let happened = events(&[
            ("preparing", EventKind::Opened { size: 1, present_bytes: 0 }),
            ("active", phase("preparing")),
            ("fenced", phase("active")),
        ]);
        let found = Summary::of(&status("destination", "fenced"), &happened, &[]);
        assert_eq!((found.outcome, found.ended_ms, found.began_ms), (Ending::UnderWay, None, 1000));
        assert_eq!(found.windows, [Window { kind: Still::Fenced, from_ms: 1020, to_ms: None }]);
        assert_eq!(found.still_ms(Still::Fenced, 1100), 80);
        let idle = Summary::of(&status("local", "serving"), &happened[..1], &[]);
        assert_eq!(idle.outcome, Ending::None);
    }
}
