//! Blocks that are present: 4 KiB at random, alone and 32 at a time, and 1 MiB 16 at a time.

use crate::bare::Bare;
use crate::fio::{Job, Measured, Until};
use crate::lab::{KIB, Lab, MIB};
use crate::report::{Bar, Better, OURS, Report, Row};
use crate::servers::{OurNode, Server, Way};

/// How our node is called where it serves a disk that it has pulled, map and all.
const PULLED: &str = "lazy-migrate after a pull";

/// What a row takes from a job.
type Figure = fn(&Measured) -> f64;

fn work() -> [(&'static str, &'static str, u64, u32, Figure, f64); 6] {
    [
        ("4 KiB random read, depth 1", "randread", 4 * KIB, 1, |m| m.iops, 1.0),
        ("4 KiB random read, depth 32", "randread", 4 * KIB, 32, |m| m.iops, 1.5),
        ("4 KiB random write, depth 1", "randwrite", 4 * KIB, 1, |m| m.iops, 1.0),
        ("4 KiB random write, depth 32", "randwrite", 4 * KIB, 32, |m| m.iops, 1.2),
        ("1 MiB read, depth 16", "randread", MIB, 16, |m| m.mib_s, 1.5),
        ("1 MiB write, depth 16", "randwrite", MIB, 16, |m| m.mib_s, 1.2),
    ]
}

/// The rows for one way to come.
fn measure(lab: &Lab, report: &mut Report, way: Way, said: &str) {
    let image = lab.random_image(lab.scope.warm);
    let mut peers = vec![Server::nbdkit_file(lab, way, &image), Server::qemu_nbd(lab, way, &image)];
    if way == Way::Unix {
        peers.push(Server::nbd_server(lab, &image));
    }
    let added = OurNode::of_image(lab, way, &image);
    let source = Server::nbdkit_file(lab, Way::Tcp, &image);
    let place = lab.on_disk();
    let store = place.path().join("pulled.img");
    let pulled = OurNode::start(lab.on_disk(), way, &[]);
    pulled.node.cli(&["pull", "disk", "--from", &source.uri, "--store", store.to_str().expect("a path of text")]);
    pulled.node.cli(&["wait", "disk", "--timeout", "5m"]);
    // A pull gives the page cache back what nobody has asked for: the others' image is there, so this one has to be, too.
    lab.warm_up(&store, std::slice::from_ref(&(0..lab.scope.warm)));
    let mut contenders: Vec<(&str, &str)> = vec![(OURS, &added.uri), (PULLED, &pulled.uri)];
    contenders.extend(peers.iter().map(|peer| (peer.name, peer.uri.as_str())));
    for (name, pattern, block, depth, figure, factor) in work() {
        let unit = if block == MIB { "MiB/s" } else { "IOPS" };
        let mut row =
            Row::new(format!("present, {name}{said}"), unit, Better::Higher, Bar::Times(factor, "nbdkit file"));
        for run in 0..lab.scope.runs {
            for (contender, uri) in &contenders {
                // What others wrote is not written out while this one is measured.
                Lab::settle([image.as_path(), &store]);
                let until = Until::Seconds(lab.scope.seconds);
                let job = Job { pattern, block, depth, until, seed: run as u64 };
                row.add(contender, figure(&job.run(uri)));
            }
        }
        report.extend([row]);
    }
}

/// Without encryption, on a Unix socket.
pub fn plain(lab: &Lab, report: &mut Report) {
    measure(lab, report, Way::Unix, "");
}

/// With TLS, on TCP.
pub fn encrypted(lab: &Lab, report: &mut Report) {
    measure(lab, report, Way::Tls, ", TLS");
}

/// The same server over the same file, without a tracker, a map, a gate: what those cost a writer. In memory, in pages of
/// 4 KiB: in a file of a large disk's pages a write of 4 KiB costs the kernel 25 microseconds, which hides everything else.
pub fn tracking(lab: &Lab, report: &mut Report) {
    let place = lab.in_memory();
    let image = place.path().join("image");
    crate::support::image(&image, lab.scope.warm, 7, std::slice::from_ref(&(0..lab.scope.warm)));
    let bare = Bare::start(place, &image);
    let added = OurNode::of_image(lab, Way::Unix, &image);
    let work = [("4 KiB random write, depth 1", 4 * KIB, 1), ("4 KiB random write, depth 32", 4 * KIB, 32)];
    for (name, block, depth) in work {
        let mut row =
            Row::new(format!("write tracking, {name}"), "IOPS", Better::Higher, Bar::Times(0.97, "untracked"));
        for run in 0..2 * lab.scope.runs {
            for (contender, uri) in [(OURS, &added.uri), ("untracked", &bare.uri)] {
                let until = Until::Seconds(lab.scope.seconds);
                let job = Job { pattern: "randwrite", block, depth, until, seed: run as u64 };
                row.add(contender, job.run(uri).iops);
            }
        }
        report.extend([row]);
    }
}
