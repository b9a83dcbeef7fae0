//! A checkpoint's images on their way: one connection, frames of [`crate::container::images`] one way, one answer back.

use std::path::Path;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

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

/// A checkpoint on its way: rounds of a pre-dump, if there are any, then the dump.
#[derive(Debug)]
pub struct Sending {
    follower: ImageFollower,
    /// Writes what is followed, and gives the connection back when that has ended.
    writer: AbortOnDropHandle<(PeerStream, Outcome<()>)>,
}

impl Sending {
    /// Of what is, or will be, below `directory`.
    pub fn begin(stream: PeerStream, directory: &Path) -> Outcome<Self> {
        let (frames, outgoing) = mpsc::channel(QUEUE);
        let follower = ImageFollower::new(directory, frames).map_err(|error| Failure::failed(chain(&error)))?;
        let writer = AbortOnDropHandle::new(tokio::spawn(write(stream, outgoing)));
        Ok(Self { follower, writer })
    }

    /// Sends the next round of a pre-dump while it grows; `dumped` says that it is whole. Returns when it is on its way.
    pub async fn round(self, dumped: CancellationToken) -> Outcome<(Self, Followed)> {
        let Self { follower, writer } = self;
        match follower.round(dumped).await {
            Ok((follower, sent)) => Ok((Self { follower, writer }, sent)),
            Err(error) => Err(match end(writer).await {
                Ok(()) => Failure::failed(chain(&error)),
                Err(why) => why,
            }),
        }
    }

    /// Sends the dump while it grows; `dumped` says that it is whole. Returns when the destination has all of it.
    pub async fn finish(self, dumped: CancellationToken) -> Outcome<Followed> {
        let followed = self.follower.run(dumped).await;
        end(self.writer).await?;
        followed.map_err(|error| Failure::failed(chain(&error)))
    }
}

fn lost(error: std::io::Error) -> Failure {
    Failure::unreachable(format!("the checkpoint's stream broke: {error}"))
}

fn stalled() -> Failure {
    let seconds = STALL_TIME.as_secs();
    Failure::unreachable(format!(
        "the destination took nothing of the checkpoint for {seconds} s; check its node and its disk"
    ))
}

/// Its end of the channel goes with it: a follower that nobody hears any more ends.
async fn write(mut stream: PeerStream, mut outgoing: mpsc::Receiver<Frame>) -> (PeerStream, Outcome<()>) {
    let mut buffer = BytesMut::new();
    let all = async {
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
        timeout(STALL_TIME, stream.flush()).await.map_err(|_| stalled())?.map_err(lost)
    };
    let written = all.await;
    (stream, written)
}

/// The destination's answer, after the last frame or because it hung up: it says why, where it could.
async fn end(writer: AbortOnDropHandle<(PeerStream, Outcome<()>)>) -> Outcome<()> {
    let (mut stream, written) = writer.await.map_err(|error| Failure::failed(format!("cannot send: {error}")))?;
    let answer = timeout(STALL_TIME, read_json::<Response>(&mut stream)).await.map_err(|_| stalled())?;
    match answer {
        Ok(Response::Err(failure)) => Err(failure.context("the destination did not take the checkpoint")),
        Ok(Response::Ok(_)) => Ok(()),
        Err(error) => {
            written?;
            Err(lost(error))
        }
    }
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

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use tokio::io::AsyncReadExt;
    use tokio::net::{TcpListener, TcpStream};
    use tokio_util::either::Either;

    use super::*;

    async fn pair() -> (PeerStream, PeerStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let dialed = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (Either::Left(dialed), Either::Left(listener.accept().await.unwrap().0))
    }

    /// What criu would leave of a round, or of the dump.
    fn dumped(directory: &Path, parent: Option<&str>, content: &[u8]) -> CancellationToken {
        std::fs::create_dir_all(directory).unwrap();
        std::fs::write(directory.join("pages-1.img"), content).unwrap();
        if let Some(parent) = parent {
            std::os::unix::fs::symlink(parent, directory.join("parent")).unwrap();
        }
        let token = CancellationToken::new();
        token.cancel();
        token
    }

    fn places() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        (dir, from, to)
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn rounds_and_the_dump_go_over_one_connection() {
        let (_dir, from, to) = places();
        let (ours, mut theirs) = pair().await;
        let at = to.clone();
        let receiving = tokio::spawn(async move { receive(&mut theirs, &at).await });
        let sending = Sending::begin(ours, &from).unwrap();
        let (sending, sent) = sending.round(dumped(&from.join("pre-1"), None, &[1; 9000])).await.unwrap();
        assert_eq!(sent.bytes, 9000);
        let second = dumped(&from.join("pre-2"), Some("../pre-1"), &[2; 500]);
        let (sending, sent) = sending.round(second).await.unwrap();
        assert_eq!(sent.bytes, 500);
        let sent = sending.finish(dumped(&from, Some("pre-2"), &[3; 20])).await.unwrap();
        assert_eq!((sent.files, sent.bytes), (1, 20));
        assert_eq!(receiving.await.unwrap().unwrap().bytes, 9520);
        let found = |below: &str| std::fs::read(to.join(below).join("pages-1.img")).unwrap().len();
        assert_eq!([found("parent/parent"), found("parent"), found("")], [9000, 500, 20]);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn why_the_destination_takes_no_round_is_told() {
        let (_dir, from, to) = places();
        let (ours, mut theirs) = pair().await;
        std::fs::create_dir(&to).unwrap();
        let receiving = tokio::spawn(async move { (receive(&mut theirs, &to).await, theirs) });
        let sending = Sending::begin(ours, &from).unwrap();
        // A round may be on its way before the answer is here.
        let failure = match sending.round(dumped(&from.join("pre-1"), None, &[1; 1000])).await {
            Ok((next, _)) => next.finish(dumped(&from, Some("pre-1"), b"")).await.expect_err("it was there already"),
            Err(failure) => failure,
        };
        assert!(failure.message.contains("did not take the checkpoint"), "{failure}");
        receiving.await.unwrap().0.unwrap_err();
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_link_that_breaks_in_a_round_is_unreachable_and_ends_it() {
        let (_dir, from, _) = places();
        let (ours, mut theirs) = pair().await;
        let sending = Sending::begin(ours, &from).unwrap();
        let whole = CancellationToken::new();
        dumped(&from.join("pre-1"), None, &vec![1; 64 << 20]);
        let round = tokio::spawn(sending.round(whole));
        theirs.read_u32().await.unwrap();
        drop(theirs);
        // Nobody says that the dump is whole: it ends all the same.
        let failure = round.await.unwrap().expect_err("nobody took it");
        assert_eq!(failure.kind, crate::error::Kind::Unreachable, "{failure}");
    }
}
