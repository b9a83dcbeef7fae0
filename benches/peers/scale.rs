//! Large disks: what is there at once, and a pause that does not know how large the disk is.

use std::path::PathBuf;
use std::time::Instant;

use nix::sys::signal::Signal;

use crate::lab::{GIB, Lab, MIB, memory_mib};
use crate::report::{Bar, Better, OURS, Report, Row};
use crate::servers::{OurNode, Server, Way};
use crate::support::{Background, Node, free_port, run, signal};

const TIB: u64 = 1 << 40;

/// A TiB with 1 GiB of data (in the quick form less) in runs of a MiB, evenly spread.
fn image_of_a_tib(lab: &Lab) -> PathBuf {
    let runs = lab.scope.pulled.min(GIB) / MIB;
    let data: Vec<_> = (0..runs).map(|run| TIB / runs * run..TIB / runs * run + MIB).collect();
    lab.sparse_image("tib", TIB, &data)
}

/// A disk of a TiB is pulled: when it can be used, how long its status takes, how much memory the node needs.
pub fn large(lab: &Lab, report: &mut Report) {
    let source = Server::nbdkit_file(lab, Way::Tcp, &image_of_a_tib(lab));
    let mut ready = Row::new("1 TiB: from the command to a client's first answer", "s", Better::Lower, Bar::Fixed(0.5));
    let mut status = Row::new("1 TiB: status, while it is pulled", "ms", Better::Lower, Bar::Fixed(50.0));
    let mut memory = Row::new("1 TiB: memory, at most", "MiB", Better::Lower, Bar::Fixed(128.0));
    let mut whole = Row::new("1 TiB with 1 GiB of data: all of it", "s", Better::Lower, Bar::None);
    for _ in 0..lab.scope.runs {
        lab.prime();
        let place = lab.in_memory();
        let store = place.path().join("store.img");
        let node = OurNode::start(place, Way::Unix, &[]);
        let store = store.to_str().expect("a path of text");
        let begun = Instant::now();
        node.node.cli(&["pull", "disk", "--from", &source.uri, "--store", store]);
        run("nbdinfo", "libnbd-bin", &["--size", &node.uri]);
        ready.add(OURS, begun.elapsed().as_secs_f64());
        for _ in 0..5 {
            let asked = Instant::now();
            node.node.status("disk");
            status.add(OURS, asked.elapsed().as_secs_f64() * 1000.0);
        }
        if !lab.scope.quick {
            node.node.cli(&["wait", "disk", "--timeout", "5m"]);
            whole.add(OURS, begun.elapsed().as_secs_f64());
        }
        memory.add(OURS, memory_mib(node.node.pid(), "VmHWM"));
    }
    report.extend([ready, status, memory]);
    if !lab.scope.quick {
        report.extend([whole]);
    }
}

/// The disk's share of the pause: the handover, of a small and of a large disk, quiet and just written.
pub fn pause(lab: &Lab, report: &mut Report) {
    let cases = [
        ("1 GiB", lab.random_image(GIB), false),
        ("1 GiB, with a writer", lab.random_image(GIB), true),
        ("1 TiB", image_of_a_tib(lab), false),
        ("1 TiB, with a writer", image_of_a_tib(lab), true),
    ];
    for (name, image, written) in cases {
        let mut row = Row::new(format!("handover, {name}"), "ms", Better::Lower, Bar::Fixed(10.0));
        for _ in 0..lab.scope.runs {
            row.add(OURS, handover(lab, &image, written));
        }
        report.extend([row]);
    }
}

/// Milliseconds of one handover. The writer is a container's: it is frozen before.
fn handover(lab: &Lab, image: &std::path::Path, written: bool) -> f64 {
    let (place, other) = (lab.on_disk(), lab.in_memory());
    let (to_a, to_b) = (format!("127.0.0.1:{}", free_port()), format!("127.0.0.1:{}", free_port()));
    let a = Node::start(place.path().join("a"), &["--peer", &to_a]);
    let b = Node::start(other.path().join("b"), &["--peer", &to_b]);
    a.cli(&["add", "disk", image.to_str().expect("a path of text")]);
    a.cli(&["prepare", "disk", "--to", &to_b]);
    let writer = written.then(|| {
        let uri = format!("--uri={}", a.uri("disk"));
        // The first part of the disk: data of the small image, nearly all of it holes of the large one, which the writer fills.
        let arguments = ["--name=w", "--ioengine=nbd", &uri, "--rw=randwrite", "--bs=4k", "--iodepth=8", "--thread"];
        let end = ["--time_based", "--runtime=60", "--size=256m", "--output=/dev/null"];
        let writer = Background::start("fio", "fio", &[&arguments[..], &end].concat());
        a.wait_status("disk", "written", |status| status["clients"].as_u64() > Some(0));
        std::thread::sleep(std::time::Duration::from_millis(500));
        signal(writer.pid(), Signal::SIGSTOP);
        writer
    });
    let begun = Instant::now();
    a.cli(&["handover", "disk"]);
    let milliseconds = begun.elapsed().as_secs_f64() * 1000.0;
    drop(writer);
    drop((a, b));
    milliseconds
}
