//! The NBD server that holds the blocks that an export does not have yet.
//!
//! [`Upstream`] says how to get a connection ([`Connect`]) and what its size must be; a [`Connection`] is one of them.
//! Reconnecting and backoff are the lane's that uses it (`fetch::lane`). The NBD client is one implementation of
//! both; the peer link brings its own [`Dialer`]; tests bring in-process ones.

mod nbd_link;
mod status;

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;
/// A byte stream to a server.
pub use nbd::Transport as Stream;
pub use nbd::client::Greeted;
use nbd::client::Sink;
use nbd::export::Extent;
use nbd::tls::TlsClient;

pub use nbd_link::NbdConnect;
pub(crate) use status::LinkReport;
pub use status::{LinkState, UpstreamStatus};

use crate::limits::CONNECT_TIMEOUT;

/// Opens byte streams to the NBD server: at an NBD URI, or over the peer link, whose dialer sends its own
/// preamble before it hands the stream over.
pub trait Dialer: Send + Sync + 'static {
    /// A new stream, at the place where the NBD handshake begins.
    fn dial(&self) -> BoxFuture<'_, io::Result<Box<dyn Stream>>>;
    /// Whether what comes over its streams is decrypted here.
    fn is_encrypted(&self) -> bool;
    /// For people: where it leads.
    fn describe(&self) -> String;
}

/// Makes connections to one export of a server.
pub trait Connect: Send + Sync + 'static {
    /// A new connection. `greeted` is set as soon as the server has taken it, which may be round trips before its end.
    fn connect<'a>(&'a self, greeted: &'a Greeted) -> BoxFuture<'a, Result<Arc<dyn Connection>, UpstreamError>>;
    /// The same for reads alone: without what costs a round trip and reads have no use for.
    fn connect_to_read(&self) -> BoxFuture<'_, Result<Arc<dyn Connection>, UpstreamError>>;
    /// Whether what comes over its connections is decrypted here.
    fn is_encrypted(&self) -> bool;
    /// For people: where it leads.
    fn describe(&self) -> String;
}

/// What is called with the bytes of a read, or with why there are none.
pub type ReadDone = Box<dyn FnOnce(Result<Bytes, ReadError>) + Send>;

/// What is called when the content of a read is in its sink, or with why not.
pub type StreamDone = Box<dyn FnOnce(Result<(), ReadError>) + Send>;

/// One connection to the upstream, with many requests in flight. When it dies all its requests fail.
pub trait Connection: Send + Sync + 'static {
    /// The size of the upstream's disk in bytes.
    fn size(&self) -> u64;
    /// Whether the server offers a meta context (BLOCK_STATUS).
    fn has_context(&self, name: &str) -> bool;
    /// Reads exactly `length` bytes. Does not wait; `done` is called on the connection's own task, which it must not hold
    /// up. It may never be called when the connection has ended.
    fn read(&self, offset: u64, length: u32, done: ReadDone);
    /// Whether a sink would be given pages, which are not copied on their way.
    fn gives_pages(&self) -> bool {
        false
    }
    /// The same into a sink, piece by piece as they come.
    fn read_to(&self, offset: u64, length: u32, sink: Box<dyn Sink>, done: StreamDone) {
        self.read_whole_to(offset, length, sink, done);
    }
    /// The same at the end, all at once.
    fn read_whole_to(&self, offset: u64, length: u32, mut sink: Box<dyn Sink>, done: StreamDone) {
        let give = move |result: Result<Bytes, ReadError>| {
            done(result.and_then(|bytes| {
                if bytes.len() != length as usize {
                    return Err(ReadError::Lost(format!("a reply of {} bytes is not what was asked", bytes.len())));
                }
                sink.bytes(offset, &bytes);
                Ok(())
            }));
        };
        self.read(offset, length, Box::new(give));
    }
    /// The extents of a context from `offset` on; they may cover less than was asked, not nothing.
    fn block_status(
        &self,
        context: &str,
        offset: u64,
        length: u32,
    ) -> BoxFuture<'static, Result<Vec<Extent>, ReadError>>;
    /// Ends when the connection is dead, with the reason.
    fn closed(&self) -> BoxFuture<'static, String>;
    /// Says goodbye, and ends with the connection: within [`GOODBYE_TIME`](crate::limits::GOODBYE_TIME).
    fn close(&self) -> BoxFuture<'static, ()>;
}

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// The server answered an error; the connection lives.
    #[error("the upstream answered: {0}")]
    Refused(String),
    /// The connection is gone.
    #[error("the connection to the upstream is lost: {0}")]
    Lost(String),
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// No byte stream.
    #[error("cannot reach {target}: {source}; check that the server runs and the address is right")]
    Dial {
        /// Where to.
        target: String,
        /// Why not.
        source: io::Error,
    },
    /// No NBD.
    #[error("{target} does not serve the disk: {reason}; check the export's name")]
    Handshake {
        /// Where to.
        target: String,
        /// Why not.
        reason: String,
    },
    /// It is another disk: fatal, for no byte of it may be mixed in.
    #[error(
        "{target} is of another size: {found} bytes, not {expected}; it is not the disk that this export was begun with"
    )]
    WrongSize {
        /// Where to.
        target: String,
        /// Bytes there.
        found: u64,
        /// Bytes here.
        expected: u64,
    },
    /// The URI cannot be used.
    #[error("\"{uri}\" cannot be used: {reason}")]
    Uri {
        /// As given.
        uri: String,
        /// What is wrong.
        reason: String,
    },
}

impl UpstreamError {
    /// Trying again cannot help.
    pub fn is_fatal(&self) -> bool {
        matches!(self, UpstreamError::WrongSize { .. } | UpstreamError::Uri { .. })
    }
}

/// How to reach the blocks that are missing.
#[derive(Clone)]
pub struct Upstream {
    connect: Arc<dyn Connect>,
}

impl Upstream {
    /// The server at an NBD URI; where that asks for TLS and names no certificates, with these.
    pub fn from_uri(uri: &str, certificates: Option<&TlsClient>) -> Result<Upstream, UpstreamError> {
        Ok(Self::new(Arc::new(NbdConnect::to_uri(uri, certificates)?)))
    }

    /// An export of the NBD server at the other end of the dialer's streams.
    pub fn dialed(dialer: Arc<dyn Dialer>, export: impl Into<String>) -> Upstream {
        Self::new(Arc::new(NbdConnect::new(dialer, export.into())))
    }

    /// Any other way.
    pub fn new(connect: Arc<dyn Connect>) -> Upstream {
        Self { connect }
    }

    /// For people: where it leads.
    pub fn describe(&self) -> String {
        self.connect.describe()
    }

    /// Whether what comes from there is decrypted here.
    pub fn is_encrypted(&self) -> bool {
        self.connect.is_encrypted()
    }

    /// One try for a connection, which must be to a disk of the expected size where that is known.
    /// `greeted` is set as soon as the server has taken it.
    pub async fn connect(
        &self,
        expected: Option<u64>,
        greeted: &Greeted,
    ) -> Result<Arc<dyn Connection>, UpstreamError> {
        self.expect(expected, self.connect.connect(greeted)).await
    }

    /// The same for one that only reads: [`Connection::has_context`] may say no.
    pub async fn connect_to_read(&self, expected: Option<u64>) -> Result<Arc<dyn Connection>, UpstreamError> {
        self.expect(expected, self.connect.connect_to_read()).await
    }

    async fn expect(
        &self,
        expected: Option<u64>,
        connecting: BoxFuture<'_, Result<Arc<dyn Connection>, UpstreamError>>,
    ) -> Result<Arc<dyn Connection>, UpstreamError> {
        let connection = match tokio::time::timeout(CONNECT_TIMEOUT, connecting).await {
            Ok(result) => result?,
            Err(_) => {
                let source = io::Error::new(io::ErrorKind::TimedOut, "no answer in time");
                return Err(UpstreamError::Dial { target: self.describe(), source });
            }
        };
        match expected {
            Some(expected) => self.check(expected, connection).await,
            None => Ok(connection),
        }
    }

    /// A connection, if it is to a disk of that size; otherwise it is closed.
    pub async fn check(
        &self,
        expected: u64,
        connection: Arc<dyn Connection>,
    ) -> Result<Arc<dyn Connection>, UpstreamError> {
        let found = connection.size();
        if found == expected {
            return Ok(connection);
        }
        connection.close().await;
        Err(UpstreamError::WrongSize { target: self.describe(), found, expected })
    }
}

#[cfg(test)]
mod nbd_tests;
