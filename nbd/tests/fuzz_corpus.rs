//! The fuzz targets with the stable compiler: their seed corpus, and mutations of it by a seeded generator.

#[path = "../fuzz/targets.rs"]
mod targets;

use std::path::Path;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};

/// Mutations of each target, unless the time is over before.
const MUTATIONS: usize = 100_000;
const TIME: Duration = Duration::from_secs(3);
/// Longest input.
const LONGEST: usize = 4096;

fn seeds(target: &str) -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
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

fn drive(target: &str, run: fn(&[u8])) {
    let seeds = seeds(target);
    assert!(seeds.len() >= 3, "the corpus of {target} is missing");
    seeds.iter().for_each(|seed| run(seed));
    let mut random = StdRng::seed_from_u64(4711);
    let deadline = Instant::now() + TIME;
    let mut input = Vec::new();
    for _ in 0..MUTATIONS {
        if Instant::now() > deadline {
            break;
        }
        input.clear();
        input.extend_from_slice(&seeds[random.random_range(0..seeds.len())]);
        let other = &seeds[random.random_range(0..seeds.len())];
        mutate(&mut input, other, &mut random);
        if std::panic::catch_unwind(|| run(&input)).is_err() {
            panic!("{target} breaks on {input:02x?}");
        }
    }
}

#[test]
fn a_server_survives_any_client() {
    drive("server_session", targets::server_session);
}

#[test]
fn a_client_survives_any_server() {
    drive("client_session", targets::client_session);
}

#[test]
fn a_client_survives_any_reply() {
    drive("reply_chunks", targets::reply_chunks);
}

#[test]
fn decoders_give_back_what_they_take() {
    drive("messages", targets::messages);
}

#[test]
fn uris_survive() {
    drive("uri", targets::uri);
}
