//! Freezes a mounted file system, so that everything that was written has reached the disk and nothing more is.
//!
//! Both calls may be repeated: freezing what is frozen and thawing what is not are done already.

use std::{
    fs::File,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    time::{Duration, Instant},
};

use nix::errno::Errno;

use super::Error;

/// The ioctl has not answered.
const PENDING: u8 = 0;
/// It has, and its caller knows.
const DONE: u8 = 1;
/// Its caller has given up: if it succeeds after all, the file system is thawed at once.
const ABANDONED: u8 = 2;

/// A round of [`settle`] this short leaves little for the freeze.
const SETTLED: Duration = Duration::from_millis(20);
/// After so many rounds the container writes faster than they can follow.
const SETTLE_ROUNDS: u32 = 8;

/// Has the file system at `mount` write out what it holds back, again and again until little is left: [`freeze`] waits for
/// that while nobody may run. Writers go on meanwhile. Gives up after `limit`, which is no failure.
pub async fn settle(mount: &Path, limit: Duration) -> Result<(), Error> {
    let begun = Instant::now();
    for _ in 0..SETTLE_ROUNDS {
        let (path, round) = (mount.to_owned(), Instant::now());
        let work = tokio::task::spawn_blocking(move || {
            let dir = open(&path)?;
            nix::unistd::syncfs(dir).map_err(io_error("write out the file system at", &path))
        });
        match tokio::time::timeout(limit.saturating_sub(begun.elapsed()), work).await {
            Ok(joined) => finished("write out the file system at", mount, joined)?,
            Err(_) => break,
        }
        if round.elapsed() <= SETTLED {
            break;
        }
    }
    Ok(())
}

/// Freezes the file system that is mounted at `mount`: flushes it, and holds all writers until [`thaw`].
///
/// A disk that does not take the data would hold this for good: after `limit` the call gives up, and the file system is
/// thawed as soon as the kernel's freeze returns. The same happens when the future is dropped.
pub async fn freeze(mount: &Path, limit: Duration) -> Result<(), Error> {
    let state = Arc::new(AtomicU8::new(PENDING));
    let abandon = Abandon(state.clone());
    let path = mount.to_owned();
    let work = tokio::task::spawn_blocking(move || {
        let dir = open(&path)?;
        let result = answered(raw::fifreeze_fs(&dir), Errno::EBUSY);
        let known = state.compare_exchange(PENDING, DONE, Ordering::AcqRel, Ordering::Acquire).is_ok();
        if result.is_ok()
            && !known
            && let Err(error) = answered(raw::fithaw_fs(&dir), Errno::EINVAL)
        {
            tracing::error!(%error, "a file system stays frozen after a freeze that came too late");
        }
        result.map_err(io_error("freeze the file system at", &path))
    });
    match tokio::time::timeout(limit, work).await {
        Ok(joined) => finished("freeze the file system at", mount, joined),
        // The freeze may have come in this very moment: then it counts.
        Err(_) if abandon.now() => Err(Error::QuiesceTimedOut { mount: mount.to_owned(), limit }),
        Err(_) => Ok(()),
    }
}

/// Lets the file system at `mount` go on.
pub async fn thaw(mount: &Path) -> Result<(), Error> {
    let path = mount.to_owned();
    let work = tokio::task::spawn_blocking(move || {
        let dir = open(&path)?;
        answered(raw::fithaw_fs(&dir), Errno::EINVAL).map_err(io_error("thaw the file system at", &path))
    });
    finished("thaw the file system at", mount, work.await)
}

/// Marks a freeze as unwanted, unless it is done.
struct Abandon(Arc<AtomicU8>);

impl Abandon {
    /// Whether the freeze was still pending.
    fn now(&self) -> bool {
        self.0.compare_exchange(PENDING, ABANDONED, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }
}

impl Drop for Abandon {
    fn drop(&mut self) {
        self.now();
    }
}

/// Blocks: the disk may be far away, and this very process may be what serves it.
fn open(mount: &Path) -> Result<File, Error> {
    File::open(mount).map_err(Error::io("open", mount))
}

/// `already` is the kernel's word for "it is so already".
fn answered(result: nix::Result<()>, already: Errno) -> nix::Result<()> {
    match result {
        Err(e) if e == already => Ok(()),
        other => other,
    }
}

fn finished(
    what: &'static str,
    mount: &Path,
    joined: Result<Result<(), Error>, tokio::task::JoinError>,
) -> Result<(), Error> {
    joined.map_err(|join| Error::Io { what, path: PathBuf::from(mount), source: join.into() })?
}

fn io_error(what: &'static str, mount: &Path) -> impl FnOnce(Errno) -> Error {
    move |errno| Error::Io { what, path: PathBuf::from(mount), source: errno.into() }
}

mod raw {
    //! The two ioctls of `linux/fs.h`.
    use super::{AsRawFd, File};

    nix::ioctl_readwrite!(fifreeze, b'X', 119, nix::libc::c_int);
    nix::ioctl_readwrite!(fithaw, b'X', 120, nix::libc::c_int);

    #[allow(unsafe_code)]
    pub fn fifreeze_fs(dir: &File) -> nix::Result<()> {
        let mut unused = 0;
        // SAFETY: the descriptor is open for the call, and the kernel ignores the argument, which is valid anyway.
        unsafe { fifreeze(dir.as_raw_fd(), &mut unused) }.map(drop)
    }

    #[allow(unsafe_code)]
    pub fn fithaw_fs(dir: &File) -> nix::Result<()> {
        let mut unused = 0;
        // SAFETY: as above.
        unsafe { fithaw(dir.as_raw_fd(), &mut unused) }.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_so_already_is_done() {
        assert_eq!(answered(Err(Errno::EBUSY), Errno::EBUSY), Ok(()));
        assert_eq!(answered(Err(Errno::EIO), Errno::EBUSY), Err(Errno::EIO));
        assert_eq!(answered(Ok(()), Errno::EBUSY), Ok(()));
    }

    #[test]
    fn a_freeze_is_either_done_or_abandoned() {
        let done = Abandon(Arc::new(AtomicU8::new(DONE)));
        assert!(!done.now());
        let pending = Abandon(Arc::new(AtomicU8::new(PENDING)));
        assert!(pending.now() && !pending.now());
        assert_eq!(pending.0.load(Ordering::Acquire), ABANDONED);
    }

    #[tokio::test]
    async fn a_file_system_settles_and_one_that_is_not_there_does_not() {
        // In memory, where nothing has to be written out.
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        settle(directory.path(), Duration::from_secs(30)).await.unwrap();
        settle(directory.path(), Duration::ZERO).await.unwrap();
        let error = settle(Path::new("/nonexistent/mnt"), Duration::from_secs(1)).await.unwrap_err();
        assert!(error.to_string().starts_with("cannot open /nonexistent/mnt: "), "{error}");
    }

    #[tokio::test]
    async fn a_missing_mount_point_is_named() {
        let error = freeze(Path::new("/nonexistent/mnt"), Duration::from_secs(1)).await.unwrap_err();
        assert!(error.to_string().starts_with("cannot open /nonexistent/mnt: "), "{error}");
    }
}
