//! `lazy-migrate`: a running container moves to another host with a pause that does not depend on its disk.
//!
//! `docs/architecture.md` tells how the parts fit together; dependencies point one way:
//! cli -> node, control -> migration driver -> container, device, peer; and NBD server -> export -> fetch -> upstream.

pub mod block_map;
pub mod cli;
pub mod clock;
pub mod container;
pub mod control;
pub mod device;
pub mod error;
pub mod events;
pub mod export;
pub mod fetch;
pub mod files;
pub mod guard;
pub mod limits;
pub mod migration;
pub mod node;
pub mod peer;
pub mod pull;
pub mod store;
pub mod thread;
pub mod tracker;
pub mod units;
pub mod upstream;
pub mod web;
