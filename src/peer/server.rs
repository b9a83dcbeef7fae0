//! Answering the other node: the accept loop of the peer port.
//!
//! What a connection carries is told by its first bytes; one that does not say so in time is dropped. The number of
//! connections is bounded, each answers one question after the other.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{SinkExt, StreamExt};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::codec::Framed;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{PREAMBLE_BYTES, PREAMBLE_IMAGES, PREAMBLE_MESSAGES, PREAMBLE_NBD, Reply, Request, Response, codec, tune};
use crate::error::{Failure, Outcome};

/// How many connections the peer port holds at once.
const MAX_CONNECTIONS: usize = 256;
/// How long a connection may take to say what it is.
const PREAMBLE_TIME: Duration = Duration::from_secs(10);

/// How long a connection may be silent between questions: the other node keeps some, and dials anew.
const IDLE_TIME: Duration = Duration::from_secs(60);

/// What the node does with what arrives.
pub trait PeerService: Send + Sync + 'static {
    /// Answers a question.
    fn answer(&self, from: SocketAddr, request: Request) -> BoxFuture<'_, Outcome<Reply>>;
    /// Serves the NBD data of migrations until the client leaves.
    fn serve_nbd(&self, stream: TcpStream, stop: CancellationToken) -> BoxFuture<'_, ()>;
    /// Receives a checkpoint's images.
    fn receive_images(&self, stream: TcpStream) -> BoxFuture<'_, ()>;
}

/// Accepts until `stop`; returns when all connections have ended.
pub async fn serve(listener: TcpListener, service: Arc<dyn PeerService>, stop: CancellationToken) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let connections = TaskTracker::new();
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { break };
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
        let (service, stop) = (service.clone(), stop.clone());
        connections.spawn(async move {
            let _place = place;
            tokio::select! {
                () = stop.cancelled() => {}
                result = connection(stream, from, service, stop.clone()) => {
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

async fn connection(
    mut stream: TcpStream,
    from: SocketAddr,
    service: Arc<dyn PeerService>,
    stop: CancellationToken,
) -> std::io::Result<()> {
    tune(&stream)?;
    let mut preamble = [0; PREAMBLE_BYTES];
    tokio::time::timeout(PREAMBLE_TIME, stream.read_exact(&mut preamble)).await??;
    match &preamble {
        PREAMBLE_MESSAGES => messages(stream, from, service).await,
        PREAMBLE_NBD => {
            service.serve_nbd(stream, stop).await;
            Ok(())
        }
        PREAMBLE_IMAGES => {
            service.receive_images(stream).await;
            Ok(())
        }
        other => Err(std::io::Error::other(format!(
            "a connection began with {:?}, which is no lazy-migrate peer of this version",
            String::from_utf8_lossy(other)
        ))),
    }
}

async fn messages(stream: TcpStream, from: SocketAddr, service: Arc<dyn PeerService>) -> std::io::Result<()> {
    let mut frames = Framed::new(stream, codec());
    while let Ok(Some(frame)) = tokio::time::timeout(IDLE_TIME, frames.next()).await {
        let response = match serde_json::from_slice(&frame?) {
            Ok(request) => match service.answer(from, request).await {
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
