//! The byte streams that a client works on.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::task::{Context, Poll};

use nix::fcntl::{SpliceFFlags, splice};
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, Interest};
use tokio::net::{TcpStream, UnixStream};
use tokio_util::either::Either;

use crate::tls::{ClientStream, MaybeTls, ServerStream};

/// A byte stream to the other side. A type of your own needs no more than `impl Transport for It {}`.
pub trait Transport: AsyncRead + AsyncWrite + Unpin + Send {
    /// The socket, if what is read from the stream comes from there as it is.
    fn socket(&self) -> Option<Socket<'_>> {
        None
    }
}

/// A socket that gives pages.
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

impl<L: Transport, R: Transport> Transport for Either<L, R> {
    fn socket(&self) -> Option<Socket<'_>> {
        match self {
            Either::Left(stream) => stream.socket(),
            Either::Right(stream) => stream.socket(),
        }
    }
}

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
    pub(crate) fn poll_read_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Socket::Unix(stream) => stream.poll_read_ready(cx),
            Socket::Tcp(stream) => stream.poll_read_ready(cx),
        }
    }

    /// Moves up to `length` bytes that have come into a pipe.
    pub(crate) fn splice_to(&self, pipe: BorrowedFd<'_>, length: usize) -> io::Result<usize> {
        let splice = |socket: BorrowedFd<'_>| {
            let flags = SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE;
            splice(socket, None, pipe, None, length, flags).map_err(io::Error::from)
        };
        match self {
            Socket::Unix(stream) => stream.try_io(Interest::READABLE, || splice(stream.as_fd())),
            Socket::Tcp(stream) => stream.try_io(Interest::READABLE, || splice(stream.as_fd())),
        }
    }
}
