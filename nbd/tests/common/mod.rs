//! What the tests of the drivers share: an export that can be made to fail or to wait, and a client by hand.

#![allow(dead_code, reason = "each test binary uses a part")]

pub mod acting;
pub mod plain;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use nbd::export::{Answer, Export, ExportInfo, Extent, LateRead, ReadAnswer, ZeroMode};
use nbd::memory::{MemoryDisk, SingleExport};
use nbd::proto::client::{Goal, Negotiated, Negotiation, Outcome, Plan};
use nbd::server::{Ended, ServeOptions, ServerError, serve_connection};
use nbd::wire::{
    ChunkFlags, ChunkHeader, ChunkType, Command, CommandFlags, Errno, ErrorChunk, ExtendedChunkHeader, Framing,
    Request, SimpleReply,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// A call that an export got: the command, offset, length, and whether FUA was set.
pub type Call = (Command, u64, u64, bool);

/// What a [`Probe`] does with a call.
pub enum Verdict {
    Go,
    Fail(Errno),
    /// Go on when the token is cancelled.
    After(CancellationToken),
    /// Fail when the token is cancelled.
    FailAfter(CancellationToken, Errno),
}

type Judge = Box<dyn Fn(&Call) -> Verdict + Send + Sync>;

/// A disk in memory that records its calls and does with them what the test says.
pub struct Probe {
    pub disk: Arc<MemoryDisk>,
    pub info: ExportInfo,
    pub extents: Mutex<Option<Vec<Extent>>>,
    pub clients: Arc<()>,
    calls: Mutex<Vec<Call>>,
    judge: Judge,
}

impl Probe {
    pub fn new(size: usize, judge: impl Fn(&Call) -> Verdict + Send + Sync + 'static) -> Probe {
        let disk = Arc::new(MemoryDisk::zeroed(size));
        Probe {
            info: disk.info(),
            disk,
            extents: Mutex::new(None),
            clients: Arc::new(()),
            calls: Mutex::new(Vec::new()),
            judge: Box::new(judge),
        }
    }

    pub fn calls(&self) -> Vec<Call> {
        self.calls.lock().unwrap().clone()
    }

    fn judge(&self, command: Command, offset: u64, length: u64, fua: bool) -> Verdict {
        let call = (command, offset, length, fua);
        self.calls.lock().unwrap().push(call);
        (self.judge)(&call)
    }

    fn plain(&self, verdict: Verdict, work: impl FnOnce(&MemoryDisk) -> Answer<()> + Send + 'static) -> Answer<()> {
        let disk = self.disk.clone();
        match verdict {
            Verdict::Go => work(&disk),
            Verdict::Fail(error) => Answer::Now(Err(error)),
            Verdict::After(gate) => Answer::Later(Box::pin(async move {
                gate.cancelled_owned().await;
                match work(&disk) {
                    Answer::Now(result) => result,
                    Answer::Later(work) => work.await,
                }
            })),
            Verdict::FailAfter(gate, error) => Answer::Later(Box::pin(async move {
                gate.cancelled_owned().await;
                Err(error)
            })),
        }
    }
}

impl Export for Probe {
    fn info(&self) -> ExportInfo {
        self.info.clone()
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> ReadAnswer {
        let (disk, length) = (self.disk.clone(), buffer.len());
        match self.judge(Command::READ, offset, length as u64, false) {
            Verdict::Go => disk.read(offset, buffer),
            Verdict::Fail(error) => ReadAnswer::Now(Err(error)),
            Verdict::After(gate) => ReadAnswer::Later(Box::pin(async move {
                gate.cancelled_owned().await;
                let mut bytes = vec![0; length];
                nbd::export::read(disk.as_ref(), offset, &mut bytes).await?;
                Ok(LateRead::Bytes(bytes.into()))
            })),
            Verdict::FailAfter(gate, error) => ReadAnswer::Later(Box::pin(async move {
                gate.cancelled_owned().await;
                Err(error)
            })),
        }
    }

    fn write(&self, offset: u64, data: Bytes, fua: bool) -> Answer<()> {
        let verdict = self.judge(Command::WRITE, offset, data.len() as u64, fua);
        self.plain(verdict, move |disk| disk.write(offset, data, fua))
    }

    fn flush(&self) -> Answer<()> {
        let verdict = self.judge(Command::FLUSH, 0, 0, false);
        self.plain(verdict, |disk| disk.flush())
    }

    fn trim(&self, offset: u64, length: u64, fua: bool) -> Answer<()> {
        // The content stays: a client must not take it for zeroes.
        let verdict = self.judge(Command::TRIM, offset, length, fua);
        self.plain(verdict, |disk| disk.flush())
    }

    fn write_zeroes(&self, offset: u64, length: u64, mode: ZeroMode, fua: bool) -> Answer<()> {
        let verdict = self.judge(Command::WRITE_ZEROES, offset, length, fua);
        self.plain(verdict, move |disk| disk.write_zeroes(offset, length, mode, fua))
    }

    fn cache(&self, offset: u64, length: u64) -> Answer<()> {
        let verdict = self.judge(Command::CACHE, offset, length, false);
        self.plain(verdict, |disk| disk.flush())
    }

    fn block_status(&self, context: &str, offset: u64, length: u64, max_extents: usize) -> Answer<Vec<Extent>> {
        let planted = self.extents.lock().unwrap().clone();
        let verdict = self.judge(Command::BLOCK_STATUS, offset, length, max_extents == 1);
        let extents = match planted {
            Some(extents) => Ok(extents),
            None => match self.disk.block_status(context, offset, length, max_extents) {
                Answer::Now(extents) => extents,
                Answer::Later(_) => unreachable!("a disk in memory answers at once"),
            },
        };
        match verdict {
            Verdict::Go => Answer::Now(extents),
            Verdict::Fail(error) => Answer::Now(Err(error)),
            Verdict::After(gate) => Answer::Later(Box::pin(async move {
                gate.cancelled_owned().await;
                extents
            })),
            Verdict::FailAfter(gate, error) => Answer::Later(Box::pin(async move {
                gate.cancelled_owned().await;
                Err(error)
            })),
        }
    }

    fn client_entered(self: Arc<Self>) -> Box<dyn Send + Sync> {
        Box::new(self.clients.clone())
    }
}

/// A connection of our server, and the client's end of its stream.
pub struct Served {
    pub stream: DuplexStream,
    pub ended: JoinHandle<Result<Ended, ServerError>>,
    pub shutdown: CancellationToken,
}

/// Serves an export over a stream in memory that holds `buffer` bytes each way.
pub fn serve(export: Arc<dyn Export>, options: ServeOptions, buffer: usize) -> Served {
    let (stream, server) = duplex(buffer);
    let shutdown = CancellationToken::new();
    let token = shutdown.clone();
    let ended = tokio::spawn(async move {
        serve_connection(server, Arc::new(SingleExport::new("disk", export)), &options, token).await
    });
    Served { stream, ended, shutdown }
}

/// A client that sends what it is told and shows what it gets.
pub struct Raw {
    pub stream: DuplexStream,
    pub negotiated: Negotiated,
    pub ended: JoinHandle<Result<Ended, ServerError>>,
    pub shutdown: CancellationToken,
}

impl Raw {
    /// Enters transmission, with `base:allocation` where the framing has it.
    pub async fn enter(export: Arc<dyn Export>, framing: Framing) -> Raw {
        Raw::enter_with(export, framing, ServeOptions::default(), 1 << 20).await
    }

    pub async fn enter_with(export: Arc<dyn Export>, framing: Framing, options: ServeOptions, buffer: usize) -> Raw {
        let Served { mut stream, ended, shutdown } = serve(export, options, buffer);
        let contexts = vec!["base:allocation".to_owned()];
        let plan = Plan { goal: Goal::Transmission, export: "disk".into(), framing, contexts, tls: false };
        let mut negotiation = Negotiation::new(plan);
        let (mut input, mut out) = (BytesMut::new(), BytesMut::new());
        let negotiated = loop {
            let outcome = negotiation.advance(&mut input, &mut out).expect("our server keeps to the protocol");
            stream.write_all_buf(&mut out).await.unwrap();
            match outcome {
                Some(Outcome::Export(negotiated)) => break negotiated,
                Some(other) => panic!("{other:?}, which was not asked for"),
                None => assert!(stream.read_buf(&mut input).await.unwrap() > 0, "hung up in the handshake"),
            }
        };
        Raw { stream, negotiated, ended, shutdown }
    }

    pub async fn send_with(&mut self, flags: CommandFlags, command: Command, cookie: u64, offset: u64, length: u64) {
        let request = Request { flags, command, cookie, offset, length };
        self.stream.write_all(&request.encode_as(self.negotiated.framing)).await.unwrap();
    }

    pub async fn send(&mut self, command: Command, cookie: u64, offset: u64, length: u64) {
        self.send_with(CommandFlags::NONE, command, cookie, offset, length).await;
    }

    pub async fn write(&mut self, cookie: u64, offset: u64, data: &[u8]) {
        let extended = self.negotiated.framing == Framing::Extended;
        let flags = CommandFlags::NONE.with_if(CommandFlags::PAYLOAD_LEN, extended);
        self.send_with(flags, Command::WRITE, cookie, offset, data.len() as u64).await;
        self.stream.write_all(data).await.unwrap();
    }

    pub async fn bytes(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        within(self.stream.read_exact(&mut bytes)).await.expect("the server hung up");
        bytes
    }

    /// The next message must be a simple reply: its cookie and its error.
    pub async fn simple(&mut self) -> (u64, u32) {
        let reply = SimpleReply::decode(&self.bytes(SimpleReply::LENGTH).await).expect("a simple reply");
        (reply.cookie, reply.error)
    }

    /// The next message must be a chunk: its head and its payload.
    pub async fn chunk(&mut self) -> (ChunkHeader, Vec<u8>) {
        let header = ChunkHeader::decode(&self.bytes(ChunkHeader::LENGTH).await).expect("a chunk");
        let payload = self.bytes(header.length as usize).await;
        (header, payload)
    }

    /// The next message must be an extended chunk: its head and its payload.
    pub async fn extended_chunk(&mut self) -> (ExtendedChunkHeader, Vec<u8>) {
        let head = self.bytes(ExtendedChunkHeader::LENGTH).await;
        let header = ExtendedChunkHeader::decode(&head).expect("an extended chunk");
        let payload = self.bytes(header.length as usize).await;
        (header, payload)
    }

    /// The next message must end a request without data: its cookie and its error, 0 for success.
    pub async fn finished(&mut self) -> (u64, u32) {
        if self.negotiated.framing != Framing::Extended {
            return self.simple().await;
        }
        let (chunk, payload) = self.extended_chunk().await;
        assert_eq!(chunk.flags, ChunkFlags::DONE);
        match chunk.kind {
            ChunkType::NONE => (chunk.cookie, 0),
            kind => (chunk.cookie, ErrorChunk::decode(kind, &payload).expect("an error").error.0),
        }
    }

    /// The next message must refuse such a request, in the form that is due: its error.
    pub async fn error(&mut self, command: Command) -> u32 {
        let with_data = matches!(command, Command::READ | Command::BLOCK_STATUS);
        if self.negotiated.framing == Framing::Structured && with_data {
            let (chunk, payload) = self.chunk().await;
            assert!(chunk.kind.is_error() && chunk.flags == ChunkFlags::DONE);
            return ErrorChunk::decode(chunk.kind, &payload).expect("an error").error.0;
        }
        self.finished().await.1
    }

    /// Whether the connection is alive and in step: a flush is answered.
    pub async fn assert_in_step(&mut self) {
        self.send(Command::FLUSH, 4711, 0, 0).await;
        assert_eq!(self.finished().await, (4711, 0));
    }
}

/// The result, within a time that only a hang needs.
pub async fn within<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), work).await.expect("hangs")
}

/// Waits until a condition holds.
pub async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(tokio::time::Instant::now() < deadline, "never came: {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
