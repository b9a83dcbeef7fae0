//! Two nodes on loopback, and a slow wire between them, so that a test has time between the handover and the end.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::client::Client;
use crate::support::{Node, free_port, hash, random_image};

pub const MIB: u64 = 1 << 20;
/// The lease of the nodes.
pub const LEASE: Duration = Duration::from_secs(2);

/// Forwards one TCP port, each connection at a limited rate towards the one who dialled.
pub struct Wire {
    /// Where it listens.
    pub port: u16,
    rate: Arc<AtomicU64>,
}

impl Wire {
    /// To another port of this machine; `rate` in bytes a second.
    pub fn new(target: u16, rate: u64) -> Wire {
        let port = free_port();
        let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
        let rate = Arc::new(AtomicU64::new(rate));
        let shared = rate.clone();
        // The threads end with the nodes that they connect, and this one with the test's process.
        std::thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                let Ok(far) = TcpStream::connect(("127.0.0.1", target)) else { continue };
                let (near_too, far_too) = (near.try_clone().unwrap(), far.try_clone().unwrap());
                let rate = shared.clone();
                std::thread::spawn(move || pump(near, far, &AtomicU64::new(u64::MAX)));
                std::thread::spawn(move || pump(far_too, near_too, &rate));
            }
        });
        Wire { port, rate }
    }

    /// From now on as fast as it can.
    pub fn open(&self) {
        self.rate.store(u64::MAX, Ordering::Relaxed);
    }
}

fn pump(mut from: TcpStream, mut to: TcpStream, rate: &AtomicU64) {
    let mut buffer = vec![0; 16 << 10];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..length]).is_err() {
            break;
        }
        let pause = length as f64 / rate.load(Ordering::Relaxed) as f64;
        if pause > 1e-6 {
            std::thread::sleep(Duration::from_secs_f64(pause));
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

/// A node with a disk `web`, and one that it can move to.
pub struct Pair {
    pub dir: tempfile::TempDir,
    pub a: Node,
    pub b: Node,
    pub wire: Wire,
    /// The peer address of `b`.
    pub to_b: String,
    /// The image under A's disk.
    pub image: PathBuf,
    /// Its content when the pair was made.
    pub original: Vec<u8>,
}

/// The size of the disk: at the wire's rate it takes some ten seconds.
pub const SIZE: u64 = 48 * MIB;

impl Pair {
    pub fn new(seed: u64) -> Pair {
        Pair::with_lease(seed, LEASE)
    }

    /// With another lease than the usual one.
    pub fn with_lease(seed: u64, lease: Duration) -> Pair {
        let dir = tempfile::tempdir().unwrap();
        random_image(&dir.path().join("web.img"), SIZE, seed);
        Pair::of_image(dir, lease)
    }

    /// With the image `web.img` in `dir`.
    pub fn of_image(dir: tempfile::TempDir, lease: Duration) -> Pair {
        let image_path = dir.path().join("web.img");
        let (a_port, b_port) = (free_port(), free_port());
        let wire = Wire::new(a_port, 2 * MIB);
        let lease = format!("{}s", lease.as_secs());
        let advertise = format!("127.0.0.1:{}", wire.port);
        let disk = format!("web={}", image_path.display());
        let a_peer = format!("127.0.0.1:{a_port}");
        let a = ["--peer", &a_peer, "--advertise", &advertise, "--lease", &lease, "--disk", &disk];
        let to_b = format!("127.0.0.1:{b_port}");
        let a = Node::start(dir.path().join("a"), &a);
        let b = Node::start(dir.path().join("b"), &["--peer", &to_b, "--lease", &lease]);
        let original = std::fs::read(&image_path).unwrap();
        Pair { a, b, wire, to_b, image: image_path, original, dir }
    }

    /// Prepared and handed over.
    pub fn handed_over(seed: u64) -> Pair {
        Pair::new(seed).hand_over()
    }

    /// Prepares, and hands over.
    pub fn hand_over(self) -> Pair {
        self.a.cli(&["prepare", "web", "--to", &self.to_b]);
        self.a.cli(&["handover", "web"]);
        self
    }

    /// The wire at full speed, until both say complete.
    #[track_caller]
    pub fn complete(&self) {
        self.wire.open();
        self.b.cli(&["wait", "web", "--timeout", "60s"]);
        self.a.cli(&["wait", "web", "--timeout", "60s"]);
        assert_eq!((self.phase_a().as_str(), self.phase_b().as_str()), ("released", "complete"));
    }

    pub fn phase_a(&self) -> String {
        self.a.status("web")["phase"].as_str().unwrap().to_owned()
    }

    pub fn phase_b(&self) -> String {
        self.b.status("web")["phase"].as_str().unwrap().to_owned()
    }

    #[track_caller]
    pub fn wait_b(&self, phase: &str) {
        self.b.wait_status("web", phase, |status| status["phase"] == phase);
    }

    pub fn client_a(&self) -> Client {
        Client::connect(&self.a.uri("web"))
    }

    pub fn client_b(&self) -> Client {
        Client::connect(&self.b.uri("web"))
    }

    /// The original bytes of a range.
    pub fn bytes(&self, offset: u64, length: u64) -> &[u8] {
        &self.original[offset as usize..(offset + length) as usize]
    }

    /// A's image is what it was.
    #[track_caller]
    pub fn assert_source_untouched(&self) {
        assert!(hash(&self.image) == blake3::hash(&self.original), "the source's disk has changed");
    }

    /// What B's node keeps of the disk.
    pub fn b_directory(&self) -> PathBuf {
        self.b.dir.join("state/disks/web")
    }
}
