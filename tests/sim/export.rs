//! The destination's export, reduced to what decides: the real map, queue and order with a store that loses power. What
//! runs at once in the program runs in steps here, with time between them: bytes, then bits, then the answer.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use lazy_migrate::block_map::codec::PageWords;
use lazy_migrate::block_map::{BlockMap, WORDS_PER_PAGE};
use lazy_migrate::fetch::queue::{ClaimId, Claimed, Class, FetchQueue, Ticket, Tickets};
use lazy_migrate::migration::phase::DestinationPhase;
use lazy_migrate::pull::{Order, PullOrder};
use lazy_migrate::units::{BlockIndex, BlockRange};

use super::client::Kind;
use super::lanes::Lane;
use super::media::{LivePlanes, MapFile, Store};
use super::plants::{Plant, Rule};
use super::shape::{Shape, Value, block_size};
use super::world::{B, Event, Gate, World, note};

/// The files of an export: they outlive the process.
pub struct Media {
    pub store: Store,
    pub map_file: MapFile,
    pub planes: LivePlanes,
    /// The live map is of this boot.
    pub live: bool,
}

impl Media {
    /// Of a disk of which nothing is here.
    pub fn new(shape: Shape) -> Self {
        let planes = LivePlanes::new(shape.blocks(), &PageWords::default());
        Self { store: Store::new(vec![0; shape.cells]), map_file: MapFile::new(), planes, live: true }
    }
}

/// A request that the process is doing.
pub struct Running {
    pub stage: Stage,
    /// When it came, in milliseconds.
    pub since: u64,
    /// Blocks that replies brought, for a reader.
    pub brought: BTreeMap<u64, Vec<Value>>,
}

/// How far a request is.
pub enum Stage {
    /// At the gate, or waiting for a fetch.
    Begin,
    /// Changing bytes: these cells, up to the middle now and the rest in the next step.
    Bytes(Change),
    /// The rest of the bytes, then the bits.
    Bits(Change),
    /// Waiting for a flush.
    Flush,
    /// Done: the answer waits for the gate.
    Answer(Vec<Value>),
}

/// A change of bytes that was admitted.
#[derive(Clone)]
pub struct Change {
    cells: Range<usize>,
    middle: usize,
    /// Blocks that become present.
    inside: Option<BlockRange>,
    claim: Option<ClaimId>,
}

/// Who waits for a flush.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum FlushFor {
    Request(u64),
    /// Nobody in particular: now and then.
    Time,
    /// The pull is at its end.
    Completion,
}

/// One flush at a time; who asks meanwhile waits for the next.
pub struct Flusher {
    pub running: bool,
    pub waiting: Vec<FlushFor>,
    current: Vec<FlushFor>,
    unflushed: bool,
    snapshot: Option<PageWords>,
    began: u64,
    bytes_done: bool,
}

/// The export of one life of the process.
pub struct Export {
    pub id: u64,
    pub map: BlockMap,
    pub queue: FetchQueue,
    pub order: PullOrder,
    pub running: BTreeMap<u64, Running>,
    pub waiters: BTreeMap<Ticket, u64>,
    pub held: VecDeque<u64>,
    pub lanes: [Lane; 3],
    pub pulling: bool,
    /// The upstream's maps have come: the regions that are hot.
    pub hot: Option<Vec<bool>>,
    /// Blocks that the order has named since then; `None` once something else than the order decided.
    pub named: Option<Vec<bool>>,
    pub pump_at: Option<u64>,
    pub flusher: Flusher,
    completing: bool,
}

impl World {
    /// The process opens the export: the live map of this boot counts, else the durable one.
    pub fn open_export(&mut self) {
        let Some(media) = &mut self.b.media else { return };
        media.map_file.one_slot = self.plant == Some(Plant::OneSlot);
        let words = match media.map_file.load() {
            Ok(words) => words,
            Err(bad) => return self.violate(Rule::PowerLoss, || format!("{bad}")),
        };
        if !media.live || self.plant == Some(Plant::LiveMapForgotten) {
            media.planes = LivePlanes::new(self.shape.blocks(), &words);
            media.live = true;
        }
        let map = BlockMap::new(Box::new(media.planes.clone()), self.shape.blocks());
        if map.snapshot(0) != words {
            map.mark_changed(0);
        }
        self.next_id += 1;
        let order = if self.dice.percent(80) { Order::Dirty } else { Order::Sequential };
        let export = Export {
            id: self.next_id,
            map,
            queue: FetchQueue::new(self.dice.between(1, 9)),
            order: PullOrder::new(order, block_size(), self.shape.size()),
            running: BTreeMap::new(),
            waiters: BTreeMap::new(),
            held: VecDeque::new(),
            lanes: Default::default(),
            pulling: false,
            hot: None,
            named: (order == Order::Dirty).then(|| vec![false; self.shape.blocks() as usize]),
            pump_at: None,
            flusher: Flusher {
                running: false,
                waiting: Vec::new(),
                current: Vec::new(),
                unflushed: true,
                snapshot: None,
                began: 0,
                bytes_done: false,
            },
            completing: false,
        };
        let id = export.id;
        self.b.export = Some(export);
        self.check_reopened();
        let every = self.dice.between(500, 4000);
        self.at(every, Event::Persist { export: id });
        self.note_present();
        for request in self.b.kernel.keys().copied().collect::<Vec<_>>() {
            self.submit(request);
        }
    }

    /// A request reaches the process.
    pub fn submit(&mut self, request: u64) {
        let Some(export) = &mut self.b.export else { return };
        export.running.insert(request, Running { stage: Stage::Begin, since: self.now, brought: BTreeMap::new() });
        let id = export.id;
        self.at(0, Event::Go { export: id, request });
    }

    /// The gate may have opened, or closed.
    pub fn gate_changed(&mut self) {
        let closed = self.hosts[B].gate == Gate::Closed;
        if !closed && !self.target_may_write() {
            return;
        }
        let Some(export) = &mut self.b.export else { return };
        let (id, held) = (export.id, std::mem::take(&mut export.held));
        for request in held {
            self.at(0, Event::Go { export: id, request });
        }
    }

    /// A request goes on.
    pub fn go(&mut self, request: u64) {
        let serves = self.target_may_write();
        let (closed, held) = (self.hosts[B].gate == Gate::Closed, self.hosts[B].gate == Gate::Held);
        let Some(export) = &mut self.b.export else { return };
        let (id, Some(running)) = (export.id, export.running.get_mut(&request)) else { return };
        match &running.stage {
            Stage::Begin | Stage::Answer(_) if closed => {
                self.fails(request);
            }
            Stage::Begin | Stage::Answer(_) if held && self.plant == Some(Plant::HeldFails) => self.fails(request),
            Stage::Begin | Stage::Answer(_) if !serves => export.held.push_back(request),
            Stage::Begin => match self.b.kernel.get(&request).map(|it| it.kind) {
                Some(Kind::Read) => self.read(request),
                Some(Kind::Flush) => self.flush(request),
                Some(_) => self.attempt(request),
                None => {}
            },
            Stage::Answer(values) => {
                let values = values.clone();
                export.running.remove(&request);
                self.answered(request, values);
            }
            Stage::Bytes(change) => {
                let change = change.clone();
                running.stage = Stage::Bits(change.clone());
                self.change(request, change.cells.start..change.middle);
                if self.plant == Some(Plant::AckBeforeBits) {
                    self.answered(request, Vec::new());
                }
                let pause = self.dice.between(0, 4);
                self.at(pause, Event::Go { export: id, request });
            }
            Stage::Bits(change) => {
                let change = change.clone();
                self.change(request, change.middle..change.cells.end);
                self.mark_changed(request, &change);
            }
            Stage::Flush => {}
        }
    }

    /// A request ends with an error: only where the disk is gone for good.
    fn fails(&mut self, request: u64) {
        if let Some(export) = &mut self.b.export {
            export.running.remove(&request);
        }
        self.b.kernel.remove(&request);
        let phase = self.b.machine.as_ref().map(|machine| machine.record().phase);
        if phase != Some(DestinationPhase::Discarded) {
            self.violate(Rule::Held, || format!("request {request} fails, and the disk may come back ({phase:?})"));
        }
    }

    fn change(&mut self, request: u64, cells: Range<usize>) {
        let value = match self.b.kernel.get(&request).map(|it| it.kind) {
            Some(Kind::Write(value)) => value,
            _ => 0,
        };
        if let Some(media) = &mut self.b.media {
            cells.for_each(|cell| media.store.write(cell, value));
        }
    }

    /// The bits, the end of the claim, the answer.
    fn mark_changed(&mut self, request: u64, change: &Change) {
        let early = self.plant == Some(Plant::AckBeforeBits);
        let fua = self.b.kernel.get(&request).is_some_and(|it| it.fua);
        let Some(export) = &mut self.b.export else { return };
        if let Some(inside) = change.inside {
            export.map.set_dirty(inside);
            export.map.set_present(inside);
        }
        export.flusher.unflushed = true;
        let woken = change.claim.map_or(Tickets::new(), |claim| export.queue.release(claim));
        note!(self, "B: {request} releases {:?}, which wakes {woken:?}", change.claim);
        let Some(export) = &mut self.b.export else { return };
        if early {
            export.running.remove(&request);
        } else if let Some(running) = export.running.get_mut(&request) {
            running.stage = if fua { Stage::Flush } else { Stage::Answer(Vec::new()) };
        }
        self.wake(woken);
        if fua && !early {
            self.persist(FlushFor::Request(request));
        } else {
            self.go(request);
        }
        self.note_present();
        self.pump();
    }

    fn read(&mut self, request: u64) {
        let Some(cells) = self.b.kernel.get(&request).map(|it| it.cells.clone()) else { return };
        let blocks = self.shape.cover(&cells);
        if self.fetch(request, blocks) {
            return;
        }
        let (Some(export), Some(media)) = (&mut self.b.export, &self.b.media) else { return };
        let Some(running) = export.running.get_mut(&request) else { return };
        let values = cells.map(|cell| {
            let block = cell / super::shape::CELLS;
            let brought = running.brought.get(&(block as u64));
            brought.map_or(media.store.cache[cell], |values| values[cell % super::shape::CELLS])
        });
        running.stage = Stage::Answer(values.collect());
        self.go(request);
    }

    /// Waits for what is missing of the blocks; `false` when there is nothing to wait for.
    fn fetch(&mut self, request: u64, blocks: BlockRange) -> bool {
        let cut = self.plant == Some(Plant::ZeroesWhenCut) && !self.link.iter().all(|up| *up);
        let Some(export) = &mut self.b.export else { return false };
        let Some(running) = export.running.get(&request) else { return false };
        let wanted = blocks.iter().filter(|block| !running.brought.contains_key(&block.0));
        let one = |block: BlockIndex| BlockRange::new(block, BlockIndex(block.0 + 1));
        let missing: Vec<BlockRange> = merge(wanted.flat_map(|block| export.map.missing_in(one(block)))).collect();
        if cut {
            return false;
        }
        let Some(ticket) = export.queue.request(&missing, Class::Demand) else { return false };
        export.order.hint(blocks);
        // From here on the reader's neighbourhood comes first, whatever the source wrote.
        export.named = None;
        export.waiters.insert(ticket, request);
        note!(self, "B: {request} waits for {missing:?} with {ticket:?}");
        self.pump();
        true
    }

    /// One whole try of a change.
    fn attempt(&mut self, request: u64) {
        let Some((cells, trim)) = self.b.kernel.get(&request).map(|it| (it.cells.clone(), it.kind == Kind::Trim))
        else {
            return;
        };
        let (cover, mut inside) = (self.shape.cover(&cells), self.shape.inside(&cells));
        let Some(export) = &mut self.b.export else { return };
        let mut change = Change { middle: 0, cells: cells.clone(), inside: None, claim: None };
        if export.map.is_present(cover) {
            export.map.set_dirty(cover);
        } else {
            let ends = [
                BlockRange::new(cover.start, inside.start.min(cover.end)),
                BlockRange::new(inside.end.max(cover.start), cover.end),
            ];
            let edges = if inside.is_empty() { vec![cover] } else { ends.to_vec() };
            let missing = edges.into_iter().find(|edge| !edge.is_empty() && !export.map.is_present(*edge));
            match missing {
                Some(_) if trim => change.cells = self.shape.cells_of(inside),
                Some(_) if self.plant == Some(Plant::PartialWithoutMerge) => inside = cover,
                Some(edge) => {
                    if let Some(running) = export.running.get_mut(&request) {
                        running.brought.clear();
                    }
                    if !self.fetch(request, edge) {
                        // The fetch came to nothing, or has just ended: look again.
                        self.again(request);
                    }
                    return;
                }
                None => {}
            }
            if !change.cells.is_empty() {
                match export.queue.claim(inside) {
                    Claimed::Wait(ticket) => {
                        export.waiters.insert(ticket, request);
                        note!(self, "B: {request} waits for a landing with {ticket:?}");
                        return;
                    }
                    Claimed::Granted(claim, finished) => {
                        note!(self, "B: {request} claims {inside:?} as {claim:?}, which wakes {finished:?}");
                        change.claim = Some(claim);
                        change.inside = Some(inside);
                        self.wake(finished);
                    }
                }
                self.dirty_present(self.shape.cover(&change.cells));
            }
        }
        change.middle = self.dice.between(change.cells.start as u64, change.cells.end as u64 + 1) as usize;
        if self.plant == Some(Plant::AckBeforeBits) {
            change.middle = change.cells.end;
        }
        let pause = self.dice.between(0, 3);
        let Some(export) = &mut self.b.export else { return };
        let id = export.id;
        if let Some(running) = export.running.get_mut(&request) {
            running.stage = Stage::Bytes(change);
        }
        self.at(pause, Event::Go { export: id, request });
    }

    fn again(&mut self, request: u64) {
        let pause = self.dice.between(1, 20);
        if let Some(id) = self.b.export.as_ref().map(|export| export.id) {
            self.at(pause, Event::Go { export: id, request });
        }
    }

    /// Present blocks are dirty before their bytes change.
    fn dirty_present(&self, touched: BlockRange) {
        let Some(export) = &self.b.export else { return };
        let mut at = touched.start;
        for missing in export.map.missing_in(touched) {
            export.map.set_dirty(BlockRange::new(at, missing.start));
            at = missing.end;
        }
        export.map.set_dirty(BlockRange::new(at, touched.end));
    }

    /// Tickets that have nothing left to wait for.
    pub fn wake(&mut self, tickets: Tickets) {
        for ticket in tickets {
            let Some(export) = &mut self.b.export else { return };
            let id = export.id;
            match export.waiters.remove(&ticket) {
                Some(request) => self.at(0, Event::Go { export: id, request }),
                None => self.violate(Rule::Waiters, || format!("{ticket:?} is woken, and does not wait (any more)")),
            }
        }
    }

    /// A block became present: it may have been the last.
    pub fn note_present(&mut self) {
        let Some(export) = &mut self.b.export else { return };
        if !export.map.all_present() || std::mem::replace(&mut export.completing, true) {
            return;
        }
        if self.plant == Some(Plant::ReleaseWithoutDurable) {
            self.all_durable();
        } else {
            self.persist(FlushFor::Completion);
        }
    }

    fn flush(&mut self, request: u64) {
        let early = self.plant == Some(Plant::FlushBeforeSync);
        let Some(export) = &mut self.b.export else { return };
        let Some(running) = export.running.get_mut(&request) else { return };
        let nothing = !export.flusher.running && !export.flusher.unflushed;
        if nothing || early {
            running.stage = Stage::Answer(Vec::new());
            self.go(request);
        } else {
            running.stage = Stage::Flush;
            self.persist(FlushFor::Request(request));
        }
        if early {
            self.persist(FlushFor::Time);
        }
    }

    /// Everything that was answered or fetched before becomes durable, and the map.
    pub fn persist(&mut self, whom: FlushFor) {
        let Some(export) = &mut self.b.export else { return };
        export.flusher.waiting.push(whom);
        if !std::mem::replace(&mut export.flusher.running, true) {
            self.next_flush();
        }
    }

    fn next_flush(&mut self) {
        let (Some(export), Some(media)) = (&mut self.b.export, &self.b.media) else { return };
        let flusher = &mut export.flusher;
        if flusher.waiting.is_empty() {
            flusher.running = false;
            return;
        }
        flusher.current = std::mem::take(&mut flusher.waiting);
        let unflushed = std::mem::replace(&mut flusher.unflushed, false);
        flusher.snapshot = (!export.map.take_changed(0, usize::MAX).is_empty()).then(|| export.map.snapshot(0));
        if flusher.snapshot.is_none() && !unflushed {
            return self.flush_ended();
        }
        (flusher.began, flusher.bytes_done) = (media.store.begin_sync(), false);
        let id = export.id;
        let takes = if self.dice.percent(5) && !self.calm { 1000 } else { 15 };
        let takes = self.dice.between(0, takes);
        self.at(takes, Event::Flushed { export: id });
    }

    /// A part of a flush has ended: first the bytes, then the map.
    pub fn flushed(&mut self) {
        let (Some(export), Some(media)) = (&mut self.b.export, &mut self.b.media) else { return };
        let flusher = &mut export.flusher;
        if flusher.bytes_done {
            media.map_file.commit();
            return self.flush_ended();
        }
        media.store.end_sync(flusher.began);
        flusher.bytes_done = true;
        if self.plant == Some(Plant::BitsBeforeBytes) && flusher.snapshot.is_some() {
            flusher.snapshot = Some(export.map.snapshot(0));
        }
        match &flusher.snapshot {
            Some(_)
                if self.plant == Some(Plant::FlushWithoutMap)
                    && flusher.current.iter().any(|it| matches!(it, FlushFor::Request(_))) =>
            {
                export.map.mark_changed(0);
                self.flush_ended();
            }
            Some(words) => {
                media.map_file.write(words);
                let (id, takes) = (export.id, self.dice.between(0, 25));
                self.at(takes, Event::Flushed { export: id });
            }
            None => self.flush_ended(),
        }
    }

    fn flush_ended(&mut self) {
        let Some(export) = &mut self.b.export else { return };
        for whom in std::mem::take(&mut export.flusher.current) {
            match whom {
                FlushFor::Request(request) => {
                    let export = self.b.export.as_mut();
                    if let Some(running) = export.and_then(|export| export.running.get_mut(&request)) {
                        running.stage = Stage::Answer(Vec::new());
                    }
                    self.go(request);
                }
                FlushFor::Completion => self.all_durable(),
                FlushFor::Time => {}
            }
        }
        self.next_flush();
    }

    /// It is time to persist, whoever asked.
    pub fn persist_now_and_then(&mut self) {
        let Some(export) = &self.b.export else { return };
        let id = export.id;
        self.persist(FlushFor::Time);
        let every = self.dice.between(500, 4000);
        self.at(every, Event::Persist { export: id });
    }
}

/// Runs that touch become one.
fn merge(runs: impl Iterator<Item = BlockRange>) -> impl Iterator<Item = BlockRange> {
    let mut merged: Vec<BlockRange> = Vec::new();
    for run in runs {
        match merged.last_mut() {
            Some(last) if last.end == run.start => last.end = run.end,
            _ => merged.push(run),
        }
    }
    merged.into_iter()
}

/// The present bits of a page as blocks.
pub fn is_present(words: &PageWords, block: u64) -> bool {
    debug_assert!((block as usize) < WORDS_PER_PAGE * 64);
    words.present[block as usize / 64] >> (block % 64) & 1 == 1
}
