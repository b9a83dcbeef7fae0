//! Both sans-I/O sides at once: a random session, cut into pieces at random, against a model of the disk.
//!
//! The server's replies are made here in every form that the protocol allows (simple, chunks in any order, holes, replies in
//! any order), so that the client's session meets more than our own server would send.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use nbd::export::{Extent, ZeroMode};
use nbd::memory::{MemoryDisk, SingleExport};
use nbd::proto::client::{Goal, Negotiated, Negotiation, Operation, Outcome, Plan, Reply, Session};
use nbd::proto::server::{Entered, Handshake, Requests, Rules, Step, check, reply};
use nbd::wire::{ChunkFlags, ChunkHeader, ChunkType, Command, Errno, Framing, Request, StatusQuery};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};

const SIZE: usize = 20_000;

#[derive(Clone, Debug)]
enum Op {
    Read(u64, u32),
    Write(u64, Vec<u8>),
    Trim(u64, u32),
    Zero(u64, u32),
    Status(u64, u32),
    Flush,
}

fn op() -> impl Strategy<Value = Op> {
    // Beyond the end now and then.
    let offset = 0..(SIZE as u64 + 50);
    prop_oneof![
        (offset.clone(), 0..9000u32).prop_map(|(offset, length)| Op::Read(offset, length)),
        (offset.clone(), proptest::collection::vec(1..255u8, 0..3000))
            .prop_map(|(offset, data)| Op::Write(offset, data)),
        (offset.clone(), 0..9000u32).prop_map(|(offset, length)| Op::Trim(offset, length)),
        (offset.clone(), 0..9000u32).prop_map(|(offset, length)| Op::Zero(offset, length)),
        (offset, 1..9000u32).prop_map(|(offset, length)| Op::Status(offset, length)),
        Just(Op::Flush),
    ]
}

/// Moves a random number of bytes from one side to the other.
fn carry(from: &mut BytesMut, to: &mut BytesMut, random: &mut StdRng) {
    let count = random.random_range(0..=from.len().min(5000));
    to.unsplit(from.split_to(count));
}

/// The handshake of both sides.
fn negotiate(framing: Framing, random: &mut StdRng) -> (Negotiated, Entered) {
    let exports = SingleExport::new("disk", Arc::new(MemoryDisk::zeroed(SIZE)));
    let contexts = vec!["base:allocation".to_owned()];
    let mut client =
        Negotiation::new(Plan { goal: Goal::Transmission, export: "disk".into(), framing, contexts, tls: false });
    let (mut to_client, mut client_input) = (BytesMut::new(), BytesMut::new());
    let (mut to_server, mut server_input) = (BytesMut::new(), BytesMut::new());
    let mut server = Handshake::new(&mut to_client);
    let (mut negotiated, mut entered) = (None, None);
    while negotiated.is_none() || entered.is_none() {
        carry(&mut to_client, &mut client_input, random);
        carry(&mut to_server, &mut server_input, random);
        if negotiated.is_none() {
            negotiated = client.advance(&mut client_input, &mut to_server).expect("the server keeps to the protocol");
        }
        if entered.is_none() {
            let step = server.advance(&mut server_input, &exports, &mut to_client);
            if let Step::Enter(done) = step.expect("the client keeps to the protocol") {
                entered = Some(done);
            }
        }
    }
    match (negotiated, entered) {
        (Some(Outcome::Export(negotiated)), Some(entered)) => (negotiated, entered),
        _ => panic!("no export"),
    }
}

/// The reply to a READ in one of the forms that the protocol allows.
fn read_reply(framing: Framing, request: &Request, data: &[u8], random: &mut StdRng) -> Vec<u8> {
    if !framing.has_chunks() || data.is_empty() || random.random_bool(0.3) {
        return [&reply::read_done(framing, request)[..], data].concat();
    }
    let mut pieces = Vec::new();
    let mut at = 0;
    while at < data.len() {
        let end = random.random_range(at + 1..=data.len());
        pieces.push(at..end);
        at = end;
    }
    pieces.shuffle(random);
    let ends_empty = random.random_bool(0.5);
    let last = pieces.len() - 1;
    let mut bytes = Vec::new();
    for (index, range) in pieces.into_iter().enumerate() {
        let done = index == last && !ends_empty;
        let (offset, length) = (request.offset + range.start as u64, range.len() as u32);
        let piece = &data[range];
        if piece.iter().all(|byte| *byte == 0) {
            bytes.extend_from_slice(&reply::read_hole(framing, request, offset, length, done));
        } else {
            bytes.extend_from_slice(&reply::read_data(framing, request, offset, length, done));
            bytes.extend_from_slice(piece);
        }
    }
    if ends_empty {
        bytes.extend_from_slice(&reply::finished(framing, request, Ok(())));
    }
    bytes
}

/// What the server does with a request: the model changes, and a reply comes of it.
fn serve(rules: &Rules, mut request: Request, payload: &[u8], disk: &mut [u8], random: &mut StdRng) -> Vec<u8> {
    let framing = rules.framing;
    if request.command == Command::BLOCK_STATUS && !payload.is_empty() {
        let query = StatusQuery::decode(payload).expect("our client encodes it");
        assert_eq!(query.contexts, [1]);
        request.length = query.length;
    }
    if let Err(error) = check(&request, rules) {
        return reply::finished(framing, &request, Err(error)).to_vec();
    }
    let range = request.offset as usize..request.offset as usize + request.length as usize;
    match request.command {
        Command::READ => return read_reply(framing, &request, &disk[range], random),
        Command::WRITE => disk[range].copy_from_slice(payload),
        Command::TRIM | Command::WRITE_ZEROES => disk[range].fill(0),
        Command::BLOCK_STATUS => {
            let extents = vec![Extent { length: request.length, flags: request.offset }];
            let mut out = Vec::new();
            reply::status(framing, &request, false, &[(1, extents)], &mut out).unwrap();
            return out;
        }
        _ => {}
    }
    reply::finished(framing, &request, Ok(())).to_vec()
}

fn framing() -> impl Strategy<Value = Framing> {
    prop_oneof![Just(Framing::Simple), Just(Framing::Structured), Just(Framing::Extended)]
}

/// What the client must be told. `disk` is the model before the operation, which is applied to it.
fn expected(op: &Op, disk: &mut [u8], contexts: bool) -> Result<Option<Bytes>, Errno> {
    let fits = |offset: &u64, length: usize| *offset as usize + length <= SIZE;
    match op {
        Op::Flush => Ok(None),
        Op::Status(..) if !contexts => Err(Errno::EINVAL),
        Op::Read(offset, length) | Op::Trim(offset, length) | Op::Status(offset, length)
            if !fits(offset, *length as usize) =>
        {
            Err(Errno::EINVAL)
        }
        Op::Zero(offset, length) if !fits(offset, *length as usize) => Err(Errno::ENOSPC),
        Op::Write(offset, data) if !fits(offset, data.len()) => Err(Errno::ENOSPC),
        Op::Read(offset, length) => Ok(Some(Bytes::copy_from_slice(&disk[*offset as usize..][..*length as usize]))),
        Op::Write(offset, data) => {
            disk[*offset as usize..][..data.len()].copy_from_slice(data);
            Ok(None)
        }
        Op::Trim(offset, length) | Op::Zero(offset, length) => {
            disk[*offset as usize..][..*length as usize].fill(0);
            Ok(None)
        }
        Op::Status(..) => Ok(None),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn a_session_behaves_as_the_model(ops in proptest::collection::vec(op(), 1..60), framing in framing(), seed: u64) {
        let mut random = StdRng::seed_from_u64(seed);
        let (negotiated, entered) = negotiate(framing, &mut random);
        prop_assert_eq!((negotiated.size, negotiated.framing), (SIZE as u64, framing));
        let contexts = framing.has_chunks();
        prop_assert_eq!(negotiated.contexts.len(), usize::from(contexts));
        let rules = Rules {
            size: entered.info.size,
            read_only: false,
            minimum_block: entered.info.minimum_block,
            fast_zero: entered.info.fast_zero,
            framing: entered.framing,
            contexts,
        };

        let mut session = Session::new(&negotiated);
        let mut requests = Requests::new(framing);
        let (mut client_disk, mut server_disk) = (vec![0; SIZE], vec![0; SIZE]);
        let (mut to_client, mut client_input) = (BytesMut::new(), BytesMut::new());
        let (mut to_server, mut server_input) = (BytesMut::new(), BytesMut::new());
        let mut waiting = BTreeMap::new();
        let mut late: Vec<Vec<u8>> = Vec::new();
        let mut ops = ops.into_iter().enumerate();
        let mut submitted_all = false;
        while !submitted_all || session.in_flight() > 0 {
            // The server carries requests out in their order, so that the model can be asked at submission.
            if random.random_bool(0.5) {
                match ops.next() {
                    None => submitted_all = true,
                    Some((token, op)) => {
                        waiting.insert(token, (op.clone(), expected(&op, &mut client_disk, contexts)));
                        let operation = match op {
                            Op::Read(offset, length) => Operation::Read { offset, length, whole: false },
                            Op::Write(offset, data) => Operation::Write { offset, data: data.into(), fua: true },
                            Op::Trim(offset, length) => Operation::Trim { offset, length: length.into(), fua: false },
                            Op::Zero(offset, length) => {
                                let mode = ZeroMode { no_hole: true, fast: token % 2 == 0 };
                                Operation::WriteZeroes { offset, length: length.into(), mode, fua: false }
                            }
                            Op::Status(offset, length) => {
                                let some = framing == Framing::Extended && token % 2 == 0;
                                let contexts = if some { vec![negotiated.contexts[0].id] } else { Vec::new() };
                                Operation::BlockStatus { offset, length: length.into(), contexts, one: false }
                            }
                            Op::Flush => Operation::Flush,
                        };
                        let (head, payload) = session.submit(&operation, token);
                        to_server.extend_from_slice(&head);
                        to_server.extend_from_slice(&payload);
                    }
                }
            }
            carry(&mut to_server, &mut server_input, &mut random);
            while let Some(incoming) = requests.next(&mut server_input).unwrap() {
                late.push(serve(&rules, incoming.request, &incoming.payload, &mut server_disk, &mut random));
            }
            if !late.is_empty() && random.random_bool(0.6) {
                let index = random.random_range(0..late.len());
                to_client.extend_from_slice(&late.swap_remove(index));
            }
            carry(&mut to_client, &mut client_input, &mut random);
            while let Some(completion) = session.receive(&mut client_input).unwrap() {
                let (op, expected) = waiting.remove(&completion.token).expect("one completion a request");
                match (completion.result, expected) {
                    (Ok(Reply::Data(data)), Ok(Some(model))) => prop_assert!(data == model, "{:?}", op),
                    (Ok(Reply::Done), Ok(None)) => {}
                    (Ok(Reply::Status(status)), Ok(None)) => {
                        let Op::Status(offset, length) = op else { panic!("extents for {op:?}") };
                        let extent = &status[0].extents[0];
                        prop_assert_eq!((extent.length, extent.flags), (length.into(), offset));
                    }
                    (Err(refusal), Err(error)) => prop_assert_eq!(refusal.error, error),
                    (got, wanted) => panic!("{op:?}: {got:?} instead of {wanted:?}"),
                }
            }
        }
        prop_assert!(waiting.is_empty());
        prop_assert!(client_disk == server_disk);
    }

    /// Whatever arrives, neither side panics or asks for a buffer beyond its limit.
    #[test]
    fn garbage_is_survived(garbage in proptest::collection::vec(any::<u8>(), 0..400), seed: u64) {
        let mut random = StdRng::seed_from_u64(seed);
        let (negotiated, entered) = negotiate(Framing::Structured, &mut random);
        let mut session = Session::new(&negotiated);
        let mut stream = BytesMut::new();
        for token in 0..4u64 {
            session.submit(&Operation::Read { offset: token, length: 4096, whole: false }, token);
        }
        // A right head makes what follows reach deeper.
        let kinds = [ChunkType::NONE, ChunkType::OFFSET_DATA, ChunkType::OFFSET_HOLE, ChunkType::ERROR, ChunkType(9)];
        let kind = kinds[random.random_range(0..kinds.len())];
        let (cookie, length) = (random.random_range(0..5), random.random_range(0..40));
        stream.extend_from_slice(&ChunkHeader { flags: ChunkFlags(random.random_range(0..2)), kind, cookie, length }.encode());
        stream.extend_from_slice(&garbage);
        while let Ok(Some(_)) = session.receive(&mut stream) {}
        prop_assert!(session.wanted() <= 20 + 8 + 4096 + 65536);

        let mut input = BytesMut::from(&garbage[..]);
        let mut requests = Requests::new(Framing::Simple);
        while let Ok(Some(_)) = requests.next(&mut input) {}
        prop_assert!(requests.wanted(&input) <= 28 + (32 << 20));

        let exports = SingleExport::new("disk", entered.export);
        let mut out = BytesMut::new();
        let mut handshake = Handshake::new(&mut out);
        let mut input = BytesMut::from(&[&[0, 0, 0, 3], &garbage[..]].concat()[..]);
        while let Ok(Step::Answered) = handshake.advance(&mut input, &exports, &mut out) {}
    }
}
