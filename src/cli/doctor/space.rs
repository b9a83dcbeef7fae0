//! Room for what comes: the stores of disks, and the checkpoints of containers.

use std::path::{Path, PathBuf};

use nix::sys::statfs::{TMPFS_MAGIC, statfs};

use super::finding::Finding;
use crate::cli::answers::bytes;
use crate::control::status::NodeStatus;

/// Less than this, and a checkpoint may not find room.
const LOW: u64 = 1 << 30;

/// What is known of the place where the node keeps things.
pub(super) struct Facts {
    /// Where; none when nobody said and no node answers.
    pub(super) directory: Option<PathBuf>,
    /// Its file system, or why that cannot be told.
    pub(super) place: Result<Place, String>,
    /// What is still to come to the disks of the node.
    pub(super) missing_bytes: u64,
}

/// A file system.
pub(super) struct Place {
    /// Free for this user.
    pub(super) free_bytes: u64,
    /// Files that can still be made; none where the file system has no such limit.
    pub(super) free_files: Option<u64>,
    /// Whether it is gone after a boot.
    pub(super) in_memory: bool,
}

impl Facts {
    /// Asks the file system.
    pub(super) fn gather(directory: Option<PathBuf>, node: Option<&NodeStatus>) -> Self {
        let place = directory.as_deref().map_or(Err(String::new()), ask);
        let missing = node.map_or(0, |node| node.disks.iter().map(|disk| disk.missing_bytes).sum());
        Self { directory, place, missing_bytes: missing }
    }
}

/// The file system of a directory, or of the nearest one above it that is there.
fn ask(directory: &Path) -> Result<Place, String> {
    let absolute = std::path::absolute(directory).map_err(|error| error.to_string())?;
    let there = absolute.ancestors().find(|path| path.is_dir()).unwrap_or(Path::new("/"));
    let found = statfs(there).map_err(|error| error.to_string())?;
    Ok(Place {
        free_bytes: found.blocks_available().saturating_mul(found.block_size() as u64),
        free_files: (found.files() > 0).then(|| found.files_free()),
        in_memory: found.filesystem_type() == TMPFS_MAGIC,
    })
}

/// Whether there is room.
pub(super) fn verdict(facts: &Facts) -> Finding {
    const CHECK: &str = "free-space";
    let Some(directory) = facts.directory.as_deref().map(Path::display) else {
        return Finding::warn(
            CHECK,
            "not looked at",
            "no node answers, so where it keeps its disks is not known",
            "say --state-dir DIR, or start the node first",
        );
    };
    let place = match &facts.place {
        Ok(place) => place,
        Err(why) => {
            let advice = "see that the directory can be read, and run this again";
            return Finding::fail(
                CHECK,
                format!("cannot look at {directory} ({why})"),
                "nothing could be kept there",
                advice,
            );
        }
    };
    let found = format!("{} free at {directory}", bytes(place.free_bytes));
    if place.in_memory {
        return Finding::fail(
            CHECK,
            format!("{directory} is in memory (tmpfs)"),
            "who owns a disk must be known after a power loss too, and the disk must be there",
            "start the node with a --state-dir on a real disk",
        );
    }
    if place.free_files == Some(0) {
        return Finding::fail(
            CHECK,
            format!("no inode free at {directory}"),
            "no file can be made",
            "remove small files",
        );
    }
    if place.free_bytes < facts.missing_bytes {
        return Finding::fail(
            CHECK,
            format!("{found}, {} still to come", bytes(facts.missing_bytes)),
            "the pull stands still, and writers with it, when the store is full",
            "make room; the pull goes on by itself",
        );
    }
    if place.free_bytes - facts.missing_bytes < LOW {
        return Finding::warn(
            CHECK,
            found,
            "a container's checkpoint, and what it writes, need room too",
            "make room before the next migration",
        );
    }
    Finding::ok(CHECK, found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::finding::Level;

    fn level(place: Place, missing_bytes: u64) -> Level {
        verdict(&Facts { directory: Some("/var/lib/x".into()), place: Ok(place), missing_bytes }).level
    }

    fn place(free_bytes: u64) -> Place {
        Place { free_bytes, free_files: Some(1000), in_memory: false }
    }

    #[test]
    fn what_is_to_come_has_to_fit() {
        assert_eq!(level(place(20 << 30), 0), Level::Ok);
        assert_eq!(level(place(20 << 30), 21 << 30), Level::Fail);
        assert_eq!(level(place(20 << 30), (20 << 30) - 1), Level::Warn);
        assert_eq!(level(place(LOW - 1), 0), Level::Warn);
    }

    #[test]
    fn memory_and_file_systems_without_inodes_are_no_place() {
        assert_eq!(level(Place { in_memory: true, ..place(20 << 30) }, 0), Level::Fail);
        assert_eq!(level(Place { free_files: Some(0), ..place(20 << 30) }, 0), Level::Fail);
        assert_eq!(level(Place { free_files: None, ..place(20 << 30) }, 0), Level::Ok);
        assert_eq!(verdict(&Facts { directory: None, place: Err(String::new()), missing_bytes: 0 }).level, Level::Warn);
    }

    #[test]
    fn a_directory_that_is_yet_to_be_made_has_the_room_of_its_parent() {
        let parent = tempfile::tempdir().unwrap();
        assert!(ask(&parent.path().join("to/be/made")).is_ok());
    }
}
