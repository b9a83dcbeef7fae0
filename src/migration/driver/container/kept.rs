//! The checkpoint that a source keeps until release or rollback: what a rollback brings back when the frozen tasks are gone.
//!
//! It is used once, and only with the disk as it was when the tasks were frozen: files beside the images' directory say how
//! it stands, each written durably before what it says may happen.
//!
//! ```text
//! dumped --keep--> `whole` --begin--> `restoring` --ran--> removed with the images
//!                     ^                    | did not come to life: `tried`, with the image's mark
//!                     +--------------------+
//! ```

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{remove_file, remove_tree, rename, sync_tree};
use crate::error::{Failure, Outcome};
use crate::units::ImageMark;

/// The images' directory, with all rounds before it, and what is beside it.
pub(super) struct Kept {
    images: PathBuf,
}

/// How it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// The dump was not finished, or is not known to be durable.
    Incomplete,
    /// Nobody has tried to restore from it.
    Untried,
    /// A restore did not come to life, and left the disk so.
    Tried(Tried),
    /// A restore was begun, and may have run.
    Used,
}

/// What is written down of a restore that did not come to life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Tried {
    /// The image as it was left; `None` where nothing tells.
    image: Option<ImageMark>,
}

impl Kept {
    /// The checkpoint in that directory, if there is one.
    pub fn new(images: PathBuf) -> Kept {
        Kept { images }
    }

    /// Where the images are.
    pub fn images(&self) -> &Path {
        &self.images
    }

    /// Where criu keeps its log meanwhile.
    pub fn work(&self) -> PathBuf {
        self.images.with_extension("work")
    }

    /// The checkpoint outlives a restart of this host from now on.
    pub async fn keep(&self) -> Outcome<()> {
        let (images, mark) = (self.images.clone(), self.whole());
        let kept = tokio::task::spawn_blocking(move || {
            sync_tree(&images)?;
            crate::files::write_atomically(&mark, b"the checkpoint beside this file is complete and durable\n")
        });
        let failed = |why: &dyn std::fmt::Display| {
            Failure::failed(format!(
                "the checkpoint in {} is not durable ({why}): if this host is restarted before the migration is complete, \
                 a rollback brings back the disk alone",
                self.images.display()
            ))
        };
        kept.await.map_err(|error| failed(&error))?.map_err(|error| failed(&error))
    }

    /// Whether the container may be brought back from it; `image` is what the disk's image says of itself now.
    pub fn check(&self, image: Option<ImageMark>) -> Result<(), String> {
        let images = self.images.display();
        match self.standing() {
            Standing::Untried => Ok(()),
            Standing::Tried(Tried { image: left }) if left.is_some() && left == image => Ok(()),
            Standing::Tried(Tried { image: None }) => Err(format!(
                "nothing tells whether the disk was written since its checkpoint in {images} was last tried; start it anew \
                 with its runtime"
            )),
            Standing::Tried(_) => Err(format!(
                "the disk was written since its checkpoint in {images} was last tried; start it anew with its runtime"
            )),
            Standing::Used => Err(format!(
                "its checkpoint in {images} was used before, so that what ran then may have written to the disk since; \
                 start it anew with its runtime"
            )),
            Standing::Incomplete => Err(format!(
                "its checkpoint in {images} is not complete; start it anew with its runtime: the disk is as it was frozen"
            )),
        }
    }

    /// Durably, before it runs: if this host dies meanwhile, what ran may have written to the disk.
    pub async fn begin(&self) -> Outcome<()> {
        rename(self.whole(), self.restoring()).await
    }

    /// What was begun did not come to life, and `image` is how that left the disk: it may be tried again as long as it is so.
    pub async fn tried(&self, image: Option<ImageMark>) -> Outcome<()> {
        let (whole, text) = (self.whole(), serde_json::to_vec(&Tried { image }));
        let written = tokio::task::spawn_blocking(move || crate::files::write_atomically(&whole, &text?)).await;
        match written.map_err(std::io::Error::other).and_then(|written| written) {
            Ok(()) => remove_file(&self.restoring()).await,
            Err(error) => {
                // The next try could not know whether somebody wrote meanwhile.
                remove_file(&self.whole()).await?;
                Err(Failure::failed(format!("cannot write {}: {error}", self.whole().display())))
            }
        }
    }

    /// The container did not come back, the disk is open to others, and `image` is what it is like: from now on a write
    /// counts, also where it was not even tried.
    pub async fn left_alone(&self, image: Option<ImageMark>) -> Outcome<()> {
        match self.standing() {
            Standing::Untried => self.tried(image).await,
            Standing::Incomplete | Standing::Tried(_) | Standing::Used => Ok(()),
        }
    }

    /// The container has gone on without it: what it holds is the past.
    pub async fn outlived(&self) -> Outcome<()> {
        match self.standing() {
            Standing::Untried | Standing::Tried(_) => self.begin().await,
            Standing::Incomplete | Standing::Used => Ok(()),
        }
    }

    /// Nothing is left of it.
    pub async fn remove(&self) -> Outcome<()> {
        // First what says that they are whole.
        remove_file(&self.whole()).await?;
        remove_file(&self.restoring()).await?;
        remove_tree(&self.images).await?;
        remove_tree(&self.work()).await
    }

    fn standing(&self) -> Standing {
        if self.restoring().exists() {
            return Standing::Used;
        }
        match std::fs::read(self.whole()) {
            Ok(text) => serde_json::from_slice(&text).map_or(Standing::Untried, Standing::Tried),
            Err(_) => Standing::Incomplete,
        }
    }

    /// The file that says that the images are whole.
    fn whole(&self) -> PathBuf {
        self.images.with_extension("whole")
    }

    /// The file that says that a restore from them was begun.
    fn restoring(&self) -> PathBuf {
        self.images.with_extension("restoring")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_is_used_once_and_only_for_the_disk_that_it_belongs_to() {
        let place = tempfile::tempdir().unwrap();
        let kept = Kept::new(place.path().join("checkpoint"));
        let mark = |modified_ns| Some(ImageMark { modified_ns, size: 1 << 20 });
        let refused = |image, why: &str| kept.check(image).unwrap_err().contains(why);
        assert!(refused(mark(1), "not complete"));
        std::fs::create_dir_all(kept.images()).unwrap();
        kept.keep().await.unwrap();
        // The rollback itself has opened the disk to whoever mounts it.
        assert_eq!([kept.check(mark(1)), kept.check(mark(2)), kept.check(None)], [Ok(()), Ok(()), Ok(())]);

        kept.begin().await.unwrap();
        assert!(refused(mark(2), "was used before"), "as after a restart in the middle");
        kept.left_alone(mark(3)).await.unwrap();
        assert!(refused(mark(3), "was used before"), "what may have run is not forgotten");
        kept.tried(mark(3)).await.unwrap();
        kept.left_alone(mark(4)).await.unwrap();
        assert_eq!(kept.check(mark(3)), Ok(()));
        assert!(refused(mark(4), "was written since") && refused(None, "was written since"));
        kept.tried(None).await.unwrap();
        assert!(refused(None, "nothing tells") && refused(mark(4), "nothing tells"));
        // One that was not even tried.
        kept.outlived().await.unwrap();
        assert!(refused(mark(4), "was used before"));
        kept.remove().await.unwrap();
        kept.outlived().await.unwrap();
        assert!(refused(mark(4), "not complete"));
        std::fs::create_dir_all(kept.images()).unwrap();
        kept.keep().await.unwrap();
        kept.left_alone(mark(5)).await.unwrap();
        assert!(kept.check(mark(5)).is_ok() && refused(mark(6), "was written since"));
        kept.remove().await.unwrap();
        assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 0);
    }
}
