//! The listener: addresses, stale sockets, limits, orderly shutdown.

mod common;

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use common::{Probe, Verdict, until, within};
use nbd::address::Address;
use nbd::client::{Client, ConnectOptions};
use nbd::memory::{MemoryDisk, SingleExport};
use nbd::server::{ListenError, Listener, ServeOptions};
use nbd::uri::NbdUri;
use nbd::wire::{Command, Errno};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

fn exports() -> Arc<SingleExport> {
    Arc::new(SingleExport::new("disk", Arc::new(MemoryDisk::zeroed(1 << 20))))
}

fn uri(listener: &Listener) -> NbdUri {
    NbdUri { address: listener.address().clone(), export: "disk".into(), tls: false }
}

fn run(listener: Listener, exports: Arc<SingleExport>, options: ServeOptions) -> (CancellationToken, JoinHandle<()>) {
    let shutdown = CancellationToken::new();
    let running = tokio::spawn(listener.run(exports, options, shutdown.clone()));
    (shutdown, running)
}

#[tokio::test]
async fn tcp_and_unix_are_served_and_end_in_order() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let unix = Address::Unix(path.clone());
    for address in [unix, "127.0.0.1:0".parse().unwrap(), "[::1]:0".parse().unwrap()] {
        let listener = Listener::bind(&address).await.unwrap();
        let uri = uri(&listener);
        let (shutdown, running) = run(listener, exports(), ServeOptions::default());
        let client = Client::connect(&uri, &ConnectOptions::default()).await.unwrap();
        assert_eq!(client.read(0, 4096).await.unwrap().len(), 4096);
        shutdown.cancel();
        within(running).await.unwrap();
        assert!(within(client.closed()).await.is_closed());
        assert!(Client::connect(&uri, &ConnectOptions::default()).await.is_err());
    }
    assert!(!path.exists(), "the socket is removed");
}

#[tokio::test]
async fn a_unix_socket_is_its_owners_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let _listener = Listener::bind(&Address::Unix(path.clone())).await.unwrap();
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
}

#[tokio::test]
async fn only_a_socket_without_a_server_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let address = Address::Unix(path.clone());
    // A server that died leaves its socket.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let first = Listener::bind(&address).await.unwrap();
    let second = Listener::bind(&address).await.map(drop).unwrap_err();
    assert!(matches!(second, ListenError::InUse(_)), "{second}");
    // A server that lost its path to another does not remove the other's.
    std::fs::remove_file(&path).unwrap();
    let other = Listener::bind(&address).await.unwrap();
    drop(first);
    assert!(path.exists());
    drop(other);
    assert!(!path.exists());
    std::fs::write(&path, "precious").unwrap();
    let error = Listener::bind(&address).await.map(drop).unwrap_err();
    assert!(matches!(error, ListenError::NotASocket(_)), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}

#[tokio::test]
async fn an_address_in_use_is_told() {
    let first = Listener::bind(&"127.0.0.1:0".parse().unwrap()).await.unwrap();
    let error = Listener::bind(first.address()).await.map(drop).unwrap_err();
    assert!(error.to_string().contains("another server is listening there"), "{error}");
    let error = Listener::bind(&Address::Unix("/nonexistent/s".into())).await.map(drop).unwrap_err();
    assert!(matches!(error, ListenError::Io { .. }), "{error}");
}

#[tokio::test]
async fn clients_beyond_the_limit_wait_for_their_turn() {
    let listener = Listener::bind(&"127.0.0.1:0".parse().unwrap()).await.unwrap();
    let uri = uri(&listener);
    let options = ServeOptions { max_connections: 2, ..ServeOptions::default() };
    let (shutdown, running) = run(listener, exports(), options);
    let connect = || {
        let uri = uri.clone();
        tokio::spawn(async move { Client::connect(&uri, &ConnectOptions::default()).await })
    };
    let one = within(connect()).await.unwrap().unwrap();
    let two = within(connect()).await.unwrap().unwrap();
    let three = connect();
    two.read(0, 1).await.unwrap();
    assert!(!three.is_finished());
    one.close().await;
    let three = within(three).await.unwrap().unwrap();
    assert_eq!(three.read(0, 1).await.unwrap().len(), 1);
    shutdown.cancel();
    within(running).await.unwrap();
}

#[tokio::test]
async fn a_shutdown_waits_for_requests_in_flight() {
    let gate = CancellationToken::new();
    let wait = gate.clone();
    let export = Arc::new(Probe::new(1 << 20, move |call| match call.0 {
        Command::FLUSH => Verdict::FailAfter(wait.clone(), Errno::ENOSPC),
        _ => Verdict::Go,
    }));
    let listener = Listener::bind(&"127.0.0.1:0".parse().unwrap()).await.unwrap();
    let uri = uri(&listener);
    let exports = Arc::new(SingleExport::new("disk", export.clone()));
    let (shutdown, running) = run(listener, exports, ServeOptions::default());
    let client = Client::connect(&uri, &ConnectOptions::default()).await.unwrap();
    let flush = tokio::spawn(async move { client.flush().await });
    until("the flush at the export", || export.calls().len() == 1).await;
    shutdown.cancel();
    gate.cancel();
    let answer = within(flush).await.unwrap().unwrap_err();
    assert!(answer.to_string().contains("ENOSPC"), "the answer of the export, not a broken connection: {answer}");
    within(running).await.unwrap();
}
