//! The node's disks as NBD exports: by name on every address, and those of migrations on the peer port.

use std::sync::Arc;

use nbd::export::{Export, Exports};

use super::disk::Role;
use super::{DiskName, Node};
use crate::migration::phase::SourcePhase;

/// Every disk of the node.
pub(super) struct AllExports(pub(super) Arc<Node>);

impl Exports for AllExports {
    fn find(&self, name: &str) -> Option<Arc<dyn Export>> {
        if name.is_empty() {
            // The default export: the only one, where there is only one.
            let mut disks = self.0.disks();
            return if disks.len() == 1 { disks.pop().map(|disk| Arc::new(disk.export.clone()) as _) } else { None };
        }
        let disk = self.0.disk(&name.parse::<DiskName>().ok()?).ok()?;
        Some(Arc::new(disk.export.clone()))
    }

    fn list(&self) -> Vec<(String, String)> {
        self.0.disks().iter().map(|disk| (disk.name().to_string(), disk.export.info().description)).collect()
    }
}

/// The disks that this node gives away, for the other host alone.
pub(super) struct MigrationExports(pub(super) Arc<Node>);

impl Exports for MigrationExports {
    fn find(&self, name: &str) -> Option<Arc<dyn Export>> {
        let disk = self.0.disk(&name.parse::<DiskName>().ok()?).ok()?;
        match disk.role() {
            Role::Source(source, _) if source.view().record.phase != SourcePhase::Serving => {
                Some(Arc::new(disk.export.clone()))
            }
            _ => None,
        }
    }

    fn list(&self) -> Vec<(String, String)> {
        Vec::new()
    }
}
