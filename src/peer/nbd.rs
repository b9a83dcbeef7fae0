//! NBD data of a migration: the same port, another preamble.

use std::io;

use futures::future::BoxFuture;

use super::PREAMBLE_NBD;
use super::link::PeerAddress;
use crate::upstream::{Dialer, Stream};

/// Dials a source's peer port for blocks.
pub struct PeerDialer {
    address: PeerAddress,
}

impl PeerDialer {
    /// Nothing is dialled yet.
    pub fn new(address: PeerAddress) -> Self {
        Self { address }
    }
}

impl Dialer for PeerDialer {
    fn dial(&self) -> BoxFuture<'_, io::Result<Box<dyn Stream>>> {
        Box::pin(async { Ok(Box::new(self.address.dial(PREAMBLE_NBD).await?) as Box<dyn Stream>) })
    }

    fn is_encrypted(&self) -> bool {
        self.address.is_secured()
    }

    fn describe(&self) -> String {
        format!("peer {}", self.address.address())
    }
}
