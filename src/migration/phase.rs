//! The phase table: which step leads from where to where, and why anything else is refused.
//!
//! Every change of ownership is one row here. The machine ([`super::machine`]) asks the table before it does anything;
//! a step that the table does not have is a typed [`Refused`]. The whole table, every phase with every step, is
//! shown in `docs/state-machine.md`, and compared: a changed edge shows in review.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The phases of the host that gives a disk away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SourcePhase {
    /// The disk is this host's, and in use.
    Serving,
    /// The destination is being asked to make room, or is ready; the disk is still in use here.
    Preparing,
    /// The disk is read-only, its state is the freeze point; nothing has been given away.
    Frozen,
    /// The word has been given: the destination may own the disk.
    HandedOver,
    /// The destination holds everything durably; nothing here is needed any more.
    Released,
    /// Ownership was taken back; the disk is read-write again at a higher epoch.
    RolledBack,
}

/// The phases of the host that receives a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DestinationPhase {
    /// The empty export is being made and the source dialled.
    Preparing,
    /// Everything is there for a handover; all I/O is held.
    Ready,
    /// This host owns the disk as long as its lease is renewed.
    Active,
    /// The lease could not be renewed in time: I/O is held and the container frozen.
    Fenced,
    /// Every block is here, durably, and the source knows it.
    Complete,
    /// The source took the disk back, or the migration was cancelled: nothing here may be used.
    Discarded,
}

/// The steps of a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceStep {
    /// A destination is asked to make room.
    Prepare,
    /// The disk becomes read-only and everything in flight is settled.
    Freeze,
    /// The handover is recorded and the destination told.
    HandOver,
    /// Back to serving before anything was given away.
    Cancel,
    /// Back to serving after the handover.
    RollBack,
    /// The rolled-back disk and container are in use again.
    Resume,
    /// The destination has proved that it holds everything.
    Release,
}

/// The steps of a destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DestinationStep {
    /// The export is made and the source answers.
    BecomeReady,
    /// The source has handed the disk over, at an epoch and with a lease.
    Activate,
    /// The lease is about to end.
    Fence,
    /// The lease was renewed again, at the same epoch.
    Unfence,
    /// Every block is present and durable.
    Complete,
    /// The source cancelled or rolled back.
    Discard,
}

/// Why a step is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It was taken already: repeating it changes nothing, and is answered as done.
    Already,
    /// This phase does not allow it; the text says why, and what does.
    Wrong(&'static str),
}

/// A step that the table refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{step} is refused in phase {phase}: {}", self.reason())]
pub struct Refused {
    /// The phase, by its name.
    pub phase: &'static str,
    /// The step, by its name.
    pub step: &'static str,
    /// Why.
    pub refusal: Refusal,
}

impl Refused {
    fn reason(&self) -> &'static str {
        match self.refusal {
            Refusal::Already => "it is done already",
            Refusal::Wrong(why) => why,
        }
    }
}

use DestinationPhase as D;
use DestinationStep as DS;
use SourcePhase as S;
use SourceStep as SS;

const SOURCE_TABLE: &[(S, SS, S)] = &[
    (S::Serving, SS::Prepare, S::Preparing),
    (S::Preparing, SS::Freeze, S::Frozen),
    (S::Preparing, SS::Cancel, S::Serving),
    (S::Frozen, SS::HandOver, S::HandedOver),
    (S::Frozen, SS::Cancel, S::Serving),
    (S::HandedOver, SS::RollBack, S::RolledBack),
    (S::HandedOver, SS::Release, S::Released),
    (S::RolledBack, SS::Resume, S::Serving),
];

const DESTINATION_TABLE: &[(D, DS, D)] = &[
    (D::Preparing, DS::BecomeReady, D::Ready),
    (D::Preparing, DS::Discard, D::Discarded),
    (D::Ready, DS::Activate, D::Active),
    (D::Ready, DS::Discard, D::Discarded),
    (D::Active, DS::Fence, D::Fenced),
    (D::Active, DS::Complete, D::Complete),
    (D::Active, DS::Discard, D::Discarded),
    (D::Fenced, DS::Unfence, D::Active),
    (D::Fenced, DS::Discard, D::Discarded),
];

impl SourcePhase {
    /// All of them, in the order of a migration.
    pub const ALL: [S; 6] = [S::Serving, S::Preparing, S::Frozen, S::HandedOver, S::Released, S::RolledBack];

    /// The name as users see it.
    pub fn name(self) -> &'static str {
        match self {
            S::Serving => "serving",
            S::Preparing => "preparing",
            S::Frozen => "frozen",
            S::HandedOver => "handed-over",
            S::Released => "released",
            S::RolledBack => "rolled-back",
        }
    }

    /// Where a step leads, or why it is refused.
    pub fn step(self, step: SourceStep) -> Result<SourcePhase, Refused> {
        if let Some(row) = SOURCE_TABLE.iter().find(|row| row.0 == self && row.1 == step) {
            return Ok(row.2);
        }
        let refusal = match (self, step) {
            (S::Preparing, SS::Prepare) | (S::Frozen, SS::Freeze) | (S::HandedOver, SS::Freeze | SS::HandOver) => {
                Refusal::Already
            }
            (S::Released, SS::Release) | (S::RolledBack, SS::RollBack) | (S::Serving, SS::Cancel | SS::Resume) => {
                Refusal::Already
            }
            (S::Released, SS::RollBack) => Refusal::Wrong(
                "the destination holds everything and was released; to come back, migrate in the other direction",
            ),
            (S::Released, _) => Refusal::Wrong("the disk was released to the destination; remove it here"),
            (S::HandedOver, SS::Cancel) => Refusal::Wrong("the disk was handed over already; use rollback"),
            (S::HandedOver, SS::Prepare) | (S::Frozen, SS::Prepare) => Refusal::Wrong("a migration is under way"),
            (S::Serving, SS::RollBack) => {
                Refusal::Wrong("nothing was handed over; this host owns the disk and serves it")
            }
            (S::Preparing | S::Frozen, SS::RollBack) => {
                Refusal::Wrong("nothing was handed over yet; use cancel, which loses nothing")
            }
            (S::Serving, SS::Freeze | SS::HandOver) => Refusal::Wrong("no destination is prepared; use prepare first"),
            (S::Preparing, SS::HandOver) => Refusal::Wrong("the disk is not frozen yet"),
            (S::RolledBack, _) => Refusal::Wrong("a rollback is being finished"),
            (_, SS::Release) => Refusal::Wrong("nothing was handed over"),
            (_, SS::Resume) => Refusal::Wrong("nothing was rolled back"),
            _ => Refusal::Wrong("the table has no such row"),
        };
        Err(Refused { phase: self.name(), step: step.name(), refusal })
    }
}

impl SourceStep {
    /// All of them.
    pub const ALL: [SS; 7] = [SS::Prepare, SS::Freeze, SS::HandOver, SS::Cancel, SS::RollBack, SS::Resume, SS::Release];

    /// The name as users see it.
    pub fn name(self) -> &'static str {
        match self {
            SS::Prepare => "prepare",
            SS::Freeze => "freeze",
            SS::HandOver => "handover",
            SS::Cancel => "cancel",
            SS::RollBack => "rollback",
            SS::Resume => "resume",
            SS::Release => "release",
        }
    }
}

impl DestinationPhase {
    /// All of them, in the order of a migration.
    pub const ALL: [D; 6] = [D::Preparing, D::Ready, D::Active, D::Fenced, D::Complete, D::Discarded];

    /// The name as users see it.
    pub fn name(self) -> &'static str {
        match self {
            D::Preparing => "preparing",
            D::Ready => "ready",
            D::Active => "active",
            D::Fenced => "fenced",
            D::Complete => "complete",
            D::Discarded => "discarded",
        }
    }

    /// Where a step leads, or why it is refused.
    pub fn step(self, step: DestinationStep) -> Result<DestinationPhase, Refused> {
        if let Some(row) = DESTINATION_TABLE.iter().find(|row| row.0 == self && row.1 == step) {
            return Ok(row.2);
        }
        let refusal = match (self, step) {
            (D::Ready, DS::BecomeReady) | (D::Active | D::Fenced, DS::Activate) => Refusal::Already,
            (D::Fenced, DS::Fence) | (D::Active, DS::Unfence) => Refusal::Already,
            (D::Complete, DS::Complete) | (D::Discarded, DS::Discard) => Refusal::Already,
            (D::Complete, DS::Discard) => Refusal::Wrong("this host holds everything and owns the disk"),
            (D::Complete, _) => Refusal::Wrong("the migration is complete"),
            (D::Discarded, _) => Refusal::Wrong("the source has taken the disk back"),
            (D::Preparing, DS::Activate) => Refusal::Wrong("this host is not ready yet"),
            (D::Fenced, DS::Complete) => Refusal::Wrong("the lease has not been renewed"),
            (D::Active | D::Fenced, DS::BecomeReady) => Refusal::Wrong("this host owns the disk already"),
            _ => Refusal::Wrong("the disk was not handed over to this host yet"),
        };
        Err(Refused { phase: self.name(), step: step.name(), refusal })
    }
}

impl DestinationStep {
    /// All of them.
    pub const ALL: [DS; 6] = [DS::BecomeReady, DS::Activate, DS::Fence, DS::Unfence, DS::Complete, DS::Discard];

    /// The name as users see it.
    pub fn name(self) -> &'static str {
        match self {
            DS::BecomeReady => "become ready",
            DS::Activate => "activate",
            DS::Fence => "fence",
            DS::Unfence => "unfence",
            DS::Complete => "complete",
            DS::Discard => "discard",
        }
    }
}

impl fmt::Display for SourcePhase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl fmt::Display for DestinationPhase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_leads_out_of_an_end() {
        assert!(SS::ALL.iter().all(|&step| S::Released.step(step).is_err()));
        assert!(DS::ALL.iter().all(|&step| D::Complete.step(step).is_err() && D::Discarded.step(step).is_err()));
    }
}
