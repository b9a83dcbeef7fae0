//! The node's disks as NBD exports: by name on every address, and those of migrations on the peer port.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use nbd::export::{Answer, Export, ExportInfo, Exports, Extent, Promise, ReadAnswer, ReadReply, ZeroMode};
use nbd::tls::Identity;
use nbd::wire::Errno;

use super::disk::Role;
use super::{Disk, DiskName, Node, Seen};
use crate::export::LazyExport;
use crate::migration::phase::SourcePhase;
use crate::peer::link::Caller;

/// The node's disks, as far as a client may see them.
pub(super) struct SeenExports {
    node: Arc<Node>,
    seen: Seen,
}

impl SeenExports {
    /// For who can be trusted: it came by a private address.
    pub(super) fn all(node: Arc<Node>) -> Self {
        Self { node, seen: Seen::All }
    }

    fn disks(&self) -> Vec<Arc<Disk>> {
        let mut disks = self.node.disks();
        disks.retain(|disk| self.seen.has(disk.name()));
        disks
    }
}

impl Exports for SeenExports {
    fn seen_by(&self, client: &Identity) -> Option<Arc<dyn Exports>> {
        let seen = self.node.config.clients.of(client);
        if seen == Seen::Only(BTreeSet::new()) {
            tracing::warn!(client = client.names().join(" "), "an NBD client sees nothing: no --allow-client names it");
        }
        Some(Arc::new(SeenExports { node: self.node.clone(), seen }))
    }

    fn find(&self, name: &str) -> Option<Arc<dyn Export>> {
        if name.is_empty() {
            // The default export: the only one, where there is only one.
            let mut disks = self.disks();
            return if disks.len() == 1 { disks.pop().map(|disk| Arc::new(disk.export.clone()) as _) } else { None };
        }
        let name = name.parse::<DiskName>().ok().filter(|name| self.seen.has(name))?;
        let disk = self.node.disk(&name).ok()?;
        Some(Arc::new(disk.export.clone()))
    }

    fn list(&self) -> Vec<(String, String)> {
        self.disks().iter().map(|disk| (disk.name().to_string(), disk.export.info().description)).collect()
    }
}

/// The disks that this node gives away, for the host alone that each is given to.
pub(super) struct MigrationExports {
    pub(super) node: Arc<Node>,
    pub(super) caller: Caller,
}

impl Exports for MigrationExports {
    fn find(&self, name: &str) -> Option<Arc<dyn Export>> {
        let disk = self.node.disk(&name.parse::<DiskName>().ok()?).ok()?;
        let Role::Source(source, _) = disk.role() else { return None };
        let record = source.view().record;
        if record.phase == SourcePhase::Serving {
            return None;
        }
        if let Err(failure) = self.caller.must_be(record.peer_name.as_deref()) {
            tracing::warn!(disk = %disk.name(), %failure, "its blocks are not for this peer");
            return None;
        }
        Some(Arc::new(ReadOnly(disk.export.clone())))
    }

    fn list(&self) -> Vec<(String, String)> {
        Vec::new()
    }
}

/// What the other host sees of a disk: it never writes there, whatever the gate would allow.
struct ReadOnly(LazyExport);

const REFUSED: Answer<()> = Answer::Now(Err(Errno::EPERM));

impl Export for ReadOnly {
    fn info(&self) -> ExportInfo {
        ExportInfo { read_only: true, ..self.0.info() }
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> ReadAnswer {
        self.0.read(offset, buffer)
    }

    fn promise(&self, offset: u64, length: usize, reply: ReadReply) -> Promise {
        self.0.promise(offset, length, reply)
    }

    fn forget(&self, promise: Promise) {
        self.0.forget(promise);
    }

    fn write(&self, _: u64, _: Bytes, _: bool) -> Answer<()> {
        REFUSED
    }

    fn flush(&self) -> Answer<()> {
        self.0.flush()
    }

    fn trim(&self, _: u64, _: u64, _: bool) -> Answer<()> {
        REFUSED
    }

    fn write_zeroes(&self, _: u64, _: u64, _: ZeroMode, _: bool) -> Answer<()> {
        REFUSED
    }

    fn cache(&self, offset: u64, length: u64) -> Answer<()> {
        self.0.cache(offset, length)
    }

    fn block_status(&self, context: &str, offset: u64, length: u64, max_extents: usize) -> Answer<Vec<Extent>> {
        self.0.block_status(context, offset, length, max_extents)
    }

    fn client_entered(self: Arc<Self>) -> Box<dyn Send + Sync> {
        Arc::new(self.0.clone()).client_entered()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::MemoryStore;
    use crate::units::ByteRange;

    #[test]
    fn nothing_of_a_disk_can_be_changed_over_the_peer_port() {
        let store = Arc::new(MemoryStore::new(8192));
        let disk = LazyExport::local_on("web", store, false).unwrap();
        let seen = ReadOnly(disk.clone());
        assert!(seen.info().read_only && !disk.info().read_only);
        let range = ByteRange::new(0, 4096);
        let answers = [
            seen.write(0, Bytes::from_static(&[1; 4096]), false),
            seen.trim(0, range.len(), false),
            seen.write_zeroes(0, range.len(), ZeroMode::default(), false),
        ];
        assert!(answers.iter().all(|answer| matches!(answer, Answer::Now(Err(Errno::EPERM)))));
        let mut bytes = [9; 4096];
        assert!(matches!(seen.read(0, &mut bytes), ReadAnswer::Now(Ok(()))));
        assert_eq!(bytes, [0; 4096]);
    }
}
