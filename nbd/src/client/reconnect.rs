//! A connection that is made anew when it is lost.
//!
//! What was sent and not answered is sent again on the new connection, in the order in which it was asked for; what is
//! asked for meanwhile waits. All of NBD's commands can be repeated without harm: a repeated write writes the same bytes,
//! with FUA where it was asked for. Two things remain to the caller:
//!
//! - Requests in flight have no order among each other, before or after a loss: a write that was sent again may take
//!   effect after one that was asked for later. Overlapping writes have to wait for each other, as on any connection.
//! - A server that dies may lose writes that it has answered and that were not flushed, as a disk does when the power
//!   fails. A flush after the loss succeeds and says nothing about them. Who needs them writes with FUA, or serves from a
//!   server that keeps them.

use std::time::Duration;

use futures::future::BoxFuture;
use tokio::time::sleep;

use super::ClientError;
use crate::limits::{RECONNECT_FIRST_PAUSE, RECONNECT_LONGEST_PAUSE};
use crate::proto::client::Negotiated;

/// How a lost connection is made anew, see [`super::ConnectOptions::reconnect`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reconnect {
    /// Pause before the first attempt; doubled with each failure.
    pub first_pause: Duration,
    /// The longest pause.
    pub longest_pause: Duration,
    /// For how long to try; without an end if `None`. Then all requests fail.
    pub give_up_after: Option<Duration>,
}

impl Default for Reconnect {
    fn default() -> Reconnect {
        Reconnect { first_pause: RECONNECT_FIRST_PAUSE, longest_pause: RECONNECT_LONGEST_PAUSE, give_up_after: None }
    }
}

/// Makes a connection and enters transmission.
pub(super) type Dial<S> = Box<dyn FnMut() -> BoxFuture<'static, Result<(S, Negotiated), ClientError>> + Send>;

/// Makes the connection of one client again and again.
pub(super) struct Redial<S> {
    pub(super) dial: Dial<S>,
    pub(super) policy: Reconnect,
    /// What was negotiated at first, and has to be negotiated again.
    pub(super) first: Negotiated,
}

/// Why there is no new connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum Lost {
    #[error("{error}; no new connection within {} s", .time.as_secs_f32())]
    GivenUp { error: ClientError, time: Duration },
    #[error("the server came back with another export than before: {0} differs")]
    Another(&'static str),
}

impl<S> Redial<S> {
    /// Dials until there is a connection to the same export.
    pub(super) async fn connect(&mut self) -> Result<(S, Negotiated), Lost> {
        let mut pause = self.policy.first_pause;
        let begun = tokio::time::Instant::now();
        loop {
            sleep(pause).await;
            match (self.dial)().await {
                Ok((stream, negotiated)) => {
                    return match difference(&self.first, &negotiated) {
                        None => Ok((stream, negotiated)),
                        Some(what) => Err(Lost::Another(what)),
                    };
                }
                Err(error) => {
                    if let Some(time) = self.policy.give_up_after.filter(|time| begun.elapsed() >= *time) {
                        return Err(Lost::GivenUp { error, time });
                    }
                    tracing::debug!(%error, "the server cannot be reached again yet");
                }
            }
            pause = (pause * 2).min(self.policy.longest_pause);
        }
    }
}

/// What of the negotiation is not as it was, of what requests depend on.
fn difference(old: &Negotiated, new: &Negotiated) -> Option<&'static str> {
    let blocks =
        |negotiated: &Negotiated| (negotiated.minimum_block, negotiated.preferred_block, negotiated.maximum_block);
    let same_contexts = old.contexts.len() == new.contexts.len()
        && old.contexts.iter().all(|known| new.contexts.iter().any(|context| context.name == known.name));
    [
        (old.size == new.size, "its size"),
        (old.flags == new.flags, "what it can do"),
        (blocks(old) == blocks(new), "its block sizes"),
        (old.framing == new.framing, "the form of its replies"),
        (same_contexts, "its meta contexts"),
    ]
    .into_iter()
    .find_map(|(same, what)| (!same).then_some(what))
}
