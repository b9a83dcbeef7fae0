//! Who waits for which ticket, and how they hear of its end.
//!
//! A task waits for a message. A client's READ has something done in its place, by whoever ends the wait: that is its
//! answer. Either way it is told after the fetcher's lock was given back.

use bytes::Bytes;
use rustc_hash::FxHashMap;
use smallvec::SmallVec;
use tokio::sync::oneshot;

use super::assemble::{Fetched, Pieces};
use super::queue::{Ticket, Tickets};

/// How to tell of the end of a wait.
pub(super) enum Tell {
    /// A task waits for the message.
    Task(oneshot::Sender<Fetched>),
    /// This is to be done.
    Reader(Box<dyn FnOnce(Fetched) + Send>),
}

impl Tell {
    pub(super) fn tell(self, brought: Fetched) {
        match self {
            // The other side may have gone: then nobody minds.
            Tell::Task(sender) => drop(sender.send(brought)),
            Tell::Reader(done) => done(brought),
        }
    }
}

/// Those who wait, by their tickets.
#[derive(Default)]
pub(super) struct Waiters(FxHashMap<Ticket, Waiter>);

struct Waiter {
    brought: Fetched,
    tell: Tell,
}

/// Whose wait has ended: to be told once the lock is free.
#[must_use = "they wait until they are told"]
pub(super) struct Served(SmallVec<[Waiter; 1]>);

impl Served {
    pub(super) fn tell(self) {
        self.0.into_iter().for_each(|Waiter { brought, tell }| tell.tell(brought));
    }
}

impl Waiters {
    pub(super) fn add(&mut self, ticket: Ticket, tell: Tell) {
        self.0.insert(ticket, Waiter { brought: Fetched::default(), tell });
    }

    /// Bytes are here for those who wait.
    pub(super) fn bring(&mut self, joined: &Tickets, pieces: &Pieces) {
        for ticket in joined {
            if let Some(waiter) = self.0.get_mut(ticket) {
                pieces.iter().for_each(|(blocks, bytes)| waiter.brought.push(*blocks, Bytes::clone(bytes)));
            }
        }
    }

    /// The wait for these is over.
    pub(super) fn finish(&mut self, tickets: impl IntoIterator<Item = Ticket>) -> Served {
        Served(tickets.into_iter().filter_map(|ticket| self.0.remove(&ticket)).collect())
    }

    /// Nobody waits for this one any more: what was to be done, if it was still waited for.
    pub(super) fn forget(&mut self, ticket: Ticket) -> Option<Tell> {
        self.0.remove(&ticket).map(|waiter| waiter.tell)
    }

    /// All but tasks.
    pub(super) fn readers(&self) -> Vec<Ticket> {
        let reads = |waiter: &Waiter| matches!(waiter.tell, Tell::Reader(_));
        self.0.iter().filter(|(_, waiter)| reads(waiter)).map(|(ticket, _)| *ticket).collect()
    }
}
