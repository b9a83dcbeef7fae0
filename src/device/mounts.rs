//! What is mounted where, from `/proc/self/mountinfo` and /sys.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};

use super::DeviceError;

/// One line of mountinfo.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Major and minor number of the filesystem's device; not the block device's for a filesystem like btrfs.
    pub device: (u64, u64),
    /// Where it is mounted.
    pub directory: PathBuf,
    /// The filesystem's type.
    pub fstype: String,
    /// What was mounted: for a disk filesystem, the block device.
    pub source: PathBuf,
}

/// Where a block device or a partition of it is mounted, in this process's mount namespace.
pub fn mounts_of(device: &Path) -> Result<Vec<PathBuf>, DeviceError> {
    let mut numbers = Vec::new();
    let directory = sysfs_directory(device)?;
    numbers.extend(read_number(&directory.join("dev"))?);
    for entry in list(&directory)? {
        if entry.join("partition").exists() {
            numbers.extend(read_number(&entry.join("dev"))?);
        }
    }
    let found = all()?.into_iter().filter(|mount| numbers.contains(&mount.device) || mount.source == device);
    Ok(found.map(|mount| mount.directory).collect())
}

/// Everything that is mounted in this process's mount namespace.
pub fn all() -> Result<Vec<Mount>, DeviceError> {
    let path = Path::new("/proc/self/mountinfo");
    let text = fs::read(path).map_err(|source| DeviceError::Io { what: "read", path: path.to_owned(), source })?;
    Ok(parse(&text))
}

/// The lines of mountinfo, as bytes: a directory's name need not be text. Lines that have another form are left out.
pub fn parse(text: &[u8]) -> Vec<Mount> {
    text.split(|&byte| byte == b'\n').filter_map(parse_line).collect()
}

/// The block devices that are built on a device.
pub(super) fn holders_of(device: &Path) -> Result<Vec<String>, DeviceError> {
    let directory = sysfs_directory(device)?;
    let mut holders = list(&directory.join("holders"))?;
    for entry in list(&directory)? {
        if entry.join("partition").exists() {
            holders.extend(list(&entry.join("holders"))?);
        }
    }
    Ok(holders.iter().filter_map(|path| path.file_name()).map(|name| name.to_string_lossy().into_owned()).collect())
}

/// The directory of a block device in /sys.
pub(super) fn sysfs_directory(device: &Path) -> Result<PathBuf, DeviceError> {
    let failed = |source| DeviceError::Io { what: "look at", path: device.to_owned(), source };
    let metadata = fs::metadata(device).map_err(failed)?;
    if !metadata.file_type().is_block_device() {
        return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "it is not a block device")));
    }
    Ok(PathBuf::from(format!("/sys/dev/block/{}:{}", major(metadata.rdev()), minor(metadata.rdev()))))
}

fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|&byte| byte == b' ');
    let device = parse_number(fields.nth(2)?)?;
    let directory = unescape(fields.nth(1)?);
    // Optional fields come next, any number of them, up to a dash.
    fields.find(|field| *field == b"-")?;
    let fstype = unescape(fields.next()?).to_string_lossy().into_owned();
    let source = unescape(fields.next()?);
    Some(Mount { device, directory, fstype, source })
}

fn parse_number(text: &[u8]) -> Option<(u64, u64)> {
    let (major, minor) = std::str::from_utf8(text).ok()?.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The kernel writes blanks and backslashes as a backslash and three octal digits.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let code = tail.get(..3).filter(|_| first == b'\\').and_then(octal);
        bytes.push(code.unwrap_or(first));
        rest = if code.is_some() { &tail[3..] } else { tail };
    }
    PathBuf::from(OsString::from_vec(bytes))
}

fn octal(digits: &[u8]) -> Option<u8> {
    u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok()
}

fn read_number(path: &Path) -> Result<Option<(u64, u64)>, DeviceError> {
    match fs::read(path) {
        Ok(text) => Ok(parse_number(&text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(DeviceError::Io { what: "read", path: path.to_owned(), source }),
    }
}

/// The entries of a directory; none if it is not there.
fn list(directory: &Path) -> Result<Vec<PathBuf>, DeviceError> {
    let failed = |source| DeviceError::Io { what: "list", path: directory.to_owned(), source };
    match fs::read_dir(directory) {
        Ok(entries) => entries.map(|entry| entry.map(|entry| entry.path()).map_err(failed)).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(failed(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_with_and_without_optional_fields_and_with_escapes() {
        let text = b"36 35 43:0 / /srv/my\\040disk rw,noatime shared:2 master:1 - ext4 /dev/nbd0 rw\n\
            37 35 0:44 / /back\\134slash\\011tab rw - tmpfs tmp\\012fs rw\n\
            38 35 7:1 /sub /dash - ext4 /dev/loop1 rw\n\
            short line\n\
            39 35 nonsense / /x rw - ext4 /dev/sda rw\n";
        let mount = |device, directory: &str, fstype: &str, source: &str| Mount {
            device,
            directory: PathBuf::from(directory),
            fstype: fstype.to_owned(),
            source: PathBuf::from(source),
        };
        let expected = vec![
            mount((43, 0), "/srv/my disk", "ext4", "/dev/nbd0"),
            mount((0, 44), "/back\\slash\ttab", "tmpfs", "tmp\nfs"),
            mount((7, 1), "/dash", "ext4", "/dev/loop1"),
        ];
        assert_eq!(parse(text), expected);
    }

    #[test]
    fn a_backslash_without_a_code_stays() {
        assert_eq!(unescape(b"a\\9zz\\04"), PathBuf::from("a\\9zz\\04"));
        assert_eq!(unescape(b"a\\777"), PathBuf::from("a\\777"), "no byte has that number");
    }

    #[test]
    fn our_own_mounts_can_be_read() {
        assert!(all().unwrap().iter().any(|mount| mount.directory == Path::new("/")));
    }

    #[test]
    fn a_file_is_no_device() {
        let error = mounts_of(Path::new("/proc/self/mountinfo")).unwrap_err();
        assert!(error.to_string().contains("not a block device"), "{error}");
    }
}
