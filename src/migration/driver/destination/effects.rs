//! What a destination's machine wants done, done.

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;

use super::super::append;
use super::DestinationWorld;
use crate::export::GateMode;
use crate::migration::machine::{DestinationEffect, DestinationEvent};
use crate::migration::record::Record;
use crate::peer::{Progress, Request, Subject};

/// How long the source may take to record its release.
const COMPLETE_TIME: Duration = Duration::from_secs(10);

/// How long writes that were admitted before are waited for when the gate changes.
const GATE_TIME: Duration = Duration::from_millis(500);

pub(super) fn perform(
    world: Arc<DestinationWorld>,
    effect: DestinationEffect,
    progress: Progress,
    subject: Subject,
) -> BoxFuture<'static, DestinationEvent> {
    Box::pin(async move {
        tracing::info!(disk = world.disk, epoch = subject.epoch.0, effect = name(&effect), "destination");
        match effect {
            DestinationEffect::Journal(record) => {
                return DestinationEvent::Journaled(append(&world.journal, Record::Destination(record)).await);
            }
            DestinationEffect::Open => set_gate(&world, GateMode::Open).await,
            DestinationEffect::Hold => set_gate(&world, GateMode::Held).await,
            DestinationEffect::Close => {
                // What would still come is no part of this disk any more.
                world.export.set_background(false);
                set_gate(&world, GateMode::Closed).await;
            }
            DestinationEffect::StartPull => world.export.set_background(true),
            DestinationEffect::FreezeContainer => world.hold.freeze().await,
            DestinationEffect::ThawContainer => world.hold.thaw().await,
            DestinationEffect::TellComplete(grant) => {
                let told = world.peer.call(&Request::Complete { subject, progress, grant }, COMPLETE_TIME).await;
                return DestinationEvent::SourceKnows(match told {
                    Ok(_) => Ok(()),
                    Err(error) => Err(error.into_failure()),
                });
            }
            DestinationEffect::Verify | DestinationEffect::TearDown | DestinationEffect::Answer(_) => {}
        }
        DestinationEvent::Done
    })
}

/// A new mode counts at once; changes of bytes that were admitted before are waited for, but not for ever: what the
/// local disk holds up is not acknowledged under the new mode either.
async fn set_gate(world: &DestinationWorld, mode: GateMode) {
    if tokio::time::timeout(GATE_TIME, world.export.gate().set(mode)).await.is_err() {
        tracing::warn!(disk = world.disk, ?mode, "writes to the local disk take long to end");
    }
}

fn name(effect: &DestinationEffect) -> &'static str {
    match effect {
        DestinationEffect::Journal(_) => "journal",
        DestinationEffect::Open => "open",
        DestinationEffect::Hold => "hold",
        DestinationEffect::Close => "close",
        DestinationEffect::StartPull => "start the pull",
        DestinationEffect::FreezeContainer => "freeze",
        DestinationEffect::ThawContainer => "thaw",
        DestinationEffect::TearDown => "tear down",
        DestinationEffect::Verify => "verify",
        DestinationEffect::TellComplete(_) => "tell that it is complete",
        DestinationEffect::Answer(_) => "answer",
    }
}
