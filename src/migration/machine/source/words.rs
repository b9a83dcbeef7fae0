//! What the source's machine is told, and what it says is to be done.

use std::time::Duration;

use super::super::{Denied, Grant};
use crate::error::Failure;
use crate::migration::lease::Beat;
use crate::migration::record::{RollbackMode, SourceContainer, SourceRecord};
use crate::units::{Epoch, ImageMark};

/// Something to do. The driver does them one after the other and reports each.
#[derive(Clone, Debug, PartialEq)]
pub enum SourceEffect {
    /// Make the record durable.
    Journal(Box<SourceRecord>),
    /// Ask the destination to prepare; report with [`SourceEvent::PeerPrepared`].
    AskPrepare,
    /// Make the disk read-only, settle what is in flight, sync; report with [`SourceEvent::Sealed`].
    Seal,
    /// Tell the destination that it owns the disk; report with [`SourceEvent::PeerTold`].
    TellHandover(Beat),
    /// Tell the destination to forget it, as far as it can be reached.
    TellCancel,
    /// Tell the destination to discard; report with [`SourceEvent::PeerDiscard`].
    TellDiscard {
        /// For at most this long.
        within: Duration,
        /// The last beat that was heard: the word is void when that is older than a lease.
        beat: Beat,
    },
    /// The disk is read-write again.
    Unseal,
    /// The file system is thawed, the container resumed (or restored, if this host was restarted), its network opened;
    /// report with [`SourceEvent::Thawed`].
    Thaw,
    /// Has anybody written to the image behind our back since it was sealed? Report with [`SourceEvent::Unchanged`].
    CheckUnchanged,
    /// The container and its device are not needed any more.
    ReleaseContainer,
    /// The command that is being done has ended.
    Answer(Result<(), Denied>),
}

/// What the destination said, or that it could not be asked.
#[derive(Clone, Debug, PartialEq)]
pub enum PeerWord {
    /// Done.
    Yes,
    /// Certainly not done, and why.
    No(Failure),
    /// Nobody knows: no answer.
    Silence(Failure),
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq)]
pub enum SourceEvent {
    /// An operator prepares the migration that the machine was made with.
    Prepare,
    /// A container is about to be frozen for the migration: recorded first, so that a restart thaws it.
    Freezing(SourceContainer),
    /// An operator hands over.
    HandOver,
    /// An operator cancels.
    Cancel,
    /// An operator rolls back; `insist` keeps the lease from being renewed until it is safe.
    RollBack {
        /// What is restored.
        mode: RollbackMode,
        /// Stop renewing: the operator waits for the disk.
        insist: bool,
    },
    /// The record is durable, or could not be made so.
    Journaled(Result<(), Failure>),
    /// The answer to [`SourceEffect::AskPrepare`].
    PeerPrepared(PeerWord),
    /// The answer to [`SourceEffect::Seal`].
    Sealed(Result<Option<ImageMark>, Failure>),
    /// The answer to [`SourceEffect::TellHandover`].
    PeerTold(PeerWord),
    /// The answer to [`SourceEffect::TellDiscard`].
    PeerDiscard(PeerWord),
    /// The destination says that it holds every block durably.
    PeerComplete {
        /// At this epoch.
        epoch: Epoch,
        /// The last granting answer that it had received by then.
        grant: Grant,
    },
    /// The answer to [`SourceEffect::Thaw`].
    Thawed(Result<(), Failure>),
    /// The answer to [`SourceEffect::CheckUnchanged`].
    Unchanged(Result<(), Failure>),
    /// Time has passed.
    Tick,
    /// Any other effect has ended.
    Done,
}
