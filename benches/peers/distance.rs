//! A source that is far away: how much of a long link the pull fills, and how many round trips a fault takes.

use std::time::Duration;

use crate::cold::{COW, DIRECT, SMALL, lazy};
use crate::delay::Link;
use crate::fio::{Job, Until};
use crate::lab::{KIB, Lab, MIB};
use crate::pull::{CONVERT, COPY, Pulled, STREAM, convert, copy, ours, stream};
use crate::report::{Bar, Better, OURS, Report, Row};
use crate::servers::{Server, Way, cow_over};

/// The whole disk over a link of 10 ms.
pub fn pull(lab: &Lab, report: &mut Report) {
    let size = lab.scope.distant;
    let image = lab.random_image(size);
    let source = Server::nbdkit_file(lab, Way::Tcp, &image);
    let link = Link::new(source.port, Duration::from_millis(10));
    let far = format!("nbd://127.0.0.1:{}/", link.port);
    let mib = size / MIB;
    let mut row = Row::new(format!("pull {mib} MiB at 10 ms"), "MiB/s", Better::Higher, Bar::Times(1.0, CONVERT));
    for run in 0..lab.scope.runs {
        for (name, pull) in [
            (OURS, &(|| ours(lab.in_memory(), &far)) as &dyn Fn() -> Pulled),
            (CONVERT, &|| convert(&lab.in_memory(), &far, false)),
            (COPY, &|| copy(&lab.in_memory(), &far, false)),
            (STREAM, &|| stream(lab.in_memory(), link.port, size, false)),
        ] {
            // It takes so long that it is enough to know it once.
            if name != STREAM || run == 0 {
                lab.prime();
                row.add(name, mib as f64 / pull().seconds);
            }
        }
    }
    report.extend([row]);
}

/// Reads of missing blocks over links of 2 and 20 ms.
pub fn cold(lab: &Lab, report: &mut Report) {
    let image = lab.random_image(lab.scope.warm);
    let source = Server::nbdkit_file(lab, Way::Tcp, &image);
    for milliseconds in [2, 20] {
        let link = Link::new(source.port, Duration::from_millis(milliseconds));
        let far = format!("nbd://127.0.0.1:{}/", link.port);
        for (depth, factor) in [(1, 1.05), (32, 1.15)] {
            let name = format!("missing, 4 KiB read at {milliseconds} ms, depth {depth}, p50");
            let mut row = Row::new(name, "us", Better::Lower, Bar::Times(factor, DIRECT));
            // About a second of them.
            let until = Until::Bytes(1000 / milliseconds * u64::from(depth) * 4 * KIB);
            for run in 0..lab.scope.runs {
                let job = Job { pattern: "randread", block: 4 * KIB, depth, until, seed: run as u64 };
                row.add(DIRECT, job.run(&far).p50_us);
                row.add(OURS, job.run(&lazy(lab, &far).uri).p50_us);
                row.add(COW, job.run(&cow_over(lab, COW, &far, &[], &[SMALL]).uri).p50_us);
            }
            report.extend([row]);
        }
    }
}
