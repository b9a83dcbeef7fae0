// tests/run: timeout=1200
//! Real nodes, as an operator runs them, with NBD servers and clients that are not ours.
//!
//! Needs the Debian packages nbdkit, qemu-utils, libnbd-bin, python3-libnbd and fio; those that mount or make network
//! namespaces need root, iproute2, e2fsprogs and fuse3 as well. What is missing makes a test fail, with its package.

#![allow(clippy::single_range_in_vec_init, reason = "an image is described by its ranges of data, often one")]

#[path = "../support/mod.rs"]
mod support;

mod client;
mod drain;
mod events;
mod filesystem;
mod full_disk;
mod handover;
mod liars;
mod link;
mod pair;
mod pull;
mod recovery;
mod refusals;
mod release;
mod returning;
mod rollback;
mod tls;
mod versions;
