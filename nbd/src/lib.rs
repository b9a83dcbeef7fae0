//! The NBD protocol, both sides.
//!
//! - [`wire`]: constants and messages of the protocol document, as open newtypes; encode and decode.
//! - [`proto`]: sans-I/O sessions for server and client: bytes in, actions out. No runtime, no socket, no clock.
//! - [`export`]: what a server serves: the [`export::Export`] trait that an owner of data implements.
//! - [`server`], [`client`]: tokio drivers around the sessions.
//! - [`uri`]: NBD URIs.
//! - [`kernel`]: the Linux kernel's NBD device by generic netlink.
//!
//! This crate knows nothing of migration.

pub mod client;
pub mod export;
pub mod kernel;
pub mod proto;
pub mod server;
pub mod uri;
pub mod wire;
