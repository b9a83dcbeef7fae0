//! A node that dies, or is stopped, while it fills a disk and clients write to it.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::client::{Client, Nbdkit, repeated};
use crate::support::{Node, random_image, run, wait_for};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 96 * MIB;
const SECTOR: u64 = 512;
const WRITERS: u64 = 4;

/// What a writer knows: the last acknowledged number of every sector, and the write that was never answered.
#[derive(Default)]
struct Written {
    acknowledged: BTreeMap<u64, u64>,
    unanswered: Option<(u64, u64, u64)>,
}

/// Writes numbered sectors until the server is gone; each writer has its own blocks, some whole and some in part, and
/// the first flushes now and then.
fn write_until_it_dies(uri: &str, writer: u64, begin: u64, count: &AtomicU64) -> Written {
    let mut client = Client::connect(uri);
    let mut written = Written::default();
    let mut state = writer + begin + 1;
    for number in begin.. {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let block = (state >> 30) % (SIZE / 4096 / WRITERS) * WRITERS + writer;
        let (skip, sectors) = if state >> 61 == 0 { (0, 8) } else { ((state >> 50) % 7, 1) };
        let (offset, length) = (block * 4096 + skip * SECTOR, sectors * SECTOR);
        let answer = client.ask(&format!("write {offset} {length} {number}"));
        if answer != "ok" {
            written.unanswered = Some((offset, length, number));
            return written;
        }
        written.acknowledged.extend((offset / SECTOR..(offset + length) / SECTOR).map(|sector| (sector, number)));
        count.fetch_add(1, Ordering::Relaxed);
        if writer == 0 && number % 16 == 0 && client.ask("flush") != "ok" {
            return written;
        }
    }
    written
}

/// Writers run against a node, `end` ends it when enough was written; what they know is returned.
fn write_while(node: &mut Node, begin: u64, enough: u64, end: impl FnOnce(&mut Node)) -> Vec<Written> {
    let (uri, count) = (node.uri("disk"), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let (uri, count) = (&uri, &count);
        let writers: Vec<_> =
            (0..WRITERS).map(|writer| scope.spawn(move || write_until_it_dies(uri, writer, begin, count))).collect();
        wait_for("enough writes", || count.load(Ordering::Relaxed) >= enough);
        end(node);
        writers.into_iter().map(|writer| writer.join().unwrap()).collect()
    })
}

/// Lays what was written over the source's bytes; of a write that was never answered, either is right.
fn expect(expected: &mut [u8], found: &[u8], written: &[Written]) {
    for writer in written {
        for (&sector, &number) in &writer.acknowledged {
            let at = (sector * SECTOR) as usize;
            expected[at..at + SECTOR as usize].copy_from_slice(&repeated(number, SECTOR));
        }
    }
    for (offset, length, number) in written.iter().filter_map(|writer| writer.unanswered) {
        for at in (offset..offset + length).step_by(SECTOR as usize).map(|at| at as usize) {
            let new = repeated(number, SECTOR);
            if found[at..at + SECTOR as usize] == new {
                expected[at..at + SECTOR as usize].copy_from_slice(&new);
            }
        }
    }
}

fn content(node: &Node, dir: &Path) -> Vec<u8> {
    let copy = dir.join("copy.img");
    let _ = std::fs::remove_file(&copy);
    run("nbdcopy", "libnbd-bin", &[&node.uri("disk"), copy.to_str().unwrap()]);
    std::fs::read(&copy).unwrap()
}

fn assert_same(found: &[u8], expected: &[u8]) {
    let different = found.iter().zip(expected).position(|(a, b)| a != b);
    assert_eq!((different, found.len()), (None, expected.len()), "the first byte that differs, and the length");
}

/// Two lives are ended by `end` amid writes and pulling; the third completes.
fn nothing_acknowledged_is_lost(end: impl Fn(&mut Node)) {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source.img");
    random_image(&source, SIZE, 11);
    let upstream = Nbdkit::start(dir.path(), &source, 0);
    let mut node = Node::start(dir.path().join("b"), &[]);
    node.cli(&["pull", "disk", "--from", &upstream.uri(), "--rate", &(4 * MIB).to_string()]);
    let (mut lives, mut fetched, mut missing) = (Vec::new(), 0, SIZE);
    for life in 0..2 {
        lives.push(write_while(&mut node, life * 1_000_000, 300, |node| {
            let status =
                node.wait_status("disk", "pulling", |status| status["pulled_bytes"].as_u64().unwrap() > 2 * MIB);
            missing = status["missing_bytes"].as_u64().unwrap();
            end(node);
        }));
        fetched = upstream.reads().len();
        node.start_again();
        let status = node.status("disk");
        assert_eq!(status["phase"], "pulling", "it goes on by itself");
        let now_missing = status["missing_bytes"].as_u64().unwrap();
        assert!(0 < now_missing && now_missing <= missing, "what was there is there: {missing} before, {status}");
    }
    // Every acknowledged write is there, flushed or not, and all the rest is the source's.
    let found = content(&node, dir.path());
    let mut expected = std::fs::read(&source).unwrap();
    lives.iter().for_each(|written| expect(&mut expected, &found, written));
    assert_same(&found, &expected);
    node.cli(&["wait", "disk", "--timeout", "60s"]);
    assert_same(&content(&node, dir.path()), &expected);
    let again: u64 = upstream.reads()[fetched..].iter().map(|(_, length)| length).sum();
    assert!(again <= missing, "{again} bytes were fetched after the last restart, when {missing} were missing");
}

#[test]
fn a_killed_node_has_lost_no_acknowledged_write() {
    nothing_acknowledged_is_lost(Node::kill);
}

#[test]
fn a_stopped_node_has_lost_no_acknowledged_write() {
    nothing_acknowledged_is_lost(Node::stop);
}

#[test]
fn the_pull_goes_on_after_a_restart_and_fetches_nothing_twice() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source.img");
    random_image(&source, SIZE, 12);
    let upstream = Nbdkit::start(dir.path(), &source, 0);
    let mut node = Node::start(dir.path().join("b"), &[]);
    node.cli(&["pull", "disk", "--from", &upstream.uri(), "--rate", &(16 * MIB).to_string()]);
    let (mut fetched, mut missing) = (0, SIZE);
    for _ in 0..2 {
        let status =
            node.wait_status("disk", "further", |status| status["missing_bytes"].as_u64().unwrap() + 8 * MIB < missing);
        missing = status["missing_bytes"].as_u64().unwrap();
        assert!(missing > 0, "it is killed while it pulls");
        node.kill();
        fetched = upstream.reads().len();
        node.start_again();
        let now_missing = node.status("disk")["missing_bytes"].as_u64().unwrap();
        assert!(now_missing <= missing, "{missing} bytes were missing, then {now_missing}");
    }
    node.cli(&["wait", "disk", "--timeout", "60s"]);
    let again: u64 = upstream.reads()[fetched..].iter().map(|(_, length)| length).sum();
    assert!(again <= missing, "{again} bytes were fetched after the last restart, when {missing} were missing");
    assert_same(&content(&node, dir.path()), &std::fs::read(&source).unwrap());
}

#[test]
fn an_upstream_of_another_size_after_a_restart_is_not_believed() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source.img");
    random_image(&source, SIZE, 13);
    let mut upstream = Nbdkit::start(dir.path(), &source, 0);
    let mut node = Node::start(dir.path().join("b"), &[]);
    node.cli(&["pull", "disk", "--from", &upstream.uri(), "--no-background"]);
    let mut client = Client::connect(&node.uri("disk"));
    let first = client.read(0, 8192);
    client.write(4096, 4096, 5);
    drop(client);
    node.stop();
    upstream.kill();
    std::fs::File::options().write(true).open(&source).unwrap().set_len(SIZE - MIB).unwrap();
    upstream.start_again(0);
    node.start_again();
    let mut client = Client::connect(&node.uri("disk"));
    assert!(client.read(0, 4096) == first[..4096], "what is present is served");
    assert!(client.read(4096, 4096) == repeated(5, 4096), "what was written is not lost");
    client.send("read 8192 4096");
    let status = node.wait_status("disk", "found out", |status| status["upstream"] == "wrong-disk");
    let why = status["last_error"].as_str().unwrap();
    assert!(why.contains(&SIZE.to_string()) && why.contains(&(SIZE - MIB).to_string()), "both sizes are told: {why}");
    assert!(client.answer(std::time::Duration::from_millis(300)).is_none(), "a missing block is waited for");
    // The right disk comes back: everything goes on.
    upstream.kill();
    let file = std::fs::File::options().write(true).open(&source).unwrap();
    file.set_len(SIZE).unwrap();
    file.write_all_at(&repeated(6, 4096), 8192).unwrap();
    upstream.start_again(0);
    let answer = client.answer(crate::support::PATIENCE).expect("the read goes on");
    assert!(crate::client::bytes(&answer) == repeated(6, 4096));
    node.wait_status("disk", "connected", |status| status["upstream"] == "connected");
}

#[test]
fn a_state_directory_has_one_node() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path().join("a"), &[]);
    let state = node.dir.join("state");
    let control = dir.path().join("other.sock");
    let second = std::process::Command::new(crate::support::program())
        .args(["serve", "--state-dir", state.to_str().unwrap(), "--control", control.to_str().unwrap()])
        .output()
        .unwrap();
    let said = crate::support::Said::from(second);
    assert_eq!(said.code, 3, "{said:?}");
    assert!(said.stderr.lines().last().unwrap().contains("another node uses the state directory"), "{said:?}");
    assert!(!control.exists(), "nothing is left of the second");
    assert_eq!(node.cli(&["status"]), "no exports", "and the first goes on");
}
