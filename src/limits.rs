//! Every bound of the node in one place: memory, queue lengths, bytes in flight, request sizes, times. Those of NBD
//! connections are in [`nbd::limits`].

use std::time::Duration;

/// The largest single request to an upstream, demand or background, in bytes.
pub const MAX_FETCH: u64 = 1 << 20;

/// The longest range of known zeroes that one background step marks present, in bytes.
pub const MAX_ZERO_STEP: u64 = 256 << 20;

/// Bytes of background pull in flight over all connections when nothing is known of the link yet.
pub const BACKGROUND_WINDOW_START: u64 = 4 << 20;

/// The background window never shrinks below this many bytes (one request must fit).
pub const BACKGROUND_WINDOW_MIN: u64 = 1 << 20;

/// The background window never grows above this many bytes.
pub const BACKGROUND_WINDOW_MAX: u64 = 32 << 20;

/// A background request may take this much longer than one alone on the link (or half as long again, whichever is more)
/// before the window shrinks: the queue that the pull builds up on the link is what a demand fetch waits behind.
pub const BACKGROUND_QUEUE_DELAY: Duration = Duration::from_millis(3);

/// The largest background request while clients fetch, in bytes.
pub const BACKGROUND_PIECE_MAX: u64 = 256 << 10;

/// The smallest, on slow links.
pub const BACKGROUND_PIECE_MIN: u64 = 32 << 10;

/// What a link carries in this time is a background request while clients fetch.
pub const BACKGROUND_PIECE_TIME: Duration = Duration::from_millis(4);

/// How long the background pull goes on keeping out of the way after a demand fetch.
pub const DEMAND_REST: Duration = Duration::from_millis(5);

/// The turns on a processor that the thread of an export asks for: the kernel's shortest.
pub const SHORT_TURN: Duration = Duration::from_micros(100);

/// When something that a client waits for has been in the air for so long, and for two delays of the link more, the
/// background pull sends nothing until it is here: TCP does not try for much less than this again after a loss, and then
/// ever more rarely, while the pull goes on filling the path.
pub const DEMAND_STALL: Duration = Duration::from_millis(200);

/// A demand fetch of so many bytes goes to the store as pages, and from there to who waits for it.
pub const DEMAND_PAGES_MIN: u64 = 256 << 10;

/// Bytes of demand fetches in flight.
pub const DEMAND_WINDOW: u64 = 64 << 20;

/// Reads of one export that wait for the local disk at a time, each on a thread.
pub const DISK_READS: usize = 32;

/// Connections to the upstream for the background pull (demand has one of its own).
pub const BACKGROUND_CONNECTIONS: usize = 2;

/// The first pause before a failed flight or a lost connection is tried again; it doubles up to [`RETRY_MAX`].
pub const RETRY_MIN: Duration = Duration::from_millis(50);

/// The longest pause between two tries.
pub const RETRY_MAX: Duration = Duration::from_secs(2);

/// How long dialling and negotiating with an upstream may take.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a second connection may take before the background pull shares the demand connection: some servers
/// (`qemu-nbd` without `--shared`) leave it waiting for as long as the first one lives.
pub const EXTRA_CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// How long saying goodbye to an upstream may take.
pub const GOODBYE_TIME: Duration = Duration::from_millis(200);

/// A connection with requests in flight and no reply for this long counts as lost.
pub const REPLY_TIMEOUT: Duration = Duration::from_secs(30);

/// How often that is looked at.
pub const REPLY_LOOK: Duration = Duration::from_secs(5);

/// How long the background pull waits for the upstream's heat, and for each answer about its zeroes, before it goes on
/// without.
pub const MAPS_TIMEOUT: Duration = Duration::from_secs(20);

/// How long the background pull pauses when the store takes no more bytes, before it tries again.
pub const NO_SPACE_PAUSE: Duration = Duration::from_secs(1);

/// Pulled bytes that are written out together.
pub const WRITE_OUT_BATCH: u64 = 16 << 20;

/// Pulled bytes that are not on the disk yet; beyond it the background pull waits for the disk.
pub const WRITE_OUT_BEHIND: u64 = 128 << 20;

/// How often the map is persisted while blocks arrive and nobody flushes.
pub const PERSIST_EVERY: Duration = Duration::from_secs(10);

/// The length of one BLOCK_STATUS request when the upstream's maps are read, in bytes.
pub const STATUS_SPAN: u64 = 1 << 30;

/// How many of them are on their way at a time.
pub const STATUS_SPANS_AHEAD: usize = 4;

/// Zero extents of the upstream that are remembered; those beyond are pulled like data.
pub const MAX_ZERO_EXTENTS: usize = 1 << 20;

/// Data extents of the local store that are remembered for `base:allocation`; a more fragmented store is described
/// coarsely (small holes count as data).
pub const MAX_STORE_EXTENTS: usize = 1 << 18;

/// A read of at least this many bytes is looked at for holes, in bytes; a shorter one gains nothing by it.
pub const SPARSE_READ_MIN: usize = 64 << 10;

/// The shortest hole that the answer to a read names, in bytes; a shorter one is sent as zeroes.
pub const SPARSE_HOLE_MIN: u64 = 32 << 10;

/// The size of a region of the write tracker and of the pull order, in bytes.
pub const REGION: u64 = 1 << 20;

/// A hint of a demand fetch is followed for this many bytes behind it; then the order goes on as it was.
pub const HINT_SPAN: u64 = 8 << 20;

/// Hints that are remembered; older ones are forgotten first.
pub const MAX_HINTS: usize = 64;

/// While a disk is prepared for its handover, and writers go at the disk's pace: so many bytes may be written at least
/// before a write waits for the write-out.
pub const UNWRITTEN_MIN: u64 = 128 << 10;

/// So many at most, however fast the disk is.
pub const UNWRITTEN_MAX: u64 = 64 << 20;

/// Trims and zeroings longer than this are done off the connection's task.
pub const INLINE_ZERO_MAX: u64 = 32 << 20;

/// The largest disk, in bytes (64 TiB: its map takes 4 GiB).
pub const MAX_DISK: u64 = 64 << 40;

/// Units in which the holes of a store are remembered; larger disks get larger units.
pub const HOLE_GRANULES_MAX: u64 = 1 << 26;

/// How many idle connections to a peer are kept.
pub const PEER_IDLE_CONNECTIONS: usize = 4;

/// How many connections the peer port holds at once.
pub const PEER_CONNECTIONS: usize = 256;

/// How many of those that it accepts have not said yet who and what they are; others wait in the kernel's queue.
pub const PEER_UNKNOWN_CONNECTIONS: usize = 64;

/// How long a connection may take to say so.
pub const PEER_PREAMBLE_TIME: Duration = Duration::from_secs(10);

/// How long a connection may be silent between questions: the other node keeps some, and dials anew.
pub const PEER_IDLE_TIME: Duration = Duration::from_secs(60);

/// The longest head or answer on a connection that carries a checkpoint, in bytes.
pub const PEER_HEAD_BYTES: usize = 64 << 10;

/// The largest checkpoint that is taken, in bytes: what a host's memory may be.
pub const CHECKPOINT_BYTES: u64 = 1 << 40;

/// The largest frame of a peer message, in bytes.
pub const PEER_FRAME_BYTES: usize = 2 << 20;

/// The most blocks whose checksums one question may ask for.
pub const PEER_CHECKSUM_BLOCKS: u64 = 4096;

/// The most disks of a node.
pub const NODE_DISKS: usize = 4096;

/// Events that a node remembers; older ones are in the files of their disks.
pub const EVENTS_KEPT: usize = 4096;

/// The length at which a disk's file of events is put aside, in bytes; one that was put aside is kept.
pub const EVENTS_FILE_BYTES: u64 = 4 << 20;

/// Samples in the history of one disk.
pub const HISTORY_SAMPLES: usize = 720;

/// Cells of a picture of a disk's map.
pub const MAP_CELLS: usize = 4096;

/// Answers for the page that are made at a time.
pub const WEB_REQUESTS: usize = 8;

/// The largest question to the control API, in bytes.
pub const CONTROL_BODY_BYTES: usize = 64 << 10;

/// The longest answer of the control API that is read whole, and the longest line of a stream, in bytes.
pub const CONTROL_ANSWER_BYTES: usize = 16 << 20;
