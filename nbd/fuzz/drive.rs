//! Drives a fuzz target with the stable compiler: its seed corpus, then mutations of it by a seeded generator.
//!
//! `FUZZ_SECONDS` says how long each target runs (a minute in the full test run); without it three seconds are enough
//! to notice what is broken while one edits. The seed is fixed then, and fresh otherwise; it is printed.

use std::path::Path;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};

/// How long a target runs unless `FUZZ_SECONDS` says otherwise.
const SECONDS: u64 = 3;
/// The seed of those short runs.
const SEED: u64 = 4711;
/// Longest input.
const LONGEST: usize = 4096;

/// Runs one target on its corpus (a directory of files), and on what can be made of that.
pub fn drive(corpus: &Path, run: fn(&[u8])) {
    let seeds = seeds(corpus);
    assert!(seeds.len() >= 3, "the corpus in {} is missing", corpus.display());
    seeds.iter().for_each(|seed| run(seed));
    let long = std::env::var("FUZZ_SECONDS").ok().map(|text| text.parse().expect("FUZZ_SECONDS is a number"));
    let seed = if long.is_some() { rand::random() } else { SEED };
    let mut random = StdRng::seed_from_u64(seed);
    let begun = Instant::now();
    let (mut input, mut count) = (Vec::new(), 0_u64);
    while begun.elapsed() < Duration::from_secs(long.unwrap_or(SECONDS)) {
        input.clear();
        input.extend_from_slice(&seeds[random.random_range(0..seeds.len())]);
        let other = &seeds[random.random_range(0..seeds.len())];
        mutate(&mut input, other, &mut random);
        if std::panic::catch_unwind(|| run(&input)).is_err() {
            let hex: String = input.iter().map(|byte| format!("{byte:02x}")).collect();
            panic!("{} breaks on this (seed {seed}); keep it there as a regression: {hex}", corpus.display());
        }
        count += 1;
    }
    println!("{}: {count} inputs, seed {seed}", corpus.display());
}

fn seeds(directory: &Path) -> Vec<Vec<u8>> {
    let mut paths: Vec<_> = directory.read_dir().unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| std::fs::read(path).unwrap()).collect()
}

/// Changes the input a little: bits, bytes, numbers that are borders of something, pieces moved, doubled or left out.
fn mutate(input: &mut Vec<u8>, other: &[u8], random: &mut StdRng) {
    for _ in 0..random.random_range(1..5) {
        let at = random.random_range(0..=input.len());
        let end = random.random_range(at..=input.len().min(at + 64));
        match random.random_range(0..7) {
            0 if at < input.len() => input[at] ^= 1 << random.random_range(0..8),
            1 if at < input.len() => input[at] = random.random_range(0..=255),
            2 => drop(input.drain(at..end)),
            3 => {
                let piece = input[at..end].to_vec();
                input.splice(at..at, piece);
            }
            4 => {
                let number: u64 = [0, 1, 7, 255, 4096, 4097, u64::from(u32::MAX), 1 << 25, u64::MAX, 1 << 63]
                    [random.random_range(0..10)];
                let width = [1, 2, 4, 8][random.random_range(0..4)];
                let bytes = &number.to_be_bytes()[8 - width..];
                let place = at.min(input.len().saturating_sub(width));
                let stop = (place + width).min(input.len());
                input.splice(place..stop, bytes.iter().copied());
            }
            5 => {
                let from = random.random_range(0..=other.len());
                input.truncate(at);
                input.extend_from_slice(&other[from..]);
            }
            _ => {
                let mut noise = [0; 9];
                random.fill_bytes(&mut noise);
                input.splice(at..at, noise);
            }
        }
        input.truncate(LONGEST);
    }
}
