//! The page for Prometheus: names, types and units by its conventions; docs/monitoring.md lists and explains them.
//!
//! What a disk is (role, peer, container) stands in one info metric, to be joined where it is wanted: a label that changes
//! would begin new series of all the others.

use std::fmt::{self, Write};

use super::status::{DiskStatus, NodeStatus};
use crate::fetch::WaitHistogram;
use crate::migration::phase::{DestinationPhase, SourcePhase};

/// What the name of each metric begins with.
const PREFIX: &str = "lazy_migrate";
/// Phases of disks that are not in a migration; `complete` is one of a destination too.
const IDLE_PHASES: [&str; 3] = ["serving", "pulling", "complete"];

/// A figure of a disk: its name, type and help, and what it is; none where a disk has none.
struct Figure {
    name: &'static str,
    kind: &'static str,
    help: &'static str,
    value: fn(&DiskStatus) -> Option<f64>,
}

const fn gauge(name: &'static str, help: &'static str, value: fn(&DiskStatus) -> Option<f64>) -> Figure {
    Figure { name, kind: "gauge", help, value }
}

const fn counter(name: &'static str, help: &'static str, value: fn(&DiskStatus) -> Option<f64>) -> Figure {
    Figure { name, kind: "counter", help, value }
}

const FIGURES: [Figure; 16] = [
    gauge("disk_size_bytes", "Size of the disk.", |disk| Some(disk.size as f64)),
    gauge("disk_present_bytes", "Bytes that are in the local store.", |disk| Some(disk.present_bytes as f64)),
    gauge("disk_dirty_bytes", "Bytes written here since the handover.", |disk| Some(disk.dirty_bytes as f64)),
    gauge("disk_missing_bytes", "Bytes that are not in the local store yet.", |disk| Some(disk.missing_bytes as f64)),
    counter("disk_pulled_bytes_total", "Bytes fetched from the upstream.", |disk| Some(disk.pulled_bytes as f64)),
    counter("disk_skipped_bytes_total", "Bytes of holes and zeroes that were not fetched.", |disk| {
        Some(disk.skipped_bytes as f64)
    }),
    counter("disk_demand_fetches_total", "Fetches that a reader waited for.", |disk| Some(disk.faults.count as f64)),
    counter("disk_stalled_seconds_total", "Time that requests waited for missing blocks or were held.", |disk| {
        Some(disk.stalled_us as f64 / 1e6)
    }),
    gauge("disk_epoch", "The disk's epoch, which rises with each change of ownership.", |disk| Some(disk.epoch as f64)),
    gauge("disk_clients", "NBD clients that are connected.", |disk| Some(disk.clients as f64)),
    gauge("disk_attached", "Whether a block device of this host shows the disk.", |disk| flag(disk.device.is_some())),
    gauge("disk_pull_paused", "Whether the background pull stands still, because the store takes no more.", |disk| {
        flag(disk.paused.is_some())
    }),
    gauge("disk_upstream_connected", "Whether the host that missing blocks come from is connected.", |disk| {
        (disk.upstream != "none").then_some(()).and_then(|()| flag(disk.upstream == "connected"))
    }),
    gauge("disk_link_up", "Whether the migration's other host was heard lately.", |disk| {
        (disk.link != "none").then_some(()).and_then(|()| flag(disk.link == "up"))
    }),
    gauge("disk_lease_remaining_seconds", "What is left of the lease.", |disk| {
        disk.lease_remaining_ms.map(|left| left as f64 / 1e3)
    }),
    gauge("disk_frozen_seconds", "How long the container stood still in the last migration from here.", |disk| {
        disk.frozen_ms.map(|frozen| frozen as f64 / 1e3)
    }),
];

fn flag(set: bool) -> Option<f64> {
    Some(if set { 1.0 } else { 0.0 })
}

/// The whole page. `waits` has one histogram for each disk of the status, in its order.
pub(super) fn page(status: &NodeStatus, waits: &[WaitHistogram]) -> String {
    let mut page = Page::default();
    page.begin("build_info", "gauge", "The program's version.");
    page.line("build_info", &[("version", &status.version)], 1.0);
    page.begin("disks", "gauge", "Disks of this node.");
    page.line("disks", &[], status.disks.len() as f64);
    page.begin("disk_info", "gauge", "What a disk is, and who else has to do with it.");
    for disk in &status.disks {
        let (peer, container) =
            (disk.peer.as_deref().unwrap_or_default(), disk.container.as_deref().unwrap_or_default());
        page.line(
            "disk_info",
            &[("disk", &disk.name), ("role", &disk.role), ("peer", peer), ("container", container)],
            1.0,
        );
    }
    page.begin("disk_phase", "gauge", "The disk's phase: 1 for the one that it is in, 0 for all others.");
    for disk in &status.disks {
        for phase in phases() {
            let value = if disk.phase == phase { 1.0 } else { 0.0 };
            page.line("disk_phase", &[("disk", &disk.name), ("phase", phase)], value);
        }
    }
    for Figure { name, kind, help, value } in &FIGURES {
        page.begin(name, kind, help);
        for disk in &status.disks {
            if let Some(value) = value(disk) {
                page.line(name, &[("disk", &disk.name)], value);
            }
        }
    }
    page.begin("disk_fault_wait_seconds", "histogram", "How long requests waited for missing blocks.");
    for (disk, waits) in status.disks.iter().zip(waits) {
        for (bound, count) in &waits.below {
            page.bucket(&disk.name, &bound.to_string(), *count);
        }
        page.bucket(&disk.name, "+Inf", waits.count);
        page.line("disk_fault_wait_seconds_sum", &[("disk", &disk.name)], waits.sum_seconds);
        page.line("disk_fault_wait_seconds_count", &[("disk", &disk.name)], waits.count as f64);
    }
    page.0
}

/// Every phase that a disk can be in, each once.
fn phases() -> Vec<&'static str> {
    let source = SourcePhase::ALL.map(SourcePhase::name);
    let destination = DestinationPhase::ALL.map(DestinationPhase::name);
    let mut all: Vec<&str> = Vec::new();
    for phase in IDLE_PHASES.into_iter().chain(source).chain(destination) {
        if !all.contains(&phase) {
            all.push(phase);
        }
    }
    all
}

/// Text that grows; writing to it cannot fail.
#[derive(Default)]
struct Page(String);

impl Page {
    fn begin(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {PREFIX}_{name} {help}\n# TYPE {PREFIX}_{name} {kind}");
    }

    fn line(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        let _ = write!(self.0, "{PREFIX}_{name}");
        for (at, (label, value)) in labels.iter().enumerate() {
            let _ = write!(self.0, "{}{label}=\"{}\"", if at == 0 { '{' } else { ',' }, Escaped(value));
        }
        let _ = writeln!(self.0, "{} {value}", if labels.is_empty() { "" } else { "}" });
    }

    fn bucket(&mut self, disk: &str, bound: &str, count: u64) {
        self.line("disk_fault_wait_seconds_bucket", &[("disk", disk), ("le", bound)], count as f64);
    }
}

/// A label's value: a peer's address, and a container's name, are others' words.
struct Escaped<'a>(&'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|c| match c {
            '\\' => f.write_str("\\\\"),
            '"' => f.write_str("\\\""),
            '\n' => f.write_str("\\n"),
            c => f.write_char(c),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_escaped() {
        let mut page = Page::default();
        page.line("disk_info", &[("peer", "a\\b\"c\nd")], 1.0);
        assert_eq!(page.0, "lazy_migrate_disk_info{peer=\"a\\\\b\\\"c\\nd\"} 1\n");
    }

    #[test]
    fn every_phase_stands_there_once() {
        let all = phases();
        assert_eq!(all.iter().filter(|&&phase| phase == "complete").count(), 1);
        assert!(["serving", "pulling", "handed-over", "fenced", "discarded"].iter().all(|phase| all.contains(phase)));
    }

    #[test]
    fn a_node_without_disks_has_a_page() {
        let status = NodeStatus {
            schema: 1,
            version: "1".into(),
            state_dir: "/x".into(),
            nbd: vec![],
            peer: None,
            disks: vec![],
        };
        let page = page(&status, &[]);
        assert!(page.contains("lazy_migrate_build_info{version=\"1\"} 1\n") && page.contains("lazy_migrate_disks 0\n"));
    }
}
