//! Mistakes that are made on purpose around the real core: the checks must find each of them.

use std::fmt;

/// A mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plant {
    /// The lease is counted from the answer to a beat instead of from its sending.
    LeaseFromAnswer,
    /// The source takes the disk back at once when the destination is silent.
    SilenceIsEnough,
    /// The destination is told of the handover before that is recorded.
    TellBeforeRecord,
    /// The destination serves before it has recorded that it owns the disk.
    OpenBeforeRecord,
    /// The destination's container is not frozen when the lease ends.
    NoFence,
    /// The destination looks at its lease only by a timer.
    GateWithoutDeadline,
    /// A fence waits until the source has answered that it was released.
    FenceBehindTelling,
    /// The destination hears of its release before that is recorded.
    ReleasedBeforeRecord,
    /// No guard freezes the container while the destination's node stands still.
    NoGuard,
    /// A record counts as durable once it was written, without a sync.
    JournalWithoutSync,
    /// A record that was cut short stays where it is, and the next one is written behind it.
    TornRecordKept,
    /// A record that was cut short is taken as a whole one.
    TornRecordTaken,
    /// The seal does not wait for writes that were admitted before it.
    SealWithoutDrain,
    /// The seal does not make the source's disk durable.
    SealWithoutSync,
    /// Something writes to the source's disk after the handover.
    SourceWritten,
    /// The destination fetches before the disk is handed over.
    FetchBeforeHandover,
    /// A fetch lands on all of its blocks, also on those that were written meanwhile.
    FetchOverWrite,
    /// A partial write of a missing block is not merged with the source's bytes.
    PartialWithoutMerge,
    /// A missing block reads as zeroes while the link is cut.
    ZeroesWhenCut,
    /// Of several who wait for one flight only the first is woken.
    LostWake,
    /// Whoever waits for several flights is woken by each.
    WokenTwice,
    /// A write is acknowledged before its blocks are marked.
    AckBeforeBits,
    /// After a process's death the durable map counts instead of the live one.
    LiveMapForgotten,
    /// After a power loss the live map counts.
    LiveMapTrusted,
    /// The map's bits are taken after the bytes were synced, not before.
    BitsBeforeBytes,
    /// The map's page is written over its last good copy.
    OneSlot,
    /// FLUSH is answered before anything is durable.
    FlushBeforeSync,
    /// FLUSH makes the bytes durable, and not the map.
    FlushWithoutMap,
    /// The source is told that all is durable once all is present.
    ReleaseWithoutDurable,
    /// What the source's tracker says is dropped on the way.
    HeatDropped,
}

impl Plant {
    /// Each of them.
    pub const ALL: [Plant; 30] = [
        Plant::LeaseFromAnswer,
        Plant::SilenceIsEnough,
        Plant::TellBeforeRecord,
        Plant::OpenBeforeRecord,
        Plant::NoFence,
        Plant::GateWithoutDeadline,
        Plant::FenceBehindTelling,
        Plant::ReleasedBeforeRecord,
        Plant::NoGuard,
        Plant::JournalWithoutSync,
        Plant::TornRecordKept,
        Plant::TornRecordTaken,
        Plant::SealWithoutDrain,
        Plant::SealWithoutSync,
        Plant::SourceWritten,
        Plant::FetchBeforeHandover,
        Plant::FetchOverWrite,
        Plant::PartialWithoutMerge,
        Plant::ZeroesWhenCut,
        Plant::LostWake,
        Plant::WokenTwice,
        Plant::AckBeforeBits,
        Plant::LiveMapForgotten,
        Plant::LiveMapTrusted,
        Plant::BitsBeforeBytes,
        Plant::OneSlot,
        Plant::FlushBeforeSync,
        Plant::FlushWithoutMap,
        Plant::ReleaseWithoutDurable,
        Plant::HeatDropped,
    ];
}

/// What must never be broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    OneOwner,
    RecordFirst,
    FreezePoint,
    Reads,
    ProcessDeath,
    PowerLoss,
    Waiters,
    Release,
    Order,
    Journal,
    End,
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Rule::OneOwner => "one owner",
            Rule::RecordFirst => "the record before its effect",
            Rule::FreezePoint => "the source keeps the freeze point",
            Rule::Reads => "a read sees the last acknowledged write, or the freeze point",
            Rule::ProcessDeath => "acknowledged writes survive process death",
            Rule::PowerLoss => "flushed writes survive power loss",
            Rule::Waiters => "every waiter wakes exactly once",
            Rule::Release => "release only on proof",
            Rule::Order => "what was written at the source is pulled first",
            Rule::Journal => "a journal can always be read",
            Rule::End => "the operator's command leads to one owner that serves",
        })
    }
}
