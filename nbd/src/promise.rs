//! Answers to READs that are sent by whoever has the bytes.
//!
//! What many READs wait for is the same: something that comes from afar, and arrives on a task of its own. There it is
//! known at once what the answer is. So it is put into the connection's inbox right there ([`ReadReply::send`]), and the
//! connection is woken for the first of many; a future for each would have to be made, woken, found and polled.

use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};

use crate::export::LateRead;
use crate::wire::Errno;

/// The name that an export gave to a promised answer, for [`crate::export::Export::forget`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Promise(pub u64);

/// Where the answer to one READ goes. Dropped without having sent one, it answers ESHUTDOWN: nobody waits for ever.
#[derive(Debug)]
pub struct ReadReply {
    inbox: Arc<Inbox>,
    key: usize,
    sent: bool,
}

impl ReadReply {
    pub(crate) fn new(inbox: &Arc<Inbox>, key: usize) -> ReadReply {
        ReadReply { inbox: inbox.clone(), key, sent: false }
    }

    /// Answers. From any thread; it does not wait.
    pub fn send(mut self, outcome: Result<LateRead, Errno>) {
        self.sent = true;
        self.inbox.put(Letter { key: self.key, outcome });
    }
}

impl Drop for ReadReply {
    fn drop(&mut self) {
        if !self.sent {
            self.inbox.put(Letter { key: self.key, outcome: Err(Errno::ESHUTDOWN) });
        }
    }
}

/// An answer, and to what.
#[derive(Debug)]
pub(crate) struct Letter {
    pub(crate) key: usize,
    pub(crate) outcome: Result<LateRead, Errno>,
}

/// The answers that have come and were not taken.
#[derive(Debug, Default)]
pub(crate) struct Inbox(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    letters: Vec<Letter>,
    /// Of who has found it empty.
    waker: Option<Waker>,
}

impl Inbox {
    fn put(&self, letter: Letter) {
        let waker = {
            let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            state.letters.push(letter);
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Takes all that have come, into an empty list; woken when there are some.
    pub(crate) fn poll_take(&self, cx: &mut Context<'_>, taken: &mut Vec<Letter>) -> Poll<()> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.letters.is_empty() {
            if !state.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
                state.waker = Some(cx.waker().clone());
            }
            return Poll::Pending;
        }
        std::mem::swap(&mut state.letters, taken);
        Poll::Ready(())
    }
}
