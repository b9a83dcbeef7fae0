//! The client's rarer requests: lists of meta contexts, reads in one piece, one extent at a time.

mod common;

use std::sync::Arc;

use bytes::BytesMut;
use common::{Probe, Served, Verdict, serve, within};
use nbd::client::{Client, ClientError, ConnectOptions, list_contexts};
use nbd::export::{Extent, STATE_HOLE, STATE_ZERO};
use nbd::proto::client::{Negotiated, Operation, Session};
use nbd::server::ServeOptions;
use nbd::wire::{
    ChunkFlags, ChunkHeader, ChunkType, Command, CommandFlags, Framing, MetaContext, Request, TransmissionFlags,
};
use tokio::io::duplex;

const SIZE: usize = 1 << 20;

fn options(framing: Framing, contexts: &[&str]) -> ConnectOptions {
    let contexts = contexts.iter().map(|name| (*name).to_owned()).collect();
    ConnectOptions { framing, contexts, ..ConnectOptions::default() }
}

fn probe() -> Arc<Probe> {
    let mut probe = Probe::new(SIZE, |_| Verdict::Go);
    probe.info.contexts = ["base:allocation", "x-test:a", "x-test:b"].map(str::to_owned).to_vec();
    Arc::new(probe)
}

async fn connect(export: Arc<Probe>, framing: Framing) -> (Client, Served) {
    let mut served = serve(export, ServeOptions::default(), 1 << 16);
    let stream = std::mem::replace(&mut served.stream, duplex(1).0);
    let client = within(Client::handshake(stream, "disk", &options(framing, &["base:allocation"]))).await.unwrap();
    (client, served)
}

#[tokio::test]
async fn contexts_are_listed_by_name_and_by_namespace() {
    let all = ["base:allocation", "x-test:a", "x-test:b"];
    for framing in [Framing::Extended, Framing::Structured, Framing::Simple] {
        for (asked, expected) in [
            (&[][..], &all[..]),
            (&["x-test:"], &all[1..]),
            (&["x-test:b", "base:"], &[all[0], all[2]]),
            (&["x-test"], &[]),
            (&["other:"], &[]),
        ] {
            let served = serve(probe(), ServeOptions::default(), 1 << 16);
            let names = within(list_contexts(served.stream, "disk", &options(framing, asked))).await.unwrap();
            assert_eq!(names, expected, "{asked:?}");
        }
    }
    let served = serve(probe(), ServeOptions::default(), 1 << 16);
    assert!(within(list_contexts(served.stream, "nothing", &ConnectOptions::default())).await.is_err());
}

#[tokio::test]
async fn a_read_in_one_piece_comes_in_one_piece_or_not_at_all() {
    for framing in [Framing::Extended, Framing::Structured] {
        let (client, _served) = connect(probe(), framing).await;
        within(client.write(1000, vec![7; 5000].into(), false)).await.unwrap();
        let read = within(client.read_whole(0, 100_000)).await.unwrap();
        assert!(read[..1000] == [0; 1000] && read[1000..6000] == [7; 5000] && read[6000..] == [0; 94_000]);
        assert!(within(client.read_whole(0, 0)).await.unwrap().is_empty());
        let beyond = within(client.read_whole(SIZE as u64 - 1, 2)).await;
        assert!(matches!(beyond, Err(ClientError::Impossible { .. })), "{beyond:?}");
    }
    // Without structured replies nothing is promised.
    let (client, _served) = connect(probe(), Framing::Simple).await;
    assert!(matches!(within(client.read_whole(0, 512)).await, Err(ClientError::Impossible { .. })));
}

#[tokio::test]
async fn one_extent_is_asked_for_and_one_is_given() {
    for framing in [Framing::Extended, Framing::Structured] {
        let export = probe();
        let (client, _served) = connect(export.clone(), framing).await;
        within(client.write(4096, vec![1; 4096].into(), false)).await.unwrap();
        let hole = Extent { length: 4096, flags: STATE_HOLE | STATE_ZERO };
        let extent = |offset, length| within(client.block_status_one("base:allocation", offset, length));
        assert_eq!(extent(0, SIZE as u64).await.unwrap(), hole);
        assert_eq!(extent(4096, 4096).await.unwrap(), Extent { length: 4096, flags: 0 });
        assert_eq!(extent(8192, 512).await.unwrap(), Extent { length: 512, flags: STATE_HOLE | STATE_ZERO });
        // The probe writes down whether one extent was asked for.
        let asked = export.calls().into_iter().filter(|call| call.0 == Command::BLOCK_STATUS);
        assert_eq!(asked.map(|call| call.3).collect::<Vec<_>>(), [true; 3]);
        let unknown = within(client.block_status_one("x-test:a", 0, 512)).await;
        assert!(matches!(unknown, Err(ClientError::NoContext(_))), "{unknown:?}");
    }
}

/// A session with one request out, and what it thinks of these chunks for it.
fn answered(operation: &Operation, flag: CommandFlags, chunks: &[(ChunkType, Vec<u8>)]) -> Result<(), String> {
    let negotiated = Negotiated {
        size: SIZE as u64,
        flags: TransmissionFlags::HAS_FLAGS | TransmissionFlags::SEND_DF,
        minimum_block: 1,
        preferred_block: 4096,
        maximum_block: 1 << 25,
        framing: Framing::Structured,
        contexts: vec![MetaContext { id: 1, name: "base:allocation".to_owned() }],
        name: None,
        description: None,
    };
    let mut session = Session::new(&negotiated);
    let (head, _) = session.submit(operation, ());
    let cookie = Request::decode(&head).unwrap();
    assert!(cookie.flags.contains(flag), "the flag is not on the wire");
    let mut input = BytesMut::new();
    for (index, (kind, payload)) in chunks.iter().enumerate() {
        let flags = ChunkFlags::NONE.with_if(ChunkFlags::DONE, index + 1 == chunks.len());
        let header = ChunkHeader { flags, kind: *kind, cookie: cookie.cookie, length: payload.len() as u32 };
        input.extend_from_slice(&header.encode());
        input.extend_from_slice(payload);
    }
    let completion = session.receive(&mut input).map_err(|error| error.to_string())?;
    completion.expect("complete").result.map(drop).map_err(|refusal| refusal.error.to_string())
}

#[test]
fn a_server_that_gives_more_than_one_is_caught() {
    let data =
        |offset: u64, length: usize| (ChunkType::OFFSET_DATA, [&offset.to_be_bytes()[..], &vec![0; length]].concat());
    let hole = |offset: u64, length: u32| {
        (ChunkType::OFFSET_HOLE, [&offset.to_be_bytes()[..], &length.to_be_bytes()].concat())
    };
    let read = Operation::Read { offset: 0, length: 8, whole: true };
    let df = CommandFlags::DF;
    assert_eq!(answered(&read, df, &[data(0, 8)]), Ok(()));
    assert_eq!(answered(&read, df, &[hole(0, 8)]), Ok(()));
    for chunks in [[data(0, 4), data(4, 4)], [data(0, 4), hole(4, 4)], [hole(0, 4), hole(4, 4)]] {
        assert!(answered(&read, df, &chunks).unwrap_err().contains("second chunk"));
    }
    let extents = |lengths: &[u32]| {
        let mut payload = 1u32.to_be_bytes().to_vec();
        lengths.iter().for_each(|length| payload.extend([length.to_be_bytes(), [0; 4]].concat()));
        (ChunkType::BLOCK_STATUS, payload)
    };
    let status = Operation::BlockStatus { offset: 0, length: 100, contexts: Vec::new(), one: true };
    assert_eq!(answered(&status, CommandFlags::REQ_ONE, &[extents(&[40])]), Ok(()));
    assert!(answered(&status, CommandFlags::REQ_ONE, &[extents(&[40, 60])]).unwrap_err().contains("second extent"));
}
