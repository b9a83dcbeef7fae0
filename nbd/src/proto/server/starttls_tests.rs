//! STARTTLS, and what is answered before it.

use super::*;
use crate::memory::{MemoryDisk, SingleExport};

/// Exports that must not be looked at.
struct Secret;

impl Exports for Secret {
    fn find(&self, name: &str) -> Option<Arc<dyn Export>> {
        panic!("the export {name:?} was looked up")
    }

    fn list(&self) -> Vec<(String, String)> {
        panic!("the exports were listed")
    }
}

fn fixed() -> BytesMut {
    BytesMut::from(&(ClientFlags::FIXED_NEWSTYLE | ClientFlags::NO_ZEROES).0.to_be_bytes()[..])
}

fn option(option: OptionCode, data: &[u8]) -> BytesMut {
    let mut bytes = BytesMut::new();
    OptionHeader::encode(option, data, &mut bytes);
    bytes
}

fn begin(tls: TlsMode) -> Handshake {
    Handshake::new(&mut BytesMut::new()).with_tls(tls)
}

/// Goes on until something else than an answer is to be done; what was answered until then.
fn run(
    handshake: &mut Handshake,
    input: &mut BytesMut,
    exports: &dyn Exports,
) -> (Vec<OptionReply>, Result<Step, HandshakeError>) {
    let mut out = BytesMut::new();
    let end = loop {
        match handshake.advance(input, exports, &mut out) {
            Ok(Step::Answered) => {}
            end => break end,
        }
    };
    let mut answers = Vec::new();
    while !out.is_empty() {
        let header = OptionReplyHeader::decode(&out).unwrap();
        out.advance(OptionReplyHeader::LENGTH + header.length as usize);
        answers.push(header.reply);
    }
    (answers, end)
}

fn after(tls: TlsMode, options: &[BytesMut]) -> (Vec<OptionReply>, Result<Step, HandshakeError>) {
    let mut input = BytesMut::from(&[vec![fixed()], options.to_vec()].concat().concat()[..]);
    run(&mut begin(tls), &mut input, &Secret)
}

#[test]
fn before_required_tls_nothing_else_is_answered() {
    let mut options = Vec::new();
    for code in (3..=12).filter(|code| OptionCode(*code) != OptionCode::STARTTLS).chain([99, u32::MAX]) {
        for length in [0, 5, 70_000] {
            options.push(option(OptionCode(code), &vec![0; length]));
        }
    }
    let count = options.len();
    options.push(option(OptionCode::ABORT, b""));
    let (answers, end) = after(TlsMode::Required, &options);
    assert_eq!(answers[..count], vec![OptionReply::ERR_TLS_REQD; count]);
    assert_eq!(answers[count..], [OptionReply::ACK]);
    assert!(matches!(end, Ok(Step::Aborted)));
    for name in [b"disk".as_slice(), b"", b"\xff"] {
        let (answers, end) = after(TlsMode::Required, &[option(OptionCode::EXPORT_NAME, name)]);
        assert!(answers.is_empty() && matches!(end, Err(HandshakeError::TlsRequired)));
    }
}

#[test]
fn starttls_has_no_data_and_one_with_data_begins_nothing() {
    for tls in [TlsMode::Offered, TlsMode::Required] {
        let options = [option(OptionCode::STARTTLS, b"x"), option(OptionCode::STARTTLS, b"")];
        let (answers, end) = after(tls, &options);
        assert_eq!(answers, [OptionReply::ERR_INVALID, OptionReply::ACK]);
        assert!(matches!(end, Ok(Step::StartTls)));
    }
}

#[test]
fn without_tls_starttls_is_refused_and_tls_never_asked_for() {
    let options = [option(OptionCode::STARTTLS, b""), option(OptionCode(99), b""), option(OptionCode::ABORT, b"")];
    let (answers, _) = after(TlsMode::Off, &options);
    assert_eq!(answers, [OptionReply::ERR_POLICY, OptionReply::ERR_UNSUP, OptionReply::ACK]);
}

#[test]
fn a_server_that_shuts_down_begins_no_tls() {
    let mut handshake = begin(TlsMode::Required);
    handshake.shut_down();
    let mut input = BytesMut::from(&[fixed(), option(OptionCode::STARTTLS, b"")].concat()[..]);
    assert_eq!(run(&mut handshake, &mut input, &Secret).0, [OptionReply::ERR_SHUTDOWN]);
}

#[test]
fn what_is_sent_in_plain_text_behind_starttls_is_never_acted_upon() {
    let head = [fixed(), option(OptionCode::STARTTLS, b"")].concat();
    let all = [head.clone(), option(OptionCode::LIST, b"").to_vec(), option(OptionCode::EXPORT_NAME, b"x").to_vec()];
    let all = all.concat();
    for cut in 0..=all.len() {
        let mut handshake = begin(TlsMode::Required);
        let mut input = BytesMut::from(&all[..cut]);
        let (mut answers, mut end) = run(&mut handshake, &mut input, &Secret);
        if cut < head.len() {
            assert!(answers.is_empty() && matches!(end, Ok(Step::NeedMore)), "{cut}");
            input.extend_from_slice(&all[cut..]);
            (answers, end) = run(&mut handshake, &mut input, &Secret);
        }
        assert_eq!(answers, [OptionReply::ACK], "{cut}");
        match end {
            // All of it is the TLS handshake's now, which takes it for what it is.
            Ok(Step::StartTls) => assert!(cut == head.len() && input.is_empty(), "{cut}"),
            end => assert!(matches!(end, Err(HandshakeError::PlaintextAfterStartTls)), "{cut}"),
        }
    }
}

#[test]
fn tls_forgets_what_was_negotiated_before_it() {
    let exports = SingleExport::new("disk", Arc::new(MemoryDisk::zeroed(4096)));
    let mut query = BytesMut::new();
    MetaQuery { export: "disk".into(), queries: vec!["base:allocation".into()] }.encode(&mut query);
    let mut go = BytesMut::new();
    ExportRequest { name: "disk".into(), infos: Vec::new() }.encode(&mut go);
    let before = [
        fixed(),
        option(OptionCode::STRUCTURED_REPLY, b""),
        option(OptionCode::SET_META_CONTEXT, &query),
        option(OptionCode::EXTENDED_HEADERS, b""),
        option(OptionCode::STARTTLS, b""),
    ]
    .concat();
    let within = [
        option(OptionCode::STARTTLS, b""),
        option(OptionCode::SET_META_CONTEXT, &query),
        option(OptionCode::LIST, b""),
        option(OptionCode::STARTTLS, b"x"),
        option(OptionCode::GO, &go),
    ]
    .concat();
    for step in 1..=before.len().max(within.len()) {
        let mut handshake = begin(TlsMode::Offered);
        let mut feed = |bytes: &[u8]| {
            let (mut input, mut answers, mut end) = (BytesMut::new(), Vec::new(), Ok(Step::NeedMore));
            for piece in bytes.chunks(step) {
                assert!(matches!(end, Ok(Step::NeedMore)));
                input.extend_from_slice(piece);
                let more;
                (more, end) = run(&mut handshake, &mut input, &exports);
                answers.extend(more);
            }
            (answers, end)
        };
        let (answers, end) = feed(&before);
        let (ack, invalid) = (OptionReply::ACK, OptionReply::ERR_INVALID);
        assert_eq!(answers, [ack, OptionReply::META_CONTEXT, ack, ack, ack]);
        assert!(matches!(end, Ok(Step::StartTls)));
        handshake.tls_started();
        let mut feed = |bytes: &[u8]| {
            let (mut input, mut answers, mut end) = (BytesMut::new(), Vec::new(), Ok(Step::NeedMore));
            for piece in bytes.chunks(step) {
                input.extend_from_slice(piece);
                let more;
                (more, end) = run(&mut handshake, &mut input, &exports);
                answers.extend(more);
            }
            (answers, end)
        };
        let (answers, end) = feed(&within);
        let expected = [invalid, invalid, OptionReply::SERVER, ack, invalid, OptionReply::INFO, ack];
        assert_eq!(answers, expected);
        let Ok(Step::Enter(entered)) = end else { panic!("it did not enter") };
        assert!(entered.framing == Framing::Simple && entered.contexts.is_empty());
    }
}
