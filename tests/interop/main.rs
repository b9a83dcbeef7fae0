// tests/run: timeout=900
//! A node's exports with NBD clients of others: a local image, one that is filled on demand, and one that is pulled
//! while it is used. The protocol crate's own tests (`nbd/tests/peer_*.rs`) have the same with a disk in memory.
//!
//! Needs the Debian packages nbdkit, qemu-utils, libnbd-bin, python3-libnbd, fio, fuse3 and /dev/fuse; what is missing
//! makes a test fail, with its package.

#[path = "../support/mod.rs"]
mod support;

mod corrupt;
mod libnbd;
mod others;
mod qemu;
mod sources;

use std::path::{Path, PathBuf};

use support::{Background, Node, image, run, wait_for_socket};

const MIB: u64 = 1 << 20;
/// Whole sectors, but no multiple of a block.
const SIZE: u64 = 24 * MIB + 3 * 512;

/// How the bytes of an export come to the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// The node has the image.
    Local,
    /// Fetched from another server when somebody asks for them.
    OnDemand,
    /// Pulled from another server all the while.
    Pulled,
}

const KINDS: [Kind; 3] = [Kind::Local, Kind::OnDemand, Kind::Pulled];

/// A node that serves an export named `disk`.
struct Served {
    dir: tempfile::TempDir,
    node: Node,
    /// The content when it began; the clients do not change it.
    source: PathBuf,
    _upstream: Option<Background>,
}

impl Served {
    /// Random bytes with holes between them.
    fn start(kind: Kind) -> Served {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source.img");
        let content =
            |path: &Path| image(path, SIZE, 11, &[0..5 * MIB, 9 * MIB..10 * MIB + 4096, 20 * MIB..SIZE - 8192]);
        content(&source);
        let node = Node::start(dir.path().join("node"), &[]);
        if kind == Kind::Local {
            let image = dir.path().join("image");
            content(&image);
            node.cli(&["add", "disk", text(&image)]);
            return Served { dir, node, source, _upstream: None };
        }
        let socket = dir.path().join("upstream.sock");
        let upstream = Background::start("nbdkit", "nbdkit", &["-f", "-r", "-U", text(&socket), "file", text(&source)]);
        wait_for_socket(&socket);
        let from = format!("nbd+unix:///?socket={}", socket.display());
        let background: &[&str] = if kind == Kind::OnDemand { &["--no-background"] } else { &[] };
        node.cli(&[&["pull", "disk", "--from", &from], background].concat());
        Served { dir, node, source, _upstream: Some(upstream) }
    }

    fn uri(&self) -> String {
        self.node.uri("disk")
    }

    /// A path for whatever a test makes.
    fn path(&self, name: &str) -> String {
        text(&self.dir.path().join(name)).to_owned()
    }

    /// What the export has now, read in a way that other tests have checked.
    fn content(&self) -> Vec<u8> {
        let copy = self.path("content");
        run("nbdcopy", "libnbd-bin", &[&self.uri(), &copy]);
        std::fs::read(&copy).unwrap()
    }

    fn source(&self) -> Vec<u8> {
        std::fs::read(&self.source).unwrap()
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path of the test's own")
}

/// Other content of the same size, with holes elsewhere.
fn other_image(path: &str) -> Vec<u8> {
    image(Path::new(path), SIZE, 12, &[0..MIB + 512, 7 * MIB..9 * MIB + 100, 23 * MIB..SIZE]);
    std::fs::read(path).unwrap()
}
