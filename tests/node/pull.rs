//! `pull`: lazily filled exports from any NBD server.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::client::{Client, Nbdkit, crowd, map};
use crate::support::{Background, Node, allocated, image, random_image, run, wait_for_socket};

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;
const BLOCK: u64 = 4096;

fn read_image(path: &Path, offset: u64, length: u64) -> Vec<u8> {
    let mut bytes = vec![0; length as usize];
    File::open(path).unwrap().read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

/// Reads at random offsets fetch exactly the blocks that were asked for; then everything, with the source's content.
fn a_gib_arrives(dir: &Path, source: &Path, from: &str) {
    let node = Node::start(dir.join("b"), &[]);
    node.cli(&["pull", "disk", "--from", from, "--no-background"]);
    let mut client = Client::connect(&node.uri("disk"));
    let mut asked = std::collections::BTreeSet::new();
    let mut state = 7_u64;
    for _ in 0..200 {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let (offset, length) = ((state >> 20) % (GIB - 100_000), 1 + (state >> 50) % 20_000);
        assert!(client.read(offset, length) == read_image(source, offset, length), "{length} bytes at {offset}");
        asked.extend(offset / BLOCK..(offset + length).div_ceil(BLOCK));
    }
    let status = node.status("disk");
    assert_eq!(status["present_bytes"], asked.len() as u64 * BLOCK, "{status}");
    assert_eq!(status["pulled_bytes"], asked.len() as u64 * BLOCK, "exactly what was asked, and once: {status}");
    assert_eq!(status["missing_bytes"], GIB - asked.len() as u64 * BLOCK);
    let present = map(&node.uri("disk"), "lazy-migrate:present");
    let blocks = present.iter().filter(|(_, (_, flags))| *flags == 1);
    let blocks: std::collections::BTreeSet<u64> =
        blocks.flat_map(|(&at, &(length, _))| at / BLOCK..(at + length) / BLOCK).collect();
    assert!(blocks == asked, "the map names exactly the blocks that were asked for");
    drop(client);

    // The same disk is then pulled as a whole, into a second node whose upstream is the first: a lazily filled export is
    // a source itself, whole or not.
    let second = Node::start(dir.join("c"), &[]);
    second.cli(&["pull", "copy", "--from", &node.uri("disk")]);
    second.cli(&["wait", "copy", "--timeout", "5m"]);
    let status = second.status("copy");
    assert_eq!((&status["phase"], &status["missing_bytes"]), (&"complete".into(), &0.into()), "{status}");
    assert_eq!(status["upstream"], "none", "nothing is held of an upstream that is not needed: {status}");
    drop(node);
    let whole = dir.join("whole.img");
    run("nbdcopy", "libnbd-bin", &[&second.uri("copy"), whole.to_str().unwrap()]);
    run("cmp", "diffutils", &[source.to_str().unwrap(), whole.to_str().unwrap()]);
    let compare = ["compare", "-f", "raw", "-F", "raw", source.to_str().unwrap(), &second.uri("copy")];
    run("qemu-img", "qemu-utils", &compare);
}

#[test]
fn a_gib_from_qemu_nbd() {
    let dir = tempfile::tempdir().unwrap();
    let (source, socket) = (dir.path().join("source.img"), dir.path().join("qemu.sock"));
    random_image(&source, GIB, 1);
    let (socket_text, source_text) = (socket.to_str().unwrap(), source.to_str().unwrap());
    let options = ["--persistent", "--read-only", "--format=raw", "--shared=8", "--export-name=disk"];
    let _qemu =
        Background::start("qemu-nbd", "qemu-utils", &[&options[..], &["--socket", socket_text, source_text]].concat());
    wait_for_socket(&socket);
    a_gib_arrives(dir.path(), &source, &format!("nbd+unix:///disk?socket={socket_text}"));
}

#[test]
fn a_gib_from_a_node() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source.img");
    random_image(&source, GIB, 2);
    let node = Node::start(dir.path().join("a"), &[]);
    node.cli(&["add", "disk", source.to_str().unwrap()]);
    a_gib_arrives(dir.path(), &source, &node.uri("disk"));
}

#[test]
fn a_finished_export_needs_its_upstream_no_more_and_is_a_source() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source.img");
    // Not a multiple of the block, with a partial last one.
    let size = 48 * MIB + 1234;
    random_image(&source, size, 3);
    let mut upstream = Nbdkit::start(dir.path(), &source, 0);
    let mut node = Node::start(dir.path().join("b"), &[]);
    node.cli(&["pull", "disk", "--from", &upstream.uri()]);
    node.cli(&["wait", "disk", "--timeout", "60s"]);
    upstream.kill();
    let mut client = Client::connect(&node.uri("disk"));
    assert!(client.read(size - 5000, 5000) == read_image(&source, size - 5000, 5000));
    client.write(8 * BLOCK, BLOCK, 99);
    drop(client);
    // Nor after a restart; and it is write-tracked, ready to be the source of the next pull.
    node.stop();
    node.start_again();
    node.wait_status("disk", "complete", |status| status["phase"] == "complete" && status["upstream"] == "none");
    let mut client = Client::connect(&node.uri("disk"));
    client.write(20 * MIB, BLOCK, 98);
    let heat = map(&node.uri("disk"), "lazy-migrate:heat");
    let hot: Vec<_> =
        heat.iter().filter(|(_, (_, score))| *score > 0).map(|(&at, &(length, _))| (at, length)).collect();
    assert_eq!(hot, [(20 * MIB, MIB)], "the region that was written, and no other: {heat:?}");
    let next = Node::start(dir.path().join("c"), &[]);
    next.cli(&["pull", "disk", "--from", &node.uri("disk")]);
    next.cli(&["wait", "disk", "--timeout", "60s"]);
    let mut expected = std::fs::read(&source).unwrap();
    expected[8 * BLOCK as usize..9 * BLOCK as usize].copy_from_slice(&crate::client::repeated(99, BLOCK));
    let at = 20 * MIB as usize;
    expected[at..at + BLOCK as usize].copy_from_slice(&crate::client::repeated(98, BLOCK));
    let copy = dir.path().join("copy.img");
    run("nbdcopy", "libnbd-bin", &[&next.uri("disk"), copy.to_str().unwrap()]);
    assert!(std::fs::read(&copy).unwrap() == expected, "the source's bytes, and what was written since");
}

#[test]
fn holes_are_skipped_and_stay_holes() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source.img");
    let data = [0..3 * MIB, 100 * MIB..104 * MIB, 511 * MIB..512 * MIB];
    image(&source, 512 * MIB, 4, &data);
    let upstream = Nbdkit::start(dir.path(), &source, 0);
    let node = Node::start(dir.path().join("b"), &[]);
    node.cli(&["pull", "disk", "--from", &upstream.uri()]);
    node.cli(&["wait", "disk", "--timeout", "60s"]);
    let status = node.status("disk");
    assert_eq!(
        (&status["pulled_bytes"], &status["skipped_bytes"]),
        (&(8 * MIB).into(), &(504 * MIB).into()),
        "{status}"
    );
    let sent: u64 = upstream.reads().iter().map(|(_, length)| length).sum();
    assert_eq!(sent, 8 * MIB, "the upstream was asked for data alone");
    let store = dir.path().join("b/state/disks/disk/disk.img");
    assert!(allocated(&store) <= allocated(&source) + 64 * 1024, "{} > {}", allocated(&store), allocated(&source));
    run("cmp", "diffutils", &[source.to_str().unwrap(), store.to_str().unwrap()]);
}

#[test]
fn sixty_four_clients_that_read_the_same_missing_block_make_one_fetch() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source.img");
    random_image(&source, 64 * MIB, 5);
    // Slow enough that all of them wait for the one fetch.
    let upstream = Nbdkit::start(dir.path(), &source, 2000);
    let node = Node::start(dir.path().join("b"), &[]);
    node.cli(&["pull", "disk", "--from", &upstream.uri(), "--no-background"]);
    let (different, bytes) = crowd(&node.uri("disk"), 64, 5 * MIB, BLOCK);
    assert_eq!(different, 1);
    assert!(bytes == read_image(&source, 5 * MIB, BLOCK));
    assert_eq!(upstream.reads(), [(5 * MIB, BLOCK)]);
    let status = node.status("disk");
    assert_eq!((&status["pulled_bytes"], &status["faults"]["count"]), (&BLOCK.into(), &1.into()), "{status}");
}

#[test]
fn fio_finds_its_own_data_on_a_disk_that_is_still_filling() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source.img");
    random_image(&source, 64 * MIB, 6);
    let upstream = Nbdkit::start(dir.path(), &source, 0);
    let node = Node::start(dir.path().join("b"), &[]);
    node.cli(&["pull", "disk", "--from", &upstream.uri(), "--rate", &(16 * MIB).to_string()]);
    let uri = format!("--uri={}", node.uri("disk"));
    // Writes of odd sizes at odd offsets, read back and checked by fio itself.
    let job =
        ["--name=verify", "--ioengine=nbd", "--rw=randwrite", "--bsrange=512-64k", "--blockalign=512", "--iodepth=16"];
    let checks =
        ["--size=32m", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--randseed=9", "--fsync=64"];
    run("fio", "fio", &[&job[..], &checks, &[&uri]].concat());
    node.cli(&["wait", "disk", "--timeout", "60s"]);
    // What fio did not write is the source's: the second half.
    let copy = dir.path().join("copy.img");
    run("nbdcopy", "libnbd-bin", &[&node.uri("disk"), copy.to_str().unwrap()]);
    assert!(read_image(&copy, 32 * MIB, 32 * MIB) == read_image(&source, 32 * MIB, 32 * MIB));
    assert!(read_image(&copy, 0, 32 * MIB) != read_image(&source, 0, 32 * MIB));
}
