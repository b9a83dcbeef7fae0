//! The `lazy-migrate` command.

fn main() {}
