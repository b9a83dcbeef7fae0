//! A node pulls from servers of others, with and without what they can leave out or do badly.

use std::path::Path;

use crate::support::{Background, Node, free_port, run, wait_for, wait_for_socket};
use crate::{MIB, SIZE, other_image, text};

/// Pulls all of `from` while some of it is asked for, and compares it with `wanted`.
fn pull(dir: &Path, from: &str, wanted: &[u8], what: &str) {
    let node = Node::start(dir.join("node"), &[]);
    node.cli(&["pull", "disk", "--from", from]);
    let asked = ["-f", "raw", "-c", "read 20M 1M", "-c", "read 512 3000", "-c", "write -P 3 4000 5000"];
    run("qemu-io", "qemu-utils", &[&asked[..], &[&node.uri("disk")]].concat());
    node.cli(&["wait", "disk", "--timeout", "60s"]);
    let copy = dir.join("copy");
    run("nbdcopy", "libnbd-bin", &[&node.uri("disk"), text(&copy)]);
    let mut wanted = wanted.to_vec();
    wanted[4000..9000].fill(3);
    assert!(std::fs::read(&copy).unwrap() == wanted, "{what}: {}", node.log());
}

#[test]
fn nbdkit_with_each_of_its_limits() {
    for options in [
        &["file"][..],
        &["--no-sr", "file"],
        &["--mask-handshake=0", "file"],
        &["--filter=noextents", "file"],
        &["--filter=multi-conn", "file", "multi-conn-mode=disable"],
        &["--filter=noparallel", "file", "serialize=all-requests"],
        &["--filter=delay", "file", "rdelay=5ms"],
        // A request of ours that is larger or not aligned would be an error.
        &["--filter=blocksize-policy", "file", "blocksize-minimum=512", "blocksize-preferred=4096"],
        &["--filter=blocksize-policy", "file", "blocksize-minimum=512", "blocksize-maximum=65536"],
        &["--filter=error", "file", "error-pread=EIO", "error-pread-rate=20%"],
        &["--filter=error", "--no-sr", "file", "error-pread=ENOMEM", "error-pread-rate=20%"],
        &["--filter=error", "file", "error-extents=EIO", "error-extents-rate=1"],
    ] {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source.img");
        let wanted = other_image(text(&source));
        let socket = dir.path().join("s");
        let file = format!("file={}", source.display());
        let policy = ["blocksize-error-policy=error"];
        let policy = if options[0].ends_with("blocksize-policy") { &policy[..] } else { &[] };
        let arguments = [&["-f", "-r", "-U", text(&socket)][..], options, &[&file], policy].concat();
        let _upstream = Background::start_quietly("nbdkit", "nbdkit", &arguments);
        wait_for_socket(&socket);
        pull(dir.path(), &format!("nbd+unix:///?socket={}", socket.display()), &wanted, &format!("{options:?}"));
    }
}

#[test]
fn sparse_random_arrives_with_its_holes() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let size = "64M";
    let plugin = ["sparse-random", size, "percent=10", "seed=3", "runlength=524288"];
    let arguments = [&["-f", "-U", text(&socket)][..], &plugin].concat();
    let _upstream = Background::start_quietly("nbdkit", "nbdkit", &arguments);
    wait_for_socket(&socket);
    let from = format!("nbd+unix:///?socket={}", socket.display());
    let node = Node::start(dir.path().join("node"), &[]);
    node.cli(&["pull", "disk", "--from", &from]);
    node.cli(&["wait", "disk", "--timeout", "60s"]);
    run("qemu-img", "qemu-utils", &["compare", "-f", "raw", "-F", "raw", &from, &node.uri("disk")]);
    let status = node.status("disk");
    let pulled = status["pulled_bytes"].as_u64().unwrap();
    assert!(pulled > 0 && pulled < 24 * MIB, "the zeroes were not sent: {status}");
}

#[test]
fn qemu_nbd_and_nbd_server() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source.img");
    let wanted = other_image(text(&source));
    let socket = dir.path().join("s");
    let options = ["--persistent", "--read-only", "--format=raw", "--export-name=disk"];
    // Without --shared: a second connection waits for the end of the first.
    let qemu =
        Background::start("qemu-nbd", "qemu-utils", &[&options[..], &["-k", text(&socket), text(&source)]].concat());
    wait_for("the socket of qemu-nbd", || socket.exists());
    pull(dir.path(), &format!("nbd+unix:///disk?socket={}", socket.display()), &wanted, "qemu-nbd");
    drop(qemu);

    let server = NbdServer::start(&source);
    let other = tempfile::tempdir().unwrap();
    // It offers no structured replies, and so no map.
    assert_eq!(wanted.len() as u64, SIZE);
    pull(other.path(), &format!("nbd://127.0.0.1:{}/disk", server.port), &wanted, "nbd-server");
}

/// The protocol authors' server, which becomes a daemon: ended by its process number.
struct NbdServer {
    dir: tempfile::TempDir,
    port: u16,
}

impl NbdServer {
    fn start(image: &Path) -> NbdServer {
        let server = NbdServer { dir: tempfile::tempdir().unwrap(), port: free_port() };
        let generic = format!("[generic]\nlistenaddr = 127.0.0.1\nport = {}\nallowlist = true\n", server.port);
        let exported = format!("[disk]\nexportname = {}\nreadonly = true\n", image.display());
        let config = server.dir.path().join("config");
        std::fs::write(&config, generic + &exported).unwrap();
        run("nbd-server", "nbd-server", &["-C", text(&config), "-p", text(&server.dir.path().join("pid"))]);
        wait_for("nbd-server", || std::net::TcpStream::connect(("127.0.0.1", server.port)).is_ok());
        server
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        let pid = std::fs::read_to_string(self.dir.path().join("pid")).ok();
        if let Some(pid) = pid.and_then(|pid| pid.trim().parse().ok()) {
            // It may have ended by itself.
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
    }
}
