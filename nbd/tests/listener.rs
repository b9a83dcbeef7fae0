//! The listener: addresses, stale sockets, limits, orderly shutdown.

mod common;

use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use common::{Probe, Verdict, until, within};
use nbd::address::Address;
use nbd::client::{Client, ClientError, ConnectOptions};
use nbd::memory::{MemoryDisk, SingleExport};
use nbd::server::{ListenError, Listener, ServeOptions};
use nbd::uri::NbdUri;
use nbd::wire::{Command, Errno, OptionCode, OptionHeader, OptionReply, OptionReplyHeader};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

fn exports() -> Arc<SingleExport> {
    Arc::new(SingleExport::new("disk", Arc::new(MemoryDisk::zeroed(1 << 20))))
}

fn uri(listener: &Listener) -> NbdUri {
    NbdUri::new(listener.address().clone(), "disk")
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

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_unix_socket_is_never_open_to_others_not_even_for_a_moment() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let end = CancellationToken::new();
    let watcher = std::thread::spawn({
        let (path, end) = (path.clone(), end.clone());
        move || {
            let mut seen = std::collections::BTreeSet::new();
            while !end.is_cancelled() {
                seen.extend(std::fs::symlink_metadata(&path).map(|found| found.permissions().mode() & 0o777));
            }
            seen
        }
    });
    for _ in 0..300 {
        drop(Listener::bind(&Address::Unix(path.clone())).await.unwrap());
    }
    let _listener = Listener::bind(&Address::Unix(path.clone())).await.unwrap();
    let kept = std::fs::read_dir(directory.path()).unwrap().count();
    assert_eq!(kept, 1, "nothing but the socket stays");
    end.cancel();
    let seen: Vec<u32> = watcher.join().unwrap().into_iter().collect();
    assert_eq!(seen, [0o600]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_servers_that_start_at_once_on_a_dead_ones_path_one_has_it() {
    for _ in 0..50 {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let address = Address::Unix(path.clone());
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let start = Arc::new(tokio::sync::Barrier::new(4));
        let servers: Vec<_> = (0..4)
            .map(|_| {
                let (start, address) = (start.clone(), address.clone());
                tokio::spawn(async move {
                    start.wait().await;
                    Listener::bind(&address).await
                })
            })
            .collect();
        let mut winners = Vec::new();
        for server in servers {
            match within(server).await.unwrap() {
                Ok(listener) => winners.push(listener),
                Err(error) => assert!(matches!(error, ListenError::InUse(_)), "{error:?}"),
            }
        }
        assert_eq!(winners.len(), 1);
        let uri = uri(&winners[0]);
        let (_shutdown, _running) = run(winners.remove(0), exports(), ServeOptions::default());
        Client::connect(&uri, &ConnectOptions::default()).await.expect("the path is the winner's");
    }
}

#[tokio::test]
async fn a_path_is_taken_over_by_one_server_at_a_time() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let lock = directory.path().join("s.lock");
    // Left by a server that was killed: nobody holds it.
    std::fs::write(&lock, "").unwrap();
    drop(Listener::bind(&Address::Unix(path.clone())).await.unwrap());
    assert!(!lock.exists());
    // Another server is about to take the dead one's path: it holds the lock, and then listens.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let held = std::fs::File::create(&lock).unwrap();
    held.lock().unwrap();
    let waiting = tokio::spawn({
        let address = Address::Unix(path.clone());
        async move { Listener::bind(&address).await }
    });
    tokio::time::timeout(Duration::from_millis(50), std::future::pending::<()>()).await.unwrap_err();
    assert!(!waiting.is_finished());
    std::fs::remove_file(&path).unwrap();
    let _other = std::os::unix::net::UnixListener::bind(&path).unwrap();
    drop(held);
    let error = within(waiting).await.unwrap().map(drop).unwrap_err();
    assert!(matches!(error, ListenError::InUse(_)), "{error}");
    assert!(std::os::unix::net::UnixStream::connect(&path).is_ok(), "the other's path is left alone");
}

#[tokio::test]
async fn a_server_too_busy_to_accept_is_a_server() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket};
    let unix = |flags| socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap();
    let (server, there) = (unix(SockFlag::empty()), UnixAddr::new(&path).unwrap());
    bind(server.as_raw_fd(), &there).unwrap();
    listen(&server, Backlog::new(1).unwrap()).unwrap();
    let mut clients = Vec::new();
    loop {
        let client = unix(SockFlag::SOCK_NONBLOCK);
        match connect(client.as_raw_fd(), &there) {
            Ok(()) => clients.push(client),
            Err(full) => break assert_eq!(full, nix::errno::Errno::EAGAIN),
        }
    }
    let error = Listener::bind(&Address::Unix(path.clone())).await.map(drop).unwrap_err();
    assert!(matches!(error, ListenError::InUse(_)), "{error}");
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

#[tokio::test]
async fn clients_in_the_handshake_do_not_take_the_place_of_others() {
    let listener = Listener::bind(&"127.0.0.1:0".parse().unwrap()).await.unwrap();
    let Address::Tcp { host, port } = listener.address().clone() else { panic!("not TCP") };
    let uri = uri(&listener);
    let options = ServeOptions {
        max_connections: 1,
        max_handshakes: 3,
        handshake_time: Duration::from_secs(2),
        ..ServeOptions::default()
    };
    let (shutdown, running) = run(listener, exports(), options);
    let mut silent = Vec::new();
    for _ in 0..2 {
        silent.push(TcpStream::connect((host.as_str(), port)).await.unwrap());
    }
    let client = within(Client::connect(&uri, &ConnectOptions::default())).await.unwrap();
    assert_eq!(client.read(0, 10).await.unwrap().len(), 10);
    // The place for connections is taken, so that the next waits at the end of its handshake, until its time is over.
    let error = within(Client::connect(&uri, &ConnectOptions::default())).await.map(drop).unwrap_err();
    assert!(matches!(error, ClientError::Handshake(_)), "{error}");
    assert_eq!(client.read(0, 10).await.unwrap().len(), 10, "and does not disturb who has it");
    drop(silent);
    shutdown.cancel();
    within(running).await.unwrap();
}

#[tokio::test]
async fn a_client_in_the_handshake_is_told_of_the_shutdown() {
    let listener = Listener::bind(&"127.0.0.1:0".parse().unwrap()).await.unwrap();
    let Address::Tcp { host, port } = listener.address().clone() else { panic!("not TCP") };
    let (shutdown, running) = run(listener, exports(), ServeOptions::default());
    let mut stream = TcpStream::connect((host.as_str(), port)).await.unwrap();
    stream.read_exact(&mut [0; 18]).await.unwrap();
    stream.write_all(&[0, 0, 0, 3]).await.unwrap();
    let mut out = BytesMut::new();
    OptionHeader::encode(OptionCode::LIST, b"", &mut out);
    shutdown.cancel();
    tokio::task::yield_now().await;
    stream.write_all(&out).await.unwrap();
    let mut head = [0; OptionReplyHeader::LENGTH];
    within(stream.read_exact(&mut head)).await.unwrap();
    let refused = OptionReplyHeader::decode(&head).unwrap();
    assert_eq!((refused.option, refused.reply), (OptionCode::LIST, OptionReply::ERR_SHUTDOWN));
    within(stream.read_exact(&mut vec![0; refused.length as usize])).await.unwrap();
    out.clear();
    OptionHeader::encode(OptionCode::ABORT, b"", &mut out);
    stream.write_all(&out).await.unwrap();
    within(stream.read_exact(&mut head)).await.unwrap();
    assert_eq!(OptionReplyHeader::decode(&head).unwrap().reply, OptionReply::ACK);
    within(running).await.unwrap();
}
