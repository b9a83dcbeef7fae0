//! Our node and its peers side by side, on this machine, in one go: the table of `docs/performance.md`.
//!
//! ```text
//! cargo bench --bench peers [-- [--quick] [--runs N] [--list] [FILTER]...]
//! ```
//! Each suite fills rows of a [`report::Report`]: what was measured, for whom, and which bar we have set ourselves. The
//! contenders take turns, run by run, so that what else the machine does hits all alike; the figure is the median. A
//! Markdown table goes to stdout, everything that was measured to `target/peers.json`. A row below its bar is
//! marked, and is no failure: figures of a shared machine are not; the exit status tells only whether all could be measured.
//!
//! - `lab`: the directories, images and memory that it is done with, and that nothing is left of it
//! - `servers`, `bare`, `qmp`, `fio`, `delay`: who serves, who asks, and a link that takes its time
//! - `warm`, `cold`, `pull`, `distance`, `scale`: the suites

mod bare;
mod cold;
mod delay;
mod distance;
mod fio;
mod lab;
mod pull;
mod qmp;
mod report;
mod scale;
mod servers;
#[path = "../../tests/support/mod.rs"]
mod support;
mod warm;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use lab::{Lab, Scope};
use report::Report;

/// A group of rows that share their servers.
type Suite = (&'static str, fn(&Lab, &mut Report));

const SUITES: [Suite; 13] = [
    ("warm", warm::plain),
    ("cold", cold::plain),
    ("pull-memory", pull::to_memory),
    ("pull-disk", pull::to_disk),
    ("pull-sparse", pull::sparse),
    ("cold-while-pulling", cold::while_pulling),
    ("distance-pull", distance::pull),
    ("distance-cold", distance::cold),
    ("scale", scale::large),
    ("pause", scale::pause),
    ("tracking", warm::tracking),
    ("tls-warm", warm::encrypted),
    ("tls-pull", pull::encrypted),
];

fn main() -> ExitCode {
    let all: Vec<String> = std::env::args().skip(1).collect();
    if let [first, image, address] = &all[..]
        && first == bare::ARGUMENT
    {
        bare::serve(image, address);
        return ExitCode::SUCCESS;
    }
    let mut scope = Scope::FULL;
    let (mut filters, mut list) = (Vec::new(), false);
    let mut arguments = all.into_iter();
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--quick" => scope = Scope::QUICK,
            "--list" => list = true,
            "--runs" => scope.runs = arguments.next().and_then(|text| text.parse().ok()).expect("--runs N"),
            // What cargo adds.
            "--bench" => {}
            other if other.starts_with('-') => panic!("unknown option {other}; known: --quick, --runs N, --list"),
            filter => filters.push(filter.to_owned()),
        }
    }
    let chosen: Vec<Suite> = SUITES
        .into_iter()
        .filter(|(name, _)| filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str())))
        .collect();
    if list {
        chosen.iter().for_each(|(name, _)| println!("{name}"));
        return ExitCode::SUCCESS;
    }
    let lab = Lab::new(scope);
    let mut report = Report::new(scope);
    for (name, suite) in chosen {
        eprintln!("== {name}");
        let before = report.elapsed();
        if catch_unwind(AssertUnwindSafe(|| suite(&lab, &mut report))).is_err() {
            report.failed(name);
        }
        eprintln!("== {name}: {:.0} s", (report.elapsed() - before).as_secs_f64());
        report.save();
    }
    println!("{}", report.markdown());
    if report.is_whole() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
