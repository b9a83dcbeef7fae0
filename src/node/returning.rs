//! A disk that comes back to a host that gave it away: what this host still has of it is what its store begins with, and
//! only the blocks that were written elsewhere meanwhile are fetched.
//!
//! ```text
//! disks/NAME/before/        while it is not sure that the disk comes back: what is put back if it does not
//!     returning.json        which migration; without it the directory means nothing
//!     disk.json journal map
//! ```
//!
//! The bytes need no copy: nothing is written to the store before the handover, and after it the host that the disk comes
//! from holds every byte of it, until the comparison before the release has shown that this one does.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::disk::Role;
use super::spec::{DiskSpec, Origin};
use super::{Disk, DiskName, Node};
use crate::block_map::codec::Header;
use crate::error::{Failure, Outcome, chain};
use crate::migration::phase::SourcePhase;
use crate::migration::record::{MigrationId, Record};
use crate::peer::PrepareAsk;
use crate::peer::link::PeerAddress;
use crate::store::{MapFile, MapFiles};

/// How long the end of an earlier migration is waited for.
const SETTLE_TIME: Duration = Duration::from_secs(10);
/// Where everything is that would be put back.
const BEFORE: &str = "before";
/// The file that makes it mean something.
const MARK: &str = "returning.json";
const JOURNAL: &str = "journal";
/// What would be put back: the files of a disk that say what it is. The rest (events, history) goes on. The journal goes
/// first and comes back last: while there is none in its place, what is before counts.
const FILES: [&str; 3] = [JOURNAL, "map", "disk.json"];

/// What stands in the mark.
#[derive(Serialize, Deserialize)]
struct Returning {
    /// The one that brings the disk back.
    migration: MigrationId,
    /// Which of the files there were.
    files: Vec<String>,
}

impl Node {
    /// A disk that was given away begins to come back; when that fails, it is what it was.
    pub(super) async fn come_back(
        self: &Arc<Self>,
        disk: &Arc<Disk>,
        ask: &PrepareAsk,
        source: &str,
        from: &PeerAddress,
    ) -> Outcome<Arc<Disk>> {
        let store = reusable(disk, ask).await?;
        let origin = Origin::Migration { from: source.into(), store: Some(store) };
        let spec = DiskSpec::new(disk.name().clone(), ask.size, ask.block_size, origin);
        let ended = disk.end().await;
        let turned = async {
            ended.map_err(|errno| Failure::failed(format!("cannot end {}: {errno}", disk.name())))?;
            // Nobody serves it any more, so this is the last that could have changed it.
            unchanged(disk)?;
            set_aside(&disk.directory, &ask.subject.migration, &spec)?;
            let export = self.open_migration(&spec, from, true).await?;
            self.make(spec, export)
        };
        let turned = turned.await;
        if turned.is_err() {
            self.turn_back(disk).await?;
        }
        turned
    }

    /// A disk that is not coming back after all is what it was before.
    pub(super) async fn turn_back(self: &Arc<Self>, disk: &Arc<Disk>) -> Outcome<()> {
        put_back(&disk.directory)?;
        let spec = DiskSpec::read(&disk.directory)?
            .ok_or_else(|| Failure::failed(format!("{} holds no disk any more", disk.directory.display())))?;
        self.restore_disk(spec, &disk.directory).await
    }
}

/// Whether what this host has of a disk can be the start of its return; where it is.
async fn reusable(disk: &Disk, ask: &PrepareAsk) -> Outcome<PathBuf> {
    let name = disk.name();
    let refused = |why: String| Err(Failure::refused(format!("an export '{name}' is there already, {why}")));
    let Role::Source(source, _) = disk.role() else {
        return refused("and it did not leave this host; remove it first".into());
    };
    // What follows from the release is being done for a moment, also after a restart.
    let mut watch = source.watch();
    let settled = tokio::time::timeout(SETTLE_TIME, watch.wait_for(|view| view.settled)).await.is_ok();
    let view = source.view();
    if view.record.phase != SourcePhase::Released || !settled {
        return refused(format!("and its migration to {} is {}; end that first", view.record.peer, view.record.phase));
    }
    if ask.base.as_ref() != Some(&view.record.migration) || ask.subject.epoch <= view.record.epoch {
        return refused(
            "and it is not what the disk was when it came to the host that offers it, so nothing of it can be used; \
             remove it first, then all of the disk comes"
                .into(),
        );
    }
    if (ask.size, ask.block_size) != (disk.spec.size, disk.spec.block_size) {
        return refused("with another size; remove it first".into());
    }
    if let Some(device) = disk.device.device() {
        return refused(format!("attached to {}; `lazy-migrate detach {name}` first", device.display()));
    }
    let clients = disk.export.status().clients;
    if clients > 0 {
        return refused(format!("and {clients} clients use it; end them first"));
    }
    unchanged(disk)?;
    Ok(disk.spec.origin.store().map_or_else(|| disk.directory.join("disk.img"), Path::to_owned))
}

/// The disk is byte for byte what it was when it was handed over.
fn unchanged(disk: &Disk) -> Outcome<()> {
    let (source, _) = disk.source()?;
    let seal = source.view().record.seal;
    let found =
        disk.export.mark().map_err(|error| Failure::failed(format!("cannot look at {}: {error}", disk.name())))?;
    let why = match seal {
        Some(_) if found == seal => return Ok(()),
        Some(_) => "its image was written to since it left",
        None => "it is on a block device, and nothing tells whether that was written to since it left",
    };
    Err(Failure::refused(format!(
        "an export '{}' is there already, and {why}, so nothing of it can be used; remove it first, then all of the disk \
         comes",
        disk.name()
    )))
}

/// From here on the directory is that of the disk that comes.
fn set_aside(directory: &Path, migration: &MigrationId, spec: &DiskSpec) -> Outcome<()> {
    let before = directory.join(BEFORE);
    let failed = |error: std::io::Error| Failure::failed(format!("cannot set {} aside: {error}", directory.display()));
    forget(directory)?;
    std::fs::create_dir_all(&before).map_err(failed)?;
    let files = FILES.iter().filter(|name| directory.join(name).exists()).map(|name| (*name).to_owned()).collect();
    let mark = Returning { migration: migration.clone(), files };
    crate::files::write_atomically(&before.join(MARK), &serde_json::to_vec(&mark).map_err(Failure::failed)?)
        .and_then(|()| crate::files::sync_parent(&before))
        .map_err(failed)?;
    for name in &mark.files {
        std::fs::rename(directory.join(name), before.join(name)).map_err(failed)?;
    }
    crate::files::sync_parent(&before.join(MARK)).map_err(failed)?;
    // An empty map: what the store holds counts only when the other host has said so.
    let header =
        Header { size: spec.size, block_size: spec.block_size, identity: super::migrations::identity(&spec.name) };
    MapFile::create(&MapFiles::in_directory(directory).durable, &header)
        .map_err(|error| Failure::failed(chain(&error)))?;
    spec.write(directory)
}

/// Whether something would be put back if the disk did not come.
pub(super) fn is_pending(directory: &Path) -> bool {
    directory.join(BEFORE).join(MARK).exists()
}

/// When the node starts: a return that was begun but not recorded is undone; where this host was given the disk, nothing
/// is needed any more of what was before.
pub(super) fn settle(directory: &Path) -> Outcome<()> {
    let Some(mark) = read(directory)? else { return Ok(()) };
    let name = directory.file_name().unwrap_or_default().to_string_lossy();
    let name: DiskName = name.parse().map_err(Failure::failed)?;
    let record = if directory.join(JOURNAL).exists() { super::open_journal(directory, &name)?.1 } else { None };
    match record {
        // Recovery gives it up in order, with what was made for it.
        Some(Record::Destination(record)) if record.migration == mark.migration && !record.owned => Ok(()),
        Some(_) => forget(directory),
        None => put_back(directory),
    }
}

/// It came back: nothing will be put back.
pub(super) fn forget(directory: &Path) -> Outcome<()> {
    let before = directory.join(BEFORE);
    let failed = |error: std::io::Error| Failure::failed(format!("cannot remove {}: {error}", before.display()));
    // First what gives the rest its meaning.
    match std::fs::remove_file(before.join(MARK)) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        removed => removed.and_then(|()| crate::files::sync_parent(&before.join(MARK))).map_err(failed)?,
    }
    super::remove_directory(&before)
}

fn put_back(directory: &Path) -> Outcome<()> {
    let Some(mark) = read(directory)? else { return Ok(()) };
    let before = directory.join(BEFORE);
    let failed = |error: std::io::Error| Failure::failed(format!("cannot put {} back: {error}", directory.display()));
    let remove = |name: &str| match std::fs::remove_file(directory.join(name)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(failed(error)),
        _ => Ok(()),
    };
    let maps = MapFiles::in_directory(directory);
    let journal_is_back = !before.join(JOURNAL).exists() && directory.join(JOURNAL).exists();
    if !journal_is_back {
        // While there is none, a node that starts does all of this again.
        remove(JOURNAL)?;
        crate::files::sync_parent(&maps.durable).map_err(failed)?;
    }
    maps.retire_live().map_err(|error| Failure::failed(chain(&error)))?;
    for name in FILES.iter().rev() {
        let (from, to) = (before.join(name), directory.join(name));
        if from.exists() {
            std::fs::rename(from, to).map_err(failed)?;
        } else if !mark.files.iter().any(|file| file == name) {
            remove(name)?;
        }
    }
    crate::files::sync_parent(&maps.durable).map_err(failed)?;
    forget(directory)
}

fn read(directory: &Path) -> Outcome<Option<Returning>> {
    let path = directory.join(BEFORE).join(MARK);
    let json = match std::fs::read(&path) {
        Ok(json) => json,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Failure::failed(format!("cannot read {}: {error}", path.display()))),
    };
    serde_json::from_slice(&json)
        .map(Some)
        .map_err(|error| Failure::failed(format!("{} cannot be used: {error}; nothing was changed", path.display())))
}
