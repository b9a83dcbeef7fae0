//! Large reads without a copy: pages go from the export's file through a pipe to the socket (splice(2)).
//!
//! The pages are in the pipe before the reply's head is queued, so a read that fails is still answered as an error. One
//! reply at a time: the pipe is empty when the next one is put in. Who overlaps a read with a write of the same bytes
//! may see either, as with any disk; with pages in the socket that includes a write that is answered before the reply
//! has been received.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::task::{Context, Poll, ready};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::unistd::pipe2;
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, Interest};
use tokio::net::{TcpStream, UnixStream};

use crate::limits::{SPLICE_PIPE, SPLICE_PIPE_SMALL};
use crate::tls::{ClientStream, MaybeTls, ServerStream};

/// A byte stream to the other side. A type of your own needs no more than `impl Transport for It {}`.
pub trait Transport: AsyncRead + AsyncWrite + Unpin + Send {
    /// The socket, if what is written to the stream goes there as it is, and what is read comes from there as it is.
    fn socket(&self) -> Option<Socket<'_>> {
        None
    }
}

/// A socket that takes pages and gives them.
pub enum Socket<'a> {
    /// Of the Unix domain.
    Unix(&'a UnixStream),
    /// Of the internet domain.
    Tcp(&'a TcpStream),
}

impl Transport for UnixStream {
    fn socket(&self) -> Option<Socket<'_>> {
        Some(Socket::Unix(self))
    }
}

impl Transport for TcpStream {
    fn socket(&self) -> Option<Socket<'_>> {
        Some(Socket::Tcp(self))
    }
}

impl Transport for DuplexStream {}

impl<T: Transport + ?Sized> Transport for Box<T> {
    fn socket(&self) -> Option<Socket<'_>> {
        (**self).socket()
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Transport for ServerStream<S> {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send> Transport for ClientStream<S> {}

impl<S: Transport> Transport for MaybeTls<S> {
    fn socket(&self) -> Option<Socket<'_>> {
        match self {
            MaybeTls::Plain(stream) => stream.socket(),
            MaybeTls::Client(_) | MaybeTls::Server(_) => None,
        }
    }
}

impl Socket<'_> {
    fn poll_write_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Socket::Unix(stream) => stream.poll_write_ready(cx),
            Socket::Tcp(stream) => stream.poll_write_ready(cx),
        }
    }

    fn poll_read_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Socket::Unix(stream) => stream.poll_read_ready(cx),
            Socket::Tcp(stream) => stream.poll_read_ready(cx),
        }
    }

    fn splice_to(&self, pipe: BorrowedFd<'_>, length: usize) -> io::Result<usize> {
        let splice = |socket: BorrowedFd<'_>| {
            let flags = SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE;
            splice(socket, None, pipe, None, length, flags).map_err(io::Error::from)
        };
        match self {
            Socket::Unix(stream) => stream.try_io(Interest::READABLE, || splice(stream.as_fd())),
            Socket::Tcp(stream) => stream.try_io(Interest::READABLE, || splice(stream.as_fd())),
        }
    }

    fn splice_from(&self, pipe: BorrowedFd<'_>, length: usize) -> io::Result<usize> {
        let splice = |socket: BorrowedFd<'_>| {
            let flags = SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE;
            splice(pipe, None, socket, None, length, flags).map_err(io::Error::from)
        };
        match self {
            Socket::Unix(stream) => stream.try_io(Interest::WRITABLE, || splice(stream.as_fd())),
            Socket::Tcp(stream) => stream.try_io(Interest::WRITABLE, || splice(stream.as_fd())),
        }
    }
}

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

    /// Moves up to `length` bytes from the socket into it, which must be empty; 0 at the end of the stream.
    pub(crate) fn poll_receive(
        &self,
        socket: &Socket<'_>,
        cx: &mut Context<'_>,
        length: usize,
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(socket.poll_read_ready(cx))?;
            match socket.splice_to(self.write.as_fd(), length.min(self.capacity)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.raw_os_error() == Some(Errno::EINTR as i32) => {}
                moved => return Poll::Ready(moved),
            }
        }
    }

    /// Moves up to `length` bytes that are in it to the socket.
    pub(super) fn poll_send(
        &self,
        socket: &Socket<'_>,
        cx: &mut Context<'_>,
        length: usize,
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(socket.poll_write_ready(cx))?;
            match socket.splice_from(self.read.as_fd(), length) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.raw_os_error() == Some(Errno::EINTR as i32) => {}
                moved => return Poll::Ready(moved),
            }
        }
    }
}
