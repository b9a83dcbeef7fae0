//! The source is released only when every block was compared, and when nobody has touched its image.

use std::os::unix::fs::FileExt;
use std::time::SystemTime;

use crate::client::repeated;
use crate::pair::{MIB, Pair};
use crate::support::{PATIENCE, program, signal};

/// Somebody writes to the image of a disk that was handed over.
fn write_behind_our_back(pair: &Pair, offset: u64, bytes: &[u8]) -> SystemTime {
    let image = std::fs::File::options().write(true).open(&pair.image).unwrap();
    let before = image.metadata().unwrap().modified().unwrap();
    image.write_all_at(bytes, offset).unwrap();
    before
}

fn set_modified(pair: &Pair, time: SystemTime) {
    std::fs::File::options().write(true).open(&pair.image).unwrap().set_modified(time).unwrap();
}

fn last_error(pair: &Pair) -> String {
    pair.b.status("web")["last_error"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn an_image_that_somebody_wrote_to_is_not_released_until_that_is_settled() {
    let pair = Pair::handed_over(71);
    // This one is at B already, the way it was.
    let mut client = pair.client_b();
    assert!(client.read(0, 4096) == pair.bytes(0, 4096));
    client.write(MIB, 4096, 1);
    let before = write_behind_our_back(&pair, 0, &repeated(9, 4096));
    pair.wire.open();
    pair.b.wait_status("web", "told why it is not released", |status| {
        status["missing_bytes"] == 0
            && status["last_error"].as_str().is_some_and(|why| why.contains("wrote to the image"))
    });
    assert_eq!((pair.phase_a().as_str(), pair.phase_b().as_str()), ("handed-over", "active"));
    let refused = pair.b.fails(1, &["verify", "web"]);
    assert!(refused.contains("wrote to the image") && refused.contains("docs/failure.md"), "{refused}");

    // Whoever sets the time back as well is found by the content.
    set_modified(&pair, before);
    let refused = pair.b.fails(1, &["verify", "web"]);
    assert!(refused.contains("differs from the source's disk") && refused.contains("[0]"), "{refused}");
    assert_eq!(pair.phase_a(), "handed-over");

    // And the operator who has put the content back is heard.
    write_behind_our_back(&pair, 0, pair.bytes(0, 4096));
    set_modified(&pair, before);
    pair.b.cli(&["verify", "web"]);
    pair.b.cli(&["wait", "web", "--timeout", "90s"]);
    pair.a.cli(&["wait", "web", "--timeout", "10s"]);
    assert!(client.read(0, 4096) == pair.bytes(0, 4096) && client.read(MIB, 4096) == repeated(1, 4096));
}

#[test]
fn a_store_that_lost_a_byte_is_found_before_the_release() {
    let pair = Pair::handed_over(72);
    let mut client = pair.client_b();
    assert!(client.read(5 * MIB, 4096) == pair.bytes(5 * MIB, 4096));
    let store = std::fs::File::options().write(true).open(pair.b_directory().join("disk.img")).unwrap();
    store.write_all_at(&repeated(3, 512), 5 * MIB + 1024).unwrap();
    pair.wire.open();
    pair.b.wait_status("web", "told why it is not released", |status| {
        status["last_error"].as_str().is_some_and(|why| why.contains("differs from the source's disk"))
    });
    assert_eq!((pair.phase_a().as_str(), pair.phase_b().as_str()), ("handed-over", "active"), "{}", last_error(&pair));
    pair.a.cli(&["rollback", "web"]);
    pair.assert_source_untouched();
}

#[test]
fn the_source_takes_the_disk_back_by_itself_where_it_was_told_to() {
    let mut pair = Pair::new(73);
    let policy = ["--on-link-failure", "rollback", "--link-timeout", "1s"];
    pair.a.cli(&[&["prepare", "web", "--to", &pair.to_b][..], &policy].concat());
    pair.a.cli(&["handover", "web"]);
    let mut client = pair.client_b();
    client.write(0, 4096, 1);
    assert_eq!(pair.phase_a(), "handed-over", "while it is heard, nothing happens");
    pair.b.kill();
    pair.a.cli(&["wait", "web", "--for", "serving", "--timeout", "30s"]);
    pair.assert_source_untouched();
    pair.client_a().write(0, 4096, 2);
    pair.b.start_again();
    pair.wait_b("discarded");
    assert!(pair.client_a().read(0, 4096) == repeated(2, 4096));
}

#[test]
fn a_rollback_that_waits_goes_on_although_its_command_is_interrupted() {
    let mut pair = Pair::handed_over(74);
    pair.client_b().write(0, 4096, 1);
    pair.b.kill();
    let mut command = std::process::Command::new(program());
    let command = command.arg("--control").arg(pair.a.control()).args(["rollback", "web", "--wait"]);
    let mut command = command.stderr(std::process::Stdio::null()).spawn().unwrap();
    // The lease is not over: the command waits.
    pair.a.wait_status("web", "asked back", |_| pair.a.log().contains("tell to discard"));
    signal(command.id(), nix::sys::signal::Signal::SIGINT);
    assert!(!command.wait().unwrap().success());
    let timeout = format!("{}s", PATIENCE.as_secs());
    pair.a.cli(&["wait", "web", "--for", "serving", "--timeout", &timeout]);
    pair.client_a().write(0, 4096, 2);
}
