//! How the node's memory is given back to the system: not each time a large buffer ends.

use nix::libc;

/// Freed memory that is kept for the next buffers, in bytes.
const KEPT: libc::c_int = 32 << 20;
/// Buffers from this size on are mapped each on its own, in bytes.
const MAPPED: libc::c_int = 4 << 20;

/// Has buffers of replies, which come and go at the rate of the disk, made of the same pages again. By itself the GNU
/// library gives them back, and each next one costs a fault for every page: a quarter of the processor time of a read of
/// 64 KiB. Other C libraries do as they like.
#[allow(unsafe_code)]
pub(super) fn keep_pages() {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: mallopt takes two numbers and locks what it changes. It answers 0 for a number that it does not take, and
        // then nothing has changed.
        let taken =
            unsafe { [libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT), libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED)] };
        if taken.contains(&0) {
            tracing::debug!("the allocator keeps its own mind");
        }
    }
}
