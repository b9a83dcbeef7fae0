//! In which order should the rest of a disk follow? Replays recorded traces (`examples/traces`) against the real block map, fetch
//! queue, write tracker and pull order, over a link in virtual time, and prints what each order leaves to wait for.
//!
//! ```text
//! cargo run --release --example compare_orders [-- TRACE...]
//! ```
//! What it takes for granted: 1 Gbit/s, on which everything queues in the order in which it was sent; an application that goes on with
//! what it does next only when what it asked for is there. Requests that it made at once wait at once.

mod replay;
mod trace;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use lazy_migrate::pull::Order;
use replay::{Plan, Replay};
use trace::Trace;

const PLANS: [(&str, Plan); 5] = [
    ("on demand only", Plan { order: None, hints: false }),
    ("sequential", Plan { order: Some(Order::Sequential), hints: false }),
    ("sequential + neighbourhood", Plan { order: Some(Order::Sequential), hints: true }),
    ("dirty-tracked", Plan { order: Some(Order::Dirty), hints: false }),
    ("dirty-tracked + neighbourhood", Plan { order: Some(Order::Dirty), hints: true }),
];

fn main() -> ExitCode {
    let given: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/traces");
    let names = ["container-start", "database", "build"];
    let ours = || names.iter().map(|name| directory.join(name).with_extension("trace")).collect();
    let paths = if given.is_empty() { ours() } else { given };
    println!("| trace | round trip | order | demand fetches | stalled | all present after |");
    println!("|---|---|---|---|---|---|");
    for path in paths {
        let trace = match Trace::load(&path) {
            Ok(trace) => trace,
            Err(error) => {
                eprintln!("{}: {error}", path.display());
                return ExitCode::FAILURE;
            }
        };
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        for milliseconds in [1, 10, 50] {
            for (order, plan) in PLANS {
                let left = Replay::new(&trace, plan, Duration::from_millis(milliseconds)).run(&trace);
                let whole = left.complete.map_or_else(|| "-".to_owned(), |at| format!("{:.1} s", at.as_secs_f64()));
                let stalled = left.stalled.as_secs_f64();
                println!("| {name} | {milliseconds} ms | {order} | {} | {stalled:.2} s | {whole} |", left.fetches);
            }
        }
    }
    ExitCode::SUCCESS
}
