//! Packet drop and file system quiesce on the real kernel: needs root, namespaces, loop devices, nftables, e2fsprogs.

use std::{
    fs::File,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use lazy_migrate::container::{Error, NetDrop, quiesce};

/// Runs a program that brings its package's name into the failure when it is missing.
fn run(package: &str, program: &str, args: &[&str]) {
    let done = Command::new(program).args(args).stdin(Stdio::null()).output();
    let done = done.unwrap_or_else(|e| panic!("cannot run {program}: {e}: install package {package}"));
    assert!(done.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&done.stderr));
}

/// Two namespaces with a cable between them, and nothing else.
struct Pair {
    near: String,
    far: String,
}

impl Pair {
    fn new() -> Self {
        let pair = Self { near: format!("lm{}n", std::process::id()), far: format!("lm{}f", std::process::id()) };
        let ip = |args: &str| run("iproute2", "ip", &args.split(' ').collect::<Vec<_>>());
        let (near, far) = (&pair.near, &pair.far);
        ip(&format!("netns add {near}"));
        ip(&format!("netns add {far}"));
        ip(&format!("link add eth0 netns {near} type veth peer name eth0 netns {far}"));
        for (ns, address) in [(near, "10.78.0.1/24"), (far, "10.78.0.2/24")] {
            ip(&format!("-n {ns} addr add {address} dev eth0"));
            ip(&format!("-n {ns} link set eth0 up"));
            ip(&format!("-n {ns} link set lo up"));
        }
        pair
    }

    fn path(ns: &str) -> PathBuf {
        Path::new("/run/netns").join(ns)
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        for ns in [&self.near, &self.far] {
            let _ = Command::new("ip").args(["netns", "del", ns]).status();
        }
    }
}

/// Does something inside a namespace. Sockets that are made there stay there.
fn inside<T: Send + 'static>(ns: &str, work: impl FnOnce() -> T + Send + 'static) -> T {
    let file = File::open(Pair::path(ns)).unwrap();
    let thread = std::thread::spawn(move || {
        nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        work()
    });
    thread.join().unwrap()
}

fn silent(stream: &mut TcpStream) -> bool {
    stream.set_read_timeout(Some(Duration::from_millis(700))).unwrap();
    matches!(stream.read(&mut [0; 1]), Err(e) if e.kind() == std::io::ErrorKind::WouldBlock)
}

fn expect(stream: &mut TcpStream, text: &[u8]) {
    // Retransmissions back off while packets are dropped.
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut got = vec![0; text.len()];
    stream.read_exact(&mut got).unwrap();
    assert_eq!(got, text);
}

#[tokio::test]
async fn a_connection_is_silent_while_dropped_and_lives_on_after() {
    let pair = Pair::new();
    let listener = inside(&pair.far, || TcpListener::bind("10.78.0.2:7000").unwrap());
    let mut near = inside(&pair.near, || TcpStream::connect("10.78.0.2:7000").unwrap());
    let (mut far, _) = listener.accept().unwrap();
    near.write_all(b"one").unwrap();
    expect(&mut far, b"one");

    let drop = NetDrop::new(Pair::path(&pair.far), "web");
    assert!(!drop.is_installed().await.unwrap());
    drop.install().await.unwrap();
    drop.install().await.unwrap();
    assert!(drop.is_installed().await.unwrap());
    near.write_all(b"two").unwrap();
    far.write_all(b"three").unwrap();
    assert!(silent(&mut far), "a packet came in");
    assert!(silent(&mut near), "a packet went out");
    // The namespace's own loopback is not the outside.
    inside(&pair.far, || {
        let local = TcpListener::bind("127.0.0.1:0").unwrap();
        TcpStream::connect_timeout(&local.local_addr().unwrap(), Duration::from_secs(5)).unwrap();
    });
    // Somebody else's table is not ours.
    NetDrop::new(Pair::path(&pair.far), "other").remove().await.unwrap();
    assert!(drop.is_installed().await.unwrap());

    drop.remove().await.unwrap();
    drop.remove().await.unwrap();
    assert!(!drop.is_installed().await.unwrap());
    expect(&mut far, b"two");
    expect(&mut near, b"three");
}

/// A small ext4 on a loop device.
struct Disk {
    dir: tempfile::TempDir,
}

impl Disk {
    fn new() -> Self {
        let disk = Self { dir: tempfile::tempdir().unwrap() };
        let image = disk.dir.path().join("disk.img");
        File::create(&image).unwrap().set_len(32 << 20).unwrap();
        std::fs::create_dir(disk.mount()).unwrap();
        run("e2fsprogs", "mkfs.ext4", &["-q", image.to_str().unwrap()]);
        run("mount", "mount", &["-o", "loop", image.to_str().unwrap(), disk.mount().to_str().unwrap()]);
        disk
    }

    fn mount(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    /// Begins a write, and answers when it is done.
    fn write(&self, name: &str) -> mpsc::Receiver<()> {
        let (done, wait) = mpsc::channel();
        let path = self.mount().join(name);
        std::thread::spawn(move || {
            std::fs::write(path, "x").unwrap();
            let _ = done.send(());
        });
        wait
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("fsfreeze").arg("-u").arg(self.mount()).stderr(Stdio::null()).status();
        let _ = Command::new("umount").arg(self.mount()).status();
    }
}

#[tokio::test]
async fn a_frozen_file_system_holds_writers_until_it_is_thawed() {
    let disk = Disk::new();
    quiesce::freeze(&disk.mount(), Duration::from_secs(30)).await.unwrap();
    quiesce::freeze(&disk.mount(), Duration::from_secs(30)).await.unwrap();
    let written = disk.write("held");
    assert!(written.recv_timeout(Duration::from_millis(500)).is_err(), "a write passed");
    quiesce::thaw(&disk.mount()).await.unwrap();
    written.recv_timeout(Duration::from_secs(30)).unwrap();
    quiesce::thaw(&disk.mount()).await.unwrap();
}

#[tokio::test]
async fn a_freeze_that_was_given_up_leaves_nothing_frozen() {
    let disk = Disk::new();
    let begun = Instant::now();
    let mut late = 0;
    while late < 10 {
        assert!(begun.elapsed() < Duration::from_secs(60), "no freeze came too late");
        match quiesce::freeze(&disk.mount(), Duration::ZERO).await {
            Err(Error::QuiesceTimedOut { .. }) => late += 1,
            other => {
                other.unwrap();
                quiesce::thaw(&disk.mount()).await.unwrap();
            }
        }
        disk.write("free").recv_timeout(Duration::from_secs(30)).expect("the file system stayed frozen");
    }
}

#[tokio::test]
async fn what_cannot_be_frozen_says_so() {
    let error = quiesce::freeze(Path::new("/proc"), Duration::from_secs(5)).await.unwrap_err();
    assert!(error.to_string().starts_with("cannot freeze the file system at /proc: "), "{error}");
}
