//! How a connection receives: many small requests at a time, the head of what is probably a long WRITE alone, and of a
//! long WRITE what there is, which the export is given at once (see [`PiecedWrite`]).

use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::{BufMut, BytesMut};
use tokio_util::io::poll_read_buf;

use super::{Connection, Phase};
use crate::limits::{KEPT_BUFFER, PIECED_WRITE_MIN, RECEIVE_SPACE};
use crate::proto::server::check;
use crate::server::client_end::ClientEnd;
use crate::server::pieces::PiecedWrite;
use crate::server::splice::Pipe;
use crate::wire::{CommandFlags, Request};

/// What a receive has brought of a long WRITE.
enum Came {
    /// Bytes in memory.
    Bytes(usize),
    /// Bytes in the pipe; `None`: what was in it fills it.
    Pages(Option<usize>),
}

impl Came {
    /// How many; 0 at the end of the stream.
    fn bytes(self) -> usize {
        match self {
            Came::Bytes(count) | Came::Pages(Some(count)) => count,
            Came::Pages(None) => 1,
        }
    }
}

impl<S: ClientEnd> Connection<S> {
    pub(super) fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        self.make_space();
        // The head alone: its payload may be taken as pages.
        let most = match self.long_before && self.input.is_empty() && self.stream.socket().is_some() {
            true => self.requests.wanted(&self.input),
            false => self.input.capacity() - self.input.len(),
        };
        let received = self.poll_bytes(cx, most);
        if self.patience.is_possible() {
            self.look_again(cx, received.is_pending());
        }
        received
    }

    /// After a receive. Where a client asks one thing after the other, the task is polled again at once.
    fn look_again(&mut self, cx: &mut Context<'_>, pending: bool) {
        let idle = self.phase == Phase::Serving && self.waiting() == 0 && self.output.is_empty();
        if !idle || self.taken > 1 {
            self.patience.busy();
        } else if !pending {
            self.patience.came(Instant::now());
        } else if self.export.is_busy() {
            // The turn is for others then.
            self.patience.busy();
        } else if self.patience.looks(Instant::now()) {
            yield_to_others(cx);
        }
        if !pending {
            self.taken = 0;
        }
    }

    /// Space to receive what is missing of the next request, or many small ones.
    fn make_space(&mut self) {
        if self.input.is_empty() && self.input.capacity() > KEPT_BUFFER {
            self.input = BytesMut::new();
        }
        let missing = self.requests.wanted(&self.input).saturating_sub(self.input.len());
        let free = self.input.capacity() - self.input.len();
        if free < missing.max(RECEIVE_SPACE / 4) {
            self.input.reserve(missing.max(RECEIVE_SPACE));
        }
    }

    /// Begins to take a WRITE before all of it has come, if that is what is at the front.
    pub(super) fn begin_pieces(&mut self) -> bool {
        if self.phase != Phase::Serving {
            return false;
        }
        let rules = &self.rules;
        // What is durable when a piece is answered says nothing of the pieces before.
        let accept = |request: &Request| !request.flags.contains(CommandFlags::FUA) && check(request, rules).is_ok();
        let Some(request) = self.requests.begin_write(&mut self.input, PIECED_WRITE_MIN.into(), accept) else {
            return false;
        };
        self.taken += 1;
        self.long_before = true;
        self.pieced = Some(PiecedWrite::new(request, self.unit, self.stream.socket().is_some()));
        true
    }

    /// Gives the export what has come of such a WRITE; whether it is at its end.
    pub(super) fn give_pieces(&mut self) -> bool {
        let Some(pieced) = &mut self.pieced else { return true };
        while pieced.left() > 0 {
            match pieced.piece_in_memory(self.input.len()) {
                0 => return false,
                length => pieced.give(&*self.export, self.input.split_to(length).freeze()),
            }
        }
        if let Some((request, answer)) = self.pieced.take().map(PiecedWrite::end) {
            self.answered(request, answer);
        }
        true
    }

    /// Receives more of such a WRITE, whose client is in the middle of sending it; 0 at the end of the stream.
    pub(super) fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let received = self.poll_piece_now(cx);
        let (Some(pieced), Poll::Ready(Ok(Came::Pages(count)))) = (&mut self.pieced, &received) else {
            return received.map_ok(|came| came.bytes());
        };
        if let Some(pipe) = &self.intake {
            pieced.give_pages(&*self.export, pipe, *count, &mut self.input)?;
        }
        received.map_ok(|came| came.bytes())
    }

    fn poll_piece_now(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Came>> {
        let Some(pieced) = &mut self.pieced else { return Poll::Ready(Ok(Came::Bytes(0))) };
        if pieced.takes_pages() && self.input.is_empty() {
            if self.intake.is_none() {
                self.intake = Pipe::new().ok();
            }
            if let (Some(pipe), Some(socket)) = (&self.intake, self.stream.socket()) {
                return pieced.poll_pages(pipe, socket, cx).map_ok(Came::Pages);
            }
            pieced.no_pages();
        }
        let wanted = pieced.wanted(self.input.len());
        self.poll_bytes(cx, wanted).map_ok(Came::Bytes)
    }

    /// Receives at most `most` bytes.
    fn poll_bytes(&mut self, cx: &mut Context<'_>, most: usize) -> Poll<io::Result<usize>> {
        self.input.reserve(most);
        poll_read_buf(Pin::new(&mut self.stream), cx, &mut (&mut self.input).limit(most))
    }
}

/// Lets other threads and tasks run, and the runtime see what has happened to their streams, before this one is polled
/// again.
fn yield_to_others(cx: &mut Context<'_>) {
    std::thread::yield_now();
    // It is `Pending` the first time.
    let _ = pin!(tokio::task::yield_now()).poll(cx);
}
