//! The parts without I/O, each alone: what a look at the block map, a request of the fetch queue, a step of the pull order and a
//! message of the protocol cost. `cargo bench --bench pure [-- FILTER]`.

use std::hint::black_box;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use lazy_migrate::block_map::BlockMap;
use lazy_migrate::fetch::queue::{Carrier, Class, FetchQueue};
use lazy_migrate::limits::{MAX_FETCH, REGION};
use lazy_migrate::pull::{Order, PullOrder};
use lazy_migrate::tracker::Tracker;
use lazy_migrate::units::{BlockIndex, BlockRange, BlockSize, ByteRange};
use nbd::proto::client::{Negotiated, Operation, Session};
use nbd::proto::server::Requests;
use nbd::proto::server::reply::read_done;
use nbd::wire::{Command, CommandFlags, Framing, Request, TransmissionFlags};

/// Blocks of a disk of 64 GiB.
const BLOCKS: u64 = 16 << 20;
const SIZE: u64 = BLOCKS * 4096;
const FRAMINGS: [Framing; 3] = [Framing::Simple, Framing::Structured, Framing::Extended];

fn run(start: u64, blocks: u64) -> BlockRange {
    BlockRange::new(BlockIndex(start), BlockIndex(start + blocks))
}

/// Block numbers without order, the same in every run.
fn numbers() -> impl FnMut() -> u64 {
    let mut state = 7_u64;
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 20) % (BLOCKS - 256)
    }
}

fn block_map(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("block map");
    let mut next = numbers();
    let (full, half) = (BlockMap::full(BLOCKS), BlockMap::empty(BLOCKS));
    for part in 0..BLOCKS / 512 {
        half.set_present(run(part * 512, 256));
    }
    group.bench_function("a block is present, all are", |b| b.iter(|| full.is_present(black_box(run(next(), 1)))));
    group.bench_function("a block is present, half are", |b| b.iter(|| half.is_present(black_box(run(next(), 1)))));
    group.bench_function("1 MiB is present, half is", |b| b.iter(|| half.is_present(black_box(run(next(), 256)))));
    group.bench_function("the next missing run", |b| b.iter(|| half.missing_in(run(next(), 256)).next()));
    let dirty = BlockMap::full(BLOCKS);
    dirty.set_dirty(run(0, BLOCKS));
    group.bench_function("marks a dirty block dirty", |b| b.iter(|| dirty.set_dirty(black_box(run(next(), 1)))));
    group.bench_function("marks 1 MiB present", |b| {
        b.iter_batched(|| BlockMap::empty(256), |map| map.set_present(run(0, 256)), BatchSize::SmallInput);
    });
    let tracker = Tracker::new(SIZE);
    group.bench_function("tracks a write", |b| {
        b.iter(|| tracker.record(Duration::from_secs(9), ByteRange::at(next() * 4096, 4096)));
    });
    group.finish();
}

fn fetch_queue(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("fetch queue");
    let line = Carrier(0);
    for waiting in [0, 1000] {
        let mut queue = FetchQueue::new(MAX_FETCH / 4096);
        for other in 0..waiting {
            queue.request(&[run(BLOCKS + other * 2, 1)], Class::Demand);
            queue.poll(Class::Demand, line, Duration::ZERO);
        }
        let mut next = numbers();
        group.bench_function(format!("a fault from request to landing, {waiting} others in flight"), |b| {
            b.iter(|| {
                queue.request(&[run(next(), 1)], Class::Demand);
                let flight = queue.poll(Class::Demand, line, Duration::ZERO).expect("it was asked for");
                queue.arrived(flight.id);
                queue.landed(flight.id)
            });
        });
    }
    group.finish();
}

fn pull_order(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("pull order");
    // A whole disk takes a while.
    group.sample_size(10);
    const SIZE: u64 = 8 << 30;
    let regions = SIZE / REGION;
    // Every seventh region was written, each as often as its number says.
    let heat: Vec<_> =
        (0..regions).step_by(7).map(|at| (ByteRange::at(at * REGION, REGION), (at % 100) as u32 + 1)).collect();
    for (name, policy) in [("sequential", Order::Sequential), ("dirty", Order::Dirty)] {
        let fresh = || {
            let mut order = PullOrder::new(policy, BlockSize::DEFAULT, SIZE);
            order.set_heat(&heat);
            order
        };
        let per_region = REGION / 4096;
        group.throughput(Throughput::Elements(regions));
        group.bench_function(format!("8 GiB in steps of a MiB, {name}"), |b| {
            b.iter_batched(
                || (fresh(), BlockMap::empty(SIZE / 4096)),
                |(mut order, map)| {
                    while let Some(step) = order.next(per_region, &map) {
                        map.set_present(step.range());
                    }
                },
                BatchSize::LargeInput,
            );
        });
    }
    group.throughput(Throughput::Elements(1));
    let (mut order, mut next) = (PullOrder::new(Order::Dirty, BlockSize::DEFAULT, SIZE), numbers());
    group.bench_function("a hint", |b| b.iter(|| order.hint(run(next() % (SIZE / 4096), 1))));
    group.finish();
}

fn request(command: Command, cookie: u64) -> Request {
    Request { flags: CommandFlags::NONE, command, cookie, offset: cookie * 4096, length: 4096 }
}

fn negotiated(framing: Framing) -> Negotiated {
    Negotiated {
        size: SIZE,
        flags: TransmissionFlags(1),
        minimum_block: 1,
        preferred_block: 4096,
        maximum_block: 32 << 20,
        framing,
        contexts: Vec::new(),
        name: None,
        description: None,
    }
}

fn codec(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("codec");
    for framing in FRAMINGS {
        group.throughput(Throughput::Elements(32));
        let mut reads = BytesMut::new();
        (0..32).for_each(|cookie| reads.extend_from_slice(&request(Command::READ, cookie).encode_as(framing)));
        group.bench_function(format!("server: 32 reads decoded and answered, {framing:?}"), |b| {
            b.iter_batched(
                || (Requests::new(framing), reads.clone()),
                |(mut requests, mut input)| {
                    while let Ok(Some(incoming)) = requests.next(&mut input) {
                        black_box(read_done(framing, &incoming.request));
                    }
                },
                BatchSize::SmallInput,
            );
        });
        let mut writes = BytesMut::new();
        for cookie in 0..32 {
            let mut write = request(Command::WRITE, cookie);
            write.flags = write.flags.with_if(CommandFlags::PAYLOAD_LEN, framing == Framing::Extended);
            writes.extend_from_slice(&write.encode_as(framing));
            writes.extend_from_slice(&[7; 4096]);
        }
        group.bench_function(format!("server: 32 writes decoded, {framing:?}"), |b| {
            b.iter_batched(
                || (Requests::new(framing), writes.clone()),
                |(mut requests, mut input)| {
                    while let Ok(Some(incoming)) = requests.next(&mut input) {
                        black_box(incoming);
                    }
                },
                BatchSize::SmallInput,
            );
        });
        let mut replies = BytesMut::new();
        for cookie in 1..=32 {
            replies.extend_from_slice(&read_done(framing, &request(Command::READ, cookie)));
            replies.extend_from_slice(&[7; 4096]);
        }
        group.bench_function(format!("client: 32 reads sent and completed, {framing:?}"), |b| {
            b.iter_batched(
                || (Session::new(&negotiated(framing)), replies.clone()),
                |(mut session, mut input)| {
                    for cookie in 1..=32_u64 {
                        let read = Operation::Read { offset: cookie * 4096, length: 4096, whole: false };
                        let sent: (_, Bytes) = session.submit(&read, cookie);
                        black_box(sent);
                    }
                    while let Ok(Some(completion)) = session.receive(&mut input) {
                        black_box(completion);
                    }
                },
                BatchSize::SmallInput,
            );
        });
    }
    group.finish();
}

criterion_group!(benches, block_map, fetch_queue, pull_order, codec);
criterion_main!(benches);
