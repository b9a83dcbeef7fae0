//! The migration machines: pure, one for each role.
//!
//! A machine is told what happened ([`SourceMachine::handle`], [`DestinationMachine::handle`]) and says what to do next
//! ([`SourceMachine::poll_effect`]); it never does anything itself. The driver runs one effect after the other, in the
//! order they come out, and tells the machine how each ended. So the rule "the record is durable before its effect" is
//! an order of effects here, and can be read and tested here.

mod destination;
mod source;
#[cfg(test)]
mod tests;

pub use destination::{DestinationEffect, DestinationEvent, DestinationMachine};
pub use source::{PeerWord, SourceEffect, SourceEvent, SourceMachine};

use std::time::Duration;

use super::phase::{Refusal, Refused};

/// The number of a granting answer; rises by one with each, as long as the source's node lives; the next process counts
/// from another number. The word that all is
/// durable carries the last one: it shows that the destination was alive after that answer was given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct Grant(pub u64);

/// What the source answers to a beat.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BeatAnswer {
    /// Heard; nothing is handed over yet, or the lease is renewed.
    Granted(Grant),
    /// The source wants the disk back: stop, discard, and say so.
    GiveBack,
    /// The source owns the disk again.
    RolledBack,
    /// The source has recorded that it was released.
    Released,
}

/// Why a command was not done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// The table refuses it.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The destination cannot be told, and its lease has not ended: it may still own the disk.
    #[error(
        "the destination may still own the disk: it does not answer and its lease ends in {:.1} s; \
         wait that long, or use --wait", unsafe_for.as_secs_f64()
    )]
    NotSafeYet {
        /// Until it is safe.
        unsafe_for: Duration,
    },
    /// It belongs to another attempt or epoch.
    #[error("it belongs to another migration (epoch {theirs}, here {ours})")]
    Stale {
        /// What was said.
        theirs: u64,
        /// What is recorded.
        ours: u64,
    },
    /// The destination is not known to be alive.
    #[error("no fresh heartbeat links the two hosts; check the peer link and try again")]
    NoBeat,
    /// The disk was asked back from the destination, which may yet discard it.
    #[error("the disk was asked back, and the destination may yet discard it; the word is void in {:.1} s", void_in.as_secs_f64())]
    AskedBack {
        /// Until the destination would ignore that word.
        void_in: Duration,
    },
    /// The word refers to a beat that was sent longer than a lease ago, or by an earlier process.
    #[error("the word is older than a lease; give it again")]
    OldWord,
    /// The journal could not be written, so that its end is not known.
    #[error("an earlier record could not be written, so it is not known how far the migration is; restart the node")]
    Unrecorded,
    /// Another command is being done.
    #[error("another command is being done on this disk; try again when it has ended")]
    Busy,
    /// An effect failed, or the peer said no.
    #[error("{0}")]
    Failed(crate::error::Failure),
}

impl Denied {
    /// Whether the refusal only says that it is so already.
    fn is_already(&self) -> bool {
        matches!(self, Denied::Refused(Refused { refusal: Refusal::Already, .. }))
    }
}

/// The command that a machine is doing. It lasts until its answer has been taken, after all effects that come first: a
/// second command before that would get the first one's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Command {
    None,
    Doing,
    Answered,
}

impl Command {
    /// Whether an answer is owed; from now on it is not.
    fn answer(&mut self) -> bool {
        let owed = *self == Command::Doing;
        if owed {
            *self = Command::Answered;
        }
        owed
    }

    /// The effects were dropped, and the answer with them.
    fn reopen(&mut self) {
        if *self == Command::Answered {
            *self = Command::Doing;
        }
    }
}
