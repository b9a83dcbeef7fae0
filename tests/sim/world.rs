//! Two hosts, two links between them and an operator, in virtual time.
//!
//! A process's death takes what was in its memory; the page cache, the live map and what the kernel holds stay. A power
//! loss takes these as well, but for what was synced and what chance leaves. A peer message is lost with its sender's or
//! its receiver's process; otherwise it may come late, twice, out of order, or not at all. A clock is its host's own.

use std::collections::BTreeMap;
use std::time::Duration;

use lazy_migrate::migration::lease::{Beat, Timings};
use lazy_migrate::migration::machine::{DestinationEffect, DestinationMachine, SourceEffect, SourceMachine};
use lazy_migrate::migration::record::{DestinationRecord, LinkPolicy, OnLinkFailure, SourceRecord};
use lazy_migrate::tracker::Tracker;
use lazy_migrate::units::BootTime;

use super::client::ClientRequest;
use super::dice::Dice;
use super::export::{Export, Media};
use super::lanes::{Landing, Message};
use super::link::{Envelope, Purpose, Reply};
use super::media::{JournalFile, Store};
use super::model::Model;
use super::plants::{Plant, Rule};
use super::shape::{Shape, Value};

/// The source host, and the destination host.
pub const A: usize = 0;
pub const B: usize = 1;

/// Adds a line to the log, if there is one.
macro_rules! note {
    ($world:expr, $($text:tt)*) => {
        if $world.log.is_some() {
            let line = format!($($text)*);
            $world.push_note(line);
        }
    };
}
pub(crate) use note;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Gate {
    Open,
    ReadOnly,
    Held,
    Closed,
}

/// What both kinds of host have.
pub struct Host {
    /// The node's process is there.
    pub up: bool,
    /// The host has its power.
    pub powered: bool,
    /// Rises with every restart: what belongs to an earlier life is nobody's.
    pub life: u64,
    /// In hundredths of a percent.
    pub drift: i64,
    pub gate: Gate,
    /// The container runs.
    pub runs: bool,
    /// There is a container, and it stands still.
    pub frozen: bool,
    pub performing: bool,
    /// Until then the node's process gets no processor.
    pub stalled_until: u64,
    pub waiting: Option<Waiting>,
}

/// Who waits for the end of a command.
#[derive(Clone, Debug)]
pub enum Waiting {
    Operator(Order),
    Call(Envelope),
}

/// What an operator, or a script, types.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Order {
    Prepare,
    Freeze,
    HandOver,
    Cancel,
    RollBack { insist: bool },
}

/// The source's side.
pub struct SourceSide {
    pub machine: Option<SourceMachine>,
    pub journal: JournalFile,
    /// What the journal says.
    pub recorded: Option<SourceRecord>,
    pub store: Store,
    pub model: Model,
    pub tracker: Tracker,
    /// Regions that were written since the tracker began: what it must say.
    pub written: Vec<bool>,
    pub pending: BTreeMap<u64, ClientRequest>,
    pub syncs: BTreeMap<u64, u64>,
    /// The disk at the freeze point, once it is handed over.
    pub freeze: Option<Vec<Value>>,
    /// The seal waits for its sync, that began so.
    pub sealing: Option<u64>,
    /// What it has heard, for a planted bug.
    pub last_beat: Beat,
}

/// The destination's side.
pub struct TargetSide {
    pub machine: Option<DestinationMachine>,
    pub journal: JournalFile,
    pub recorded: Option<DestinationRecord>,
    pub torn_down: bool,
    pub restoring: bool,
    pub beating: bool,
    /// The container was restored from its checkpoint once: never again from the same one.
    pub restored: bool,
    pub media: Option<Media>,
    pub export: Option<Export>,
    pub model: Option<Model>,
    /// Requests in the kernel.
    pub kernel: BTreeMap<u64, ClientRequest>,
    /// A client uses the disk.
    pub attached: bool,
    /// Until when the container's guard lets it run, as the node told it last.
    pub guard: Option<BootTime>,
    pub guard_froze: bool,
    pub starving: bool,
    /// The store has lost its power since the export was opened last.
    pub power_lost: bool,
}

#[derive(Clone, Debug)]
pub enum Event {
    SourceDone {
        life: u64,
        effect: SourceEffect,
        ok: bool,
    },
    DestinationDone {
        life: u64,
        effect: DestinationEffect,
        ok: bool,
    },
    Question(Envelope),
    Answer(Envelope, Reply),
    Beat {
        life: u64,
    },
    Restored {
        life: u64,
        migration: String,
    },
    Verified {
        life: u64,
    },
    /// After a restart it was looked whether the container has outlived the node.
    Looked {
        life: u64,
    },
    Guard,
    SourceTick,
    Go {
        export: u64,
        request: u64,
    },
    Land(Landing),
    Flushed {
        export: u64,
    },
    Persist {
        export: u64,
    },
    Pump {
        export: u64,
    },
    Dialled {
        export: u64,
        lane: usize,
    },
    Data {
        from: usize,
        message: Message,
    },
    Lost(Message),
    ClientA,
    ClientB,
    StepA {
        life: u64,
        request: u64,
        last: bool,
    },
    SourceWritten,
    ColdStart {
        life: u64,
    },
    Order(Order),
    Crash(usize),
    PowerLoss(usize),
    Restart(usize),
    Link([bool; 2]),
    Stall(usize, u64),
    Calm,
    Check,
}

/// The whole of it.
pub struct World {
    pub dice: Dice,
    pub plant: Option<Plant>,
    pub timings: Timings,
    pub shape: Shape,
    /// In milliseconds.
    pub now: u64,
    sequence: u64,
    queue: BTreeMap<(u64, u64), Event>,
    pub hosts: [Host; 2],
    pub a: SourceSide,
    pub b: TargetSide,
    /// Rises with every destination machine: what belongs to an earlier one is nobody's.
    pub generation: u64,
    pub calls: BTreeMap<u64, (usize, u64, Purpose)>,
    /// Whether messages from A, and from B, get through.
    pub link: [bool; 2],
    /// Nothing goes wrong any more.
    pub calm: bool,
    /// No message and no record is lost before the disk is handed over, so that it is handed over in most runs.
    pub sheltered: bool,
    /// The clients ask nothing more.
    pub ending: bool,
    pub attempts: u64,
    /// Whether a container moves along, or the disk alone.
    pub container: bool,
    /// What the source does by itself when the destination is silent.
    pub policy: LinkPolicy,
    /// After how long a waiting read freezes the container, in milliseconds.
    pub starve_after: Option<u64>,
    /// The longest pause between two requests of a client, in milliseconds.
    pub busy: u64,
    /// Blocks of background pull in flight.
    pub window: u64,
    pub next_value: Value,
    pub next_id: u64,
    pub carriers: u64,
    pub broken: Option<(Rule, String)>,
    /// Only for a run that is looked at.
    pub log: Option<Vec<String>>,
}

impl World {
    /// A new world; with `logged`, it tells what happens.
    pub fn new(seed: u64, plant: Option<Plant>, logged: bool) -> Self {
        let mut dice = Dice(seed);
        let container = dice.percent(60);
        let mut host = |gate| Host {
            up: true,
            powered: true,
            life: 0,
            drift: dice.between(0, 201) as i64 - 100,
            gate,
            runs: container && gate == Gate::Open,
            frozen: false,
            performing: false,
            stalled_until: 0,
            waiting: None,
        };
        let hosts = [host(Gate::Open), host(Gate::Closed)];
        let lease = if dice.percent(80) { dice.between(1000, 3000) } else { dice.between(3000, 10_000) };
        let largest = if dice.percent(80) { 20 } else { 64 };
        let shape = Shape { cells: dice.between(8 * 4, largest * 4 + 1) as usize };
        let mut next_value = 0;
        let mut content = vec![0; shape.cells];
        for block in content.chunks_mut(super::shape::CELLS) {
            if dice.percent(75) {
                block.iter_mut().for_each(|cell| {
                    next_value += 1;
                    *cell = next_value;
                });
            }
        }
        let busy = dice.between(15, 90);
        let sheltered = dice.percent(75);
        let window = dice.between(1, 9);
        let on_link_failure = if dice.percent(30) { OnLinkFailure::Rollback } else { OnLinkFailure::Wait };
        let link_timeout = Duration::from_millis(dice.between(lease / 2, lease * 3));
        let policy = LinkPolicy { on_link_failure, link_timeout };
        let starve_after = dice.percent(25).then(|| dice.between(100, 1000));
        Self {
            dice,
            plant,
            timings: Timings::of(Duration::from_millis(lease)),
            shape,
            now: 0,
            sequence: 0,
            queue: BTreeMap::new(),
            hosts,
            a: SourceSide {
                machine: None,
                journal: JournalFile::new(),
                recorded: None,
                model: Model::new(&content),
                store: Store::new(content),
                tracker: Tracker::new(shape.size()),
                written: vec![false; shape.blocks() as usize],
                pending: BTreeMap::new(),
                syncs: BTreeMap::new(),
                freeze: None,
                sealing: None,
                last_beat: Beat(0),
            },
            b: TargetSide {
                machine: None,
                journal: JournalFile::new(),
                recorded: None,
                torn_down: false,
                restoring: false,
                beating: false,
                restored: false,
                media: None,
                export: None,
                model: None,
                kernel: BTreeMap::new(),
                attached: false,
                guard: None,
                guard_froze: false,
                starving: false,
                power_lost: false,
            },
            generation: 0,
            calls: BTreeMap::new(),
            link: [true; 2],
            calm: false,
            sheltered,
            ending: false,
            attempts: 0,
            container,
            policy,
            starve_after,
            busy,
            window,
            next_value,
            next_id: 0,
            carriers: 0,
            broken: None,
            log: logged.then(Vec::new),
        }
    }

    /// For [`note!`].
    pub fn push_note(&mut self, line: String) {
        let now = self.now;
        if let Some(log) = &mut self.log {
            log.push(format!("{now:>8} ms  {line}"));
        }
    }

    /// A rule is broken; the first one counts.
    pub fn violate(&mut self, rule: Rule, what: impl FnOnce() -> String) {
        if self.broken.is_none() {
            self.broken = Some((rule, what()));
        }
    }

    /// Something happens so many milliseconds from now.
    pub fn at(&mut self, delay: u64, event: Event) {
        self.sequence += 1;
        self.queue.insert((self.now + delay, self.sequence), event);
    }

    /// The next thing that happens, unless its process stands still: then it happens later.
    pub fn next_event(&mut self) -> Option<Event> {
        loop {
            let ((time, _), event) = self.queue.pop_first()?;
            self.now = time;
            let until = event.process().map_or(0, |host| self.hosts[host].stalled_until);
            if until <= self.now {
                return Some(event);
            }
            self.at(until - self.now, event);
        }
    }

    /// Messages and records get through.
    pub fn is_quiet(&self) -> bool {
        self.calm || (self.sheltered && self.b.model.is_none())
    }

    /// Which machine of a host it is.
    pub fn life(&self, host: usize) -> u64 {
        if host == A { self.hosts[A].life } else { self.generation }
    }

    /// A host's own clock.
    pub fn clock(&self, host: usize) -> BootTime {
        let (now, drift) = (self.now as i64, self.hosts[host].drift);
        BootTime::new(Duration::from_micros((now * 1000 + now * drift / 10 + 1_000_000) as u64))
    }

    /// A lease, in milliseconds.
    pub fn lease(&self) -> u64 {
        self.timings.duration.as_millis() as u64
    }

    /// How long something local takes that must not take long: a hundredth of the lease at most.
    pub fn moment(&mut self) -> u64 {
        let most = self.lease() / 100;
        self.dice.between(0, most)
    }

    /// How long a record takes to become durable: now and then longer than a lease.
    pub fn write_time(&mut self) -> u64 {
        let most = if !self.is_quiet() && self.dice.percent(6) { self.lease() * 3 / 2 } else { 40 };
        self.dice.between(0, most)
    }

    /// Whether the source acknowledges writes.
    pub fn source_may_write(&self) -> bool {
        self.hosts[A].up && self.hosts[A].gate == Gate::Open
    }

    /// Whether the destination does: the gate compares the deadline with the clock at every acknowledgement.
    pub fn target_may_write(&self) -> bool {
        let Some(machine) = &self.b.machine else { return false };
        let in_time = machine.io_deadline().is_none_or(|end| self.clock(B) < end);
        let in_time = in_time || self.plant == Some(Plant::GateWithoutDeadline);
        self.hosts[B].up && self.hosts[B].gate == Gate::Open && in_time
    }
}

impl Event {
    /// Whose process does it, if it is one's.
    fn process(&self) -> Option<usize> {
        match self {
            Event::SourceTick | Event::SourceDone { .. } | Event::StepA { .. } | Event::Data { from: B, .. } => Some(A),
            Event::Question(envelope) => Some(1 - envelope.from),
            Event::Answer(envelope, _) => Some(envelope.from),
            Event::DestinationDone { .. } | Event::Beat { .. } | Event::Restored { .. } => Some(B),
            Event::Verified { .. } | Event::Looked { .. } => Some(B),
            Event::Go { .. } | Event::Land(_) | Event::Flushed { .. } | Event::Persist { .. } => Some(B),
            Event::Pump { .. } | Event::Dialled { .. } | Event::Data { .. } | Event::Lost(_) => Some(B),
            _ => None,
        }
    }
}
