//! The clients: what runs in the container, reduced to requests. Those of the destination stay in the kernel while the
//! node's process is away, and are sent again to the next one.

use std::collections::BTreeMap;
use std::ops::Range;

use super::dice::Dice;
use super::model::{Mark, some_cells};
use super::plants::{Plant, Rule};
use super::shape::Value;
use super::world::note;
use super::world::{A, B, Event, Gate, World};

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Read,
    Write(Value),
    /// Writes zeroes.
    Zero,
    /// Gives blocks back: whole ones read as zeroes, of the others nothing is promised.
    Trim,
    Flush,
}

/// A request, and what the model said when it was sent.
#[derive(Clone, Debug)]
pub struct ClientRequest {
    pub kind: Kind,
    pub cells: Range<usize>,
    /// The answer means durable.
    pub fua: bool,
    mark: Mark,
}

/// Requests that a client has on their way at once.
const DEPTH: usize = 6;

impl World {
    fn chosen(dice: &mut Dice, value: Value) -> Kind {
        match dice.between(0, 100) {
            0..42 => Kind::Read,
            42..80 => Kind::Write(value),
            80..85 => Kind::Zero,
            85..90 => Kind::Trim,
            _ => Kind::Flush,
        }
    }

    /// A new request, unless it would meet another one on its cells.
    fn compose(&mut self, host: usize) -> Option<ClientRequest> {
        self.next_value += 1;
        let kind = Self::chosen(&mut self.dice, self.next_value);
        let cells = if kind == Kind::Flush { 0..self.shape.cells } else { some_cells(&mut self.dice, self.shape) };
        let fua = matches!(kind, Kind::Write(_) | Kind::Zero) && self.dice.percent(15);
        let (pending, model): (&BTreeMap<u64, ClientRequest>, _) = if host == A {
            (&self.a.pending, Some(&mut self.a.model))
        } else {
            (&self.b.kernel, self.b.model.as_mut())
        };
        let model = model?;
        let meets = |other: &ClientRequest| {
            let overlap = other.cells.start < cells.end && cells.start < other.cells.end;
            let both_read = other.kind == Kind::Read && kind == Kind::Read;
            overlap && !both_read && kind != Kind::Flush && other.kind != Kind::Flush
        };
        if pending.len() >= DEPTH || pending.values().any(meets) {
            return None;
        }
        let mark = match kind {
            Kind::Read | Kind::Flush => model.mark(&cells),
            Kind::Write(value) => model.send(&cells, value),
            Kind::Zero | Kind::Trim => model.send(&cells, 0),
        };
        Some(ClientRequest { kind, cells, fua, mark })
    }

    /// The destination's client has something to ask.
    pub fn client_at_b(&mut self) {
        let pause = self.dice.between(2, self.busy);
        self.at(pause, Event::ClientB);
        let active = self.b.attached && (!self.container || self.hosts[B].runs) && !self.ending;
        if !active {
            return;
        }
        let Some(request) = self.compose(B) else { return };
        self.next_id += 1;
        let id = self.next_id;
        note!(self, "B's client {id}: {:?} {:?}", request.kind, request.cells);
        self.b.kernel.insert(id, request);
        self.submit(id);
    }

    /// The destination answers.
    pub fn answered(&mut self, id: u64, values: Vec<Value>) {
        let Some(request) = self.b.kernel.remove(&id) else {
            return self.violate(Rule::Waiters, || format!("request {id} is answered a second time"));
        };
        note!(self, "B answers {id}: {values:?}");
        let shape = self.shape;
        let Some(model) = &mut self.b.model else { return };
        let cells = &request.cells;
        match request.kind {
            Kind::Read => {
                if let Some(cell) = model.wrong_read(cells, &request.mark, &values) {
                    let (seen, text) = (values[cell - cells.start], model.describe(cell));
                    self.violate(Rule::Reads, || format!("a read saw {seen} in {text}"));
                }
            }
            Kind::Write(_) | Kind::Zero => {
                model.acknowledge(cells, &request.mark);
                if request.fua {
                    model.flushed_part(cells, &request.mark);
                }
            }
            Kind::Trim => {
                let inside = shape.cells_of(shape.inside(cells));
                if !inside.is_empty() {
                    let sent = &request.mark[inside.start - cells.start..inside.end - cells.start];
                    model.acknowledge(&inside, sent);
                }
            }
            Kind::Flush => model.flushed(&request.mark),
        }
    }

    /// The source's client has something to ask. Its requests are done in two steps, so that a seal may come between.
    pub fn client_at_a(&mut self) {
        let pause = self.dice.between(2, self.busy);
        self.at(pause, Event::ClientA);
        let active = self.hosts[A].up && (!self.container || self.hosts[A].runs) && !self.ending;
        if !active || self.hosts[A].gate == Gate::Closed {
            return;
        }
        let admitted = self.hosts[A].gate == Gate::Open;
        let Some(request) = self.compose(A) else { return };
        if !admitted && request.kind != Kind::Read {
            // Refused: nothing was changed.
            return;
        }
        self.next_id += 1;
        let (id, life) = (self.next_id, self.hosts[A].life);
        note!(self, "A's client {id}: {:?} {:?}", request.kind, request.cells);
        if request.kind == Kind::Flush || request.fua {
            self.a.syncs.insert(id, self.a.store.begin_sync());
        }
        self.a.pending.insert(id, request);
        let takes = self.dice.between(0, 8);
        self.at(takes, Event::StepA { life, request: id, last: false });
    }

    /// A request of the source's client goes on.
    pub fn step_at_a(&mut self, id: u64, last: bool) {
        let Some(request) = self.a.pending.get(&id).cloned() else { return };
        let life = self.hosts[A].life;
        let middle = request.cells.start + request.cells.len() / 2;
        let part = if last { middle..request.cells.end } else { request.cells.start..middle };
        match request.kind {
            Kind::Write(value) => part.for_each(|cell| self.a.store.write(cell, value)),
            Kind::Zero | Kind::Trim => part.for_each(|cell| self.a.store.write(cell, 0)),
            Kind::Read | Kind::Flush => {}
        }
        if !last {
            let takes = self.dice.between(0, 6);
            return self.at(takes, Event::StepA { life, request: id, last: true });
        }
        self.a.pending.remove(&id);
        let (cells, mark) = (&request.cells, &request.mark);
        match request.kind {
            Kind::Read => {
                let seen = &self.a.store.cache[cells.clone()];
                if let Some(cell) = self.a.model.wrong_read(cells, mark, seen) {
                    let (seen, text) = (seen[cell - cells.start], self.a.model.describe(cell));
                    self.violate(Rule::Reads, || format!("a read at the source saw {seen} in {text}"));
                }
            }
            Kind::Flush => {
                let began = self.a.syncs.remove(&id).unwrap_or_default();
                self.a.store.end_sync(began);
                self.a.model.flushed(mark);
            }
            _ => {
                let bytes = self.shape.bytes(cells);
                self.a.tracker.record(std::time::Duration::from_millis(self.now), bytes);
                for block in self.shape.cover(cells).iter() {
                    self.a.written[block.0 as usize] = true;
                }
                self.a.model.acknowledge(cells, mark);
                if request.fua {
                    let began = self.a.store.begin_sync();
                    self.a.store.end_sync(began);
                    self.a.model.flushed_part(cells, mark);
                }
            }
        }
    }

    /// How many changes were admitted at the source and have not ended.
    pub fn passes_at_a(&self) -> usize {
        if self.plant == Some(Plant::SealWithoutDrain) {
            return 0;
        }
        self.a.pending.values().filter(|it| !matches!(it.kind, Kind::Read | Kind::Flush)).count()
    }

    /// Something writes to the source's disk behind its node's back: a planted bug.
    pub fn write_at_the_source(&mut self) {
        let (cell, value) = (self.dice.between(0, self.shape.cells as u64) as usize, self.next_value + 1);
        self.next_value = value;
        self.a.store.write(cell, value);
    }
}
