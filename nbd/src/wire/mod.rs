//! Constants and messages of the NBD protocol document (`doc/proto.md`).

pub mod errno;
pub use errno::Errno;
