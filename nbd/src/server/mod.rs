//! The server's tokio driver.
//!
//! [`serve_connection`] takes one client, over any stream, from the greeting to its end. [`Listener`] accepts clients
//! on an address and ends in order. How one connection works is told
//! in `connection.rs`.

mod connection;
mod flight;
pub mod listener;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use self::connection::Connection;
use crate::export::Exports;
use crate::limits::{DRAIN_TIME, HANDSHAKE_TIME, MAX_CONNECTIONS};
use crate::proto::server::{Entered, Handshake, HandshakeError, Step};
use crate::wire::WireError;

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
    /// Connections of one listener at a time.
    pub max_connections: usize,
}

impl Default for ServeOptions {
    fn default() -> ServeOptions {
        ServeOptions {
            handshake_time: HANDSHAKE_TIME,
            drain_time: DRAIN_TIME,
            draining: Draining::default(),
            max_connections: MAX_CONNECTIONS,
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
    mut stream: S,
    exports: Arc<dyn Exports>,
    options: &ServeOptions,
    shutdown: CancellationToken,
) -> Result<Ended, ServerError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let mut input = BytesMut::new();
    let entered = tokio::select! {
        biased;
        () = shutdown.cancelled() => return Ok(Ended::ShutDown),
        entered = timeout(options.handshake_time, handshake(&mut stream, exports.as_ref(), &mut input)) => entered,
    };
    let entered = match entered {
        Ok(entered) => entered?,
        Err(_) => return Err(ServerError::HandshakeTime(options.handshake_time)),
    };
    let Some(entered) = entered else {
        // The peer may be gone already.
        let _ = timeout(options.drain_time, stream.shutdown()).await;
        return Ok(Ended::DuringHandshake);
    };
    let name = entered.name.clone();
    tracing::debug!(export = name, "a client has entered transmission");
    let ended = Connection::new(stream, input, entered).run(options, shutdown).await;
    tracing::debug!(export = name, ?ended, "a client has left");
    ended
}

/// `None` when the client left.
async fn handshake<S>(
    stream: &mut S,
    exports: &dyn Exports,
    input: &mut BytesMut,
) -> Result<Option<Entered>, ServerError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let mut out = BytesMut::new();
    let mut handshake = Handshake::new(&mut out);
    loop {
        if !out.is_empty() {
            stream.write_all_buf(&mut out).await?;
            stream.flush().await?;
        }
        match handshake.advance(input, exports, &mut out)? {
            Step::NeedMore => {
                if stream.read_buf(input).await? == 0 {
                    return Ok(None);
                }
            }
            Step::Answered => {}
            Step::Enter(entered) => {
                stream.write_all_buf(&mut out).await?;
                stream.flush().await?;
                return Ok(Some(entered));
            }
            Step::Aborted => {
                // A client that leaves need not wait for the answer.
                let _ = stream.write_all_buf(&mut out).await;
                return Ok(None);
            }
        }
    }
}
