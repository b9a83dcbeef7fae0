//! Where it is measured: directories on disk and in memory, images, primed memory; and nothing is left afterwards, also
//! when it is interrupted.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use tempfile::TempDir;

use crate::support::image;

pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;

/// So long after memory became free, a virtual machine has told its host of it and lost it (Linux: 2 s).
const FREE_MEMORY_GOES: Duration = Duration::from_millis(2500);

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Scope {
    /// Samples of each contender.
    pub runs: usize,
    /// Seconds of one fio run.
    pub seconds: u32,
    /// Bytes of a pulled disk.
    pub pulled: u64,
    /// Bytes of a disk that is read and written.
    pub warm: u64,
    /// Bytes of a disk that is pulled from afar.
    pub distant: u64,
    /// Whether this is the quick form.
    pub quick: bool,
}

impl Scope {
    /// What the table in the documentation is made with.
    pub const FULL: Scope =
        Scope { runs: 5, seconds: 2, pulled: 2 * GIB, warm: 512 * MIB, distant: 256 * MIB, quick: false };
    /// For continuous integration.
    pub const QUICK: Scope =
        Scope { runs: 1, seconds: 1, pulled: 256 * MIB, warm: 256 * MIB, distant: 64 * MIB, quick: true };
}

/// What is removed when the process is interrupted.
static LEFTOVERS: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// A directory that is there until the process ends.
pub fn keep_until_the_end() -> PathBuf {
    LEFTOVERS.lock().unwrap()[0].clone()
}

/// The same in memory.
pub fn keep_in_memory() -> PathBuf {
    LEFTOVERS.lock().unwrap()[1].clone()
}

/// A directory on disk and one in memory.
pub struct Lab {
    /// How much is measured.
    pub scope: Scope,
    disk: TempDir,
    memory: TempDir,
}

impl Lab {
    /// Installs what is missing, and makes the directories.
    pub fn new(scope: Scope) -> Lab {
        let install = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/lab/install.sh");
        let status = Command::new(&install).arg("--no-guest").status();
        assert!(status.is_ok_and(|status| status.success()), "{} failed", install.display());
        // On disk beside the build, because /tmp may be memory.
        let disk = tempfile::tempdir_in(crate::report::target_directory()).expect("a directory for images");
        let memory = tempfile::tempdir_in("/dev/shm").expect("a directory in memory");
        LEFTOVERS.lock().unwrap().extend([disk.path().to_owned(), memory.path().to_owned()]);
        // Daemons that were started here are children again, and found when something goes wrong.
        nix::sys::prctl::set_child_subreaper(true).expect("a process may take in its orphans");
        end_in_order();
        Lab { scope, disk, memory }
    }

    /// A fresh directory on disk, below the lab's.
    pub fn on_disk(&self) -> TempDir {
        tempfile::tempdir_in(self.disk.path()).expect("a directory on disk")
    }

    /// A fresh directory in memory.
    pub fn in_memory(&self) -> TempDir {
        tempfile::tempdir_in(self.memory.path()).expect("a directory in memory")
    }

    /// A file of random bytes on disk, in the page cache and not waiting to be written out. Made once for each size.
    pub fn random_image(&self, size: u64) -> PathBuf {
        self.sparse_image(&format!("random-{size}"), size, std::slice::from_ref(&(0..size)))
    }

    /// The same with holes between the given ranges.
    pub fn sparse_image(&self, name: &str, size: u64, data: &[std::ops::Range<u64>]) -> PathBuf {
        let path = self.disk.path().join(name);
        if !path.exists() {
            image(&path, size, size ^ 0x9e37, data);
            Lab::settle([path.as_path()]);
        }
        self.warm_up(&path, data);
        path
    }

    /// Has the page cache hold these ranges of a file.
    pub fn warm_up(&self, path: &Path, data: &[std::ops::Range<u64>]) {
        let mut file = File::open(path).expect("the image");
        let mut buffer = vec![0; MIB as usize];
        for range in data {
            std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(range.start)).expect("the image");
            let mut left = range.end - range.start;
            while left > 0 {
                let length = file.read(&mut buffer[..left.min(MIB) as usize]).expect("the image");
                assert!(length > 0, "the image is shorter than it was made");
                left -= length as u64;
            }
        }
    }

    /// Waits until what was written to these files has reached the disk.
    pub fn settle<const N: usize>(files: [&Path; N]) {
        for path in files {
            File::open(path).and_then(|file| file.sync_all()).expect("an image reaches the disk");
        }
    }

    /// The first touch of a page of the machine's memory can cost five times as much as the next: all that a sample may
    /// need is touched before it. A virtual machine that tells its host of free memory loses it again, some two seconds
    /// after it became free; so that of the sample before goes first, and the sample is over before this goes.
    pub fn prime(&self) {
        let bytes = if self.scope.quick { self.scope.pulled * 5 / 4 } else { 2600 * MIB };
        if !self.scope.quick && Path::new("/sys/module/page_reporting").exists() {
            std::thread::sleep(FREE_MEMORY_GOES);
        }
        let path = self.memory.path().join("prime");
        let mut file = File::create(&path).expect("memory to prime");
        let buffer = vec![0x5a; MIB as usize];
        for _ in 0..bytes / MIB {
            file.write_all(&buffer).expect("memory to prime");
        }
        drop(file);
        std::fs::remove_file(path).expect("what was written a moment ago");
    }
}

/// On SIGINT, SIGTERM and SIGHUP: ends the processes that this one has started, and removes its directories.
fn end_in_order() {
    use tokio::signal::unix::{SignalKind, signal};
    std::thread::spawn(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let mut signals = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()]
                .map(|kind| signal(kind).expect("a signal handler"));
            let [interrupt, terminate, hangup] = &mut signals;
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hangup.recv() => {}
            }
        });
        children().into_iter().for_each(end);
        for path in LEFTOVERS.lock().unwrap().iter() {
            let _ = std::fs::remove_dir_all(path);
        }
        eprintln!("stopped");
        std::process::exit(130);
    });
}

/// Ends a process that was started here, at once.
pub fn end(pid: u32) {
    let pid = nix::unistd::Pid::from_raw(pid as i32);
    // It may have ended by itself.
    let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
    let _ = nix::sys::wait::waitpid(pid, None);
}

/// The processes that this one has started and that are still there.
fn children() -> Vec<u32> {
    let own = std::process::id();
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbers = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    numbers.filter(|pid| stat(*pid).is_some_and(|fields| fields[1].parse() == Ok(own))).collect()
}

/// The fields of `/proc/PID/stat` from the third (the state) on.
fn stat(pid: u32) -> Option<Vec<String>> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let rest = &text[text.rfind(')')? + 1..];
    Some(rest.split_whitespace().map(str::to_owned).collect())
}

/// Seconds of CPU that a process has used, in user and in kernel mode.
pub fn cpu_seconds(pid: u32) -> f64 {
    ticks(&stat(pid).expect("the process runs"), 11)
}

/// The same for all processes that this one has started and that have ended.
pub fn cpu_seconds_of_ended() -> f64 {
    ticks(&stat(std::process::id()).expect("this process runs"), 13)
}

/// A field of clock ticks and its neighbour, together. Linux tells them in hundredths of a second.
fn ticks(fields: &[String], at: usize) -> f64 {
    fields[at..at + 2].iter().map(|text| text.parse::<f64>().unwrap_or(0.0)).sum::<f64>() / 100.0
}

/// A figure of `/proc/PID/status` in MiB: `VmHWM` is the most memory that it ever had resident, `VmRSS` what it has now.
pub fn memory_mib(pid: u32, field: &str) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the process runs");
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).expect("the field is there");
    line.split_whitespace().next().and_then(|kib| kib.parse::<f64>().ok()).expect("a number of KiB") / 1024.0
}
