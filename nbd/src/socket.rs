//! Socket options for NBD connections.

use std::os::fd::AsFd;

use nix::sys::socket::{setsockopt, sockopt};

use crate::limits::{SOCKET_SEND_BUFFER, TCP_KEEPALIVE, TCP_USER_TIMEOUT};

/// A large send buffer: the default of a Unix socket stalls both ends on large replies. Where the privilege to go
/// beyond the system's limit is missing, the limit has to do.
pub fn tune_unix(socket: &impl AsFd) {
    let result = setsockopt(socket, sockopt::SndBufForce, &SOCKET_SEND_BUFFER)
        .or_else(|_| setsockopt(socket, sockopt::SndBuf, &SOCKET_SEND_BUFFER));
    if let Err(error) = result {
        tracing::debug!(%error, "the send buffer of a Unix socket stays as it is");
    }
}

/// No delay of small segments, and a dead peer is noticed within seconds, not minutes.
pub fn tune_tcp(socket: &impl AsFd) {
    let seconds = TCP_KEEPALIVE.as_secs() as u32;
    let result = setsockopt(socket, sockopt::TcpNoDelay, &true)
        .and_then(|()| setsockopt(socket, sockopt::KeepAlive, &true))
        .and_then(|()| setsockopt(socket, sockopt::TcpKeepIdle, &seconds))
        .and_then(|()| setsockopt(socket, sockopt::TcpKeepInterval, &seconds))
        .and_then(|()| setsockopt(socket, sockopt::TcpUserTimeout, &(TCP_USER_TIMEOUT.as_millis() as u32)));
    if let Err(error) = result {
        tracing::debug!(%error, "a TCP connection keeps the system's defaults");
    }
}
