//! A lane keeps a connection to the upstream, one at a time, and gets itself a new one when it is lost.
//!
//! Its task only waits: for a connection, for its end, for a pause to pass. Flights are sent by whoever has a reason to (a
//! reader who asked for missing blocks, a reply that made room), and a reply is landed on the connection's own task as soon as
//! it is here: to the store (whose writes go to the page cache), into the map, to those who wait. So a demand fetch costs
//! two changes of task, to the connection and back to the reader. It never gives up: while the upstream is away its
//! flights wait in the queue.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Notify;
use tokio::time::{sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use super::fetcher::{Fetcher, Next};
use super::landing::{Landing, Runway};
use super::links::{Link, Links};
use super::queue::{Cargo, Carrier, Class, Outgoing};
use crate::limits::{DEMAND_PAGES_MIN, REPLY_LOOK, REPLY_TIMEOUT, RETRY_MAX, RETRY_MIN};
use crate::upstream::{Connection, LinkState, ReadError};

pub(crate) use super::fetcher::LaneKind;

/// Runs until it is cancelled.
pub(crate) async fn run(fetcher: Arc<Fetcher>, links: Arc<Links>, lane: LaneKind, cancel: CancellationToken) {
    let mut pause = RETRY_MIN;
    loop {
        let dialled = tokio::select! {
            () = cancel.cancelled() => return,
            dialled = links.dial(lane) => dialled,
        };
        let link = match dialled {
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
        };
        let ended = carry(&fetcher, &links, &link, lane, &cancel).await;
        if let (Ended::Lost { why, .. }, LaneKind::Demand) = (&ended, lane) {
            tracing::warn!("{why}; readers of missing blocks wait until it is back");
            // Before the goodbye, which may take a moment: nobody else is to be given this one.
            links.retire(why);
        }
        if !link.shared {
            link.connection.close().await;
        }
        match ended {
            Ended::Cancelled => return,
            Ended::Lost { useful, .. } => {
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

async fn carry(
    fetcher: &Arc<Fetcher>,
    links: &Arc<Links>,
    link: &Link,
    lane: LaneKind,
    cancel: &CancellationToken,
) -> Ended {
    let carriage = Arc::new(Carriage {
        fetcher: fetcher.clone(),
        links: links.clone(),
        connection: link.connection.clone(),
        lane,
        carrier: fetcher.new_carrier(),
        flying: AtomicU64::new(0),
        progress: AtomicU64::new(0),
        useful: AtomicBool::new(false),
        over: AtomicBool::new(false),
        broken: Mutex::default(),
        breaks: Notify::new(),
    });
    match lane {
        LaneKind::Demand => fetcher.set_demand(Some(carriage.clone())),
        LaneKind::Background(_) => fetcher.set_connected(true),
    }
    let mut closed = link.connection.closed();
    let lost = |why| Ended::Lost { why, useful: carriage.useful.load(Ordering::Relaxed) };
    let ended = loop {
        let timer = match carriage.pump() {
            Pumped::Yield => {
                tokio::task::yield_now().await;
                if cancel.is_cancelled() {
                    break Ended::Cancelled;
                }
                continue;
            }
            Pumped::Until(timer) => timer.map(|at| fetcher.deadline(at)),
        };
        tokio::select! {
            biased;
            () = cancel.cancelled() => break Ended::Cancelled,
            why = &mut closed => break lost(why),
            () = carriage.breaks.notified() => break lost(carriage.why_broken()),
            () = fetcher.wake(lane).notified() => {}
            () = async { sleep_until(timer.unwrap_or_else(tokio::time::Instant::now)).await }, if timer.is_some() => {}
            () = sleep(REPLY_LOOK) => {
                if carriage.is_overdue() {
                    break lost(format!("the upstream did not answer for {} s", REPLY_TIMEOUT.as_secs()));
                }
            }
        }
    };
    match lane {
        LaneKind::Demand => fetcher.set_demand(None),
        LaneKind::Background(_) => fetcher.set_connected(false),
    }
    carriage.over.store(true, Ordering::SeqCst);
    fetcher.lost(carriage.carrier);
    ended
}

/// What a pump has come to.
enum Pumped {
    /// It has worked on zeroes, and there may be more: others first.
    Yield,
    /// Nothing to send before this time, or before something happens.
    Until(Option<Duration>),
}

/// A connection while it carries flights.
pub(crate) struct Carriage {
    fetcher: Arc<Fetcher>,
    links: Arc<Links>,
    connection: Arc<dyn Connection>,
    lane: LaneKind,
    carrier: Carrier,
    /// Bytes that were asked for and not answered.
    flying: AtomicU64,
    /// When it last answered, or got something to do after a rest: nanoseconds of the fetcher's time.
    progress: AtomicU64,
    useful: AtomicBool,
    /// The lane has let it go: what it still says counts no more.
    over: AtomicBool,
    /// Why it cannot go on.
    broken: Mutex<Option<String>>,
    breaks: Notify,
}

impl Carriage {
    /// Sends what readers wait for. From any task; it does not wait.
    pub(crate) fn send_demand(self: &Arc<Self>) {
        // A pause before the next attempt is the lane's to watch: it is woken when one begins.
        self.pump();
    }

    fn pump(self: &Arc<Self>) -> Pumped {
        let mut now = self.fetcher.now();
        loop {
            match self.fetcher.next(self.lane, self.carrier, self.flying.load(Ordering::Relaxed), now) {
                Next::Send(flight) if flight.cargo == Cargo::Zeroes => {
                    self.fetcher.land(&flight, None, Duration::ZERO);
                    if self.lane != LaneKind::Demand {
                        return Pumped::Yield;
                    }
                    now = self.fetcher.now();
                }
                Next::Send(flight) => self.send(flight, now),
                Next::Wait(until) => return Pumped::Until(until),
            }
        }
    }

    fn send(self: &Arc<Self>, flight: Outgoing, sent: Duration) {
        let bytes = self.bytes_of(&flight);
        let expected = bytes.len();
        if self.flying.fetch_add(expected, Ordering::Relaxed) == 0 {
            self.made_progress(sent);
        }
        let carriage = self.clone();
        if flight.class == Class::Background || self.goes_by_the_store(expected) {
            let runway = Runway::new(self.fetcher.clone(), flight, self.carrier);
            let sink = Box::new(Landing(runway.clone()));
            let done = move |result: Result<(), ReadError>| {
                carriage
                    .answered(&flight, sent, result, |fetcher, (), took| fetcher.land_streamed(&flight, &runway, took));
            };
            return self.connection.read_to(bytes.start, bytes.len() as u32, sink, Box::new(done));
        }
        let done = move |result: Result<Bytes, ReadError>| {
            let result = result.and_then(|bytes| match bytes.len() as u64 == expected {
                true => Ok(bytes),
                false => Err(ReadError::Lost(format!("a reply of {} bytes is not what was asked", bytes.len()))),
            });
            carriage.answered(&flight, sent, result, |fetcher, bytes, took| fetcher.land(&flight, Some(bytes), took));
        };
        self.connection.read(bytes.start, bytes.len() as u32, Box::new(done));
    }

    /// Whether the readers of so many bytes take them from the store: as pages, from one socket through the page cache to
    /// the other, they are copied once in place of three times. Not where the store takes nothing, for who reads needs no
    /// room in it.
    fn goes_by_the_store(&self, length: u64) -> bool {
        length >= DEMAND_PAGES_MIN && self.connection.gives_pages() && !self.fetcher.store_fails()
    }

    /// On the connection's task.
    fn answered<T>(
        self: &Arc<Self>,
        flight: &Outgoing,
        sent: Duration,
        result: Result<T, ReadError>,
        land: impl FnOnce(&Fetcher, T, Duration) -> bool,
    ) {
        if self.over.load(Ordering::SeqCst) {
            return;
        }
        self.flying.fetch_sub(self.bytes_of(flight).len(), Ordering::Relaxed);
        match result {
            Ok(landing) => {
                let now = self.fetcher.now();
                self.made_progress(now);
                self.useful.store(true, Ordering::Relaxed);
                let more = land(&self.fetcher, landing, now.saturating_sub(sent));
                if self.lane == LaneKind::Demand && !more {
                    return;
                }
            }
            Err(ReadError::Refused(why)) => {
                self.made_progress(self.fetcher.now());
                self.refused(flight, &why);
            }
            // The connection's end is seen by the lane.
            Err(ReadError::Lost(why)) => return self.break_off(why),
        }
        match self.lane {
            LaneKind::Demand => self.send_demand(),
            // A step of zeroes may be long, and a time to wait for is the lane's to watch.
            LaneKind::Background(_) => match self.pump() {
                Pumped::Until(None) => {}
                Pumped::Yield | Pumped::Until(Some(_)) => self.fetcher.wake(self.lane).notify_one(),
            },
        }
    }

    fn refused(&self, flight: &Outgoing, why: &str) {
        self.links.report.update(|status| {
            status.refused += 1;
            status.last_error = Some(why.to_owned());
            if self.lane == LaneKind::Demand {
                status.state = LinkState::Connected;
            }
        });
        let blocks = flight.range;
        tracing::warn!("the upstream could not read blocks {}..{}: {why}; trying again", blocks.start.0, blocks.end.0);
        self.fetcher.refused(flight.id);
        // It has to look at the pause.
        self.fetcher.wake(self.lane).notify_one();
    }

    fn break_off(&self, why: String) {
        self.broken.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why);
        self.breaks.notify_one();
    }

    fn why_broken(&self) -> String {
        self.broken.lock().unwrap_or_else(PoisonError::into_inner).take().unwrap_or_default()
    }

    fn made_progress(&self, now: Duration) {
        self.progress.store(now.as_nanos() as u64, Ordering::Relaxed);
    }

    fn is_overdue(&self) -> bool {
        let progress = Duration::from_nanos(self.progress.load(Ordering::Relaxed));
        self.flying.load(Ordering::Relaxed) > 0 && self.fetcher.now().saturating_sub(progress) >= REPLY_TIMEOUT
    }

    fn bytes_of(&self, flight: &Outgoing) -> crate::units::ByteRange {
        let disk = self.fetcher.disk();
        disk.block_size.bytes_of(flight.range, disk.size())
    }
}
