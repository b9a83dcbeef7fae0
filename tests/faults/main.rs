// tests/run: timeout=900
//! Real faults: links that break in every way, nodes that are killed or stopped at every phase, disks that fail.
//!
//! Two nodes in two network namespaces, a disk without a container that moves from A to B and is still filling; clients
//! on both sides that never stop, and a model of what they were promised. After each fault: who owns the disk, that it
//! is exactly one, that the data is right, and how long the service stood still (tables with `--nocapture`, and as CSV
//! in the target directory's `tmp`).
//!
//! Needs root, and the Debian packages iproute2, nftables, util-linux, mount, nbdkit, libnbd-bin, fuse3 and e2fsprogs.

#[path = "../support/mod.rs"]
mod support;

mod client;
mod hosts;
mod kills;
mod links;
mod model;
mod refusals;
mod service;
mod stops;
mod store;
