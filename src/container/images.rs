//! Follows a checkpoint's image directory while criu writes it, and makes frames of it.
//!
//! While the dump runs, whole chunks at the growing end of files are sent, which is nearly all of the memory pages.
//! criu goes back to some files (it patches headers) and removes others, so after the dump every file is read once more
//! and what differs from the chunks that were sent is sent again, together with all that was too small to be sent before.
//! A round of a pre-dump ([`rounds`]) is sent the same way, to its own end, and is not looked at again after that.

use std::{
    collections::HashMap,
    fs::File,
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{
    Error, absolute,
    image_stream::{BadFrame, Frame, ImagePath, MAX_DATA, MAX_DEPTH},
    rounds,
};

/// How often the directory is looked at while the dump runs and there is nothing to send.
const LOOK: Duration = Duration::from_millis(5);
/// The most files that a checkpoint may have.
pub const MAX_FILES: usize = 65_536;

/// Why a checkpoint could not be followed.
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    /// A file could not be read.
    #[error(transparent)]
    Io(#[from] Error),
    /// A file has a name that the receiver would refuse.
    #[error("the checkpoint cannot be sent: {0}")]
    Name(#[from] BadFrame),
    /// Neither a file nor a directory: following a link could send any file of this host.
    #[error("the checkpoint cannot be sent: {path} is neither a file nor a directory")]
    Kind {
        /// Where it is.
        path: PathBuf,
    },
    /// More files than a checkpoint may have.
    #[error("the checkpoint cannot be sent: it has more than {MAX_FILES} files")]
    TooMany,
    /// Nobody takes the frames any more.
    #[error("the checkpoint cannot be sent: the link does not take it any more")]
    Closed,
    /// The follower's thread was lost.
    #[error("the checkpoint cannot be sent: {0}")]
    Lost(#[from] tokio::task::JoinError),
}

/// What was sent of a dump, without the rounds before it, or of a round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Followed {
    /// Its files.
    pub files: u32,
    /// Their sizes together, in bytes.
    pub bytes: u64,
    /// Bytes that went over the link, more than `bytes` where a chunk had to be sent again.
    pub sent: u64,
    /// Of `sent`, the bytes that were sent before the dump had ended.
    pub early: u64,
}

/// Sends an image directory as frames.
#[derive(Debug)]
pub struct ImageFollower {
    dir: PathBuf,
    files: HashMap<ImagePath, Sent>,
    frames: mpsc::Sender<Frame>,
    done: Followed,
    /// How many files were sent whole, rounds included.
    whole: u32,
    /// How many rounds were sent.
    rounds: u32,
    /// The round that is being sent; none: the dump itself.
    round: Option<u32>,
}

/// What the receiver has of a file.
#[derive(Debug)]
struct Sent {
    id: u32,
    size: u64,
    /// The CRC-32 of each chunk of [`MAX_DATA`] bytes; the last one may be shorter.
    chunks: Vec<u32>,
}

impl ImageFollower {
    /// For the directory `dir`, which need not exist before the dump ends.
    pub fn new(dir: &Path, frames: mpsc::Sender<Frame>) -> Result<Self, Error> {
        let (files, done) = (HashMap::new(), Followed::default());
        Ok(Self { dir: absolute(dir)?, files, frames, done, whole: 0, rounds: 0, round: None })
    }

    /// Sends frames until `dumped` is cancelled, then the rest and [`Frame::End`]. `dumped` says that the dump has ended
    /// **well**; after a bad one, close the channel's other end: then this ends with [`FollowError::Closed`].
    pub async fn run(mut self, dumped: CancellationToken) -> Result<Followed, FollowError> {
        let work = move || {
            self.follow_until(&dumped)?;
            self.finish()?;
            self.send(Frame::End { files: self.whole })?;
            Ok(self.done)
        };
        tokio::task::spawn_blocking(work).await?
    }

    /// The same for the next round of a pre-dump, which does not end the transfer. Returns when all of it is on its way.
    pub async fn round(mut self, dumped: CancellationToken) -> Result<(Self, Followed), FollowError> {
        let work = move || {
            self.round = Some(self.rounds + 1);
            self.send(Frame::Round { number: self.rounds + 1 })?;
            self.follow_until(&dumped)?;
            self.finish()?;
            self.rounds += 1;
            self.round = None;
            // What is whole is not compared again.
            self.files.values_mut().for_each(|sent| sent.chunks = Vec::new());
            let done = std::mem::take(&mut self.done);
            Ok((self, done))
        };
        tokio::task::spawn_blocking(work).await?
    }

    fn follow_until(&mut self, dumped: &CancellationToken) -> Result<(), FollowError> {
        while !dumped.is_cancelled() {
            if self.frames.is_closed() {
                return Err(FollowError::Closed);
            }
            if self.follow()? == 0 {
                std::thread::sleep(LOOK);
            }
        }
        self.done.early = self.done.sent;
        Ok(())
    }

    /// Sends the whole chunks that have been added since the last time; answers how many.
    fn follow(&mut self) -> Result<usize, FollowError> {
        let mut chunks = 0;
        let mut buffer = vec![0; MAX_DATA];
        for path in self.list()? {
            let Some(file) = self.open(&path)? else { continue };
            let size = file.metadata().map_err(self.unreadable(&path))?.len();
            let from = self.files.get(&path).map_or(0, |sent| sent.size);
            if size < from + MAX_DATA as u64 {
                continue;
            }
            let id = self.id(&path)?;
            let mut at = from;
            while size >= at + MAX_DATA as u64 {
                if read_chunk(&file, at, &mut buffer).map_err(self.unreadable(&path))? < MAX_DATA {
                    break;
                }
                self.send_chunk(&path, id, at, &buffer)?;
                at += MAX_DATA as u64;
                chunks += 1;
            }
        }
        Ok(chunks)
    }

    /// The last pass: everything whose content is not what was sent, and sums.
    fn finish(&mut self) -> Result<(), FollowError> {
        let mut buffer = vec![0; MAX_DATA];
        for path in self.list()? {
            let Some(file) = self.open(&path)? else { continue };
            let id = self.id(&path)?;
            let mut whole = crc32fast::Hasher::new();
            let mut at = 0;
            loop {
                let len = read_chunk(&file, at, &mut buffer).map_err(self.unreadable(&path))?;
                if len == 0 {
                    break;
                }
                let bytes = &buffer[..len];
                let mut part = crc32fast::Hasher::new();
                part.update(bytes);
                whole.combine(&part);
                if !self.has_chunk(&path, at, len, part.finalize()) {
                    self.send_chunk(&path, id, at, bytes)?;
                }
                at += len as u64;
                if len < MAX_DATA {
                    break;
                }
            }
            if self.files.get(&path).is_some_and(|sent| sent.size > at) {
                self.send(Frame::Truncate { id, size: at })?;
            }
            self.done.files += 1;
            self.done.bytes += at;
            self.whole += 1;
            self.send(Frame::Sum { id, size: at, crc32: whole.finalize() })?;
        }
        Ok(())
    }

    /// Whether the receiver has exactly these bytes there.
    fn has_chunk(&self, path: &ImagePath, at: u64, len: usize, crc32: u32) -> bool {
        let Some(sent) = self.files.get(path) else { return false };
        // Only whole chunks are sent before the last pass, so a shorter one was never sent.
        len == MAX_DATA && sent.chunks.get((at / MAX_DATA as u64) as usize) == Some(&crc32)
    }

    fn send_chunk(&mut self, path: &ImagePath, id: u32, at: u64, bytes: &[u8]) -> Result<(), FollowError> {
        if let Some(sent) = self.files.get_mut(path) {
            sent.size = sent.size.max(at + bytes.len() as u64);
            // In the last pass an entry may be there already; nobody asks for it again.
            if sent.chunks.len() as u64 == at / MAX_DATA as u64 {
                sent.chunks.push(crc32fast::hash(bytes));
            }
        }
        self.done.sent += bytes.len() as u64;
        self.send(Frame::Data { id, offset: at, bytes: Bytes::copy_from_slice(bytes) })
    }

    /// The file's number; it is announced if it has none yet.
    fn id(&mut self, path: &ImagePath) -> Result<u32, FollowError> {
        if let Some(sent) = self.files.get(path) {
            return Ok(sent.id);
        }
        if self.files.len() >= MAX_FILES {
            return Err(FollowError::TooMany);
        }
        let id = self.files.len() as u32;
        self.files.insert(path.clone(), Sent { id, size: 0, chunks: Vec::new() });
        self.send(Frame::File { id, path: path.clone() })?;
        Ok(id)
    }

    fn send(&self, frame: Frame) -> Result<(), FollowError> {
        self.frames.blocking_send(frame).map_err(|_| FollowError::Closed)
    }

    /// A file may be removed between being listed and being opened.
    fn open(&self, path: &ImagePath) -> Result<Option<File>, FollowError> {
        let flags = nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK;
        match File::options().read(true).custom_flags(flags).open(self.dir.join(path.as_str())) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            other => other.map(Some).map_err(self.unreadable(path)),
        }
    }

    fn unreadable(&self, path: &ImagePath) -> impl FnOnce(io::Error) -> FollowError {
        let path = self.dir.join(path.as_str());
        move |source| Error::io("read", path)(source).into()
    }

    /// All files of the dump, or of the round that is being sent, in a fixed order.
    fn list(&self) -> Result<Vec<ImagePath>, FollowError> {
        let mut found = Vec::new();
        match self.round {
            Some(round) => self.list_below(&rounds::directory(round), 2, &mut found)?,
            None => self.list_below("", 1, &mut found)?,
        }
        found.sort();
        Ok(found)
    }

    /// What does not travel with the dump: the rounds before it, and the link to them, which the receiver makes itself.
    fn is_known(&self, path: &str, kind: std::fs::FileType) -> bool {
        let (own, target) = match self.round {
            Some(round) => (format!("{}/{}", rounds::directory(round), rounds::LINK), rounds::parent_of_round(round)),
            None => (rounds::LINK.to_owned(), rounds::parent_of_dump(self.rounds)),
        };
        if kind.is_symlink() {
            let points = std::fs::read_link(self.dir.join(path)).ok();
            return path == own && points.is_some() && points == target.map(PathBuf::from);
        }
        kind.is_dir() && self.round.is_none() && (1..=self.rounds).any(|round| path == rounds::directory(round))
    }

    fn list_below(&self, below: &str, depth: usize, found: &mut Vec<ImagePath>) -> Result<(), FollowError> {
        let dir = self.dir.join(below);
        let entries = match std::fs::read_dir(&dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other.map_err(Error::io("read", &dir))?,
        };
        for entry in entries {
            let entry = entry.map_err(Error::io("read", &dir))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let path = if below.is_empty() { name } else { format!("{below}/{name}") };
            let kind = match entry.file_type() {
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                other => other.map_err(Error::io("look at", entry.path()))?,
            };
            if self.is_known(&path, kind) {
                continue;
            }
            if kind.is_file() {
                found.push(ImagePath::new(&path)?);
            } else if kind.is_dir() && depth < MAX_DEPTH {
                self.list_below(&path, depth + 1, found)?;
            } else {
                return Err(FollowError::Kind { path: entry.path() });
            }
            if found.len() > MAX_FILES {
                return Err(FollowError::TooMany);
            }
        }
        Ok(())
    }
}

/// Fills the buffer from `at`; answers less than its length only at the end of the file.
fn read_chunk(file: &File, at: u64, buffer: &mut [u8]) -> io::Result<usize> {
    let mut len = 0;
    while len < buffer.len() {
        match file.read_at(&mut buffer[len..], at + len as u64) {
            Ok(0) => break,
            Ok(n) => len += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::image_receiver::{ImageReceiver, Limits, ReceiveError};
    use crate::container::image_stream::QUEUE;
    use rand::{RngExt, SeedableRng, rngs::StdRng};

    fn noise(rng: &mut StdRng, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        rng.fill(&mut bytes[..]);
        bytes
    }

    fn content(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
        let mut all = Vec::new();
        let mut dirs = vec![dir.to_owned()];
        while let Some(at) = dirs.pop() {
            for entry in std::fs::read_dir(at).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    dirs.push(path);
                } else {
                    all.push((path.strip_prefix(dir).unwrap().to_owned(), std::fs::read(&path).unwrap()));
                }
            }
        }
        all.sort();
        all
    }

    /// Does what criu does, and more: appends in odd pieces, goes back, makes, shortens and removes files.
    fn write_like_criu(dir: &Path, seed: u64, step: &mut dyn FnMut()) {
        let mut rng = StdRng::seed_from_u64(seed);
        std::fs::create_dir(dir.join("sub")).unwrap();
        let names = ["pages-1.img", "pages-2.img", "core-1.img", "sub/tmpfs.img", "gone.img", "empty.img"];
        let files: Vec<File> = names
            .iter()
            .map(|n| {
                File::options()
                    .create(true)
                    .append(false)
                    .truncate(true)
                    .write(true)
                    .read(true)
                    .open(dir.join(n))
                    .unwrap()
            })
            .collect();
        for _ in 0..60 {
            let which = rng.random_range(0..5);
            let size = files[which].metadata().unwrap().len();
            match rng.random_range(0..10) {
                0 if size > 0 => {
                    let len = rng.random_range(1..=size.min(5000)) as usize;
                    let at = rng.random_range(0..=size - len as u64);
                    files[which].write_all_at(&noise(&mut rng, len), at).unwrap();
                }
                1 => files[which].set_len(size / 2).unwrap(),
                _ => {
                    let len = rng.random_range(1..2 * MAX_DATA);
                    files[which].write_all_at(&noise(&mut rng, len), size).unwrap();
                }
            }
            step();
        }
        files[0].write_all_at(b"patched header", 8).unwrap();
        std::fs::remove_file(dir.join("gone.img")).unwrap();
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_directory_that_grows_and_changes_arrives_as_it_ended() {
        for seed in 0..12 {
            let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            let (tx, mut rx) = mpsc::channel(QUEUE);
            let (relay, received) = mpsc::channel(QUEUE);
            let dumped = CancellationToken::new();
            let follower = tokio::spawn(ImageFollower::new(from.path(), tx).unwrap().run(dumped.clone()));
            let target = to.path().join("images");
            let receiver = tokio::spawn(ImageReceiver::create(&target, Limits::default()).unwrap().run(received));
            // Over the codec, as on the link.
            let link = tokio::spawn(async move {
                let mut wire = bytes::BytesMut::new();
                while let Some(frame) = rx.recv().await {
                    frame.encode(&mut wire);
                    relay.send(Frame::decode(&mut wire).unwrap().unwrap()).await.unwrap();
                }
            });
            let dir = from.path().to_owned();
            let writer = tokio::task::spawn_blocking(move || write_like_criu(&dir, seed, &mut std::thread::yield_now));
            writer.await.unwrap();
            dumped.cancel();
            let sent = follower.await.unwrap().unwrap();
            link.await.unwrap();
            let got = receiver.await.unwrap().unwrap();
            let (a, b) = (content(from.path()), content(&target));
            assert_eq!(a.len(), 5, "seed {seed}");
            assert!(a == b, "seed {seed}: the copies differ");
            assert_eq!((got.files, got.bytes), (sent.files, sent.bytes), "seed {seed}");
        }
    }

    /// Drives the passes by hand, so that it is known what had been sent when a file changed.
    #[tokio::test]
    async fn only_chunks_that_changed_are_sent_again() {
        let dir = tempfile::tempdir().unwrap();
        let mut rng = StdRng::seed_from_u64(7);
        let pages = dir.path().join("pages-1.img");
        std::fs::write(&pages, noise(&mut rng, 4 * MAX_DATA + 100)).unwrap();
        std::fs::write(dir.path().join("core.img"), b"small").unwrap();
        let (tx, mut rx) = mpsc::channel(64);
        let mut follower = ImageFollower::new(dir.path(), tx).unwrap();
        let work = tokio::task::spawn_blocking(move || {
            assert_eq!(follower.follow().unwrap(), 4);
            assert_eq!(follower.follow().unwrap(), 0);
            File::options().write(true).open(&pages).unwrap().write_all_at(b"x", MAX_DATA as u64 + 9).unwrap();
            follower.finish().unwrap();
            follower.done
        });
        let done = work.await.unwrap();
        assert_eq!(done.sent, 5 * MAX_DATA as u64 + 100 + 5);
        assert_eq!((done.files, done.bytes), (2, 4 * MAX_DATA as u64 + 105));
        let mut offsets = Vec::new();
        while let Some(frame) = rx.recv().await {
            if let Frame::Data { id: 0, offset, .. } = &frame {
                offsets.push(offset / MAX_DATA as u64);
            }
        }
        assert_eq!(offsets, [0, 1, 2, 3, 1, 4]);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn rounds_arrive_one_after_the_other_and_are_not_sent_again_with_the_dump() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (tx, rx) = mpsc::channel(QUEUE);
        let target = to.path().join("images");
        let receiver = tokio::spawn(ImageReceiver::create(&target, Limits::default()).unwrap().run(rx));
        let mut follower = ImageFollower::new(from.path(), tx).unwrap();
        for round in 1..=2 {
            let dumped = CancellationToken::new();
            let sending = tokio::spawn(follower.round(dumped.clone()));
            let dir = from.path().join(rounds::directory(round));
            std::fs::create_dir(&dir).unwrap();
            if let Some(parent) = rounds::parent_of_round(round) {
                std::os::unix::fs::symlink(parent, dir.join(rounds::LINK)).unwrap();
            }
            write_like_criu(&dir, round.into(), &mut || ());
            dumped.cancel();
            let (next, done) = sending.await.unwrap().unwrap();
            assert_eq!(done.files, 5);
            follower = next;
        }
        // Changed behind our back: what was sent whole is not looked at in the pause.
        std::fs::write(from.path().join("pre-1/late"), "late").unwrap();
        std::fs::write(from.path().join("core-1.img"), "core").unwrap();
        std::os::unix::fs::symlink("pre-2", from.path().join(rounds::LINK)).unwrap();
        let dumped = CancellationToken::new();
        dumped.cancel();
        let done = follower.run(dumped).await.unwrap();
        assert_eq!((done.files, done.bytes, done.sent), (1, 4, 4));
        assert_eq!(receiver.await.unwrap().unwrap().files, 11);
        std::fs::remove_file(from.path().join("pre-1/late")).unwrap();
        for below in ["pre-1", "pre-2", "parent", "parent/parent"] {
            assert!(content(&from.path().join(below)) == content(&target.join(below)), "{below} differs");
        }
    }

    #[tokio::test]
    async fn only_the_link_to_the_round_before_is_left_out() {
        for (link, to) in [("parent", "pre-2"), ("parent", "/etc"), ("other", "pre-1"), ("pre-1/parent", "../pre-1")] {
            let dir = tempfile::tempdir().unwrap();
            let (tx, mut rx) = mpsc::channel(QUEUE);
            let ignored = tokio::spawn(async move { while rx.recv().await.is_some() {} });
            std::fs::create_dir(dir.path().join("pre-1")).unwrap();
            let in_round = link.starts_with("pre-1");
            if in_round {
                std::os::unix::fs::symlink(to, dir.path().join(link)).unwrap();
            }
            let dumped = CancellationToken::new();
            dumped.cancel();
            let sent = ImageFollower::new(dir.path(), tx).unwrap().round(dumped.clone()).await;
            let ended = match sent {
                Ok((follower, _)) => {
                    std::os::unix::fs::symlink(to, dir.path().join(link)).unwrap();
                    follower.run(dumped).await.map(drop)
                }
                Err(error) => Err(error),
            };
            assert!(matches!(ended, Err(FollowError::Kind { .. })), "{link} -> {to}: {ended:?}");
            ignored.await.unwrap();
        }
    }

    #[tokio::test]
    async fn links_are_not_followed_and_a_lost_link_ends_it() {
        let dir = tempfile::tempdir().unwrap();
        let (tx, rx) = mpsc::channel(QUEUE);
        let follower = tokio::spawn(ImageFollower::new(dir.path(), tx).unwrap().run(CancellationToken::new()));
        drop(rx);
        assert!(matches!(follower.await.unwrap(), Err(FollowError::Closed)));
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("parent")).unwrap();
        let (tx, _rx) = mpsc::channel(QUEUE);
        let ended = ImageFollower::new(dir.path(), tx).unwrap().run(CancellationToken::new()).await;
        assert!(matches!(ended, Err(FollowError::Kind { .. })), "{ended:?}");
    }

    #[tokio::test]
    async fn a_follower_that_was_cut_off_leaves_an_incomplete_directory() {
        let to = tempfile::tempdir().unwrap();
        let (tx, rx) = mpsc::channel(QUEUE);
        let receiver = tokio::spawn(ImageReceiver::create(&to.path().join("i"), Limits::default()).unwrap().run(rx));
        tx.send(Frame::File { id: 0, path: ImagePath::new("a").unwrap() }).await.unwrap();
        drop(tx);
        assert!(matches!(receiver.await.unwrap(), Err(ReceiveError::CutOff)));
    }
}
