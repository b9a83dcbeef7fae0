//! Every bound of this crate, in one place. A peer decides how much it sends; these decide how much of it is kept.

use std::time::Duration;

/// Longest payload of a READ or WRITE in bytes, announced as the maximum block size.
pub const MAX_PAYLOAD: u32 = 32 << 20;
/// Longest data of an option that is kept, in bytes; longer data is thrown away and the option refused.
pub const MAX_OPTION_DATA: u32 = 64 << 10;
/// Most queries of one LIST_META_CONTEXT or SET_META_CONTEXT.
pub const MAX_QUERIES: usize = 256;
/// Most meta contexts that one client can choose.
pub const MAX_CONTEXTS: usize = 64;
/// How long a client may take from the connect to the transmission phase.
pub const HANDSHAKE_TIME: Duration = Duration::from_secs(30);
/// How long a connection that is being shut down waits for requests in flight and for the peer to take its replies.
pub const DRAIN_TIME: Duration = Duration::from_secs(5);
/// How long a client in the handshake may go on when the server shuts down; its options are refused.
pub const HANDSHAKE_DRAIN_TIME: Duration = Duration::from_secs(1);
/// Connections of one listener in the transmission phase. At the limit, further clients wait at the end of their
/// handshake, for as long as that may take.
pub const MAX_CONNECTIONS: usize = 256;
/// Connections of one listener in the handshake. At the limit, further clients wait in the kernel's queue.
pub const MAX_HANDSHAKES: usize = 64;

/// Requests of one connection that are waiting for an [`crate::export::Answer::Later`].
pub const MAX_REQUESTS_IN_FLIGHT: usize = 256;
/// Bytes of write payloads and of reads that those requests hold. A request larger than what is left still enters when
/// nothing else is in flight.
pub const MAX_BYTES_IN_FLIGHT: usize = 64 << 20;
/// Reply bytes of one connection that are waiting for the peer to read them; above, no further request is taken. One
/// reply may go beyond it by its own size. What is made and not sent leaves the processor's cache: much of it makes
/// encryption slow.
pub const OUTPUT_HIGH_WATER: usize = 1 << 20;
/// Requests in flight of all connections that share a [`crate::server::Budget`].
pub const SERVER_REQUESTS_IN_FLIGHT: usize = 4096;
/// Bytes that those connections hold: payloads, data of answers, and replies that wait to be read.
pub const SERVER_BYTES_IN_FLIGHT: usize = 512 << 20;
/// Bytes up to which a connection without requests in flight is not counted, and never held back.
pub const UNCOUNTED_BYTES: usize = 256 << 10;
/// Reads from this length on are sent from the page cache without a copy where that is possible, in bytes.
pub const SPLICE_READ_MIN: u32 = 64 << 10;
/// Size of the pipe that they go through, in bytes: the longest read of that kind.
pub const SPLICE_PIPE: i32 = 4 << 20;
/// The same where that is beyond what the system allows.
pub const SPLICE_PIPE_SMALL: i32 = 1 << 20;
/// Writes from this length on are given to the export in pieces, as they come, in bytes.
pub const PIECED_WRITE_MIN: u32 = 256 << 10;
/// Such a piece, in bytes, where it is received into memory; the last one may be shorter.
pub const WRITE_PIECE: usize = 128 << 10;
/// How long a connection looks for the next request of a client that asks one thing after the other, before its task
/// sleeps.
pub const SPIN_TIME: Duration = Duration::from_micros(50);
/// Pause after a request that did not come while it was looked for; doubled with each.
pub const SPIN_FIRST_PAUSE: Duration = Duration::from_millis(1);
/// The longest of these pauses.
pub const SPIN_LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Extents in one BLOCK_STATUS reply, for each context.
pub const MAX_STATUS_EXTENTS: usize = 8192;

/// Requests of one client connection that have been sent and not answered.
pub const CLIENT_REQUESTS_IN_FLIGHT: usize = 1024;
/// Requests that wait in front of a client connection's task.
pub const CLIENT_QUEUE: usize = 256;
/// Bytes that a client connection holds for sending before it takes further requests from its queue.
pub const CLIENT_OUTPUT_HIGH_WATER: usize = 8 << 20;
/// Bytes of a streamed read that are received into memory at once.
pub const STREAM_PIECE: usize = 256 << 10;
/// The shortest rest of a streamed read that is taken as pages, in bytes.
pub const STREAM_SPLICE_MIN: u32 = 16 << 10;
/// How long a client connection that is being closed waits for its last replies, and for the server to take its last
/// requests.
pub const CLIENT_CLOSE_TIME: Duration = Duration::from_secs(5);
/// Pieces of one split request that are in flight at a time.
pub const CLIENT_PIECES_IN_FLIGHT: usize = 4;
/// Longest piece of a request without payload (TRIM, WRITE_ZEROES) where lengths have 32 bits, in bytes; a multiple of
/// every block size.
pub const CLIENT_LONGEST_PIECE: u64 = 1 << 30;
/// Pause before a client that lost its connection dials again; doubled with each failure.
pub const RECONNECT_FIRST_PAUSE: Duration = Duration::from_millis(50);
/// The longest of these pauses.
pub const RECONNECT_LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Longest data that a client accepts in the reply to an option, in bytes.
pub const MAX_OPTION_REPLY: u32 = 64 << 10;
/// Replies that a client accepts to one option: exports of a list, contexts, pieces of information.
pub const MAX_OPTION_REPLIES: usize = 16 << 10;
/// Chunks of one READ's reply that a client accepts.
pub const MAX_READ_CHUNKS: usize = 64 << 10;
/// Payload of a BLOCK_STATUS chunk that a client accepts, in bytes.
pub const MAX_STATUS_PAYLOAD: u32 = 8 << 20;
/// Payload of an error chunk that a client accepts, in bytes.
pub const MAX_ERROR_PAYLOAD: u32 = 64 << 10;

/// Free space that a receive buffer has before each receive, in bytes.
pub const RECEIVE_SPACE: usize = 64 << 10;
/// A buffer that has grown beyond this many bytes is given back when it is empty.
pub const KEPT_BUFFER: usize = 4 << 20;
/// How long a server waits for others that take over the same Unix socket's path.
pub const SOCKET_LOCK_TIME: Duration = Duration::from_secs(5);
/// Send buffer asked for on Unix sockets, in bytes; the default stalls both ends on large replies.
pub const SOCKET_SEND_BUFFER: usize = 4 << 20;
/// Encrypted bytes that are received at once. What a connection holds for TLS comes besides what is counted of it.
pub const TLS_RECEIVE_BUFFER: usize = 64 << 10;
/// Bytes that are encrypted and sent at once.
pub const TLS_SEND_BUFFER: usize = 256 << 10;
/// How long data may stay unacknowledged before a TCP connection counts as dead.
pub const TCP_USER_TIMEOUT: Duration = Duration::from_secs(15);
/// Idle time before TCP keepalive probes, and the time between them.
pub const TCP_KEEPALIVE: Duration = Duration::from_secs(5);
