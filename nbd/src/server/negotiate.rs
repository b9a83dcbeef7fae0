//! The handshake of one client: drives the session over the stream, and makes the stream an encrypted one when the
//! client begins TLS.
//!
//! A TLS handshake is a part of it, so that its time limit and its place among the half-open clients hold for both.

use std::sync::Arc;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_util::sync::CancellationToken;

use super::{ServerError, TlsPolicy};
use crate::export::Exports;
use crate::proto::server::{Entered, Handshake, Step};
use crate::tls::{Identity, MaybeTls};

/// A client after its handshake.
pub(super) struct Client<S, A> {
    pub(super) stream: MaybeTls<S>,
    /// What it has sent since.
    pub(super) input: BytesMut,
    /// What it entered and what it was admitted with; `None` when it left.
    pub(super) entered: Option<(Entered, A)>,
}

/// Takes a client through the handshake. After `shutdown`, its options are refused.
pub(super) async fn negotiate<S, A>(
    stream: S,
    exports: Arc<dyn Exports>,
    tls: &TlsPolicy,
    shutdown: &CancellationToken,
    admission: A,
) -> Result<Client<S, A::Output>, ServerError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
    A: Future,
{
    let (mut input, mut out) = (BytesMut::new(), BytesMut::new());
    let mut handshake = Handshake::new(&mut out).with_tls(tls.mode());
    let mut stream = stream;
    let step = advance(&mut stream, &mut handshake, exports.as_ref(), &mut input, &mut out, shutdown).await?;
    let (mut stream, step) = match (step, tls.server()) {
        (Some(Step::StartTls), Some(server)) => {
            // Nothing is left of the time before: the session refuses to go on if there is any input.
            let stream = server.accept(stream).await?;
            handshake.tls_started();
            let client = Identity::of_client(&stream);
            tracing::debug!(names = ?client.names(), "a client has begun TLS");
            let seen = exports.seen_by(&client).unwrap_or(exports);
            let mut stream = MaybeTls::Server(Box::new(stream));
            let step = advance(&mut stream, &mut handshake, seen.as_ref(), &mut input, &mut out, shutdown).await?;
            (stream, step)
        }
        (step, _) => (MaybeTls::Plain(stream), step),
    };
    let entered = match step {
        Some(Step::Enter(entered)) => {
            let admitted = admission.await;
            stream.write_all_buf(&mut out).await?;
            stream.flush().await?;
            Some((entered, admitted))
        }
        _ => {
            // A client that leaves need not wait for the answer.
            let _ = stream.write_all_buf(&mut out).await;
            None
        }
    };
    Ok(Client { stream, input, entered })
}

/// Answers options until one changes what comes next; `None` when the client hung up. The answer to an option that
/// enters transmission stays in `out`.
async fn advance<S>(
    stream: &mut S,
    handshake: &mut Handshake,
    exports: &dyn Exports,
    input: &mut BytesMut,
    out: &mut BytesMut,
    shutdown: &CancellationToken,
) -> Result<Option<Step>, ServerError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    loop {
        if !out.is_empty() {
            stream.write_all_buf(out).await?;
            stream.flush().await?;
        }
        if shutdown.is_cancelled() {
            handshake.shut_down();
        }
        match handshake.advance(input, exports, out)? {
            Step::NeedMore => {
                let received = tokio::select! {
                    received = stream.read_buf(input) => received?,
                    // Once is enough: what comes after it is refused.
                    () = shutdown.cancelled(), if !handshake.is_shutting_down() => continue,
                };
                if received == 0 {
                    return Ok(None);
                }
            }
            Step::Answered => {}
            Step::StartTls => {
                stream.write_all_buf(out).await?;
                stream.flush().await?;
                return Ok(Some(Step::StartTls));
            }
            step @ (Step::Enter(_) | Step::Aborted) => return Ok(Some(step)),
        }
    }
}
