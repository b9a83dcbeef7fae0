//! What must be refused when somebody is unsure, in a hurry, or has mixed two disks up: a clear line, the documented exit
//! code, and nothing changed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use crate::client::Connection;
use crate::hosts::MIB;
use crate::service::DISK;
use crate::support::network::{A_ADDRESS, B_ADDRESS, Network};
use crate::support::{Node, Said, hash, program, random_image, wait_for};

/// A link on which a disk takes some four seconds from the first host to the second.
fn network(name: &str) -> Network {
    Network::new(name, "16mbit")
}

/// A node on one of the two hosts, with its peer address and its image.
struct Host {
    node: Node,
    peer: String,
    image: Option<PathBuf>,
}

impl Host {
    /// On the first host, with a disk of its own called `web`.
    fn with_disk(network: &Network, dir: &Path, name: &str, port: u16) -> Host {
        let image = dir.join(format!("{name}.img"));
        random_image(&image, 8 * MIB, name.bytes().map(u64::from).sum());
        Host::start(&network.a, dir, name, format!("{A_ADDRESS}:{port}"), Some(image))
    }

    /// On the second host, with nothing.
    fn empty(network: &Network, dir: &Path, name: &str, port: u16) -> Host {
        Host::start(&network.b, dir, name, format!("{B_ADDRESS}:{port}"), None)
    }

    fn start(namespace: &str, dir: &Path, name: &str, peer: String, image: Option<PathBuf>) -> Host {
        let disk = image.as_ref().map(|image| format!("{DISK}={}", image.display()));
        let mut options = vec!["--insecure", "--lease", "2s", "--peer", &peer];
        options.extend(disk.iter().flat_map(|disk| ["--disk", disk]));
        Host { node: Node::start_in(Some(namespace), dir.join(name), &options), peer, image }
    }

    fn phase(&self) -> String {
        self.node.status(DISK)["phase"].as_str().unwrap().to_owned()
    }

    #[track_caller]
    fn refused(&self, code: i32, arguments: &[&str], words: &[&str]) {
        let before = self.phase();
        let line = self.node.fails(code, arguments);
        for word in words {
            assert!(line.contains(word), "'{word}' is not in: {line}");
        }
        assert!(line.starts_with("lazy-migrate: "), "{line}");
        assert_eq!(self.phase(), before, "{arguments:?} has changed something");
    }

    fn writes(&self) -> bool {
        let mut client = Connection::open(&self.node.nbd_socket(), DISK, Arc::default()).unwrap();
        client.write(0, &[7; 512]).is_ok()
    }
}

/// Prepares, hands over and waits for the end.
fn migrate(a: &Host, b: &Host) {
    a.node.cli(&["prepare", DISK, "--to", &b.peer]);
    a.node.cli(&["handover", DISK]);
    b.node.cli(&["wait", DISK, "--timeout", "60s"]);
    a.node.cli(&["wait", DISK, "--timeout", "60s"]);
}

#[test]
fn rollbacks_that_come_too_often_too_late_or_to_the_wrong_host() {
    let dir = tempfile::tempdir().unwrap();
    let network = network("ref-back");
    let (a, b) = (Host::with_disk(&network, dir.path(), "a", 10810), Host::empty(&network, dir.path(), "b", 10810));
    a.node.cli(&["prepare", DISK, "--to", &b.peer]);
    a.node.cli(&["handover", DISK]);
    for option in [&[][..], &["--plan"], &["--wait"]] {
        b.refused(
            3,
            &[&["rollback", DISK][..], option].concat(),
            &["came to this host", "on the host that it comes from"],
        );
    }
    a.refused(1, &["rollback", "wed"], &["no export 'wed'"]);
    a.node.cli(&["rollback", DISK]);
    // Twice is once, and says so.
    a.refused(3, &["rollback", DISK], &["nothing was handed over", "owns the disk"]);
    a.refused(3, &["rollback", DISK, "--wait"], &["nothing was handed over"]);
    a.refused(3, &["handover", DISK], &["prepare"]);
    b.refused(3, &["rollback", DISK], &["came to this host"]);
    assert!(a.writes() && !b.writes());

    migrate(&a, &b);
    for option in [&[][..], &["--wait"]] {
        a.refused(3, &[&["rollback", DISK][..], option].concat(), &["released", "migrate in the other direction"]);
    }
    let plan: serde_json::Value = serde_json::from_str(&a.node.cli(&["rollback", DISK, "--plan", "--json"])).unwrap();
    assert_eq!(
        (&plan["phase"], &plan["safe_now"]),
        (&"released".into(), &false.into()),
        "a plan says so as well: {plan}"
    );
    a.refused(3, &["handover", DISK], &["released"]);
    a.refused(3, &["cancel", DISK], &["released"]);
    a.refused(3, &["prepare", DISK, "--to", &b.peer], &["released"]);
    b.refused(3, &["rollback", DISK], &["came to this host"]);
    assert!(!a.writes() && b.writes());

    // The way back that the refusal names.
    a.node.cli(&["remove", DISK]);
    migrate(&b, &a);
    assert!(a.writes() && !b.writes());
}

#[test]
fn two_sources_claim_the_same_name() {
    let dir = tempfile::tempdir().unwrap();
    let network = network("ref-name");
    let one = Host::with_disk(&network, dir.path(), "one", 10810);
    let two = Host::with_disk(&network, dir.path(), "two", 10811);
    let b = Host::empty(&network, dir.path(), "b", 10810);
    one.node.cli(&["prepare", DISK, "--to", &b.peer]);
    let claim = || two.refused(3, &["prepare", DISK, "--to", &b.peer], &["'web' is there already", &one.peer]);
    claim();
    assert_eq!(two.phase(), "serving");
    assert!(two.writes(), "whoever was refused goes on");
    one.node.cli(&["handover", DISK]);
    claim();
    b.node.cli(&["wait", DISK, "--timeout", "60s"]);
    claim();
    one.node.cli(&["wait", DISK, "--timeout", "60s"]);
    assert!(b.node.cli(&["verify", DISK]).ends_with("identical"), "nothing of the other disk came in between");
    assert!(b.writes() && !one.writes() && two.writes());
}

#[test]
fn one_source_prepared_at_two_destinations() {
    let dir = tempfile::tempdir().unwrap();
    let network = network("ref-two");
    let a = Host::with_disk(&network, dir.path(), "a", 10810);
    let (b, c) = (Host::empty(&network, dir.path(), "b", 10810), Host::empty(&network, dir.path(), "c", 10811));
    a.node.cli(&["prepare", DISK, "--to", &b.peer]);
    a.refused(3, &["prepare", DISK, "--to", &c.peer], &["preparing", &b.peer, "cancel"]);
    assert_eq!(c.node.cli(&["status"]), "no exports", "it was not even asked");
    assert_eq!(b.phase(), "ready");
    a.node.cli(&["handover", DISK]);
    a.refused(3, &["prepare", DISK, "--to", &c.peer], &["handed-over", &b.peer]);
    assert_eq!(c.node.cli(&["status"]), "no exports");
    a.node.cli(&["rollback", DISK]);
    // Now the other one may have it; what the first had is nothing to it.
    migrate(&a, &c);
    assert_eq!(b.phase(), "discarded");
    assert!(c.writes() && !b.writes() && !a.writes());
}

/// A journal's line with the checksum that belongs to it.
fn line(json: &str) -> String {
    format!("{:08x} {json}\n", crc32fast::hash(json.as_bytes()))
}

/// Every file of a state directory, with its hash.
fn files(state: &Path) -> BTreeMap<PathBuf, blake3::Hash> {
    let (mut found, mut directories) = (BTreeMap::new(), vec![state.to_owned()]);
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let entry = entry.unwrap();
            match entry.file_type().unwrap().is_dir() {
                true => directories.push(entry.path()),
                false => drop(found.insert(entry.path(), hash(&entry.path()))),
            }
        }
    }
    found
}

#[test]
fn journals_that_cannot_be_believed() {
    let dir = tempfile::tempdir().unwrap();
    let network = network("ref-log");
    let mut a = Host::with_disk(&network, dir.path(), "a", 10810);
    let mut b = Host::empty(&network, dir.path(), "b", 10810);
    a.node.cli(&["prepare", DISK, "--to", &b.peer]);
    a.node.cli(&["handover", DISK]);
    b.node.cli(&["wait", DISK, "--timeout", "60s"]);
    assert!(b.writes());
    a.node.stop();
    b.node.stop();
    let image = hash(a.image.as_ref().unwrap());
    for host in [&a, &b] {
        let state = host.node.dir.join("state");
        let journal = state.join("disks/web/journal");
        let good = std::fs::read_to_string(&journal).unwrap();
        let lines: Vec<&str> = good.lines().collect();
        assert!(lines.len() >= 3, "{good}");
        let last = lines.last().unwrap().split_once(' ').unwrap().1;
        let middle = good.len() / 2;
        for (what, content, words) in [
            // A hole in the middle, as of a file that was truncated and went on being written.
            ("cut in the middle", format!("{}{}", &good[..middle], &good[middle + 40..]), &["damaged"][..]),
            ("without its first record", lines[1..].iter().map(|text| format!("{text}\n")).collect(), &["damaged"]),
            ("with a byte changed", good.replacen("epoch", "epocH", 1), &["damaged", "checksum"]),
            ("with something behind it", format!("{good}hello\n"), &["damaged"]),
            (
                "of a newer version",
                format!("{good}{}", line(&last.replacen("\"version\":1", "\"version\":99", 1))),
                &["version 99", "newer"],
            ),
            (
                "of another disk",
                line(&last.replacen("\"disk\":\"web\"", "\"disk\":\"db\"", 1)),
                &["belongs to disk 'db'", "not to 'web'"],
            ),
        ] {
            assert_ne!(content, good, "{what}");
            std::fs::write(&journal, &content).unwrap();
            let before = files(&state);
            let control = dir.path().join("other.sock");
            let said: Said = Command::new(program())
                .args(["serve", "--state-dir", state.to_str().unwrap()])
                .args(["--control", control.to_str().unwrap()])
                .output()
                .unwrap()
                .into();
            assert_eq!(said.code, 1, "{what}: {said:?}");
            let error = said.stderr.lines().last().unwrap();
            for word in words.iter().copied().chain(["lazy-migrate: ", "'web'", journal.to_str().unwrap()]) {
                assert!(error.contains(word), "{what}: '{word}' is not in: {error}");
            }
            let after = files(&state);
            let changed: Vec<_> = before.iter().filter(|(path, hash)| after.get(*path) != Some(hash)).collect();
            assert!(changed.is_empty() && before.len() == after.len(), "{what}: changed {changed:?}");
        }
        std::fs::write(&journal, &good).unwrap();
    }
    assert_eq!(hash(a.image.as_ref().unwrap()), image);
    // With their own journals they are what they were.
    a.node.start_again();
    b.node.start_again();
    wait_for("both know that it is complete", || (a.phase(), b.phase()) == ("released".into(), "complete".into()));
    assert!(b.writes() && !a.writes());
}
