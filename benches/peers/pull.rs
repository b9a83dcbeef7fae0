//! All of a disk: how fast it comes, into memory, onto a disk, with holes, encrypted; and what that costs.

use std::path::Path;
use std::time::Instant;

use tempfile::TempDir;

use crate::lab::{GIB, Lab, MIB, cpu_seconds, cpu_seconds_of_ended, memory_mib};
use crate::qmp::Streamer;
use crate::report::{Bar, Better, OURS, Report, Row};
use crate::servers::{OurNode, Server, Way, cow_over};
use crate::support::{allocated, run, wait_for};

pub const CONVERT: &str = "qemu-img convert";
pub const COPY: &str = "nbdcopy";
pub const STREAM: &str = "qemu block-stream";
pub const SCAN: &str = "nbdkit cow+scan";

/// What a pull took.
pub struct Pulled {
    /// Until all is there, and durable where that was asked.
    pub seconds: f64,
    /// Of CPU, in all processes but the source's.
    pub cpu: f64,
    /// The most memory that was resident, in MiB, where it can be told.
    pub memory: Option<f64>,
    /// Bytes of the file that was filled.
    pub allocated: u64,
}

/// Our node: from the command to complete, which means durable.
pub fn ours(place: TempDir, from: &str) -> Pulled {
    let store = place.path().join("store.img");
    let node = OurNode::start(place, Way::Unix, &[]);
    let (pid, before) = (node.node.pid(), cpu_seconds(node.node.pid()));
    let begun = Instant::now();
    node.node.cli(&["pull", "disk", "--from", from, "--store", store.to_str().expect("a path of text")]);
    node.node.cli(&["wait", "disk", "--timeout", "10m"]);
    Pulled {
        seconds: begun.elapsed().as_secs_f64(),
        cpu: cpu_seconds(pid) - before,
        memory: Some(memory_mib(pid, "VmHWM")),
        allocated: allocated(&store),
    }
}

/// A program that copies, and ends.
fn copier(program: &str, package: &str, arguments: &[&str], target: &Path, durable: bool) -> Pulled {
    let before = cpu_seconds_of_ended();
    let begun = Instant::now();
    run(program, package, arguments);
    if durable {
        Lab::settle([target]);
    }
    let seconds = begun.elapsed().as_secs_f64();
    Pulled { seconds, cpu: cpu_seconds_of_ended() - before, memory: None, allocated: allocated(target) }
}

/// `qemu-img convert` with as many requests in flight as it can have.
pub fn convert(place: &TempDir, from: &str, durable: bool) -> Pulled {
    let target = place.path().join("convert.img");
    let file = target.to_str().expect("a path of text");
    let arguments = ["convert", "-W", "-m", "16", "-f", "raw", "-O", "raw", from, file];
    copier("qemu-img", "qemu-utils", &arguments, &target, durable)
}

/// `nbdcopy`.
pub fn copy(place: &TempDir, from: &str, durable: bool) -> Pulled {
    let target = place.path().join("copy.img");
    let file = target.to_str().expect("a path of text");
    let arguments: &[&str] = if durable { &["--flush", from, file] } else { &[from, file] };
    copier("nbdcopy", "libnbd-bin", arguments, &target, false)
}

/// QEMU's block-stream job.
pub fn stream(place: TempDir, port: u16, size: u64, durable: bool) -> Pulled {
    let mut streamer = Streamer::start(place, port, size, false);
    let before = cpu_seconds(streamer.pid);
    let begun = Instant::now();
    streamer.stream();
    streamer.wait();
    if durable {
        Lab::settle([streamer.image.as_path()]);
    }
    Pulled {
        seconds: begun.elapsed().as_secs_f64(),
        cpu: cpu_seconds(streamer.pid) - before,
        memory: Some(memory_mib(streamer.pid, "VmHWM")),
        allocated: allocated(&streamer.image),
    }
}

/// nbdkit's scan filter, which reads all of a disk while a client is connected, over its cow filter, which keeps it.
fn scan(lab: &Lab, from: &str, size: u64) -> Pulled {
    let more = ["cow-on-cache=true", "scan-size=1M", "scan-forever=false"];
    let server = cow_over(lab, SCAN, from, &["--filter=scan"], &more);
    let before = cpu_seconds(server.pid);
    let begun = Instant::now();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let uri: nbd::uri::NbdUri = server.uri.parse().expect("our own URI");
    let client = runtime.block_on(nbd::client::Client::connect(&uri, &nbd::client::ConnectOptions::default()));
    let client = client.unwrap_or_else(|error| panic!("no connection to nbdkit: {error}"));
    // Its overlay has no name any more.
    let kept = || {
        let files = std::fs::read_dir(format!("/proc/{}/fd", server.pid)).into_iter().flatten().flatten();
        let nameless = files
            .map(|file| file.path())
            .filter(|path| std::fs::read_link(path).is_ok_and(|to| to.to_string_lossy().ends_with("(deleted)")));
        nameless.map(|path| allocated(&path)).max().unwrap_or(0)
    };
    wait_for("a disk that was read by nbdkit's scan filter", || kept() >= size);
    let seconds = begun.elapsed().as_secs_f64();
    drop(client);
    Pulled {
        seconds,
        cpu: cpu_seconds(server.pid) - before,
        memory: Some(memory_mib(server.pid, "VmHWM")),
        allocated: kept(),
    }
}

/// Who pulls, and how.
type Contender<'a> = (&'static str, &'a dyn Fn() -> Pulled);

/// All of them once, and again, with fresh memory each time.
fn in_turns(lab: &Lab, contenders: &[Contender], mut each: impl FnMut(&'static str, Pulled)) {
    for _ in 0..lab.scope.runs {
        for (name, pull) in contenders {
            lab.prime();
            each(name, pull());
        }
    }
}

/// Random data into memory: rates, and what they cost.
pub fn to_memory(lab: &Lab, report: &mut Report) {
    let size = lab.scope.pulled;
    let image = lab.random_image(size);
    let source = Server::nbdkit_file(lab, Way::Tcp, &image);
    let mib = (size / MIB) as f64;
    let gib = size as f64 / GIB as f64;
    let mut rate = Row::new(format!("pull {gib} GiB to memory"), "MiB/s", Better::Higher, Bar::Times(1.2, CONVERT));
    // The bar is for 2 GiB.
    let mut cpu = Row::new("CPU of it", "s", Better::Lower, Bar::Fixed(0.6 * gib));
    // 48 MiB and the map: two bits of each block of 4 KiB, live and durable.
    let map = size as f64 / 4096.0 * 4.0 / 8.0 / MIB as f64;
    let mut memory = Row::new("memory of it, at most", "MiB", Better::Lower, Bar::Fixed(48.0 + map));
    let contenders: &[Contender] = &[
        (OURS, &|| ours(lab.in_memory(), &source.uri)),
        (CONVERT, &|| convert(&lab.in_memory(), &source.uri, false)),
        (COPY, &|| copy(&lab.in_memory(), &source.uri, false)),
        (STREAM, &|| stream(lab.in_memory(), source.port, size, false)),
        (SCAN, &|| scan(lab, &source.uri, size)),
    ];
    in_turns(lab, contenders, |name, pulled| {
        rate.add(name, mib / pulled.seconds);
        cpu.add(name, pulled.cpu);
        if let Some(mib) = pulled.memory {
            memory.add(name, mib);
        }
    });
    report.extend([rate, cpu, memory]);
}

/// Random data onto the disk, until it is there for good.
pub fn to_disk(lab: &Lab, report: &mut Report) {
    let size = lab.scope.pulled;
    let image = lab.random_image(size);
    let source = Server::nbdkit_file(lab, Way::Tcp, &image);
    let gib = size as f64 / GIB as f64;
    let mut row = Row::new(format!("pull {gib} GiB to disk, durable"), "s", Better::Lower, Bar::Times(1.0, COPY));
    let contenders: &[Contender] = &[
        (OURS, &|| ours(lab.on_disk(), &source.uri)),
        (CONVERT, &|| convert(&lab.on_disk(), &source.uri, true)),
        (COPY, &|| copy(&lab.on_disk(), &source.uri, true)),
        (STREAM, &|| stream(lab.on_disk(), source.port, size, true)),
    ];
    in_turns(lab, contenders, |name, pulled| {
        row.add(name, pulled.seconds);
    });
    report.extend([row]);
}

/// An eighth of a disk is data, in runs of a MiB.
pub fn sparse(lab: &Lab, report: &mut Report) {
    let size = 4 * lab.scope.pulled;
    let data: Vec<_> = (0..size / (8 * MIB)).map(|run| run * 8 * MIB..run * 8 * MIB + MIB).collect();
    let image = lab.sparse_image("sparse", size, &data);
    let source = Server::nbdkit_file(lab, Way::Tcp, &image);
    let gib = size as f64 / GIB as f64;
    let mut row =
        Row::new(format!("pull {gib} GiB, of which an eighth is data"), "s", Better::Lower, Bar::Times(1.0, COPY));
    // A file system may need some more for its own blocks.
    let bar = allocated(&image) as f64 / MIB as f64 * 1.01;
    let mut space = Row::new("space that it takes", "MiB", Better::Lower, Bar::Fixed(bar));
    let contenders: &[Contender] = &[
        (OURS, &|| ours(lab.in_memory(), &source.uri)),
        (CONVERT, &|| convert(&lab.in_memory(), &source.uri, false)),
        (COPY, &|| copy(&lab.in_memory(), &source.uri, false)),
        (STREAM, &|| stream(lab.in_memory(), source.port, size, false)),
    ];
    in_turns(lab, contenders, |name, pulled| {
        row.add(name, pulled.seconds);
        space.add(name, pulled.allocated as f64 / MIB as f64);
    });
    report.extend([row, space]);
}

/// Random data into memory, over TLS.
pub fn encrypted(lab: &Lab, report: &mut Report) {
    let size = lab.scope.pulled;
    let image = lab.random_image(size);
    let source = Server::nbdkit_file(lab, Way::Tls, &image);
    let (mib, gib) = ((size / MIB) as f64, size as f64 / GIB as f64);
    let name = format!("pull {gib} GiB to memory, TLS");
    let mut row = Row::new(name, "MiB/s", Better::Higher, Bar::Times(1.2, CONVERT));
    let contenders: &[Contender] = &[
        (OURS, &|| ours(lab.in_memory(), &source.uri)),
        (CONVERT, &|| convert_encrypted(&lab.in_memory(), source.port)),
        (COPY, &|| copy(&lab.in_memory(), &source.uri, false)),
    ];
    in_turns(lab, contenders, |name, pulled| {
        row.add(name, mib / pulled.seconds);
    });
    report.extend([row]);
}

/// QEMU's tools have their own way to name certificates.
fn convert_encrypted(place: &TempDir, port: u16) -> Pulled {
    let target = place.path().join("convert.img");
    let credentials = format!("tls-creds-x509,id=tls,endpoint=client,dir={}", crate::servers::certificates().display());
    let from = format!("driver=nbd,host=127.0.0.1,port={port},tls-creds=tls");
    let file = target.to_str().expect("a path of text");
    let arguments = ["convert", "-W", "-m", "16", "--object", &credentials, "-O", "raw", "--image-opts", &from, file];
    copier("qemu-img", "qemu-utils", &arguments, &target, false)
}
