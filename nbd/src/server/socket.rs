//! A client's socket, which may be taken from one runtime to another.
//!
//! The one where it was accepted watches it through the handshake; then it goes to that of its export, if that has one of
//! its own.

use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use nix::sys::socket::MsgFlags;
use socket2::Socket;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The socket of a client.
pub(super) struct ClientSocket(State);

enum State {
    Watched(AsyncFd<Socket>),
    /// Between two runtimes.
    Free(Socket),
    /// It could not be watched again.
    Lost,
}

#[allow(unsafe_code)]
fn watch(socket: Socket) -> io::Result<State> {
    // SAFETY: the socket owns its descriptor and gives out the same one as long as it lives.
    Ok(State::Watched(unsafe { AsyncFd::register(socket) }?))
}

fn lost() -> io::Error {
    io::Error::other("the socket could not be watched")
}

impl ClientSocket {
    /// From a socket that does not block.
    pub(super) fn new(socket: impl Into<Socket>) -> io::Result<ClientSocket> {
        Ok(ClientSocket(watch(socket.into())?))
    }

    /// Takes it out of the runtime's hands. That of the task that uses it next has it then.
    pub(super) fn let_go(&mut self) {
        self.0 = match std::mem::replace(&mut self.0, State::Lost) {
            State::Watched(socket) => State::Free(socket.into_inner()),
            other => other,
        };
    }

    fn watched(&mut self) -> io::Result<&mut AsyncFd<Socket>> {
        if let State::Free(_) = self.0
            && let State::Free(socket) = std::mem::replace(&mut self.0, State::Lost)
        {
            self.0 = watch(socket)?;
        }
        match &mut self.0 {
            State::Watched(socket) => Ok(socket),
            State::Free(_) | State::Lost => Err(lost()),
        }
    }

    fn socket(&self) -> io::Result<&Socket> {
        match &self.0 {
            State::Watched(socket) => Ok(socket.get_ref()),
            State::Free(socket) => Ok(socket),
            State::Lost => Err(lost()),
        }
    }

    /// Sends with `send` when the socket takes some. Where fewer than `length` bytes are sent, it is full.
    pub(super) fn poll_send_with(
        &mut self,
        cx: &mut Context<'_>,
        length: usize,
        mut send: impl FnMut(BorrowedFd<'_>) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        let socket = self.watched()?;
        loop {
            let mut ready = ready!(socket.poll_write_ready(cx))?;
            match send(ready.get_inner().as_fd()) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                sent => {
                    // What it did not take, it does not take now.
                    if matches!(sent, Ok(sent) if 0 < sent && sent < length) {
                        ready.clear_ready();
                    }
                    return Poll::Ready(sent);
                }
            }
        }
    }

    /// Receives with `receive`, which says whether it has left nothing.
    pub(super) fn poll_receive_with(
        &mut self,
        cx: &mut Context<'_>,
        mut receive: impl FnMut(&Socket) -> io::Result<bool>,
    ) -> Poll<io::Result<()>> {
        let socket = self.watched()?;
        loop {
            let mut ready = ready!(socket.poll_read_ready(cx))?;
            match receive(ready.get_inner()) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                Err(error) => return Poll::Ready(Err(error)),
                Ok(all) => {
                    // At the end of the stream the runtime keeps it ready all the same.
                    if all {
                        ready.clear_ready();
                    }
                    return Poll::Ready(Ok(()));
                }
            }
        }
    }
}

/// Receives what is there; nothing is the end of the stream.
#[allow(unsafe_code)]
fn receive(socket: &Socket, buffer: &mut ReadBuf<'_>) -> io::Result<()> {
    // SAFETY: the memory is only written to, and only what has been written counts as initialised.
    unsafe {
        let count = socket.recv(buffer.unfilled_mut())?;
        buffer.assume_init(count);
        buffer.advance(count);
    }
    Ok(())
}

impl AsyncRead for ClientSocket {
    /// See [`ClientSocket::poll_receive_with`].
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.poll_receive_with(cx, |socket| {
            receive(socket, buffer)?;
            Ok(buffer.remaining() > 0)
        })
    }
}

impl AsyncWrite for ClientSocket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored_or(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored_or(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.socket()?.shutdown(Shutdown::Write) {
            Err(error) if error.kind() != io::ErrorKind::NotConnected => Poll::Ready(Err(error)),
            _ => Poll::Ready(Ok(())),
        }
    }
}

impl ClientSocket {
    fn poll_write_vectored_or(&mut self, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let length = slices.iter().map(|slice| slice.len()).sum();
        let flags = MsgFlags::MSG_NOSIGNAL.bits();
        self.poll_send_with(cx, length, |fd| {
            let socket = socket2::SockRef::from(&fd);
            match slices {
                [one] => socket.send_with_flags(one, flags),
                _ => socket.send_vectored_with_flags(slices, flags),
            }
        })
    }
}
