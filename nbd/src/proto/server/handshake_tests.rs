//! A client's options and their answers.

use super::*;
use crate::memory::{MemoryDisk, SingleExport};

fn exports() -> SingleExport {
    SingleExport::new("disk", Arc::new(MemoryDisk::zeroed(12345)))
}

fn flags(flags: ClientFlags) -> BytesMut {
    BytesMut::from(&flags.0.to_be_bytes()[..])
}

fn fixed() -> BytesMut {
    flags(ClientFlags::FIXED_NEWSTYLE | ClientFlags::NO_ZEROES)
}

fn option(option: OptionCode, data: &[u8]) -> BytesMut {
    let mut bytes = BytesMut::new();
    OptionHeader::encode(option, data, &mut bytes);
    bytes
}

fn export_request(name: &str, infos: &[InfoType]) -> BytesMut {
    let mut data = BytesMut::new();
    ExportRequest { name: name.into(), infos: infos.to_vec() }.encode(&mut data);
    data
}

fn meta_query(export: &str, queries: &[&str]) -> BytesMut {
    let mut data = BytesMut::new();
    let queries = queries.iter().map(|query| query.to_string()).collect();
    MetaQuery { export: export.into(), queries }.encode(&mut data);
    data
}

type Answers = Vec<(OptionReply, Vec<u8>)>;

fn answers(mut out: BytesMut) -> Answers {
    let mut answers = Vec::new();
    while !out.is_empty() {
        let header = OptionReplyHeader::decode(&out).unwrap();
        out.advance(OptionReplyHeader::LENGTH);
        answers.push((header.reply, out.split_to(header.length as usize).to_vec()));
    }
    answers
}

/// Feeds `input` in pieces of `step` bytes; what was sent after the greeting, and the last step.
fn feed(input: &[u8], step: usize) -> (BytesMut, Result<Step, HandshakeError>) {
    let mut greeting = BytesMut::new();
    let mut handshake = Handshake::new(&mut greeting);
    assert_eq!(greeting.len(), 18);
    let (mut buffer, mut out) = (BytesMut::new(), BytesMut::new());
    for piece in input.chunks(step) {
        buffer.extend_from_slice(piece);
        loop {
            match handshake.advance(&mut buffer, &exports(), &mut out) {
                Ok(Step::NeedMore) => break,
                Ok(Step::Answered) => {}
                end => return (out, end),
            }
        }
    }
    (out, Ok(Step::NeedMore))
}

fn replies(options: &[BytesMut]) -> Answers {
    let input = [vec![fixed()], options.to_vec()].concat().concat();
    let (out, _) = feed(&input, usize::MAX);
    assert_eq!(feed(&input, 1).0, out, "the answer must not depend on how the bytes arrive");
    answers(out)
}

fn kinds(options: &[BytesMut]) -> Vec<OptionReply> {
    replies(options).into_iter().map(|(reply, _)| reply).collect()
}

#[test]
fn unknown_client_flags_end_the_handshake() {
    let (_, end) = feed(&flags(ClientFlags(1 << 7)), usize::MAX);
    assert!(matches!(end, Err(HandshakeError::UnknownFlags(ClientFlags(128)))));
}

#[test]
fn an_unknown_option_is_answered_and_the_stream_stays_in_step() {
    let kinds = kinds(&[
        option(OptionCode(77), &[9; 100]),
        option(OptionCode(78), b""),
        option(OptionCode::PEEK_EXPORT, b"x"),
        option(OptionCode::LIST, b""),
    ]);
    let unsupported = OptionReply::ERR_UNSUP;
    assert_eq!(kinds, [unsupported, unsupported, unsupported, OptionReply::SERVER, OptionReply::ACK]);
}

#[test]
fn wrong_lengths_are_invalid_and_the_stream_stays_in_step() {
    let mut long_name = BytesMut::new();
    long_name.put_u32(MAX_STRING as u32 + 1);
    long_name.put_bytes(b'a', MAX_STRING + 1);
    long_name.put_u16(0);
    let invalid = OptionReply::ERR_INVALID;
    let options = [
        option(OptionCode::LIST, b"x"),
        option(OptionCode::STRUCTURED_REPLY, b"x"),
        option(OptionCode::GO, b""),
        option(OptionCode::GO, &[0xff; 6]),
        option(OptionCode::INFO, &[export_request("disk", &[]).as_ref(), b"x"].concat()),
        option(OptionCode::GO, &long_name),
        option(OptionCode::STRUCTURED_REPLY, b""),
        option(OptionCode::SET_META_CONTEXT, &[0, 0, 0, 0, 0, 0, 0, 9]),
        option(OptionCode::LIST_META_CONTEXT, b"123"),
        option(OptionCode::ABORT, b""),
    ];
    let ack = OptionReply::ACK;
    assert_eq!(kinds(&options), [invalid, invalid, invalid, invalid, invalid, invalid, ack, invalid, invalid, ack]);
}

#[test]
fn data_that_is_too_long_is_skipped() {
    let options = [option(OptionCode(77), &vec![1; MAX_OPTION_DATA as usize + 1]), option(OptionCode::ABORT, b"")];
    assert_eq!(kinds(&options), [OptionReply::ERR_TOO_BIG, OptionReply::ACK]);
}

#[test]
fn go_tells_size_and_what_was_asked() {
    let all = [InfoType::NAME, InfoType::DESCRIPTION, InfoType::BLOCK_SIZE, InfoType(99)];
    let answers = replies(&[option(OptionCode::GO, &export_request("disk", &all))]);
    let infos: Vec<_> = answers[..4].iter().map(|(_, data)| Info::decode(data).unwrap()).collect();
    let flags = TransmissionFlags::HAS_FLAGS
        | TransmissionFlags::SEND_FLUSH
        | TransmissionFlags::SEND_FUA
        | TransmissionFlags::SEND_TRIM
        | TransmissionFlags::SEND_WRITE_ZEROES
        | TransmissionFlags::CAN_MULTI_CONN
        | TransmissionFlags::SEND_CACHE
        | TransmissionFlags::SEND_FAST_ZERO;
    assert_eq!(
        infos,
        [
            Info::Export { size: 12345, flags },
            Info::Name("disk".into()),
            Info::Description("a disk in memory".into()),
            Info::BlockSize { minimum: 1, preferred: 4096, maximum: MAX_PAYLOAD },
        ]
    );
    assert_eq!(answers[4].0, OptionReply::ACK);
    let few = replies(&[option(OptionCode::GO, &export_request("", &[]))]);
    assert_eq!(few.len(), 2, "only the size is told unasked");
}

#[test]
fn an_unknown_export_can_be_corrected_with_go_but_not_with_export_name() {
    let unknown = kinds(&[
        option(OptionCode::GO, &export_request("nope", &[])),
        option(OptionCode::INFO, &export_request("disk", &[])),
    ]);
    assert_eq!(unknown, [OptionReply::ERR_UNKNOWN, OptionReply::INFO, OptionReply::ACK]);
    let input = [fixed(), option(OptionCode::EXPORT_NAME, b"nope")].concat();
    assert!(matches!(feed(&input, 3).1, Err(HandshakeError::NoSuchExport(name)) if name == "nope"));
}

#[test]
fn export_name_is_padded_unless_both_sides_agreed() {
    for (client, length) in [(ClientFlags::FIXED_NEWSTYLE, 134), (ClientFlags::NO_ZEROES, 10)] {
        let (out, end) = feed(&[flags(client), option(OptionCode::EXPORT_NAME, b"disk")].concat(), usize::MAX);
        assert!(matches!(end, Ok(Step::Enter(_))));
        assert_eq!((out.len(), out[..8].to_vec()), (length, 12345u64.to_be_bytes().to_vec()));
    }
}

fn entered(options: &[BytesMut]) -> Entered {
    match feed(&[vec![fixed()], options.to_vec()].concat().concat(), usize::MAX).1 {
        Ok(Step::Enter(entered)) => entered,
        _ => panic!("the handshake did not end in transmission"),
    }
}

#[test]
fn meta_contexts_need_structured_replies_and_hold_for_their_export_only() {
    let structured = || option(OptionCode::STRUCTURED_REPLY, b"");
    let set = |export, query| option(OptionCode::SET_META_CONTEXT, &meta_query(export, &[query]));
    let go = |name| option(OptionCode::GO, &export_request(name, &[]));
    assert_eq!(kinds(&[set("disk", "base:allocation")]), [OptionReply::ERR_INVALID]);
    let chosen = |options: &[BytesMut]| entered(options).contexts.len();
    assert_eq!(chosen(&[structured(), set("disk", "base:allocation"), go("disk")]), 1);
    assert_eq!(chosen(&[structured(), set("", "base:allocation"), go("disk")]), 0, "another export's name");
    assert_eq!(chosen(&[structured(), set("disk", "base:"), go("disk")]), 0, "a namespace is not a context");
    let twice = [structured(), set("disk", "base:allocation"), set("disk", "x:y"), go("disk")];
    assert_eq!(chosen(&twice), 0, "the last SET wins");
    let failed = [structured(), set("disk", "base:allocation"), set("nope", "base:allocation"), go("disk")];
    assert_eq!(chosen(&failed), 0, "a SET that failed leaves nothing chosen");
    let structured_flags = entered(&[structured(), go("disk")]);
    assert_eq!(structured_flags.framing, Framing::Structured);
    let flags = transmission_flags(&structured_flags.info, Framing::Structured, true);
    assert!(flags.contains(TransmissionFlags::SEND_DF) && !flags.contains(TransmissionFlags::BLOCK_STATUS_PAYLOAD));
}

#[test]
fn contexts_are_listed_by_namespace() {
    let list = |queries: &[&str]| {
        let options = [
            option(OptionCode::STRUCTURED_REPLY, b""),
            option(OptionCode::LIST_META_CONTEXT, &meta_query("disk", queries)),
        ];
        replies(&options).iter().filter(|(reply, _)| *reply == OptionReply::META_CONTEXT).count()
    };
    assert_eq!(list(&[]), 1);
    assert_eq!(list(&["base:"]), 1);
    assert_eq!(list(&["base:allocation"]), 1);
    assert_eq!(list(&["other:"]), 0);
}

#[test]
fn extended_headers_take_precedence_and_need_go() {
    let extended = || option(OptionCode::EXTENDED_HEADERS, b"");
    let structured = || option(OptionCode::STRUCTURED_REPLY, b"");
    let (ack, required) = (OptionReply::ACK, OptionReply::ERR_EXT_HEADER_REQD);
    assert_eq!(kinds(&[structured(), extended(), structured()]), [ack, ack, required]);
    assert_eq!(kinds(&[option(OptionCode::EXTENDED_HEADERS, b"x")]), [OptionReply::ERR_INVALID]);
    let input = [fixed(), extended(), option(OptionCode::EXPORT_NAME, b"disk")].concat();
    assert!(matches!(feed(&input, 1).1, Err(HandshakeError::ExtendedExportName)));
    let set = |export| option(OptionCode::SET_META_CONTEXT, &meta_query(export, &["base:allocation"]));
    let go = || option(OptionCode::GO, &export_request("disk", &[]));
    for (chosen_for, contexts) in [("disk", 1), ("", 0)] {
        let options = [extended(), set(chosen_for), go()];
        let entered = entered(&options);
        assert_eq!((entered.framing, entered.contexts.len()), (Framing::Extended, contexts));
        let answers = replies(&options);
        let Ok(Info::Export { flags, .. }) = Info::decode(&answers[answers.len() - 2].1) else { panic!() };
        let payload = flags.contains(TransmissionFlags::BLOCK_STATUS_PAYLOAD);
        assert_eq!(payload, contexts > 0, "only where there is a context to choose");
    }
}

#[test]
fn ids_of_contexts_are_for_those_that_were_set() {
    let ids = |code, queries: &[&str]| {
        let options = [option(OptionCode::EXTENDED_HEADERS, b""), option(code, &meta_query("disk", queries))];
        let contexts: Vec<_> = replies(&options)[1..]
            .iter()
            .filter(|(reply, _)| *reply == OptionReply::META_CONTEXT)
            .map(|(_, data)| MetaContext::decode(data).unwrap().id)
            .collect();
        contexts
    };
    assert_eq!(ids(OptionCode::LIST_META_CONTEXT, &["base:"]), [0]);
    assert_eq!(ids(OptionCode::SET_META_CONTEXT, &["x:y", "base:allocation", "base:allocation"]), [1]);
    assert_eq!(ids(OptionCode::SET_META_CONTEXT, &[]), [0; 0]);
    assert_eq!(ids(OptionCode::SET_META_CONTEXT, &["no colon", "base:", "base:other"]), [0; 0]);
}

#[test]
fn too_many_queries_are_refused_and_choose_nothing() {
    let queries = vec!["base:allocation"; MAX_QUERIES + 1];
    let set = |queries: &[&str]| option(OptionCode::SET_META_CONTEXT, &meta_query("disk", queries));
    let options = [
        option(OptionCode::EXTENDED_HEADERS, b""),
        set(&queries[1..]),
        set(&queries),
        option(OptionCode::GO, &export_request("disk", &[])),
    ];
    let kinds = kinds(&options);
    assert_eq!(kinds[1..4], [OptionReply::META_CONTEXT, OptionReply::ACK, OptionReply::ERR_TOO_BIG]);
    assert_eq!(entered(&options).contexts, []);
}

#[test]
fn a_server_that_shuts_down_answers_only_an_abort() {
    let (mut input, mut out) = (fixed(), BytesMut::new());
    let mut handshake = Handshake::new(&mut BytesMut::new());
    handshake.shut_down();
    input.unsplit(option(OptionCode::LIST, b""));
    input.unsplit(option(OptionCode::GO, &export_request("disk", &[])));
    input.unsplit(option(OptionCode(77), b""));
    input.unsplit(option(OptionCode::ABORT, b""));
    while let Ok(Step::Answered) = handshake.advance(&mut input, &exports(), &mut out) {}
    let kinds: Vec<_> = answers(out).into_iter().map(|(reply, _)| reply).collect();
    let refused = OptionReply::ERR_SHUTDOWN;
    assert_eq!(kinds, [refused, refused, refused, OptionReply::ACK]);
    let mut input = [fixed(), option(OptionCode::EXPORT_NAME, b"disk")].concat()[..].into();
    let mut handshake = Handshake::new(&mut BytesMut::new());
    handshake.shut_down();
    let end = handshake.advance(&mut input, &exports(), &mut BytesMut::new());
    assert!(matches!(end, Err(HandshakeError::ShuttingDown)));
}
