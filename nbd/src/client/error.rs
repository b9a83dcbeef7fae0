//! What can go wrong for a client.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::address::Address;
use crate::proto::client::NegotiationError;
use crate::tls::TlsError;
use crate::wire::{Command, Errno};

/// Why an operation of a [`super::Client`] failed. It can be cloned, so that one failure can be told to several waiters.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ClientError {
    /// No connection could be made.
    #[error("cannot connect to {address}: is the server running there?")]
    Connect {
        /// Where to.
        address: Address,
        /// Why.
        source: Arc<io::Error>,
    },
    /// The server did not answer in time.
    #[error("the server did not finish the handshake within {} s", .0.as_secs_f32())]
    HandshakeTime(Duration),
    /// The stream failed in the handshake.
    #[error("the connection broke during the handshake")]
    Handshake(#[source] Arc<io::Error>),
    /// The handshake came to nothing.
    #[error(transparent)]
    Negotiation(#[from] NegotiationError),
    /// There is no TLS, where it is asked for.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The connection has ended; nothing is known about requests that were in flight.
    #[error("the connection to the NBD server is closed: {reason}")]
    Closed {
        /// Why it ended.
        reason: Arc<str>,
    },
    /// The server refused the request.
    #[error("the server refused {command} of {length} bytes at {offset}: {error}{}{}", place(.at), said(.message))]
    Refused {
        /// What was asked.
        command: Command,
        /// Offset in bytes.
        offset: u64,
        /// Length in bytes.
        length: u64,
        /// Why.
        error: Errno,
        /// What the server said.
        message: String,
        /// Where in the export it failed, in bytes, if the server said so.
        at: Option<u64>,
    },
    /// The request cannot be sent to this server.
    #[error("{command} of {length} bytes at {offset} is not possible: {why}")]
    Impossible {
        /// What was asked.
        command: Command,
        /// Offset in bytes.
        offset: u64,
        /// Length in bytes.
        length: u64,
        /// Why.
        why: &'static str,
    },
    /// The meta context was not granted.
    #[error("the server did not grant the meta context {0:?}")]
    NoContext(String),
}

impl ClientError {
    /// Whether the connection is gone, so that the request may succeed on a new one.
    pub fn is_closed(&self) -> bool {
        matches!(self, ClientError::Closed { .. })
    }
}

fn place(offset: &Option<u64>) -> String {
    offset.map_or(String::new(), |offset| format!(" at {offset}"))
}

fn said(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(" (it says: {message})") }
}
