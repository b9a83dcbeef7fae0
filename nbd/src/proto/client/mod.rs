//! The client's side of the protocol.
//!
//! [`Negotiation`] goes from the greeting to the transmission phase (or to a list of exports); then [`Session`] turns
//! operations into requests and replies into completions. Both take a hostile server for granted: whatever it sends is
//! checked against what was asked, and nothing grows without bound.

pub mod assemble;
pub mod negotiation;
pub mod operation;
pub mod session;

pub use negotiation::{Goal, Negotiated, Negotiation, NegotiationError, Outcome, Plan};
pub use operation::Operation;
pub use session::{Completion, ContextExtents, Payload, ProtocolError, Refusal, Reply, Session};
