//! Asking the other node.
//!
//! Idle connections are kept and used again, so that a question costs one round trip. Whether the other node said no,
//! or nobody knows, is the difference that the migration machines live on: [`CallError`].

use std::sync::Mutex;
use std::time::Duration;

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use tokio_util::codec::{Framed, LengthDelimitedCodec};

use super::hello::{Hello, HelloAnswer};
use super::link::{PeerAddress, PeerStream};
use super::{PREAMBLE_MESSAGES, Reply, Request, Response, codec};
use crate::error::{Failure, Outcome};
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
        let asked = async {
            if let Some(connection) = self.take_idle()
                && let Ok(response) = self.ask(connection, request).await
            {
                return Ok(response);
            }
            let connection = self.connect().await?;
            self.ask(connection, request).await.map_err(|error| self.silent(error))
        };
        match tokio::time::timeout(within, asked).await {
            Ok(Ok(Response::Ok(reply))) => Ok(reply),
            Ok(Ok(Response::Err(failure))) => Err(CallError::Refused(failure)),
            Ok(Err(failure)) => Err(CallError::Silent(failure)),
            Err(_) => Err(CallError::Silent(self.silent(format!("no answer within {} ms", within.as_millis())))),
        }
    }

    /// A connection to a node that speaks this one's version. That the other one does not is no answer to the question.
    async fn connect(&self) -> Outcome<Connection> {
        let own = Hello::own();
        let introduced = async {
            let mut connection = Framed::new(self.address.dial(PREAMBLE_MESSAGES).await?, codec());
            connection.send(Bytes::from(serde_json::to_vec(&own)?)).await?;
            let frame = connection.next().await.ok_or(std::io::ErrorKind::UnexpectedEof)??;
            Ok::<_, std::io::Error>((connection, serde_json::from_slice(&frame)?))
        };
        let (connection, answer) = introduced.await.map_err(|error| self.silent(error))?;
        let agreed = match answer {
            HelloAnswer::Ok(other) => own.agree(&other).map(drop),
            HelloAnswer::Err(failure) => Err(failure),
        };
        match agreed {
            Ok(()) => Ok(connection),
            Err(failure) => Err(failure.context(format!("peer {} and {own}", self.address.address()))),
        }
    }

    fn silent(&self, why: impl std::fmt::Display) -> Failure {
        Failure::unreachable(format!(
            "peer {} does not answer: {why}; check the link and the peer's node",
            self.address.address()
        ))
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
