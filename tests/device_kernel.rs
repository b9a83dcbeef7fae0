//! Attaching through the kernel's NBD device. Registered with `test = false`: it is run inside the test guest, as root,
//! one test at a time (they share the guest's devices).
//!
//! Needs a kernel with nbd, and the Debian packages kmod, mount, util-linux and e2fsprogs.

use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use lazy_migrate::device::link::Ends;
use lazy_migrate::device::{AttachDevice, AttachRequest, DeviceError, Link, Via, flush_buffers, mount, mounts_of};
use nbd::kernel::{self, KernelError, LinkDeadWatcher};
use nbd::memory::{MemoryDisk, SingleExport};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

const LIMIT: Duration = Duration::from_secs(60);
const SIZE: usize = 32 << 20;

/// One test at a time.
static TURN: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    assert!(nix::unistd::geteuid().is_root(), "this test attaches devices: run it as root, in the guest");
    TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// A disk in memory and what its server does.
struct Disk {
    bytes: Mutex<Vec<u8>>,
    /// Requests are read and left without an answer.
    silent: AtomicBool,
    requests: AtomicUsize,
    arrived: Notify,
    /// Ends the server of the moment.
    stop: Mutex<CancellationToken>,
}

impl Disk {
    fn new() -> Arc<Self> {
        Arc::new(Disk {
            bytes: Mutex::new(vec![0; SIZE]),
            silent: AtomicBool::new(false),
            requests: AtomicUsize::new(0),
            arrived: Notify::new(),
            stop: Mutex::new(CancellationToken::new()),
        })
    }

    /// A connector as the node makes it; there is nothing to negotiate with this server.
    fn connector(self: &Arc<Self>) -> impl Fn() -> BoxFuture<'static, io::Result<Link>> + Send + Sync + use<> {
        let disk = self.clone();
        move || {
            let disk = disk.clone();
            Box::pin(async move {
                let Ends { server, hang_up, client, witness } = Ends::new()?;
                let server = UnixStream::from_std(server)?;
                let stop = CancellationToken::new();
                *disk.stop.lock().unwrap() = stop.clone();
                tokio::spawn(async move {
                    let _hang_up = hang_up;
                    stop.run_until_cancelled(disk.serve(server)).await
                });
                Link::new(client, witness)
            })
        }
    }

    /// As if the server's process died.
    fn kill_server(&self) {
        self.stop.lock().unwrap().cancel();
    }

    async fn serve(self: Arc<Self>, mut socket: UnixStream) -> io::Result<()> {
        let mut header = [0; 28];
        loop {
            socket.read_exact(&mut header).await?;
            self.requests.fetch_add(1, Ordering::SeqCst);
            self.arrived.notify_waiters();
            let number = |range: std::ops::Range<usize>| header[range].iter().fold(0, |n, &b| n << 8 | usize::from(b));
            let (command, offset, length) = (number(6..8), number(16..24), number(24..28));
            let mut reply = [&0x6744_6698u32.to_be_bytes()[..], &[0; 4], &header[8..16]].concat();
            match command {
                0 => reply.extend_from_slice(&self.bytes.lock().unwrap()[offset..offset + length]),
                1 => {
                    let mut payload = vec![0; length];
                    socket.read_exact(&mut payload).await?;
                    self.bytes.lock().unwrap()[offset..offset + length].copy_from_slice(&payload);
                }
                2 => return Ok(()),
                _ => {}
            }
            if !self.silent.load(Ordering::SeqCst) {
                socket.write_all(&reply).await?;
            }
        }
    }

    /// Waits until more requests have come than there were.
    async fn wait_for_request(&self, before: usize) {
        let arrived = async {
            loop {
                let notified = self.arrived.notified();
                if self.requests.load(Ordering::SeqCst) > before {
                    return;
                }
                notified.await;
            }
        };
        tokio::time::timeout(LIMIT, arrived).await.expect("no request came");
    }
}

fn request() -> AttachRequest {
    AttachRequest {
        name: "web".to_owned(),
        size: SIZE as u64,
        read_only: false,
        via: Via::Auto,
        device: None,
        backend_id: "lazy-migrate-test web".to_owned(),
        uri: String::new(),
        directory: PathBuf::from("/nonexistent"),
        limit: LIMIT,
    }
}

fn run(program: &str, package: &str, arguments: &[&str]) {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}; install the Debian package {package}"));
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Waits until no device is connected: the undo of a failed attach runs in the background.
fn assert_no_device() {
    let deadline = Instant::now() + LIMIT;
    while !kernel::devices().unwrap().is_empty() {
        assert!(Instant::now() < deadline, "still connected: {:?}", kernel::devices().unwrap());
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Takes every device of these tests away when one failed, so that the next begins anew.
struct CleanUp(PathBuf);

impl Drop for CleanUp {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for (index, _) in kernel::devices().unwrap_or_default() {
                let _ = kernel::disconnect(index);
            }
            let _ = Command::new("umount").arg("--lazy").arg(&self.0).stderr(Stdio::null()).status();
        }
    }
}

async fn off_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
#[allow(clippy::await_holding_lock, reason = "the lock keeps whole tests apart")]
async fn attach_mount_write_refuse_unmount_detach() {
    let _turn = turn();
    let directory = tempfile::tempdir().unwrap();
    let _clean_up = CleanUp(directory.path().to_owned());
    let disk = Disk::new();
    let mut device = AttachDevice::attach(&request(), &disk.connector()).await.unwrap();
    let path = device.device().to_owned();
    assert!(path.starts_with("/dev") && path.to_str().unwrap().starts_with("/dev/nbd"), "{}", path.display());
    let sysfs = Path::new("/sys/block").join(path.file_name().unwrap());
    assert_eq!(fs::read_to_string(sysfs.join("queue/io_timeout")).unwrap().trim(), "3000");
    assert_eq!(kernel::devices().unwrap(), vec![(0, request().backend_id)]);
    assert!(kernel::status(0).unwrap());

    let (node, text) = (path.clone(), path.to_str().unwrap().to_owned());
    off_thread(move || run("mkfs.ext4", "e2fsprogs", &["-q", &text])).await;
    mount::mount(&path, directory.path(), None, &[], LIMIT).await.unwrap();
    assert_eq!(off_thread(move || mounts_of(&node)).await.unwrap(), vec![directory.path().to_owned()]);
    let refused = device.detach(LIMIT).await.unwrap_err();
    assert!(matches!(refused, DeviceError::Mounted { .. }), "{refused}");
    let file = directory.path().join("file");
    off_thread(move || {
        let file = fs::File::create(file).unwrap();
        file.write_all_at(b"through the kernel", 0).unwrap();
        file.sync_all().unwrap();
    })
    .await;
    assert!(disk.bytes.lock().unwrap().windows(18).any(|window| window == b"through the kernel"));

    // Mounted only where this process does not see it.
    let (from, to) = (path.to_str().unwrap().to_owned(), directory.path().to_owned());
    mount::umount(&to, LIMIT).await.unwrap();
    let mut other = Command::new("unshare")
        .args(["--mount", "sh", "-c", "mount \"$0\" \"$1\" && echo mounted && read line; umount \"$1\"", &from])
        .arg(&to)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("install the Debian package util-linux");
    let mut output = other.stdout.take().unwrap();
    off_thread(move || io::Read::read_exact(&mut output, &mut [0; 8]).unwrap()).await;
    let refused = device.detach(LIMIT).await.unwrap_err();
    assert!(matches!(refused, DeviceError::InUse { .. }), "{refused}");
    drop(other.stdin.take());
    assert!(off_thread(move || other.wait()).await.unwrap().success());

    // What is only in the device's cache is written by the detach.
    let node = path.clone();
    off_thread(move || fs::OpenOptions::new().write(true).open(node).unwrap().write_all_at(&[7; 4096], 0).unwrap())
        .await;
    device.detach(LIMIT).await.unwrap();
    assert_eq!(disk.bytes.lock().unwrap()[..4096], [7; 4096]);
    assert_eq!(kernel::device_size(0).unwrap(), 0);
    device.detach(LIMIT).await.expect("a second detach has nothing to do");
    assert_no_device();
}

#[tokio::test(flavor = "multi_thread")]
#[allow(clippy::await_holding_lock, reason = "the lock keeps whole tests apart")]
async fn a_restarted_node_takes_the_device_over_and_io_goes_on() {
    let _turn = turn();
    let directory = tempfile::tempdir().unwrap();
    let _clean_up = CleanUp(directory.path().to_owned());
    let disk = Disk::new();
    let device = AttachDevice::attach(&request(), &disk.connector()).await.unwrap();
    let record = device.record().clone();
    let path = record.device.clone();
    drop(device);
    let watcher = LinkDeadWatcher::open().unwrap();

    // The old server lives: the new connection is not taken, and the old one goes on.
    let error = AttachDevice::readopt(&record, &disk.connector()).await.unwrap_err();
    assert!(matches!(error, DeviceError::Kernel(KernelError::NotTaken { index: 0 })), "{error}");

    // A write that the server has read and not answered when it dies.
    let disk = Disk::new();
    {
        let mut old = AttachDevice::from_record(record.clone());
        old.detach(LIMIT).await.unwrap();
    }
    let device = AttachDevice::attach(&request(), &disk.connector()).await.unwrap();
    let record = device.record().clone();
    drop(device);
    disk.silent.store(true, Ordering::SeqCst);
    let before = disk.requests.load(Ordering::SeqCst);
    let node = path.clone();
    let write = tokio::task::spawn_blocking(move || {
        let file = fs::OpenOptions::new().write(true).open(node)?;
        file.write_all_at(&[9; 1 << 20], 0)?;
        file.sync_all()
    });
    disk.wait_for_request(before).await;
    disk.kill_server();
    let mut dead = None;
    while dead != Some(0) {
        dead = tokio::time::timeout(LIMIT, watcher.next()).await.expect("no word of the dead connection").unwrap();
    }
    disk.silent.store(false, Ordering::SeqCst);
    let start = Instant::now();
    let mut device = AttachDevice::readopt(&record, &disk.connector()).await.unwrap();
    tokio::time::timeout(LIMIT, write).await.expect("the write is stuck").unwrap().unwrap();
    assert!(start.elapsed() < Duration::from_secs(20), "the parked write took {:?}", start.elapsed());
    assert_eq!(disk.bytes.lock().unwrap()[..1 << 20], [9; 1 << 20]);

    // Somebody else's record does not take it.
    let mut other = record.clone();
    other.how = lazy_migrate::device::How::Kernel { index: 0, backend_id: "another".to_owned() };
    disk.kill_server();
    let error = AttachDevice::readopt(&other, &disk.connector()).await.unwrap_err();
    assert!(matches!(error, DeviceError::Kernel(KernelError::WrongBackend { .. })), "{error}");
    AttachDevice::from_record(other).detach(LIMIT).await.expect("not ours: nothing to do");
    assert_eq!(kernel::devices().unwrap().len(), 1, "the other's detach must not touch it");
    let mut again = AttachDevice::readopt(&record, &disk.connector()).await.unwrap();
    again.detach(LIMIT).await.unwrap();
    device.detach(LIMIT).await.unwrap();
    assert_no_device();
    let error = AttachDevice::readopt(&record, &disk.connector()).await.unwrap_err();
    assert!(matches!(error, DeviceError::Kernel(KernelError::NotConnected { .. })), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
#[allow(clippy::await_holding_lock, reason = "the lock keeps whole tests apart")]
async fn an_attach_that_fails_or_is_dropped_leaves_nothing() {
    let _turn = turn();
    let _clean_up = CleanUp(PathBuf::from("/nonexistent"));
    let disk = Disk::new();
    disk.silent.store(true, Ordering::SeqCst);
    let slow = AttachRequest { limit: Duration::from_secs(2), ..request() };
    let error = AttachDevice::attach(&slow, &disk.connector()).await.unwrap_err();
    assert!(matches!(error, DeviceError::TooSlow { .. }), "{error}");
    assert_no_device();

    let (before, connector) = (disk.requests.load(Ordering::SeqCst), disk.connector());
    let request = request();
    tokio::select! {
        _ = AttachDevice::attach(&request, &connector) => panic!("nothing answers"),
        () = disk.wait_for_request(before) => {}
    }
    assert_no_device();

    let taken = Disk::new();
    let on_three = AttachRequest { device: Some("/dev/nbd3".into()), ..request.clone() };
    let mut device = AttachDevice::attach(&on_three, &taken.connector()).await.unwrap();
    assert_eq!(device.device(), Path::new("/dev/nbd3"));
    let error = AttachDevice::attach(&on_three, &Disk::new().connector()).await.unwrap_err();
    assert!(matches!(error, DeviceError::Kernel(KernelError::Busy { index: 3 })), "{error}");
    device.detach(LIMIT).await.unwrap();
    assert_no_device();
}

#[tokio::test(flavor = "multi_thread")]
#[allow(clippy::await_holding_lock, reason = "the lock keeps whole tests apart")]
async fn abandoning_frees_a_task_that_is_stuck_in_io() {
    let _turn = turn();
    let _clean_up = CleanUp(PathBuf::from("/nonexistent"));
    let disk = Disk::new();
    let mut device = AttachDevice::attach(&request(), &disk.connector()).await.unwrap();
    disk.silent.store(true, Ordering::SeqCst);
    let before = disk.requests.load(Ordering::SeqCst);
    let node = device.device().to_owned();
    let read =
        tokio::task::spawn_blocking(move || fs::File::open(node)?.read_exact_at(&mut vec![0; 4096], (SIZE / 2) as u64));
    disk.wait_for_request(before).await;
    device.abandon().await.unwrap();
    let result = tokio::time::timeout(LIMIT, read).await.expect("the read is stuck").unwrap();
    assert!(result.is_err(), "a read of an abandoned device fails");
    assert_no_device();
}

#[tokio::test(flavor = "multi_thread")]
#[allow(clippy::await_holding_lock, reason = "the lock keeps whole tests apart")]
async fn dropping_the_cache_shows_what_is_behind_the_device_now() {
    let _turn = turn();
    let _clean_up = CleanUp(PathBuf::from("/nonexistent"));
    let disk = Disk::new();
    let mut device = AttachDevice::attach(&request(), &disk.connector()).await.unwrap();
    let node = device.device().to_owned();
    let offset = (SIZE / 2) as u64;
    let changed = disk.clone();
    let (before, stale, after) = off_thread(move || {
        // Held open, or the last close would drop the cache.
        let holder = fs::File::open(&node).unwrap();
        let read = || {
            let mut byte = [0];
            holder.read_exact_at(&mut byte, offset).unwrap();
            byte[0]
        };
        let before = read();
        changed.bytes.lock().unwrap()[SIZE / 2] = 5;
        let stale = read();
        flush_buffers(&node).unwrap();
        (before, stale, read())
    })
    .await;
    assert_eq!((before, stale, after), (0, 0, 5));
    device.detach(LIMIT).await.unwrap();
    assert_no_device();
}

#[tokio::test(flavor = "multi_thread")]
#[allow(clippy::await_holding_lock, reason = "the lock keeps whole tests apart")]
async fn the_nodes_own_server_is_behind_the_device() {
    let _turn = turn();
    let directory = tempfile::tempdir().unwrap();
    let _clean_up = CleanUp(directory.path().to_owned());
    let exports = Arc::new(SingleExport::new("web", Arc::new(MemoryDisk::zeroed(SIZE))));
    let (tasks, shutdown) = (TaskTracker::new(), Mutex::new(CancellationToken::new()));
    let connector = || -> BoxFuture<'_, io::Result<Link>> {
        let token = CancellationToken::new();
        *shutdown.lock().unwrap() = token.clone();
        Box::pin(Link::to_export(exports.clone(), "web", &tasks, token))
    };
    let device = AttachDevice::attach(&request(), &connector).await.unwrap();
    let text = device.device().to_str().unwrap().to_owned();
    off_thread(move || run("mkfs.ext4", "e2fsprogs", &["-q", &text])).await;
    mount::mount(device.device(), directory.path(), None, &[], LIMIT).await.unwrap();
    let path = directory.path().to_owned();
    let write = move |name: &str| {
        let file = fs::File::create(path.join(name)).unwrap();
        file.write_all_at(&[3; 1 << 20], 0).unwrap();
        file.sync_all().unwrap();
    };
    let first = write.clone();
    off_thread(move || first("before")).await;

    // The server shuts down in good order while somebody writes; a new one goes on, and the filesystem notices nothing.
    shutdown.lock().unwrap().cancel();
    let writing = tokio::task::spawn_blocking(move || write("during"));
    let deadline = Instant::now() + LIMIT;
    let mut device = loop {
        match AttachDevice::readopt(device.record(), &connector).await {
            Ok(adopted) => break adopted,
            // Until the old server has ended.
            Err(DeviceError::Kernel(KernelError::NotTaken { .. })) if Instant::now() < deadline => {}
            Err(error) => panic!("{error}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    tokio::time::timeout(LIMIT, writing).await.expect("the write is stuck").unwrap();
    mount::umount(directory.path(), LIMIT).await.unwrap();
    mount::mount(device.device(), directory.path(), None, &["ro"], LIMIT).await.unwrap();
    for name in ["before", "during"] {
        assert!(fs::read(directory.path().join(name)).unwrap() == vec![3; 1 << 20], "{name}");
    }
    mount::umount(directory.path(), LIMIT).await.unwrap();
    device.detach(LIMIT).await.unwrap();
    tasks.close();
    tokio::time::timeout(LIMIT, tasks.wait()).await.expect("a server's task goes on after the detach");
    assert_no_device();
}
