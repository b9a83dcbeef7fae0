//! `verify`: compares with the source when an operator asks.

use super::disk::Role;
use super::{DiskName, Node};
use crate::control::api::VerifyReport;
use crate::error::{Failure, Outcome};
use crate::migration::driver;
use crate::migration::phase::DestinationPhase;
use crate::peer::Subject;

impl Node {
    /// Compares; on the destination.
    pub async fn verify(&self, name: &DiskName) -> Outcome<VerifyReport> {
        let disk = self.disk(name)?;
        let Role::Destination(destination) = disk.role() else {
            return Err(Failure::refused(format!(
                "{name} did not come from another node; verify is done on a migration's destination"
            )));
        };
        let record = destination.view().record;
        if !matches!(record.phase, DestinationPhase::Active | DestinationPhase::Complete) {
            return Err(Failure::refused(format!("{name} is {} here; there is nothing to compare", record.phase)));
        }
        let subject = Subject { disk: name.to_string(), migration: record.migration, epoch: record.epoch };
        driver::verify(&disk.export, destination.peer(), &subject).await
    }
}
