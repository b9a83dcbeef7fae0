//! What a connection asks of its client's stream.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::socket::ClientSocket;
use crate::tls::MaybeTls;

/// A client's stream.
pub(super) trait ClientEnd: AsyncRead + AsyncWrite + Unpin + Send + 'static {
    /// The socket, if what is written goes there as it is.
    fn socket(&mut self) -> Option<&mut ClientSocket> {
        None
    }

    /// Lets the runtime go that tells when there is something to receive, if it can: another one may have it then, which is
    /// the one where it is polled next.
    fn let_go(&mut self) -> bool {
        false
    }
}

/// Any stream, of which no more is known.
pub(super) struct Opaque<S>(pub(super) S);

impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> ClientEnd for Opaque<S> {}

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

impl ClientEnd for ClientSocket {
    fn socket(&mut self) -> Option<&mut ClientSocket> {
        Some(self)
    }

    fn let_go(&mut self) -> bool {
        ClientSocket::let_go(self);
        true
    }
}

impl<S: ClientEnd> ClientEnd for MaybeTls<S> {
    fn socket(&mut self) -> Option<&mut ClientSocket> {
        match self {
            MaybeTls::Plain(stream) => stream.socket(),
            MaybeTls::Client(_) | MaybeTls::Server(_) => None,
        }
    }

    fn let_go(&mut self) -> bool {
        match self {
            MaybeTls::Plain(stream) => stream.let_go(),
            MaybeTls::Client(stream) => stream.get_mut().0.get_mut().let_go(),
            MaybeTls::Server(stream) => stream.get_mut().0.get_mut().let_go(),
        }
    }
}
