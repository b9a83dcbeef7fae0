//! Sans-I/O sessions: bytes in, decisions and bytes out. No runtime, no socket, no clock.
//!
//! - [`server`]: the handshake of a server, its transmission decoder, the check of requests, and its replies.
//! - [`client`]: the negotiation of a client, and the session that matches replies to requests.

pub mod client;
pub mod server;
