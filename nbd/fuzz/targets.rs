//! What is fuzzed: functions that take any bytes, and panic where a promise is broken.
//!
//! They are called by the targets of cargo-fuzz beside this file, and by `tests/fuzz_corpus.rs` with the stable compiler.

use std::sync::Arc;

use bytes::BytesMut;
use nbd::export::ZeroMode;
use nbd::limits::{MAX_ERROR_PAYLOAD, MAX_PAYLOAD, MAX_STATUS_PAYLOAD};
use nbd::memory::{MemoryDisk, SingleExport};
use nbd::proto::client::{Goal, Negotiated, Negotiation, Operation, Outcome, Plan, Session};
use nbd::proto::server::{Handshake, Requests, Rules, Step, TlsMode, check};
use nbd::uri::NbdUri;
use nbd::wire::{
    ChunkHeader, ChunkType, Command, ErrorChunk, ExportRequest, ExtendedChunkHeader, Framing, Info, MetaContext,
    MetaQuery, OptionHeader, OptionReplyHeader, Request, ServerEntry, SimpleReply, StatusQuery, TransmissionFlags,
};

const SIZE: usize = 1 << 16;
/// Longest head of any message.
const HEAD: usize = 64;
/// Bytes that one option can make a server say of the one export here, for each byte that it takes to ask.
const ANSWER: usize = 64;

/// What a client sends, from its flags on. The first byte says how the bytes are cut.
pub fn server_session(data: &[u8]) {
    let Some((step, data)) = data.split_first() else { return };
    let exports = SingleExport::new("disk", Arc::new(MemoryDisk::zeroed(SIZE)));
    let (mut input, mut out) = (BytesMut::new(), BytesMut::new());
    // TLS is taken as done where the client asks for it.
    let tls = if *step == 0xfe { TlsMode::Required } else { TlsMode::Offered };
    let mut handshake = Handshake::new(&mut out).with_tls(tls);
    let mut entered: Option<(Requests, Rules)> = None;
    for piece in data.chunks(usize::from(*step) + 1) {
        input.extend_from_slice(piece);
        while entered.is_none() {
            match handshake.advance(&mut input, &exports, &mut out) {
                Ok(Step::NeedMore) => break,
                Ok(Step::Answered) => {}
                Ok(Step::Enter(granted)) => {
                    let rules = Rules {
                        size: granted.info.size,
                        read_only: granted.info.read_only,
                        minimum_block: granted.info.minimum_block,
                        fast_zero: granted.info.fast_zero,
                        framing: granted.framing,
                        contexts: !granted.contexts.is_empty(),
                    };
                    entered = Some((Requests::new(granted.framing), rules));
                }
                Ok(Step::StartTls) => handshake.tls_started(),
                Ok(Step::Aborted) | Err(_) => return,
            }
        }
        assert!(out.len() <= HEAD + ANSWER * (1 + data.len()), "{} bytes of answers", out.len());
        let Some((requests, rules)) = &mut entered else { continue };
        loop {
            match requests.next(&mut input) {
                Ok(Some(incoming)) => {
                    let request = incoming.request;
                    let fits = request.offset.checked_add(request.length).is_some_and(|end| end <= SIZE as u64);
                    let allowed = check(&request, rules).is_ok();
                    assert!(!allowed || fits || request.command == Command::FLUSH, "{request:?} is let through");
                    assert!(incoming.payload.len() <= MAX_PAYLOAD as usize);
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
        assert!(requests.wanted(&input) <= HEAD + MAX_PAYLOAD as usize);
    }
}

/// What a server sends, from its greeting on. The first two bytes say what the client asks for, and how the bytes are
/// cut.
pub fn client_session(data: &[u8]) {
    let [wish, step, data @ ..] = data else { return };
    let framing = framing(*wish);
    let goal = [Goal::Transmission, Goal::Info, Goal::List, Goal::Contexts][usize::from(wish / 4 % 4)];
    let tls = wish / 16 % 2 == 1;
    let contexts = vec!["base:allocation".to_owned()];
    let mut negotiation = Negotiation::new(Plan { goal, export: "disk".into(), framing, contexts, tls });
    let (mut input, mut out) = (BytesMut::new(), BytesMut::new());
    for (index, piece) in data.chunks(usize::from(*step) + 1).enumerate() {
        input.extend_from_slice(piece);
        match negotiation.advance(&mut input, &mut out) {
            Ok(None) => {}
            Ok(Some(Outcome::Export(negotiated))) if goal == Goal::Transmission => {
                assert!(negotiated.minimum_block.is_power_of_two() && negotiated.framing <= framing);
                let rest = data.chunks(usize::from(*step) + 1).skip(index + 1);
                return receive(&negotiated, rest);
            }
            Ok(Some(Outcome::StartTls)) => negotiation.tls_started(&mut out),
            _ => return,
        }
        assert!(out.len() <= 1 << 14, "{} bytes of options", out.len());
    }
}

/// What a server sends in the transmission phase. The first byte says in what form.
pub fn reply_chunks(data: &[u8]) {
    let Some((form, data)) = data.split_first() else { return };
    let negotiated = Negotiated {
        size: u64::MAX >> 1,
        flags: TransmissionFlags::HAS_FLAGS,
        minimum_block: 1,
        preferred_block: 4096,
        maximum_block: MAX_PAYLOAD,
        framing: framing(*form),
        contexts: vec![MetaContext { id: 1, name: "base:allocation".into() }],
        name: None,
        description: None,
    };
    receive(&negotiated, data.chunks(usize::from(form / 4) + 1));
}

fn framing(byte: u8) -> Framing {
    [Framing::Simple, Framing::Structured, Framing::Extended][usize::from(byte % 3)]
}

/// A session with one request of each kind in flight, cookies 1 to 7, hears this.
fn receive<'a>(negotiated: &Negotiated, pieces: impl Iterator<Item = &'a [u8]>) {
    let mut session = Session::new(negotiated);
    let length = 512;
    let operations = [
        Operation::Read { offset: 0, length: 512, whole: false },
        Operation::BlockStatus { offset: 0, length, contexts: Vec::new(), one: true },
        Operation::Write { offset: 0, data: vec![1; 8].into(), fua: true },
        Operation::Flush,
        Operation::Trim { offset: 0, length, fua: false },
        Operation::WriteZeroes { offset: 0, length, mode: ZeroMode::default(), fua: false },
        Operation::Cache { offset: 0, length },
    ];
    for (token, operation) in operations.iter().enumerate() {
        session.submit(operation, token);
    }
    let mut answered = [false; 7];
    let mut input = BytesMut::new();
    for piece in pieces {
        input.extend_from_slice(piece);
        loop {
            match session.receive(&mut input) {
                Ok(Some(completion)) => {
                    assert!(!answered[completion.token], "answered twice");
                    answered[completion.token] = true;
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
        let most = HEAD + 512 + (MAX_STATUS_PAYLOAD.max(MAX_ERROR_PAYLOAD)) as usize;
        assert!(session.wanted() <= most, "{} bytes are waited for", session.wanted());
    }
}

/// Every decoder: what it takes, it gives back as it was.
pub fn messages(data: &[u8]) {
    if let Ok(message) = ExportRequest::decode(data) {
        assert_eq!(encoded(|out| message.encode(out)), data);
    }
    if let Ok(message) = MetaQuery::decode(data) {
        assert_eq!(encoded(|out| message.encode(out)), data);
    }
    if let Ok(message) = MetaContext::decode(data) {
        assert_eq!(encoded(|out| message.encode(out)), data);
    }
    if let Ok(message) = ServerEntry::decode(data) {
        assert_eq!(encoded(|out| message.encode(out)), data);
    }
    match Info::decode(data) {
        // Of a kind without a name, the content is dropped.
        Ok(message @ Info::Other(_)) => assert_eq!(encoded(|out| message.encode(out)), data[..2]),
        Ok(message) => assert_eq!(encoded(|out| message.encode(out)), data),
        Err(_) => {}
    }
    if let Ok(message) = StatusQuery::decode(data) {
        assert_eq!(message.encode(), data);
    }
    if let Ok(message) = Request::decode(data) {
        assert_eq!(message.encode(), data[..Request::LENGTH]);
    }
    if let Ok(message) = Request::decode_extended(data) {
        assert_eq!(message.encode_extended(), data[..Request::EXTENDED_LENGTH]);
    }
    if let Ok(message) = SimpleReply::decode(data) {
        assert_eq!(message.encode(), data[..SimpleReply::LENGTH]);
    }
    if let Ok(message) = ChunkHeader::decode(data) {
        assert_eq!(message.encode(), data[..ChunkHeader::LENGTH]);
    }
    if let Ok(message) = ExtendedChunkHeader::decode(data) {
        assert_eq!(message.encode(), data[..ExtendedChunkHeader::LENGTH]);
    }
    for kind in [ChunkType::ERROR, ChunkType::ERROR_OFFSET, ChunkType(0x8fff)] {
        if let Ok(message) = ErrorChunk::decode(kind, data) {
            assert!(message.message.len() <= 3 * data.len());
        }
    }
    let _ = (OptionHeader::decode(data), OptionReplyHeader::decode(data));
}

fn encoded(encode: impl FnOnce(&mut BytesMut)) -> BytesMut {
    let mut out = BytesMut::new();
    encode(&mut out);
    out
}

/// A URI that is understood survives its text.
pub fn uri(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(uri) = text.parse::<NbdUri>() {
        assert_eq!(uri.to_string().parse(), Ok(uri), "{text:?}");
    }
}
