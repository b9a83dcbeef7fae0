//! Two nodes on two hosts of their own, and cases that run beside each other because they mostly wait.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::model::{BLOCK, Least, Model};
use crate::service::{DISK, assert_content};
use crate::support::network::{A_ADDRESS, B_ADDRESS, Network};
use crate::support::{Node, program, random_image};

pub const MIB: u64 = 1 << 20;
/// Where the second host's node answers the first.
pub const B_PEER: &str = "10.99.0.2:10810";

/// Two nodes; A has a disk `web`.
pub struct Hosts {
    pub a: Node,
    pub b: Node,
    pub network: Network,
    pub model: Arc<Model>,
    pub image: PathBuf,
    pub original: Arc<Vec<u8>>,
    _dir: tempfile::TempDir,
}

impl Hosts {
    /// A disk of `mib`, which takes some fifteen seconds to fill from A: until [`Network::full_speed`], the link is that
    /// slow. `name` is short, and unique within this test crate.
    pub fn new(name: &str, mib: u64, lease: Duration) -> Hosts {
        let dir = tempfile::tempdir().unwrap();
        Hosts::in_directory(dir, name, mib, lease)
    }

    /// The same in a directory in which something is mounted at `b`, say.
    pub fn in_directory(dir: tempfile::TempDir, name: &str, mib: u64, lease: Duration) -> Hosts {
        let network = Network::new(name, &format!("{}kbit", mib * 500));
        let image = dir.path().join("web.img");
        random_image(&image, mib * MIB, name.bytes().fold(1, |seed, byte| seed * 31 + u64::from(byte)));
        let original = Arc::new(std::fs::read(&image).unwrap());
        let disk = format!("{DISK}={}", image.display());
        let lease = format!("{}ms", lease.as_millis());
        let a_peer = format!("{A_ADDRESS}:10810");
        let a = ["--insecure", "--lease", &lease, "--peer", &a_peer, "--disk", &disk];
        let b = ["--insecure", "--lease", &lease, "--peer", B_PEER];
        assert!(B_PEER.starts_with(B_ADDRESS));
        Hosts {
            a: Node::start_in(Some(&network.a), dir.path().join("a"), &a),
            b: Node::start_in(Some(&network.b), dir.path().join("b"), &b),
            model: Model::new(original.clone()),
            network,
            image,
            original,
            _dir: dir,
        }
    }

    /// Prepares, and hands over.
    #[track_caller]
    pub fn hand_over(&self) {
        self.a.cli(&["prepare", DISK, "--to", B_PEER]);
        self.a.cli(&["handover", DISK]);
    }

    #[track_caller]
    pub fn wait_b(&self, phase: &str) {
        self.b.wait_status(DISK, phase, |status| status["phase"] == phase);
    }

    /// The block that probers write.
    pub fn probed(&self) -> u64 {
        self.model.probed()
    }

    /// Waits until both sides say complete; then B's disk is what the model says, also by its own word. Nobody writes.
    #[track_caller]
    pub fn assert_complete(&self) {
        self.assert_complete_as(&self.model);
    }

    /// The same by another model.
    #[track_caller]
    pub fn assert_complete_as(&self, model: &Model) {
        self.b.cli(&["wait", DISK, "--timeout", "60s"]);
        self.a.cli(&["wait", DISK, "--timeout", "30s"]);
        let phases = (self.a.status(DISK)["phase"].clone(), self.b.status(DISK)["phase"].clone());
        assert_eq!(phases, ("released".into(), "complete".into()));
        assert!(self.b.cli(&["verify", DISK]).ends_with("identical"));
        assert_content(&self.b.nbd_socket(), model, Least::Acknowledged);
    }

    /// A's image is what it was; the block that probers write only if they were never accepted there.
    #[track_caller]
    pub fn assert_freeze_point(&self, probed: bool) {
        let now = std::fs::read(&self.image).unwrap();
        let compared = now.len() - if probed { BLOCK as usize } else { 0 };
        let different = now[..compared].iter().zip(&self.original[..compared]).position(|(a, b)| a != b);
        assert_eq!((different, now.len()), (None, self.original.len()), "the first byte of A's image that differs");
    }
}

/// A command in the background, while its node is being ended, say.
pub fn in_background(control: PathBuf, arguments: &[&str]) -> std::thread::JoinHandle<i32> {
    let arguments: Vec<String> = arguments.iter().map(|&argument| argument.to_owned()).collect();
    std::thread::spawn(move || {
        let mut command = std::process::Command::new(program());
        let output = command.arg("--control").arg(control).args(arguments).output().unwrap();
        output.status.code().unwrap_or(-1)
    })
}

/// One case: its name, and what it does.
pub struct Case<'a, R> {
    pub name: String,
    pub run: Box<dyn FnOnce() -> R + Send + 'a>,
}

impl<'a, R> Case<'a, R> {
    pub fn new(name: impl Into<String>, run: impl FnOnce() -> R + Send + 'a) -> Case<'a, R> {
        Case { name: name.into(), run: Box::new(run) }
    }
}

/// Runs cases, `beside` each other; those that fail are all named at the end. Returns what the others came to, in order.
#[track_caller]
pub fn run_all<R: Send>(beside: usize, cases: Vec<Case<'_, R>>) -> Vec<R> {
    let results: Vec<Mutex<Option<Result<R, String>>>> = cases.iter().map(|_| Mutex::new(None)).collect();
    let names: Vec<String> = cases.iter().map(|case| case.name.clone()).collect();
    let cases: Vec<_> = cases.into_iter().map(|case| Mutex::new(Some(case))).collect();
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..beside {
            scope.spawn(|| {
                while let Some(slot) = cases.get(next.fetch_add(1, Ordering::SeqCst)) {
                    let case = slot.lock().unwrap().take().unwrap();
                    let at = names.iter().position(|name| *name == case.name).unwrap();
                    let result = catch_unwind(AssertUnwindSafe(case.run)).map_err(|panic| {
                        let text = panic.downcast_ref::<String>().cloned();
                        text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
                    });
                    *results[at].lock().unwrap() = Some(result);
                }
            });
        }
    });
    let (mut good, mut failed) = (Vec::new(), Vec::new());
    for (name, result) in names.iter().zip(results) {
        match result.into_inner().unwrap().unwrap() {
            Ok(result) => good.push(result),
            Err(text) => failed.push(format!("--- {name}: {text}")),
        }
    }
    assert!(failed.is_empty(), "{} of {} cases failed\n{}", failed.len(), names.len(), failed.join("\n"));
    good
}

/// Prints a table, and writes it as CSV into cargo's directory for what tests make.
pub fn publish(file: &str, header: &[&str], rows: &[Vec<String>]) {
    let width = |column: usize| rows.iter().map(|row| row[column].len()).chain([header[column].len()]).max().unwrap();
    let line = |cells: Vec<&str>| {
        let cells = cells.iter().enumerate().map(|(column, cell)| format!("{cell:<width$}", width = width(column)));
        cells.collect::<Vec<_>>().join("  ")
    };
    println!("{}", line(header.to_vec()));
    rows.iter().for_each(|row| println!("{}", line(row.iter().map(String::as_str).collect())));
    let csv = rows.iter().map(|row| row.join(",")).collect::<Vec<_>>().join("\n");
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(file);
    std::fs::write(path, format!("{}\n{csv}\n", header.join(","))).unwrap();
}
