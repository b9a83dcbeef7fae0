//! The checks are checked: each planted bug is looked for, and `docs/testing.md` says how long that takes.
//!
//! `REWRITE=1 cargo test --test sim planted` measures anew and writes the table into the document.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::plants::Plant;
use super::run::run;
use super::{BASES, LIMIT, number, on_all_cores, random_seed};

const BEGIN: &str = "<!-- measured: begin -->\n";
const END: &str = "<!-- measured: end -->";

/// How many runs it takes to find a plant, and by which rule; `None` when [`LIMIT`] runs do not find it.
fn hunt(plant: Plant, base: u64) -> Option<(u64, String)> {
    (0..LIMIT).find_map(|index| {
        let seed = base.wrapping_add(index);
        // A core that notices by a panic has noticed.
        match std::panic::catch_unwind(|| run(seed, Some(plant), false)) {
            Ok(outcome) => outcome.broken.map(|(rule, _)| (index + 1, rule.to_string())),
            Err(_) => Some((index + 1, "a panic of the core".into())),
        }
    })
}

/// The line of the table for a plant.
fn line(plant: Plant, found: &[(u64, String)]) -> String {
    let mut runs: Vec<u64> = found.iter().map(|(runs, _)| *runs).collect();
    runs.sort_unstable();
    let mut rules: BTreeMap<&str, usize> = BTreeMap::new();
    found.iter().for_each(|(_, rule)| *rules.entry(rule).or_default() += 1);
    let mut rules: Vec<(&str, usize)> = rules.into_iter().collect();
    rules.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let rules: Vec<&str> = rules.into_iter().map(|(rule, _)| rule).collect();
    let (median, most) = (runs[runs.len() / 2], runs[runs.len() - 1]);
    format!("| `{plant:?}`: {} | {} | {median} | {most} |\n", plant.mistake(), rules.join("; "))
}

#[test]
fn every_planted_bug_is_found() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/testing.md");
    let document = std::fs::read_to_string(&path).expect("docs/testing.md can be read");
    let (head, rest) = document.split_once(BEGIN).expect("the document has its first mark");
    let (shown, tail) = rest.split_once(END).expect("the document has its second mark");
    let rewrite = std::env::var_os("REWRITE").is_some();
    let bases: Vec<u64> = match number("SEED") {
        Some(seed) => vec![seed],
        None => (0..if rewrite { BASES } else { 1 }).map(|_| random_seed()).collect(),
    };
    println!("bases {bases:?}");
    let (next, found) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
    on_all_cores(|| {
        while let Some(&plant) = Plant::ALL.get(next.fetch_add(1, Ordering::Relaxed)) {
            let hunted: Option<Vec<_>> = bases.iter().map(|base| hunt(plant, *base)).collect();
            found.lock().expect("no panic while it is held").insert(plant as usize, hunted);
        }
    });
    let found = found.into_inner().expect("no panic while it is held");
    let mut table = "| planted bug | found by | median | most |\n|---|---|---|---|\n".to_owned();
    for plant in Plant::ALL {
        let Some(Some(hunted)) = found.get(&(plant as usize)) else {
            panic!("{plant:?} was not found in {LIMIT} runs from one of the seeds {bases:?}");
        };
        table += &line(plant, hunted);
    }
    println!("{table}");
    if rewrite {
        std::fs::write(&path, format!("{head}{BEGIN}{table}{END}{tail}")).expect("docs/testing.md can be written");
        return;
    }
    for plant in Plant::ALL {
        let shows = shown.contains(&format!("| `{plant:?}`: {} |", plant.mistake()));
        assert!(shows, "docs/testing.md does not show {plant:?}; run `REWRITE=1 cargo test --test sim planted`");
    }
}
