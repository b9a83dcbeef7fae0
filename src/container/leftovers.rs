//! What runc and criu leave behind when they are ended in the middle of a restore, and how it is removed safely.
//!
//! runc has the container's root mounted in its own state directory for the time of a restore. Whoever removes that
//! directory with all that is in it (runc itself does) removes the content of the container's disk. So mounts go first,
//! and nothing here removes a directory that is not empty.

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
};

use nix::mount::{MntFlags, umount2};

use super::Error;

/// Unmounts everything that is mounted below `dir`.
pub(crate) fn unmount_below(dir: &Path) -> Result<(), Error> {
    unmount(dir, |_| true)
}

/// Frees the id of a container that runc had begun to make: its state directory is there, without a state in it, so that
/// runc knows no such container and yet refuses the id. Whatever has a state is left alone.
pub(crate) fn forget_half_made(state_dir: &Path) -> Result<(), Error> {
    if state_dir.join("state.json").exists() {
        return Ok(());
    }
    unmount_below(state_dir)?;
    remove_flat(state_dir)
}

/// Unmounts the control group trees that criu had put together below `dir`, and removes their directories.
pub(crate) fn remove_yards(dir: &Path) -> Result<(), Error> {
    let is_yard = |name: &str| name.starts_with(".criu.cgyard.");
    unmount(dir, is_yard)?;
    let entries = match std::fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(Error::io("read", dir))?,
    };
    for entry in entries.flatten().filter(|e| is_yard(&e.file_name().to_string_lossy())) {
        std::fs::remove_dir(entry.path()).map_err(Error::io("remove", entry.path()))?;
    }
    Ok(())
}

/// Removes the directories in `/tmp` on which criu had built the container's mounts, in a mount namespace that is gone.
/// Its log names them; they are empty here.
pub(crate) fn remove_mount_roots(log: &Path) -> Result<(), Error> {
    let text = match std::fs::read_to_string(log) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(Error::io("read", log))?,
    };
    for root in mount_roots(&text) {
        let root = Path::new("/tmp").join(root);
        match std::fs::remove_dir(&root) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(Error::io("remove", root)(e)),
            _ => {}
        }
    }
    Ok(())
}

/// Removes a directory with the files and the empty directories in it, but nothing deeper. One that is gone is removed.
pub(crate) fn remove_flat(dir: &Path) -> Result<(), Error> {
    let entries = match std::fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(Error::io("read", dir))?,
    };
    for entry in entries {
        let entry = entry.map_err(Error::io("read", dir))?;
        let path = entry.path();
        let is_dir = entry.file_type().map_err(Error::io("look at", &path))?.is_dir();
        let removed = if is_dir { std::fs::remove_dir(&path) } else { std::fs::remove_file(&path) };
        removed.map_err(Error::io("remove", path))?;
    }
    std::fs::remove_dir(dir).map_err(Error::io("remove", dir))
}

/// Unmounts what is mounted below `dir`, where the first name below it is wanted.
fn unmount(dir: &Path, wanted: impl Fn(&str) -> bool) -> Result<(), Error> {
    let file = "/proc/self/mountinfo";
    let mounts = std::fs::read_to_string(file).map_err(Error::io("read", file))?;
    for point in mounts_below(&mounts, dir, wanted) {
        // Detached, so that a task that is about to die does not hold it.
        let flags = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
        umount2(&point, flags).map_err(|errno| Error::io("unmount", &point)(errno.into()))?;
    }
    Ok(())
}

/// The mount points below `dir`, the innermost first.
fn mounts_below(mountinfo: &str, dir: &Path, wanted: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let points = mountinfo.lines().filter_map(|line| line.split(' ').nth(4)).map(unescape);
    let mut below: Vec<PathBuf> = points
        .filter(|point| {
            let first = point.strip_prefix(dir).ok().and_then(|rest| rest.components().next());
            first.is_some_and(|name| wanted(&name.as_os_str().to_string_lossy()))
        })
        .collect();
    below.reverse();
    below
}

/// A path as the kernel writes it in mount tables: white space and backslashes are `\\` and three octal digits.
fn unescape(path: &str) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;
    let mut out = Vec::with_capacity(path.len());
    let mut rest = path.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let octal = after.get(..3).and_then(|d| u8::from_str_radix(std::str::from_utf8(d).ok()?, 8).ok());
        match octal {
            Some(escaped) if byte == b'\\' => {
                out.push(escaped);
                rest = &after[3..];
            }
            _ => {
                out.push(byte);
                rest = after;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(out))
}

/// The names `.criu.mntns.*` that a log mentions as below `/tmp`, each once.
fn mount_roots(log: &str) -> BTreeSet<&str> {
    let names = log.split("/tmp/").skip(1).filter(|rest| rest.starts_with(".criu.mntns."));
    names
        .map(|rest| {
            let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || c == '.')).unwrap_or(rest.len());
            &rest[..end]
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "1 0 0:1 / / rw - ext4 a rw\n\
        2 1 0:2 / /w/.criu.cgyard.Ab1 rw - tmpfs none rw\n\
        3 2 0:3 / /w/.criu.cgyard.Ab1/unified rw - cgroup2 cgroup rw\n\
        4 1 0:4 / /other/.criu.cgyard.Cd2 rw - tmpfs none rw\n\
        5 1 0:5 / /w/my\\040data rw - ext4 b rw\n\
        6 1 0:6 / /ww rw - ext4 b rw\n";

    #[test]
    fn mounts_are_found_below_the_directory_only_innermost_first() {
        let yards = mounts_below(MOUNTS, Path::new("/w"), |name| name.starts_with(".criu.cgyard."));
        assert_eq!(yards, [Path::new("/w/.criu.cgyard.Ab1/unified"), Path::new("/w/.criu.cgyard.Ab1")]);
        let all = mounts_below(MOUNTS, Path::new("/w"), |_| true);
        assert_eq!(all.len(), 3);
        assert_eq!(all[0], Path::new("/w/my data"));
        assert_eq!(mounts_below(MOUNTS, Path::new("/ww"), |_| true), Vec::<PathBuf>::new());
    }

    #[test]
    fn mount_roots_are_taken_from_the_log_and_lead_nowhere_else() {
        let log = "mnt: Will mount 62 @ /tmp/.criu.mntns.TVoT7Q/mnt-0062 /sys\n\
            again /tmp/.criu.mntns.TVoT7Q /tmp/.criu.mntns.x1../../etc /tmp/other /var/.criu.mntns.no\n";
        let names: Vec<_> = mount_roots(log).into_iter().collect();
        assert_eq!(names, [".criu.mntns.TVoT7Q", ".criu.mntns.x1.."]);
    }

    #[test]
    fn only_a_state_directory_without_a_state_is_forgotten() {
        let root = tempfile::tempdir().unwrap();
        let (half, whole) = (root.path().join("half"), root.path().join("whole"));
        std::fs::create_dir_all(half.join("criu-root")).unwrap();
        std::fs::create_dir(&whole).unwrap();
        std::fs::write(whole.join("state.json"), "{}").unwrap();
        for dir in [&half, &half, &whole] {
            forget_half_made(dir).unwrap();
        }
        let left: Vec<_> = std::fs::read_dir(root.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["whole"]);
    }

    #[test]
    fn what_is_deeper_is_never_removed() {
        let root = tempfile::tempdir().unwrap();
        let disk = root.path().join("half/criu-root");
        std::fs::create_dir_all(&disk).unwrap();
        std::fs::write(disk.join("data"), "kept").unwrap();
        assert!(forget_half_made(&root.path().join("half")).is_err());
        assert_eq!(std::fs::read(disk.join("data")).unwrap(), b"kept");
    }
}
