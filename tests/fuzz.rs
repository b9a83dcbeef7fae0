// tests/run: fast
//! The fuzz targets of what disks and peers say, with the stable compiler (`../nbd/fuzz/drive.rs` says how).

#[path = "../nbd/fuzz/drive.rs"]
mod drive;
#[path = "../fuzz/targets.rs"]
mod targets;

use std::path::Path;

fn drive(target: &str, run: fn(&[u8])) {
    drive::drive(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target), run);
}

#[test]
fn a_map_file_is_read_or_refused() {
    drive("map_file", targets::map_file);
}

#[test]
fn a_journal_is_read_or_refused() {
    drive("journal", targets::journal);
}

#[test]
fn a_peer_says_something_or_is_refused() {
    drive("peer_messages", targets::peer_messages);
}

#[test]
fn a_checkpoint_comes_in_frames_or_is_refused() {
    drive("image_frames", targets::image_frames);
}
