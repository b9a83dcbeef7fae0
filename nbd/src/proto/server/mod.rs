//! The server's side of the protocol.
//!
//! [`Handshake`] takes a client from the greeting to an export; then [`Requests`] cuts the stream into requests,
//! [`check()`] says which of them an export may see, and [`reply`] writes the answers.

pub mod check;
pub mod handshake;
pub mod reply;
pub mod requests;

pub use check::{Rules, check};
pub use handshake::{Entered, Handshake, HandshakeError, Step, TlsMode};
pub use requests::{Incoming, Requests};
