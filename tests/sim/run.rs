//! One run: the weather is drawn, the operator types, and everything that happens is checked.

use super::dice::Dice;
use super::plants::{Plant, Rule};
use super::world::note;
use super::world::{A, B, Event, Order, World};
use lazy_migrate::migration::phase::SourcePhase;

/// How long after the storm the operator, who only repeats the documented command, must have arrived at one owner.
const PATIENCE: u64 = 200_000;

/// How a run ended.
pub struct Outcome {
    pub ended: SourcePhase,
    /// The destination had the disk at some time.
    pub handed_over: bool,
    pub broken: Option<(Rule, String)>,
    pub log: Vec<String>,
}

/// How long things go wrong, in milliseconds: mostly a short time.
fn storm(dice: &mut Dice) -> u64 {
    if dice.percent(85) { dice.between(2_000, 8_000) } else { dice.between(8_000, 40_000) }
}

/// Faults that strike at the so-manieth thing that happens after the destination was given the disk: most of them meet
/// something half done there.
struct Ambush {
    after: u64,
    fall: Event,
    down: u64,
}

/// Which kind of trouble a run is about.
#[derive(Clone, Copy, PartialEq)]
enum About {
    /// Who owns the disk: the operator types a lot, links are cut for long.
    Ownership,
    /// What is on the disk: the destination pulls, serves, and falls again and again.
    Data,
}

fn orders(world: &mut World, dice: &mut Dice, about: About, handover: u64, storm: u64) {
    world.at(10, Event::Order(Order::Prepare));
    for again in 0..3 {
        world.at(handover + 400 * again, Event::Order(Order::HandOver));
    }
    let most = if about == About::Ownership { 7 } else { 2 };
    for _ in 0..dice.between(0, most) {
        let order = match dice.between(0, 10) {
            0 | 1 => Order::Prepare,
            2..=5 => Order::HandOver,
            6 => Order::Cancel,
            insist => Order::RollBack { insist: insist > 7 },
        };
        let delay = dice.between(if world.sheltered { handover } else { 100 }, storm);
        world.at(delay, Event::Order(order));
    }
}

fn links(world: &mut World, dice: &mut Dice, about: About, handover: u64, storm: u64) {
    let early = if world.sheltered { handover } else { 100 };
    let long = if about == About::Ownership { storm } else { 900 };
    for _ in 0..dice.between(0, 5) {
        let (delay, long) = (dice.between(early, storm), dice.between(50, long));
        let cut = [[false, false], [true, false], [false, true]][dice.between(0, 3) as usize];
        world.at(delay, Event::Link(cut));
        world.at(delay + long, Event::Link([true, true]));
        if about == About::Ownership {
            nervous(world, dice, delay);
        }
    }
    for _ in 0..dice.between(0, 3) {
        let (host, delay, long) = (dice.between(0, 2) as usize, dice.between(early, storm), dice.between(50, long));
        world.at(delay, Event::Stall(host, long));
        if about == About::Ownership && host == B {
            nervous(world, dice, delay);
        }
    }
}

/// An operator who sees that something is wrong, and perhaps wants the disk back, at once or as soon as it is safe.
fn nervous(world: &mut World, dice: &mut Dice, delay: u64) {
    if dice.percent(50) {
        return;
    }
    let (mut delay, lease) = (delay, world.lease());
    for _ in 0..dice.between(1, 5) {
        delay += dice.between(50, lease);
        let insist = dice.percent(40);
        world.at(delay, Event::Order(Order::RollBack { insist }));
    }
}

fn falls(world: &mut World, dice: &mut Dice, about: About, handover: u64, storm: u64) -> Vec<Ambush> {
    let down = |dice: &mut Dice| {
        let most = if dice.percent(80) { 500 } else { 6000 };
        dice.between(1, most)
    };
    let fall = |dice: &mut Dice, host| if dice.percent(45) { Event::PowerLoss(host) } else { Event::Crash(host) };
    let mut times = Vec::new();
    let most = if about == About::Ownership { 4 } else { 2 };
    for _ in 0..dice.between(0, most) {
        times.push((dice.between(0, 2) as usize, dice.between(100, storm)));
    }
    if dice.percent(40) {
        // Something breaks close to the handover.
        times.push((dice.between(0, 2) as usize, handover + dice.between(0, 600)));
    }
    if world.sheltered {
        times.iter_mut().for_each(|(_, delay)| *delay += handover);
    }
    for (host, delay) in times {
        let (fall, down) = (fall(dice, host), down(dice));
        world.at(delay, fall);
        world.at(delay + down, Event::Restart(host));
    }
    let most = if about == About::Data { 5 } else { 2 };
    let mut ambushes: Vec<Ambush> = (0..dice.between(0, most))
        .map(|_| {
            let host = if dice.percent(85) { B } else { A };
            let soon = if dice.percent(50) { 300 } else { 1500 };
            Ambush { after: dice.between(0, soon), fall: fall(dice, host), down: down(dice) }
        })
        .collect();
    ambushes.sort_by_key(|ambush| std::cmp::Reverse(ambush.after));
    ambushes
}

fn draw(world: &mut World, dice: &mut Dice, storm: u64) -> Vec<Ambush> {
    let about = if dice.percent(50) { About::Ownership } else { About::Data };
    let handover = dice.between(350, 1200);
    orders(world, dice, about, handover, storm);
    links(world, dice, about, handover, storm);
    let ambushes = falls(world, dice, about, handover, storm);
    if world.plant == Some(Plant::SourceWritten) {
        world.at(dice.between(handover, storm), Event::SourceWritten);
    }
    world.at(storm, Event::Calm);
    for event in [Event::ClientA, Event::ClientB, Event::Guard, Event::SourceTick] {
        world.at(0, event);
    }
    ambushes
}

/// One run.
pub fn run(seed: u64, plant: Option<Plant>, logged: bool) -> Outcome {
    let mut world = World::new(seed, plant, logged);
    let mut dice = Dice(!seed);
    let storm = storm(&mut dice);
    let mut ambushes = draw(&mut world, &mut dice, storm);
    let mut happened = 0;
    let patient = if dice.percent(70) { dice.between(5_000, 60_000) } else { 0 };
    // The clients go on for a while after the storm.
    let ending = storm + dice.between(0, 1500);
    world.at(storm + 10, Event::Check);
    while let Some(event) = world.next_event() {
        let asks = matches!(event, Event::Check);
        world.happens(event);
        happened += u64::from(world.b.model.is_some());
        if let Some(Ambush { fall, down, .. }) = ambushes.pop_if(|ambush| ambush.after <= happened && !world.calm) {
            if let Event::PowerLoss(host) | Event::Crash(host) = fall {
                world.at(down, Event::Restart(host));
            }
            world.happens(fall);
        }
        if asks {
            world.ending |= world.now >= ending;
            match world.source_phase() {
                SourcePhase::Preparing | SourcePhase::Frozen => world.order(Order::Cancel),
                SourcePhase::HandedOver if world.now < storm + patient => world.order(Order::HandOver),
                SourcePhase::HandedOver => world.order(Order::RollBack { insist: true }),
                SourcePhase::Serving if world.is_stuck() => world.order(Order::RollBack { insist: false }),
                SourcePhase::RolledBack | SourcePhase::Serving | SourcePhase::Released => {}
            }
            let pause = dice.between(300, 900);
            world.at(pause, Event::Check);
        }
        world.check();
        let settled = asks && world.ending && world.is_settled();
        if world.broken.is_none() && (settled || world.now > storm + PATIENCE) {
            world.check_end();
            break;
        }
        if world.broken.is_some() {
            break;
        }
    }
    Outcome {
        ended: world.source_phase(),
        handed_over: happened > 0,
        broken: world.broken,
        log: world.log.unwrap_or_default(),
    }
}

impl World {
    /// The source's container does not go on, and the operator is told so.
    fn is_stuck(&self) -> bool {
        self.a.machine.as_ref().is_some_and(|machine| machine.stuck().is_some())
    }

    fn is_export(&self, id: u64) -> bool {
        self.b.export.as_ref().is_some_and(|export| export.id == id)
    }

    /// One event, unless it belongs to a life that is over.
    fn happens(&mut self, event: Event) {
        match event {
            Event::SourceDone { life, effect, ok } if life == self.hosts[A].life => self.source_done(effect, ok),
            Event::DestinationDone { life, effect, ok } if life == self.generation => self.destination_done(effect, ok),
            Event::Question(envelope) => self.question_arrives(envelope),
            Event::Answer(envelope, reply) => self.answer_arrives(&envelope, reply),
            Event::Beat { life } if life == self.generation => self.beat(),
            Event::Restored { life, migration } if life == self.generation => self.container_restored(migration),
            Event::ColdStart { life } if life == self.generation => self.cold_start(),
            Event::Verified { life } if life == self.generation => self.verify(),
            Event::Looked { life } if life == self.generation => self.looked(),
            Event::Guard => self.guard(),
            Event::SourceTick => self.source_tick(),
            Event::Go { export, request } if self.is_export(export) => self.go(request),
            Event::Land(landing) if self.is_export(landing.export) => self.landing(landing),
            Event::Flushed { export } if self.is_export(export) => self.flushed(),
            Event::Persist { export } if self.is_export(export) => self.persist_now_and_then(),
            Event::Pump { export } if self.is_export(export) => self.pump(),
            Event::Dialled { export, lane } if self.is_export(export) => self.dialled(lane),
            Event::Data { from: B, message } if self.hosts[A].up => self.data(B, message),
            Event::Data { from: A, message } => self.data(A, message),
            Event::Lost(message) => self.connection_lost(message),
            Event::ClientA => self.client_at_a(),
            Event::ClientB => self.client_at_b(),
            Event::StepA { life, request, last } if life == self.hosts[A].life => self.step_at_a(request, last),
            Event::SourceWritten if self.a.freeze.is_some() => self.write_at_the_source(),
            Event::Order(order) => self.order(order),
            Event::Crash(host) if !self.calm => self.crash(host),
            Event::PowerLoss(host) if !self.calm => self.power_loss(host),
            Event::Restart(host) if !self.calm => self.restart(host),
            Event::Link(link) if !self.calm => {
                note!(self, "link from A {}, from B {}", link[0], link[1]);
                self.link = link;
            }
            Event::Stall(host, long) if !self.calm && self.hosts[host].up => {
                note!(self, "{}'s node stands still for {long} ms", ["A", "B"][host]);
                self.hosts[host].stalled_until = self.now + long;
            }
            Event::Calm => self.becomes_calm(),
            _ => {}
        }
    }
}
