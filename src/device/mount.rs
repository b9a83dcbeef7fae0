//! Mounts and unmounts filesystems by mount(8) and umount(8), which find out the filesystem's type and run its helpers.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;

use super::DeviceError;
use super::command::Tool;

const MOUNT: Tool = Tool { program: "mount", package: "mount" };
const UMOUNT: Tool = Tool { program: "umount", package: "mount" };

/// Mounts a block device on a directory that exists.
///
/// Without a type mount(8) finds it out. `options` are those of `mount -o`; XFS wants `nouuid` while another mount of the
/// same disk exists on this host. On a lazily filled device this reads through the network, so it takes its time.
pub async fn mount(
    device: &Path,
    directory: &Path,
    fstype: Option<&str>,
    options: &[&str],
    limit: Duration,
) -> Result<(), DeviceError> {
    let mut arguments: Vec<OsString> = Vec::new();
    if let Some(fstype) = fstype {
        arguments.extend(["-t".into(), fstype.into()]);
    }
    if !options.is_empty() {
        arguments.extend(["-o".into(), options.join(",").into()]);
    }
    arguments.extend(["--".into(), device.into(), directory.into()]);
    run(MOUNT, arguments, "mounting", device, limit).await
}

/// Unmounts what is mounted on a directory. Everything is written before it returns.
pub async fn umount(directory: &Path, limit: Duration) -> Result<(), DeviceError> {
    run(UMOUNT, vec!["--".into(), directory.into()], "unmounting", directory, limit).await
}

async fn run(
    tool: Tool,
    arguments: Vec<OsString>,
    what: &'static str,
    path: &Path,
    limit: Duration,
) -> Result<(), DeviceError> {
    let mut command = Command::from(tool.command());
    command.args(&arguments).kill_on_drop(true);
    let too_slow = || DeviceError::TooSlow {
        what,
        path: path.to_owned(),
        limit,
        next: "it may still end by itself; see whether the disk's export answers (lazy-migrate status)",
    };
    let output = timeout(limit, command.output()).await.map_err(|_| too_slow())?;
    let output = output.map_err(|error| tool.not_started(error))?;
    let line = arguments.iter().map(OsString::as_os_str).map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ");
    tool.check(&line, output).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_mount_says_reaches_the_reader() {
        let limit = Duration::from_secs(20);
        let error = umount(Path::new("/no/such/directory"), limit).await.unwrap_err().to_string();
        assert!(error.starts_with("umount -- /no/such/directory failed"), "{error}");
        assert!(error.contains("no mount point specified") || error.contains("not found"), "{error}");
        let error = mount(Path::new("/no/such"), Path::new("/no"), None, &["ro"], limit).await.unwrap_err();
        assert!(error.to_string().starts_with("mount -o ro -- /no/such /no failed"), "{error}");
    }
}
