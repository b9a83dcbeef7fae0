//! Moving a disk from one owner to another.
//!
//! [`phase`] is the table, [`lease`] the permission that ends by itself, [`machine`] the pure decisions of both sides,
//! [`record`] what the journal says. The driver is the only part that waits: it runs the machines' effects on the
//! journal, the export, the container and the peer link.

#[cfg(test)]
mod document;
pub mod driver;
pub mod journal;
pub mod lease;
pub mod machine;
pub mod phase;
pub mod record;
