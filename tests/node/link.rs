//! The link between two hosts is really unplugged: nodes in network namespaces, joined by a veth pair.

use std::time::Duration;

use crate::client::{Client, bytes, repeated};
use crate::support::network::{Fault, Network};
use crate::support::{Node, PATIENCE, hash, random_image};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 128 * MIB;
const A_MOMENT: Duration = Duration::from_millis(300);

struct Hosts {
    dir: tempfile::TempDir,
    a: Node,
    b: Node,
    network: Network,
    original: Vec<u8>,
}

/// A disk that was handed over from a to b, which is still filling when the link goes down and B has noticed. The client
/// has a write of a present block, a write of a missing one and a read of a missing one under way.
fn cut_off(name: &str) -> (Hosts, [Client; 3]) {
    let network = Network::new(name, "48mbit");
    let dir = tempfile::tempdir().unwrap();
    let web = dir.path().join("web.img");
    random_image(&web, SIZE, 61);
    let disk = format!("web={}", web.display());
    let options = ["--insecure", "--lease", "2s", "--peer"];
    let a = [&options[..], &["10.99.0.1:10810", "--disk", &disk]].concat();
    let b = [&options[..], &["10.99.0.2:10810"]].concat();
    let hosts = Hosts {
        a: Node::start_in(Some(&network.a), dir.path().join("a"), &a),
        b: Node::start_in(Some(&network.b), dir.path().join("b"), &b),
        original: std::fs::read(&web).unwrap(),
        network,
        dir,
    };
    hosts.a.cli(&["prepare", "web", "--to", "10.99.0.2:10810"]);
    hosts.a.cli(&["handover", "web"]);
    let mut clients = [(); 3].map(|()| Client::connect(&hosts.b.uri("web")));
    clients[0].write(0, 4096, 1);
    hosts.network.break_by(Fault::Down);
    let status = hosts.b.wait_status("web", "fenced", |status| status["phase"] == "fenced");
    assert!(status["missing_bytes"].as_u64().unwrap() > 0, "it was cut off while it was filling: {status}");
    let last = SIZE - 4096;
    for (client, request) in clients.iter_mut().zip([
        "write 0 4096 2".to_owned(),
        format!("write {last} 512 3"),
        format!("read {} 4096", last - 4096),
    ]) {
        client.send(&request);
        assert!(client.answer(A_MOMENT).is_none(), "'{request}' waits, and does not fail");
    }
    hosts.b.wait_status("web", "told that the link is down", |status| status["link"] == "down");
    hosts.a.wait_status("web", "told that the link is down", |status| status["link"] == "down");
    (hosts, clients)
}

#[test]
fn the_owner_goes_on_when_the_link_is_back() {
    let (hosts, mut clients) = cut_off("on");
    hosts.network.mend();
    let answers: Vec<_> = clients.iter().map(|client| client.answer(PATIENCE).expect("it goes on")).collect();
    assert_eq!(answers[..2], ["ok", "ok"]);
    let last = SIZE as usize - 4096;
    assert!(bytes(&answers[2]) == hosts.original[last - 4096..last]);
    hosts.b.cli(&["wait", "web", "--for", "active", "--timeout", "30s"]);
    hosts.network.full_speed();
    hosts.b.cli(&["wait", "web", "--timeout", "90s"]);
    hosts.a.cli(&["wait", "web", "--timeout", "30s"]);
    assert!(hosts.b.cli(&["verify", "web"]).ends_with("identical"));
    assert!(clients[0].read(0, 4096) == repeated(2, 4096));
    assert!(clients[1].read(last as u64, 512) == repeated(3, 512));
    assert!(hash(&hosts.dir.path().join("web.img")) == blake3::hash(&hosts.original), "the source's disk is untouched");
}

#[test]
fn the_owner_is_discarded_when_the_disk_was_taken_back_meanwhile() {
    let (hosts, mut clients) = cut_off("back");
    hosts.a.cli(&["rollback", "web", "--wait"]);
    assert!(hash(&hosts.dir.path().join("web.img")) == blake3::hash(&hosts.original), "the freeze point");
    let mut client = Client::connect(&hosts.a.uri("web"));
    client.write(0, 4096, 9);
    assert_eq!(hosts.b.status("web")["phase"], "fenced", "it cannot know yet");
    assert!(clients[0].answer(A_MOMENT).is_none());
    hosts.network.mend();
    for client in &clients {
        assert_eq!(client.answer(PATIENCE).as_deref(), Some("error ESHUTDOWN"), "nothing was acknowledged");
    }
    hosts.b.wait_status("web", "discarded", |status| status["phase"] == "discarded");
    assert_eq!(clients[0].ask("read 0 4096"), "error ESHUTDOWN");
    assert!(client.read(0, 4096) == repeated(9, 4096));
}
