//! A source that answers with wrong bytes: NBD has no checksums, so nobody can tell.

use crate::support::{Background, Node, random_image, run, wait_for_socket};
use crate::text;

#[test]
fn wrong_bytes_of_a_foreign_source_are_taken_and_verify_says_that_it_cannot_tell() {
    let dir = tempfile::tempdir().unwrap();
    let (source, socket) = (dir.path().join("source.img"), dir.path().join("s"));
    let size = 256 << 10;
    random_image(&source, size, 5);
    // Every byte of one value becomes another. (A newer nbdkit has a filter for this, named evil.)
    let plugin = [
        format!("get_size=echo {size}"),
        format!("pread=dd if={} iflag=count_bytes,skip_bytes count=$3 skip=$4 status=none | tr A B", text(&source)),
    ];
    let arguments = ["-f", "-U", text(&socket), "eval", &plugin[0], &plugin[1]];
    let _upstream = Background::start("nbdkit", "nbdkit", &arguments);
    wait_for_socket(&socket);
    let node = Node::start(dir.path().join("node"), &[]);
    node.cli(&["pull", "disk", "--from", &format!("nbd+unix:///?socket={}", socket.display())]);
    node.cli(&["wait", "disk", "--timeout", "60s"]);
    let copy = dir.path().join("copy");
    run("nbdcopy", "libnbd-bin", &[&node.uri("disk"), text(&copy)]);
    let right = std::fs::read(&source).unwrap();
    assert!(right.contains(&b'A'));
    let sent: Vec<u8> = right.iter().map(|byte| if *byte == b'A' { b'B' } else { *byte }).collect();
    assert!(std::fs::read(&copy).unwrap() == sent, "what was sent, and nothing else");
    let refused = node.fails(3, &["verify", "disk"]);
    assert!(refused.contains("did not come from another node"), "{refused}");
}
