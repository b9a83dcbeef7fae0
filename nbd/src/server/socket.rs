//! A client's socket, which can do without the runtime's watching it for a while.
//!
//! While a client's next request is looked for again and again (see [`super::patience`]), nobody needs to be told that it
//! has come. But the runtime would be: the request would wake the thread that watches sockets, which costs about as much
//! as looking has saved. So a socket on which that goes well is taken out of the runtime's hands, and given back when the
//! task is to sleep.

use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use nix::sys::socket::MsgFlags;
use socket2::Socket;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// After so many receives in a row that had to look more than once and found something, the socket is not watched.
const UNWATCHED_AFTER: u32 = 4;

/// The socket of a client.
pub(super) struct ClientSocket {
    state: State,
    /// Until when the next receive looks again if there is nothing.
    until: Option<Instant>,
    /// Receives in a row that found something so.
    found: u32,
}

enum State {
    Watched(AsyncFd<Socket>),
    Unwatched(Socket),
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
        Ok(ClientSocket { state: watch(socket.into())?, until: None, found: 0 })
    }

    /// The next receive, if there is nothing to receive, looks again and again until then.
    pub(super) fn wait_until(&mut self, until: Option<Instant>) {
        self.until = until;
    }

    /// Has the runtime watch it, so that a task whose receive is `Pending` after this is woken. `true` if it was not
    /// watched before.
    pub(super) fn watch(&mut self) -> io::Result<bool> {
        let unwatched = matches!(self.state, State::Unwatched(_));
        self.watched().map(|_| unwatched)
    }

    fn watched(&mut self) -> io::Result<&mut AsyncFd<Socket>> {
        if let State::Unwatched(_) = self.state
            && let State::Unwatched(socket) = std::mem::replace(&mut self.state, State::Lost)
        {
            self.state = watch(socket)?;
        }
        match &mut self.state {
            State::Watched(socket) => Ok(socket),
            State::Unwatched(_) | State::Lost => Err(lost()),
        }
    }

    fn unwatch(&mut self) {
        if let State::Watched(_) = self.state
            && let State::Watched(socket) = std::mem::replace(&mut self.state, State::Lost)
        {
            self.state = State::Unwatched(socket.into_inner());
        }
    }

    fn socket(&self) -> io::Result<&Socket> {
        match &self.state {
            State::Watched(socket) => Ok(socket.get_ref()),
            State::Unwatched(socket) => Ok(socket),
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
        if let State::Unwatched(socket) = &self.state {
            match send(socket.as_fd()) {
                Err(error) if has_to_wait(&error) => {}
                sent => return Poll::Ready(sent),
            }
        }
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

    /// Receives what is there when the runtime knows of something.
    fn poll_watched(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let socket = self.watched()?;
        loop {
            let mut ready = ready!(socket.poll_read_ready(cx))?;
            match receive(ready.get_inner(), buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                received => {
                    // It was all that was there; at the end of the stream the runtime keeps it ready all the same.
                    if buffer.remaining() > 0 {
                        ready.clear_ready();
                    }
                    return Poll::Ready(received);
                }
            }
        }
    }

    /// Looks again and again until then, and lets other threads run in between, which may take it longer.
    fn look_until(&self, until: Instant, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let socket = self.socket()?;
        loop {
            match receive(socket, buffer) {
                Err(error) if has_to_wait(&error) => {}
                received => return Poll::Ready(received),
            }
            if Instant::now() >= until {
                return Poll::Pending;
            }
            std::thread::yield_now();
        }
    }
}

fn has_to_wait(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
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
    /// Where the socket is not watched, `Pending` does not mean that the task is woken: see [`ClientSocket::watch`].
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let until = self.until.take();
        let watched = matches!(self.state, State::Watched(_));
        if watched && let Poll::Ready(received) = self.poll_watched(cx, buffer) {
            return Poll::Ready(received);
        }
        let until = match until {
            Some(until) => until,
            None if watched => return Poll::Pending,
            None => Instant::now(),
        };
        let received = self.look_until(until, buffer);
        self.found = if received.is_ready() { self.found.saturating_add(1) } else { 0 };
        if self.found >= UNWATCHED_AFTER {
            self.unwatch();
        }
        received
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
