//! What a server serves.
//!
//! One task drives a connection: it decodes all requests of a receive, calls the export for each, and answers all that
//! are ready in one send. So an export answers **at once** wherever it can ([`Answer::Now`]); only what must wait for a
//! peer or for the disk's write cache returns a future ([`Answer::Later`]), which the connection's own task polls: there
//! is never a task a request. A READ may also be promised ([`ReadAnswer::Promised`]): answered by whoever gets its bytes.
//! The server has checked range, alignment, flags and read-only before it calls.

use std::future::poll_fn;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;
use tokio::runtime::Handle;

use crate::promise::Inbox;
pub use crate::promise::{Promise, ReadReply};
use crate::tls::Identity;
use crate::wire::Errno;

/// The answer to a request: here already, or a future that the connection's task polls to its end.
///
/// A future may be dropped before its end (the client has gone): it must own what it uses and leave no state half done.
pub enum Answer<T> {
    /// Done.
    Now(Result<T, Errno>),
    /// To be waited for.
    Later(BoxFuture<'static, Result<T, Errno>>),
}

/// The answer to a READ.
pub enum ReadAnswer {
    /// On `Ok`, the buffer that was given is filled to its end.
    Now(Result<(), Errno>),
    /// As `Now(Ok(()))`; besides, these ranges of the buffer are known to be zeroes (counted from its start; ascending,
    /// none empty, none touching the next). Where the client understands it, they are sent as holes. Worth telling only
    /// where it costs no more than the read itself.
    Sparse(Vec<Range<usize>>),
    /// The bytes come later; the buffer that was given is not used.
    Later(BoxFuture<'static, Result<LateRead, Errno>>),
    /// The same, and somebody else will have them, who can send them: [`Export::promise`] is to be called. It costs less
    /// than a future for each.
    Promised,
}

/// What came of a READ that had to wait.
#[derive(Clone, Debug)]
pub enum LateRead {
    /// The bytes, exactly as many as were asked.
    Bytes(Bytes),
    /// Nothing is to be waited for any more: ask again, with a buffer or for pages.
    AtHand,
}

/// Reads to the end, whatever has to be waited for.
pub async fn read(export: &(impl Export + ?Sized), offset: u64, buffer: &mut [u8]) -> Result<(), Errno> {
    loop {
        let late = match export.read(offset, buffer) {
            ReadAnswer::Now(done) => return done,
            ReadAnswer::Sparse(_) => return Ok(()),
            ReadAnswer::Later(work) => work.await?,
            ReadAnswer::Promised => promised(export, offset, buffer.len()).await?,
        };
        match late {
            LateRead::AtHand => {}
            LateRead::Bytes(bytes) if bytes.len() == buffer.len() => {
                buffer.copy_from_slice(&bytes);
                return Ok(());
            }
            LateRead::Bytes(_) => return Err(Errno::EIO),
        }
    }
}

/// Has a promise forgotten when it is dropped.
struct Kept<'a, E: Export + ?Sized>(&'a E, Promise);

impl<E: Export + ?Sized> Drop for Kept<'_, E> {
    fn drop(&mut self) {
        self.0.forget(self.1);
    }
}

/// What comes of a read that an export answers with [`ReadAnswer::Promised`]. It is forgotten when this is dropped.
pub async fn promised(export: &(impl Export + ?Sized), offset: u64, length: usize) -> Result<LateRead, Errno> {
    let (inbox, mut letters) = (Arc::<Inbox>::default(), Vec::new());
    let _kept = Kept(export, export.promise(offset, length, ReadReply::new(&inbox, 0)));
    poll_fn(|cx| inbox.poll_take(cx, &mut letters)).await;
    letters.pop().map_or(Err(Errno::EIO), |letter| letter.outcome)
}

/// What came of [`Export::splice`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spliced {
    /// The whole range is in the pipe.
    Whole,
    /// Nothing is; the range is to be read.
    No,
    /// Something may be in the pipe, which is thrown away; the range is to be read.
    Spoilt,
}

/// What an export says of itself during negotiation (NBD_INFO_EXPORT, NBD_INFO_BLOCK_SIZE, NBD_INFO_DESCRIPTION).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// Size in bytes; any value, not only a multiple of a block.
    pub size: u64,
    /// Writes are refused with EPERM.
    pub read_only: bool,
    /// Free text for NBD_OPT_LIST and NBD_INFO_DESCRIPTION.
    pub description: String,
    /// Smallest unit of a request in bytes: a power of two up to 65536. Requests that are not aligned to it are refused,
    /// and the size that clients see is cut to a multiple of it.
    pub minimum_block: u32,
    /// Preferred request alignment in bytes: a power of two, 512 or more.
    pub preferred_block: u32,
    /// WRITE_ZEROES can be asked to be fast or fail, see [`ZeroMode::fast`] (NBD_FLAG_SEND_FAST_ZERO).
    pub fast_zero: bool,
    /// Access in order is much faster than at random (NBD_FLAG_ROTATIONAL).
    pub rotational: bool,
    /// FLUSH on one connection covers writes answered on every other (NBD_FLAG_CAN_MULTI_CONN).
    pub multi_conn: bool,
    /// Names of the meta contexts that can be asked for, for example `base:allocation`.
    pub contexts: Vec<String>,
}

impl Default for ExportInfo {
    /// A writable export of no bytes, byte by byte, without contexts.
    fn default() -> ExportInfo {
        ExportInfo {
            size: 0,
            read_only: false,
            description: String::new(),
            minimum_block: 1,
            preferred_block: 4096,
            fast_zero: false,
            rotational: false,
            multi_conn: false,
            contexts: Vec::new(),
        }
    }
}

/// One extent of a BLOCK_STATUS reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes, never 0.
    pub length: u64,
    /// Status flags of the context. Contexts with 32-bit flags (all of today's) use the low half.
    pub flags: u64,
}

/// `base:allocation`: the extent is a hole.
pub const STATE_HOLE: u64 = 1;
/// `base:allocation`: the extent reads as zeroes.
pub const STATE_ZERO: u64 = 2;

/// How a WRITE_ZEROES is to be done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ZeroMode {
    /// Allocate, do not punch a hole (NBD_CMD_FLAG_NO_HOLE).
    pub no_hole: bool,
    /// Answer ENOTSUP at once where zeroing would not be faster than writing zeroes (NBD_CMD_FLAG_FAST_ZERO). Comes only
    /// to exports with [`ExportInfo::fast_zero`].
    pub fast: bool,
}

/// A virtual disk. Object-safe; cheap to call from many connections at once.
///
/// `fua` means: the data of this request is durable before the answer is `Ok`.
pub trait Export: Send + Sync + 'static {
    /// Properties for negotiation. Asked anew for every client.
    fn info(&self) -> ExportInfo;

    /// Fills `buffer` from `offset`, or says that it comes later.
    fn read(&self, offset: u64, buffer: &mut [u8]) -> ReadAnswer;

    /// A read that [`Export::read`] has just answered with [`ReadAnswer::Promised`]: has the answer sent when it is known.
    /// Only exports that give that answer need this.
    fn promise(&self, _offset: u64, _length: usize, _reply: ReadReply) -> Promise {
        Promise(0)
    }

    /// Nobody waits for a promised answer any more. It may have been sent already; otherwise its reply is dropped.
    fn forget(&self, _promise: Promise) {}

    /// For a large read whose client takes pages in place of copies: has the range's pages spliced into a pipe, which is
    /// empty and has room for them, and does not block on it. Only for a range that [`Export::read`] would answer at once;
    /// what stands there when the reply is received is what the client gets.
    fn splice(&self, _offset: u64, _length: usize, _pipe: BorrowedFd<'_>) -> Spliced {
        Spliced::No
    }

    /// Writes `data` at `offset`.
    ///
    /// A long WRITE without FUA may come in pieces, which are cut at multiples of the preferred block and come in order,
    /// each when its bytes have come: its client is answered when all are, with the first error that there is, after which
    /// no further piece comes. If the client goes away in the middle, it is not answered, and no further piece comes.
    fn write(&self, offset: u64, data: Bytes, fua: bool) -> Answer<()>;

    /// Writes the next `length` bytes that are in a pipe at `offset`, a piece of a long WRITE as described at
    /// [`Export::write`]. `None`: not in this way, or not now, and the bytes are still in the pipe; they come to
    /// [`Export::write`] then. Otherwise they are no longer in the pipe, however it ends.
    fn write_pages(&self, _offset: u64, _length: usize, _pipe: BorrowedFd<'_>) -> Option<Answer<()>> {
        None
    }

    /// Makes every write that was answered before, on any connection, durable.
    fn flush(&self) -> Answer<()>;

    /// Gives up the content of a range; what a later read returns is up to the export.
    fn trim(&self, offset: u64, length: u64, fua: bool) -> Answer<()>;

    /// Makes a range read as zeroes.
    fn write_zeroes(&self, offset: u64, length: u64, mode: ZeroMode, fua: bool) -> Answer<()>;

    /// Prefetches a range into the local store (NBD_CMD_CACHE).
    fn cache(&self, offset: u64, length: u64) -> Answer<()>;

    /// The extents of one context from `offset`, covering at most `length` bytes and at least one extent; the last may
    /// not reach beyond `offset + length`. At most `max_extents` are returned (1 under NBD_CMD_FLAG_REQ_ONE).
    fn block_status(&self, context: &str, offset: u64, length: u64, max_extents: usize) -> Answer<Vec<Extent>>;

    /// Whether the processors are wanted for other work of this export, so that its connections do not spend time on looking
    /// for a client's next request.
    fn is_busy(&self) -> bool {
        false
    }

    /// The runtime on which its clients are to be served, once they are in the transmission phase: one thread of its own,
    /// say, so that nothing has to be handed over between threads. `None`: where they were accepted. It must live as long
    /// as the export.
    fn home(&self) -> Option<Handle> {
        None
    }

    /// A client has entered transmission; the guard is dropped when it leaves. For counting clients.
    fn client_entered(self: Arc<Self>) -> Box<dyn Send + Sync>;
}

/// The exports of a server by name.
pub trait Exports: Send + Sync + 'static {
    /// The export that a client asked for; the empty name is the default export.
    fn find(&self, name: &str) -> Option<Arc<dyn Export>>;
    /// Names and descriptions for NBD_OPT_LIST.
    fn list(&self) -> Vec<(String, String)>;

    /// The exports of a client that has proved who it is; `None`: these. Asked once for each connection, after its TLS
    /// handshake: what the answer does not have does not exist for this client. A client without TLS, where that is
    /// allowed, sees what [`Exports::find`] and [`Exports::list`] say.
    fn seen_by(&self, client: &Identity) -> Option<Arc<dyn Exports>> {
        let _ = client;
        None
    }
}
