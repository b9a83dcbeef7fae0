//! The NBD protocol, both sides.
//!
//! - [`wire`]: constants and messages of the protocol document, as open newtypes; encode and decode.
//! - [`proto`]: sans-I/O sessions for server and client: bytes in, actions out. No runtime, no socket, no clock.
//! - [`export`]: what a server serves: the [`export::Export`] trait that an owner of data implements.
//! - [`memory`]: an export in memory.
//! - [`server`], [`client`]: tokio drivers around the sessions.
//! - [`address`], [`uri`]: where a server is, and NBD URIs.
//! - [`socket`]: socket options that both drivers set.
//! - [`tls`]: certificates, encrypted streams, and who the peer is.
//! - [`limits`]: every bound, in one place.
//! - [`kernel`]: the Linux kernel's NBD device by generic netlink.
//!
//! This crate knows nothing of migration.

/// The README's examples, compiled.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

pub mod address;
pub mod client;
pub mod export;
pub mod kernel;
pub mod limits;
pub mod memory;
mod output;
mod promise;
pub mod proto;
pub mod server;
pub mod socket;
pub mod tls;
mod transport;
pub mod uri;
pub mod wire;

pub use transport::{Socket, Transport};
