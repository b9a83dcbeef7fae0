//! Large reads without a copy: pages go from the export's file through a pipe to the socket (splice(2)).
//!
//! The pages are in the pipe before the reply's head is queued, so a read that fails is still answered as an error. One
//! reply at a time: the pipe is empty when the next one is put in. Who overlaps a read with a write of the same bytes
//! may see either, as with any disk; with pages in the socket that includes a write that is answered before the reply
//! has been received.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::unistd::pipe2;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

use crate::limits::{SPLICE_PIPE, SPLICE_PIPE_SMALL};
use crate::tls::MaybeTls;

/// A client's stream.
pub(super) trait Transport: AsyncRead + AsyncWrite + Unpin + Send {
    /// The socket, if what is written goes there as it is.
    fn socket(&self) -> Option<Socket<'_>> {
        None
    }
}

/// Any stream, of which no more is known.
pub(super) struct Opaque<S>(pub(super) S);

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Transport for Opaque<S> {}

impl<S: AsyncRead + Unpin> AsyncRead for Opaque<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Opaque<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// A socket that takes pages.
pub(super) enum Socket<'a> {
    Unix(&'a UnixStream),
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

impl Transport for Box<dyn Transport> {
    fn socket(&self) -> Option<Socket<'_>> {
        (**self).socket()
    }
}

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
pub(super) struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    capacity: usize,
}

impl Pipe {
    pub(super) fn new() -> io::Result<Pipe> {
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
