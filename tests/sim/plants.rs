//! Mistakes that are made on purpose around the real core: the checks must find each of them.

use std::fmt;

/// A mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plant {
    LeaseFromAnswer,
    SilenceIsEnough,
    TellBeforeRecord,
    OpenBeforeRecord,
    NoFence,
    GateWithoutDeadline,
    FenceBehindTelling,
    ReleasedBeforeRecord,
    NoGuard,
    JournalWithoutSync,
    TornRecordKept,
    TornRecordTaken,
    SealWithoutDrain,
    SealWithoutSync,
    SourceWritten,
    FetchBeforeHandover,
    FetchOverWrite,
    PartialWithoutMerge,
    ZeroesWhenCut,
    LostWake,
    WokenTwice,
    AckBeforeBits,
    LiveMapForgotten,
    LiveMapTrusted,
    BitsBeforeBytes,
    OneSlot,
    FlushBeforeSync,
    FlushWithoutMap,
    ReleaseWithoutDurable,
    HeatDropped,
    HeldFails,
    RestoredAgain,
    StuckForgotten,
}

impl Plant {
    /// Each of them.
    pub const ALL: [Plant; 33] = [
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
        Plant::HeldFails,
        Plant::RestoredAgain,
        Plant::StuckForgotten,
    ];

    /// What is done wrong.
    pub fn mistake(self) -> &'static str {
        match self {
            Plant::LeaseFromAnswer => "the lease is counted from the answer to a beat instead of from its sending",
            Plant::SilenceIsEnough => "the source takes the disk back at once when the destination is silent",
            Plant::TellBeforeRecord => "the destination is told of the handover before that is recorded",
            Plant::OpenBeforeRecord => "the destination serves before it has recorded that it owns the disk",
            Plant::NoFence => "the destination's container is not frozen when the lease ends",
            Plant::GateWithoutDeadline => "the destination looks at its lease only by a timer",
            Plant::FenceBehindTelling => "a fence waits until the source has answered that it was released",
            Plant::ReleasedBeforeRecord => "the destination hears of its release before that is recorded",
            Plant::NoGuard => "no guard freezes the container while the destination's node stands still",
            Plant::JournalWithoutSync => "a record counts as durable once it was written, without a sync",
            Plant::TornRecordKept => {
                "a record that was cut short stays where it is, and the next one is written behind it"
            }
            Plant::TornRecordTaken => "a record that was cut short is taken as a whole one",
            Plant::SealWithoutDrain => "the seal does not wait for writes that were admitted before it",
            Plant::SealWithoutSync => "the seal does not make the source's disk durable",
            Plant::SourceWritten => "something writes to the source's disk after the handover",
            Plant::FetchBeforeHandover => "the destination fetches before the disk is handed over",
            Plant::FetchOverWrite => "a fetch lands on all of its blocks, also on those that were written meanwhile",
            Plant::PartialWithoutMerge => "a partial write of a missing block is not merged with the source's bytes",
            Plant::ZeroesWhenCut => "a missing block reads as zeroes while the link is cut",
            Plant::LostWake => "of several who wait for one flight only the first is woken",
            Plant::WokenTwice => "whoever waits for several flights is woken by each",
            Plant::AckBeforeBits => "a write is acknowledged before its blocks are marked",
            Plant::LiveMapForgotten => "after a process's death the durable map counts instead of the live one",
            Plant::LiveMapTrusted => "after a power loss the live map counts",
            Plant::BitsBeforeBytes => "the map's bits are taken after the bytes were synced, not before",
            Plant::OneSlot => "the map's page is written over its last good copy",
            Plant::FlushBeforeSync => "FLUSH is answered before anything is durable",
            Plant::FlushWithoutMap => "FLUSH makes the bytes durable, and not the map",
            Plant::ReleaseWithoutDurable => "the source is told that all is durable once all is present",
            Plant::HeatDropped => "what the source's tracker says is dropped on the way",
            Plant::HeldFails => "the gate fails what it should hold",
            Plant::RestoredAgain => {
                "the checkpoint is restored a second time, after its container has changed the disk"
            }
            Plant::StuckForgotten => {
                "a new migration begins although the container of the one before does not go on, and forgets it"
            }
        }
    }
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
    Held,
    Memory,
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
            Rule::Held => "held requests wait, they do not fail",
            Rule::Memory => "no old memory on a newer disk",
            Rule::Journal => "a journal can always be read",
            Rule::End => "the operator's command leads to one owner that serves",
        })
    }
}
