//! What a container has written where it does not travel: podman's own layer of it, and podman's `/dev/shm`.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::described::Described;
use crate::container::{ContainerId, Error};

/// How many paths an error names.
const NAMED: usize = 3;

/// What `podman diff --format json` prints.
#[derive(Default, Deserialize)]
struct Diff {
    #[serde(default)]
    changed: Vec<PathBuf>,
    #[serde(default)]
    added: Vec<PathBuf>,
    #[serde(default)]
    deleted: Vec<PathBuf>,
}

/// Refuses a container whose layer has changes, by what podman printed of them; `root` is its root as the host sees it.
pub(super) fn check_layer(id: &ContainerId, found: &Described, diff: &str, root: &Path) -> Result<(), Error> {
    let diff: Diff = serde_json::from_str(diff).map_err(|error| Error::BadAnswer {
        program: "podman".to_owned(),
        what: format!("see what container {id} wrote to its layer"),
        why: error.to_string(),
    })?;
    // A directory counts as changed when a place to mount something was made in it, and that is no change of the container's.
    let is_directory =
        |path: &PathBuf| root.join(path.strip_prefix("/").unwrap_or(path)).symlink_metadata().is_ok_and(|m| m.is_dir());
    let is_for_mount = |path: &PathBuf| found.destinations().any(|destination| destination.starts_with(path));
    let changed = diff.changed.iter().filter(|path| !is_directory(path));
    let changes: Vec<_> =
        changed.chain(diff.added.iter().filter(|path| !is_for_mount(path))).chain(&diff.deleted).collect();
    refuse(
        id,
        &changes,
        "has changed outside of the disk, in a layer that stays on this host",
        "let it write to volumes that are on the disk (--volume) or to memory (--tmpfs), and create it with --read-only; or \
         give it a root on the disk (--rootfs)",
    )
}

/// Refuses a container that has files in podman's `/dev/shm`, which is a directory of the host for criu.
pub(super) fn check_shm(id: &ContainerId, found: &Described) -> Result<(), Error> {
    let entries = std::fs::read_dir(found.shm()).into_iter().flatten().flatten();
    let files: Vec<_> = entries.map(|entry| Path::new("/dev/shm").join(entry.file_name())).collect();
    let files: Vec<_> = files.iter().collect();
    refuse(
        id,
        &files,
        "has files in a /dev/shm that stays on this host",
        "create it with --tmpfs /dev/shm, whose content travels",
    )
}

fn refuse(id: &ContainerId, paths: &[&PathBuf], what: &str, help: &str) -> Result<(), Error> {
    if paths.is_empty() {
        return Ok(());
    }
    let named: Vec<_> = paths.iter().take(NAMED).map(|path| format!("{path:?}")).collect();
    let more = if paths.len() > NAMED { format!(" and {} more", paths.len() - NAMED) } else { String::new() };
    Err(Error::Podman { id: id.to_string(), why: format!("it {what}: {}{more}; {help}", named.join(", ")) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn web(mounts: &str) -> Described {
        let text = include_str!("fixtures/inspect.json").replace("\"Mounts\": []", &format!("\"Mounts\": [{mounts}]"));
        Described::read(&text, &id()).unwrap().unwrap()
    }

    fn id() -> ContainerId {
        ContainerId::new("web").unwrap()
    }

    #[test]
    fn directories_for_mounts_are_no_change_and_files_are() {
        let root = tempfile::tempdir().unwrap();
        for directory in ["etc", "tmp", "srv/data"] {
            std::fs::create_dir_all(root.path().join(directory)).unwrap();
        }
        std::fs::write(root.path().join("etc/passwd"), "").unwrap();
        let found = web(r#"{"Type": "bind", "Source": "/mnt/d", "Destination": "/srv/data", "RW": true}"#);
        let check = |diff: &str| check_layer(&id(), &found, diff, root.path()).map_err(|error| error.to_string());
        // What podman 4.3.1 prints of a container that wrote nothing.
        check("{\n     \"changed\": [\n          \"/etc\"\n     ],\n     \"added\": [\"/srv\", \"/srv/data\"]\n}")
            .unwrap();
        check("{}").unwrap();
        let wrote = check("{\"changed\": [\"/etc\", \"/tmp\"], \"added\": [\"/tmp/x\"]}").unwrap_err();
        assert!(wrote.contains("\"/tmp/x\";") && wrote.contains("--read-only"), "{wrote}");
        assert!(check("{\"changed\": [\"/etc\", \"/etc/passwd\"]}").unwrap_err().contains("/etc/passwd"));
        assert!(check("{\"deleted\": [\"/bin/ls\"]}").is_err());
        assert!(check("{\"added\": [\"/a\\n\", \"/b\", \"/c\", \"/d\"]}").unwrap_err().contains("and 1 more"));
        assert!(check("nothing").unwrap_err().contains("cannot be understood"));
    }

    #[test]
    fn shared_memory_files_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let text = include_str!("fixtures/inspect.json");
        let at = text.find("/scratch/a/store").unwrap();
        let end = at + text[at..].find('"').unwrap();
        let text = text.replace(&text[at..end], &dir.path().display().to_string());
        let found = Described::read(&text, &id()).unwrap().unwrap();
        check_shm(&id(), &found).unwrap();
        std::fs::create_dir(found.shm()).unwrap();
        check_shm(&id(), &found).unwrap();
        std::fs::write(found.shm().join("sem.x"), "").unwrap();
        let error = check_shm(&id(), &found).unwrap_err().to_string();
        assert!(error.contains("/dev/shm/sem.x") && error.contains("--tmpfs"), "{error}");
    }
}
