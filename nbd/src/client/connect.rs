//! From an address to the transmission phase.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use super::{ClientError, Reconnect};
use crate::address::Address;
use crate::limits::HANDSHAKE_TIME;
use crate::proto::client::{Goal, Negotiated, Negotiation, Outcome, Plan};
use crate::socket::{tune_tcp, tune_unix};
use crate::wire::{Framing, ServerEntry};

/// How to connect.
#[derive(Clone, Debug)]
pub struct ConnectOptions {
    /// The best form of requests and replies to ask for. A server without it is used with the next best; meta contexts
    /// need [`Framing::Structured`], and are asked for only with it.
    pub framing: Framing,
    /// The meta contexts to ask for. A server need not grant them: see [`super::ClientInfo::contexts`].
    pub contexts: Vec<String>,
    /// How long connect and handshake may take.
    pub time: Duration,
    /// What to do when the connection is lost; `None`: requests fail.
    pub reconnect: Option<Reconnect>,
}

impl Default for ConnectOptions {
    fn default() -> ConnectOptions {
        ConnectOptions { framing: Framing::Extended, contexts: Vec::new(), time: HANDSHAKE_TIME, reconnect: None }
    }
}

/// A connection's stream.
pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// Connects to an address, with the socket options that NBD wants.
pub(super) async fn connect(address: &Address, time: Duration) -> Result<Box<dyn Stream>, ClientError> {
    let failed = |source| ClientError::Connect { address: address.clone(), source: Arc::new(source) };
    let connecting = async {
        let stream: Box<dyn Stream> = match address {
            Address::Unix(path) => {
                let stream = UnixStream::connect(path).await?;
                tune_unix(&stream);
                Box::new(stream)
            }
            Address::Tcp { host, port } => {
                let stream = TcpStream::connect((host.as_str(), *port)).await?;
                tune_tcp(&stream);
                Box::new(stream)
            }
        };
        Ok(stream)
    };
    timeout(time, connecting).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())).map_err(failed)
}

/// Negotiates the transmission phase without structured replies, and gives the stream back with no byte read past it:
/// what the Linux kernel's client wants.
///
/// # Errors
/// [`ClientError`] when the stream fails, the time of `options` is over, or the server refuses.
pub async fn negotiate<S>(mut stream: S, export: &str, options: &ConnectOptions) -> Result<(S, Negotiated), ClientError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin,
{
    let options = ConnectOptions { framing: Framing::Simple, contexts: Vec::new(), ..options.clone() };
    let negotiated = enter(&mut stream, export, &options).await?;
    Ok((stream, negotiated))
}

/// Negotiates the transmission phase. After it, not a byte more has been read.
pub(super) async fn enter<S>(stream: &mut S, export: &str, options: &ConnectOptions) -> Result<Negotiated, ClientError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin,
{
    let (export, contexts) = (export.to_owned(), options.contexts.clone());
    let plan = Plan { goal: Goal::Transmission, export, framing: options.framing, contexts };
    match outcome(stream, plan, options.time).await? {
        Outcome::Export(negotiated) => Ok(negotiated),
        Outcome::List(_) => Err(unexpected()),
    }
}

/// The exports of a server, in its order.
///
/// # Errors
/// [`ClientError`]; many servers refuse to list.
pub async fn list<S>(mut stream: S, options: &ConnectOptions) -> Result<Vec<ServerEntry>, ClientError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin,
{
    let plan = Plan { goal: Goal::List, export: String::new(), framing: Framing::Simple, contexts: Vec::new() };
    match outcome(&mut stream, plan, options.time).await? {
        Outcome::List(entries) => Ok(entries),
        Outcome::Export(_) => Err(unexpected()),
    }
}

/// What a server says of an export, without entering transmission.
///
/// # Errors
/// [`ClientError`]; a server without the INFO option refuses.
pub async fn describe<S>(mut stream: S, export: &str, options: &ConnectOptions) -> Result<Negotiated, ClientError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin,
{
    let plan = Plan {
        goal: Goal::Info,
        export: export.to_owned(),
        framing: options.framing,
        contexts: options.contexts.clone(),
    };
    match outcome(&mut stream, plan, options.time).await? {
        Outcome::Export(negotiated) => Ok(negotiated),
        Outcome::List(_) => Err(unexpected()),
    }
}

/// Runs a negotiation to its outcome. After it, not a byte more has been read.
async fn outcome<S>(stream: &mut S, plan: Plan, time: Duration) -> Result<Outcome, ClientError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin,
{
    let mut negotiation = Negotiation::new(plan);
    let negotiating = async {
        let (mut input, mut out) = (BytesMut::new(), BytesMut::new());
        loop {
            let outcome = negotiation.advance(&mut input, &mut out);
            let sent = stream.write_all_buf(&mut out).await;
            let sent = sent.and(stream.flush().await).map_err(failed);
            // A server that refused need not take the farewell.
            if let Some(outcome) = outcome? {
                return sent.map(|()| outcome);
            }
            sent?;
            if stream.read_buf(&mut input).await.map_err(failed)? == 0 {
                return Err(failed(io::ErrorKind::UnexpectedEof.into()));
            }
        }
    };
    timeout(time, negotiating).await.unwrap_or(Err(ClientError::HandshakeTime(time)))
}

fn failed(error: io::Error) -> ClientError {
    ClientError::Handshake(Arc::new(error))
}

/// An outcome of another goal than was asked for, which the negotiation does not come to.
fn unexpected() -> ClientError {
    failed(io::ErrorKind::InvalidData.into())
}
