//! Writes the frames of a checkpoint below a directory, and answers for the whole at the end.
//!
//! The peer is trusted with a container's memory but not with this host: paths cannot leave the directory (the kernel
//! refuses to follow any link below it), and sizes and numbers have limits. The links from a dump to the pre-dump before it
//! are made here, by number: no link's target comes over the wire.

use std::{
    fs::File,
    io,
    os::{
        fd::OwnedFd,
        unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    sys::stat::{Mode, mkdirat},
    unistd::{UnlinkatFlags, symlinkat, unlinkat},
};
use tokio::sync::mpsc;

use super::{
    Error, absolute,
    image_stream::{Frame, ImagePath, MAX_DATA},
    images::MAX_FILES,
    rounds,
};

/// What a peer may make this host store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The most files.
    pub files: usize,
    /// The most that all files may hold together, in bytes; holes count.
    pub bytes: u64,
    /// Whether the end waits until all is durable. The source keeps its copy until release, and a container whose host
    /// was restarted is gone anyway, so a receiver that is in a hurry may leave it out.
    pub durable: bool,
}

impl Default for Limits {
    /// 64 GiB, durable.
    fn default() -> Self {
        Self { files: MAX_FILES, bytes: 64 << 30, durable: true }
    }
}

/// Why a checkpoint was not received. What was written so far is of no use.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// A file could not be written.
    #[error(transparent)]
    Io(#[from] Error),
    /// The frames do not follow from each other.
    #[error("the peer's checkpoint stream makes no sense: {0}")]
    Nonsense(String),
    /// More than this host allows.
    #[error("the peer's checkpoint is larger than this host allows ({what}: {limit})")]
    TooLarge {
        /// Files, bytes or rounds.
        what: &'static str,
        /// How many are allowed.
        limit: u64,
    },
    /// What arrived is not what was sent.
    #[error("the checkpoint file {path} arrived damaged: {why}; migrate again")]
    Damaged {
        /// Which file.
        path: ImagePath,
        /// What differs.
        why: String,
    },
    /// The stream ended too early.
    #[error("the peer's checkpoint stream ended before it was whole: the link was lost, or the dump failed there")]
    CutOff,
    /// The receiver's thread was lost.
    #[error("the checkpoint cannot be received: {0}")]
    Lost(#[from] tokio::task::JoinError),
}

/// What was received.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Received {
    /// Files in the directory.
    pub files: u32,
    /// Their sizes together, in bytes.
    pub bytes: u64,
}

/// Builds an image directory from frames.
#[derive(Debug)]
pub struct ImageReceiver {
    root: PathBuf,
    dir: File,
    limits: Limits,
    files: Vec<Incoming>,
    /// The sizes of all files together.
    total: u64,
    /// Data bytes so far. Each byte is sent at most twice: while the dump runs, and in the last pass.
    arrived: u64,
    /// The file that was written last, since the next frame is most likely for it too.
    current: Option<(u32, File)>,
    /// How many rounds of a pre-dump have begun.
    rounds: u32,
}

#[derive(Debug)]
struct Incoming {
    path: ImagePath,
    size: u64,
    sum: Option<u32>,
}

impl ImageReceiver {
    /// Makes `dir` with mode 0700; it must not exist, so that nothing is mixed with an earlier checkpoint.
    pub fn create(dir: &Path, limits: Limits) -> Result<Self, Error> {
        let root = absolute(dir)?;
        std::fs::DirBuilder::new().mode(0o700).create(&root).map_err(Error::io("create", &root))?;
        let flags = nix::libc::O_DIRECTORY | nix::libc::O_NOFOLLOW;
        let dir = File::options().read(true).custom_flags(flags).open(&root).map_err(Error::io("open", &root))?;
        Ok(Self { root, dir, limits, files: Vec::new(), total: 0, arrived: 0, current: None, rounds: 0 })
    }

    /// Applies frames until the directory is whole.
    pub async fn run(mut self, mut frames: mpsc::Receiver<Frame>) -> Result<Received, ReceiveError> {
        let work = move || {
            while let Some(frame) = frames.blocking_recv() {
                if let Some(received) = self.apply(frame)? {
                    return Ok(received);
                }
            }
            Err(ReceiveError::CutOff)
        };
        tokio::task::spawn_blocking(work).await?
    }

    /// Applies one frame (blocking). Answers what was received when it was the last one and everything is right.
    pub fn apply(&mut self, frame: Frame) -> Result<Option<Received>, ReceiveError> {
        match frame {
            Frame::File { id, path } => self.add(id, path)?,
            Frame::Data { id, offset, bytes } => self.write(id, offset, &bytes)?,
            Frame::Truncate { id, size } => self.truncate(id, size)?,
            Frame::Sum { id, size, crc32 } => self.check(id, size, crc32)?,
            Frame::Round { number } => self.round(number)?,
            Frame::End { files } => return self.finish(files).map(Some),
        }
        Ok(None)
    }

    fn round(&mut self, number: u32) -> Result<(), ReceiveError> {
        if number > rounds::MAX_ROUNDS {
            return Err(ReceiveError::TooLarge { what: "rounds", limit: rounds::MAX_ROUNDS.into() });
        }
        if number != self.rounds + 1 {
            return Err(nonsense(format!("round {number} came after {} rounds", self.rounds)));
        }
        let path = rounds::directory(number);
        // A file that came before its round has made it; that is no transfer of ours.
        let made = mkdirat(&self.dir, path.as_str(), Mode::S_IRWXU).map_err(io::Error::from);
        made.map_err(Error::io("create", self.root.join(&path)))?;
        self.rounds = number;
        match rounds::parent_of_round(number) {
            Some(target) => self.link(&path, &target),
            None => Ok(()),
        }
    }

    /// Makes the link in a directory; a file of its name is an error.
    fn link(&self, directory: &str, target: &str) -> Result<(), ReceiveError> {
        let made = self.dir_at(directory).and_then(|dir| Ok(symlinkat(target, dir, rounds::LINK)?));
        Ok(made.map_err(Error::io("create", self.root.join(directory).join(rounds::LINK)))?)
    }

    fn add(&mut self, id: u32, path: ImagePath) -> Result<(), ReceiveError> {
        if id as usize != self.files.len() {
            return Err(nonsense(format!("file number {id} came after {} files", self.files.len())));
        }
        if self.files.len() >= self.limits.files {
            return Err(ReceiveError::TooLarge { what: "files", limit: self.limits.files as u64 });
        }
        if self.rounds > 0 && path.as_str().split('/').any(|name| name == rounds::LINK) {
            return Err(nonsense(format!("{path} has the name of a link that is made here")));
        }
        for parent in path.parents() {
            self.make_dir(parent)?;
        }
        let file = self.open(path.as_str(), OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL, 0o600);
        let file = file.map_err(Error::io("create", self.root.join(path.as_str())))?;
        self.current = Some((id, file));
        self.files.push(Incoming { path, size: 0, sum: None });
        Ok(())
    }

    fn write(&mut self, id: u32, offset: u64, bytes: &[u8]) -> Result<(), ReceiveError> {
        let too_large = ReceiveError::TooLarge { what: "bytes", limit: self.limits.bytes };
        let (size, path) = self.known(id)?;
        let Some(end) = offset.checked_add(bytes.len() as u64) else { return Err(too_large) };
        let total = self.total - size + size.max(end);
        self.arrived += bytes.len() as u64;
        // A file that shrinks and grows again may be sent more often; that is not worth a larger allowance.
        if end > self.limits.bytes || total > self.limits.bytes || self.arrived > self.limits.bytes.saturating_mul(2) {
            return Err(too_large);
        }
        let target = self.file(id)?;
        target.write_all_at(bytes, offset).map_err(Error::io("write", path))?;
        self.files[id as usize].size = size.max(end);
        self.total = total;
        Ok(())
    }

    fn truncate(&mut self, id: u32, to: u64) -> Result<(), ReceiveError> {
        let (size, path) = self.known(id)?;
        if to > size {
            return Err(nonsense(format!("file number {id} has {size} bytes and was to be cut to {to}")));
        }
        self.file(id)?.set_len(to).map_err(Error::io("shorten", path))?;
        self.files[id as usize].size = to;
        self.total -= size - to;
        Ok(())
    }

    /// Reads the file back: what counts is what criu will find.
    fn check(&mut self, id: u32, size: u64, crc32: u32) -> Result<(), ReceiveError> {
        let (_, path) = self.known(id)?;
        let read = |e| ReceiveError::from(Error::io("read", &path)(e));
        let durable = self.limits.durable;
        let file = self.file(id)?;
        let mut hasher = crc32fast::Hasher::new();
        let mut buffer = vec![0; MAX_DATA];
        let mut at = 0;
        loop {
            match file.read_at(&mut buffer, at) {
                Ok(0) => break,
                Ok(n) => {
                    hasher.update(&buffer[..n]);
                    at += n as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(read(e)),
            }
        }
        if durable {
            file.sync_all().map_err(Error::io("make durable", &path))?;
        }
        let damaged = |why| ReceiveError::Damaged { path: self.files[id as usize].path.clone(), why };
        if at != size {
            return Err(damaged(format!("it has {at} bytes instead of {size}")));
        }
        let sum = hasher.finalize();
        if sum != crc32 {
            return Err(damaged(format!("its checksum is {sum:08x} instead of {crc32:08x}")));
        }
        self.files[id as usize].sum = Some(sum);
        Ok(())
    }

    fn finish(&mut self, files: u32) -> Result<Received, ReceiveError> {
        self.current = None;
        let whole = self.files.iter().filter(|f| f.sum.is_some()).count();
        if whole != files as usize {
            return Err(nonsense(format!("it ends with {whole} whole files instead of {files}")));
        }
        // Files that criu had only for a while.
        for gone in self.files.iter().filter(|f| f.sum.is_none()) {
            let path = self.root.join(gone.path.as_str());
            let (parent, name) = gone.path.as_str().rsplit_once('/').unwrap_or(("", gone.path.as_str()));
            let removed = self.dir_at(parent).and_then(|dir| Ok(unlinkat(dir, name, UnlinkatFlags::NoRemoveDir)?));
            removed.map_err(Error::io("remove", path))?;
        }
        if let Some(target) = rounds::parent_of_dump(self.rounds) {
            self.link("", &target)?;
        }
        if self.limits.durable {
            for dir in self.dirs() {
                let synced = self.dir_at(&dir).and_then(|d| d.sync_all());
                synced.map_err(Error::io("make durable", self.root.join(&dir)))?;
            }
        }
        let bytes = self.files.iter().filter(|f| f.sum.is_some()).map(|f| f.size).sum();
        Ok(Received { files, bytes })
    }

    /// The size and the full path of a file that may still change.
    fn known(&self, id: u32) -> Result<(u64, PathBuf), ReceiveError> {
        match self.files.get(id as usize) {
            None => Err(nonsense(format!("file number {id} was never named"))),
            Some(file) if file.sum.is_some() => Err(nonsense(format!("{} changes after its checksum", file.path))),
            Some(file) => Ok((file.size, self.root.join(file.path.as_str()))),
        }
    }

    fn file(&mut self, id: u32) -> Result<&File, ReceiveError> {
        let kept = self.current.take().filter(|(current, _)| *current == id);
        let file = match kept {
            Some((_, file)) => file,
            None => {
                let (_, path) = self.known(id)?;
                let relative = self.files[id as usize].path.as_str();
                self.open(relative, OFlag::O_RDWR, 0).map_err(Error::io("open", path))?
            }
        };
        Ok(&self.current.insert((id, file)).1)
    }

    /// All directories that were made, the innermost first, and the image directory itself.
    fn dirs(&self) -> Vec<String> {
        let mut dirs: Vec<String> = self.files.iter().flat_map(|f| f.path.parents().map(str::to_owned)).collect();
        dirs.sort();
        dirs.dedup();
        dirs.reverse();
        dirs.push(String::new());
        dirs
    }

    fn make_dir(&self, path: &str) -> Result<(), Error> {
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        let made = self.dir_at(parent).and_then(|dir| match mkdirat(dir, name, Mode::S_IRWXU) {
            Err(Errno::EEXIST) => Ok(()),
            other => Ok(other?),
        });
        made.map_err(Error::io("create", self.root.join(path)))
    }

    /// A directory below the root, or the root for an empty path.
    fn dir_at(&self, path: &str) -> io::Result<File> {
        if path.is_empty() {
            return self.dir.try_clone();
        }
        self.open(path, OFlag::O_RDONLY | OFlag::O_DIRECTORY, 0)
    }

    /// Opens below the root; the kernel follows no link and leaves neither the root nor its file system.
    fn open(&self, path: &str, flags: OFlag, mode: u32) -> io::Result<File> {
        let how = OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW)
            .mode(Mode::from_bits_truncate(mode))
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_XDEV);
        let fd: OwnedFd = openat2(&self.dir, path, how)?;
        Ok(File::from(fd))
    }
}

fn nonsense(why: String) -> ReceiveError {
    ReceiveError::Nonsense(why)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use proptest::prelude::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn receiver(limits: Limits) -> (tempfile::TempDir, PathBuf, ImageReceiver) {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("images");
        let receiver = ImageReceiver::create(&root, limits).unwrap();
        (dir, root, receiver)
    }

    fn file(id: u32, path: &str) -> Frame {
        Frame::File { id, path: ImagePath::new(path).unwrap() }
    }

    fn data(id: u32, offset: u64, bytes: &'static [u8]) -> Frame {
        Frame::Data { id, offset, bytes: Bytes::from_static(bytes) }
    }

    fn sum(id: u32, content: &[u8]) -> Frame {
        Frame::Sum { id, size: content.len() as u64, crc32: crc32fast::hash(content) }
    }

    #[test]
    fn a_directory_is_private_new_and_whole() {
        let (_dir, root, mut receiver) = receiver(Limits::default());
        assert!(ImageReceiver::create(&root, Limits::default()).is_err(), "an existing directory was taken");
        for frame in [file(0, "a/b/c"), data(0, 0, b"hello"), file(1, "gone"), data(0, 1, b"u"), file(2, "empty")] {
            assert_eq!(receiver.apply(frame).unwrap(), None);
        }
        receiver.apply(Frame::Truncate { id: 0, size: 4 }).unwrap();
        receiver.apply(sum(0, b"hull")).unwrap();
        receiver.apply(sum(2, b"")).unwrap();
        let received = receiver.apply(Frame::End { files: 2 }).unwrap();
        assert_eq!(received, Some(Received { files: 2, bytes: 4 }));
        assert_eq!(std::fs::read(root.join("a/b/c")).unwrap(), b"hull");
        assert!(!root.join("gone").exists());
        for path in [root.clone(), root.join("a")] {
            assert_eq!(std::fs::metadata(path).unwrap().permissions().mode() & 0o077, 0);
        }
    }

    #[test]
    fn links_below_the_directory_are_not_followed() {
        let (dir, root, mut receiver) = receiver(Limits::default());
        let outside = dir.path().join("outside");
        std::fs::create_dir(&outside).unwrap();
        std::fs::write(outside.join("mine"), "kept").unwrap();
        symlink(&outside, root.join("sub")).unwrap();
        assert!(receiver.apply(file(0, "sub/new")).is_err());
        symlink(outside.join("made"), root.join("link")).unwrap();
        assert!(receiver.apply(file(0, "link")).is_err());
        // Replaced behind our back, after it was made.
        receiver.apply(file(0, "pages")).unwrap();
        receiver.apply(file(1, "other")).unwrap();
        std::fs::remove_file(root.join("pages")).unwrap();
        symlink(outside.join("mine"), root.join("pages")).unwrap();
        assert!(receiver.apply(data(0, 0, b"overwritten")).is_err());
        assert_eq!(std::fs::read(outside.join("mine")).unwrap(), b"kept");
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 1);
    }

    #[test]
    fn damage_is_found_at_the_latest_at_the_end() {
        let (_dir, root, mut receiver) = receiver(Limits::default());
        receiver.apply(file(0, "x")).unwrap();
        receiver.apply(data(0, 0, b"abc")).unwrap();
        std::fs::write(root.join("x"), "abd").unwrap();
        let error = receiver.apply(sum(0, b"abc")).unwrap_err();
        assert!(matches!(error, ReceiveError::Damaged { .. }), "{error}");
        let error = receiver.apply(sum(0, b"abdd")).unwrap_err();
        assert!(error.to_string().contains("3 bytes instead of 4"), "{error}");
        assert!(matches!(receiver.apply(Frame::End { files: 1 }), Err(ReceiveError::Nonsense(_))));
    }

    #[test]
    fn limits_hold() {
        let limits = Limits { files: 2, bytes: 10, durable: false };
        let (_dir, root, mut first) = receiver(limits);
        first.apply(file(0, "a")).unwrap();
        first.apply(file(1, "b")).unwrap();
        assert!(matches!(first.apply(file(2, "c")), Err(ReceiveError::TooLarge { what: "files", .. })));
        assert!(first.apply(data(0, 8, b"abc")).is_err());
        assert!(first.apply(data(0, u64::MAX, b"abc")).is_err());
        first.apply(data(0, 4, b"abc")).unwrap();
        assert!(first.apply(data(1, 0, b"abcd")).is_err());
        assert_eq!(std::fs::metadata(root.join("a")).unwrap().len(), 7);
        // The same bytes again and again.
        let (_dir, _root, mut second) = receiver(limits);
        second.apply(file(0, "a")).unwrap();
        let again = (0..).take_while(|_| second.apply(data(0, 0, b"abcdefghij")).is_ok()).count();
        assert_eq!(again, 2);
    }

    #[test]
    fn rounds_make_a_chain_of_links_that_lead_back_to_the_first() {
        let (_dir, root, mut receiver) = receiver(Limits::default());
        for round in 1..=3 {
            receiver.apply(Frame::Round { number: round }).unwrap();
            receiver.apply(file(round - 1, &format!("pre-{round}/pages-1.img"))).unwrap();
            receiver.apply(sum(round - 1, b"")).unwrap();
        }
        receiver.apply(file(3, "core-1.img")).unwrap();
        receiver.apply(sum(3, b"")).unwrap();
        assert_eq!(receiver.apply(Frame::End { files: 4 }).unwrap(), Some(Received { files: 4, bytes: 0 }));
        let link = |path: &str| std::fs::read_link(root.join(path)).ok();
        assert_eq!(link("parent"), Some("pre-3".into()));
        assert_eq!(link("pre-3/parent"), Some("../pre-2".into()));
        assert_eq!(link("pre-2/parent"), Some("../pre-1".into()));
        assert!(!root.join("pre-1/parent").exists());
        assert!(root.join("parent/parent/parent/pages-1.img").is_file());
        assert_eq!(std::fs::metadata(root.join("pre-1")).unwrap().permissions().mode() & 0o077, 0);
    }

    #[test]
    fn a_peer_cannot_make_the_links_of_rounds_nor_put_anything_in_their_place() {
        let hostile = |frames: &[Frame]| {
            let (_dir, root, mut receiver) = receiver(Limits::default());
            let refused = frames.iter().map(|frame| receiver.apply(frame.clone())).find_map(Result::err);
            let refused = refused.unwrap_or_else(|| panic!("taken: {frames:?}"));
            // Whatever came before: what is there is no link that leads out, and no file behind one.
            assert!(std::fs::read_link(root.join("parent")).is_err(), "{refused}");
            refused.to_string()
        };
        let round = |number| Frame::Round { number };
        hostile(&[round(0)]);
        hostile(&[round(2)]);
        hostile(&[round(1), round(1)]);
        hostile(&[round(1), round(3)]);
        hostile(&(1..=rounds::MAX_ROUNDS + 1).map(round).collect::<Vec<_>>());
        assert!(hostile(&[round(rounds::MAX_ROUNDS + 1)]).contains("rounds: 8"));
        // In the place of a link, through a link, in the place of a round.
        for path in ["parent", "pre-1/parent", "pre-2/parent", "pre-2/parent/pages-1.img", "parent/x", "a/parent"] {
            assert!(hostile(&[round(1), round(2), file(0, path)]).contains("made here"), "{path}");
        }
        hostile(&[file(0, "pre-1"), round(1)]);
        hostile(&[round(1), file(0, "pre-2/pages-1.img"), round(2)]);
        hostile(&[file(0, "parent"), sum(0, b""), round(1), Frame::End { files: 1 }]);
        hostile(&[file(0, "parent/x"), sum(0, b""), round(1), Frame::End { files: 1 }]);
    }

    #[test]
    fn all_rounds_share_one_limit() {
        let (_dir, _root, mut receiver) = receiver(Limits { files: 8, bytes: 10, durable: false });
        receiver.apply(Frame::Round { number: 1 }).unwrap();
        receiver.apply(file(0, "pre-1/pages-1.img")).unwrap();
        receiver.apply(data(0, 0, b"abcdef")).unwrap();
        receiver.apply(Frame::Round { number: 2 }).unwrap();
        receiver.apply(file(1, "pre-2/pages-1.img")).unwrap();
        let error = receiver.apply(data(1, 0, b"abcdef")).unwrap_err();
        assert!(matches!(error, ReceiveError::TooLarge { what: "bytes", .. }), "{error}");
    }

    #[test]
    fn frames_that_do_not_follow_are_refused() {
        let (_dir, _root, mut receiver) = receiver(Limits::default());
        for bad in [file(1, "a"), data(0, 0, b"x"), sum(0, b""), Frame::End { files: 1 }] {
            assert!(matches!(receiver.apply(bad.clone()), Err(ReceiveError::Nonsense(_))), "{bad:?}");
        }
        receiver.apply(file(0, "a")).unwrap();
        assert!(receiver.apply(Frame::Truncate { id: 0, size: 1 }).is_err());
        assert!(receiver.apply(file(1, "a")).is_err(), "a path was taken twice");
        receiver.apply(sum(0, b"")).unwrap();
        assert!(receiver.apply(data(0, 0, b"late")).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn writes_and_cuts_in_any_order_give_what_a_model_gives(
            steps in proptest::collection::vec((0u64..5000, proptest::collection::vec(any::<u8>(), 1..900), any::<bool>()), 0..24)
        ) {
            let (_dir, root, mut receiver) = receiver(Limits { durable: false, ..Limits::default() });
            receiver.apply(file(0, "d/f")).unwrap();
            let mut model: Vec<u8> = Vec::new();
            for (at, bytes, cut) in steps {
                if cut {
                    let size = at.min(model.len() as u64);
                    model.truncate(size as usize);
                    receiver.apply(Frame::Truncate { id: 0, size }).unwrap();
                } else {
                    let end = at as usize + bytes.len();
                    model.resize(model.len().max(end), 0);
                    model[at as usize..end].copy_from_slice(&bytes);
                    receiver.apply(Frame::Data { id: 0, offset: at, bytes: bytes.into() }).unwrap();
                }
            }
            receiver.apply(sum(0, &model)).unwrap();
            let received = receiver.apply(Frame::End { files: 1 }).unwrap();
            prop_assert_eq!(received, Some(Received { files: 1, bytes: model.len() as u64 }));
            prop_assert_eq!(std::fs::read(root.join("d/f")).unwrap(), model);
        }
    }
}
