//! From an address to the transmission phase.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::watch;
use tokio::time::timeout;

use super::{ClientError, Reconnect};
use crate::address::Address;
use crate::limits::HANDSHAKE_TIME;
use crate::proto::client::{Goal, Negotiated, Negotiation, Outcome, Plan};
use crate::socket::{tune_tcp, tune_unix};
use crate::tls::{ClientTls, MaybeTls, TlsClient, TlsError};
use crate::transport::Transport;
use crate::uri::NbdUri;
use crate::wire::{Framing, ServerEntry};

/// The host of a server at the end of a Unix socket, or of a stream that the caller made.
const LOCAL: &str = "localhost";

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
    /// Encrypt the connection with STARTTLS before anything else is asked, and leave a server that refuses; `None`: as
    /// the URI says.
    pub tls: Option<ClientTls>,
    /// Set when the server has said its first word: it has taken this connection, so that none that is begun from then on
    /// takes its place where the server serves so many at a time.
    pub greeted: Option<Greeted>,
}

/// Whether a server has greeted.
pub type Greeted = watch::Sender<bool>;

impl Default for ConnectOptions {
    fn default() -> ConnectOptions {
        ConnectOptions {
            framing: Framing::Extended,
            contexts: Vec::new(),
            time: HANDSHAKE_TIME,
            reconnect: None,
            tls: None,
            greeted: None,
        }
    }
}

impl ConnectOptions {
    /// The same options with what a URI says of TLS, for who dials it without [`super::Client::connect`]: its
    /// certificates come before those that are here, and its `tls-hostname` or host is what the server must be.
    ///
    /// # Errors
    /// [`ClientError::Tls`]: TLS is asked for and there are no certificates, or they cannot be used.
    pub fn for_uri(&self, uri: &NbdUri) -> Result<ConnectOptions, ClientError> {
        let mut options = self.clone();
        if !uri.tls && self.tls.is_none() {
            return Ok(options);
        }
        let mut tls = match (&uri.tls_certificates, options.tls.take()) {
            (Some(directory), known) => {
                ClientTls { tls: TlsClient::load(directory)?, host: known.and_then(|known| known.host) }
            }
            (None, Some(known)) => known,
            (None, None) => return Err(TlsError::NoCertificates.into()),
        };
        tls.host = match (&uri.tls_hostname, tls.host, &uri.address) {
            (Some(name), _, _) => Some(name.clone()),
            (None, Some(name), _) => Some(name),
            (None, None, Address::Tcp { host, .. }) => Some(host.clone()),
            (None, None, Address::Unix(_)) => None,
        };
        options.tls = Some(tls);
        Ok(options)
    }

    fn plan(&self, goal: Goal, export: &str) -> Plan {
        let (framing, contexts) = match goal {
            Goal::List => (Framing::Simple, Vec::new()),
            Goal::Transmission | Goal::Info | Goal::Contexts => (self.framing, self.contexts.clone()),
        };
        Plan { goal, export: export.to_owned(), framing, contexts, tls: self.tls.is_some() }
    }
}

/// Connects to an address, with the socket options that NBD wants.
pub(super) async fn connect(address: &Address, time: Duration) -> Result<Box<dyn Transport>, ClientError> {
    let failed = |source| ClientError::Connect { address: address.clone(), source: Arc::new(source) };
    let connecting = async {
        let stream: Box<dyn Transport> = match address {
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
/// [`ClientError`] when the stream fails, the time of `options` is over, or the server refuses; also with TLS, which the
/// kernel does not speak.
pub async fn negotiate<S>(stream: S, export: &str, options: &ConnectOptions) -> Result<(S, Negotiated), ClientError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin,
{
    if options.tls.is_some() {
        return Err(TlsError::Kernel.into());
    }
    let options = ConnectOptions { framing: Framing::Simple, contexts: Vec::new(), ..options.clone() };
    match enter(stream, export, &options).await? {
        (MaybeTls::Plain(stream), negotiated) => Ok((stream, negotiated)),
        _ => Err(TlsError::Kernel.into()),
    }
}

/// Negotiates the transmission phase. After it, not a byte more has been read.
pub(super) async fn enter<S>(
    stream: S,
    export: &str,
    options: &ConnectOptions,
) -> Result<(MaybeTls<S>, Negotiated), ClientError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin,
{
    match outcome(stream, Goal::Transmission, export, options).await? {
        (stream, Outcome::Export(negotiated)) => Ok((stream, negotiated)),
        _ => Err(unexpected()),
    }
}

/// The exports of a server, in its order.
///
/// # Errors
/// [`ClientError`]; many servers refuse to list.
pub async fn list<S>(stream: S, options: &ConnectOptions) -> Result<Vec<ServerEntry>, ClientError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin,
{
    match outcome(stream, Goal::List, "", options).await? {
        (stream, Outcome::List(entries)) => leave(stream, entries, options.time).await,
        _ => Err(unexpected()),
    }
}

/// What a server says of an export, without entering transmission.
///
/// # Errors
/// [`ClientError`]; a server without the INFO option refuses.
pub async fn describe<S>(stream: S, export: &str, options: &ConnectOptions) -> Result<Negotiated, ClientError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin,
{
    match outcome(stream, Goal::Info, export, options).await? {
        (stream, Outcome::Export(negotiated)) => leave(stream, negotiated, options.time).await,
        _ => Err(unexpected()),
    }
}

/// The meta contexts of an export that [`ConnectOptions::contexts`] ask for: names, or a namespace with its colon
/// (`base:`) for all of it; without any, all that the server has (document: NBD_OPT_LIST_META_CONTEXT).
///
/// # Errors
/// [`ClientError`]; a server without structured replies or without meta contexts refuses.
pub async fn list_contexts<S>(stream: S, export: &str, options: &ConnectOptions) -> Result<Vec<String>, ClientError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin,
{
    match outcome(stream, Goal::Contexts, export, options).await? {
        (stream, Outcome::Contexts(names)) => leave(stream, names, options.time).await,
        _ => Err(unexpected()),
    }
}

/// Ends a connection that has answered, and passes the answer on: the server need not take the farewell.
async fn leave<S, T>(mut stream: MaybeTls<S>, answer: T, time: Duration) -> Result<T, ClientError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin,
{
    let _ = timeout(time, stream.shutdown()).await;
    Ok(answer)
}

/// Runs a negotiation to its outcome, with TLS if the options have it. After it, not a byte more has been read.
async fn outcome<S>(
    stream: S,
    goal: Goal,
    export: &str,
    options: &ConnectOptions,
) -> Result<(MaybeTls<S>, Outcome), ClientError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin,
{
    let mut negotiation = Negotiation::new(options.plan(goal, export));
    let negotiating = async {
        let mut stream = MaybeTls::Plain(stream);
        let mut out = BytesMut::new();
        loop {
            let outcome = converse(&mut stream, &mut negotiation, &mut out, options.greeted.as_ref()).await?;
            stream = match (outcome, stream, &options.tls) {
                (Outcome::StartTls, MaybeTls::Plain(stream), Some(client)) => {
                    let host = client.host.as_deref().unwrap_or(LOCAL);
                    MaybeTls::Client(Box::new(client.tls.connect(host, stream).await?))
                }
                (outcome, stream, _) => return Ok((stream, outcome)),
            };
            negotiation.tls_started(&mut out);
        }
    };
    timeout(options.time, negotiating).await.unwrap_or(Err(ClientError::HandshakeTime(options.time)))
}

/// Asks and is answered until the negotiation has an outcome; what is in `out` goes first.
async fn converse<S>(
    stream: &mut S,
    negotiation: &mut Negotiation,
    out: &mut BytesMut,
    greeted: Option<&Greeted>,
) -> Result<Outcome, ClientError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin,
{
    let mut input = BytesMut::new();
    loop {
        let outcome = negotiation.advance(&mut input, out);
        let sent = stream.write_all_buf(out).await;
        let sent = sent.and(stream.flush().await);
        // A server that refused need not take the farewell.
        if let Some(outcome) = outcome? {
            return sent.map(|()| outcome).map_err(failed);
        }
        let received = stream.read_buf(&mut input).await;
        // A server that refuses our certificate says why before it hangs up.
        if let Err(error) = sent {
            return Err(failed(received.err().filter(TlsError::is_of_tls).unwrap_or(error)));
        }
        if received.map_err(failed)? == 0 {
            return Err(failed(io::ErrorKind::UnexpectedEof.into()));
        }
        if let Some(greeted) = greeted {
            greeted.send_replace(true);
        }
    }
}

fn failed(error: io::Error) -> ClientError {
    if TlsError::is_of_tls(&error) {
        return TlsError::handshake("the server", error).into();
    }
    ClientError::Handshake(Arc::new(error))
}

/// An outcome of another goal than was asked for, which the negotiation does not come to.
fn unexpected() -> ClientError {
    failed(io::ErrorKind::InvalidData.into())
}
