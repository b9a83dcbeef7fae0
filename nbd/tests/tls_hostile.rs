//! Peers that meddle with the beginning of TLS, or do not come to its end.

#[path = "common/certificates.rs"]
mod certificates;
mod common;

use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut, BytesMut};
use certificates::Certificates;
use common::{until, within};
use nbd::client::{Client, ClientError, ConnectOptions};
use nbd::export::{Export, Exports};
use nbd::limits::HANDSHAKE_TIME;
use nbd::memory::{MemoryDisk, SingleExport};
use nbd::proto::client::NegotiationError;
use nbd::proto::server::HandshakeError;
use nbd::server::{Ended, Listener, ServeOptions, ServerError, TlsPolicy, serve_connection};
use nbd::tls::TlsError;
use nbd::uri::NbdUri;
use nbd::wire::{INIT_MAGIC, OPTION_MAGIC, OptionCode, OptionHeader, OptionReply, OptionReplyHeader};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// The head of a TLS record that announces a ClientHello of 512 bytes.
const HALF_HELLO: [u8; 9] = [0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc];

/// Exports that nobody may look at.
struct Secret;

impl Exports for Secret {
    fn find(&self, name: &str) -> Option<Arc<dyn Export>> {
        panic!("the export {name:?} was looked up")
    }

    fn list(&self) -> Vec<(String, String)> {
        panic!("the exports were listed")
    }
}

type Outcome = JoinHandle<Result<Ended, ServerError>>;

fn serve(tls: TlsPolicy, exports: Arc<dyn Exports>) -> (DuplexStream, Outcome) {
    let (near, far) = duplex(1 << 16);
    let options = ServeOptions { tls, ..ServeOptions::default() };
    let ended = tokio::spawn(async move { serve_connection(far, exports, &options, CancellationToken::new()).await });
    (near, ended)
}

fn secret(certificates: &Certificates) -> (DuplexStream, Outcome) {
    serve(TlsPolicy::Required(certificates.server()), Arc::new(Secret))
}

fn disk() -> Arc<dyn Exports> {
    Arc::new(SingleExport::new("disk", Arc::new(MemoryDisk::zeroed(4096))))
}

fn option(code: OptionCode, data: &[u8]) -> BytesMut {
    let mut out = BytesMut::new();
    OptionHeader::encode(code, data, &mut out);
    out
}

fn reply(code: OptionCode, reply: OptionReply) -> BytesMut {
    let mut out = BytesMut::new();
    OptionReplyHeader::encode(code, reply, b"", &mut out);
    out
}

/// Reads the greeting and sends the client's flags and these options behind it in one piece.
async fn ask(stream: &mut DuplexStream, options: &[BytesMut]) {
    within(stream.read_exact(&mut [0; 18])).await.unwrap();
    stream.write_all(&[3u32.to_be_bytes().to_vec(), options.concat()].concat()).await.unwrap();
}

async fn answer(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> OptionReply {
    let mut head = [0; OptionReplyHeader::LENGTH];
    within(stream.read_exact(&mut head)).await.unwrap();
    let header = OptionReplyHeader::decode(&head).unwrap();
    within(stream.read_exact(&mut vec![0; header.length as usize])).await.unwrap();
    header.reply
}

#[tokio::test]
async fn without_tls_a_server_that_requires_it_tells_nothing() {
    let certificates = Certificates::new();
    let (mut stream, ended) = secret(&certificates);
    let asked = [OptionCode::LIST, OptionCode::INFO, OptionCode::GO, OptionCode::SET_META_CONTEXT, OptionCode(99)];
    ask(&mut stream, &asked.map(|code| option(code, b"\0\0\0\x04disk\0\0"))).await;
    for code in asked {
        assert_eq!(answer(&mut stream).await, OptionReply::ERR_TLS_REQD, "{code}");
    }
    stream.write_all(&option(OptionCode::EXPORT_NAME, b"disk")).await.unwrap();
    assert_eq!(within(stream.read_to_end(&mut Vec::new())).await.unwrap(), 0);
    let ended = within(ended).await.unwrap().unwrap_err();
    assert!(matches!(ended, ServerError::Handshake(HandshakeError::TlsRequired)), "{ended:?}");
    let (stream, _) = secret(&certificates);
    let error = within(Client::handshake(stream, "disk", &ConnectOptions::default())).await.err().unwrap();
    assert!(error.to_string().contains("use nbds://"), "{error}");
}

#[tokio::test]
async fn options_behind_starttls_are_never_answered() {
    let certificates = Certificates::new();
    let (mut stream, ended) = secret(&certificates);
    ask(&mut stream, &[option(OptionCode::STARTTLS, b""), option(OptionCode::LIST, b"")]).await;
    // Not even the acknowledgement, and certainly no list.
    assert_eq!(within(stream.read_to_end(&mut Vec::new())).await.unwrap(), 0);
    let ended = within(ended).await.unwrap().unwrap_err();
    assert!(matches!(ended, ServerError::Handshake(HandshakeError::PlaintextAfterStartTls)), "{ended:?}");

    // A moment later, it is a part of the TLS handshake, which it breaks.
    let (mut stream, ended) = secret(&certificates);
    ask(&mut stream, &[option(OptionCode::STARTTLS, b"")]).await;
    assert_eq!(answer(&mut stream).await, OptionReply::ACK);
    stream.write_all(&option(OptionCode::LIST, b"")).await.unwrap();
    let ended = within(ended).await.unwrap().unwrap_err();
    assert!(matches!(&ended, ServerError::Tls(error) if error.to_string().contains("not TLS")), "{ended:?}");
}

#[tokio::test]
async fn starttls_within_tls_is_invalid_and_the_connection_goes_on() {
    let certificates = Certificates::new();
    let (mut stream, ended) = serve(TlsPolicy::Offered(certificates.server()), disk());
    ask(&mut stream, &[option(OptionCode::STARTTLS, b"")]).await;
    assert_eq!(answer(&mut stream).await, OptionReply::ACK);
    let mut stream = within(certificates.client().connect("localhost", stream)).await.unwrap();
    for (code, expected) in [
        (OptionCode::STARTTLS, OptionReply::ERR_INVALID),
        (OptionCode::STRUCTURED_REPLY, OptionReply::ACK),
        (OptionCode::ABORT, OptionReply::ACK),
    ] {
        stream.write_all(&option(code, b"")).await.unwrap();
        assert_eq!(answer(&mut stream).await, expected);
    }
    // The end says that it is the end.
    assert_eq!(within(stream.read_to_end(&mut Vec::new())).await.unwrap(), 0);
    assert_eq!(within(ended).await.unwrap().unwrap(), Ended::DuringHandshake);
}

/// A server that acknowledges STARTTLS and sends something behind it; what the client thinks of it.
async fn injected(behind: &[u8]) -> ClientError {
    let (near, mut far) = duplex(1 << 16);
    let behind = behind.to_vec();
    let server = tokio::spawn(async move {
        let mut greeting = BytesMut::new();
        greeting.put_u64(INIT_MAGIC);
        greeting.put_u64(OPTION_MAGIC);
        greeting.put_u16(3);
        far.write_all(&greeting).await.unwrap();
        far.read_exact(&mut [0; 4 + OptionHeader::LENGTH]).await.unwrap();
        far.write_all(&[&reply(OptionCode::STARTTLS, OptionReply::ACK)[..], &behind[..]].concat()).await.unwrap();
        // Whatever comes now must not be an option.
        let mut rest = Vec::new();
        let _ = far.read_to_end(&mut rest).await;
        assert!(!rest.starts_with(&OPTION_MAGIC.to_be_bytes()), "an option in plain text");
    });
    let options = Certificates::new().options();
    let error = within(Client::handshake(near, "disk", &options)).await.err().expect("it was let in");
    within(server).await.unwrap();
    error
}

#[tokio::test]
async fn replies_behind_the_acknowledgement_are_never_believed() {
    let extended = reply(OptionCode::EXTENDED_HEADERS, OptionReply::ACK);
    for behind in [&extended[..], &extended[..1]] {
        let error = injected(behind).await;
        let known = matches!(error, ClientError::Negotiation(NegotiationError::PlaintextAfterStartTls));
        assert!(known, "{error:?}");
    }
}

#[tokio::test]
async fn a_refusal_of_tls_is_not_taken_for_leave_to_go_without() {
    let (stream, ended) = serve(TlsPolicy::Off, Arc::new(Secret));
    let error = within(Client::handshake(stream, "disk", &Certificates::new().options())).await.err().unwrap();
    assert!(matches!(error, ClientError::Negotiation(NegotiationError::TlsRefused { .. })), "{error:?}");
    assert_eq!(within(ended).await.unwrap().unwrap(), Ended::DuringHandshake);
    let uri = NbdUri { tls: true, ..NbdUri::new("127.0.0.1:1".parse().unwrap(), "disk") };
    let error = Client::connect(&uri, &ConnectOptions::default()).await.err().unwrap();
    assert!(matches!(error, ClientError::Tls(TlsError::NoCertificates)), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn half_a_tls_handshake_ends_with_the_time_for_handshakes() {
    let certificates = Certificates::new();
    for sent in [&HALF_HELLO[..0], &HALF_HELLO[..3], &HALF_HELLO] {
        let (mut stream, ended) = secret(&certificates);
        ask(&mut stream, &[option(OptionCode::STARTTLS, b"")]).await;
        assert_eq!(answer(&mut stream).await, OptionReply::ACK);
        let begun = tokio::time::Instant::now();
        stream.write_all(sent).await.unwrap();
        let ended = ended.await.unwrap().unwrap_err();
        assert!(matches!(ended, ServerError::HandshakeTime(HANDSHAKE_TIME)), "{ended:?}");
        assert!(begun.elapsed() <= HANDSHAKE_TIME + Duration::from_secs(1), "{:?}", begun.elapsed());
    }
    // A server that begins TLS and then says nothing is left as well.
    let (near, mut far) = duplex(1 << 16);
    let connecting = tokio::spawn(async move {
        let options = Certificates::new().options();
        Client::handshake(near, "disk", &options).await.err().unwrap()
    });
    far.write_u64(INIT_MAGIC).await.unwrap();
    far.write_u64(OPTION_MAGIC).await.unwrap();
    far.write_u16(3).await.unwrap();
    far.write_all(&reply(OptionCode::STARTTLS, OptionReply::ACK)[..10]).await.unwrap();
    far.read_exact(&mut [0; 4 + OptionHeader::LENGTH]).await.unwrap();
    far.write_all(&reply(OptionCode::STARTTLS, OptionReply::ACK)[10..]).await.unwrap();
    assert!(matches!(connecting.await.unwrap(), ClientError::HandshakeTime(HANDSHAKE_TIME)));
}

#[tokio::test]
async fn a_flood_of_half_handshakes_takes_only_the_places_of_handshakes() {
    let (certificates, place) = (Certificates::new(), tempfile::tempdir().unwrap());
    let path = place.path().join("s");
    let listener = Listener::bind(&nbd::address::Address::Unix(path.clone())).await.unwrap();
    let shutdown = CancellationToken::new();
    let options = ServeOptions {
        tls: TlsPolicy::Required(certificates.server()),
        handshake_time: Duration::from_millis(300),
        max_handshakes: 4,
        ..ServeOptions::default()
    };
    let uri = NbdUri { tls: true, ..NbdUri::new(listener.address().clone(), "disk") };
    tokio::spawn(listener.run(disk(), options, shutdown.clone()));
    let client = within(Client::connect(&uri, &certificates.options())).await.unwrap();
    let mut flood = Vec::new();
    for _ in 0..20 {
        let mut stream = UnixStream::connect(&path).await.unwrap();
        let hello = [&3u32.to_be_bytes()[..], &option(OptionCode::STARTTLS, b"")].concat();
        stream.write_all(&hello).await.unwrap();
        flood.push(stream);
    }
    // Who is in is not disturbed, and who comes gets its turn when the others' time is over.
    within(client.read(0, 512)).await.unwrap();
    let begun = std::time::Instant::now();
    let second = within(Client::connect(&uri, &certificates.options())).await.unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(300), "the flood held no place");
    within(second.read(0, 512)).await.unwrap();
    drop(flood);
    shutdown.cancel();
    until("the listener is gone", || !path.exists()).await;
}
