//! Reads of missing blocks: answered by whoever lands what they wait for.

use std::sync::Arc;

use nbd::export::{LateRead, Promise, ReadReply};
use nbd::wire::Errno;

use super::gate::Refusal;
use super::lazy::Inner;
use super::status::errno_of;
use crate::fetch::{Fault, Fetched, Ticket};
use crate::units::ByteRange;

/// Has a reader answered once the blocks of its range are here.
pub(super) fn promise(inner: &Arc<Inner>, range: ByteRange, reply: ReadReply) -> Promise {
    let Some(fetcher) = &inner.fetcher else {
        reply.send(Ok(LateRead::AtHand));
        return Promise(NOTHING);
    };
    let waiting = Waiting { inner: inner.clone(), range, fault: fetcher.faults.begin(), reply };
    let ticket = fetcher.fetch_then(inner.disk.block_size.cover(range), |brought| waiting.answer(&brought));
    let promise = Promise(ticket.map_or(NOTHING, |Ticket(number)| number));
    if let Err(Refusal::Fail(_)) = inner.gate.serve() {
        // It was closed meanwhile, and this reader may have come too late to be forgotten with the others.
        forget(inner, promise);
    }
    promise
}

/// Its reader is not to be answered any more, or the gate is closed.
pub(super) fn forget(inner: &Inner, promise: Promise) {
    if let Some(fetcher) = &inner.fetcher {
        fetcher.forget(Ticket(promise.0));
    }
}

/// The number of no ticket.
const NOTHING: u64 = 0;

/// A reader that waits. Dropped without an answer, it gets ESHUTDOWN.
struct Waiting {
    inner: Arc<Inner>,
    range: ByteRange,
    fault: Fault,
    reply: ReadReply,
}

impl Waiting {
    fn answer(self, brought: &Fetched) {
        let outcome = self.outcome(brought);
        // Whatever it is, it is no longer the upstream that is waited for.
        self.fault.served();
        self.reply.send(outcome);
    }

    fn outcome(&self, brought: &Fetched) -> Result<LateRead, Errno> {
        let bytes = match brought.is_empty() {
            true => None,
            false => brought.assemble(&self.inner.disk, self.range).map_err(|error| errno_of(&error))?,
        };
        // It may have been fenced meanwhile: then it is asked again, and waits there.
        match (self.inner.gate.serve(), bytes) {
            (Ok(()), Some(bytes)) => Ok(LateRead::Bytes(bytes)),
            (Ok(()) | Err(Refusal::Wait), _) => Ok(LateRead::AtHand),
            (Err(Refusal::Fail(errno)), _) => Err(errno),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;
    use std::time::Duration;

    use bytes::Bytes;
    use nbd::export::Export;

    use super::super::gate::GateMode;
    use super::super::testing::{Lab, Source, done, eventually, quiet, read};
    use super::*;
    use crate::export::LazyExport;

    const SIZE: usize = 1 << 20;

    async fn lab() -> Lab {
        let source = Source::new(Source::pattern(SIZE));
        source.close_valve();
        Lab::new(source, quiet).await
    }

    fn reader(export: &LazyExport, offset: u64, length: usize) -> tokio::task::JoinHandle<Result<Vec<u8>, Errno>> {
        let export = export.clone();
        tokio::spawn(async move { read(&export, offset, length).await })
    }

    #[tokio::test]
    async fn a_reader_whose_bytes_come_while_the_gate_is_held_gets_them_once_it_opens() {
        let lab = lab().await;
        let mut reading = reader(&lab.export, 4096, 4096);
        eventually("the fetch", || lab.source.reads().len() == 1).await;
        lab.export.gate().set(GateMode::Held).await;
        lab.source.let_through(1);
        eventually("its landing", || lab.export.status().present_bytes == 4096).await;
        assert!(tokio::time::timeout(Duration::from_millis(30), &mut reading).await.is_err(), "it is fenced");
        lab.export.gate().set(GateMode::Open).await;
        assert!(reading.await.unwrap().unwrap() == lab.source.bytes[4096..8192]);
        assert_eq!(lab.source.reads(), [(4096, 4096)], "once is enough");
    }

    #[tokio::test]
    async fn who_begins_to_wait_behind_a_gate_that_was_just_closed_is_refused() {
        let lab = lab().await;
        let reading = reader(&lab.export, 0, 4096);
        eventually("the fetch", || lab.source.reads().len() == 1).await;
        assert!(lab.export.longest_wait().is_some());
        lab.export.gate().set(GateMode::Closed).await;
        assert_eq!(reading.await.unwrap(), Err(Errno::ESHUTDOWN));
        // This one has asked the gate before, and went on only now: nobody will forget it with the others.
        let late = nbd::export::promised(&lab.export, 8192, 4096);
        let late = tokio::time::timeout(Duration::from_secs(10), late).await.expect("it waits for ever");
        assert_eq!(late.map(drop), Err(Errno::ESHUTDOWN));
        assert_eq!(lab.export.longest_wait(), None);
        assert_eq!(lab.export.status().faults.count, 0, "they were not served");
    }

    #[tokio::test]
    async fn what_nobody_waits_for_any_more_is_not_sent() {
        let lab = lab().await;
        lab.source.reachable.store(false, Ordering::SeqCst);
        lab.source.cut_all();
        eventually("the cut", || lab.export.status().upstream.last_error.is_some()).await;
        let given_up = reader(&lab.export, 0, 4096);
        eventually("its wait", || lab.export.longest_wait().is_some()).await;
        given_up.abort();
        eventually("its end", || lab.export.longest_wait().is_none()).await;
        lab.source.reachable.store(true, Ordering::SeqCst);
        lab.source.let_through(10);
        assert!(reader(&lab.export, 8192, 4096).await.unwrap().is_ok());
        assert_eq!(lab.source.reads(), [(8192, 4096)]);
    }

    #[tokio::test]
    async fn a_reader_of_what_is_written_meanwhile_gets_what_was_written() {
        let lab = lab().await;
        let reading = reader(&lab.export, 0, 8192);
        eventually("the fetch", || lab.source.reads().len() == 1).await;
        done(lab.export.write(0, Bytes::from(vec![7; 4096]), false)).await.unwrap();
        lab.source.let_through(1);
        let found = reading.await.unwrap().unwrap();
        assert!(found[..4096] == [7; 4096] && found[4096..] == lab.source.bytes[4096..8192]);
        assert_eq!(lab.export.status().faults.count, 1);
    }
}
