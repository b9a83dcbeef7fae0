//! What all connections of a server may hold together.
//!
//! A connection counts the requests that it has in flight and the bytes that it holds for them, and takes no further
//! request while the sum over all connections is at the limit. A connection that holds little is never held back, so
//! that clients that are stuck with much cannot stop the others: they only make them go without a long queue.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Waker};

use crate::limits::{SERVER_BYTES_IN_FLIGHT, SERVER_REQUESTS_IN_FLIGHT};

/// The requests and bytes that the connections of one or more listeners may have in flight together. One connection
/// may go beyond it by one request.
#[derive(Debug)]
pub struct Budget {
    requests: usize,
    bytes: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    requests: usize,
    bytes: usize,
    waiting: Vec<Waker>,
}

impl Default for Budget {
    /// [`SERVER_REQUESTS_IN_FLIGHT`] and [`SERVER_BYTES_IN_FLIGHT`].
    fn default() -> Budget {
        Budget::new(SERVER_REQUESTS_IN_FLIGHT, SERVER_BYTES_IN_FLIGHT)
    }
}

impl Budget {
    /// At most this many requests, and this many bytes held for them.
    pub fn new(requests: usize, bytes: usize) -> Budget {
        Budget { requests, bytes, state: Mutex::default() }
    }

    /// The requests and bytes that are in flight now.
    pub fn in_flight(&self) -> (usize, usize) {
        let state = self.lock();
        (state.requests, state.bytes)
    }

    // The numbers are right after every statement, so that a panic elsewhere leaves nothing half done.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What one connection holds of a [`Budget`]; given back when it is dropped.
pub(super) struct Share {
    budget: Arc<Budget>,
    requests: usize,
    bytes: usize,
}

impl Share {
    pub(super) fn of(budget: Arc<Budget>) -> Share {
        Share { budget, requests: 0, bytes: 0 }
    }

    /// Says what the connection holds from now on.
    pub(super) fn hold(&mut self, requests: usize, bytes: usize) {
        if (requests, bytes) == (self.requests, self.bytes) {
            return;
        }
        let woken = {
            let mut state = self.budget.lock();
            state.requests = state.requests - self.requests + requests;
            state.bytes = state.bytes - self.bytes + bytes;
            let room = state.requests < self.budget.requests && state.bytes < self.budget.bytes;
            if room { std::mem::take(&mut state.waiting) } else { Vec::new() }
        };
        (self.requests, self.bytes) = (requests, bytes);
        woken.into_iter().for_each(Waker::wake);
    }

    /// Whether there is room for another request of a connection that holds this much by now. If not, its task is woken
    /// when there is.
    pub(super) fn has_room(&self, requests: usize, bytes: usize, cx: &Context<'_>) -> bool {
        let mut state = self.budget.lock();
        let requests = state.requests - self.requests + requests;
        let bytes = state.bytes - self.bytes + bytes;
        if requests < self.budget.requests && bytes < self.budget.bytes {
            return true;
        }
        if !state.waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
            state.waiting.push(cx.waker().clone());
        }
        false
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.hold(0, 0);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    use super::*;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn who_waits_is_woken_once_when_another_gives_back() {
        let budget = Arc::new(Budget::new(10, 1000));
        let (mut one, mut two) = (Share::of(budget.clone()), Share::of(budget.clone()));
        let count = Arc::new(Count::default());
        let waker = Waker::from(count.clone());
        let cx = Context::from_waker(&waker);
        one.hold(3, 900);
        assert!(two.has_room(1, 99, &cx));
        two.hold(1, 100);
        assert_eq!(budget.in_flight(), (4, 1000));
        for _ in 0..3 {
            assert!(!two.has_room(1, 100, &cx), "too many bytes");
        }
        one.hold(9, 900);
        assert!(!two.has_room(1, 0, &cx), "too many requests");
        assert_eq!(count.0.load(Ordering::Relaxed), 0);
        drop(one);
        assert_eq!((count.0.load(Ordering::Relaxed), budget.in_flight()), (1, (1, 100)));
        assert!(two.has_room(1, 100, &cx));
        drop(two);
        assert_eq!((count.0.load(Ordering::Relaxed), budget.in_flight()), (1, (0, 0)));
    }
}
