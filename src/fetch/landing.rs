//! Where flights come down: to the store, into the map, to those who wait.
//!
//! A demand flight lands at once, with its bytes in memory: they are for the readers who wait too. A background flight is
//! long, and nobody waits for its bytes: they go to the store piece by piece as they come ([`Runway`]), and its blocks are
//! present when all of it is there. Either way a local write wins: between two pieces it takes what it wants of the flight.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use nbd::client::Sink;

use super::assemble::Pieces;
use super::fetcher::{Fetcher, State};
use super::queue::{Cargo, Carrier, Class, Outgoing};
use crate::limits::NO_SPACE_PAUSE;
use crate::pull::PullState;
use crate::units::ByteRange;

impl Fetcher {
    /// The bytes of a flight are here (none for zeroes). Whether a demand lane has more to send.
    pub(crate) fn land(&self, flight: &Outgoing, bytes: Option<Bytes>, took: Duration) -> bool {
        let parts = self.lock().queue.arrived(flight.id);
        let size = self.disk.size();
        let whole = self.disk.block_size.bytes_of(flight.range, size);
        let slice = |part: ByteRange| {
            bytes.as_ref().map(|b| b.slice((part.start - whole.start) as usize..(part.end - whole.start) as usize))
        };
        let mut result = Ok(());
        let mut pieces = Pieces::new();
        for part in parts {
            let range = self.disk.block_size.bytes_of(part, size);
            let piece = slice(range);
            if result.is_ok() {
                result = match &piece {
                    Some(piece) => self.disk.write(range.start, piece),
                    None => self.disk.write_zeroes(range, false),
                };
                if result.is_ok() {
                    self.disk.map.set_present(part);
                    if piece.is_none() {
                        self.counters.skipped_bytes.fetch_add(range.len(), Ordering::Relaxed);
                    }
                }
            }
            if let Some(piece) = piece {
                pieces.push((part, piece));
            }
        }
        self.landed(flight, result, took, &pieces)
    }

    /// All bytes of a flight have come down the runway. Who waits for them reads the store. Answers as [`Fetcher::land`].
    pub(super) fn land_streamed(&self, flight: &Outgoing, runway: &Runway, took: Duration) -> bool {
        let parts = self.lock().queue.arrived(flight.id);
        let result = match runway.failure().take() {
            None => {
                for part in parts {
                    self.disk.map.set_present(part);
                }
                Ok(())
            }
            Some(error) => Err(error),
        };
        self.landed(flight, result, took, &Pieces::new())
    }

    fn landed(&self, flight: &Outgoing, result: io::Result<()>, took: Duration, pieces: &Pieces) -> bool {
        let length = self.disk.block_size.bytes_of(flight.range, self.disk.size()).len();
        if flight.cargo == Cargo::Bytes {
            self.counters.pulled_bytes.fetch_add(length, Ordering::Relaxed);
        }
        let mut state = self.lock();
        let landed = state.queue.landed(flight.id);
        state.waiters.bring(&landed.joined, pieces);
        let served = state.waiters.finish(landed.finished);
        if flight.class == Class::Background && flight.cargo == Cargo::Bytes {
            state.window.answered(self.now(), took, length);
            if state.backlog.landed(self.disk.block_size.bytes_of(flight.range, self.disk.size())) {
                self.write_out_due.notify_one();
            }
        }
        self.note_landing(&mut state, flight, result);
        let demand_rests = state.queue.in_flight(Class::Demand) == 0;
        let more = state.queue.has_ready();
        self.tell(&mut state);
        drop(state);
        served.tell();
        self.note_present();
        // Of a landing in the background the lane itself knows; the others may have been waiting for room too.
        if (demand_rests || flight.class == Class::Background) && self.held_back.swap(false, Ordering::AcqRel) {
            self.wake_background();
        }
        more
    }

    fn note_landing(&self, state: &mut State, flight: &Outgoing, result: io::Result<()>) {
        match result {
            Err(error) => {
                if state.paused.is_none() {
                    tracing::warn!(
                        "the background pull pauses, the store takes no bytes: {error}; make room, it goes on by itself"
                    );
                }
                state.paused = Some((self.now() + NO_SPACE_PAUSE, error));
                self.set_pull_state(PullState::PausedNoSpace);
            }
            // A demand fetch shows that there is room only after the pause: until then blocks may fit by chance.
            Ok(())
                if state
                    .paused
                    .take_if(|(until, _)| flight.class == Class::Background || self.now() >= *until)
                    .is_some() =>
            {
                tracing::info!("the store takes bytes again, the background pull goes on");
                self.set_pull_state(if self.background() { PullState::Pulling } else { PullState::Off });
            }
            Ok(()) => {}
        }
    }

    /// Calls `each` for the parts of a piece, in order, and says which of them may be written now.
    fn write_piece(
        &self,
        flight: &Outgoing,
        carrier: Carrier,
        piece: ByteRange,
        mut each: impl FnMut(ByteRange, Allowed),
    ) {
        let Some(parts) = self.lock().queue.piece(flight.id, carrier) else { return each(piece, Allowed::No) };
        let mut at = piece.start;
        for part in parts {
            let part = self.disk.block_size.bytes_of(part, self.disk.size());
            let (start, end) = (part.start.max(at), part.end.min(piece.end));
            if start < end {
                if at < start {
                    each(ByteRange::new(at, start), Allowed::No);
                }
                each(ByteRange::new(start, end), Allowed::Yes);
                at = end;
            }
        }
        if at < piece.end {
            each(ByteRange::new(at, piece.end), Allowed::No);
        }
        let mut state = self.lock();
        let finished = state.queue.put_down(flight.id);
        let served = state.waiters.finish(finished);
        drop(state);
        served.tell();
    }
}

/// Whether bytes that have come may be written to the store.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Allowed {
    Yes,
    /// A local write was faster, or the flight goes over another connection by now.
    No,
}

/// Takes the bytes of one flight to the store as they come.
pub(super) struct Runway {
    fetcher: Arc<Fetcher>,
    flight: Outgoing,
    carrier: Carrier,
    /// The store has failed: the flight cannot land.
    failure: Mutex<Option<io::Error>>,
}

impl Runway {
    pub(super) fn new(fetcher: Arc<Fetcher>, flight: Outgoing, carrier: Carrier) -> Arc<Runway> {
        Arc::new(Runway { fetcher, flight, carrier, failure: Mutex::default() })
    }

    fn failure(&self) -> std::sync::MutexGuard<'_, Option<io::Error>> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, piece: ByteRange, mut write: impl FnMut(ByteRange, Allowed) -> io::Result<()>) {
        self.fetcher.write_piece(&self.flight, self.carrier, piece, |part, allowed| {
            if let Err(error) = write(part, allowed) {
                self.failure().get_or_insert(error);
            }
        });
    }
}

/// The end of a runway that the connection holds.
pub(super) struct Landing(pub(super) Arc<Runway>);

impl Sink for Landing {
    fn bytes(&mut self, offset: u64, bytes: &[u8]) {
        let disk = &self.0.fetcher.disk;
        self.0.write(ByteRange::at(offset, bytes.len() as u64), |part, allowed| match allowed {
            Allowed::Yes => {
                disk.write(part.start, &bytes[(part.start - offset) as usize..(part.end - offset) as usize])
            }
            Allowed::No => Ok(()),
        });
    }

    fn zeroes(&mut self, offset: u64, length: u32) {
        let disk = &self.0.fetcher.disk;
        self.0.write(ByteRange::at(offset, length.into()), |part, allowed| match allowed {
            Allowed::Yes => disk.write_zeroes(part, false),
            Allowed::No => Ok(()),
        });
    }

    fn takes_pages(&self) -> bool {
        self.0.fetcher.disk.takes_pages()
    }

    fn pages(&mut self, offset: u64, pipe: BorrowedFd<'_>, length: u32) {
        let disk = &self.0.fetcher.disk;
        self.0.write(ByteRange::at(offset, length.into()), |part, allowed| match allowed {
            Allowed::Yes => disk.write_pages(part, pipe),
            Allowed::No => crate::store::throw_away(pipe, part.len()),
        });
    }
}
