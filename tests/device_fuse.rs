//! Attaching where the kernel has no NBD device: nbdfuse and a loop device on this machine, over a real NBD server.
//!
//! Needs root and the Debian packages qemu-utils, libnbd-bin, fuse3, mount and e2fsprogs.

use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use lazy_migrate::device::{AttachDevice, AttachRequest, Attached, DeviceError, How, Link, Via, mount, mounts_of};

const LIMIT: Duration = Duration::from_secs(30);
const SIZE: u64 = 64 << 20;

/// A qemu-nbd that serves a file, ended when dropped.
struct QemuNbd {
    child: Child,
    socket: PathBuf,
}

impl QemuNbd {
    fn start(directory: &Path, image: &Path) -> Self {
        let socket = directory.join("nbd.sock");
        let child = Command::new("qemu-nbd")
            .args(["--persistent", "--format=raw", "--export-name=disk", "--shared=4", "--discard=unmap", "--socket"])
            .args([&socket, image])
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-nbd does not start: install the Debian package qemu-utils");
        let server = QemuNbd { child, socket };
        let deadline = Instant::now() + LIMIT;
        while std::os::unix::net::UnixStream::connect(&server.socket).is_err() {
            assert!(Instant::now() < deadline, "qemu-nbd does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        server
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.socket.display())
    }
}

impl Drop for QemuNbd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Setup {
    directory: tempfile::TempDir,
    image: PathBuf,
    server: QemuNbd,
}

fn setup() -> Setup {
    assert!(nix::unistd::geteuid().is_root(), "this test mounts filesystems: run it as root");
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.img");
    fs::File::create(&image).unwrap().set_len(SIZE).unwrap();
    let server = QemuNbd::start(directory.path(), &image);
    Setup { directory, image, server }
}

impl Setup {
    fn request(&self) -> AttachRequest {
        AttachRequest {
            name: "web".to_owned(),
            size: SIZE,
            read_only: false,
            via: Via::Fuse,
            device: None,
            backend_id: "unused".to_owned(),
            uri: self.server.uri(),
            directory: self.directory.path().join("attached"),
            limit: LIMIT,
        }
    }

    /// What a finished attachment may not leave behind.
    fn assert_nothing_left(&self, record: Option<&Attached>) {
        let deadline = Instant::now() + LIMIT;
        let left = || {
            let mut left = Vec::new();
            let attached = self.directory.path().join("attached");
            left.extend(attached.exists().then(|| "directory".to_owned()));
            let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
            left.extend(mounts.contains(&*attached.to_string_lossy()).then(|| "mount".to_owned()));
            for entry in fs::read_dir("/sys/block").unwrap() {
                let backing = fs::read_to_string(entry.unwrap().path().join("loop/backing_file")).unwrap_or_default();
                left.extend(backing.contains(&*attached.to_string_lossy()).then(|| "loop device".to_owned()));
            }
            let socket = self.server.socket.to_string_lossy().into_owned();
            for entry in fs::read_dir("/proc").unwrap() {
                let line = fs::read_to_string(entry.unwrap().path().join("cmdline")).unwrap_or_default();
                left.extend((line.starts_with("nbdfuse") && line.contains(&socket)).then(|| "process".to_owned()));
            }
            if let Some(Attached { how: How::Fuse { pid, .. }, .. }) = record {
                left.extend(Path::new(&format!("/proc/{pid}")).exists().then(|| format!("process {pid}")));
            }
            left
        };
        while !left().is_empty() {
            assert!(Instant::now() < deadline, "left behind: {:?}", left());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn no_connection() -> BoxFuture<'static, io::Result<Link>> {
    Box::pin(async { Err(io::Error::other("FUSE needs no connection of ours")) })
}

fn run(program: &str, package: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}; install the Debian package {package}"));
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Unmounts when a test fails in the middle.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = Command::new("umount").arg("--lazy").arg(&self.0).stderr(Stdio::null()).status();
        }
    }
}

/// Attaches; the device goes away also when the test fails.
struct Device(AttachDevice);

impl Drop for Device {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let record = self.0.record().clone();
            let abandon = async move { AttachDevice::from_record(record).abandon().await };
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let _ = std::thread::spawn(move || runtime.map(|runtime| runtime.block_on(abandon))).join();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_filesystem_lives_on_an_attached_export_and_nothing_stays_after_the_detach() {
    let setup = setup();
    let mut device = Device(AttachDevice::attach(&setup.request(), &no_connection).await.unwrap());
    let record = device.0.record().clone();
    let path = record.device.to_str().unwrap().to_owned();
    assert!(path.starts_with("/dev/loop"), "{path}");
    run("mkfs.ext4", "e2fsprogs", &["-q", &path]);
    let directory = setup.directory.path().join("a mount");
    fs::create_dir(&directory).unwrap();
    let _mounted = Mounted(directory.clone());
    mount::mount(&record.device, &directory, None, &["noatime"], LIMIT).await.unwrap();
    assert_eq!(mounts_of(&record.device).unwrap(), vec![directory.clone()]);

    // While it is mounted it stays.
    let refused = device.0.detach(LIMIT).await.unwrap_err();
    assert!(matches!(&refused, DeviceError::Mounted { directory: at, .. } if *at == directory), "{refused}");

    // An fsync reaches the server's file: the text is in the image before anything is unmounted.
    let text = b"written through a loop device, FUSE and NBD";
    let file = fs::File::create(directory.join("file")).unwrap();
    file.write_all_at(text, 0).unwrap();
    file.sync_all().unwrap();
    drop(file);
    let image = fs::read(&setup.image).unwrap();
    assert!(image.windows(text.len()).any(|window| window == text), "the image does not have the text");

    mount::umount(&directory, LIMIT).await.unwrap();
    device.0.detach(LIMIT).await.unwrap();
    setup.assert_nothing_left(Some(&record));
    device.0.detach(LIMIT).await.expect("a second detach has nothing to do");
    run("fsck.ext4", "e2fsprogs", &["-fn", setup.image.to_str().unwrap()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_node_detaches_by_the_record() {
    let setup = setup();
    let mut device = Device(AttachDevice::attach(&setup.request(), &no_connection).await.unwrap());
    let record = device.0.record().clone();
    // Cached by the loop device, to be written by the detach.
    let text = vec![0x5a; 4096];
    fs::OpenOptions::new().write(true).open(&record.device).unwrap().write_all_at(&text, 1 << 20).unwrap();
    let error = AttachDevice::readopt(&record, &no_connection).await.unwrap_err();
    assert!(matches!(error, DeviceError::CannotReconnect { .. }), "{error}");
    let mut later = AttachDevice::from_record(record.clone());
    later.detach(LIMIT).await.unwrap();
    setup.assert_nothing_left(None);
    let mut found = vec![0; 4096];
    fs::File::open(&setup.image).unwrap().read_exact_at(&mut found, 1 << 20).unwrap();
    assert_eq!(found, text);
    // nbdfuse is this process's child, which a later node's would not be: it stays as a zombie until it is waited for.
    device.0.detach(LIMIT).await.unwrap();
    setup.assert_nothing_left(Some(&record));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_in_use_is_not_detached() {
    let setup = setup();
    let mut device = Device(AttachDevice::attach(&setup.request(), &no_connection).await.unwrap());
    let record = device.0.record().clone();
    let claim = lazy_migrate::device::block::Claim::take(&record.device).unwrap();
    let refused = device.0.detach(LIMIT).await.unwrap_err();
    assert!(matches!(refused, DeviceError::InUse { .. }), "{refused}");
    drop(claim);
    device.0.detach(LIMIT).await.unwrap();
    setup.assert_nothing_left(Some(&record));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_server_does_not_keep_the_device() {
    let mut setup = setup();
    let mut device = Device(AttachDevice::attach(&setup.request(), &no_connection).await.unwrap());
    let record = device.0.record().clone();
    setup.server.child.kill().unwrap();
    setup.server.child.wait().unwrap();
    device.0.abandon().await.unwrap();
    setup.assert_nothing_left(Some(&record));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attach_that_fails_leaves_nothing() {
    let setup = setup();
    let mut request = setup.request();
    request.uri = request.uri.replace("/disk?", "/nosuch?");
    let error = AttachDevice::attach(&request, &no_connection).await.unwrap_err().to_string();
    assert!(error.starts_with("nbdfuse nbd+unix") && error.contains("nosuch"), "{error}");
    setup.assert_nothing_left(None);

    let request = AttachRequest { size: SIZE * 2, ..setup.request() };
    let error = AttachDevice::attach(&request, &no_connection).await.unwrap_err().to_string();
    assert!(error.contains("instead of"), "{error}");
    setup.assert_nothing_left(None);

    let request = AttachRequest { device: Some("/dev/nbd0".into()), ..setup.request() };
    let error = AttachDevice::attach(&request, &no_connection).await.unwrap_err();
    assert!(matches!(error, DeviceError::BadDevice { .. }), "{error}");
    setup.assert_nothing_left(None);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attach_whose_first_read_gets_no_answer_ends_at_its_limit() {
    let setup = setup();
    let server = nix::unistd::Pid::from_raw(setup.server.child.id() as i32);
    // A server that negotiates and then falls silent: stopped as soon as nbdfuse serves the file.
    let request = AttachRequest { limit: Duration::from_secs(3), ..setup.request() };
    let ready = request.directory.join("ready");
    let stop = tokio::task::spawn_blocking(move || {
        let deadline = Instant::now() + LIMIT;
        while !ready.exists() && Instant::now() < deadline {
            std::hint::spin_loop();
        }
        nix::sys::signal::kill(server, nix::sys::signal::Signal::SIGSTOP).unwrap();
    });
    let error = AttachDevice::attach(&request, &no_connection).await.unwrap_err();
    assert!(matches!(error, DeviceError::TooSlow { .. }), "{error}");
    stop.await.unwrap();
    setup.assert_nothing_left(None);
}
