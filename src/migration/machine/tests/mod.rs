//! Both machines, each alone; `tests/sim` lets them meet.

mod destination;
mod source;

use super::{DestinationEffect, DestinationEvent};
use crate::error::Failure;
use crate::migration::lease::Timings;
use crate::migration::phase::{DestinationPhase, SourcePhase};
use crate::migration::record::{DestinationRecord, LinkPolicy, MigrationId, SourceRecord};
use crate::units::{BlockSize, Epoch};

fn failure(text: &str) -> Failure {
    Failure::failed(text)
}

fn source_record(migration: &str, epoch: Epoch, timings: Timings) -> SourceRecord {
    SourceRecord {
        migration: MigrationId(migration.into()),
        epoch,
        phase: SourcePhase::Serving,
        peer: "10.0.0.2:10810".into(),
        peer_name: None,
        timings,
        container: None,
        policy: LinkPolicy::default(),
        seal: None,
        base: None,
    }
}

fn destination_record(migration: &str, epoch: Epoch, timings: Timings) -> DestinationRecord {
    DestinationRecord {
        migration: MigrationId(migration.into()),
        epoch,
        phase: DestinationPhase::Preparing,
        owned: false,
        source: "10.0.0.1:10810".into(),
        peer_name: None,
        size: 1 << 20,
        block_size: BlockSize::DEFAULT,
        timings,
        container: None,
    }
}
