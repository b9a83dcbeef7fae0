// tests/run: timeout=900
//! The simulation: two hosts with the real core, in virtual time, in very many seeded runs with everything going wrong
//! that may go wrong. `docs/testing.md` tells how to use it.

mod checks;
mod client;
mod dice;
mod export;
mod lanes;
mod link;
mod media;
mod model;
mod planted;
mod plants;
mod run;
mod shape;
mod source;
mod target;
mod weather;
mod world;

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lazy_migrate::error::Failure;
use lazy_migrate::migration::phase::SourcePhase;

use run::run;

/// An effect that failed.
pub fn failure(text: &str) -> Failure {
    Failure::failed(text)
}

/// How many runs there must be, unless `SIM_RUNS` says otherwise.
const RUNS: u64 = 100_000;
/// How long they may take, unless `SIM_SECONDS` says otherwise.
const SECONDS: u64 = 700;
/// In so many runs each planted bug must be found: many times the longest median.
const LIMIT: u64 = 30_000;
/// From so many bases the medians in the document are taken.
const BASES: u64 = 11;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

fn random_seed() -> u64 {
    RandomState::new().hash_one(std::process::id())
}

fn on_all_cores(worker: impl Fn() + Sync) {
    let threads = std::thread::available_parallelism().map_or(1, |count| count.get());
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(&worker))));
}

/// Runs a seed once more and prints its log; what it broke.
fn replay(seed: u64) -> String {
    let outcome = run(seed, None, true);
    println!("{}", outcome.log.join("\n"));
    match outcome.broken {
        Some((rule, what)) => format!("SEED={seed} breaks a rule: {rule}: {what}"),
        None => format!("SEED={seed} broke a rule, and not when it ran again: something depends on more than the seed"),
    }
}

#[test]
fn no_rule_is_broken() {
    if let Some(seed) = number("SEED") {
        let outcome = run(seed, None, true);
        println!("{}", outcome.log.join("\n"));
        return assert!(outcome.broken.is_none(), "{:?}", outcome.broken);
    }
    let base = random_seed();
    let (runs, seconds) = (number("SIM_RUNS").unwrap_or(RUNS), number("SIM_SECONDS"));
    println!("base seed {base}");
    let (next, stop, failed) = (AtomicU64::new(0), AtomicBool::new(false), Mutex::new(None));
    let (released, serving, owned) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let began = Instant::now();
    let limit = Duration::from_secs(seconds.unwrap_or(SECONDS));
    let worker = || {
        while !stop.load(Ordering::Relaxed) && began.elapsed() < limit {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= runs {
                return;
            }
            let seed = base.wrapping_add(index);
            let outcome = std::panic::catch_unwind(|| run(seed, None, false));
            match outcome {
                Ok(outcome) if outcome.broken.is_none() => {
                    let count = if outcome.ended == SourcePhase::Released { &released } else { &serving };
                    count.fetch_add(1, Ordering::Relaxed);
                    owned.fetch_add(u64::from(outcome.handed_over), Ordering::Relaxed);
                }
                _ => {
                    stop.store(true, Ordering::Relaxed);
                    failed.lock().expect("no panic while it is held").get_or_insert(seed);
                }
            }
        }
    };
    on_all_cores(worker);
    if let Some(seed) = *failed.lock().expect("no panic while it is held") {
        panic!("{}", replay(seed));
    }
    let (released, serving) = (released.into_inner(), serving.into_inner());
    let (done, took) = (released + serving, began.elapsed().as_secs_f64());
    let (owned, rate) = (owned.into_inner(), done as f64 / took);
    println!(
        "{done} runs in {took:.1} s, {rate:.0} a second: handed over in {owned}; {released} ended released, {serving} at the source"
    );
    assert!(seconds.is_some() || done >= runs, "only {done} of {runs} runs in {SECONDS} s");
    // Both ends are really reached.
    assert!(released > done / 10 && serving > done / 10, "{released} released, {serving} rolled back or cancelled");
}
