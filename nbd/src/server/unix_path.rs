//! The path of a Unix socket: its owner's alone from the first moment, taken over from a server that died, and given back
//! at the end.
//!
//! Two servers may start at once on the path of a third that died. So whether somebody listens is asked, and the path
//! replaced, under a lock: a file beside the path, which is there only for that moment.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket};
use nix::sys::stat::{Mode, fchmod};
use tokio::net::UnixListener;

use super::ListenError;
use crate::address::Address;
use crate::limits::SOCKET_LOCK_TIME;

/// Clients that the kernel keeps waiting.
const BACKLOG: i32 = 128;
/// Pause before the lock is tried again.
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// The path of a Unix socket, removed with the listener if it is still the listener's.
pub struct UnixPath {
    path: PathBuf,
    inode: Option<(u64, u64)>,
}

impl Drop for UnixPath {
    fn drop(&mut self) {
        if self.inode.is_some() && inode(&self.path) == self.inode {
            // Nothing depends on it: a socket that stays is replaced by the next server.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn inode(path: &Path) -> Option<(u64, u64)> {
    std::fs::symlink_metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

/// Binds a Unix socket as [`super::Listener::bind`] does; the path goes when the second value is dropped.
///
/// # Errors
/// [`ListenError`].
pub async fn bind_owned_unix(path: &Path) -> Result<(UnixListener, UnixPath), ListenError> {
    let address = Address::Unix(path.into());
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::AddrInUse => ListenError::InUse(address.clone()),
        _ => ListenError::Io { address: address.clone(), source },
    };
    let _lock = PathLock::take(path).await.map_err(failed)?;
    let listener = match bind_unix(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            remove_stale(path, &address)?;
            bind_unix(path)
        }
        bound => bound,
    };
    Ok((listener.map_err(failed)?, UnixPath { inode: inode(path), path: path.into() }))
}

// The mode is 0600 from the first moment: on Linux the new path takes the mode of the unbound socket.
fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    let fd = unbound()?;
    fchmod(&fd, Mode::S_IRUSR | Mode::S_IWUSR)?;
    bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen(&fd, Backlog::new(BACKLOG)?)?;
    UnixListener::from_std(fd.into())
}

fn unbound() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socket(AddressFamily::Unix, SockType::Stream, flags, None)?)
}

fn remove_stale(path: &Path, address: &Address) -> Result<(), ListenError> {
    let failed = |source| ListenError::Io { address: address.clone(), source };
    let is_socket = std::fs::symlink_metadata(path).map_err(failed)?.file_type().is_socket();
    if !is_socket {
        return Err(ListenError::NotASocket(path.to_owned()));
    }
    let asking = unbound().map_err(failed)?;
    let there = UnixAddr::new(path).map_err(|errno| failed(errno.into()))?;
    match connect(asking.as_raw_fd(), &there) {
        Err(Errno::ECONNREFUSED) => {
            tracing::debug!(%address, "a socket without a server is replaced");
            std::fs::remove_file(path).map_err(failed)
        }
        Err(Errno::ENOENT) => Ok(()),
        // A server whose queue is full is a server.
        Ok(()) | Err(Errno::EAGAIN) => Err(ListenError::InUse(address.clone())),
        Err(errno) => Err(failed(errno.into())),
    }
}

/// The lock of a path among the servers of this crate. A server that is killed leaves the file, which does no harm.
struct PathLock {
    path: PathBuf,
    /// Unlocked after the file is gone: who waits for it sees that it is not the path's any more.
    _file: Flock<File>,
}

impl PathLock {
    async fn take(path: &Path) -> io::Result<PathLock> {
        let mut name = path.as_os_str().to_owned();
        name.push(".lock");
        let taking = async {
            loop {
                if let Some(lock) = PathLock::try_take(Path::new(&name))? {
                    return Ok(lock);
                }
                tokio::time::sleep(LOCK_PAUSE).await;
            }
        };
        let held = |_| {
            let why = format!("{} is locked by another server that starts", Path::new(&name).display());
            Err(io::Error::new(io::ErrorKind::TimedOut, why))
        };
        tokio::time::timeout(SOCKET_LOCK_TIME, taking).await.unwrap_or_else(held)
    }

    fn try_take(path: &Path) -> io::Result<Option<PathLock>> {
        let no_link = OFlag::O_NOFOLLOW.bits();
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o600).custom_flags(no_link);
        match Flock::lock(options.open(path)?, FlockArg::LockExclusiveNonblock) {
            Ok(file) => {
                let found = file.metadata()?;
                let ours = inode(path) == Some((found.dev(), found.ino()));
                Ok(ours.then(|| PathLock { path: path.to_owned(), _file: file }))
            }
            Err((_, Errno::EWOULDBLOCK)) => Ok(None),
            Err((_, errno)) => Err(errno.into()),
        }
    }
}

impl Drop for PathLock {
    fn drop(&mut self) {
        // A file that stays is locked by the next server.
        let _ = std::fs::remove_file(&self.path);
    }
}
