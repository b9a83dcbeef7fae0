//! B's own disk fails while it fills: it is full, or it answers with I/O errors.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use crate::client::{Connection, EIO, ENOSPC, ESHUTDOWN, Fail};
use crate::hosts::{Case, Hosts, run_all};
use crate::model::Least;
use crate::service::{DISK, Load, Log, Part, Prober, assert_content, assert_only_errors};
use crate::support::network::Fault;
use crate::support::{Background, run, wait_for, wait_for_socket};

/// Nothing here is about the lease: a busy machine must not fence.
const LEASE: Duration = Duration::from_secs(10);
const SIZE_MIB: u64 = 16;
const EROFS: u32 = 30;

/// Something mounted where B's node keeps everything; taken away when dropped.
struct Mount(PathBuf);

impl Mount {
    fn new(arguments: &[&str], at: PathBuf) -> Mount {
        assert!(nix::unistd::geteuid().is_root(), "this test mounts file systems: run it as root");
        std::fs::create_dir_all(&at).unwrap();
        run("mount", "mount", &[arguments, &[at.to_str().unwrap()]].concat());
        Mount(at)
    }

    /// Unmounts, and must succeed: what is not on the disk now is lost.
    fn end(self) {
        wait_for("unmounting", || Command::new("umount").arg(&self.0).output().unwrap().status.success());
        std::mem::forget(self);
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["-l".as_ref(), self.0.as_os_str()]).status();
    }
}

/// A block device that fails every write while a file exists: nbdkit, by FUSE and a loop device.
struct BadDisk {
    loop_device: String,
    fuse: PathBuf,
    trigger: PathBuf,
    _fuse: Background,
    _server: Background,
}

impl BadDisk {
    fn new(dir: &Path) -> BadDisk {
        let (socket, trigger) = (dir.join("nbdkit.sock"), dir.join("fail"));
        let error_file = format!("error-file={}", trigger.display());
        let server = Background::start_quietly(
            "nbdkit",
            "nbdkit",
            &[
                "--foreground",
                "--unix",
                socket.to_str().unwrap(),
                "--filter=error",
                "memory",
                "size=64M",
                "error-pwrite=EIO",
                "error-pwrite-rate=100%",
                &error_file.replace("error-file", "error-pwrite-file"),
                "error-zero=EIO",
                "error-zero-rate=100%",
                &error_file.replace("error-file", "error-zero-file"),
            ],
        );
        wait_for_socket(&socket);
        let fuse = dir.join("fuse");
        std::fs::create_dir(&fuse).unwrap();
        let file = fuse.join("disk");
        let uri = format!("nbd+unix:///?socket={}", socket.display());
        let process = Background::start_quietly("nbdfuse", "libnbd-bin", &[file.to_str().unwrap(), &uri]);
        wait_for("nbdfuse's file", || std::fs::metadata(&file).is_ok_and(|found| found.len() > 0));
        let options = ["--find", "--show", "--direct-io=on", file.to_str().unwrap()];
        let loop_device = run("losetup", "mount", &options);
        // Without a journal of its own, the file system has nothing to give up over.
        run("mkfs.ext4", "e2fsprogs", &["-q", "-O", "^has_journal", &loop_device]);
        BadDisk { loop_device, fuse, trigger, _fuse: process, _server: server }
    }

    fn mount(&self, at: &Path) -> Mount {
        Mount::new(&["-o", "errors=continue", &self.loop_device], at.to_owned())
    }

    fn fail(&self) {
        std::fs::write(&self.trigger, "").unwrap();
    }

    fn work_again(&self) {
        std::fs::remove_file(&self.trigger).unwrap();
    }
}

impl Drop for BadDisk {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.loop_device]).status();
        let _ = Command::new("umount").args(["-l".as_ref(), self.fuse.as_os_str()]).status();
    }
}

fn load(hosts: &Hosts) -> Load {
    let parts = [Part::Writes, Part::Changes, Part::Reads, Part::Flushes];
    let load = Load::start(hosts.b.nbd_socket(), &hosts.model, &parts, Duration::from_millis(5));
    load.wait_for_all(0, 10);
    load
}

fn errors(logs: &[Log], part: Part, errno: u32) -> u64 {
    let of_part = logs.iter().filter(|log| log.part == part);
    of_part.filter_map(|log| log.errors.get(&errno)).map(|(count, _)| count).sum()
}

/// A disk that fills up under B's clients, until the pull stands still.
fn full(name: &str) -> (Hosts, Mount, PathBuf, Load) {
    let dir = tempfile::tempdir().unwrap();
    let small = Mount::new(&["-t", "tmpfs", "-o", "size=40m", "lazy-migrate-test"], dir.path().join("b/state"));
    let hosts = Hosts::in_directory(dir, name, SIZE_MIB, LEASE);
    hosts.hand_over();
    let load = load(&hosts);
    let filler = small.0.join("filler");
    // All but a few blocks of what is left.
    let left = nix::sys::statvfs::statvfs(&small.0).unwrap();
    let room = (left.blocks_available() * left.fragment_size()).saturating_sub(256 << 10);
    run("fallocate", "util-linux", &["-l", &room.to_string(), filler.to_str().unwrap()]);
    let status = hosts.b.wait_status(DISK, "paused", |status| !status["paused"].is_null());
    assert!(status["paused"].as_str().unwrap().contains("No space left"), "{status}");
    assert!(status["missing_bytes"].as_u64().unwrap() > 0, "{status}");
    (hosts, small, filler, load)
}

fn a_full_disk_then_room() {
    let (hosts, _small, filler, load) = full("d-room");
    load.wait_for_all(0, 2);
    std::fs::remove_file(filler).unwrap();
    hosts.network.full_speed();
    hosts.b.cli(&["wait", DISK, "--timeout", "60s"]);
    let logs = load.finish();
    assert_only_errors(&logs, &[ENOSPC]);
    assert!(errors(&logs, Part::Writes, ENOSPC) > 0, "there was no room for all writes");
    assert_eq!(errors(&logs, Part::Reads, ENOSPC), 0, "a read needs no room");
    hosts.assert_complete();
    hosts.assert_freeze_point(false);
}

fn a_full_disk_then_rollback() {
    let (hosts, _small, _filler, load) = full("d-back");
    let prober = Prober::start(hosts.a.nbd_socket(), hosts.probed());
    hosts.a.cli(&["rollback", DISK, "--wait"]);
    prober.wait_accepted(1);
    hosts.wait_b("discarded");
    load.wait_until_shut_down();
    assert_only_errors(&load.finish(), &[ENOSPC, ESHUTDOWN]);
    hosts.assert_freeze_point(true);
}

fn on_bad_disk(name: &str) -> (Hosts, Mount, BadDisk) {
    let dir = tempfile::tempdir().unwrap();
    let disk = BadDisk::new(dir.path());
    let mount = disk.mount(&dir.path().join("b/state"));
    let hosts = Hosts::in_directory(dir, name, SIZE_MIB, LEASE);
    hosts.hand_over();
    (hosts, mount, disk)
}

/// I/O errors on B's store: FLUSH fails, what is present is still read, nothing is ever complete.
fn bad(name: &str) -> (Hosts, Mount, BadDisk, Load) {
    let (hosts, mount, disk) = on_bad_disk(name);
    let load = load(&hosts);
    disk.fail();
    wait_for("a flush that fails", || hosts.b.log().contains("cannot make the disk durable"));
    (hosts, mount, disk, load)
}

fn io_errors_then_rollback() {
    let (hosts, _mount, disk, load) = bad("d-eio");
    // The disk works again, but what it has lost meanwhile nobody knows.
    disk.work_again();
    hosts.network.full_speed();
    hosts.b.wait_status(DISK, "all there", |status| status["missing_bytes"] == 0);
    let line = hosts.b.fails(5, &["wait", DISK, "--timeout", "3s"]);
    assert!(line.contains("active"), "B must not say that it holds what it may have lost: {line}");
    assert_eq!(hosts.a.status(DISK)["phase"], "handed-over");
    let prober = Prober::start(hosts.a.nbd_socket(), hosts.probed());
    hosts.a.cli(&["rollback", DISK, "--wait"]);
    prober.wait_accepted(1);
    hosts.wait_b("discarded");
    load.wait_until_shut_down();
    let logs = load.finish();
    assert_only_errors(&logs, &[EIO, EROFS, ESHUTDOWN]);
    assert!(errors(&logs, Part::Flushes, EIO) > 0);
    assert_eq!(errors(&logs, Part::Reads, EIO), 0, "what is read is either in memory or at the source");
    hosts.assert_freeze_point(true);
}

/// The same while the disk still fails: B cannot even record that it lost the disk.
fn io_errors_that_stay_and_rollback() {
    let (hosts, _mount, _disk, load) = bad("d-stay");
    let prober = Prober::start(hosts.a.nbd_socket(), hosts.probed());
    hosts.a.cli(&["rollback", DISK, "--wait"]);
    prober.wait_accepted(1);
    load.wait_until_shut_down();
    assert_only_errors(&load.finish(), &[EIO, EROFS, ESHUTDOWN]);
    hosts.assert_freeze_point(true);
}

/// The file system of a disk that works again, as an operator leaves it after errors.
fn repaired(mount: Mount, disk: &BadDisk) -> Mount {
    let at = mount.0.clone();
    mount.end();
    // 1: it has put something right. Another case's namespace may hold a copy of the mount for a moment.
    let check = || Command::new("fsck.ext4").args(["-p", "-f", &disk.loop_device]).output().unwrap();
    wait_for("a sound file system that nobody else uses", || matches!(check().status.code(), Some(0 | 1)));
    disk.mount(&at)
}

/// B's host and its disk are started again: what was flushed is there, and nothing is there that nobody wrote.
fn io_errors_then_a_new_start() {
    let (mut hosts, mount, disk, load) = bad("d-again");
    hosts.b.kill();
    let logs = load.finish();
    assert_only_errors(&logs, &[EIO, EROFS]);
    disk.work_again();
    let at = mount.0.clone();
    let _mount = repaired(mount, &disk);
    // As after a new boot, too.
    let live = at.join("disks/web/map.live");
    std::fs::write(live, b"of another boot").unwrap();
    hosts.b.start_again();
    hosts.b.cli(&["wait", DISK, "--for", "active", "--timeout", "30s"]);
    assert_content(&hosts.b.nbd_socket(), &hosts.model, Least::Flushed);
    hosts.network.full_speed();
    hosts.b.cli(&["wait", DISK, "--timeout", "60s"]);
    assert_content(&hosts.b.nbd_socket(), &hosts.model, Least::Flushed);
    // The node before the file system that it is on.
    hosts.b.kill();
}

/// B's node is started again and its disk works again, but pages that could not be written are lost, and the system has
/// said so already: the new process counts as missing whatever the old one could not make durable. Nothing is written
/// before the file system was repaired: what it says is allocated may be as old as the errors.
fn io_errors_and_a_new_node() {
    let (mut hosts, mount, disk) = on_bad_disk("d-node");
    let parts = [Part::Writes, Part::Changes, Part::Reads];
    let load = Load::start(hosts.b.nbd_socket(), &hosts.model, &parts, Duration::from_millis(5));
    load.wait_for_all(0, 10);
    let mut flusher = Connection::open(&hosts.b.nbd_socket(), DISK, Arc::default()).unwrap();
    let written = hosts.model.before_flush();
    assert_eq!(flusher.flush(), Ok(()));
    hosts.model.flushed(written);
    disk.fail();
    let missing = |hosts: &Hosts| hosts.b.status(DISK)["missing_bytes"].as_u64().unwrap();
    let durable = missing(&hosts);
    wait_for("a mebibyte that came since", || missing(&hosts) + (1 << 20) <= durable);
    assert_eq!(flusher.flush(), Err(Fail::Errno(EIO)));
    let before = missing(&hosts);
    hosts.b.kill();
    assert_only_errors(&load.finish(), &[EIO, EROFS]);
    disk.work_again();
    hosts.network.break_by(Fault::Down);
    hosts.b.start_again();
    let after = hosts.b.status(DISK)["missing_bytes"].as_u64().unwrap();
    assert!(
        after >= before + (1 << 20) / 2,
        "{before} bytes were missing before the process died, and {after} for the next one"
    );
    hosts.b.kill();
    let _mount = repaired(mount, &disk);
    hosts.b.start_again();
    hosts.network.mend();
    hosts.network.full_speed();
    hosts.b.cli(&["wait", DISK, "--timeout", "60s"]);
    hosts.a.cli(&["wait", DISK, "--timeout", "60s"]);
    assert_content(&hosts.b.nbd_socket(), &hosts.model, Least::Flushed);
    hosts.assert_freeze_point(false);
    // The node before the file system that it is on.
    hosts.b.kill();
}

#[test]
fn the_destinations_disk_fails() {
    let cases: [(&str, fn()); 6] = [
        ("full, then there is room", a_full_disk_then_room),
        ("full, then a rollback", a_full_disk_then_rollback),
        ("I/O errors, then a rollback", io_errors_then_rollback),
        ("I/O errors that stay, and a rollback", io_errors_that_stay_and_rollback),
        ("I/O errors, then all is started again", io_errors_then_a_new_start),
        ("I/O errors, then the node is started again", io_errors_and_a_new_node),
    ];
    run_all(3, cases.into_iter().map(|(name, run)| Case::new(name, run)).collect());
}
