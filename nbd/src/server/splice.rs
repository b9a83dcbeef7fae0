//! Large reads without a copy: pages go from the export's file through a pipe to the socket (splice(2)).
//!
//! The pages are in the pipe before the reply's head is queued, so a read that fails is still answered as an error. One
//! reply at a time: the pipe is empty when the next one is put in. Who overlaps a read with a write of the same bytes
//! may see either, as with any disk; with pages in the socket that includes a write that is answered before the reply
//! has been received.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::task::{Context, Poll, ready};

use bytes::BytesMut;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::unistd::pipe2;

use super::socket::ClientSocket;
use crate::limits::{SPLICE_PIPE, SPLICE_PIPE_SMALL};
use crate::transport::Socket;

/// Where pages wait for the socket.
pub(crate) struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    capacity: usize,
}

impl Pipe {
    pub(crate) fn new() -> io::Result<Pipe> {
        let (read, write) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC)?;
        let sized = |size| fcntl(&write, FcntlArg::F_SETPIPE_SZ(size));
        // Beyond the system's limit only with the privilege.
        let capacity = match sized(SPLICE_PIPE).or_else(|_| sized(SPLICE_PIPE_SMALL)) {
            Ok(capacity) => capacity,
            Err(_) => fcntl(&write, FcntlArg::F_GETPIPE_SZ)?,
        };
        Ok(Pipe { read, write, capacity: capacity as usize })
    }

    /// Whether a range fits in, whatever pages it touches.
    pub(super) fn holds(&self, offset: u64, length: usize) -> bool {
        const PAGE: u64 = 4096;
        let head = (offset % PAGE) as usize;
        (head + length).next_multiple_of(PAGE as usize) <= self.capacity
    }

    /// Where pages go in.
    pub(super) fn end(&self) -> BorrowedFd<'_> {
        self.write.as_fd()
    }

    /// Where they come out.
    pub(crate) fn out(&self) -> BorrowedFd<'_> {
        self.read.as_fd()
    }

    /// Moves up to `length` bytes from a socket into it, which must be empty; 0 at the end of the stream.
    pub(crate) fn poll_receive(
        &self,
        socket: &Socket<'_>,
        cx: &mut Context<'_>,
        length: usize,
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(socket.poll_read_ready(cx))?;
            match socket.splice_to(self.write.as_fd(), length.min(self.capacity)) {
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                moved => return Poll::Ready(moved),
            }
        }
    }

    /// Moves up to `length` bytes that a client has sent into it, which holds `held` bytes. `Some(0)`: the end of the
    /// stream; `None`: something has come, and there is no room, for what is held fills it in many small parts.
    pub(super) fn poll_fill(
        &self,
        socket: &mut ClientSocket,
        cx: &mut Context<'_>,
        held: usize,
        length: usize,
    ) -> Poll<io::Result<Option<usize>>> {
        let flags = SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE;
        let length = length.min(self.capacity);
        let mut moved = None;
        let received = socket.poll_receive_with(cx, |socket| {
            match splice(socket, None, &self.write, None, length, flags) {
                Ok(count) => moved = Some(count),
                // Either of the two was not ready.
                Err(Errno::EAGAIN) if held > 0 => drop(socket.peek(&mut [MaybeUninit::uninit()])?),
                Err(errno) => return Err(errno.into()),
            }
            // Room for no more looks as if no more had come.
            Ok(false)
        });
        received.map_ok(|()| moved)
    }

    /// Takes `length` bytes out of it, which are in it.
    pub(super) fn take(&self, length: usize) -> io::Result<BytesMut> {
        let mut bytes = BytesMut::zeroed(length);
        let mut at = 0;
        while at < length {
            match nix::unistd::read(&self.read, &mut bytes[at..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => at += count,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(bytes)
    }

    /// Moves up to `length` bytes that are in it to the socket.
    pub(super) fn poll_send(
        &self,
        socket: &mut ClientSocket,
        cx: &mut Context<'_>,
        length: usize,
    ) -> Poll<io::Result<usize>> {
        let flags = SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE;
        // Less than was asked for does not mean that the socket is full.
        socket.poll_send_with(cx, 0, |socket| {
            splice(&self.read, None, socket, None, length, flags).map_err(io::Error::from)
        })
    }
}
