//! Prometheus text: one gauge or counter a figure of the status.

use std::fmt::Write;

use super::status::{DiskStatus, NodeStatus};

/// A figure: its name, type and help, and where it stands in the status.
type Figure = (&'static str, &'static str, &'static str, fn(&DiskStatus) -> f64);

const FIGURES: &[Figure] = &[
    ("disk_size_bytes", "gauge", "Size of the disk.", |disk| disk.size as f64),
    ("disk_present_bytes", "gauge", "Bytes that are in the local store.", |disk| disk.present_bytes as f64),
    ("disk_dirty_bytes", "gauge", "Bytes written here since the handover.", |disk| disk.dirty_bytes as f64),
    ("disk_missing_bytes", "gauge", "Bytes that are not in the local store.", |disk| disk.missing_bytes as f64),
    ("disk_pulled_bytes_total", "counter", "Bytes fetched from the upstream.", |disk| disk.pulled_bytes as f64),
    ("disk_skipped_bytes_total", "counter", "Bytes of holes and zeroes, not fetched.", |disk| {
        disk.skipped_bytes as f64
    }),
    ("disk_demand_fetches_total", "counter", "Fetches that a reader waited for.", |disk| disk.faults.count as f64),
    ("disk_stalled_seconds_total", "counter", "Time that I/O was held.", |disk| disk.stalled_us as f64 / 1e6),
    ("disk_epoch", "gauge", "The disk's epoch.", |disk| disk.epoch as f64),
    ("disk_clients", "gauge", "NBD clients.", |disk| disk.clients as f64),
];

/// The whole page.
pub(super) fn page(status: &NodeStatus) -> String {
    let mut text = String::new();
    for (name, kind, help, value) in FIGURES {
        let _ = writeln!(text, "# HELP lazy_migrate_{name} {help}\n# TYPE lazy_migrate_{name} {kind}");
        for disk in &status.disks {
            // Names have no characters that a label would have to escape.
            let _ = writeln!(
                text,
                "lazy_migrate_{name}{{disk=\"{}\",role=\"{}\",phase=\"{}\"}} {}",
                disk.name,
                disk.role,
                disk.phase,
                value(disk)
            );
        }
    }
    text
}
