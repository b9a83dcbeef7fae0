//! What a client asks for, and what a server may answer.

use super::*;

fn plan(goal: Goal) -> Plan {
    Plan {
        goal,
        export: "disk".into(),
        framing: Framing::Extended,
        contexts: vec!["base:allocation".into()],
        tls: false,
    }
}

/// Plays the server: each entry is what it sends next; the answer is how the negotiation ended.
fn play(plan: Plan, script: &[BytesMut]) -> (Result<Option<Outcome>, NegotiationError>, BytesMut) {
    let mut negotiation = Negotiation::new(plan);
    let mut out = BytesMut::new();
    let mut last = Ok(None);
    for message in script {
        last = negotiation.advance(&mut message.clone(), &mut out);
        if !matches!(last, Ok(None)) {
            break;
        }
    }
    (last, out)
}

fn greeting(flags: HandshakeFlags) -> BytesMut {
    let mut bytes = BytesMut::new();
    bytes.put_u64(INIT_MAGIC);
    bytes.put_u64(OPTION_MAGIC);
    bytes.put_u16(flags.0);
    bytes
}

fn fixed() -> BytesMut {
    greeting(HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES)
}

fn reply(option: OptionCode, reply: OptionReply, data: &[u8]) -> BytesMut {
    let mut bytes = BytesMut::new();
    OptionReplyHeader::encode(option, reply, data, &mut bytes);
    bytes
}

fn info(option: OptionCode, info: Info) -> BytesMut {
    let mut data = BytesMut::new();
    info.encode(&mut data);
    reply(option, OptionReply::INFO, &data)
}

fn no_extended() -> BytesMut {
    reply(OptionCode::EXTENDED_HEADERS, OptionReply::ERR_UNSUP, b"")
}

const EXPORT: Info = Info::Export { size: 4096, flags: TransmissionFlags::HAS_FLAGS };

#[test]
fn a_server_without_go_is_asked_by_export_name() {
    let mut size = BytesMut::new();
    size.put_u64(12345);
    size.put_u16(TransmissionFlags::HAS_FLAGS.0);
    let script = [
        fixed(),
        no_extended(),
        reply(OptionCode::STRUCTURED_REPLY, OptionReply::ERR_UNSUP, b""),
        reply(OptionCode::GO, OptionReply::ERR_UNSUP, b""),
        size.clone(),
    ];
    let (outcome, _) = play(plan(Goal::Transmission), &script);
    let Ok(Some(Outcome::Export(negotiated))) = outcome else { panic!("{outcome:?}") };
    assert_eq!((negotiated.size, negotiated.framing), (12345, Framing::Simple));
    // A newstyle server that is not fixed, with its padding.
    size.put_bytes(0, EXPORT_NAME_PADDING);
    let (outcome, _) = play(plan(Goal::Transmission), &[greeting(HandshakeFlags::NONE), size]);
    assert!(matches!(outcome, Ok(Some(Outcome::Export(_)))), "{outcome:?}");
}

#[test]
fn refusals_say_what_the_server_said() {
    let structured = reply(OptionCode::STRUCTURED_REPLY, OptionReply::ERR_UNSUP, b"");
    let script = [fixed(), no_extended(), structured, reply(OptionCode::GO, OptionReply::ERR_UNKNOWN, b"try another")];
    let error = play(plan(Goal::Transmission), &script).0.unwrap_err();
    assert_eq!(error.to_string(), "the server has no export \"disk\" (it says: try another)");
    let script = [fixed(), reply(OptionCode::EXTENDED_HEADERS, OptionReply::ERR_TLS_REQD, b"")];
    let (outcome, sent) = play(plan(Goal::Transmission), &script);
    assert_eq!(outcome, Err(NegotiationError::TlsRequired(String::new())));
    let last = OptionHeader::decode(&sent[sent.len() - OptionHeader::LENGTH..]).unwrap();
    assert_eq!(last.option, OptionCode::ABORT, "it takes leave");
}

#[test]
fn what_a_hostile_server_says_is_refused() {
    let ok = || reply(OptionCode::EXTENDED_HEADERS, OptionReply::ACK, b"");
    let no_contexts = || reply(OptionCode::SET_META_CONTEXT, OptionReply::ACK, b"");
    let ack = || reply(OptionCode::GO, OptionReply::ACK, b"");
    let sizes = |minimum, preferred, maximum| info(OptionCode::GO, Info::BlockSize { minimum, preferred, maximum });
    let huge = info(OptionCode::GO, Info::Export { size: 1 << 63, flags: TransmissionFlags::NONE });
    let mut early = ack();
    early.put_u8(0);
    let mut unasked = BytesMut::new();
    MetaContext { id: 1, name: "x:y".into() }.encode(&mut unasked);
    let go = |replies: Vec<BytesMut>| [vec![fixed(), ok(), no_contexts()], replies].concat();
    for (what, script) in [
        ("no size", go(vec![ack()])),
        ("size beyond 2^63", go(vec![huge, ack()])),
        ("minimum 0", go(vec![info(OptionCode::GO, EXPORT), sizes(0, 4096, 4096), ack()])),
        ("minimum 3", go(vec![info(OptionCode::GO, EXPORT), sizes(3, 4096, 4096), ack()])),
        ("preferred under minimum", go(vec![info(OptionCode::GO, EXPORT), sizes(4096, 512, 8192), ack()])),
        ("maximum under minimum", go(vec![info(OptionCode::GO, EXPORT), sizes(4096, 4096, 1), ack()])),
        ("bytes after the end", go(vec![info(OptionCode::GO, EXPORT), early])),
        ("another option", go(vec![reply(OptionCode::LIST, OptionReply::ACK, b"")])),
        ("a wrong kind", go(vec![reply(OptionCode::GO, OptionReply::SERVER, b"")])),
        (
            "a context not asked for",
            vec![fixed(), ok(), reply(OptionCode::SET_META_CONTEXT, OptionReply::META_CONTEXT, &unasked)],
        ),
    ] {
        let (outcome, _) = play(plan(Goal::Transmission), &script);
        assert!(matches!(outcome, Err(NegotiationError::Broken(_))), "{what}: {outcome:?}");
    }
    let (outcome, _) = play(plan(Goal::List), &[BytesMut::from(&b"HTTP"[..])]);
    assert_eq!(outcome, Err(NegotiationError::NotNbd));
}

#[test]
fn a_list_that_does_not_end_is_cut_off() {
    let mut data = BytesMut::new();
    ServerEntry { name: "a".into(), description: String::new() }.encode(&mut data);
    let mut script = vec![fixed()];
    script.extend((0..=MAX_OPTION_REPLIES).map(|_| reply(OptionCode::LIST, OptionReply::SERVER, &data)));
    assert!(matches!(play(plan(Goal::List), &script).0, Err(NegotiationError::Broken(_))));
}

#[test]
fn the_best_framing_that_the_server_has_is_used() {
    let yes = |option| reply(option, OptionReply::ACK, b"");
    let no = |option| reply(option, OptionReply::ERR_UNSUP, b"");
    let (extended, structured) = (OptionCode::EXTENDED_HEADERS, OptionCode::STRUCTURED_REPLY);
    let plan = || Plan { contexts: Vec::new(), ..plan(Goal::Transmission) };
    let export = || info(OptionCode::GO, EXPORT);
    let done = || reply(OptionCode::GO, OptionReply::ACK, b"");
    for (script, framing) in [
        (vec![fixed(), yes(extended), export(), done()], Framing::Extended),
        (vec![fixed(), no(extended), yes(structured), export(), done()], Framing::Structured),
        (vec![fixed(), no(extended), no(structured), export(), done()], Framing::Simple),
    ] {
        let (outcome, _) = play(plan(), &script);
        let Ok(Some(Outcome::Export(negotiated))) = outcome else { panic!("{outcome:?}") };
        assert_eq!(negotiated.framing, framing);
    }
    let (outcome, _) = play(plan(), &[fixed(), yes(extended), no(OptionCode::GO)]);
    assert!(matches!(outcome, Err(NegotiationError::Refused { .. })), "extended headers need GO: {outcome:?}");
}

#[test]
fn a_server_that_shuts_down_is_left() {
    for option in [OptionCode::EXTENDED_HEADERS, OptionCode::STRUCTURED_REPLY] {
        let mut script = vec![fixed()];
        if option == OptionCode::STRUCTURED_REPLY {
            script.push(no_extended());
        }
        script.push(reply(option, OptionReply::ERR_SHUTDOWN, b""));
        let (outcome, sent) = play(plan(Goal::Transmission), &script);
        assert!(matches!(outcome, Err(NegotiationError::Refused { .. })), "{outcome:?}");
        let last = OptionHeader::decode(&sent[sent.len() - OptionHeader::LENGTH..]).unwrap();
        assert_eq!(last.option, OptionCode::ABORT);
    }
}

fn over_tls(goal: Goal) -> Plan {
    Plan { tls: true, ..plan(goal) }
}

#[test]
fn tls_comes_first_and_then_everything_else() {
    for (goal, first) in [
        (Goal::Transmission, OptionCode::EXTENDED_HEADERS),
        (Goal::Info, OptionCode::EXTENDED_HEADERS),
        (Goal::List, OptionCode::LIST),
        (Goal::Contexts, OptionCode::EXTENDED_HEADERS),
    ] {
        let answer = reply(OptionCode::STARTTLS, OptionReply::ACK, b"");
        for step in 1..=answer.len() {
            let (mut input, mut out) = (BytesMut::new(), BytesMut::new());
            let mut negotiation = Negotiation::new(over_tls(goal));
            let mut last = None;
            for piece in fixed().chunks(step).chain(answer.chunks(step)) {
                assert_eq!(last, None, "{step}");
                input.extend_from_slice(piece);
                last = negotiation.advance(&mut input, &mut out).unwrap();
            }
            assert_eq!(last, Some(Outcome::StartTls), "{step}");
            out.advance(4);
            let mut only = BytesMut::new();
            OptionHeader::encode(OptionCode::STARTTLS, b"", &mut only);
            assert_eq!(out, only);
            out.clear();
            negotiation.tls_started(&mut out);
            assert_eq!(OptionHeader::decode(&out).unwrap().option, first);
        }
    }
}

#[test]
fn a_client_that_insists_on_tls_says_nothing_without_it() {
    for refusal in
        [OptionReply::ERR_UNSUP, OptionReply::ERR_POLICY, OptionReply::ERR_INVALID, OptionReply(1 << 31 | 99)]
    {
        let script = [fixed(), reply(OptionCode::STARTTLS, refusal, b"no")];
        let (end, mut out) = play(over_tls(Goal::Transmission), &script);
        assert_eq!(end, Err(NegotiationError::TlsRefused { reply: refusal, message: "no".into() }));
        let mut expected = BytesMut::new();
        expected.put_u32((ClientFlags::FIXED_NEWSTYLE | ClientFlags::NO_ZEROES).0);
        OptionHeader::encode(OptionCode::STARTTLS, b"", &mut expected);
        OptionHeader::encode(OptionCode::ABORT, b"", &mut expected);
        assert_eq!(out.split(), expected);
    }
    let (end, out) = play(over_tls(Goal::Transmission), &[greeting(HandshakeFlags::NO_ZEROES)]);
    assert_eq!(end, Err(NegotiationError::NotFixed("begin TLS")));
    assert_eq!(out.len(), 4, "only the flags");
}

#[test]
fn what_comes_in_plain_text_behind_the_answer_to_starttls_is_refused() {
    let ack = reply(OptionCode::STARTTLS, OptionReply::ACK, b"");
    let injected = reply(OptionCode::EXTENDED_HEADERS, OptionReply::ACK, b"");
    for length in 1..=injected.len() {
        let both = BytesMut::from(&[&ack[..], &injected[..length]].concat()[..]);
        let (end, _) = play(over_tls(Goal::Transmission), &[fixed(), both]);
        assert_eq!(end, Err(NegotiationError::PlaintextAfterStartTls), "{length}");
    }
}

#[test]
fn who_comes_without_tls_is_told_how_to_come_with_it() {
    let script = [fixed(), reply(OptionCode::EXTENDED_HEADERS, OptionReply::ERR_TLS_REQD, b"TLS first")];
    let error = play(plan(Goal::Transmission), &script).0.unwrap_err().to_string();
    assert!(error.contains("nbds://") && error.contains("TLS first"), "{error}");
}

#[test]
fn meta_contexts_are_listed() {
    let context = |name: &str| {
        let mut data = BytesMut::new();
        MetaContext { id: 0, name: name.to_owned() }.encode(&mut data);
        reply(OptionCode::LIST_META_CONTEXT, OptionReply::META_CONTEXT, &data)
    };
    let structured = |answer| reply(OptionCode::STRUCTURED_REPLY, answer, b"");
    let done = reply(OptionCode::LIST_META_CONTEXT, OptionReply::ACK, b"");
    // Whatever framing is asked for: contexts need chunks.
    let plan = Plan { framing: Framing::Simple, ..plan(Goal::Contexts) };
    let script = [fixed(), structured(OptionReply::ACK), context("base:allocation"), context("x:y"), done.clone()];
    let (end, out) = play(plan.clone(), &script);
    assert_eq!(end, Ok(Some(Outcome::Contexts(vec!["base:allocation".into(), "x:y".into()]))));
    let mut abort = BytesMut::new();
    OptionHeader::encode(OptionCode::ABORT, b"", &mut abort);
    assert!(out.ends_with(&abort));
    let (end, _) = play(plan.clone(), &[fixed(), structured(OptionReply::ACK), done]);
    assert_eq!(end, Ok(Some(Outcome::Contexts(Vec::new()))));
    let (end, _) = play(plan.clone(), &[fixed(), structured(OptionReply::ERR_UNSUP)]);
    assert!(matches!(end, Err(NegotiationError::Refused { option: OptionCode::STRUCTURED_REPLY, .. })), "{end:?}");
    let (end, _) = play(plan, &[greeting(HandshakeFlags::NONE)]);
    assert!(matches!(end, Err(NegotiationError::NotFixed(_))));
}
