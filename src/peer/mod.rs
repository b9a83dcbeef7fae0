//! The peer link: what two nodes say to each other, over the one port between hosts.
//!
//! Where the nodes have certificates, everything is inside TLS ([`link`]). A connection begins with eight bytes that say what it is: peer messages, the NBD data of a migration, or a
//! checkpoint's images. Peer messages begin with what version of them each side speaks ([`hello`]); they are questions and answers, JSON in length-prefixed frames; each side dials the
//! other for its own questions, and every question may be asked again, because the link may lose either half.

pub mod client;
pub mod hello;
pub mod images;
pub mod link;
pub mod nbd;
pub mod server;

use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio_util::codec::LengthDelimitedCodec;

use crate::error::Failure;
use crate::limits::PEER_FRAME_BYTES;
use crate::migration::lease::{Beat, Timings};
use crate::migration::machine::{BeatAnswer, Grant};
use crate::migration::phase::DestinationPhase;
use crate::migration::record::{DestinationContainer, MigrationId};
use crate::units::{BlockSize, Epoch};

/// The port between hosts, when none is named.
pub const DEFAULT_PORT: u16 = 10810;

/// How long a preamble is.
pub const PREAMBLE_BYTES: usize = 8;
/// Peer messages: a [`Hello`](hello::Hello) follows, and its answer, whatever the version.
pub const PREAMBLE_MESSAGES: &[u8; PREAMBLE_BYTES] = b"LMPEER01";
/// NBD data of a migration: the NBD handshake follows.
pub const PREAMBLE_NBD: &[u8; PREAMBLE_BYTES] = b"LMNBD001";
/// A checkpoint's images: one frame with [`ImagesHead`] follows, then image frames.
pub const PREAMBLE_IMAGES: &[u8; PREAMBLE_BYTES] = b"LMIMAG01";

/// Names one disk of one migration at one epoch: a word about another is refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subject {
    /// The disk's name, the same on both hosts.
    pub disk: String,
    /// Which attempt.
    pub migration: MigrationId,
    /// The epoch that the destination has, or will have.
    pub epoch: Epoch,
}

/// Make room for a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrepareAsk {
    /// What it is about.
    pub subject: Subject,
    /// The disk's size in bytes.
    pub size: u64,
    /// The unit of the block map.
    pub block_size: BlockSize,
    /// The lease's timings.
    pub timings: Timings,
    /// Where the source's node can be dialled; without it, the address that this question came from.
    pub advertise: Option<String>,
    /// The port of the source's peer address.
    pub port: u16,
    /// The container that moves along.
    pub container: Option<DestinationContainer>,
    /// The migration that brought the disk to the source: since then it knows of every block whether it was written. The
    /// host that the disk came from has the rest already.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<MigrationId>,
}

/// How far the destination is; travels with every beat.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Bytes of blocks that are present.
    pub present_bytes: u64,
    /// Bytes of blocks that were written there since the handover.
    pub dirty_bytes: u64,
    /// Bytes that came over the link.
    pub pulled_bytes: u64,
    /// Bytes that did not have to: holes and zeroes.
    pub skipped_bytes: u64,
    /// Demand fetches.
    pub demand_fetches: u64,
    /// Bytes per second.
    pub pull_rate: u64,
}

/// A question.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub enum Request {
    /// To the destination: make the export and connect back.
    Prepare(PrepareAsk),
    /// To the destination: it owns the disk.
    Handover {
        /// What it is about.
        subject: Subject,
        /// The last beat that the source has heard.
        beat: Beat,
    },
    /// To the destination: attach, mount, restore the container.
    Resume {
        /// What it is about.
        subject: Subject,
    },
    /// To the destination: forget it; nothing was handed over, or it is taken back.
    Discard {
        /// What it is about.
        subject: Subject,
        /// After the handover: the last beat that was heard. The word is void when that is older than a lease.
        beat: Option<Beat>,
    },
    /// To the source: the destination lives, and asks for its lease.
    Beat {
        /// What it is about.
        subject: Subject,
        /// Which beat.
        beat: Beat,
        /// The destination's phase.
        phase: DestinationPhase,
        /// How far it is.
        progress: Progress,
    },
    /// To the source: every block is durable at the destination.
    Complete {
        /// What it is about.
        subject: Subject,
        /// How far it is: everything.
        progress: Progress,
        /// The last granting answer that it has.
        grant: Grant,
    },
    /// To the source: checksums of blocks of the frozen disk.
    Checksums {
        /// What it is about.
        subject: Subject,
        /// The first block.
        first: u64,
        /// How many, at most [`PEER_CHECKSUM_BLOCKS`](crate::limits::PEER_CHECKSUM_BLOCKS).
        count: u64,
    },
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case")]
pub enum Reply {
    /// It is so.
    Done,
    /// To a beat.
    Beat {
        /// What the source says.
        answer: BeatAnswer,
    },
    /// One checksum a block: the first 16 bytes of its BLAKE3 hash, in hexadecimal, one after the other.
    Checksums {
        /// 32 digits a block.
        digests: String,
    },
}

/// What goes over the wire in answer to a [`Request`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Response {
    /// Done.
    Ok(Reply),
    /// Certainly not done.
    Err(Failure),
}

/// The first frame of an image connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImagesHead {
    /// What it is about.
    pub subject: Subject,
}

/// The framing of peer messages.
pub fn codec() -> LengthDelimitedCodec {
    LengthDelimitedCodec::builder().max_frame_length(PEER_FRAME_BYTES).new_codec()
}

/// Makes a connection between hosts notice a dead link within seconds, and send small frames at once.
pub fn tune(stream: &TcpStream) -> std::io::Result<()> {
    use std::time::Duration;
    stream.set_nodelay(true)?;
    let socket = socket2::SockRef::from(stream);
    socket.set_tcp_user_timeout(Some(Duration::from_secs(5)))?;
    socket.set_tcp_keepalive(
        &socket2::TcpKeepalive::new()
            .with_time(Duration::from_secs(2))
            .with_interval(Duration::from_secs(1))
            .with_retries(3),
    )
}
