//! What the guard does next: decided from what it sees, without a clock or a system call of its own.

use std::time::Duration;

use crate::units::BootTime;

/// The longest sleep while the deadline is ahead: how soon an order to end, or a deadline that was moved to the front,
/// is noticed.
pub(super) const TURN: Duration = Duration::from_millis(250);
/// How often the guard looks while the deadline is past: a renewal that ends soon after must not be missed, and a group
/// that is not there yet is to be frozen as soon as it is.
const PAST_TURN: Duration = Duration::from_millis(20);
/// How often a frozen group is frozen again, for somebody may have thawed it.
const AGAIN: Duration = Duration::from_millis(250);

/// What the guard sees.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sight {
    /// The time.
    pub(super) now: BootTime,
    /// When everything must stand still; `None` when no lease is needed any more.
    pub(super) deadline: Option<BootTime>,
    /// The lease file has no name any more.
    pub(super) unlinked: bool,
    /// The guard was told to end (SIGTERM).
    pub(super) told_to_end: bool,
}

impl Sight {
    /// Whether the container must stand still. One that is about to be unguarded must as well.
    pub(super) fn must_stand(&self) -> bool {
        self.deadline.is_some_and(|deadline| self.told_to_end || deadline <= self.now)
    }
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// Nothing is left to guard.
    End,
    /// Nothing until then.
    SleepUntil(BootTime),
    /// Freeze now, and tell [`Watch::tried`] how it went.
    Freeze,
}

/// What came of a try to freeze.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tried {
    /// The kernel has been told to freeze the group.
    Frozen,
    /// There is no such group (yet).
    Absent,
    /// The kernel refused.
    Failed,
}

/// The last try.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Watch {
    last: Option<Last>,
}

#[derive(Clone, Copy, Debug)]
struct Last {
    sight: Sight,
    tried: Tried,
}

impl Watch {
    /// What to do now.
    pub(super) fn turn(&self, sight: Sight) -> Turn {
        let (now, Some(deadline)) = (sight.now, sight.deadline) else { return Turn::End };
        if sight.unlinked {
            return Turn::End;
        }
        if !sight.must_stand() {
            return Turn::SleepUntil(deadline.min(now.after(TURN)));
        }
        // A try for another deadline says nothing about this one: the container was thawed in between.
        let same = |last: &&Last| last.sight.deadline == sight.deadline && last.sight.told_to_end == sight.told_to_end;
        let Some(last) = self.last.as_ref().filter(same) else { return Turn::Freeze };
        if sight.told_to_end && last.tried != Tried::Failed {
            return Turn::End;
        }
        let pause = if last.tried == Tried::Frozen { AGAIN } else { PAST_TURN };
        let again = last.sight.now.after(pause);
        if now < again { Turn::SleepUntil(again.min(now.after(PAST_TURN))) } else { Turn::Freeze }
    }

    /// How a freeze went that began at `sight`. Answers whether it is news: the first of its kind for this deadline.
    pub(super) fn tried(&mut self, sight: Sight, tried: Tried) -> bool {
        let before = self.last.replace(Last { sight, tried });
        before.is_none_or(|before| before.sight.deadline != sight.deadline || before.tried != tried)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(milliseconds: u64) -> BootTime {
        BootTime::new(Duration::from_millis(milliseconds))
    }

    fn sight(now: u64, deadline: u64) -> Sight {
        Sight { now: at(now), deadline: Some(at(deadline)), unlinked: false, told_to_end: false }
    }

    #[test]
    fn it_sleeps_to_the_deadline_and_freezes_at_it() {
        let watch = Watch::default();
        assert_eq!(watch.turn(sight(1000, 9000)), Turn::SleepUntil(at(1250)));
        assert_eq!(watch.turn(sight(8900, 9000)), Turn::SleepUntil(at(9000)));
        assert_eq!(watch.turn(sight(8999, 9000)), Turn::SleepUntil(at(9000)));
        assert_eq!(watch.turn(sight(9000, 9000)), Turn::Freeze);
        assert_eq!(watch.turn(sight(0, 0)), Turn::Freeze);
    }

    #[test]
    fn what_is_frozen_is_frozen_again_now_and_then() {
        let mut watch = Watch::default();
        assert!(watch.tried(sight(9000, 9000), Tried::Frozen));
        assert_eq!(watch.turn(sight(9001, 9000)), Turn::SleepUntil(at(9021)));
        assert_eq!(watch.turn(sight(9245, 9000)), Turn::SleepUntil(at(9250)));
        assert_eq!(watch.turn(sight(9250, 9000)), Turn::Freeze);
        assert!(!watch.tried(sight(9250, 9000), Tried::Frozen), "the same is no news");
    }

    #[test]
    fn a_deadline_that_passes_soon_after_a_renewal_is_not_taken_for_the_one_before() {
        let mut watch = Watch::default();
        watch.tried(sight(9000, 9000), Tried::Frozen);
        assert_eq!(watch.turn(sight(9010, 9015)), Turn::SleepUntil(at(9015)));
        assert_eq!(watch.turn(sight(9020, 9015)), Turn::Freeze);
        assert!(watch.tried(sight(9020, 9015), Tried::Frozen));
    }

    #[test]
    fn a_group_that_is_absent_or_refuses_is_tried_again_soon_and_said_once() {
        for tried in [Tried::Absent, Tried::Failed] {
            let mut watch = Watch::default();
            assert!(watch.tried(sight(9000, 9000), tried));
            assert_eq!(watch.turn(sight(9001, 9000)), Turn::SleepUntil(at(9020)));
            assert_eq!(watch.turn(sight(9020, 9000)), Turn::Freeze);
            assert!(!watch.tried(sight(9020, 9000), tried));
            assert!(watch.tried(sight(9040, 9000), Tried::Frozen));
        }
    }

    #[test]
    fn told_to_end_it_freezes_first_even_before_the_deadline() {
        let told = |now| Sight { told_to_end: true, ..sight(now, 9000) };
        for (tried, then) in
            [(Tried::Frozen, Turn::End), (Tried::Absent, Turn::End), (Tried::Failed, Turn::SleepUntil(at(1020)))]
        {
            let mut watch = Watch::default();
            assert_eq!(watch.turn(told(1000)), Turn::Freeze);
            watch.tried(told(1000), tried);
            assert_eq!(watch.turn(told(1001)), then, "{tried:?}");
        }
        // What was frozen long before may have been thawed since.
        let mut watch = Watch::default();
        watch.tried(sight(9000, 9000), Tried::Frozen);
        assert_eq!(watch.turn(told(9001)), Turn::Freeze);
    }

    #[test]
    fn it_ends_when_nothing_is_left_to_guard_and_freezes_nothing_then() {
        let watch = Watch::default();
        assert_eq!(watch.turn(Sight { deadline: None, ..sight(1000, 0) }), Turn::End);
        assert_eq!(watch.turn(Sight { deadline: None, told_to_end: true, ..sight(1000, 0) }), Turn::End);
        assert_eq!(watch.turn(Sight { unlinked: true, ..sight(9000, 9000) }), Turn::End);
    }
}
