//! Both machines, alone and against each other.

mod destination;
mod pair;
mod source;
mod world;

use super::{DestinationEffect, DestinationEvent};
use crate::error::Failure;
use crate::migration::lease::Timings;
use crate::migration::phase::{DestinationPhase, SourcePhase};
use crate::migration::record::{DestinationRecord, LinkPolicy, MigrationId, SourceRecord};
use crate::units::{BlockSize, Epoch};

/// A mistake that is made on purpose, around the machines: the checks must find it.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Plant {
    /// The lease is counted from the answer to a beat instead of from its sending.
    LeaseFromAnswer,
    /// The source takes the disk back at once when the destination is silent.
    SilenceIsEnough,
    /// The destination is told of the handover before that is recorded.
    TellBeforeRecord,
    /// The destination serves before it has recorded that it owns the disk.
    OpenBeforeRecord,
    /// The destination's container is not frozen when the lease ends.
    NoFence,
    /// The destination looks at its lease only by a timer.
    GateWithoutDeadline,
    /// A fence waits until the source has answered that it was released.
    FenceBehindTelling,
    /// The destination hears of its release before that is recorded.
    ReleasedBeforeRecord,
}

impl Plant {
    const ALL: [Plant; 8] = [
        Plant::LeaseFromAnswer,
        Plant::SilenceIsEnough,
        Plant::TellBeforeRecord,
        Plant::OpenBeforeRecord,
        Plant::NoFence,
        Plant::GateWithoutDeadline,
        Plant::FenceBehindTelling,
        Plant::ReleasedBeforeRecord,
    ];
}

fn failure(text: &str) -> Failure {
    Failure::failed(text)
}

fn source_record(migration: &str, epoch: Epoch, timings: Timings) -> SourceRecord {
    SourceRecord {
        migration: MigrationId(migration.into()),
        epoch,
        phase: SourcePhase::Serving,
        peer: "10.0.0.2:10810".into(),
        timings,
        container: None,
        policy: LinkPolicy::default(),
        seal: None,
    }
}

fn destination_record(migration: &str, epoch: Epoch, timings: Timings) -> DestinationRecord {
    DestinationRecord {
        migration: MigrationId(migration.into()),
        epoch,
        phase: DestinationPhase::Preparing,
        owned: false,
        source: "10.0.0.1:10810".into(),
        size: 1 << 20,
        block_size: BlockSize::DEFAULT,
        timings,
        container: None,
    }
}
