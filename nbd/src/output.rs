//! Bytes on their way to a peer, used by both drivers.
//!
//! One buffer for heads and for data that is made in place, and shared pieces ([`Bytes`]) in between that are sent
//! without a copy. The buffer is kept initialised to its end, so that a reply's data can be made in it as a plain
//! slice without clearing it first.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use tokio::io::AsyncWrite;

use crate::limits::KEPT_BUFFER;

/// Shared pieces up to this size are copied, which costs less than one more slice in the send.
const COPIED: usize = 4096;
/// The buffer grows by multiples of this.
const GROWTH: usize = 16 << 10;
/// Slices given to one vectored send.
const SLICES: usize = 32;

enum Piece {
    /// The next bytes of the buffer.
    Own(usize),
    Shared(Bytes),
    /// Bytes that are not here: the sender knows where.
    Elsewhere(usize),
}

/// A queue of bytes to send.
#[derive(Default)]
pub(crate) struct Output {
    /// Initialised to its end; `start..end` is queued.
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    pieces: VecDeque<Piece>,
    queued: usize,
    elsewhere: usize,
}

impl Output {
    /// Bytes that are queued.
    pub(crate) fn len(&self) -> usize {
        self.queued
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.queued == 0
    }

    /// Room for `length` bytes that are not queued yet; [`Output::commit`] queues them. What stands in it is not
    /// defined.
    pub(crate) fn reserve(&mut self, length: usize) -> &mut [u8] {
        if self.buffer.len() - self.end < length {
            // Moving pays only when little is queued; otherwise the buffer grows.
            if self.start > 0
                && self.end - self.start <= self.start
                && self.buffer.len() - self.end + self.start >= length
            {
                self.buffer.copy_within(self.start..self.end, 0);
                self.end -= self.start;
                self.start = 0;
            } else {
                self.buffer.resize((self.end + length).next_multiple_of(GROWTH), 0);
            }
        }
        &mut self.buffer[self.end..self.end + length]
    }

    /// Queues the first `length` bytes of what was last reserved.
    pub(crate) fn commit(&mut self, length: usize) {
        self.end += length;
        self.queued += length;
        match self.pieces.back_mut() {
            Some(Piece::Own(last)) => *last += length,
            _ if length > 0 => self.pieces.push_back(Piece::Own(length)),
            _ => {}
        }
    }

    /// Queues a copy.
    pub(crate) fn extend(&mut self, bytes: &[u8]) {
        self.reserve(bytes.len()).copy_from_slice(bytes);
        self.commit(bytes.len());
    }

    /// Queues shared bytes, without a copy unless they are few.
    pub(crate) fn push(&mut self, bytes: Bytes) {
        if bytes.len() <= COPIED {
            return self.extend(&bytes);
        }
        self.queued += bytes.len();
        self.pieces.push_back(Piece::Shared(bytes));
    }

    /// Queues bytes that [`Output::poll_send_with`] is to get from elsewhere.
    pub(crate) fn push_elsewhere(&mut self, length: usize) {
        if length > 0 {
            self.pieces.push_back(Piece::Elsewhere(length));
            self.queued += length;
            self.elsewhere += length;
        }
    }

    /// Whether such bytes are queued.
    pub(crate) fn has_elsewhere(&self) -> bool {
        self.elsewhere > 0
    }

    fn slices<'a>(&'a self, slices: &mut [IoSlice<'a>; SLICES]) -> usize {
        let mut at = self.start;
        let mut count = 0;
        for (slot, piece) in slices.iter_mut().zip(&self.pieces) {
            *slot = match piece {
                Piece::Own(length) => {
                    at += length;
                    IoSlice::new(&self.buffer[at - length..at])
                }
                Piece::Shared(bytes) => IoSlice::new(bytes),
                Piece::Elsewhere(_) => break,
            };
            count += 1;
        }
        count
    }

    fn sent(&mut self, mut count: usize) {
        self.queued -= count;
        if self.queued == 0 {
            self.pieces.clear();
            self.elsewhere = 0;
            self.start = 0;
            self.end = 0;
            if self.buffer.len() > KEPT_BUFFER {
                self.buffer = Vec::new();
            }
            return;
        }
        while count > 0 {
            let Some(piece) = self.pieces.front_mut() else { return };
            let (taken, left) = match piece {
                Piece::Own(length) => {
                    let taken = count.min(*length);
                    *length -= taken;
                    self.start += taken;
                    (taken, *length)
                }
                Piece::Shared(bytes) => {
                    let taken = count.min(bytes.len());
                    bytes.advance(taken);
                    (taken, bytes.len())
                }
                Piece::Elsewhere(length) => {
                    let taken = count.min(*length);
                    *length -= taken;
                    self.elsewhere -= taken;
                    (taken, *length)
                }
            };
            count -= taken;
            if left == 0 {
                self.pieces.pop_front();
            }
        }
    }

    /// Sends until nothing is queued (`Ready(Ok)`) or the stream takes no more (`Pending`).
    pub(crate) fn poll_send<S: AsyncWrite + Unpin>(
        &mut self,
        stream: &mut S,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        self.poll_send_with(stream, cx, |_, _, _| Poll::Ready(Err(io::ErrorKind::Unsupported.into())))
    }

    /// The same; `elsewhere` sends up to so many of the bytes that are not here.
    pub(crate) fn poll_send_with<S: AsyncWrite + Unpin>(
        &mut self,
        stream: &mut S,
        cx: &mut Context<'_>,
        elsewhere: impl Fn(&mut S, &mut Context<'_>, usize) -> Poll<io::Result<usize>>,
    ) -> Poll<io::Result<()>> {
        while self.queued > 0 {
            if let Some(Piece::Elsewhere(length)) = self.pieces.front() {
                let sent = ready!(elsewhere(stream, cx, *length))?;
                if sent == 0 {
                    return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
                }
                self.sent(sent);
                continue;
            }
            let mut slices = [IoSlice::new(&[]); SLICES];
            let filled = self.slices(&mut slices);
            let mut stream = Pin::new(&mut *stream);
            let sent = if filled == 1 || !stream.is_write_vectored() {
                ready!(stream.as_mut().poll_write(cx, &slices[0]))?
            } else {
                ready!(stream.as_mut().poll_write_vectored(cx, &slices[..filled]))?
            };
            if sent == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.sent(sent);
        }
        Pin::new(stream).poll_flush(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends everything in pieces of `step` bytes, as a slow peer would take it.
    fn drain(output: &mut Output, step: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while !output.is_empty() {
            let mut slices = [IoSlice::new(&[]); SLICES];
            let filled = output.slices(&mut slices);
            let bytes: Vec<u8> = slices[..filled].iter().flat_map(|slice| slice.iter().copied()).take(step).collect();
            output.sent(bytes.len());
            all.extend(bytes);
        }
        all
    }

    #[test]
    fn own_and_shared_bytes_keep_their_order() {
        for step in [1, 7, 5000, 1 << 20] {
            let mut output = Output::default();
            let mut expected = Vec::new();
            for round in 0..50u8 {
                output.extend(&[round; 28]);
                expected.extend([round; 28]);
                let shared = vec![round + 100; 1 + usize::from(round) * 300];
                expected.extend(&shared);
                output.push(shared.into());
                output.reserve(64)[..3].copy_from_slice(b"abc");
                output.commit(3);
                expected.extend(b"abc");
            }
            assert_eq!(output.len(), expected.len());
            assert!(drain(&mut output, step) == expected, "step {step}");
        }
    }

    #[test]
    fn the_buffer_is_used_again_and_given_back() {
        let mut output = Output::default();
        for _ in 0..1000 {
            output.extend(&[1; 1000]);
            assert_eq!(drain(&mut output, 300).len(), 1000);
        }
        assert!(output.buffer.len() <= 16 << 10, "grew to {}", output.buffer.len());
        output.extend(&vec![1; KEPT_BUFFER + 1]);
        drain(&mut output, usize::MAX);
        assert!(output.buffer.is_empty());
    }

    #[test]
    fn a_queue_that_never_empties_does_not_grow_the_buffer() {
        let mut output = Output::default();
        output.extend(&[0; 8000]);
        for _ in 0..10_000 {
            output.extend(&[1; 1000]);
            output.sent(1000);
        }
        assert_eq!(output.len(), 8000);
        assert!(output.buffer.len() <= 64 << 10, "grew to {}", output.buffer.len());
    }
}
