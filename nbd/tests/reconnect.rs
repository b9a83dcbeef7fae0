//! A client whose connection is lost, and made anew.

mod common;

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use common::{Probe, Verdict, until, within};
use nbd::client::{Client, ClientError, ConnectOptions, Reconnect};
use nbd::export::Export;
use nbd::memory::SingleExport;
use nbd::server::{Ended, ServeOptions, ServerError, serve_connection};
use nbd::wire::{Command, Errno};
use tokio::io::{DuplexStream, duplex};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

const SIZE: usize = 1 << 20;

/// One connection's task, and what shuts it down.
type Served = (JoinHandle<Result<Ended, ServerError>>, CancellationToken);

/// Our server behind a dialer that the test can make fail, with the connections that were made.
#[derive(Clone)]
struct Place {
    export: Arc<Mutex<Arc<dyn Export>>>,
    down: Arc<Mutex<bool>>,
    dials: Arc<AtomicUsize>,
    connections: Arc<Mutex<Vec<Served>>>,
}

impl Place {
    fn of(export: Arc<dyn Export>) -> Place {
        Place {
            export: Arc::new(Mutex::new(export)),
            down: Arc::default(),
            dials: Arc::default(),
            connections: Arc::default(),
        }
    }

    fn dial(&self) -> Result<DuplexStream, ClientError> {
        self.dials.fetch_add(1, Ordering::Relaxed);
        if *self.down.lock().unwrap() {
            let source = Arc::new(io::ErrorKind::ConnectionRefused.into());
            return Err(ClientError::Connect { address: "nowhere".parse().unwrap(), source });
        }
        let (stream, server) = duplex(65536);
        let exports = Arc::new(SingleExport::new("disk", self.export.lock().unwrap().clone()));
        let shutdown = CancellationToken::new();
        let token = shutdown.clone();
        let serving =
            tokio::spawn(async move { serve_connection(server, exports, &ServeOptions::default(), token).await });
        self.connections.lock().unwrap().push((serving, shutdown));
        Ok(stream)
    }

    async fn connect(&self, reconnect: Reconnect) -> Client {
        let place = self.clone();
        let dial = move || std::future::ready(place.dial());
        let contexts = vec!["base:allocation".to_owned()];
        let options = ConnectOptions { reconnect: Some(reconnect), contexts, ..ConnectOptions::default() };
        within(Client::dialled(dial, "disk", &options)).await.unwrap()
    }

    fn cut(&self) {
        self.connections.lock().unwrap().last().unwrap().0.abort();
    }

    fn shut_down(&self) {
        self.connections.lock().unwrap().last().unwrap().1.cancel();
    }
}

fn quick() -> Reconnect {
    Reconnect { first_pause: Duration::from_millis(1), longest_pause: Duration::from_millis(5), ..Reconnect::default() }
}

#[tokio::test]
async fn what_was_not_answered_is_sent_again_in_order() {
    let gate = CancellationToken::new();
    let wait = gate.clone();
    let export = Arc::new(Probe::new(SIZE, move |call| match call.0 {
        Command::WRITE => Verdict::After(wait.clone()),
        _ => Verdict::Go,
    }));
    let place = Place::of(export.clone());
    let client = place.connect(quick()).await;
    let mut writes = Vec::new();
    for index in 0..20u64 {
        let client = client.clone();
        writes.push(tokio::spawn(async move { client.write(index * 512, Bytes::from(vec![7; 512]), true).await }));
        until("the write at the server", || export.calls().len() as u64 == index + 1).await;
    }
    place.cut();
    until("the writes at the server again", || export.calls().len() == 40).await;
    let calls = export.calls();
    assert_eq!(calls[20..], calls[..20], "the same, in the same order, with FUA");
    gate.cancel();
    for write in writes {
        within(write).await.unwrap().unwrap();
    }
    assert_eq!(place.dials.load(Ordering::Relaxed), 2);
    let status = within(client.block_status("base:allocation", 0, SIZE as u64)).await.unwrap();
    assert_eq!((status[0].length, status[0].flags), (12288, 0));
}

#[tokio::test]
async fn requests_wait_while_there_is_no_server() {
    let place = Place::of(Arc::new(Probe::new(SIZE, |_| Verdict::Go)));
    let client = place.connect(quick()).await;
    *place.down.lock().unwrap() = true;
    place.cut();
    let read = tokio::spawn({
        let client = client.clone();
        async move { client.read(0, 4096).await }
    });
    until("some attempts", || place.dials.load(Ordering::Relaxed) >= 5).await;
    assert!(!read.is_finished() && !client.is_closed());
    *place.down.lock().unwrap() = false;
    assert_eq!(within(read).await.unwrap().unwrap(), vec![0; 4096]);
}

#[tokio::test]
async fn a_server_that_drains_is_waited_for() {
    let gate = CancellationToken::new();
    let wait = gate.clone();
    let export = Arc::new(Probe::new(SIZE, move |call| match call.0 {
        Command::READ => Verdict::After(wait.clone()),
        _ => Verdict::Go,
    }));
    let place = Place::of(export.clone());
    let client = place.connect(quick()).await;
    let read = tokio::spawn({
        let client = client.clone();
        async move { client.read(0, 4096).await }
    });
    until("the read at the server", || export.calls().len() == 1).await;
    place.shut_down();
    tokio::task::yield_now().await;
    // Refused with ESHUTDOWN while the read holds the connection open; done on the next one.
    let write = tokio::spawn({
        let client = client.clone();
        async move { client.write(0, Bytes::from_static(b"late"), false).await }
    });
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
    assert_eq!((export.calls().len(), write.is_finished()), (1, false), "not refused");
    gate.cancel();
    within(read).await.unwrap().unwrap();
    within(write).await.unwrap().unwrap();
    assert_eq!(place.dials.load(Ordering::Relaxed), 2);
    assert_eq!(&export.disk.content()[..4], b"late");
}

#[tokio::test]
async fn it_gives_up_when_it_was_told_to() {
    let place = Place::of(Arc::new(Probe::new(SIZE, |_| Verdict::Go)));
    let client = place.connect(Reconnect { give_up_after: Some(Duration::from_millis(20)), ..quick() }).await;
    *place.down.lock().unwrap() = true;
    place.cut();
    let error = within(client.read(0, 1)).await.unwrap_err();
    assert!(error.is_closed() && error.to_string().contains("no new connection within 0.02 s"), "{error}");
}

#[tokio::test]
async fn another_export_is_not_taken_for_the_same() {
    let place = Place::of(Arc::new(Probe::new(SIZE, |_| Verdict::Go)));
    let client = place.connect(quick()).await;
    *place.export.lock().unwrap() = Arc::new(Probe::new(2 * SIZE, |_| Verdict::Go));
    place.cut();
    let error = within(client.read(0, 1)).await.unwrap_err();
    assert!(error.to_string().contains("another export than before: its size differs"), "{error}");
}

#[tokio::test]
async fn a_refusal_is_not_repeated_and_a_closed_client_does_not_dial() {
    let export = Arc::new(Probe::new(SIZE, |call| match call.0 {
        Command::WRITE => Verdict::Fail(Errno::ENOSPC),
        _ => Verdict::Go,
    }));
    let place = Place::of(export.clone());
    let client = place.connect(quick()).await;
    let error = client.write(0, Bytes::from_static(b"x"), false).await.unwrap_err();
    assert!(matches!(error, ClientError::Refused { error: Errno::ENOSPC, .. }), "{error}");
    assert_eq!(export.calls().len(), 1);
    *place.down.lock().unwrap() = true;
    place.cut();
    until("an attempt", || place.dials.load(Ordering::Relaxed) >= 2).await;
    within(client.close()).await;
    assert!(client.is_closed(), "its task has ended, and with it the dialing");
}
