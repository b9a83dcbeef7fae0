//! Peers that do not tell the truth: what they say is refused, and nothing is lost.
//!
//! The liar speaks the real peer protocol over the real port; only what it says is wrong.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures::future::BoxFuture;
use lazy_migrate::error::Failure;
use lazy_migrate::migration::lease::{Beat, Timings};
use lazy_migrate::migration::machine::{BeatAnswer, Grant};
use lazy_migrate::migration::phase::DestinationPhase;
use lazy_migrate::migration::record::MigrationId;
use lazy_migrate::peer::client::{CallError, PeerClient};
use lazy_migrate::peer::link::{Caller, PeerAddress, PeerStream};
use lazy_migrate::peer::server::{PeerService, serve};
use lazy_migrate::peer::{PrepareAsk, Progress, Reply, Request, Subject};
use lazy_migrate::units::{BlockSize, Epoch};
use nbd::export::{Answer, Export, ExportInfo, Exports, Extent, ReadAnswer, ZeroMode};
use nbd::server::{ServeOptions, serve_connection};
use nbd::wire::Errno;
use tokio_util::sync::CancellationToken;

use crate::pair::{MIB, Pair};
use crate::support::{Node, PATIENCE, free_port, wait_for};

const BLOCK: u64 = 4096;

/// How a source lies.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Lies {
    /// About the disk's size over NBD.
    size: Option<u64>,
    /// All of the disk is said to read as zeroes.
    all_zero: bool,
    /// Heat, and lengths of extents, that cannot be.
    heat: bool,
    /// Checksums of other bytes, or none that are checksums.
    checksums: Option<&'static str>,
}

/// A source that another node believes to be one.
#[derive(Clone)]
struct Liar {
    data: Arc<Vec<u8>>,
    lies: Lies,
    /// How often the destination has said that it has everything.
    completed: Arc<AtomicU32>,
    heard: Arc<Mutex<Vec<Request>>>,
}

impl PeerService for Liar {
    fn answer(&self, _from: Caller, request: Request) -> BoxFuture<'_, Result<Reply, Failure>> {
        self.heard.lock().unwrap().push(request.clone());
        let answer = match request {
            Request::Beat { .. } => Ok(Reply::Beat { answer: BeatAnswer::Granted(Grant::default()) }),
            Request::Complete { .. } => {
                self.completed.fetch_add(1, Ordering::SeqCst);
                Ok(Reply::Done)
            }
            Request::Checksums { first, count, .. } => Ok(Reply::Checksums { digests: self.digests(first, count) }),
            other => Err(Failure::refused(format!("{other:?}"))),
        };
        Box::pin(async { answer })
    }

    fn serve_nbd(&self, _from: Caller, stream: PeerStream, stop: CancellationToken) -> BoxFuture<'_, ()> {
        let exports = Arc::new(self.clone());
        Box::pin(async move { drop(serve_connection(stream, exports, &ServeOptions::default(), stop).await) })
    }

    fn receive_images(&self, _from: Caller, _stream: PeerStream) -> BoxFuture<'_, ()> {
        Box::pin(async {})
    }
}

impl Liar {
    fn digests(&self, first: u64, count: u64) -> String {
        if let Some(lie) = self.lies.checksums {
            return lie.to_owned();
        }
        let block = |index: u64| &self.data[(index * BLOCK) as usize..((index + 1) * BLOCK) as usize];
        (first..first + count).map(|index| blake3::hash(block(index)).to_hex()[..32].to_owned()).collect()
    }
}

impl Exports for Liar {
    fn find(&self, _name: &str) -> Option<Arc<dyn Export>> {
        Some(Arc::new(self.clone()))
    }

    fn list(&self) -> Vec<(String, String)> {
        Vec::new()
    }
}

impl Export for Liar {
    fn info(&self) -> ExportInfo {
        ExportInfo {
            size: self.lies.size.unwrap_or(self.data.len() as u64),
            read_only: true,
            contexts: vec!["base:allocation".into(), "lazy-migrate:heat".into()],
            ..ExportInfo::default()
        }
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> ReadAnswer {
        buffer.copy_from_slice(&self.data[offset as usize..][..buffer.len()]);
        ReadAnswer::Now(Ok(()))
    }

    fn write(&self, _: u64, _: Bytes, _: bool) -> Answer<()> {
        Answer::Now(Err(Errno::EPERM))
    }

    fn flush(&self) -> Answer<()> {
        Answer::Now(Ok(()))
    }

    fn trim(&self, _: u64, _: u64, _: bool) -> Answer<()> {
        Answer::Now(Err(Errno::EPERM))
    }

    fn write_zeroes(&self, _: u64, _: u64, _: ZeroMode, _: bool) -> Answer<()> {
        Answer::Now(Err(Errno::EPERM))
    }

    fn cache(&self, _: u64, _: u64) -> Answer<()> {
        Answer::Now(Ok(()))
    }

    fn block_status(&self, context: &str, _: u64, length: u64, _: usize) -> Answer<Vec<Extent>> {
        const HOLE_AND_ZERO: u64 = 3;
        let extents = match context {
            "base:allocation" if self.lies.all_zero => vec![Extent { length, flags: HOLE_AND_ZERO }],
            "lazy-migrate:heat" if self.lies.heat => {
                vec![Extent { length: 1, flags: u64::MAX }, Extent { length: u64::MAX / 2, flags: u64::MAX - 1 }]
            }
            _ => vec![Extent { length, flags: 0 }],
        };
        Answer::Now(Ok(extents))
    }

    fn client_entered(self: Arc<Self>) -> Box<dyn Send + Sync> {
        Box::new(())
    }
}

/// A liar on a port of its own, and a real node that it hands its disk to.
struct Stage {
    runtime: tokio::runtime::Runtime,
    liar: Liar,
    ask: PrepareAsk,
    b: Node,
    to_b: PeerClient,
    stop: CancellationToken,
    _dir: tempfile::TempDir,
}

impl Stage {
    fn new(lies: Lies) -> Stage {
        let dir = tempfile::tempdir().unwrap();
        let data: Vec<u8> = (0..MIB).map(|at| (at % 251) as u8 + 1).collect();
        let liar = Liar { data: Arc::new(data), lies, completed: Arc::default(), heard: Arc::default() };
        let (port, b_port) = (free_port(), free_port());
        let b = Node::start(dir.path().join("b"), &["--peer", &format!("127.0.0.1:{b_port}"), "--lease", "2s"]);
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let stop = CancellationToken::new();
        let listener = runtime.block_on(tokio::net::TcpListener::bind(("127.0.0.1", port))).unwrap();
        runtime.spawn(serve(listener, None, Arc::new(liar.clone()), stop.clone()));
        let subject = Subject { disk: "web".into(), migration: MigrationId("liar".into()), epoch: Epoch(5) };
        let ask = PrepareAsk {
            subject,
            size: MIB,
            block_size: BlockSize::DEFAULT,
            timings: Timings::of(std::time::Duration::from_secs(2)),
            advertise: None,
            port,
            container: None,
            base: None,
        };
        let to_b = PeerClient::new(PeerAddress::plain(format!("127.0.0.1:{b_port}")));
        Stage { runtime, liar, ask, b, to_b, stop, _dir: dir }
    }

    fn call(&self, request: &Request) -> Result<Reply, CallError> {
        self.runtime.block_on(self.to_b.call(request, PATIENCE))
    }

    #[track_caller]
    fn refused(&self, request: &Request) -> String {
        match self.call(request) {
            Err(CallError::Refused(failure)) => failure.message,
            other => panic!("{request:?}: {other:?}"),
        }
    }

    #[track_caller]
    fn hand_over(&self) {
        self.call(&Request::Prepare(self.ask.clone())).unwrap();
        let beat = || {
            self.liar.heard.lock().unwrap().iter().rev().find_map(|request| match request {
                Request::Beat { beat, .. } => Some(*beat),
                _ => None,
            })
        };
        wait_for("a beat", || beat().is_some());
        let subject = self.ask.subject.clone();
        self.call(&Request::Handover { subject, beat: beat().unwrap() }).unwrap();
    }

    fn nothing_is_left(&self) {
        assert!(!self.b.dir.join("state/disks/web").exists());
        assert_eq!(self.b.try_cli(&["status", "web"]).code, 1);
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

#[test]
fn sizes_and_epochs_that_cannot_be() {
    for size in [MIB * 2, MIB - 512, 0, 1 << 62] {
        let stage = Stage::new(Lies { size: Some(size), ..Lies::default() });
        let said = stage.call(&Request::Prepare(stage.ask.clone())).unwrap_err().into_failure();
        assert!(said.message.contains("cannot read the disk from its source"), "{size}: {said}");
        stage.nothing_is_left();
    }
    let stage = Stage::new(Lies::default());
    for size in [0, 1 << 63, u64::MAX, (64 << 40) + BLOCK] {
        let message = stage.refused(&Request::Prepare(PrepareAsk { size, ..stage.ask.clone() }));
        assert!(message.contains("bytes"), "{size}: {message}");
        stage.nothing_is_left();
    }
    let epoch = |epoch| Subject { epoch: Epoch(epoch), ..stage.ask.subject.clone() };
    stage.refused(&Request::Prepare(PrepareAsk { subject: epoch(u64::MAX), ..stage.ask.clone() }));
    stage.nothing_is_left();
    for disk in ["", ".", "..", "../web", "a/b", "a\0b", &"x".repeat(5000)] {
        let subject = Subject { disk: disk.into(), ..stage.ask.subject.clone() };
        stage.refused(&Request::Prepare(PrepareAsk { subject, ..stage.ask.clone() }));
    }
    stage.hand_over();
    for wrong in [0, 4, 6, u64::MAX] {
        stage.refused(&Request::Handover { subject: epoch(wrong), beat: Beat(1) });
        stage.refused(&Request::Discard { subject: epoch(wrong), beat: None });
        stage.refused(&Request::Resume { subject: epoch(wrong) });
    }
    assert_eq!(stage.b.status("web")["epoch"], 5);
}

#[test]
fn heat_that_cannot_be_only_changes_the_order() {
    let stage = Stage::new(Lies { heat: true, ..Lies::default() });
    stage.hand_over();
    stage.b.cli(&["wait", "web", "--timeout", "60s"]);
    let disk = std::fs::read(stage.b.dir.join("state/disks/web/disk.img")).unwrap();
    assert!(disk == *stage.liar.data);
}

#[test]
fn a_source_whose_map_hides_data_is_not_released() {
    let stage = Stage::new(Lies { all_zero: true, ..Lies::default() });
    stage.hand_over();
    let status = stage.b.wait_status("web", "found out", |status| {
        status["last_error"].as_str().is_some_and(|error| error.contains("differ"))
    });
    assert_eq!(status["phase"], "active", "{status}");
    assert_eq!(stage.liar.completed.load(Ordering::SeqCst), 0, "it was told that everything is here");
}

#[test]
fn checksums_that_are_none_release_nothing() {
    for lie in ["", "00", "zz", "00112233445566778899aabbccddeeff"] {
        let stage = Stage::new(Lies { checksums: Some(lie), ..Lies::default() });
        stage.hand_over();
        let status = stage.b.wait_status("web", "found out", |status| status["last_error"].is_string());
        assert_eq!(status["phase"], "active", "{lie:?}: {status}");
        assert_eq!(stage.liar.completed.load(Ordering::SeqCst), 0, "{lie:?}");
        assert_ne!(stage.b.try_cli(&["verify", "web"]).code, 0);
    }
}

/// A destination that says whatever it likes, to a real source that has handed its disk to another.
#[test]
fn a_destination_that_lies_gets_nothing_and_destroys_nothing() {
    let pair = Pair::new(71).hand_over();
    let view = pair.a.status("web");
    let epoch = Epoch(view["epoch"].as_u64().unwrap());
    let journal = std::fs::read_to_string(pair.a.dir.join("state/disks/web/journal")).unwrap();
    let line: serde_json::Value =
        serde_json::from_str(journal.lines().last().unwrap().split_once(' ').unwrap().1).unwrap();
    let migration: MigrationId = serde_json::from_value(line["record"]["migration"].clone()).unwrap();
    let right = Subject { disk: "web".into(), migration, epoch };
    let other = Subject { migration: MigrationId("other".into()), ..right.clone() };
    let later = Subject { epoch: epoch.next(), ..right.clone() };
    let a: SocketAddr = format!("127.0.0.1:{}", pair.wire.port).parse().unwrap();
    let a = PeerClient::new(PeerAddress::plain(a.to_string()));
    let huge = Progress { present_bytes: u64::MAX, dirty_bytes: u64::MAX, pull_rate: u64::MAX, ..Progress::default() };
    let complete = |subject: &Subject, grant| Request::Complete { subject: subject.clone(), progress: huge, grant };
    let checksums = |first, count| Request::Checksums { subject: right.clone(), first, count };
    let refused = [
        complete(&other, Grant(u64::MAX)),
        complete(&later, Grant(u64::MAX)),
        checksums(u64::MAX, 1),
        checksums(0, u64::MAX),
        checksums(1 << 40, 4096),
        Request::Beat { subject: other, beat: Beat(1), phase: DestinationPhase::Discarded, progress: huge },
        Request::Beat { subject: later, beat: Beat(1), phase: DestinationPhase::Discarded, progress: huge },
        Request::Handover { subject: right.clone(), beat: Beat(1) },
        Request::Resume { subject: right.clone() },
    ];
    let runtime = tokio::runtime::Runtime::new().unwrap();
    for request in &refused {
        match runtime.block_on(a.call(request, PATIENCE)) {
            Err(CallError::Refused(_)) => {}
            // To a beat of another epoch it may also say that the disk is not there any more.
            Ok(Reply::Beat { answer: BeatAnswer::RolledBack }) => {}
            other => panic!("{request:?} was answered with {other:?}"),
        }
    }
    // A beat that is right but for its figures renews a lease, and shows nothing impossible.
    let beat = Request::Beat { subject: right, beat: Beat(9), phase: DestinationPhase::Active, progress: huge };
    runtime.block_on(a.call(&beat, PATIENCE)).unwrap();
    pair.a.cli(&["status", "web"]);
    pair.a.cli(&["rollback", "web", "--plan"]);
    assert_eq!(pair.phase_a(), "handed-over");
    pair.assert_source_untouched();
    pair.complete();
    pair.assert_source_untouched();
}
