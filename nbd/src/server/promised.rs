//! The READs of a connection whose answers its export has promised.

use std::sync::Arc;
use std::task::{Context, Poll};

use slab::Slab;

use crate::export::{Export, LateRead};
use crate::promise::{Inbox, Letter, Promise, ReadReply};
use crate::wire::{Errno, Request};

/// See the module's documentation. When it is dropped, the export forgets what it has promised.
pub(super) struct Promised {
    export: Arc<dyn Export>,
    inbox: Arc<Inbox>,
    /// By the letters' keys. An entry stays until its letter has come, so no key is ever that of two.
    waiting: Slab<(Request, Promise)>,
    /// Taken out of the inbox.
    letters: Vec<Letter>,
}

impl Promised {
    pub(super) fn by(export: Arc<dyn Export>) -> Promised {
        Promised { export, inbox: Arc::default(), waiting: Slab::new(), letters: Vec::new() }
    }

    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Has the export send the answer when it has it.
    pub(super) fn ask(&mut self, request: Request) {
        let place = self.waiting.vacant_entry();
        let reply = ReadReply::new(&self.inbox, place.key());
        let promise = self.export.promise(request.offset, request.length as usize, reply);
        place.insert((request, promise));
    }

    /// The next answer that has come. Woken when there is one.
    pub(super) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<(Request, Result<LateRead, Errno>)> {
        loop {
            if let Some(Letter { key, outcome }) = self.letters.pop() {
                // Each is sent once.
                if let Some((request, _)) = self.waiting.try_remove(key) {
                    return Poll::Ready((request, outcome));
                }
                continue;
            }
            if self.waiting.is_empty() {
                return Poll::Pending;
            }
            std::task::ready!(self.inbox.poll_take(cx, &mut self.letters));
            // The first that came is the last of the list.
            self.letters.reverse();
        }
    }
}

impl Drop for Promised {
    fn drop(&mut self) {
        for (_, (_, promise)) in &self.waiting {
            self.export.forget(*promise);
        }
    }
}
