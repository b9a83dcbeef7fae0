//! Reads whose content goes where it belongs as it comes, without being put together in memory first.
//!
//! From a plain socket whole pages go through a pipe (splice(2)): they are copied once, by the kernel, into the file. From
//! any other stream, and around the ends, content is received into one buffer that is used again and again.

use std::io;
use std::os::fd::BorrowedFd;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};

use super::driver::Waiter;
use crate::limits::{STREAM_PIECE, STREAM_SPLICE_MIN};
use crate::proto::client::Session;
use crate::server::splice::Pipe;
use crate::transport::Transport;

/// Takes the content of a read ([`super::Client::read_to`]), on the connection's own task, which it must not hold up.
/// Pieces come once each and together are the whole range, in any order; none of them, or some, if the read fails.
/// Offsets are in the export, in bytes.
pub trait Sink: Send {
    /// Some content.
    fn bytes(&mut self, offset: u64, bytes: &[u8]);

    /// Content that is zeroes, `length` bytes of them.
    fn zeroes(&mut self, offset: u64, length: u32);

    /// Whether [`Sink::pages`] may be called.
    fn takes_pages(&self) -> bool {
        false
    }

    /// Content that is in a pipe: exactly `length` bytes have to be taken out of it.
    fn pages(&mut self, _offset: u64, _pipe: BorrowedFd<'_>, _length: u32) {}
}

/// Gives what is at hand of a reply's content to its sink. `true` when the content has to be taken from the stream.
pub(super) fn take_from(session: &mut Session<Waiter>, input: &mut BytesMut) -> bool {
    while let Some(payload) = session.payload() {
        let there = if payload.zeroes { payload.length } else { payload.length.min(input.len() as u32) };
        if there == 0 {
            return true;
        }
        if let Some(sink) = payload.token.sink() {
            match payload.zeroes {
                true => sink.zeroes(payload.offset, there),
                false => sink.bytes(payload.offset, &input[..there as usize]),
            }
        }
        if !payload.zeroes {
            input.advance(there as usize);
        }
        session.taken(there);
    }
    false
}

/// How many bytes to receive into memory next, at most: content beyond the buffer is left on a stream that has pages.
pub(super) fn receive_limit(session: &mut Session<Waiter>, buffered: usize, pages: bool) -> usize {
    if !session.has_streams() {
        return usize::MAX;
    }
    match session.payload() {
        Some(payload) if pages => payload.length as usize,
        // The next head with it.
        Some(payload) => (payload.length as usize).min(STREAM_PIECE) + session.wanted(),
        None if pages => session.wanted().saturating_sub(buffered).max(1),
        None => STREAM_PIECE,
    }
}

/// The pipe of a connection, made when it is needed.
#[derive(Default)]
pub(super) struct Pages {
    pipe: Option<Pipe>,
    /// It cannot be had, or the socket has no pages to give.
    never: bool,
}

impl Pages {
    /// Whether content could come as pages.
    pub(super) fn possible<S: Transport>(&self, stream: &S) -> bool {
        !self.never && stream.socket().is_some()
    }

    /// Moves some of the content that comes now to its sink. `Ready(Some(0))`: the stream is at its end. `None`: it is to
    /// be received into memory.
    pub(super) fn poll_move<S: Transport>(
        &mut self,
        stream: &S,
        session: &mut Session<Waiter>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<Option<usize>>> {
        let socket = stream.socket().filter(|_| !self.never);
        let (Some(socket), Some(payload)) = (socket, session.payload()) else { return Poll::Ready(Ok(None)) };
        let Some(sink) = payload.token.sink().filter(|sink| sink.takes_pages()) else { return Poll::Ready(Ok(None)) };
        if payload.length < STREAM_SPLICE_MIN {
            return Poll::Ready(Ok(None));
        }
        if self.pipe.is_none() {
            self.pipe = Pipe::new().ok();
        }
        let Some(pipe) = &self.pipe else {
            self.never = true;
            return Poll::Ready(Ok(None));
        };
        match ready!(pipe.poll_receive(&socket, cx, payload.length as usize)) {
            Ok(moved) => {
                if moved > 0 {
                    sink.pages(payload.offset, pipe.out(), moved as u32);
                    session.taken(moved as u32);
                }
                Poll::Ready(Ok(Some(moved)))
            }
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                self.never = true;
                Poll::Ready(Ok(None))
            }
            Err(error) => Poll::Ready(Err(error)),
        }
    }
}
