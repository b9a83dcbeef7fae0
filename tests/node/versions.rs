//! Two nodes of different versions: where there is no version that both speak, both sides say so, and nothing is done.
//!
//! The other version is played: it speaks the hello, which is the same in all versions, and is then looked at.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;

use lazy_migrate::error::Kind;
use lazy_migrate::peer::PREAMBLE_MESSAGES;
use lazy_migrate::peer::client::{CallError, PeerClient};
use lazy_migrate::peer::hello::{Hello, HelloAnswer, PROTOCOL_MAX};
use lazy_migrate::peer::link::PeerAddress;
use lazy_migrate::peer::{Request, Response, Subject};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::support::{Node, PATIENCE, free_port, random_image, wait_for};

const MIB: u64 = 1 << 20;

fn send(stream: &mut TcpStream, message: &impl Serialize) {
    let json = serde_json::to_vec(message).unwrap();
    stream.write_all(&(json.len() as u32).to_be_bytes()).unwrap();
    stream.write_all(&json).unwrap();
}

fn receive<T: DeserializeOwned>(stream: &mut TcpStream) -> T {
    let mut length = [0; 4];
    stream.read_exact(&mut length).unwrap();
    let mut json = vec![0; u32::from_be_bytes(length) as usize];
    stream.read_exact(&mut json).unwrap();
    serde_json::from_slice(&json).unwrap()
}

/// What is left of a connection whose other end closes it.
fn rest(mut stream: TcpStream) -> Vec<u8> {
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    rest
}

fn later() -> Hello {
    Hello { protocol_min: PROTOCOL_MAX + 1, protocol_max: PROTOCOL_MAX + 3, program: "99.0.0".into() }
}

fn discard() -> Request {
    let subject =
        Subject { disk: "web".into(), migration: serde_json::from_str("\"m\"").unwrap(), epoch: Default::default() };
    Request::Discard { subject, beat: None }
}

/// Dials a node as another version would.
fn dial(port: u16) -> TcpStream {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(PREAMBLE_MESSAGES).unwrap();
    stream
}

/// A node that answers the first frame with `answer`, whatever it is, and gives back what it heard.
fn played(answer: impl Serialize + Send + 'static) -> (String, thread::JoinHandle<(Hello, Vec<u8>)>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let peer = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut preamble = [0; PREAMBLE_MESSAGES.len()];
        stream.read_exact(&mut preamble).unwrap();
        assert_eq!(&preamble, PREAMBLE_MESSAGES);
        let hello = receive(&mut stream);
        send(&mut stream, &answer);
        (hello, rest(stream))
    });
    (address, peer)
}

#[test]
fn a_node_asks_nothing_of_one_of_another_version() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path().join("a"), &["--peer", &format!("127.0.0.1:{}", free_port())]);
    let image = dir.path().join("web.img");
    random_image(&image, MIB, 1);
    node.cli(&["add", "web", image.to_str().unwrap()]);
    let own = Hello::own();
    let refused = later().agree(&own).unwrap_err();
    // It says so itself; it says nothing, and this side finds out; and one that is older than the hello.
    let before = Response::Err(lazy_migrate::error::Failure::failed("the peer's message is not understood"));
    let peers = [played(HelloAnswer::Err(refused)), played(HelloAnswer::Ok(later())), played(before)];
    let texts = ["install a newer lazy-migrate on the host that has", "lazy-migrate 99.0.0 speaks", "not understood"];
    for ((address, peer), text) in peers.into_iter().zip(texts) {
        let said = node.try_cli(&["prepare", "web", "--to", &address]);
        assert_ne!(said.code, 0);
        assert!(said.stderr.contains(text) && said.stderr.contains(&own.to_string()), "{}", said.stderr);
        let (hello, asked) = peer.join().unwrap();
        assert_eq!(hello, own);
        assert_eq!(asked, b"", "something was asked of a node that does not understand it");
    }
    assert_eq!(node.status("web")["phase"], "serving");
    // That it is refused is no answer to the question: who asked may not take it for a no.
    let (address, _peer) = played(HelloAnswer::Ok(later()));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    match runtime.block_on(PeerClient::new(PeerAddress::plain(address)).call(&discard(), PATIENCE)) {
        Err(CallError::Silent(failure)) => assert_eq!(failure.kind, Kind::Refused, "{failure}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_node_does_nothing_for_one_of_another_version_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let port = free_port();
    let node = Node::start(dir.path().join("b"), &["--peer", &format!("127.0.0.1:{port}")]);
    let mut stream = dial(port);
    send(&mut stream, &later());
    match receive(&mut stream) {
        HelloAnswer::Err(failure) => assert_eq!(failure, Hello::own().agree(&later()).unwrap_err()),
        HelloAnswer::Ok(own) => panic!("{own:?} understands {:?}", later()),
    }
    // A question all the same is not taken up. It may be refused by the network already, as the connection has ended.
    let _ = stream.write_all(&[0; 64]);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    assert_eq!(answer, b"");
    wait_for("the node's operator to be told", || node.log().contains("lazy-migrate 99.0.0 speaks"));
    // One that is older than the hello understands this.
    let mut stream = dial(port);
    send(&mut stream, &discard());
    match receive(&mut stream) {
        Response::Err(failure) => assert!(failure.message.contains("before the hello"), "{failure}"),
        Response::Ok(reply) => panic!("{reply:?}"),
    }
    assert_eq!(rest(stream), b"");
    // One that speaks more than this one knows is understood.
    let mut stream = dial(port);
    send(&mut stream, &Hello { protocol_min: PROTOCOL_MAX, ..later() });
    assert_eq!(receive::<HelloAnswer>(&mut stream), HelloAnswer::Ok(Hello::own()));
    send(&mut stream, &discard());
    receive::<Response>(&mut stream);
}
