//! The fuzz targets with the stable compiler (`../fuzz/drive.rs` says how).

#[path = "../fuzz/drive.rs"]
mod drive;
#[path = "../fuzz/targets.rs"]
mod targets;

use std::path::Path;

fn drive(target: &str, run: fn(&[u8])) {
    drive::drive(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target), run);
}

#[test]
fn a_server_survives_any_client() {
    drive("server_session", targets::server_session);
}

#[test]
fn a_client_survives_any_server() {
    drive("client_session", targets::client_session);
}

#[test]
fn a_client_survives_any_reply() {
    drive("reply_chunks", targets::reply_chunks);
}

#[test]
fn decoders_give_back_what_they_take() {
    drive("messages", targets::messages);
}

#[test]
fn uris_survive() {
    drive("uri", targets::uri);
}
