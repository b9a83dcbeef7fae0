//! Long WRITEs, which are given to the export as they come.
//!
//! A sender's socket holds some 200 KiB. Taken whole, a WRITE of a MiB is received in many turns of client and server, and
//! written while the client waits; in pieces, the client fills the socket while the piece before is written, from memory
//! that is still in the processor's cache. From a socket without TLS the pieces go to the file as pages, and are copied
//! once.
//!
//! A WRITE has one answer: the first error of its pieces, after which the rest is thrown away, or success when all have
//! been written. When a piece is answered later, the rest is taken whole.

use std::io;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use futures::future::BoxFuture;

use super::socket::ClientSocket;
use super::splice::Pipe;
use crate::export::{Answer, Export};
use crate::limits::WRITE_PIECE;
use crate::wire::{Errno, Request};

/// A WRITE of which some has come.
pub(super) struct PiecedWrite {
    request: Request,
    /// How many bytes the export has been given, or were thrown away.
    done: u64,
    /// Pieces end at its multiples.
    unit: u64,
    /// Pages are given as pages.
    pages: bool,
    /// How many bytes are in the pipe.
    held: usize,
    first_error: Option<Errno>,
    later: Option<BoxFuture<'static, Result<(), Errno>>>,
}

impl PiecedWrite {
    /// `unit` is a power of two.
    pub(super) fn new(request: Request, unit: u32, pages: bool) -> PiecedWrite {
        PiecedWrite { request, done: 0, unit: u64::from(unit), pages, held: 0, first_error: None, later: None }
    }

    /// How many bytes have not been given yet.
    pub(super) fn left(&self) -> usize {
        (self.request.length - self.done) as usize
    }

    /// Where they go.
    fn offset(&self) -> u64 {
        self.request.offset + self.done
    }

    /// Whether the next bytes, of which none is in memory, may be given as pages.
    pub(super) fn takes_pages(&self) -> bool {
        self.pages && self.is_plain()
    }

    /// Receives more into the pipe; `None`: what was in it fills it.
    pub(super) fn poll_pages(
        &mut self,
        pipe: &Pipe,
        socket: &mut ClientSocket,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<Option<usize>>> {
        match pipe.poll_fill(socket, cx, self.held, self.left() - self.held) {
            // Not every socket can.
            Poll::Ready(Err(error))
                if matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) =>
            {
                self.pages = false;
                Poll::Ready(Ok(None))
            }
            filled => filled,
        }
    }

    /// Gives the export what is in the pipe, when [`PiecedWrite::poll_pages`] has brought so much. What does not go this
    /// way is put into `input`, but for a part of a block, which waits for its rest.
    pub(super) fn give_pages(
        &mut self,
        export: &dyn Export,
        pipe: &Pipe,
        came: Option<usize>,
        input: &mut BytesMut,
    ) -> io::Result<()> {
        self.held += came.unwrap_or(0);
        let length = self.piece(self.held);
        if length > 0 {
            match export.write_pages(self.offset(), length, pipe.out()) {
                Some(answer) => {
                    self.given(length, answer);
                    self.held -= length;
                }
                None => self.pages = false,
            }
        }
        if self.held > 0 && (came.is_none() || !self.takes_pages()) {
            input.unsplit(pipe.take(std::mem::take(&mut self.held))?);
        }
        Ok(())
    }

    /// From now on they are not.
    pub(super) fn no_pages(&mut self) {
        self.pages = false;
    }

    fn is_plain(&self) -> bool {
        self.first_error.is_none() && self.later.is_none()
    }

    /// How many bytes in memory are to come before there is a piece, if `have` have come.
    pub(super) fn wanted(&self, have: usize) -> usize {
        let whole = match (self.is_plain(), self.pages) {
            (true, true) => self.to_boundary(have.max(1)),
            (true, false) => self.to_boundary(WRITE_PIECE),
            (false, _) if self.first_error.is_some() => WRITE_PIECE,
            (false, _) => self.left(),
        };
        whole.min(self.left()).saturating_sub(have)
    }

    /// The first length of at least `length` that ends at a boundary.
    fn to_boundary(&self, length: usize) -> usize {
        ((self.offset() + length as u64).next_multiple_of(self.unit) - self.offset()) as usize
    }

    /// How many of the bytes that have come make a piece; 0: none do.
    fn piece(&self, have: usize) -> usize {
        if have >= self.left() {
            return self.left();
        }
        if self.first_error.is_some() {
            return have;
        }
        if self.later.is_some() {
            return 0;
        }
        let end = self.offset() + have as u64;
        (end - end % self.unit).saturating_sub(self.offset()) as usize
    }

    /// The same for bytes in memory, of which few are not worth a write.
    pub(super) fn piece_in_memory(&self, have: usize) -> usize {
        let piece = self.piece(have);
        let whole = match self.pages {
            true => piece == have,
            false => piece >= WRITE_PIECE,
        };
        if whole || piece == self.left() || !self.is_plain() { piece } else { 0 }
    }

    /// Gives a piece.
    pub(super) fn give(&mut self, export: &dyn Export, piece: Bytes) {
        let (offset, length) = (self.offset(), piece.len());
        let answer = match self.first_error {
            None => export.write(offset, piece, false),
            Some(_) => Answer::Now(Ok(())),
        };
        self.given(length, answer);
    }

    fn given(&mut self, length: usize, answer: Answer<()>) {
        self.done += length as u64;
        match answer {
            Answer::Now(Ok(())) => {}
            Answer::Now(Err(errno)) => self.first_error = self.first_error.or(Some(errno)),
            Answer::Later(later) => {
                self.later = Some(match self.later.take() {
                    None => later,
                    Some(before) => Box::pin(async move { before.await.and(later.await) }),
                });
            }
        }
    }

    /// What came of it, when nothing is left.
    pub(super) fn end(self) -> (Request, Answer<()>) {
        let answer = match (self.first_error, self.later) {
            (Some(errno), _) => Answer::Now(Err(errno)),
            (None, None) => Answer::Now(Ok(())),
            (None, Some(later)) => Answer::Later(later),
        };
        (self.request, answer)
    }
}
