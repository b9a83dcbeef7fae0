//! A host is emptied: twenty disks at once, one limit for all of them, and readers who do not wait behind any of them.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use crate::client::Client;
use crate::pair::MIB;
use crate::support::{Node, free_port, program, random_image, wait_for};

const DISKS: u64 = 20;
const SIZE: u64 = 6 * MIB;
/// For all disks together, in bytes a second.
const RATE: u64 = 24 * MIB;

fn name(disk: u64) -> String {
    format!("d{disk:02}")
}

/// A figure of `/proc/PID/status`, in KiB.
fn kib(node: &Node, key: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", node.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with(key)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn descriptors(node: &Node) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", node.pid())).unwrap().count()
}

fn disks_of(node: &Node) -> usize {
    std::fs::read_dir(node.dir.join("state/disks")).unwrap().count()
}

fn drain(a: &Node, arguments: &[&str]) -> std::process::Output {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/drain.sh");
    let mut command = Command::new(script);
    command.args(arguments).env("LAZY_MIGRATE", program()).env("LAZY_MIGRATE_CONTROL", a.control());
    command.output().unwrap()
}

#[test]
fn twenty_disks_leave_a_host_at_once_within_its_limits() {
    let dir = tempfile::tempdir().unwrap();
    let image = |disk: u64| dir.path().join(name(disk) + ".img");
    let (a_peer, b_peer) = (format!("127.0.0.1:{}", free_port()), format!("127.0.0.1:{}", free_port()));
    let mut arguments = vec!["--peer".into(), a_peer];
    for disk in 0..DISKS {
        random_image(&image(disk), SIZE, 100 + disk);
        arguments.extend(["--disk".into(), format!("{}={}", name(disk), image(disk).display())]);
    }
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let a = Node::start(dir.path().join("a"), &arguments);
    let b = Node::start(dir.path().join("b"), &["--peer", &b_peer, "--pull-rate", &RATE.to_string()]);
    let before = descriptors(&b);

    let begun = Instant::now();
    let said = std::thread::scope(|scope| {
        let drained = scope.spawn(|| drain(&a, &["--to", &b_peer, "-j", &DISKS.to_string()]));
        // Readers, while all of them are pulled.
        for disk in (0..DISKS).step_by(4) {
            let (b, original) = (&b, std::fs::read(image(disk)).unwrap());
            scope.spawn(move || {
                let name = name(disk);
                wait_for("the disk is at the destination", || b.try_cli(&["status", &name]).code == 0);
                b.cli(&["wait", &name, "--for", "active", "--timeout", "60s"]);
                let mut client = Client::connect(&b.uri(&name));
                for step in 0..40 {
                    let at = (step * 37 + disk) % (SIZE / 4096) * 4096;
                    assert!(client.read(at, 4096) == original[at as usize..][..4096], "{name} at {at}");
                }
            });
        }
        drained.join().unwrap()
    });
    let took = begun.elapsed();
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    // Together they kept to the limit that is theirs together. What was read was not limited.
    let (mut read, mut longest) = (0, 0);
    for disk in 0..DISKS {
        let (name, status) = (name(disk), b.status(&name(disk)));
        assert_eq!((&status["phase"], &status["present_bytes"]), (&"complete".into(), &SIZE.into()), "{status}");
        assert!(b.cli(&["verify", &name]).ends_with("identical"));
        assert_eq!(a.status(&name)["phase"], "released");
        read += status["faults"]["count"].as_u64().unwrap() * 4096;
        longest = longest.max(status["faults"]["max_us"].as_u64().unwrap());
    }
    let least = (DISKS * SIZE - read - RATE / 4) as f64 / RATE as f64;
    println!("{DISKS} disks of {} MiB in {took:.1?}; the longest fault {longest} us", SIZE / MIB);
    assert!(took.as_secs_f64() >= least, "{took:?} is faster than the limit allows, {least:.1} s");
    // A reader that had to wait for the pulls would have waited for seconds.
    assert!(read > 0 && longest < 1_000_000, "a fault took {longest} us");
    let peak = kib(&b, "VmHWM") / 1024;
    println!("the destination's memory at most {peak} MiB");
    assert!(peak < 160, "{peak} MiB");

    // Once more there is nothing to do, and nothing stays behind.
    assert!(drain(&a, &["--to", &b_peer]).status.success());
    for disk in 0..DISKS {
        a.cli(&["remove", &name(disk)]);
        b.cli(&["remove", &name(disk)]);
    }
    assert_eq!((disks_of(&a), disks_of(&b)), (0, 0));
    wait_for("all descriptors are given back", || descriptors(&b) <= before + 2);
}

#[test]
fn a_drain_names_what_stayed_and_moves_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let (a_peer, b_peer) = (format!("127.0.0.1:{}", free_port()), format!("127.0.0.1:{}", free_port()));
    let mut disks = Vec::new();
    for disk in ["good", "taken"] {
        let image = dir.path().join(disk);
        random_image(&image, MIB, 7);
        disks.push(format!("{disk}={}", image.display()));
    }
    let a = Node::start(dir.path().join("a"), &["--peer", &a_peer, "--disk", &disks[0], "--disk", &disks[1]]);
    let other = dir.path().join("other");
    random_image(&other, MIB, 8);
    let there = format!("taken={}", other.display());
    let b = Node::start(dir.path().join("b"), &["--peer", &b_peer, "--disk", &there]);
    let said = drain(&a, &["--to", &b_peer]);
    let text = String::from_utf8_lossy(&said.stderr);
    assert_eq!(said.status.code(), Some(1), "{text}");
    assert!(text.contains("not moved: taken;") && text.contains("good has moved"), "{text}");
    assert_eq!((&a.status("taken")["phase"], &b.status("good")["phase"]), (&"serving".into(), &"complete".into()));
    assert_eq!(drain(&a, &["--to"]).status.code(), Some(2));
    assert_eq!(drain(&a, &["-j", "x", "--to", &b_peer]).status.code(), Some(2));
}
