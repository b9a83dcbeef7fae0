//! Between hosts everything is encrypted, and who is not the host that was named does nothing.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use lazy_migrate::migration::lease::Beat;
use lazy_migrate::migration::machine::Grant;
use lazy_migrate::migration::phase::DestinationPhase;
use lazy_migrate::peer::client::{CallError, PeerClient};
use lazy_migrate::peer::link::{NodeTls, PeerAddress};
use lazy_migrate::peer::nbd::PeerDialer;
use lazy_migrate::peer::{PREAMBLE_MESSAGES, Request, Subject, images};
use lazy_migrate::upstream::{Greeted, Upstream};

use crate::pair::{MIB, Wire};
use crate::support::{Background, Node, PATIENCE, Said, free_port, hash, program, random_image, run, wait_for};

const SIZE: u64 = 16 * MIB;

/// Makes the certificates of a host; without `ca` a new CA as well.
fn certificates(directory: &Path, host: &str, ca: Option<&Path>) -> PathBuf {
    let mut command = Command::new(program());
    command.args(["tls", "init"]).arg(directory).args(["--host", host]);
    if let Some(ca) = ca {
        command.arg("--ca").arg(ca);
    }
    let said: Said = command.output().unwrap().into();
    assert_eq!(said.code, 0, "{said:?}");
    directory.to_owned()
}

/// `a.test` has the disk `web`; B is `localhost` and takes disks from `a.test`; `c.test` has a certificate of the same CA.
struct Hosts {
    dir: tempfile::TempDir,
    a: Node,
    b: Node,
    wire: Wire,
    to_b: String,
    image: PathBuf,
}

impl Hosts {
    fn new(allowed: &[&str]) -> Hosts {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let ca = certificates(&path("a.tls"), "a.test", None);
        let b_tls = certificates(&path("b.tls"), "localhost", Some(&ca));
        certificates(&path("c.tls"), "c.test", Some(&ca));
        certificates(&path("evil.tls"), "a.test", None);
        let image = path("web.img");
        random_image(&image, SIZE, 61);
        let (a_port, b_port) = (free_port(), free_port());
        let wire = Wire::new(a_port, 2 * MIB);
        let a_peer = format!("127.0.0.1:{a_port}");
        let advertise = format!("127.0.0.1:{}", wire.port);
        let disk = format!("web={}", image.display());
        let a_tls = ca.to_str().unwrap();
        let a = ["--peer", &a_peer, "--advertise", &advertise, "--lease", "2s", "--disk", &disk, "--tls", a_tls];
        let a = Node::start(path("a"), &a);
        let b_peer = format!("127.0.0.1:{b_port}");
        let mut b = vec!["--peer", &b_peer, "--lease", "2s", "--tls", b_tls.to_str().unwrap()];
        allowed.iter().for_each(|name| b.extend(["--allow-peer", name]));
        let b = Node::start(path("b"), &b);
        Hosts { a, b, wire, to_b: format!("localhost:{b_port}"), image, dir }
    }

    fn tls(&self, host: &str) -> NodeTls {
        NodeTls::load(&self.dir.path().join(format!("{host}.tls"))).unwrap()
    }

    /// The migration as A's journal names it: what somebody who saw the files could repeat.
    fn subject(&self) -> Subject {
        let journal = std::fs::read_to_string(self.a.dir.join("state/disks/web/journal")).unwrap();
        let line: serde_json::Value =
            serde_json::from_str(journal.lines().last().unwrap().split_once(' ').unwrap().1).unwrap();
        let record = &line["record"];
        Subject {
            disk: "web".into(),
            migration: serde_json::from_value(record["migration"].clone()).unwrap(),
            epoch: serde_json::from_value(record["epoch"].clone()).unwrap(),
        }
    }
}

#[test]
fn a_disk_moves_over_tls() {
    let hosts = Hosts::new(&["other.test", "a.test"]);
    let (a, b) = (&hosts.a, &hosts.b);
    a.cli(&["prepare", "web", "--to", &hosts.to_b]);
    a.cli(&["handover", "web"]);
    b.cli(&["wait", "web", "--for", "active", "--timeout", "30s"]);
    // Its blocks and its lease come over the same encrypted port, also for a node that was started again.
    let mut hosts = hosts;
    hosts.b.kill();
    hosts.b.start_again();
    hosts.wire.open();
    hosts.b.cli(&["wait", "web", "--timeout", "60s"]);
    hosts.a.cli(&["wait", "web", "--timeout", "60s"]);
    assert!(hosts.b.cli(&["verify", "web"]).ends_with("identical"));
    assert_eq!(hash(&hosts.b.dir.join("state/disks/web/disk.img")), hash(&hosts.image));
}

#[test]
fn who_is_not_named_may_not_bring_disks() {
    let hosts = Hosts::new(&["other.test"]);
    let refused = hosts.a.fails(3, &["prepare", "web", "--to", &hosts.to_b]);
    assert!(refused.contains("takes no disks from") && refused.contains("a.test"), "{refused}");
    assert!(refused.contains("--allow-peer"), "{refused}");
    assert_eq!(hosts.a.status("web")["phase"], "serving");
    assert_eq!(hosts.b.cli(&["status"]).lines().filter(|line| line.contains("web")).count(), 0);
    assert!(!hosts.b.dir.join("state/disks/web").exists());
}

#[test]
fn a_certificate_for_another_host_is_not_the_host() {
    let hosts = Hosts::new(&["a.test"]);
    let by_address = hosts.to_b.replace("localhost", "127.0.0.1");
    let refused = hosts.a.fails(4, &["prepare", "web", "--to", &by_address]);
    assert!(refused.contains("is for another host"), "{refused}");
    assert_eq!(hosts.a.status("web")["phase"], "serving");
    assert!(!hosts.b.dir.join("state/disks/web").exists());
}

/// Every word that a peer can say about a migration.
fn words(subject: &Subject) -> Vec<Request> {
    let subject = || subject.clone();
    vec![
        Request::Handover { subject: subject(), beat: Beat(1) },
        Request::Resume { subject: subject() },
        Request::Discard { subject: subject(), beat: None },
        Request::Beat {
            subject: subject(),
            beat: Beat(7),
            phase: DestinationPhase::Discarded,
            progress: Default::default(),
        },
        Request::Complete { subject: subject(), progress: Default::default(), grant: Grant::default() },
        Request::Checksums { subject: subject(), first: 0, count: 1 },
    ]
}

#[test]
fn another_host_says_nothing_about_a_migration_and_reads_nothing_of_it() {
    let hosts = Hosts::new(&["a.test"]);
    hosts.a.cli(&["prepare", "web", "--to", &hosts.to_b]);
    hosts.a.cli(&["handover", "web"]);
    let subject = hosts.subject();
    let before = (hosts.a.status("web")["phase"].clone(), hosts.b.status("web")["epoch"].clone());
    let c = hosts.tls("c");
    // Of the same CA, so that it is let in; but it is neither of the two.
    let to_a = PeerAddress::secured(format!("127.0.0.1:{}", hosts.wire.port), c.client.clone(), "a.test");
    let to_b = PeerAddress::secured(&hosts.to_b, c.client, "localhost");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        for (peer, mine) in [(&to_b, 0..3), (&to_a, 3..6)] {
            let client = PeerClient::new(peer.clone());
            for word in &words(&subject)[mine] {
                match client.call(word, PATIENCE).await {
                    Err(CallError::Refused(failure)) => {
                        assert!(failure.message.contains("with whom this migration was begun"), "{word:?}: {failure}");
                    }
                    other => panic!("{word:?} was answered with {other:?}"),
                }
            }
        }
        let upstream = Upstream::dialed(std::sync::Arc::new(PeerDialer::new(to_a.clone())), "web");
        let error =
            upstream.connect(None, &Greeted::default()).await.err().expect("the blocks are not for it").to_string();
        assert!(error.contains("no such export"), "{error}");
        // The word of a checkpoint is refused as well; it says so in its answer.
        let stream = images::dial(&to_b, &subject).await.unwrap();
        let empty = tempfile::tempdir().unwrap();
        let dumped = tokio_util::sync::CancellationToken::new();
        dumped.cancel();
        let refused = images::Sending::begin(stream, empty.path()).unwrap().finish(dumped).await.unwrap_err();
        assert!(refused.message.contains("with whom this migration was begun"), "{refused}");
    });
    assert_eq!(before, (hosts.a.status("web")["phase"].clone(), hosts.b.status("web")["epoch"].clone()));
    assert_eq!(hosts.b.status("web")["phase"], "active");
    hosts.wire.open();
    hosts.b.cli(&["wait", "web", "--timeout", "60s"]);
}

#[test]
fn nothing_is_heard_that_is_not_encrypted_or_of_another_authority() {
    let hosts = Hosts::new(&["a.test"]);
    // In the clear: not even an error is told.
    let mut stream = TcpStream::connect(&hosts.to_b).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(PREAMBLE_MESSAGES).unwrap();
    let question = serde_json::to_vec(&Request::Discard {
        subject: Subject {
            disk: "web".into(),
            migration: serde_json::from_str("\"m\"").unwrap(),
            epoch: Default::default(),
        },
        beat: None,
    })
    .unwrap();
    let _ = stream.write_all(&(question.len() as u32).to_be_bytes()).and_then(|()| stream.write_all(&question));
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    // At most a TLS alert: content type 21.
    assert!(answer.is_empty() || answer[0] == 21, "{answer:?}");
    // The right name, vouched for by another authority.
    let evil = PeerAddress::secured(&hosts.to_b, hosts.tls("evil").client, "localhost");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let error = runtime.block_on(evil.dial(PREAMBLE_MESSAGES)).map(drop).unwrap_err().to_string();
    assert!(error.contains("not of the CA"), "{error}");
    // A node that believes everybody is not believed.
    let plain = Node::start(hosts.dir.path().join("plain"), &["--peer", &format!("127.0.0.1:{}", free_port())]);
    let image = hosts.dir.path().join("other.img");
    random_image(&image, MIB, 2);
    plain.cli(&["add", "other", image.to_str().unwrap()]);
    plain.fails(4, &["prepare", "other", "--to", &hosts.to_b]);
    assert!(!hosts.b.dir.join("state/disks/other").exists());
}

#[test]
fn a_certificate_gives_the_exports_that_are_named_and_no_others() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let ca = certificates(&path("node"), "localhost", None);
    for client in ["db", "all", "stranger"] {
        certificates(&path(client), client, Some(&ca));
    }
    for (name, seed) in [("web", 1), ("mail", 2), ("db", 3)] {
        random_image(&path(&format!("{name}.img")), MIB, seed);
    }
    let port = free_port();
    let (everywhere, tls) = (format!("0.0.0.0:{port}"), ca.to_str().unwrap().to_owned());
    let mut arguments =
        vec!["--nbd", &everywhere, "--tls", &tls, "--allow-client", "db=db,mail", "--allow-client", "all"];
    let disks: Vec<_> =
        ["web", "mail", "db"].map(|name| format!("{name}={}", path(&format!("{name}.img")).display())).into();
    disks.iter().for_each(|disk| arguments.extend(["--disk", disk]));
    let node = Node::start(path("state"), &arguments);
    let uri = |client: &str, name: &str| {
        format!("nbds://localhost:{port}/{name}?tls-certificates={}", path(client).display())
    };
    let nbdinfo = |arguments: &[&str]| {
        let output = Command::new("nbdinfo").args(arguments).output();
        Said::from(
            output.unwrap_or_else(|error| panic!("cannot run nbdinfo ({error}); install the package libnbd-bin")),
        )
    };
    let listed = |client: &str| {
        let said = nbdinfo(&["--list", "--json", &uri(client, "")]);
        assert_eq!(said.code, 0, "{said:?}");
        let list: serde_json::Value = serde_json::from_str(&said.stdout).unwrap();
        let name = |export: &serde_json::Value| export["export-name"].as_str().unwrap().to_owned();
        list["exports"].as_array().unwrap().iter().map(name).collect::<Vec<_>>()
    };
    assert_eq!(listed("db"), ["db", "mail"]);
    assert_eq!(listed("all"), ["db", "mail", "web"]);
    assert_eq!(listed("stranger"), [""; 0]);
    assert_eq!(nbdinfo(&["--size", &uri("db", "mail")]).stdout, MIB.to_string());
    let said = nbdinfo(&["--size", &uri("db", "web")]);
    assert!(said.code != 0 && said.stderr.contains("no export named"), "as if it did not exist: {said:?}");
    // In the clear nothing is told, although the export may be seen by some.
    let said = nbdinfo(&["--size", &format!("nbd://localhost:{port}/web")]);
    assert!(said.code != 0 && said.stderr.to_lowercase().contains("tls"), "{said:?}");
    // The Unix socket is the host's own.
    assert_eq!(nbdinfo(&["--size", &node.uri("web")]).stdout, MIB.to_string());

    // And another node fills an export from there, with its own certificates or those that the URI names.
    let puller = certificates(&path("puller"), "all", Some(&ca));
    let other = Node::start(path("other"), &["--tls", puller.to_str().unwrap()]);
    other.cli(&["pull", "one", "--from", &format!("nbds://localhost:{port}/web")]);
    other.cli(&["pull", "two", "--from", &uri("db", "mail")]);
    for (name, image) in [("one", "web"), ("two", "mail")] {
        other.cli(&["wait", name, "--timeout", "30s"]);
        run("nbdcopy", "libnbd-bin", &[&other.uri(name), path("copy").to_str().unwrap()]);
        assert_eq!(hash(&path("copy")), hash(&path(&format!("{image}.img"))));
    }
    let refused = other.fails(1, &["pull", "three", "--from", &format!("nbd://localhost:{port}/web")]);
    assert!(refused.contains("nbds://"), "{refused}");
}

#[test]
fn qemu_uses_the_same_certificates_on_either_side() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let ours = certificates(&path("node"), "localhost", None);
    let qemu = certificates(&path("qemu"), "localhost", Some(&ours));
    let image = path("web.img");
    random_image(&image, MIB, 4);
    let (ours, image_path) = (ours.to_str().unwrap(), image.to_str().unwrap());
    let credentials = |end: &str| format!("tls-creds-x509,id=tls,endpoint={end},dir={}", qemu.display());

    let (port, disk) = (free_port(), format!("web={image_path}"));
    let everywhere = format!("0.0.0.0:{port}");
    let node = Node::start(
        path("state"),
        &["--nbd", &everywhere, "--tls", ours, "--allow-client", "localhost", "--disk", &disk],
    );
    let from = format!("driver=nbd,host=localhost,port={port},export=web,tls-creds=tls");
    let copy = path("copy");
    let convert = ["convert", "--object", &credentials("client"), "--image-opts", &from, "-O", "raw"];
    run("qemu-img", "qemu-utils", &[&convert[..], &[copy.to_str().unwrap()]].concat());
    assert_eq!(hash(&copy), hash(&image));

    let port = free_port();
    let (object, number) = (credentials("server"), port.to_string());
    let serve = ["--object", &object, "--tls-creds", "tls", "--port", &number, "--export-name", "web", "--read-only"];
    let _qemu =
        Background::start("qemu-nbd", "qemu-utils", &[&serve[..], &["--format=raw", "-t", image_path]].concat());
    wait_for("qemu-nbd", || TcpStream::connect(("127.0.0.1", port)).is_ok());
    node.cli(&["pull", "back", "--from", &format!("nbds://localhost:{port}/web")]);
    node.cli(&["wait", "back", "--timeout", "30s"]);
    assert_eq!(hash(&path("state/state/disks/back/disk.img")), hash(&image));
}

#[test]
fn a_node_that_can_be_reached_is_secured_or_says_that_it_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let serve = |arguments: &[&str]| {
        let mut command = Command::new(program());
        command.arg("--control").arg(dir.path().join("control.sock")).arg("serve");
        command.arg("--state-dir").arg(dir.path().join("state")).args(arguments);
        Said::from(command.output().unwrap())
    };
    for address in ["0.0.0.0:10811", "[::]:10811"] {
        for option in ["--nbd", "--peer"] {
            let said = serve(&[option, address]);
            assert_eq!(said.code, 2, "{said:?}");
            assert!(["--tls", "tls init", "--insecure"].iter().all(|word| said.stderr.contains(word)), "{said:?}");
        }
    }
    let said = serve(&["--tls", dir.path().to_str().unwrap(), "--peer", "127.0.0.1:10811"]);
    assert!(said.code == 2 && said.stderr.contains("ca-cert.pem") && said.stderr.contains("tls init"), "{said:?}");
    let said = serve(&["--tls", "/x", "--insecure"]);
    assert!(said.code == 2 && said.stderr.contains("cannot be used with"), "{said:?}");
    let said = serve(&["--allow-peer", "a"]);
    assert!(said.code == 2 && said.stderr.contains("--tls"), "{said:?}");
    let loud = Node::start(dir.path().join("loud"), &["--peer", &format!("0.0.0.0:{}", free_port()), "--insecure"]);
    assert!(loud.log().contains("INSECURE"), "{}", loud.log());
}
