//! Blocks that are missing: what a reader waits for them, against a reader who goes to the source itself; alone, and while
//! the background pull runs.

use std::time::Instant;

use crate::fio::{Job, Measured, Until};
use crate::lab::{GIB, KIB, Lab, MIB};
use crate::pull::STREAM;
use crate::qmp::Streamer;
use crate::report::{Bar, Better, OURS, Report, Row};
use crate::servers::{OurNode, Server, Way, cow_over};

/// The source itself.
pub const DIRECT: &str = "direct";
/// What is kept of what was read, by nbdkit.
pub const COW: &str = "nbdkit cow 4k";
/// What is kept of what was read, by QEMU.
pub const COPY_ON_READ: &str = "qemu copy-on-read";
/// It keeps exactly what was read.
pub const SMALL: &str = "cow-block-size=4096";
const IDLE: &str = "lazy-migrate idle";

/// A node that fetches only what it is asked for.
pub fn lazy(lab: &Lab, from: &str) -> OurNode {
    let place = lab.in_memory();
    let store = place.path().join("store.img");
    let node = OurNode::start(place, Way::Unix, &[]);
    let store = store.to_str().expect("a path of text");
    node.node.cli(&["pull", "disk", "--from", from, "--no-background", "--store", store]);
    node
}

/// One job on blocks that nobody has read before.
fn sample(lab: &Lab, contender: &str, source: &Server, job: Job) -> Measured {
    lab.prime();
    match contender {
        DIRECT => job.run(&source.uri),
        COW => job.run(&cow_over(lab, COW, &source.uri, &[], &[SMALL]).uri),
        COPY_ON_READ => job.run(&Streamer::start(lab.in_memory(), source.port, lab.scope.warm, true).uri),
        _ => job.run(&lazy(lab, &source.uri).uri),
    }
}

/// The rows without a pull.
pub fn plain(lab: &Lab, report: &mut Report) {
    let size = lab.scope.warm;
    let image = lab.random_image(size);
    let source = Server::nbdkit_file(lab, Way::Tcp, &image);
    let lower = |name: &str| Row::new(name, "us", Better::Lower, Bar::Times(1.3, DIRECT));
    let (mut p50, mut p99) = (lower("missing, 4 KiB read, depth 1, p50"), lower("missing, 4 KiB read, depth 1, p99"));
    let higher = |name: &str, unit| Row::new(name, unit, Better::Higher, Bar::Times(0.8, DIRECT));
    let mut small = higher("missing, 4 KiB reads, depth 32", "IOPS");
    let mut large = higher("missing, 64 KiB reads, depth 32", "MiB/s");
    for run in 0..lab.scope.runs {
        for contender in [DIRECT, OURS, COW, COPY_ON_READ] {
            let job = |block, depth, bytes| {
                let job = Job { pattern: "randread", block, depth, until: Until::Bytes(bytes), seed: run as u64 };
                sample(lab, contender, &source, job)
            };
            let alone = job(4 * KIB, 1, 32 * MIB);
            p50.add(contender, alone.p50_us);
            p99.add(contender, alone.p99_us);
            small.add(contender, job(4 * KIB, 32, size / 4).iops);
            large.add(contender, job(64 * KIB, 32, size).mib_s);
        }
    }
    report.extend([p50, p99, small, large]);
}

/// What readers wait while the pull runs, and how much of its speed the pull keeps.
pub fn while_pulling(lab: &Lab, report: &mut Report) {
    let size = lab.scope.pulled.max(GIB);
    let image = lab.random_image(size);
    let source = Server::nbdkit_file(lab, Way::Tcp, &image);
    let mut wait =
        Row::new("missing, 4 KiB read, depth 1, p99 while pulling", "us", Better::Lower, Bar::Times(2.0, IDLE));
    let mut rate = Row::new("pull while somebody reads", "MiB/s", Better::Higher, Bar::Times(0.7, IDLE));
    for run in 0..lab.scope.runs {
        let job = |bytes| Job { pattern: "randread", block: 4 * KIB, depth: 1, until: bytes, seed: run as u64 };
        // As long as the pull may take: in the end there is nothing left to wait for, and in the idle disk there always is.
        let (some, second) = (job(Until::Bytes(32 * MIB)), job(Until::Seconds(1)));
        lab.prime();
        wait.add(IDLE, some.run(&lazy(lab, &source.uri).uri).p99_us);
        for read in [false, true] {
            lab.prime();
            let place = lab.in_memory();
            let store = place.path().join("store.img");
            let node = OurNode::start(place, Way::Unix, &[]);
            let store = store.to_str().expect("a path of text");
            let begun = Instant::now();
            node.node.cli(&["pull", "disk", "--from", &source.uri, "--store", store]);
            let seconds = std::thread::scope(|scope| {
                let pull = scope.spawn(|| {
                    node.node.cli(&["wait", "disk", "--timeout", "5m"]);
                    begun.elapsed().as_secs_f64()
                });
                if read {
                    wait.add(OURS, second.run(&node.uri).p99_us);
                }
                pull.join().expect("the pull ends")
            });
            rate.add(if read { OURS } else { IDLE }, (size / MIB) as f64 / seconds);
        }
        lab.prime();
        let mut streamer = Streamer::start(lab.in_memory(), source.port, size, false);
        let begun = Instant::now();
        streamer.stream();
        wait.add(STREAM, second.run(&streamer.uri).p99_us);
        streamer.wait();
        rate.add(STREAM, (size / MIB) as f64 / begun.elapsed().as_secs_f64());
    }
    report.extend([wait, rate]);
}
