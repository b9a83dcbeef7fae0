//! The server's tokio driver.
//!
//! [`serve_connection`] takes one client, over any stream, from the greeting to its end. [`Listener`] accepts clients
//! on an address and ends in order. `negotiate.rs` is the handshake, with TLS where the client begins it;
//! `connection.rs` is the transmission phase; `unix_path.rs` gives a Unix socket its path.

mod budget;
mod client_end;
mod connection;
mod flight;
pub mod listener;
mod negotiate;
mod patience;
mod pieces;
mod promised;
mod socket;
pub(crate) mod splice;
pub mod unix_path;

use std::io;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use self::budget::Share;
use self::client_end::{ClientEnd, Opaque};
use self::connection::Connection;
use self::negotiate::{Client, negotiate};
use self::socket::ClientSocket;
use crate::export::Exports;
use crate::limits::{DRAIN_TIME, HANDSHAKE_DRAIN_TIME, HANDSHAKE_TIME, MAX_CONNECTIONS, MAX_HANDSHAKES};
use crate::proto::server::{HandshakeError, TlsMode};
use crate::tls::{TlsError, TlsServer};
use crate::wire::WireError;

pub use budget::Budget;
pub use listener::{ListenError, Listener};

/// What happens to requests that arrive while a connection is being shut down. Requests in flight are finished in
/// either case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Draining {
    /// They are answered ESHUTDOWN.
    #[default]
    Refuse,
    /// They are left without an answer. For clients that connect again and send them anew, as the Linux kernel does:
    /// an error answer would reach the file system.
    HangUp,
}

/// How to serve. The default is right for a server on a private address.
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// How long a client may take from the connect to the transmission phase.
    pub handshake_time: Duration,
    /// How long requests in flight and unsent replies may take when the connection ends.
    pub drain_time: Duration,
    /// What happens to new requests in that time.
    pub draining: Draining,
    /// Connections of one listener in the transmission phase at a time.
    pub max_connections: usize,
    /// Connections of one listener in the handshake at a time.
    pub max_handshakes: usize,
    /// What all connections with a clone of these options may have in flight together.
    pub budget: Arc<Budget>,
    /// Whether clients may or must encrypt.
    pub tls: TlsPolicy,
}

/// Whether clients of a server may or must encrypt the connection with STARTTLS. A stream that is encrypted already, as
/// the caller knows, is served with [`TlsPolicy::Off`].
#[derive(Clone, Debug, Default)]
pub enum TlsPolicy {
    /// They cannot.
    #[default]
    Off,
    /// They may. Who does not is served all the same: for private addresses only.
    Offered(TlsServer),
    /// They must: before TLS, no option is answered, and nothing is told about exports.
    Required(TlsServer),
}

impl TlsPolicy {
    fn mode(&self) -> TlsMode {
        match self {
            TlsPolicy::Off => TlsMode::Off,
            TlsPolicy::Offered(_) => TlsMode::Offered,
            TlsPolicy::Required(_) => TlsMode::Required,
        }
    }

    fn server(&self) -> Option<&TlsServer> {
        match self {
            TlsPolicy::Off => None,
            TlsPolicy::Offered(server) | TlsPolicy::Required(server) => Some(server),
        }
    }
}

impl Default for ServeOptions {
    fn default() -> ServeOptions {
        ServeOptions {
            handshake_time: HANDSHAKE_TIME,
            drain_time: DRAIN_TIME,
            draining: Draining::default(),
            max_connections: MAX_CONNECTIONS,
            max_handshakes: MAX_HANDSHAKES,
            budget: Arc::default(),
            tls: TlsPolicy::default(),
        }
    }
}

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The client left during the handshake: it had what it wanted (a list, say), or closed the stream.
    DuringHandshake,
    /// The client sent DISC.
    Disconnected,
    /// The client closed the stream without a word.
    Closed,
    /// The server shut down.
    ShutDown,
}

/// Why a connection was broken off.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The stream failed.
    #[error("the connection to the client failed")]
    Stream(#[from] io::Error),
    /// The client was hung up on in the handshake.
    #[error("the handshake failed")]
    Handshake(#[from] HandshakeError),
    /// The client took too long.
    #[error("the client did not finish the handshake within {} s", .0.as_secs_f32())]
    HandshakeTime(Duration),
    /// The client began TLS, and it came to nothing.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The client's requests are not requests.
    #[error("the client breaks the protocol")]
    Protocol(#[from] WireError),
}

/// Serves one client until it leaves, or until `shutdown` and the requests in flight are done.
///
/// # Errors
/// [`ServerError`]: the stream failed, or the client did not keep to the protocol. Failed requests are not errors: they
/// are answered, and the connection goes on.
pub async fn serve_connection<S>(
    stream: S,
    exports: Arc<dyn Exports>,
    options: &ServeOptions,
    shutdown: CancellationToken,
) -> Result<Ended, ServerError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    serve_admitted(Opaque(stream), exports, options, shutdown, async {}).await
}

/// As [`serve_connection`], over a socket as it is: large reads go from the page cache to it without a copy, and it is
/// taken to the export's own runtime, if that has one ([`Export::home`](crate::export::Export::home)).
///
/// # Errors
/// As [`serve_connection`]; and a socket that cannot be watched.
pub async fn serve_socket(
    socket: impl Into<socket2::Socket>,
    exports: Arc<dyn Exports>,
    options: &ServeOptions,
    shutdown: CancellationToken,
) -> Result<Ended, ServerError> {
    let socket = socket.into();
    socket.set_nonblocking(true)?;
    serve_admitted(ClientSocket::new(socket)?, exports, options, shutdown, async {}).await
}

/// As [`serve_connection`]; the client enters transmission when `admission` is ready, whose value is kept to its end.
async fn serve_admitted<S, A>(
    stream: S,
    exports: Arc<dyn Exports>,
    options: &ServeOptions,
    shutdown: CancellationToken,
    admission: A,
) -> Result<Ended, ServerError>
where
    S: ClientEnd,
    A: Future,
{
    let out_of_time = async {
        tokio::select! {
            () = sleep(options.handshake_time) => Err(ServerError::HandshakeTime(options.handshake_time)),
            () = async { shutdown.cancelled().await; sleep(HANDSHAKE_DRAIN_TIME).await } => Ok(Ended::ShutDown),
        }
    };
    let client = tokio::select! {
        biased;
        client = negotiate(stream, exports, &options.tls, &shutdown, admission) => client?,
        end = out_of_time => return end,
    };
    let Client { mut stream, input, entered } = client;
    let Some((entered, _admission)) = entered else {
        // The peer may be gone already.
        let _ = timeout(options.drain_time, stream.shutdown()).await;
        return Ok(if shutdown.is_cancelled() { Ended::ShutDown } else { Ended::DuringHandshake });
    };
    let name = entered.name.clone();
    tracing::debug!(export = name, framing = ?entered.framing, "a client has entered transmission");
    let share = Share::of(options.budget.clone());
    let home = entered.export.home().filter(|_| stream.let_go());
    let connection = Connection::new(stream, input, entered, share, home.is_some());
    let ended = match home {
        Some(home) => {
            let options = options.clone();
            let served = home.spawn(async move { connection.run(&options, shutdown).await });
            match AbortOnDropHandle::new(served).await {
                Ok(ended) => ended,
                Err(error) => match error.try_into_panic() {
                    Ok(panic) => resume_unwind(panic),
                    // The export has ended.
                    Err(_) => Ok(Ended::ShutDown),
                },
            }
        }
        None => connection.run(options, shutdown).await,
    };
    tracing::debug!(export = name, ?ended, "a client has left");
    ended
}
