//! Which containers the restore command made on this host, and in which control groups: what runc keeps in its state
//! directory. It lies on a file system that is empty after a boot, as the groups are.

use std::{
    io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::container::{Cgroup, ContainerId, Error, private_dir};

/// The records of one node, one file a container.
#[derive(Clone, Debug)]
pub(super) struct Records {
    dir: PathBuf,
}

/// A container that was restored here, or was about to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Restored {
    /// The group that it was given.
    pub cgroup: Cgroup,
    /// The directory that stands for its bundle: who asked for it knows it again by that.
    pub bundle: PathBuf,
}

#[derive(Serialize, Deserialize)]
struct Written {
    cgroup: String,
    bundle: PathBuf,
}

impl Records {
    /// In that directory, which is made when it is needed.
    pub fn at(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// The record of a container, if there is one.
    pub fn find(&self, id: &ContainerId) -> Result<Option<Restored>, Error> {
        let file = self.file(id);
        let text = match std::fs::read(&file) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(Error::io("read", &file))?,
        };
        let written: Written =
            serde_json::from_slice(&text).map_err(|e| Error::io("understand", &file)(io::Error::other(e)))?;
        Ok(Some(Restored { cgroup: Cgroup::at(&written.cgroup)?, bundle: written.bundle }))
    }

    /// Whole or not at all: there before anything of the container is.
    pub fn keep(&self, id: &ContainerId, restored: &Restored) -> Result<(), Error> {
        private_dir(&self.dir)?;
        let written = Written { cgroup: restored.cgroup.path().to_owned(), bundle: restored.bundle.clone() };
        let (file, new) = (self.file(id), self.dir.join(format!(".{id}.new")));
        let text = serde_json::to_vec(&written).map_err(|e| Error::io("write", &file)(io::Error::other(e)))?;
        std::fs::write(&new, text).map_err(Error::io("write", &new))?;
        std::fs::rename(&new, &file).map_err(Error::io("write", &file))
    }

    /// Nothing to do when there is none.
    pub fn forget(&self, id: &ContainerId) -> Result<(), Error> {
        match std::fs::remove_file(self.file(id)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", self.file(id))(e)),
            _ => Ok(()),
        }
    }

    fn file(&self, id: &ContainerId) -> PathBuf {
        Path::join(&self.dir, format!("{id}.json"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_kept_replaced_and_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let (records, id) = (Records::at(dir.path().join("hook")), ContainerId::new("web").unwrap());
        assert_eq!(records.find(&id).unwrap(), None);
        for path in ["/one", "/two"] {
            let restored = Restored { cgroup: Cgroup::at(path).unwrap(), bundle: "/state/bundle".into() };
            records.keep(&id, &restored).unwrap();
            assert_eq!(records.find(&id).unwrap(), Some(restored));
        }
        std::fs::write(dir.path().join("hook/web.json"), "{\"cgroup\": \"/../up\", \"bundle\": \"/\"}").unwrap();
        assert!(records.find(&id).is_err(), "a group outside of the tree was taken");
        records.forget(&id).unwrap();
        records.forget(&id).unwrap();
        assert_eq!(records.find(&id).unwrap(), None);
        assert_eq!(std::fs::read_dir(dir.path().join("hook")).unwrap().count(), 0);
    }
}
