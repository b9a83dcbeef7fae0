//! A lane executes flights over one connection at a time, and gets itself a new one when it is lost.
//!
//! One task a lane: it sends as many flights as the queue lets it, lands the replies itself (the store's writes go to
//! the page cache), and never gives up: while the upstream is away its flights wait in the queue.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::fetcher::{Fetcher, Next};
use super::links::{Link, Links};
use super::queue::{Cargo, Outgoing};
use crate::limits::{REPLY_TIMEOUT, RETRY_MAX, RETRY_MIN};
use crate::upstream::{LinkState, ReadError};

pub(crate) use super::fetcher::LaneKind;

/// Runs until it is cancelled. Begins with `first` where there is a connection already.
pub(crate) async fn run(
    fetcher: Arc<Fetcher>,
    links: Arc<Links>,
    lane: LaneKind,
    first: Option<Link>,
    cancel: CancellationToken,
) {
    let mut first = first;
    let mut pause = RETRY_MIN;
    loop {
        let link = match first.take() {
            Some(link) => link,
            None => {
                let dialled = tokio::select! {
                    () = cancel.cancelled() => return,
                    dialled = links.dial(lane) => dialled,
                };
                match dialled {
                    Ok(link) => link,
                    Err(error) => {
                        let at_least = links.failed(lane, &error);
                        tracing::debug!("{error}; trying again");
                        if wait(pause.max(at_least), &cancel).await {
                            return;
                        }
                        pause = (pause * 2).min(RETRY_MAX);
                        continue;
                    }
                }
            }
        };
        let ended = carry(&fetcher, &links, &link, lane, &cancel).await;
        if !link.shared {
            link.connection.close();
        }
        match ended {
            Ended::Cancelled => return,
            Ended::Lost { why, useful } => {
                if lane == LaneKind::Demand {
                    tracing::warn!("{why}; readers of missing blocks wait until it is back");
                    links.retire(&why);
                }
                pause = if useful { RETRY_MIN } else { (pause * 2).min(RETRY_MAX) };
                if wait(pause, &cancel).await {
                    return;
                }
            }
        }
    }
}

/// Waits; true when it was cancelled meanwhile.
async fn wait(pause: Duration, cancel: &CancellationToken) -> bool {
    tokio::time::timeout(pause, cancel.cancelled()).await.is_ok()
}

enum Ended {
    Cancelled,
    /// `useful`: it had answered something.
    Lost {
        why: String,
        useful: bool,
    },
}

type Flying = FuturesUnordered<BoxFuture<'static, (Outgoing, Instant, Result<Bytes, ReadError>)>>;

async fn carry(
    fetcher: &Arc<Fetcher>,
    links: &Links,
    link: &Link,
    lane: LaneKind,
    cancel: &CancellationToken,
) -> Ended {
    let carrier = fetcher.new_carrier();
    let mut flying: Flying = FuturesUnordered::new();
    let mut closed = link.connection.closed();
    let (mut progress, mut useful) = (Instant::now(), false);
    let ended = loop {
        let next = loop {
            match fetcher.next(lane, carrier) {
                Next::Send(flight) if flight.cargo == Cargo::Zeroes => {
                    fetcher.land(&flight, None, Duration::ZERO);
                    tokio::task::yield_now().await;
                }
                Next::Send(flight) => {
                    if flying.is_empty() {
                        progress = Instant::now();
                    }
                    let disk = fetcher.disk();
                    let bytes = disk.block_size.bytes_of(flight.range, disk.size());
                    let reply = link.connection.read(bytes.start, bytes.len() as u32);
                    let sent = Instant::now();
                    flying.push(Box::pin(async move { (flight, sent, reply.await) }));
                }
                Next::Wait(until) => break until,
            }
        };
        let timer = next.map(|at| fetcher.deadline(at));
        let overdue = progress + REPLY_TIMEOUT;
        tokio::select! {
            biased;
            () = cancel.cancelled() => break Ended::Cancelled,
            Some((flight, sent, result)) = flying.next(), if !flying.is_empty() => match result {
                Ok(bytes) if bytes.len() as u64 == fetcher.disk().block_size.bytes_of(flight.range, fetcher.disk().size()).len() => {
                    (progress, useful) = (Instant::now(), true);
                    fetcher.land(&flight, Some(bytes), sent.elapsed());
                }
                Ok(bytes) => break Ended::Lost { why: format!("a reply of {} bytes is not what was asked", bytes.len()), useful: false },
                Err(ReadError::Refused(why)) => {
                    progress = Instant::now();
                    links.report.update(|status| {
                        status.refused += 1;
                        status.last_error = Some(why.clone());
                        if lane == LaneKind::Demand {
                            status.state = LinkState::Connected;
                        }
                    });
                    tracing::warn!("the upstream could not read blocks {}..{}: {why}; trying again", flight.range.start.0, flight.range.end.0);
                    fetcher.refused(flight.id);
                }
                Err(ReadError::Lost(why)) => break Ended::Lost { why, useful },
            },
            why = &mut closed => break Ended::Lost { why, useful },
            () = fetcher.wake(lane).notified() => {}
            () = sleep_until(timer.unwrap_or(overdue)), if timer.is_some() => {}
            () = sleep_until(overdue), if !flying.is_empty() => {
                break Ended::Lost { why: format!("the upstream did not answer for {} s", REPLY_TIMEOUT.as_secs()), useful };
            }
        }
    };
    fetcher.lost(carrier);
    ended
}
