//! The peer link: questions and answers between the nodes.

use std::time::Duration;

use lazy_migrate::migration::lease::Beat;
use lazy_migrate::migration::machine::{BeatAnswer, Grant};
use lazy_migrate::migration::phase::DestinationPhase;
use lazy_migrate::units::Epoch;

use super::world::{A, B, Event, World};

#[derive(Clone, Debug)]
pub enum Body {
    Prepare,
    Handover(Beat),
    Resume,
    Discard(Option<Beat>),
    Beat(Beat, DestinationPhase),
    Complete(Grant),
}

/// A question on its way, or being answered.
#[derive(Clone, Debug)]
pub struct Envelope {
    pub call: u64,
    pub from: usize,
    pub lives: [u64; 2],
    pub migration: String,
    pub epoch: Epoch,
    pub body: Body,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Reply {
    Yes,
    No,
    /// Another command is being done.
    Busy,
    Beat(BeatAnswer),
    /// Nobody answered in time.
    Silence,
}

/// What a question is for.
#[derive(Clone, Copy, Debug)]
pub enum Purpose {
    Prepare,
    Told,
    Discard,
    Cancel,
    Resume,
    Beat(Beat),
    Complete,
    /// Asked by a planted bug; the answer is nobody's.
    Stray,
}

impl World {
    fn lives(&self) -> [u64; 2] {
        [self.hosts[A].life, self.hosts[B].life]
    }

    /// Asks the other host; the answer, or silence after `within`, comes as an event.
    pub fn call(&mut self, from: usize, body: Body, within: Duration, purpose: Purpose) {
        let (migration, epoch) = if from == A {
            let Some(machine) = &self.a.machine else { return };
            (machine.record().migration.0.clone(), machine.record().epoch)
        } else {
            let Some(machine) = &self.b.machine else { return };
            (machine.record().migration.0.clone(), machine.record().epoch)
        };
        self.next_id += 1;
        let envelope = Envelope { call: self.next_id, from, lives: self.lives(), migration, epoch, body };
        self.calls.insert(envelope.call, (from, self.life(from), purpose));
        self.at(within.as_millis() as u64, Event::Answer(envelope.clone(), Reply::Silence));
        self.send(from, Event::Question(envelope));
    }

    /// Puts a message on the link.
    fn send(&mut self, from: usize, message: Event) {
        let copies = if self.is_quiet() || self.dice.percent(90) { 1 } else { 2 };
        for _ in 0..copies {
            if !self.calm && (!self.link[from] || (!self.is_quiet() && self.dice.percent(4))) {
                continue;
            }
            let most = if !self.is_quiet() && self.dice.percent(6) { self.lease() * 2 } else { 60 };
            let delay = self.dice.between(1, most);
            self.at(delay, message.clone());
        }
    }

    pub fn reply(&mut self, envelope: &Envelope, reply: Reply) {
        self.send(1 - envelope.from, Event::Answer(envelope.clone(), reply));
    }

    /// An answer, or the end of waiting for it: whoever asked is told once.
    pub fn answer_arrives(&mut self, envelope: &Envelope, reply: Reply) {
        if reply != Reply::Silence && envelope.lives != self.lives() {
            return;
        }
        let Some((host, life, purpose)) = self.calls.remove(&envelope.call) else {
            // The machine may get a beat's answer at any time, and twice: the lease counts from the sending.
            let ours = self.b.machine.as_ref().is_some_and(|it| it.record().migration.0 == envelope.migration);
            if let (Body::Beat(beat, _), Reply::Beat(answer), true) = (&envelope.body, reply, ours) {
                self.beat_answered(*beat, answer);
            }
            return;
        };
        if life != self.life(host) {
            return;
        }
        if host == A { self.source_hears(purpose, reply) } else { self.destination_hears(purpose, reply) }
    }

    pub fn question_arrives(&mut self, envelope: Envelope) {
        let to = 1 - envelope.from;
        if envelope.lives == self.lives() && self.hosts[to].up {
            if to == B { self.destination_asked(envelope) } else { self.source_asked(envelope) }
        }
    }
}
