//! A checkpoint's images on their way: one connection, frames of [`crate::container::images`] one way, one answer back.

use std::path::Path;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::link::{PeerAddress, PeerStream};
use super::{ImagesHead, PREAMBLE_IMAGES, Reply, Response, Subject};
use crate::container::image_receiver::{ImageReceiver, Limits, ReceiveError, Received};
use crate::container::image_stream::{Frame, QUEUE};
use crate::container::images::{Followed, ImageFollower};
use crate::error::{Failure, Outcome, chain};
use crate::limits::{CHECKPOINT_BYTES, PEER_HEAD_BYTES};

/// How much is read from the link at once.
const READ_BYTES: usize = 1 << 20;
/// How long the destination may take no bytes, or leave the last answer out: meanwhile the container stands still. It
/// reads large files back in between.
const STALL_TIME: Duration = Duration::from_secs(60);

/// A connection to the destination that carries the images of one checkpoint.
pub async fn dial(address: &PeerAddress, subject: &Subject) -> std::io::Result<PeerStream> {
    let mut stream = address.dial(PREAMBLE_IMAGES).await?;
    write_json(&mut stream, &ImagesHead { subject: subject.clone() }).await?;
    Ok(stream)
}

/// Sends a directory while it grows; `dumped` says that it is whole. Returns when the destination has all of it.
pub async fn send(mut stream: PeerStream, directory: &Path, dumped: CancellationToken) -> Outcome<Followed> {
    let lost = |error: std::io::Error| Failure::unreachable(format!("the checkpoint's stream broke: {error}"));
    let stalled = || {
        let seconds = STALL_TIME.as_secs();
        Failure::unreachable(format!(
            "the destination took nothing of the checkpoint for {seconds} s; check its node and its disk"
        ))
    };
    let (frames, outgoing) = mpsc::channel(QUEUE);
    let follower = ImageFollower::new(directory, frames).map_err(|error| Failure::failed(chain(&error)))?;
    let write = async {
        // Its end of the channel goes with it: a follower that nobody hears any more ends.
        let mut outgoing = outgoing;
        let mut buffer = BytesMut::new();
        while let Some(frame) = outgoing.recv().await {
            frame.encode(&mut buffer);
            // What is there already goes out together.
            while buffer.len() < READ_BYTES
                && let Ok(frame) = outgoing.try_recv()
            {
                frame.encode(&mut buffer);
            }
            timeout(STALL_TIME, stream.write_all(&buffer)).await.map_err(|_| stalled())?.map_err(lost)?;
            buffer.clear();
        }
        timeout(STALL_TIME, stream.flush()).await.map_err(|_| stalled())?.map_err(lost)?;
        Ok::<_, Failure>(())
    };
    let (followed, written) = tokio::join!(follower.run(dumped), write);
    // The destination says why it hung up, where it could.
    let answer = timeout(STALL_TIME, read_json::<Response>(&mut stream)).await.map_err(|_| stalled())?;
    match answer {
        Ok(Response::Err(failure)) => return Err(failure.context("the destination did not take the checkpoint")),
        Ok(Response::Ok(_)) => {}
        Err(error) => {
            written?;
            return Err(lost(error));
        }
    }
    followed.map_err(|error| Failure::failed(chain(&error)))
}

/// Reads what the connection is about.
pub async fn read_head(stream: &mut PeerStream) -> std::io::Result<ImagesHead> {
    read_json(stream).await
}

/// Receives into a directory, and answers.
pub async fn receive(stream: &mut PeerStream, directory: &Path) -> Outcome<Received> {
    // Not synced: after a crash of this host nothing is restored from them.
    let limits = Limits { bytes: CHECKPOINT_BYTES, durable: false, ..Limits::default() };
    let received = match ImageReceiver::create(directory, limits) {
        Ok(receiver) => {
            let (frames, incoming) = mpsc::channel(QUEUE);
            let (read, received) = tokio::join!(read_frames(stream, frames), receiver.run(incoming));
            match received {
                Err(ReceiveError::CutOff) => {
                    Err(read.err().unwrap_or_else(|| Failure::unreachable("the checkpoint's stream ended early")))
                }
                received => received.map_err(|error| Failure::failed(chain(&error))),
            }
        }
        Err(error) => Err(Failure::failed(chain(&error))),
    };
    answer(stream, received.as_ref().map(|_| ()).map_err(Clone::clone)).await;
    received
}

/// Tells the source how it ended, as far as it still listens.
pub async fn answer(stream: &mut PeerStream, outcome: Outcome<()>) {
    let response = match outcome {
        Ok(()) => Response::Ok(Reply::Done),
        Err(failure) => Response::Err(failure),
    };
    if let Err(error) = write_json(stream, &response).await {
        tracing::debug!(%error, "cannot answer a checkpoint's stream");
    }
}

async fn read_frames(stream: &mut PeerStream, frames: mpsc::Sender<Frame>) -> Outcome<()> {
    let mut buffer = BytesMut::with_capacity(READ_BYTES);
    loop {
        while let Some(frame) = Frame::decode(&mut buffer).map_err(|error| Failure::failed(chain(&error)))? {
            let last = matches!(frame, Frame::End { .. });
            if frames.send(frame).await.is_err() || last {
                return Ok(());
            }
        }
        buffer.reserve(READ_BYTES);
        let read = stream
            .read_buf(&mut buffer)
            .await
            .map_err(|error| Failure::unreachable(format!("the checkpoint's stream broke: {error}")))?;
        if read == 0 {
            return Ok(());
        }
    }
}

async fn write_json(stream: &mut PeerStream, value: &impl serde::Serialize) -> std::io::Result<()> {
    let json = serde_json::to_vec(value)?;
    stream.write_u32(u32::try_from(json.len()).map_err(std::io::Error::other)?).await?;
    stream.write_all(&json).await?;
    stream.flush().await
}

async fn read_json<T: serde::de::DeserializeOwned>(stream: &mut PeerStream) -> std::io::Result<T> {
    let length = stream.read_u32().await? as usize;
    if length > PEER_HEAD_BYTES {
        return Err(std::io::Error::other("the peer sent a head that is too long"));
    }
    let mut json = vec![0; length];
    stream.read_exact(&mut json).await?;
    Ok(serde_json::from_slice(&json)?)
}
