//! NBD data of a migration: the same port, another preamble.

use std::io;

use futures::future::BoxFuture;

use super::PREAMBLE_NBD;
use super::client::dial;
use crate::upstream::{Dialer, Stream};

/// Dials a source's peer port for blocks.
pub struct PeerDialer {
    address: String,
}

impl PeerDialer {
    /// `host:port`.
    pub fn new(address: impl Into<String>) -> Self {
        Self { address: address.into() }
    }
}

impl Dialer for PeerDialer {
    fn dial(&self) -> BoxFuture<'_, io::Result<Box<dyn Stream>>> {
        Box::pin(async move { Ok(Box::new(dial(&self.address, PREAMBLE_NBD).await?) as Box<dyn Stream>) })
    }

    fn describe(&self) -> String {
        format!("peer {}", self.address)
    }
}
