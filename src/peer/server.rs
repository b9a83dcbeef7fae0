//! Answering the other node: the accept loop of the peer port.
//!
//! What a connection carries is told by its first bytes; one that does not say so in time is dropped. The number of
//! connections is bounded, each answers one question after the other.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{SinkExt, StreamExt};
use nbd::tls::{Identity, TlsServer};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::codec::{Framed, LengthDelimitedCodec};
use tokio_util::either::Either;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::hello::{Hello, HelloAnswer};
use super::link::{Caller, PeerStream};
use super::{PREAMBLE_BYTES, PREAMBLE_IMAGES, PREAMBLE_MESSAGES, PREAMBLE_NBD, Reply, Request, Response, codec, tune};
use crate::error::{Failure, Outcome, chain};
use crate::limits::{PEER_CONNECTIONS, PEER_IDLE_TIME, PEER_PREAMBLE_TIME, PEER_UNKNOWN_CONNECTIONS};

/// What the node does with what arrives.
pub trait PeerService: Send + Sync + 'static {
    /// Answers a question.
    fn answer(&self, from: Caller, request: Request) -> BoxFuture<'_, Outcome<Reply>>;
    /// Serves the NBD data of migrations until the client leaves.
    fn serve_nbd(&self, from: Caller, stream: PeerStream, stop: CancellationToken) -> BoxFuture<'_, ()>;
    /// Receives a checkpoint's images.
    fn receive_images(&self, from: Caller, stream: PeerStream) -> BoxFuture<'_, ()>;
}

/// Accepts until `stop`; returns when all connections have ended. With `tls`, only who has a certificate of its CA is
/// heard.
pub async fn serve(
    listener: TcpListener,
    tls: Option<TlsServer>,
    service: Arc<dyn PeerService>,
    stop: CancellationToken,
) {
    let unknown = Arc::new(Semaphore::new(PEER_UNKNOWN_CONNECTIONS));
    let places = Arc::new(Semaphore::new(PEER_CONNECTIONS));
    let connections = TaskTracker::new();
    loop {
        let Ok(waiting) = unknown.clone().acquire_owned().await else { break };
        let (stream, from) = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of file descriptors, most likely: it passes when connections end.
                    tracing::warn!(%error, "cannot accept on the peer address");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
        };
        let (service, tls, places, stop) = (service.clone(), tls.clone(), places.clone(), stop.clone());
        connections.spawn(async move {
            let served = async {
                let (stream, caller, preamble) = timeout(PEER_PREAMBLE_TIME, introduce(stream, from, tls)).await??;
                drop(waiting);
                let _place =
                    places.try_acquire_owned().map_err(|_| io::Error::other("there are too many connections"))?;
                connection(stream, caller, &preamble, service, stop.clone()).await
            };
            tokio::select! {
                () = stop.cancelled() => {}
                result = served => {
                    if let Err(error) = result {
                        tracing::debug!(%from, %error, "peer connection ended");
                    }
                }
            }
        });
    }
    connections.close();
    connections.wait().await;
}

/// Who it is, and what it wants.
async fn introduce(
    stream: TcpStream,
    address: SocketAddr,
    tls: Option<TlsServer>,
) -> io::Result<(PeerStream, Caller, [u8; PREAMBLE_BYTES])> {
    tune(&stream)?;
    let (mut stream, identity): (PeerStream, _) = match tls {
        None => (Either::Left(stream), None),
        Some(tls) => {
            let stream = tls.accept(stream).await.map_err(|error| {
                // The operator of the other host sees no more than a connection that ends.
                tracing::warn!(from = %address, error = chain(&error), "a peer is not let in");
                io::Error::other(error)
            })?;
            let identity = Identity::of_client(&stream);
            (Either::Right(Box::new(stream)), Some(identity))
        }
    };
    let mut preamble = [0; PREAMBLE_BYTES];
    stream.read_exact(&mut preamble).await?;
    Ok((stream, Caller { address, identity }, preamble))
}

async fn connection(
    stream: PeerStream,
    from: Caller,
    preamble: &[u8; PREAMBLE_BYTES],
    service: Arc<dyn PeerService>,
    stop: CancellationToken,
) -> io::Result<()> {
    match preamble {
        PREAMBLE_MESSAGES => messages(stream, from, service).await,
        PREAMBLE_NBD => {
            service.serve_nbd(from, stream, stop).await;
            Ok(())
        }
        PREAMBLE_IMAGES => {
            service.receive_images(from, stream).await;
            Ok(())
        }
        other => Err(io::Error::other(format!(
            "a connection began with {:?}, which is no lazy-migrate peer of this version",
            String::from_utf8_lossy(other)
        ))),
    }
}

async fn messages(stream: PeerStream, from: Caller, service: Arc<dyn PeerService>) -> io::Result<()> {
    let mut frames = Framed::new(stream, codec());
    if !introduced(&mut frames, &from).await? {
        return Ok(());
    }
    while let Ok(Some(frame)) = timeout(PEER_IDLE_TIME, frames.next()).await {
        let response = match serde_json::from_slice(&frame?) {
            Ok(request) => match service.answer(from.clone(), request).await {
                Ok(reply) => Response::Ok(reply),
                Err(failure) => Response::Err(failure),
            },
            Err(error) => Response::Err(Failure::failed(format!(
                "the peer's message is not understood ({error}); are both nodes of the same version?"
            ))),
        };
        frames.send(Bytes::from(serde_json::to_vec(&response)?)).await?;
    }
    Ok(())
}

/// Answers the caller's hello; whether there is a version that both speak.
async fn introduced(frames: &mut Framed<PeerStream, LengthDelimitedCodec>, from: &Caller) -> io::Result<bool> {
    let Ok(Some(frame)) = timeout(PEER_PREAMBLE_TIME, frames.next()).await else { return Ok(false) };
    let own = Hello::own();
    let agreed = match serde_json::from_slice::<Hello>(&frame?) {
        Ok(other) => own.agree(&other).map(drop),
        Err(_) => Err(Failure::refused(format!(
            "a question came without a hello before it, so it is from a version before the hello; this is {own}: install a \
             newer lazy-migrate on the host that asks"
        ))),
    };
    if let Err(failure) = &agreed {
        // The operator of the other host sees it as well, but it may be this one who can mend it.
        tracing::warn!(from = %from.address, %failure, "a peer of another version is refused");
    }
    let understood = agreed.is_ok();
    let answer = agreed.map_or_else(HelloAnswer::Err, |()| HelloAnswer::Ok(own));
    frames.send(Bytes::from(serde_json::to_vec(&answer)?)).await?;
    Ok(understood)
}
