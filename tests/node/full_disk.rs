//! A destination whose disk is full.

use std::path::{Path, PathBuf};

use crate::client::{Client, Nbdkit, repeated};
use crate::support::{Node, random_image, run};

const MIB: u64 = 1 << 20;

/// A small file system of its own, unmounted when dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: PathBuf, mib: u64) -> SmallDisk {
        assert!(nix::unistd::geteuid().is_root(), "this test mounts a file system: run it as root");
        std::fs::create_dir_all(&at).unwrap();
        run(
            "mount",
            "mount",
            &["-t", "tmpfs", "-o", &format!("size={mib}m"), "lazy-migrate-test", at.to_str().unwrap()],
        );
        SmallDisk(at)
    }

    /// A file that takes this much of its room.
    fn fill(&self, mib: u64) -> PathBuf {
        let filler = self.0.join("filler");
        std::fs::write(&filler, vec![1; (mib * MIB) as usize]).unwrap();
        filler
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").args(["-l".as_ref(), self.0.as_os_str()]).status();
    }
}

/// The pull stands still while there is no room, and says so; what clients get meanwhile is right; then it goes on.
fn pauses_and_goes_on(node_dir: &Path, disk: &SmallDisk, options: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source.img");
    random_image(&source, 32 * MIB, 51);
    let upstream = Nbdkit::start(dir.path(), &source, 0);
    let filler = disk.fill(24);
    let node = Node::start(node_dir, &[]);
    node.cli(&[&["pull", "disk", "--from", &upstream.uri()], options].concat());
    let status = node.wait_status("disk", "paused", |status| !status["paused"].is_null());
    assert!(status["paused"].as_str().unwrap().contains("No space left"), "{status}");
    assert!(status["missing_bytes"].as_u64().unwrap() > 0, "{status}");
    assert!(node.cli(&["status", "disk"]).contains("PAUSED"));
    let line = node.fails(5, &["wait", "disk", "--timeout", "300ms"]);
    assert!(line.contains("not complete") && line.contains("No space left"), "{line}");
    // A read is answered with the source's bytes, room or not; a write that finds no room says so, and is no loss.
    let mut client = Client::connect(&node.uri("disk"));
    let mut original = std::fs::read(&source).unwrap();
    for offset in [0, 31 * MIB, 32 * MIB - 4096] {
        assert!(client.read(offset, 4096) == original[offset as usize..][..4096], "at {offset}");
    }
    let refused = (0..32 * MIB).step_by(MIB as usize).find(|offset| {
        let answer = client.ask(&format!("write {offset} 65536 7"));
        if answer == "ok" {
            original[*offset as usize..][..65536].copy_from_slice(&repeated(7, 65536));
        }
        answer != "ok"
    });
    let refused = refused.expect("there is no room for all these writes");
    assert_eq!(client.ask(&format!("write {refused} 65536 7")), "error ENOSPC");
    // Room is made: everything goes on by itself.
    std::fs::remove_file(filler).unwrap();
    node.cli(&["wait", "disk", "--timeout", "60s"]);
    let status = node.status("disk");
    assert_eq!((&status["paused"], &status["missing_bytes"]), (&serde_json::Value::Null, &0.into()), "{status}");
    let copy = dir.path().join("copy.img");
    run("nbdcopy", "libnbd-bin", &[&node.uri("disk"), copy.to_str().unwrap()]);
    let found = std::fs::read(&copy).unwrap();
    // The write that was refused may have been done in part: its bytes are old or new, nothing else.
    let different: Vec<usize> = (0..found.len()).filter(|&at| found[at] != original[at]).collect();
    let range = refused as usize..refused as usize + 65536;
    assert!(
        different.iter().all(|at| range.contains(at) && found[*at] == repeated(7, 8)[at % 8]),
        "{} bytes differ, the first at {:?}",
        different.len(),
        different.first()
    );
}

#[test]
fn a_full_store_pauses_the_pull() {
    let dir = tempfile::tempdir().unwrap();
    let disk = SmallDisk::mount(dir.path().join("small"), 40);
    let store = dir.path().join("small/store.img");
    pauses_and_goes_on(&dir.path().join("b"), &disk, &["--store", store.to_str().unwrap()]);
}

#[test]
fn a_full_state_directory_pauses_the_pull() {
    let dir = tempfile::tempdir().unwrap();
    let disk = SmallDisk::mount(dir.path().join("small"), 40);
    pauses_and_goes_on(&dir.path().join("small/b"), &disk, &[]);
}
