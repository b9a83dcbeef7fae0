//! The data connections between the hosts: one for what readers wait for, two for the background pull. A connection on
//! which a message was lost carries nothing any more, and is noticed to be dead some time later.

use std::collections::BTreeSet;
use std::time::Duration;

use lazy_migrate::fetch::queue::{Cargo, Carrier, Class, FlightId, Outgoing};
use lazy_migrate::limits::RETRY_MIN;
use lazy_migrate::pull::Step;
use lazy_migrate::units::{BlockRange, ByteRange};

use super::export::Media;
use super::plants::{Plant, Rule};
use super::shape::Value;
use super::world::note;
use super::world::{A, B, Event, World};

/// One lane and its connection.
#[derive(Default)]
pub struct Lane {
    carrier: Option<Carrier>,
    dialling: bool,
    broken: bool,
    asked_maps: bool,
    flying: BTreeSet<FlightId>,
}

/// The lane of what readers wait for.
const DEMAND: usize = 0;
/// Requests that a lane has on its way at once.
const DEPTH: usize = 4;

/// A request on a connection, or the answer to it.
#[derive(Clone, Debug)]
pub struct Message {
    pub export: u64,
    lane: usize,
    carrier: Carrier,
    body: Body,
}

#[derive(Clone, Debug)]
enum Body {
    Read(Outgoing),
    /// The bytes, or a refusal.
    Bytes(Outgoing, Option<Vec<Value>>),
    AskMaps,
    Maps {
        heat: Vec<(ByteRange, u32)>,
        hot: Vec<bool>,
        zero: Vec<ByteRange>,
    },
}

/// A flight whose bytes are on their way into the store.
#[derive(Clone, Debug)]
pub struct Landing {
    pub export: u64,
    flight: Outgoing,
    parts: Vec<BlockRange>,
    values: Option<Vec<Value>>,
    written: Option<bool>,
}

impl World {
    /// Lets every lane send what it may.
    pub fn pump(&mut self) {
        for lane in 0..3 {
            self.pump_lane(lane);
        }
    }

    fn pump_lane(&mut self, lane: usize) {
        let Some(export) = &mut self.b.export else { return };
        let background = lane != DEMAND;
        let wanted = if background { export.pulling && !export.map.all_present() } else { !export.queue.is_idle() };
        let id = export.id;
        let Some(carrier) = export.lanes[lane].carrier else {
            if wanted && !std::mem::replace(&mut export.lanes[lane].dialling, true) {
                let takes = self.dice.between(1, 60);
                self.at(takes, Event::Dialled { export: id, lane });
            }
            return;
        };
        if background && wanted && export.hot.is_none() {
            if !std::mem::replace(&mut export.lanes[lane].asked_maps, true) {
                self.send_data(B, Message { export: id, lane, carrier, body: Body::AskMaps });
            }
            return;
        }
        while let Some(flight) = if background { self.next_background(carrier) } else { self.next_demand(carrier) } {
            if flight.cargo == Cargo::Zeroes {
                self.land(flight, None);
                continue;
            }
            if let Some(export) = &mut self.b.export {
                export.lanes[lane].flying.insert(flight.id);
            }
            self.send_data(B, Message { export: id, lane, carrier, body: Body::Read(flight) });
        }
    }

    fn queue_time(&self) -> Duration {
        Duration::from_millis(self.now)
    }

    fn next_demand(&mut self, carrier: Carrier) -> Option<Outgoing> {
        let now = self.queue_time();
        let export = self.b.export.as_mut()?;
        if export.lanes[DEMAND].flying.len() >= DEPTH {
            return None;
        }
        let flight = export.queue.poll(Class::Demand, carrier, now);
        let later = export.queue.next_timeout();
        if flight.is_none() {
            self.pump_later(later);
        }
        flight
    }

    fn next_background(&mut self, carrier: Carrier) -> Option<Outgoing> {
        let now = self.queue_time();
        let mut rewound = false;
        loop {
            let export = self.b.export.as_mut()?;
            let demand = export.queue.in_flight(Class::Demand) > 0;
            let window = if demand { 1 } else { self.window };
            if !export.pulling || export.queue.in_flight(Class::Background) >= window {
                return None;
            }
            if let Some(flight) = export.queue.poll(Class::Background, carrier, now) {
                return Some(flight);
            }
            match export.order.next(self.window, &export.map) {
                Some(step) => {
                    let missing: Vec<BlockRange> = export.map.missing_in(step.range()).collect();
                    let cargo = if matches!(step, Step::Zero(_)) { Cargo::Zeroes } else { Cargo::Bytes };
                    export.queue.background(&missing, cargo);
                    self.check_order(step.range());
                }
                None if !rewound && export.queue.is_idle() && !export.map.all_present() => {
                    export.order.rewind();
                    export.named = None;
                    rewound = true;
                }
                None => {
                    if !export.map.all_present() {
                        let at = export.queue.next_timeout().unwrap_or(now + RETRY_MIN);
                        self.pump_later(Some(at));
                    }
                    return None;
                }
            }
        }
    }

    /// While only the order decides, what the source's container wrote is named before what it did not.
    fn check_order(&mut self, step: BlockRange) {
        let Some(export) = &mut self.b.export else { return };
        let (Some(hot), Some(named)) = (&export.hot, &mut export.named) else { return };
        step.iter().for_each(|block| named[block.0 as usize] = true);
        if hot[step.start.0 as usize] {
            return;
        }
        let forgotten = |block: &u64| {
            let one =
                BlockRange::new(lazy_migrate::units::BlockIndex(*block), lazy_migrate::units::BlockIndex(block + 1));
            hot[*block as usize] && !named[*block as usize] && !export.map.is_present(one)
        };
        if let Some(block) = (0..export.map.blocks()).find(forgotten) {
            self.violate(Rule::Order, || {
                format!("block {} is pulled before block {block}, which was written", step.start.0)
            });
        }
    }

    fn pump_later(&mut self, at: Option<Duration>) {
        let (Some(export), Some(at)) = (&mut self.b.export, at) else { return };
        let at = (at.as_millis() as u64).max(self.now + 1);
        if export.pump_at.is_none_or(|earlier| at < earlier || earlier <= self.now) {
            export.pump_at = Some(at);
            let id = export.id;
            self.at(at - self.now, Event::Pump { export: id });
        }
    }

    /// A connection was made, or not.
    pub fn dialled(&mut self, lane: usize) {
        let works = self.link == [true; 2] && self.hosts[A].up && (self.calm || !self.dice.percent(5));
        self.carriers += 1;
        let carrier = Carrier(self.carriers);
        let most = if self.calm { 100 } else { 1500 };
        let pause = self.dice.between(30, most);
        let Some(export) = &mut self.b.export else { return };
        let id = export.id;
        if works {
            export.lanes[lane] = Lane { carrier: Some(carrier), ..Lane::default() };
            self.pump_lane(lane);
        } else {
            self.at(pause, Event::Dialled { export: id, lane });
        }
    }

    /// Puts a message on its connection.
    fn send_data(&mut self, from: usize, message: Message) {
        let lost = !self.link[from] || (!self.calm && self.dice.percent(2));
        let Some(lane) = self.lane_of(&message) else { return };
        if lost || lane.broken {
            lane.broken = true;
            let most = if self.calm { 200 } else { 2500 };
            let noticed = self.dice.between(20, most);
            return self.at(noticed, Event::Lost(message));
        }
        let most = if !self.calm && self.dice.percent(4) { 2000 } else { 25 };
        let delay = self.dice.between(1, most);
        self.at(delay, Event::Data { from, message });
    }

    fn lane_of(&mut self, message: &Message) -> Option<&mut Lane> {
        let export = self.b.export.as_mut().filter(|export| export.id == message.export)?;
        Some(&mut export.lanes[message.lane]).filter(|lane| lane.carrier == Some(message.carrier))
    }

    /// A connection is noticed to be dead: what it carried goes over the next one.
    pub fn connection_lost(&mut self, message: Message) {
        let Some(lane) = self.lane_of(&message) else { return };
        *lane = Lane::default();
        if let Some(export) = &mut self.b.export {
            export.queue.lost(message.carrier);
            note!(self, "B: {:?} is lost", message.carrier);
        }
        self.pump();
    }

    /// The source's process is gone, and with it every connection.
    pub fn connections_break(&mut self) {
        let Some(export) = &mut self.b.export else { return };
        let id = export.id;
        let mut dead = Vec::new();
        for (index, lane) in export.lanes.iter_mut().enumerate() {
            if let Some(carrier) = lane.carrier {
                lane.broken = true;
                dead.push(Message { export: id, lane: index, carrier, body: Body::AskMaps });
            }
        }
        for message in dead {
            let noticed = self.dice.between(1, 500);
            self.at(noticed, Event::Lost(message));
        }
    }

    /// A message arrives.
    pub fn data(&mut self, from: usize, message: Message) {
        match (from, message.body.clone()) {
            (B, Body::Read(flight)) => {
                let refused = !self.calm && self.dice.percent(2);
                let values = self.a.store.cache[self.shape.cells_of(flight.range)].to_vec();
                let body = Body::Bytes(flight, (!refused).then_some(values));
                self.send_data(A, Message { body, ..message });
            }
            (B, _) => {
                let body = self.maps();
                self.send_data(A, Message { body, ..message });
            }
            (_, body) => {
                let Some(lane) = self.lane_of(&message) else { return };
                match body {
                    Body::Bytes(flight, values) => {
                        lane.flying.remove(&flight.id);
                        match values {
                            Some(_) => self.land(flight, values),
                            None => self.refused(flight.id),
                        }
                    }
                    Body::Maps { heat, hot, zero } => {
                        if let Some(export) = self.b.export.as_mut().filter(|export| export.hot.is_none()) {
                            export.order.set_heat(&heat);
                            export.order.set_zero(zero);
                            export.hot = Some(hot);
                        }
                    }
                    Body::Read(_) | Body::AskMaps => {}
                }
                self.pump();
            }
        }
    }

    fn refused(&mut self, flight: FlightId) {
        let now = self.queue_time();
        if let Some(export) = &mut self.b.export {
            export.queue.failed(flight, now);
        }
    }

    /// What the source tells of its disk: where it was written, and where it is zero.
    fn maps(&self) -> Body {
        let bytes = |block: u64| {
            let start = lazy_migrate::units::BlockIndex(block);
            let range = BlockRange::new(start, lazy_migrate::units::BlockIndex(block + 1));
            (range, self.shape.bytes(&self.shape.cells_of(range)))
        };
        let is_zero = |range| self.a.store.cache[self.shape.cells_of(range)].iter().all(|value| *value == 0);
        let zero = (0..self.shape.blocks()).map(bytes).filter(|(range, _)| is_zero(*range)).map(|(_, bytes)| bytes);
        let heat =
            if self.plant == Some(Plant::HeatDropped) { Vec::new() } else { self.a.tracker.heat(self.queue_time()) };
        Body::Maps { heat, hot: self.a.written.clone(), zero: zero.collect() }
    }

    /// The bytes of a flight are here: into the store, then into the map, then to those who wait.
    fn land(&mut self, flight: Outgoing, values: Option<Vec<Value>>) {
        let Some(export) = &mut self.b.export else { return };
        let mut parts = export.queue.arrived(flight.id);
        if self.plant == Some(Plant::FetchOverWrite) {
            parts = std::iter::once(flight.range).collect();
        }
        let landing = Landing { export: export.id, flight, parts: parts.to_vec(), values, written: None };
        let pause = self.dice.between(0, 4);
        self.at(pause, Event::Land(landing));
    }

    /// A landing goes on.
    pub fn landing(&mut self, landing: Landing) {
        let Some(written) = landing.written else {
            // Now and then the store takes no bytes.
            let written = self.calm || !self.dice.percent(2);
            if let (true, Some(media)) = (written, &mut self.b.media) {
                write_parts(media, self.shape, &landing);
            }
            let pause = self.dice.between(0, 3);
            return self.at(pause, Event::Land(Landing { written: Some(written), ..landing }));
        };
        let Some(export) = &mut self.b.export else { return };
        if written {
            landing.parts.iter().for_each(|part| {
                export.map.set_present(*part);
            });
        }
        let landed = export.queue.landed(landing.flight.id);
        note!(self, "B: {:?} has landed on {:?}: {landed:?}", landing.flight, landing.parts);
        let Some(export) = &mut self.b.export else { return };
        if let Some(values) = &landing.values {
            let first = self.shape.cells_of(landing.flight.range).start;
            for ticket in &landed.joined {
                let request = export.waiters.get(ticket);
                let Some(running) = request.and_then(|request| export.running.get_mut(request)) else { continue };
                for block in landing.parts.iter().flat_map(|part| part.iter()) {
                    let one = BlockRange::new(block, lazy_migrate::units::BlockIndex(block.0 + 1));
                    let cells = self.shape.cells_of(one);
                    running.brought.insert(block.0, values[cells.start - first..cells.end - first].to_vec());
                }
            }
        }
        let woken = match self.plant {
            Some(Plant::LostWake) => landed.finished.into_iter().take(1).collect(),
            Some(Plant::WokenTwice) => landed.joined,
            _ => landed.finished,
        };
        self.wake(woken);
        self.note_present();
        self.pump();
    }

    /// The export begins to pull.
    pub fn start_pull(&mut self) {
        if let Some(export) = &mut self.b.export {
            export.pulling = true;
        }
        self.pump();
    }

    /// The pull is over: everything is durable.
    pub fn all_durable(&mut self) {
        note!(self, "B: every block is durable");
        if let Some(export) = &mut self.b.export {
            export.pulling = false;
        }
        self.destination_all_durable();
    }
}

fn write_parts(media: &mut Media, shape: super::shape::Shape, landing: &Landing) {
    let first = shape.cells_of(landing.flight.range).start;
    for part in &landing.parts {
        for cell in shape.cells_of(*part) {
            let value = landing.values.as_ref().map_or(0, |values| values[cell - first]);
            media.store.write(cell, value);
        }
    }
}
