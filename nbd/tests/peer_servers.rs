//! Our client on servers of others: qemu-nbd and nbdkit, with and without what they can leave out.

mod common;
#[path = "common/peers.rs"]
mod peers;

use std::time::{Duration, Instant};

use bytes::Bytes;
use common::within;
use nbd::client::{Client, ClientError, ConnectOptions, Reconnect, list};
use nbd::export::{STATE_HOLE, STATE_ZERO, ZeroMode};
use nbd::wire::{Errno, Framing};
use peers::{NbdServer, TheirServer};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const SIZE: usize = 64 << 20;

fn options() -> ConnectOptions {
    ConnectOptions { contexts: vec!["base:allocation".to_owned()], ..ConnectOptions::default() }
}

fn random_bytes(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    StdRng::seed_from_u64(7).fill_bytes(&mut bytes);
    bytes
}

/// Every command on a disk of [`SIZE`] zeroes, checked by reading back.
async fn exercise(client: &Client) {
    assert_eq!(client.info().size, SIZE as u64);
    let data = Bytes::from(random_bytes(40 << 20));
    // Longer than one request may be.
    client.write(0, data.clone(), false).await.unwrap();
    client.write(50 << 20, data.slice(..100_000), true).await.unwrap();
    assert!(client.read(0, data.len()).await.unwrap() == data);
    let many = (0..200u64).map(|index| client.read(index * 12345, 4096));
    for (index, piece) in futures::future::try_join_all(many).await.unwrap().into_iter().enumerate() {
        assert!(piece == data[index * 12345..][..4096], "read {index}");
    }
    client.write_zeroes(1 << 20, 8 << 20, ZeroMode::default(), true).await.unwrap();
    client.write_zeroes(10 << 20, 1 << 20, ZeroMode { no_hole: true, fast: false }, false).await.unwrap();
    client.flush().await.unwrap();
    let mut expected = data[..12 << 20].to_vec();
    expected[1 << 20..9 << 20].fill(0);
    expected[10 << 20..11 << 20].fill(0);
    assert!(client.read(0, 12 << 20).await.unwrap() == expected);
    client.trim(20 << 20, 1 << 20, false).await.unwrap();
    assert!(client.read(50 << 20, 100_000).await.unwrap() == data[..100_000]);
}

/// The extents from `offset` to the end, by as many requests as it takes.
async fn map(client: &Client) -> Vec<(u64, bool)> {
    let mut map: Vec<(u64, bool)> = Vec::new();
    let mut at = 0;
    while at < SIZE as u64 {
        for extent in client.block_status("base:allocation", at, SIZE as u64 - at).await.unwrap() {
            assert!(extent.length > 0);
            at += extent.length;
            let zero = extent.flags & (STATE_HOLE | STATE_ZERO) != 0;
            match map.last_mut() {
                Some((length, last)) if *last == zero => *length += extent.length,
                _ => map.push((extent.length, zero)),
            }
        }
    }
    assert_eq!(at, SIZE as u64);
    map
}

#[tokio::test]
async fn qemu_nbd_does_every_command() {
    let mut server = TheirServer::qemu_nbd(&vec![0; SIZE]);
    let client = server.connect(&options()).await;
    // A QEMU newer than Debian 12's has extended headers.
    assert!(client.info().framing >= Framing::Structured);
    within(exercise(&client)).await;
    client.close().await;
    let image = std::fs::read(server.image()).unwrap();
    assert!(image[..1 << 20] == random_bytes(1 << 20), "what was written is in the file");
    // The map of a sparse file.
    std::fs::write(server.image(), vec![7; SIZE / 2]).unwrap();
    std::fs::File::options().write(true).open(server.image()).unwrap().set_len(SIZE as u64).unwrap();
    let client = server.connect(&options()).await;
    assert_eq!(within(map(&client)).await, [(SIZE as u64 / 2, false), (SIZE as u64 / 2, true)]);
    let error = server.try_connect("nope", &options()).await.map(drop).unwrap_err();
    assert!(matches!(&error, ClientError::Negotiation(refused) if refused.to_string().contains("no export \"nope\"")));
}

#[tokio::test]
async fn nbdkit_does_every_command() {
    let size = SIZE.to_string();
    for (arguments, structured, multi_conn) in [
        (vec!["memory", &size], true, true),
        (vec!["--no-sr", "memory", &size], false, true),
        (vec!["--mask-handshake=0", "memory", &size], false, true),
        (vec!["--filter=noextents", "memory", &size], true, true),
        (vec!["--filter=noparallel", "memory", &size, "serialize=all-requests"], true, true),
        (vec!["--filter=nofilter", "memory", &size], true, true),
        (vec!["--filter=delay", "-t", "4", "memory", &size, "delay-write=1ms"], true, true),
        (vec!["--filter=cache", "memory", &size], true, true),
        (vec!["--filter=fua", "memory", &size, "fuamode=emulate"], true, true),
        (vec!["--filter=blocksize", "memory", &size, "minblock=4096", "maxdata=64k"], true, true),
        (vec!["--filter=multi-conn", "memory", &size, "multi-conn-mode=disable"], true, false),
    ] {
        let mut server = TheirServer::nbdkit(&arguments);
        let client = server.connect(&options()).await;
        assert_eq!(
            (client.info().framing.has_chunks(), client.info().can_multi_conn()),
            (structured, multi_conn),
            "{arguments:?}"
        );
        within(exercise(&client)).await;
        let contexts = client.info().contexts.len();
        assert_eq!(contexts, usize::from(structured), "{arguments:?}");
        if arguments[0] == "--filter=noextents" {
            assert_eq!(map(&client).await, [(SIZE as u64, false)]);
        }
        client.close().await;
    }
}

#[tokio::test]
async fn nbdkit_serves_a_file() {
    let content = random_bytes(1_000_003);
    let mut server = TheirServer::nbdkit_file(&content);
    let client = server.connect(&options()).await;
    assert!(client.read(0, content.len()).await.unwrap() == content);
    client.write(999_999, Bytes::from_static(b"last"), true).await.unwrap();
    assert_eq!(&std::fs::read(server.image()).unwrap()[999_999..], b"last");
}

#[tokio::test]
async fn slow_replies_overlap() {
    let size = SIZE.to_string();
    let mut server = TheirServer::nbdkit(&["--filter=delay", "-t", "32", "memory", &size, "rdelay=200ms"]);
    let client = server.connect(&options()).await;
    let begin = Instant::now();
    futures::future::try_join_all((0..32).map(|index| client.read(index * 4096, 4096))).await.unwrap();
    assert!(begin.elapsed() < Duration::from_millis(32 * 200 / 4), "one after the other: {:?}", begin.elapsed());
}

#[tokio::test]
async fn errors_are_told_and_the_connection_goes_on() {
    let size = SIZE.to_string();
    let arguments = ["--filter=error", "memory", &size, "error-pread=ENOSPC", "error-pread-rate=1"];
    for plain in [false, true] {
        let mut arguments = arguments.to_vec();
        if plain {
            arguments.insert(0, "--no-sr");
        }
        let mut server = TheirServer::nbdkit(&arguments);
        let client = server.connect(&options()).await;
        for _ in 0..3 {
            let error = client.read(4096, 512).await.unwrap_err();
            assert!(matches!(error, ClientError::Refused { error: Errno::ENOSPC, .. }), "{error}");
            client.write(0, Bytes::from_static(b"still here"), false).await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_server_that_dies_is_noticed() {
    let size = SIZE.to_string();
    let mut server = TheirServer::nbdkit(&["--filter=delay", "memory", &size, "rdelay=60"]);
    let client = server.connect(&options()).await;
    let read = tokio::spawn({
        let client = client.clone();
        async move { client.read(0, 4096).await }
    });
    client.write(0, Bytes::from_static(b"x"), false).await.unwrap();
    server.kill();
    assert!(within(read).await.unwrap().unwrap_err().is_closed());
    assert!(within(client.closed()).await.is_closed());
}

#[tokio::test]
async fn minimum_blocks_are_kept() {
    let size = SIZE.to_string();
    let policy = ["blocksize-minimum=512", "blocksize-preferred=4096", "blocksize-maximum=65536"];
    let mut arguments = vec!["--filter=blocksize-policy", "memory", &size, "blocksize-error-policy=error"];
    arguments.extend(policy);
    let mut server = TheirServer::nbdkit(&arguments);
    let client = server.connect(&options()).await;
    assert_eq!((client.info().minimum_block, client.info().longest_request()), (512, 65536));
    assert!(matches!(client.read(1, 512).await, Err(ClientError::Impossible { .. })));
    let data = Bytes::from(random_bytes(1 << 20));
    client.write(512, data.clone(), false).await.unwrap();
    assert!(client.read(512, data.len()).await.unwrap() == data);
}

#[tokio::test]
async fn nbd_server_does_every_command() {
    let server = NbdServer::start(&vec![0; SIZE]).await;
    let client = within(server.connect("disk", &options())).await.unwrap();
    assert_eq!((client.info().framing, client.info().contexts.len()), (Framing::Simple, 0));
    assert!(matches!(client.block_status("base:allocation", 0, 1).await, Err(ClientError::NoContext(_))));
    within(exercise(&client)).await;
    client.close().await;
    let image = std::fs::read(server.directory.path().join("image")).unwrap();
    assert!(image[..1 << 20] == random_bytes(1 << 20), "what was written is in the file");
    assert!(within(server.connect("nope", &options())).await.is_err());
}

#[tokio::test]
async fn a_sparse_disk_is_copied_with_its_holes() {
    let mut server = TheirServer::nbdkit(&["sparse-random", "64M", "percent=20", "seed=1", "runlength=524288"]);
    let client = server.connect(&options()).await;
    let map = within(map(&client)).await;
    assert!(map.len() > 3, "{map:?}");
    let mut at = 0;
    for (length, zero) in map {
        let data = client.read(at, length as usize).await.unwrap();
        assert!(!zero || data.iter().all(|byte| *byte == 0), "at {at}");
        at += length;
    }
}

#[tokio::test]
async fn exports_have_names() {
    let arguments = ["--filter=exportname", "memory", "1M", "default-export=disk", "exportname-list=explicit"];
    let arguments = [&arguments[..], &["exportname=disk", "exportname=other", "exportname-strict=true"]].concat();
    let mut server = TheirServer::nbdkit(&arguments);
    let client = server.connect(&options()).await;
    assert_eq!(client.info().size, 1 << 20);
    let error = server.try_connect("nope", &options()).await.map(drop).unwrap_err();
    assert!(matches!(error, ClientError::Negotiation(_)), "{error}");
    let stream = tokio::net::UnixStream::connect(server.directory.path().join("s")).await.unwrap();
    let names: Vec<_> = list(stream, &options()).await.unwrap().into_iter().map(|entry| entry.name).collect();
    assert_eq!(names, ["disk", "other"]);
}

#[tokio::test]
async fn writes_of_the_same_bytes_are_seen_as_such() {
    // The filter refuses what would change the disk: so all that was read is what is written back.
    let mut server = TheirServer::nbdkit(&["--filter=checkwrite", "pattern", "8M"]);
    let client = server.connect(&options()).await;
    let data = client.read(0, 8 << 20).await.unwrap();
    within(client.write(0, data, true)).await.unwrap();
    let error = client.write(100, Bytes::from_static(b"other"), false).await.unwrap_err();
    assert!(matches!(error, ClientError::Refused { error: Errno::EIO, .. }), "{error}");
}

#[tokio::test]
async fn a_server_that_comes_back_is_found_again() {
    let size = SIZE.to_string();
    let arguments = ["--filter=delay", "memory", &size, "rdelay=60"];
    let mut server = TheirServer::nbdkit(&arguments);
    let reconnect = Some(Reconnect { first_pause: Duration::from_millis(10), ..Reconnect::default() });
    let client = server.connect(&ConnectOptions { reconnect, ..options() }).await;
    client.write(0, Bytes::from_static(b"lost with the memory"), true).await.unwrap();
    let read = tokio::spawn({
        let client = client.clone();
        async move { client.read(0, 4096).await }
    });
    client.flush().await.unwrap();
    server.kill();
    let _again = server.again("nbdkit", &["-f", "--exit-with-parent", "-U", "DIR/s", "memory", &size]);
    assert_eq!(within(read).await.unwrap().unwrap(), vec![0; 4096], "answered by the new server");
}
