//! What a server may answer, and what it may not.

use super::*;
use crate::limits::MAX_PAYLOAD;
use crate::wire::{MetaContext, TransmissionFlags};

const SIMPLE: Framing = Framing::Simple;
const STRUCTURED: Framing = Framing::Structured;
const EXTENDED: Framing = Framing::Extended;

fn negotiated(framing: Framing) -> Negotiated {
    Negotiated {
        size: 1 << 30,
        flags: TransmissionFlags::HAS_FLAGS,
        minimum_block: 1,
        preferred_block: 4096,
        maximum_block: MAX_PAYLOAD,
        framing,
        contexts: vec![MetaContext { id: 7, name: "base:allocation".into() }],
        name: None,
        description: None,
    }
}

const READ: Operation = Operation::Read { offset: 1000, length: 8, whole: false };
const STATUS: Operation = Operation::BlockStatus { offset: 0, length: 1000, contexts: Vec::new(), one: false };

/// A session with one request in flight; its cookie is 1, its token 77.
fn session(framing: Framing, operation: Operation) -> Session<u32> {
    let mut session = Session::new(&negotiated(framing));
    let (head, _) = session.submit(&operation, 77);
    let request = if framing == EXTENDED { Request::decode_extended(&head) } else { Request::decode(&head) };
    assert_eq!(request.unwrap().cookie, 1);
    session
}

fn chunk(kind: ChunkType, done: bool, payload: &[&[u8]]) -> Vec<u8> {
    let flags = ChunkFlags::NONE.with_if(ChunkFlags::DONE, done);
    let payload = payload.concat();
    let mut bytes = ChunkHeader { flags, kind, cookie: 1, length: payload.len() as u32 }.encode().to_vec();
    bytes.extend(payload);
    bytes
}

fn simple(cookie: u64, error: u32) -> Vec<u8> {
    SimpleReply { error, cookie }.encode().to_vec()
}

fn receive(session: &mut Session<u32>, bytes: &[u8]) -> Result<Option<Completion<u32>>, ProtocolError> {
    session.receive(&mut BytesMut::from(bytes))
}

fn data(bytes: &'static [u8]) -> Result<Option<Completion<u32>>, ProtocolError> {
    Ok(Some(Completion { token: 77, result: Ok(Reply::Data(Bytes::from_static(bytes))) }))
}

#[test]
fn a_read_is_answered_in_either_mode() {
    let mut plain = simple(1, 0);
    plain.extend(b"12345678");
    assert_eq!(receive(&mut session(SIMPLE, READ), &plain), data(b"12345678"));
    let one = chunk(ChunkType::OFFSET_DATA, true, &[&1000u64.to_be_bytes(), b"12345678"]);
    assert_eq!(receive(&mut session(STRUCTURED, READ), &one), data(b"12345678"));
    let three = [
        chunk(ChunkType::OFFSET_DATA, false, &[&1006u64.to_be_bytes(), b"gh"]),
        chunk(ChunkType::OFFSET_HOLE, false, &[&1000u64.to_be_bytes(), &6u32.to_be_bytes()]),
        chunk(ChunkType::NONE, true, &[]),
    ];
    assert_eq!(receive(&mut session(STRUCTURED, READ), &three.concat()), data(b"\0\0\0\0\0\0gh"));
}

/// The pieces of content, in the order in which they came, and how the read ended. The stream gives `at_once` bytes at a
/// time.
type Streamed = (Vec<(u64, Vec<u8>)>, Option<Completion<u32>>);

fn stream(framing: Framing, bytes: &[u8], at_once: usize) -> Result<Streamed, ProtocolError> {
    let mut session = session(framing, Operation::Stream { offset: 1000, length: 8 });
    let (mut input, mut pieces, mut completed) = (BytesMut::new(), Vec::new(), None);
    for some in bytes.chunks(at_once) {
        input.extend_from_slice(some);
        loop {
            assert!(session.has_streams() != completed.is_some());
            if let Some(completion) = session.receive(&mut input)? {
                assert!(completed.replace(completion).is_none() && session.payload().is_none());
            }
            let Some(payload) = session.payload() else { break };
            assert_eq!(*payload.token, 77);
            let there = if payload.zeroes { payload.length } else { payload.length.min(input.len() as u32) };
            if there == 0 {
                break;
            }
            let piece = match payload.zeroes {
                true => vec![0; there as usize],
                false => input.split_to(there as usize).to_vec(),
            };
            pieces.push((payload.offset, piece));
            session.taken(there);
        }
    }
    Ok((pieces, completed))
}

#[test]
fn a_streamed_read_hands_on_each_byte_once_however_they_come() {
    let at = |offset: u64| offset.to_be_bytes();
    let one = |framing| match framing {
        SIMPLE => [simple(1, 0), b"12345678".to_vec()].concat(),
        STRUCTURED => chunk(ChunkType::OFFSET_DATA, true, &[&at(1000), b"12345678"]),
        EXTENDED => extended(ChunkType::OFFSET_DATA, true, &[&at(1000), b"12345678"]),
    };
    let parts = |chunk: fn(ChunkType, bool, &[&[u8]]) -> Vec<u8>| {
        [
            chunk(ChunkType::OFFSET_DATA, false, &[&at(1006), b"gh"]),
            chunk(ChunkType::OFFSET_HOLE, false, &[&at(1001), &5u32.to_be_bytes()]),
            chunk(ChunkType::OFFSET_DATA, true, &[&at(1000), b"a"]),
        ]
        .concat()
    };
    let cases = [
        (SIMPLE, one(SIMPLE), b"12345678"),
        (STRUCTURED, one(STRUCTURED), b"12345678"),
        (EXTENDED, one(EXTENDED), b"12345678"),
        (STRUCTURED, parts(chunk), b"a\0\0\0\0\0gh"),
        (EXTENDED, parts(extended), b"a\0\0\0\0\0gh"),
    ];
    for (framing, bytes, expected) in cases {
        for at_once in 1..=bytes.len() {
            let (pieces, completed) = stream(framing, &bytes, at_once).unwrap();
            let mut found = [None; 8];
            for (byte, at) in pieces.into_iter().flat_map(|(offset, piece)| piece.into_iter().zip(offset..)) {
                assert!(found[at as usize - 1000].replace(byte).is_none(), "twice");
            }
            assert_eq!(found.map(Option::unwrap), *expected);
            assert_eq!(completed, Some(Completion { token: 77, result: Ok(Reply::Done) }));
        }
    }
}

#[test]
fn a_streamed_read_is_checked_like_any_other() {
    let at = |offset: u64| offset.to_be_bytes();
    let data = |done, offset, bytes: &[u8]| chunk(ChunkType::OFFSET_DATA, done, &[&at(offset), bytes]);
    let hole = |done, offset, length: u32| chunk(ChunkType::OFFSET_HOLE, done, &[&at(offset), &length.to_be_bytes()]);
    for (what, bytes) in [
        ("twice", [data(false, 1000, b"1234"), data(true, 1003, b"45678")].concat()),
        ("elsewhere", data(true, 1001, b"12345678")),
        ("before it", data(true, 999, b"1")),
        ("too much", data(true, 1000, b"123456789")),
        ("a hole elsewhere", hole(true, 1004, 5)),
        ("an empty hole", hole(true, 1004, 0)),
        ("a part is missing", data(true, 1000, b"1234567")),
        ("nothing", chunk(ChunkType::NONE, true, &[])),
    ] {
        assert!(stream(STRUCTURED, &bytes, 3).is_err(), "{what}");
    }
    let refused = [data(false, 1000, b"1234"), chunk(ChunkType::ERROR, true, &[&5u32.to_be_bytes(), &[0, 0]])].concat();
    let (pieces, completed) = stream(STRUCTURED, &refused, 5).unwrap();
    assert_eq!(pieces.iter().map(|(_, piece)| piece.len()).sum::<usize>(), 4);
    assert!(matches!(completed, Some(Completion { result: Err(Refusal { error: Errno::EIO, .. }), .. })));
}

#[test]
fn data_in_one_piece_is_not_copied() {
    let mut session = session(STRUCTURED, READ);
    let mut input = BytesMut::from(&chunk(ChunkType::OFFSET_DATA, true, &[&1000u64.to_be_bytes(), b"12345678"])[..]);
    let place = input[28..].as_ptr();
    let Ok(Some(Completion { result: Ok(Reply::Data(data)), .. })) = session.receive(&mut input) else { panic!() };
    assert_eq!(data.as_ptr(), place);
}

#[test]
fn it_asks_for_as_much_as_it_needs() {
    let mut session = session(SIMPLE, READ);
    let mut input = BytesMut::from(&simple(1, 0)[..]);
    assert_eq!(session.receive(&mut input), Ok(None));
    assert_eq!(session.wanted(), 24);
    input.extend_from_slice(b"12345678");
    assert_eq!(session.receive(&mut input), data(b"12345678"));
    assert_eq!((session.wanted(), session.in_flight()), (16, 0));
}

#[test]
fn refusals_come_in_both_forms_and_the_first_counts() {
    let refusal = |error, message: &str, offset| {
        Ok(Some(Completion { token: 77, result: Err(Refusal { error, message: message.into(), offset }) }))
    };
    assert_eq!(receive(&mut session(SIMPLE, READ), &simple(1, 5)), refusal(Errno::EIO, "", None));
    let chunks = [
        chunk(ChunkType::OFFSET_DATA, false, &[&1000u64.to_be_bytes(), b"1234"]),
        chunk(ChunkType::ERROR_OFFSET, false, &[&28u32.to_be_bytes(), &[0, 2], b"no", &1004u64.to_be_bytes()]),
        chunk(ChunkType::ERROR, true, &[&5u32.to_be_bytes(), &[0, 0]]),
    ];
    assert_eq!(receive(&mut session(STRUCTURED, READ), &chunks.concat()), refusal(Errno::ENOSPC, "no", Some(1004)));
    // An error type without a name still is an error.
    let unknown = chunk(ChunkType(0x8123), true, &[&22u32.to_be_bytes(), &[0, 0], b"more"]);
    assert_eq!(receive(&mut session(STRUCTURED, READ), &unknown), refusal(Errno::EINVAL, "", None));
}

#[test]
fn extents_may_end_early_or_reach_beyond_and_are_cut() {
    let extents = |list: &[(u32, u32)]| {
        let mut payload = 7u32.to_be_bytes().to_vec();
        list.iter().for_each(|(length, flags)| {
            payload.extend(length.to_be_bytes());
            payload.extend(flags.to_be_bytes());
        });
        receive(&mut session(STRUCTURED, STATUS), &chunk(ChunkType::BLOCK_STATUS, true, &[&payload]))
    };
    let answer = |list: &[(u64, u64)]| {
        let extents = list.iter().map(|(length, flags)| Extent { length: *length, flags: *flags }).collect();
        let status = vec![ContextExtents { id: 7, extents }];
        Ok(Some(Completion { token: 77, result: Ok(Reply::Status(status)) }))
    };
    assert_eq!(extents(&[(10, 3)]), answer(&[(10, 3)]));
    assert_eq!(extents(&[(900, 0), (u32::MAX, 1)]), answer(&[(900, 0), (100, 1)]));
    assert!(extents(&[(1000, 0), (1, 0)]).is_err());
    assert!(extents(&[(0, 0)]).is_err());
}

#[test]
fn what_a_hostile_server_sends_ends_the_session() {
    let offset = 1000u64.to_be_bytes();
    let status = [7u32.to_be_bytes(), 10u32.to_be_bytes(), [0; 4]].concat();
    let stranger = [8u32.to_be_bytes(), 10u32.to_be_bytes(), [0; 4]].concat();
    let trim = Operation::Trim { offset: 0, length: 5, fua: false };
    let data = |done| chunk(ChunkType::OFFSET_DATA, done, &[&offset, b"12345678"]);
    let mut unknown_cookie = data(true);
    unknown_cookie[15] = 9;
    for (what, operation, bytes) in [
        ("no magic", READ, vec![0; 20]),
        ("an unknown cookie", READ, simple(9, 0)),
        ("an unknown cookie, structured", READ, unknown_cookie),
        ("a simple reply to a READ", READ, simple(1, 0)),
        ("a simple error to a READ", READ, simple(1, 5)),
        ("a simple reply to a BLOCK_STATUS", STATUS, simple(1, 0)),
        ("data for a TRIM", trim.clone(), data(true)),
        ("extents for a READ", READ, chunk(ChunkType::BLOCK_STATUS, true, &[&status])),
        ("an unknown chunk", READ, chunk(ChunkType(77), true, &[])),
        ("NONE with a payload", READ, chunk(ChunkType::NONE, true, &[b"x"])),
        ("NONE that is not the last", READ, chunk(ChunkType::NONE, false, &[])),
        ("data without bytes", READ, chunk(ChunkType::OFFSET_DATA, true, &[&offset])),
        ("too much data", READ, chunk(ChunkType::OFFSET_DATA, true, &[&offset, b"123456789"])),
        ("data elsewhere", READ, chunk(ChunkType::OFFSET_DATA, true, &[&0u64.to_be_bytes(), b"12345678"])),
        ("data twice", READ, [data(false), data(true)].concat()),
        ("data missing", READ, chunk(ChunkType::OFFSET_DATA, true, &[&offset, b"1234567"])),
        ("no data", READ, chunk(ChunkType::NONE, true, &[])),
        ("an empty hole", READ, chunk(ChunkType::OFFSET_HOLE, true, &[&offset, &[0; 4]])),
        ("a hole of a wrong length", READ, chunk(ChunkType::OFFSET_HOLE, true, &[&offset, &[0; 5]])),
        ("an error without an error", READ, chunk(ChunkType::ERROR, true, &[&[0; 6]])),
        ("an error that is too short", READ, chunk(ChunkType::ERROR, true, &[&[5; 5]])),
        ("an error text beyond its chunk", READ, chunk(ChunkType::ERROR, true, &[&[5; 4], &[0, 9]])),
        ("a context that was not negotiated", STATUS, chunk(ChunkType::BLOCK_STATUS, true, &[&stranger])),
        ("extents of odd length", STATUS, chunk(ChunkType::BLOCK_STATUS, true, &[&status, &[1]])),
        ("no extents", STATUS, chunk(ChunkType::NONE, true, &[])),
        (
            "a context twice",
            STATUS,
            [chunk(ChunkType::BLOCK_STATUS, false, &[&status]), chunk(ChunkType::BLOCK_STATUS, true, &[&status])]
                .concat(),
        ),
        (
            "a simple reply in the middle",
            trim,
            [chunk(ChunkType::ERROR, false, &[&[0, 0, 0, 5, 0, 0]]), simple(1, 0)].concat(),
        ),
    ] {
        let outcome = receive(&mut session(STRUCTURED, operation), &bytes);
        assert!(outcome.is_err(), "{what}: {outcome:?}");
    }
    let outcome = receive(&mut session(SIMPLE, READ), &data(true));
    assert!(outcome.is_err(), "a structured reply that was not negotiated: {outcome:?}");
}

#[test]
fn a_payload_that_cannot_be_right_is_refused_before_it_is_buffered() {
    let length = ChunkHeader { flags: ChunkFlags::DONE, kind: ChunkType::OFFSET_DATA, cookie: 1, length: u32::MAX };
    assert!(receive(&mut session(STRUCTURED, READ), &length.encode()).is_err());
    let status = ChunkHeader { kind: ChunkType::BLOCK_STATUS, length: u32::MAX - 3, ..length };
    assert!(receive(&mut session(STRUCTURED, STATUS), &status.encode()).is_err());
    let error = ChunkHeader { kind: ChunkType::ERROR, length: u32::MAX, ..length };
    assert!(receive(&mut session(STRUCTURED, READ), &error.encode()).is_err());
}

fn extended(kind: ChunkType, done: bool, payload: &[&[u8]]) -> Vec<u8> {
    let flags = ChunkFlags::NONE.with_if(ChunkFlags::DONE, done);
    let payload = payload.concat();
    let header = ExtendedChunkHeader { flags, kind, cookie: 1, offset: 1000, length: payload.len() as u64 };
    [header.encode().to_vec(), payload].concat()
}

#[test]
fn extended_replies_are_chunks_that_repeat_the_offset() {
    let at = 1000u64.to_be_bytes();
    let whole = extended(ChunkType::OFFSET_DATA, true, &[&at, b"12345678"]);
    assert_eq!(receive(&mut session(EXTENDED, READ), &whole), data(b"12345678"));
    let trim = Operation::Trim { offset: 1000, length: 5 << 32, fua: false };
    let done = receive(&mut session(EXTENDED, trim.clone()), &extended(ChunkType::NONE, true, &[]));
    assert_eq!(done, Ok(Some(Completion { token: 77, result: Ok(Reply::Done) })));
    let elsewhere = ExtendedChunkHeader { offset: 1001, ..ExtendedChunkHeader::decode(&whole).unwrap() };
    let huge = ExtendedChunkHeader { length: 1 << 32, ..ExtendedChunkHeader::decode(&whole).unwrap() };
    for (what, bytes) in [
        ("another offset", [&elsewhere.encode(), &whole[32..]].concat()),
        ("a length beyond 32 bits", huge.encode().to_vec()),
        ("a simple reply", [simple(1, 0), vec![0; 16]].concat()),
        ("a structured chunk", [chunk(ChunkType::NONE, true, &[]), vec![0; 12]].concat()),
        ("a chunk after DONE", [whole.clone(), whole.clone()].concat()),
    ] {
        let mut session = session(EXTENDED, READ);
        let mut input = BytesMut::from(&bytes[..]);
        let first = session.receive(&mut input);
        let outcome = if what == "a chunk after DONE" { session.receive(&mut input) } else { first };
        assert!(outcome.is_err(), "{what}: {outcome:?}");
    }
}

#[test]
fn extents_come_in_either_width_with_extended_headers() {
    let status = Operation::BlockStatus { offset: 1000, length: 5 << 32, contexts: Vec::new(), one: false };
    let words = |count: u32, list: &[u64]| {
        let mut payload = [7u32.to_be_bytes(), count.to_be_bytes()].concat();
        list.iter().for_each(|word| payload.extend(word.to_be_bytes()));
        extended(ChunkType::BLOCK_STATUS_EXT, true, &[&payload])
    };
    let answer = |list: &[(u64, u64)]| {
        let extents = list.iter().map(|(length, flags)| Extent { length: *length, flags: *flags }).collect();
        Ok(Some(Completion { token: 77, result: Ok(Reply::Status(vec![ContextExtents { id: 7, extents }])) }))
    };
    let told = |bytes: Vec<u8>| receive(&mut session(EXTENDED, status.clone()), &bytes);
    assert_eq!(told(words(2, &[4 << 32, 1 << 40, u64::MAX, 3])), answer(&[(4 << 32, 1 << 40), (1 << 32, 3)]));
    assert_eq!(told(words(0, &[1, 3])), answer(&[(1, 3)]), "the number may be left out");
    let narrow = [7u32, 4096, 3].map(u32::to_be_bytes).concat();
    assert_eq!(told(extended(ChunkType::BLOCK_STATUS, true, &[&narrow])), answer(&[(4096, 3)]));
    for wrong in [words(1, &[1, 3, 1, 3]), words(1, &[1]), words(0, &[]), words(1, &[0, 3])] {
        assert!(told(wrong).is_err());
    }
    let wide = chunk(ChunkType::BLOCK_STATUS_EXT, true, &[&[0; 24]]);
    assert!(receive(&mut session(STRUCTURED, STATUS), &wide).is_err(), "not negotiated");
}

#[test]
fn a_restart_sends_what_was_not_answered_in_order() {
    let mut first = negotiated(EXTENDED);
    first.contexts.push(MetaContext { id: 9, name: "x:y".into() });
    let mut session: Session<u32> = Session::new(&first).resending();
    let write = |offset| Operation::Write { offset, data: Bytes::from_static(b"abc"), fua: true };
    for token in 0..40 {
        session.submit(&write(u64::from(token)), token);
    }
    let status = Operation::BlockStatus { offset: 0, length: 1000, contexts: vec![9], one: false };
    session.submit(&status, 40);
    let reply = |cookie, kind, payload: &[u8]| {
        let (flags, offset, length) = (ChunkFlags::DONE, cookie - 1, payload.len() as u64);
        [&ExtendedChunkHeader { flags, kind, cookie, offset, length }.encode(), payload].concat()
    };
    assert!(receive(&mut session, &reply(2, ChunkType::NONE, &[])).unwrap().is_some());
    // The server shuts down: not a refusal, but waiting for the next connection.
    let parked = reply(3, ChunkType::ERROR, &[0, 0, 0, 108, 0, 0]);
    assert_eq!(receive(&mut session, &parked), Ok(None));
    assert!(receive(&mut session, &parked).is_err(), "it has been answered on this connection");
    assert!(!session.all_parked());

    let mut second = negotiated(EXTENDED);
    second.contexts =
        vec![MetaContext { id: 1, name: "x:y".into() }, MetaContext { id: 2, name: "base:allocation".into() }];
    let sent = session.restart(&second, &first, |token| *token == 5);
    let heads: Vec<Request> = sent.iter().map(|(head, _)| Request::decode_extended(head).unwrap()).collect();
    let tokens: Vec<u64> = heads.iter().map(|head| head.cookie - 1).collect();
    let expected: Vec<u64> = (0..41).filter(|token| ![1, 5].contains(token)).collect();
    assert_eq!(tokens, expected);
    let fua = CommandFlags::FUA | CommandFlags::PAYLOAD_LEN;
    assert!(heads[..38].iter().zip(&sent).all(|(head, sent)| head.flags == fua && sent.1[..] == b"abc"[..]));
    assert_eq!(sent[38].1[..], [0, 0, 0, 0, 0, 0, 3, 232, 0, 0, 0, 1], "the context has another id now");
    assert!(receive(&mut session, &reply(3, ChunkType::NONE, &[])).unwrap().is_some());
}
