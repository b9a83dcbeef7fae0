//! Asking the other node.
//!
//! Idle connections are kept and used again, so that a question costs one round trip. Whether the other node said no,
//! or nobody knows, is the difference that the migration machines live on: [`CallError`].

use std::sync::Mutex;
use std::time::Duration;

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use tokio_util::codec::{Framed, LengthDelimitedCodec};

use super::link::{PeerAddress, PeerStream};
use super::{PREAMBLE_MESSAGES, Reply, Request, Response, codec};
use crate::error::Failure;
use crate::limits::PEER_IDLE_CONNECTIONS;

type Connection = Framed<PeerStream, LengthDelimitedCodec>;

/// A question that was not answered with yes.
#[derive(Clone, Debug, PartialEq)]
pub enum CallError {
    /// The other node said no: it is certainly not done.
    Refused(Failure),
    /// No answer: it may have been done.
    Silent(Failure),
}

impl CallError {
    /// The failure, whichever it is.
    pub fn into_failure(self) -> Failure {
        match self {
            CallError::Refused(failure) | CallError::Silent(failure) => failure,
        }
    }
}

/// The other node, at an address.
pub struct PeerClient {
    address: PeerAddress,
    idle: Mutex<Vec<Connection>>,
}

impl PeerClient {
    /// Nothing is dialled yet.
    pub fn new(address: PeerAddress) -> Self {
        Self { address, idle: Mutex::new(Vec::new()) }
    }

    /// Where it is.
    pub fn address(&self) -> &PeerAddress {
        &self.address
    }

    /// Asks, and waits for the answer for at most `within`. A kept connection that turns out dead is replaced once:
    /// every question may be asked again.
    pub async fn call(&self, request: &Request, within: Duration) -> Result<Reply, CallError> {
        let silent = |why: String| {
            CallError::Silent(Failure::unreachable(format!(
                "peer {} does not answer: {why}; check the link and the peer's node",
                self.address.address()
            )))
        };
        let asked = async {
            if let Some(connection) = self.take_idle()
                && let Ok(response) = self.ask(connection, request).await
            {
                return Ok(response);
            }
            let connection = self.address.dial(PREAMBLE_MESSAGES).await?;
            self.ask(Framed::new(connection, codec()), request).await
        };
        match tokio::time::timeout(within, asked).await {
            Ok(Ok(Response::Ok(reply))) => Ok(reply),
            Ok(Ok(Response::Err(failure))) => Err(CallError::Refused(failure)),
            Ok(Err(error)) => Err(silent(error.to_string())),
            Err(_) => Err(silent(format!("no answer within {} ms", within.as_millis()))),
        }
    }

    async fn ask(&self, mut connection: Connection, request: &Request) -> std::io::Result<Response> {
        connection.send(Bytes::from(serde_json::to_vec(request)?)).await?;
        let frame = connection.next().await.ok_or(std::io::ErrorKind::UnexpectedEof)??;
        let response = serde_json::from_slice(&frame)?;
        let mut idle = self.lock();
        if idle.len() < PEER_IDLE_CONNECTIONS {
            idle.push(connection);
        }
        Ok(response)
    }

    fn take_idle(&self) -> Option<Connection> {
        self.lock().pop()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Connection>> {
        self.idle.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
