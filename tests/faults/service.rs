//! Clients that use a disk all the time, and remember everything: what was acknowledged, when, and what was read.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::client::{Connection, ESHUTDOWN, Fail, boottime};
use crate::model::{BLOCK, Least, Model, SECTOR};
use crate::support::wait_for;

/// The export of all these tests.
pub const DISK: &str = "web";
/// A pause between two tries to connect.
const AGAIN: Duration = Duration::from_millis(20);

/// An acknowledgement: when the request was sent, and when the answer was there.
pub type Acknowledged = (i64, i64);

/// What one client does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Writes whole blocks, which never waits for the source.
    Writes,
    /// Writes single sectors, for which a missing block is fetched first.
    Changes,
    /// Reads blocks.
    Reads,
    /// Flushes.
    Flushes,
}

/// What one client has seen.
pub struct Log {
    pub part: Part,
    pub acknowledged: Vec<Acknowledged>,
    /// Errors, by number: how often, and when last.
    pub errors: HashMap<u32, (u64, i64)>,
    /// Reads that were wrong.
    pub wrong: Vec<String>,
    /// How often it had to connect again.
    pub reconnected: u64,
}

impl Log {
    /// The longest time without an acknowledgement within a time.
    pub fn standstill(&self, from: i64, to: i64) -> Duration {
        let inside = self.acknowledged.iter().map(|&(_, at)| at).filter(|at| (from..to).contains(at));
        let mut last = from;
        let mut longest = 0;
        for at in inside.chain([to]) {
            longest = longest.max(at - last);
            last = at;
        }
        Duration::from_nanos(longest as u64)
    }

    /// When the last acknowledgement was there.
    pub fn last(&self) -> i64 {
        self.acknowledged.last().map_or(0, |&(_, at)| at)
    }
}

/// What the test and a client share.
#[derive(Default)]
struct Watched {
    count: AtomicU64,
    last_at: AtomicI64,
}

/// Several clients of one node, until [`Load::finish`].
pub struct Load {
    stop: Arc<AtomicBool>,
    clients: Vec<(Part, Arc<Watched>, JoinHandle<Log>)>,
}

impl Load {
    /// Each part with blocks of its own; `pace` is the pause after each request.
    pub fn start(socket: PathBuf, model: &Arc<Model>, parts: &[Part], pace: Duration) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let clients = (0..).zip(parts).map(|(number, &part)| {
            let watched = Arc::new(Watched::default());
            let task = Task {
                log: Log { part, acknowledged: Vec::new(), errors: HashMap::new(), wrong: Vec::new(), reconnected: 0 },
                socket: socket.clone(),
                model: model.clone(),
                class: (number, parts.len() as u64),
                pace,
                stop: stop.clone(),
                watched: watched.clone(),
            };
            (part, watched, std::thread::spawn(move || task.run()))
        });
        Load { clients: clients.collect(), stop }
    }

    /// One of everything, as a service with some load would do.
    pub fn service(socket: PathBuf, model: &Arc<Model>) -> Load {
        Load::start(socket, model, &[Part::Writes, Part::Changes, Part::Reads], Duration::from_millis(5))
    }

    /// Waits until every client was acknowledged something after a time, and `more` acknowledgements came.
    #[track_caller]
    pub fn wait_for_all(&self, after: i64, more: u64) {
        for (part, watched, _) in &self.clients {
            let enough = watched.count.load(Ordering::SeqCst) + more;
            wait_for(&format!("{part:?}: {more} acknowledgements"), || {
                watched.count.load(Ordering::SeqCst) >= enough && watched.last_at.load(Ordering::SeqCst) > after
            });
        }
    }

    /// When the last acknowledgement of all was there.
    pub fn last_acknowledged(&self) -> i64 {
        self.clients.iter().map(|(_, watched, _)| watched.last_at.load(Ordering::SeqCst)).max().unwrap_or(0)
    }

    /// Waits until all clients have ended by themselves: the export was closed under them.
    #[track_caller]
    pub fn wait_until_shut_down(&self) {
        wait_for("all clients are told that it is over", || self.clients.iter().all(|client| client.2.is_finished()));
    }

    /// Ends the clients; requests that wait are given up.
    pub fn finish(mut self) -> Vec<Log> {
        self.stop.store(true, Ordering::SeqCst);
        std::mem::take(&mut self.clients).into_iter().map(|client| client.2.join().unwrap()).collect()
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
    }
}

struct Task {
    log: Log,
    socket: PathBuf,
    model: Arc<Model>,
    class: (u64, u64),
    pace: Duration,
    stop: Arc<AtomicBool>,
    watched: Arc<Watched>,
}

impl Task {
    fn run(mut self) -> Log {
        let mut state = 0x9e37_79b9 + self.class.0;
        let mut connection = None;
        while !self.stop.load(Ordering::SeqCst) {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let blocks = self.model.probed() / BLOCK / self.class.1;
            let own = (state >> 30) % blocks * self.class.1 + self.class.0;
            let any = (state >> 30) % (self.model.probed() / BLOCK);
            let done = match self.log.part {
                Part::Writes => self.write(&mut connection, own * BLOCK, BLOCK),
                Part::Changes => self.write(&mut connection, own * BLOCK + (state >> 50) % 8 * SECTOR, SECTOR),
                Part::Reads => self.read(&mut connection, any * BLOCK),
                Part::Flushes => self.flush(&mut connection),
            };
            match done {
                Ok(()) => {}
                Err(Fail::Errno(ESHUTDOWN) | Fail::GaveUp) => break,
                Err(_) => std::thread::sleep(AGAIN),
            }
            if !self.pace.is_zero() {
                std::thread::sleep(self.pace);
            }
        }
        self.log
    }

    fn write(&mut self, connection: &mut Option<Connection>, offset: u64, length: u64) -> Result<(), Fail> {
        let bytes = self.model.begin(offset, length);
        self.acknowledge(connection, |connection| connection.write(offset, &bytes))?;
        self.model.acknowledged(offset, length);
        Ok(())
    }

    fn read(&mut self, connection: &mut Option<Connection>, offset: u64) -> Result<(), Fail> {
        let before = self.model.before_read(offset, BLOCK);
        let bytes = self.acknowledge(connection, |connection| connection.read(offset, BLOCK as u32))?;
        if let Err(wrong) = self.model.check_read(offset, &bytes, &before) {
            self.log.wrong.push(wrong);
        }
        Ok(())
    }

    fn flush(&mut self, connection: &mut Option<Connection>) -> Result<(), Fail> {
        let written = self.model.before_flush();
        self.acknowledge(connection, Connection::flush)?;
        self.model.flushed(written);
        Ok(())
    }

    /// Asks, again and again on new connections where the server has gone, as a kernel's device would.
    fn acknowledge<T>(
        &mut self,
        connection: &mut Option<Connection>,
        ask: impl Fn(&mut Connection) -> Result<T, Fail>,
    ) -> Result<T, Fail> {
        loop {
            let sent = boottime();
            let answer = match connection {
                None => Connection::open(&self.socket, DISK, self.stop.clone()).map(|opened| {
                    *connection = Some(opened);
                    None
                }),
                Some(connection) => ask(connection).map(Some),
            };
            match answer {
                Ok(None) => {}
                Ok(Some(answer)) => {
                    let at = boottime();
                    self.log.acknowledged.push((sent, at));
                    self.watched.last_at.store(at, Ordering::SeqCst);
                    self.watched.count.fetch_add(1, Ordering::SeqCst);
                    return Ok(answer);
                }
                Err(Fail::Gone) if self.stop.load(Ordering::SeqCst) => return Err(Fail::GaveUp),
                Err(Fail::Gone) => {
                    self.log.reconnected += u64::from(connection.take().is_some());
                    std::thread::sleep(AGAIN);
                }
                Err(Fail::Errno(errno)) => {
                    let error = self.log.errors.entry(errno).or_default();
                    *error = (error.0 + 1, boottime());
                    return Err(Fail::Errno(errno));
                }
                Err(Fail::GaveUp) => return Err(Fail::GaveUp),
            }
        }
    }
}

/// All clients were served without an error and without a wrong byte.
#[track_caller]
pub fn assert_served(logs: &[Log]) {
    assert_only_errors(logs, &[]);
}

/// No client read a wrong byte, or saw an error that is not one of these.
#[track_caller]
pub fn assert_only_errors(logs: &[Log], allowed: &[u32]) {
    for log in logs {
        assert!(log.wrong.is_empty(), "{:?}: {} wrong reads: {}", log.part, log.wrong.len(), log.wrong[0]);
        let errors: Vec<_> = log.errors.iter().filter(|(errno, _)| !allowed.contains(errno)).collect();
        assert!(errors.is_empty(), "{:?}: errors {errors:?}", log.part);
    }
}

/// The last acknowledgement of all.
pub fn last_of(logs: &[Log]) -> i64 {
    logs.iter().map(Log::last).max().unwrap_or(0)
}

/// The whole disk as a node serves it is what the model says.
#[track_caller]
pub fn assert_content(socket: &Path, model: &Model, least: Least) {
    const STEP: u64 = 1 << 20;
    let give_up = Arc::new(AtomicBool::new(false));
    let mut connection = Connection::open(socket, DISK, give_up).expect("the node serves the disk");
    for offset in (0..model.size()).step_by(STEP as usize) {
        let bytes = connection.read(offset, STEP.min(model.size() - offset) as u32).expect("a read");
        if let Err(wrong) = model.check(offset, &bytes, least) {
            panic!("{wrong}");
        }
    }
}

/// What a try to write came to.
pub type Tried = (i64, i64, Result<(), Fail>);

/// Tries to write the last block of a disk all the time, on whatever node it is pointed at.
pub struct Prober {
    stop: Arc<AtomicBool>,
    accepted: Arc<AtomicU64>,
    thread: Option<JoinHandle<Vec<Tried>>>,
}

impl Prober {
    /// Every 50 ms; `offset` is that of the last block.
    pub fn start(socket: PathBuf, offset: u64) -> Prober {
        let (stop, accepted) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (its_stop, its_accepted) = (stop.clone(), accepted.clone());
        let thread = std::thread::spawn(move || {
            let (mut tries, mut connection) = (Vec::new(), None);
            let bytes = vec![0xab; SECTOR as usize];
            while !its_stop.load(Ordering::SeqCst) {
                let sent = boottime();
                let result = match &mut connection {
                    None => Connection::open(&socket, DISK, its_stop.clone()).map(|opened| connection = Some(opened)),
                    Some(open) => {
                        let result = open.write(offset, &bytes);
                        its_accepted.fetch_add(u64::from(result.is_ok()), Ordering::SeqCst);
                        tries.push((sent, boottime(), result));
                        result
                    }
                };
                // Who connects to a disk that is read-only at the moment keeps a read-only connection.
                if matches!(result, Err(Fail::Gone | Fail::Errno(_))) {
                    connection = None;
                }
                std::thread::sleep(Duration::from_millis(50));
            }
            tries
        });
        Prober { stop, accepted, thread: Some(thread) }
    }

    /// Waits until writes are accepted.
    #[track_caller]
    pub fn wait_accepted(&self, more: u64) {
        let enough = self.accepted.load(Ordering::SeqCst) + more;
        wait_for("writes are accepted", || self.accepted.load(Ordering::SeqCst) >= enough);
    }

    /// Whether a write was ever accepted.
    pub fn was_accepted(&self) -> bool {
        self.accepted.load(Ordering::SeqCst) > 0
    }

    /// All tries.
    pub fn finish(mut self) -> Vec<Tried> {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Prober {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
    }
}

/// The writes among the tries that were accepted.
pub fn accepted(tries: &[Tried]) -> Vec<Acknowledged> {
    tries.iter().filter(|tried| tried.2.is_ok()).map(|&(sent, at, _)| (sent, at)).collect()
}
