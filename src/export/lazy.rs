//! The export: how it is made, started and ended.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nbd::wire::Errno;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use tracing::Instrument;

use super::config::{ExportConfig, ExportError};
use super::flush::Flusher;
use super::gate::{Clock, Gate, GateMode, boottime_clock};
use super::home::Home;
use super::overview::{Overview, overview};
use super::pace::Pace;
use super::status::{DataStatus, RateMeter};
use crate::block_map::BlockMap;
use crate::block_map::codec::Header;
use crate::fetch::lane::{self, LaneKind};
use crate::fetch::links::Links;
use crate::fetch::{Fetcher, WaitHistogram};
use crate::limits::{DISK_READS, MAX_DISK, PERSIST_EVERY};
use crate::pull::{PullOrder, PullState, puller};
use crate::store::{Disk, FileStore, MapFile, MapFiles, Store};
use crate::tracker::Tracker;
use crate::units::{BlockSize, ImageMark};
use crate::upstream::{Upstream, UpstreamStatus};

/// A virtual disk that NBD clients use: cheap to clone, all clones are the same export.
#[derive(Clone)]
pub struct LazyExport {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub(super) name: String,
    pub(super) read_only: bool,
    pub(super) disk: Arc<Disk>,
    pub(super) gate: Gate,
    pub(super) tracker: Tracker,
    pub(super) flusher: Arc<Flusher>,
    pub(super) pace: Pace,
    /// See [`ExportConfig::returns`].
    returns: bool,
    /// Only a lazily filled export has one.
    pub(super) fetcher: Option<Arc<Fetcher>>,
    pub(super) started: Instant,
    pub(super) clients: AtomicUsize,
    /// The right to wait for the local disk on a thread.
    pub(super) disk_reads: Arc<Semaphore>,
    /// A long read has had the store's holes looked for.
    pub(super) holes_looked_for: AtomicBool,
    pub(super) complete: watch::Receiver<PullState>,
    /// Keeps the state of a local image, which is always complete.
    _local_state: watch::Sender<PullState>,
    pub(super) home: Option<Arc<Home>>,
    links: Option<Arc<Links>>,
    map_files: Option<MapFiles>,
    rate: Arc<RateMeter>,
    cancel: CancellationToken,
    pub(super) tasks: TaskTracker,
    _cancel_with_the_last: DropGuard,
}

/// What differs between the kinds.
struct Parts {
    name: String,
    read_only: bool,
    disk: Disk,
    map_file: Option<MapFile>,
    map_files: Option<MapFiles>,
    lazy: Option<LazyParts>,
}

struct LazyParts {
    config: ExportConfig,
    links: Arc<Links>,
}

impl LazyExport {
    /// An existing image or block device: everything is present, writes are tracked.
    pub fn local(name: impl Into<String>, image: &Path, read_only: bool) -> Result<LazyExport, ExportError> {
        let fail = |source: io::Error| ExportError::Image { path: image.to_owned(), source };
        let store = FileStore::open(image, read_only).map_err(fail)?;
        Self::local_on(name, Arc::new(store), read_only)
    }

    /// The same over any store.
    pub fn local_on(
        name: impl Into<String>,
        store: Arc<dyn Store>,
        read_only: bool,
    ) -> Result<LazyExport, ExportError> {
        if store.size() > MAX_DISK {
            return Err(ExportError::TooLarge(store.size()));
        }
        let block_size = BlockSize::DEFAULT;
        let map = BlockMap::full(block_size.count(store.size()));
        let disk = Disk::new(store, map, block_size);
        Ok(Self::build(Parts { name: name.into(), read_only, disk, map_file: None, map_files: None, lazy: None }))
    }

    /// A lazily filled export. Goes on where an earlier process stopped; a new one of unknown size asks the upstream.
    /// Nothing is fetched before [`LazyExport::start`].
    pub async fn lazy(config: ExportConfig, upstream: Upstream) -> Result<LazyExport, ExportError> {
        let links = Arc::new(Links::new(upstream, own_threads(&config)));
        let map_file = prepare_map(&config, &links).await?;
        let size = map_file.header().size;
        let path = config.store_path();
        let fail = |source: io::Error| ExportError::Store { path: path.clone(), source };
        let store = FileStore::open_or_create(&path, size).map_err(fail)?;
        Self::assemble(config, links, map_file, Arc::new(store))
    }

    /// The same over any store, which must have the disk's size and, where there is a map already, its content.
    pub async fn lazy_on(
        config: ExportConfig,
        upstream: Upstream,
        store: Arc<dyn Store>,
    ) -> Result<LazyExport, ExportError> {
        let config = ExportConfig { size: Some(store.size()), ..config };
        let map_file = match open_map(&config)? {
            Some(map_file) => map_file,
            None => create_map(&config, store.size())?,
        };
        let links = Arc::new(Links::new(upstream, own_threads(&config)));
        Self::assemble(config, links, map_file, store)
    }

    fn assemble(
        config: ExportConfig,
        links: Arc<Links>,
        map_file: MapFile,
        store: Arc<dyn Store>,
    ) -> Result<LazyExport, ExportError> {
        let block_size = map_file.header().block_size;
        let map_files = MapFiles::in_directory(&config.directory);
        let opened = map_files.open(map_file)?;
        Ok(Self::build(Parts {
            name: config.name.clone(),
            read_only: false,
            disk: Disk::new(store, opened.map, block_size),
            map_file: Some(opened.file),
            map_files: Some(map_files),
            lazy: Some(LazyParts { config, links }),
        }))
    }

    fn build(parts: Parts) -> LazyExport {
        let disk = Arc::new(parts.disk);
        let (size, block_size) = (disk.size(), disk.block_size);
        let local_state = watch::Sender::new(PullState::Complete);
        let (mut fetcher, mut links, mut home, mut returns) = (None, None, None, false);
        if let Some(LazyParts { config, links: begun }) = parts.lazy {
            let order = PullOrder::new(config.order, block_size, size);
            fetcher = Some(Fetcher::new(disk.clone(), order, config.rate, config.background, config.traffic));
            begun.expect(size);
            links = Some(begun);
            (home, returns) = (config.home, config.returns);
            if let (Some(home), Some(fetcher)) = (&home, &fetcher) {
                home.goes_before(fetcher.pull_state());
            }
        }
        let cancel = CancellationToken::new();
        LazyExport {
            inner: Arc::new(Inner {
                name: parts.name,
                read_only: parts.read_only,
                gate: gate(
                    if parts.read_only { GateMode::ReadOnly } else { GateMode::Open },
                    boottime_clock(),
                    fetcher.as_ref(),
                ),
                tracker: Tracker::new(size),
                flusher: Flusher::new(disk.clone(), parts.map_file, parts.map_files.clone()),
                pace: Pace::new(),
                complete: fetcher.as_ref().map_or_else(|| local_state.subscribe(), |fetcher| fetcher.pull_state()),
                _local_state: local_state,
                home,
                disk,
                returns,
                fetcher,
                started: Instant::now(),
                clients: AtomicUsize::new(0),
                disk_reads: Arc::new(Semaphore::new(DISK_READS)),
                holes_looked_for: AtomicBool::new(false),
                links,
                map_files: parts.map_files,
                rate: Arc::default(),
                _cancel_with_the_last: cancel.clone().drop_guard(),
                cancel,
                tasks: TaskTracker::new(),
            }),
        }
    }

    /// Uses another clock for the lease. Only before the export is shared: otherwise it changes nothing.
    pub fn with_clock(mut self, clock: Clock) -> LazyExport {
        if let Some(inner) = Arc::get_mut(&mut self.inner) {
            inner.gate = gate(inner.gate.mode(), clock, inner.fetcher.as_ref());
        }
        self
    }

    /// Serves its clients there. Only before the export is shared: otherwise it changes nothing.
    pub fn with_home(mut self, home: Arc<Home>) -> LazyExport {
        if let Some(inner) = Arc::get_mut(&mut self.inner) {
            inner.home = Some(home);
        }
        self
    }

    /// Who may do what at the moment.
    pub fn gate(&self) -> &Gate {
        &self.inner.gate
    }

    /// In bytes.
    pub fn size(&self) -> u64 {
        self.inner.disk.size()
    }

    /// What is present and dirty.
    pub fn disk(&self) -> &Arc<Disk> {
        &self.inner.disk
    }

    /// Begins to fetch: the demand connection is made, and the background pull runs if it is on. Does nothing when called
    /// again, or for a local image.
    pub fn start(&self) {
        let inner = &self.inner;
        let (Some(fetcher), Some(links)) = (&inner.fetcher, &inner.links) else { return };
        if !inner.tasks.close() {
            return;
        }
        let lanes = inner.cancel.child_token();
        if !fetcher.disk().map.all_present() {
            let demand = lane::run(fetcher.clone(), links.clone(), LaneKind::Demand, lanes.clone()).in_current_span();
            match &inner.home {
                Some(home) => inner.tasks.spawn_on(demand, home.handle()),
                None => inner.tasks.spawn(demand),
            };
            inner
                .tasks
                .spawn(puller::run(fetcher.clone(), links.clone(), inner.returns, lanes.clone()).in_current_span());
        }
        let supervised = Supervised {
            fetcher: fetcher.clone(),
            links: links.clone(),
            flusher: inner.flusher.clone(),
            rate: inner.rate.clone(),
            cancel: inner.cancel.clone(),
            lanes,
        };
        inner.tasks.spawn(supervise(supervised).in_current_span());
    }

    /// Ends the export: requests are refused from now on, tasks end, everything is made durable. Errors are logged; the
    /// live map stays where the durable one could not be written.
    pub async fn shutdown(&self) -> Result<(), Errno> {
        let inner = &self.inner;
        inner.gate.set(GateMode::Closed).await;
        inner.cancel.cancel();
        inner.tasks.close();
        inner.tasks.wait().await;
        if let Some(links) = &inner.links {
            links.forget_early().await;
        }
        inner.flusher.persist().await?;
        if let Some(files) = &inner.map_files {
            // The file stays mapped: a read that is still under way does no harm to it.
            files.retire_live().map_err(|error| {
                tracing::warn!("{error}");
                Errno::EIO
            })?;
        }
        Ok(())
    }

    /// Makes everything durable that was answered or fetched before the call, and the map.
    pub async fn persist(&self) -> Result<(), Errno> {
        self.inner.flusher.persist().await
    }

    /// When the local bytes were last changed by anybody; `None` where nothing tells.
    pub fn mark(&self) -> io::Result<Option<ImageMark>> {
        self.inner.disk.mark()
    }

    /// For how long the request that has waited longest for a missing block has done so.
    pub fn longest_wait(&self) -> Option<Duration> {
        self.inner.fetcher.as_ref()?.faults.longest_wait()
    }

    /// How long requests have waited for missing blocks.
    pub fn fault_waits(&self) -> WaitHistogram {
        self.inner.fetcher.as_ref().map(|fetcher| fetcher.faults.histogram()).unwrap_or_default()
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// The unit of its block map.
    pub fn block_size(&self) -> BlockSize {
        self.inner.disk.block_size
    }

    /// Switches the background pull on or off.
    pub fn set_background(&self, on: bool) {
        if let Some(fetcher) = &self.inner.fetcher {
            fetcher.set_background(on);
        }
    }

    /// Limits the background pull to so many bytes a second from now on.
    pub fn set_rate(&self, rate: Option<u64>) {
        if let Some(fetcher) = &self.inner.fetcher {
            fetcher.set_rate(rate);
        }
    }

    /// How the pull goes; [`PullState::Complete`] once everything is present and durable.
    pub fn complete(&self) -> watch::Receiver<PullState> {
        self.inner.complete.clone()
    }

    /// The figures for people.
    pub fn status(&self) -> DataStatus {
        let inner = &self.inner;
        let (map, size) = (&inner.disk.map, inner.disk.size());
        // The last block may be partial; only "all" must be exact.
        let bytes = |blocks: u64| (blocks * inner.disk.block_size.bytes()).min(size);
        let present_bytes = if map.all_present() { size } else { bytes(map.present_blocks()) };
        let missing_bytes = size - present_bytes;
        let pull_rate = inner.rate.rate();
        let load = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let counters = inner.fetcher.as_ref().map(|fetcher| &fetcher.counters);
        let pull = *inner.complete.borrow();
        DataStatus {
            size,
            block_size: inner.disk.block_size.bytes(),
            present_bytes,
            dirty_bytes: bytes(map.dirty_blocks()),
            missing_bytes,
            pulled_bytes: counters.map_or(0, |c| load(&c.pulled_bytes)),
            skipped_bytes: counters.map_or(0, |c| load(&c.skipped_bytes)),
            demand_fetches: counters.map_or(0, |c| load(&c.demand_fetches)),
            background_fetches: counters.map_or(0, |c| load(&c.background_fetches)),
            pull_rate: if pull == PullState::Complete { 0 } else { pull_rate },
            eta_s: match missing_bytes {
                0 => Some(0),
                missing => missing.checked_div(pull_rate),
            },
            faults: inner.fetcher.as_ref().map(|fetcher| fetcher.faults.summary()).unwrap_or_default(),
            stalled_us: inner.fetcher.as_ref().map_or(0, |fetcher| fetcher.faults.total_us()),
            upstream: inner.links.as_ref().map_or_else(UpstreamStatus::default, |links| links.report.get()),
            pull,
            paused_reason: inner.fetcher.as_ref().and_then(|fetcher| fetcher.store_error()).map(|(why, _)| why),
            clients: inner.clients.load(Ordering::Relaxed),
        }
    }
}

impl LazyExport {
    /// How many requests waited how long for missing blocks, as [`crate::fetch::percentile`] wants it.
    pub fn wait_counts(&self) -> Vec<u64> {
        self.inner.fetcher.as_ref().map(|fetcher| fetcher.faults.counts()).unwrap_or_default()
    }

    /// The map as a picture of at most so many cells. It goes over the whole map: not for a thread that others wait for.
    pub fn overview(&self, cells: usize) -> Overview {
        let inner = &self.inner;
        let (map, block_size) = (&inner.disk.map, inner.disk.block_size);
        let unit = (inner.disk.size(), block_size.bytes());
        match &inner.fetcher {
            Some(fetcher) => {
                let hot = fetcher.with_order(|order| order.hot());
                overview(map, unit, hot.iter().copied(), cells)
            }
            None => {
                let heat = inner.tracker.heat(inner.started.elapsed());
                let hot = heat.into_iter().filter(|(_, score)| *score > 0).map(|(range, _)| block_size.cover(range));
                overview(map, unit, hot, cells)
            }
        }
    }
}

/// A gate that, once it is closed, lets no reader wait for the upstream.
fn gate(mode: GateMode, clock: Clock, fetcher: Option<&Arc<Fetcher>>) -> Gate {
    let gate = Gate::new(mode, clock);
    match fetcher.cloned() {
        Some(fetcher) => gate.when_closed(move || fetcher.forget_readers()),
        None => gate,
    }
}

struct Supervised {
    fetcher: Arc<Fetcher>,
    links: Arc<Links>,
    flusher: Arc<Flusher>,
    rate: Arc<RateMeter>,
    cancel: CancellationToken,
    lanes: CancellationToken,
}

/// Persists the map now and then while blocks arrive, and ends the pull when all are here.
async fn supervise(s: Supervised) {
    let mut tick = tokio::time::interval(Duration::from_secs(1));
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut persisted = Instant::now();
    let mut complete = false;
    loop {
        tokio::select! {
            () = s.cancel.cancelled() => return,
            () = s.fetcher.all_present(), if !complete => complete = true,
            _ = tick.tick() => {
                let map = &s.fetcher.disk().map;
                s.rate.sample(s.fetcher.now(), map.present_blocks() * s.fetcher.disk().block_size.bytes());
            }
        }
        if complete {
            // The upstream is let go only when nothing of it can be lost any more.
            if s.flusher.persist().await.is_ok() {
                s.lanes.cancel();
                s.links.release();
                s.fetcher.set_complete();
                tracing::info!("every block is present and durable, the upstream is not needed any more");
                return;
            }
            tokio::select! {
                () = s.cancel.cancelled() => return,
                _ = tick.tick() => {}
            }
        } else if persisted.elapsed() >= PERSIST_EVERY {
            // An error is logged by the flusher; it is tried again next time.
            let _ = s.flusher.persist().await;
            persisted = Instant::now();
        }
    }
}

/// The name for the threads of its pull, where it has threads of its own.
fn own_threads(config: &ExportConfig) -> Option<String> {
    config.home.is_some().then(|| config.name.clone())
}

fn open_map(config: &ExportConfig) -> Result<Option<MapFile>, ExportError> {
    let opened = MapFile::open(&MapFiles::in_directory(&config.directory).durable)?;
    if let Some(map_file) = &opened {
        map_file.expect(&config.identity, config.size)?;
    }
    Ok(opened)
}

fn create_map(config: &ExportConfig, size: u64) -> Result<MapFile, ExportError> {
    if size > MAX_DISK {
        return Err(ExportError::TooLarge(size));
    }
    let header = Header { size, block_size: config.block_size, identity: config.identity.clone() };
    let files = MapFiles::in_directory(&config.directory);
    // That of a map which somebody took away would be believed: its blocks are not in the new store.
    files.retire_live()?;
    Ok(MapFile::create(&files.durable, &header)?)
}

/// The map of an earlier process, checked against its store; or a new one, for which the store must not hold anything.
async fn prepare_map(config: &ExportConfig, links: &Arc<Links>) -> Result<MapFile, ExportError> {
    let path = config.store_path();
    let fail = |source: io::Error| ExportError::Store { path: path.clone(), source };
    std::fs::create_dir_all(&config.directory).map_err(fail)?;
    let found = match std::fs::metadata(&path) {
        Ok(found) => Some(found),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(fail(error)),
    };
    if let Some(map_file) = open_map(config)? {
        let expected = map_file.header().size;
        match found {
            Some(found) if found.is_file() && found.len() != expected => {
                return Err(ExportError::StoreSize { path: path.clone(), found: found.len(), expected });
            }
            Some(_) => {}
            // A process that died between the two files of a new export leaves a map without a bit.
            None if map_file.is_blank()? && !MapFiles::in_directory(&config.directory).live.exists() => {}
            None => {
                let map = MapFiles::in_directory(&config.directory).durable;
                return Err(ExportError::StoreGone { store: path.clone(), map });
            }
        }
        return Ok(map_file);
    }
    if found.is_some_and(|found| found.is_file() && found.len() > 0) {
        return Err(ExportError::StoreInUse { path: path.clone() });
    }
    let size = match config.size {
        Some(size) => size,
        None => {
            if config.background {
                links.dial_extras_early();
            }
            let links = links.clone();
            let connecting = async move { links.dial_early().await };
            match &config.home {
                Some(home) => home.run(connecting).await?,
                None => connecting.await?,
            }
        }
    };
    create_map(config, size)
}
