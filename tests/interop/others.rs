//! fio, nbdfuse, and nbdkit in front of a node.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::support::{Background, run, wait_for, wait_for_socket};
use crate::{KINDS, MIB, SIZE, Served};

#[test]
fn fio_verifies_what_it_wrote() {
    for kind in KINDS {
        let served = Served::start(kind);
        let uri = format!("--uri={}", served.uri());
        let job = ["--name=x", "--ioengine=nbd", "--rw=randrw", "--bsrange=512-64k", "--blockalign=512", "--size=16m"];
        let how = ["--iodepth=32", "--fsync=64", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--randseed=1"];
        run("fio", "fio", &[&job[..], &how, &["--output-format=terse", &uri]].concat());
        // Beyond its part nothing has changed.
        let (now, before) = (served.content(), served.source());
        assert!(now[16 << 20..] == before[16 << 20..] && now[..16 << 20] != before[..16 << 20], "{kind:?}");
    }
}

/// A directory on which nbdfuse may be mounted; unmounted when a test fails in the middle.
struct Mounted(String);

impl Drop for Mounted {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = Command::new("umount").args(["--lazy", &self.0]).stderr(Stdio::null()).status();
        }
    }
}

#[test]
fn nbdfuse_shows_the_export_as_a_file() {
    assert!(Path::new("/dev/fuse").exists(), "/dev/fuse is missing: modprobe fuse");
    for kind in KINDS {
        let served = Served::start(kind);
        let mounted = Mounted(served.path("mount"));
        std::fs::create_dir(&mounted.0).unwrap();
        let name = format!("{}/disk", mounted.0);
        let nbdfuse = Background::start("nbdfuse", "libnbd-bin", &[&name, &served.uri()]);
        wait_for("the file of nbdfuse", || Path::new(&name).exists());
        let mut wanted = served.source();
        assert!(std::fs::read(&name).unwrap() == wanted, "{kind:?}");
        let file = File::options().write(true).open(&name).unwrap();
        for (at, length) in [(4090, 100), (9 * MIB, 300_000), (SIZE - 5, 5)] {
            file.write_all_at(&vec![0x5b; length], at).unwrap();
            wanted[at as usize..at as usize + length].fill(0x5b);
        }
        file.sync_all().unwrap();
        drop(file);
        run("fusermount3", "fuse3", &["-u", &mounted.0]);
        // It ends when it is unmounted; until then it may still have something to send.
        let process = format!("/proc/{}/mountinfo", nbdfuse.pid());
        wait_for("the end of nbdfuse", || std::fs::read(&process).is_err());
        assert!(served.content() == wanted, "{kind:?}");
    }
}

#[test]
fn nbdkit_stands_in_front_of_a_node() {
    for kind in KINDS {
        let served = Served::start(kind);
        let socket = served.path("proxy.sock");
        let behind = format!("uri={}", served.uri());
        // In memory in front, so that writes stay there, and then through to the node.
        for filter in [&["--filter=cow"][..], &["--filter=blocksize"]] {
            let arguments = [&["-f", "-U", &socket][..], filter, &["nbd", &behind, "shared=true"]].concat();
            let _proxy = Background::start("nbdkit", "nbdkit", &arguments);
            wait_for_socket(socket.as_ref());
            let uri = format!("nbd+unix:///?socket={socket}");
            let copy = served.path("copy");
            run("nbdcopy", "libnbd-bin", &[&uri, &copy]);
            assert!(std::fs::read(&copy).unwrap() == served.source(), "{kind:?} {filter:?}");
            let commands =
                ["-c", "write -f -P 7 3M 100k", "-c", "write -z 9M 64k", "-c", "read -P 7 3M 100k", "-c", "flush"];
            run("qemu-io", "qemu-utils", &[&["-f", "raw"][..], &commands, &[&uri]].concat());
            std::fs::remove_file(&socket).unwrap();
        }
        let mut wanted = served.source();
        wanted[3 << 20..(3 << 20) + (100 << 10)].fill(7);
        wanted[9 << 20..(9 << 20) + (64 << 10)].fill(0);
        assert!(served.content() == wanted, "{kind:?}: through the last");
    }
}
