//! READs whose answers an export has promised.

mod common;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::Bytes;
use common::plain::{Plain, Served};
use common::{Raw, until, within};
use nbd::export::{ExportInfo, LateRead, Promise, ReadAnswer, ReadReply};
use nbd::limits::MAX_REQUESTS_IN_FLIGHT;
use nbd::server::{Draining, Ended, ServeOptions};
use nbd::wire::{ChunkFlags, Command, Errno, Framing};

const SIZE: u64 = 1 << 20;

fn content(offset: u64, length: usize) -> Bytes {
    (offset..offset + length as u64).map(|at| (at / 512 * 7 + at) as u8).collect()
}

/// Promises everything; what stands in `present` it has.
#[derive(Default)]
struct Promising(Mutex<State>);

#[derive(Default)]
struct State {
    /// By where the reads begin.
    promised: HashMap<u64, (usize, ReadReply)>,
    present: HashSet<u64>,
    forgotten: Vec<u64>,
}

impl Promising {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    fn send(&self, offset: u64) {
        let (length, reply) = self.state().promised.remove(&offset).expect("it was promised");
        reply.send(Ok(LateRead::Bytes(content(offset, length))));
    }
}

impl Plain for Promising {
    fn info(&self) -> ExportInfo {
        ExportInfo { size: SIZE, ..ExportInfo::default() }
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> ReadAnswer {
        if !self.state().present.contains(&offset) {
            return ReadAnswer::Promised;
        }
        buffer.copy_from_slice(&content(offset, buffer.len()));
        ReadAnswer::Now(Ok(()))
    }

    fn promise(&self, offset: u64, length: usize, reply: ReadReply) -> Promise {
        self.state().promised.insert(offset, (length, reply));
        Promise(offset)
    }

    fn forget(&self, promise: Promise) {
        let reply = {
            let mut state = self.state();
            state.forgotten.push(promise.0);
            state.promised.remove(&promise.0)
        };
        drop(reply);
    }
}

async fn enter(export: &Arc<Promising>, options: ServeOptions) -> Raw {
    Raw::enter_with(Arc::new(Served(export.clone())), Framing::Structured, options, 1 << 20).await
}

async fn asked(export: &Promising, count: usize) {
    until("the promises", || export.state().promised.len() == count).await;
}

/// The next reply is that to a read of so many bytes at `cookie` * 4096.
async fn expect_data(client: &mut Raw, cookie: u64, length: usize) {
    let (head, payload) = client.chunk().await;
    assert_eq!((head.cookie, head.flags), (cookie, ChunkFlags::DONE));
    assert!(payload[..8] == (cookie * 4096).to_be_bytes() && payload[8..] == content(cookie * 4096, length));
}

#[tokio::test]
async fn answers_come_as_they_are_sent_from_any_thread_each_to_its_request() {
    let export = Arc::new(Promising::default());
    let mut client = enter(&export, ServeOptions::default()).await;
    let length = |cookie: u64| 512 + 100 * cookie as usize;
    for cookie in 1..=40 {
        client.send(Command::READ, cookie, cookie * 4096, length(cookie) as u64).await;
    }
    client.assert_in_step().await;
    // Singly, in another order than they were asked.
    for cookie in [7, 3, 40] {
        export.send(cookie * 4096);
        expect_data(&mut client, cookie, length(cookie)).await;
    }
    // Many at once, from elsewhere; a place that became free is used again meanwhile.
    client.send(Command::READ, 50, 50 * 4096, length(50) as u64).await;
    asked(&export, 38).await;
    let sender = export.clone();
    let mut left: HashSet<u64> = (1..=40).chain([50]).filter(|cookie| ![7, 3, 40].contains(cookie)).collect();
    let cookies = left.clone();
    std::thread::spawn(move || cookies.into_iter().for_each(|cookie| sender.send(cookie * 4096))).join().unwrap();
    while !left.is_empty() {
        let (head, payload) = client.chunk().await;
        assert!(left.remove(&head.cookie), "{} twice", head.cookie);
        assert!(payload[8..] == content(head.cookie * 4096, length(head.cookie)));
    }
    client.assert_in_step().await;
    assert!(export.state().forgotten.is_empty());
}

#[tokio::test]
async fn an_answer_may_be_an_error_or_to_ask_again_and_a_dropped_one_is_refused() {
    let export = Arc::new(Promising::default());
    let mut client = enter(&export, ServeOptions::default()).await;
    for cookie in 1..=4 {
        client.send(Command::READ, cookie, cookie * 4096, 4096).await;
    }
    asked(&export, 4).await;
    let take = |cookie: u64| export.state().promised.remove(&(cookie * 4096)).unwrap().1;
    take(1).send(Err(Errno::ENOSPC));
    assert_eq!(client.error(Command::READ).await, Errno::ENOSPC.0);
    drop(take(2));
    assert_eq!(client.error(Command::READ).await, Errno::ESHUTDOWN.0);
    // Asked again, it is still not there: promised once more.
    take(3).send(Ok(LateRead::AtHand));
    asked(&export, 2).await;
    export.state().present.insert(3 * 4096);
    take(3).send(Ok(LateRead::AtHand));
    expect_data(&mut client, 3, 4096).await;
    // Bytes that are not what was asked for are nobody's.
    take(4).send(Ok(LateRead::Bytes(Bytes::from_static(b"short"))));
    assert_eq!(client.error(Command::READ).await, Errno::EIO.0);
    client.assert_in_step().await;
}

#[tokio::test]
async fn what_a_client_that_leaves_was_promised_is_forgotten() {
    let export = Arc::new(Promising::default());
    let options = ServeOptions { drain_time: Duration::from_millis(1), ..ServeOptions::default() };
    let mut client = enter(&export, options).await;
    for cookie in 1..=3 {
        client.send(Command::READ, cookie, cookie * 4096, 4096).await;
    }
    asked(&export, 3).await;
    export.send(2 * 4096);
    expect_data(&mut client, 2, 4096).await;
    drop(client.stream);
    assert!(matches!(within(client.ended).await.unwrap(), Ok(Ended::Closed)));
    let mut state = export.state();
    state.forgotten.sort_unstable();
    assert_eq!(state.forgotten, [4096, 3 * 4096]);
}

#[tokio::test]
async fn a_server_that_shuts_down_waits_for_what_was_promised() {
    let export = Arc::new(Promising::default());
    let options = ServeOptions { draining: Draining::Refuse, ..ServeOptions::default() };
    let mut client = enter(&export, options).await;
    client.send(Command::READ, 1, 4096, 4096).await;
    asked(&export, 1).await;
    client.shutdown.cancel();
    let refused = (2, Errno::ESHUTDOWN.0);
    while {
        client.send(Command::FLUSH, 2, 0, 0).await;
        client.finished().await != refused
    } {}
    export.send(4096);
    expect_data(&mut client, 1, 4096).await;
    assert!(matches!(within(client.ended).await.unwrap(), Ok(Ended::ShutDown)));
    assert!(export.state().forgotten.is_empty());
}

#[tokio::test]
async fn no_more_are_promised_than_may_be_in_flight() {
    let export = Arc::new(Promising::default());
    let mut client = enter(&export, ServeOptions::default()).await;
    for cookie in 0..MAX_REQUESTS_IN_FLIGHT as u64 + 10 {
        client.send(Command::READ, cookie, cookie * 512, 512).await;
    }
    asked(&export, MAX_REQUESTS_IN_FLIGHT).await;
    let held = tokio::time::timeout(Duration::from_millis(50), asked(&export, MAX_REQUESTS_IN_FLIGHT + 1));
    assert!(held.await.is_err(), "one too many");
    export.send(0);
    assert_eq!(client.chunk().await.0.cookie, 0);
    // The one that was sent has made room for another.
    until("the next", || export.state().promised.contains_key(&(MAX_REQUESTS_IN_FLIGHT as u64 * 512))).await;
}

#[tokio::test]
async fn whoever_reads_by_hand_is_promised_too() {
    let export = Arc::new(Promising::default());
    let served = Arc::new(Served(export.clone()));
    let reader = served.clone();
    let read = tokio::spawn(async move {
        let mut buffer = [0; 100];
        nbd::export::read(reader.as_ref(), 4096, &mut buffer).await.map(|()| buffer)
    });
    asked(&export, 1).await;
    export.send(4096);
    assert!(within(read).await.unwrap().unwrap()[..] == content(4096, 100));
    let mut buffer = [0; 100];
    let given_up =
        tokio::time::timeout(Duration::from_millis(5), nbd::export::read(served.as_ref(), 8192, &mut buffer));
    assert!(given_up.await.is_err());
    assert!(export.state().forgotten.contains(&8192));
}
