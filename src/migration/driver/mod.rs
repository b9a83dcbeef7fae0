//! The only part of a migration that waits.
//!
//! One task owns a machine. It does the machine's effects one after the other, and meanwhile hears commands, beats and
//! time; what comes of them is the machine's decision. Everybody else holds a handle: commands go in, a view comes out.

mod container;
mod destination;
mod migrate;
mod source;
mod verify;

pub use container::{DestinationHold, Found, Places, Runtimes, SourceHold};
pub use destination::{ContainerState, DestinationHandle, DestinationView, DestinationWorld};
pub use migrate::{MigrateWorld, migrate};
pub use source::{SourceHandle, SourceView, SourceWorld};
pub(crate) use source::{check_unchanged, new_record};
pub(crate) use verify::checksums;
pub use verify::verify;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::BoxFuture;

use super::journal::OwnershipRecord;
use super::machine::Denied;
use super::record::Record;
use crate::error::{Failure, Outcome, chain};
use crate::units::Epoch;

/// A disk's record of ownership, shared by the migrations that follow one another.
pub type SharedRecord = Arc<Mutex<dyn OwnershipRecord>>;

/// How many commands may wait for a driver.
const COMMANDS: usize = 64;

/// What is suggested to a caller who comes while another command is being done.
const BUSY_RETRY_MS: u64 = 500;

/// How often what is left of a migration is tried to be removed before that is left to the node's next start, and how long
/// between.
const REMOVE_TRIES: u32 = 5;
const REMOVE_PAUSE: Duration = Duration::from_secs(2);

/// Appends a record off the runtime's threads: it syncs.
async fn append(journal: &SharedRecord, record: Record) -> Result<(), Failure> {
    let journal = journal.clone();
    let span = tracing::Span::current();
    let appended = tokio::task::spawn_blocking(move || {
        let _entered = span.entered();
        let mut journal = journal.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        journal.append(&record).map_err(|error| Failure::failed(chain(&error)))
    });
    match appended.await {
        Ok(result) => result,
        Err(error) => Err(Failure::failed(format!("the journal's task ended: {error}"))),
    }
}

/// The disk's span is told where the migration is, so that its lines in the log say so.
fn note(epoch: Epoch, phase: &'static str) {
    tracing::Span::current().record("epoch", epoch.0).record("phase", phase);
}

/// Removes what is left of `what` on this host; tries again when something there is still held, which passes.
async fn remove_all<F: Future<Output = Outcome<()>>>(what: &str, remove: impl Fn() -> F) {
    for left in (0..REMOVE_TRIES).rev() {
        let Err(failure) = remove().await else { return };
        tracing::error!(%failure, left, "what is left of {what} could not be removed");
        if left > 0 {
            tokio::time::sleep(REMOVE_PAUSE).await;
        }
    }
}

async fn pending<T>(slot: &mut Option<BoxFuture<'static, T>>) -> T {
    match slot {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

/// How a refusal is told to a user.
pub(crate) fn denied(denied: Denied) -> Failure {
    match denied {
        Denied::NotSafeYet { unsafe_for } => {
            let mut failure = Failure::refused(&denied);
            failure.retry_after_ms = Some(unsafe_for.as_millis().try_into().unwrap_or(u64::MAX));
            failure
        }
        Denied::AskedBack { void_in } => {
            let mut failure = Failure::refused(&denied);
            failure.retry_after_ms = Some(void_in.as_millis().try_into().unwrap_or(u64::MAX));
            failure
        }
        Denied::Busy | Denied::OldWord => {
            let mut failure = Failure::refused(&denied);
            failure.retry_after_ms = Some(BUSY_RETRY_MS);
            failure
        }
        Denied::Failed(failure) => failure,
        refused => Failure::refused(refused),
    }
}

/// What a command ends with when its driver has gone: the node is shutting down.
fn driver_gone() -> Failure {
    Failure::unreachable("the node is shutting down; start it again, it goes on where it was")
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_is_still_held_is_removed_when_it_is_let_go() {
        for (held_for, tries) in [(0, 1), (2, 3), (u32::MAX, REMOVE_TRIES)] {
            let tried = Cell::new(0);
            let remove = || async {
                tried.set(tried.get() + 1);
                if tried.get() > held_for { Ok(()) } else { Err(Failure::failed("the mount is busy")) }
            };
            remove_all("a test", remove).await;
            assert_eq!(tried.get(), tries, "held for {held_for} tries");
        }
    }
}
