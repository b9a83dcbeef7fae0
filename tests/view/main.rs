// tests/run: timeout=900
//! What a person sees: the terminal view through a real pseudo-terminal, the page in a real Chromium, the report of a real
//! migration. The screens and pictures that the tests saw are kept as files below the target directory, in `view/`.
//!
//! Needs the Debian packages chromium and python3-libnbd; what is missing makes a test fail, with its package.

#[path = "../support/mod.rs"]
mod support;

#[path = "../node/client.rs"]
#[allow(dead_code, reason = "each test crate uses its part of it")]
mod client;
#[path = "../node/pair.rs"]
#[allow(dead_code, reason = "each test crate uses its part of it")]
mod pair;

mod browser;
mod page;
mod report;
mod screen;

/// Where screens and pictures are kept: cargo's directory for what tests write.
fn kept(name: &str) -> std::path::PathBuf {
    let directory = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("view");
    std::fs::create_dir_all(&directory).unwrap();
    directory.join(name)
}
