//! What commands print when they do what they are told.

use crate::pair::{MIB, Pair};
use crate::snapshot::Scene;
use crate::support::{Node, free_port, random_image};

#[test]
fn exports_of_one_node() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path().join("a"), &[]);
    let image = dir.path().join("web.img");
    random_image(&image, MIB, 1);
    let mut scene = Scene::new(&[(dir.path().to_str().unwrap(), "DIR")]);
    scene.ask(&node, 0, &["status"]);
    scene.ask(&node, 0, &["add", "web", image.to_str().unwrap()]);
    scene.ask(&node, 0, &["add", "web", image.to_str().unwrap()]);
    scene.ask(&node, 0, &["pull", "copy", "--from", &node.uri("web")]);
    scene.ask(&node, 0, &["wait", "copy"]);
    scene.ask(&node, 0, &["status"]);
    scene.ask(&node, 0, &["status", "copy"]);
    scene.ask(&node, 0, &["cancel", "web"]);
    scene.ask(&node, 0, &["remove", "copy"]);
    scene.ask(&node, 0, &["remove", "web"]);
    scene.ask(&node, 0, &["status"]);
    scene.matches("output/exports");
}

#[test]
fn a_disk_that_moves() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("web.img");
    random_image(&image, MIB, 2);
    let ports = [free_port(), free_port()].map(|port| format!("127.0.0.1:{port}"));
    let disk = format!("web={}", image.display());
    let a = Node::start(dir.path().join("a"), &["--peer", &ports[0], "--disk", &disk]);
    let b = Node::start(dir.path().join("b"), &["--peer", &ports[1]]);
    let mut scene =
        Scene::new(&[(dir.path().to_str().unwrap(), "DIR"), (&ports[0], "A:10810"), (&ports[1], "B:10810")]);
    scene.ask(&a, 0, &["prepare", "web", "--to", &ports[1]]);
    scene.ask(&a, 0, &["cancel", "web"]);
    // The destination ends what was cancelled by itself.
    crate::support::wait_for("the end of the cancelled one", || b.cli(&["status"]) == "no exports");
    scene.ask(&a, 0, &["prepare", "web", "--to", &ports[1]]);
    scene.ask(&a, 0, &["handover", "web"]);
    scene.ask(&b, 0, &["wait", "web"]);
    scene.ask(&a, 0, &["wait", "web"]);
    scene.ask(&a, 0, &["status"]);
    scene.ask(&b, 0, &["status"]);
    scene.ask(&b, 0, &["verify", "web"]);
    scene.ask(&a, 0, &["remove", "web"]);
    scene.matches("output/migration");
}

#[test]
fn a_disk_that_is_taken_back() {
    let pair = Pair::new(7);
    let mut scene = Scene::new(&[(pair.dir.path().to_str().unwrap(), "DIR"), (&pair.to_b, "B:10810")]);
    scene.ask(&pair.a, 0, &["prepare", "web", "--to", &pair.to_b]);
    scene.ask(&pair.a, 0, &["handover", "web"]);
    scene.ask(&pair.a, 0, &["rollback", "web", "--plan"]);
    scene.ask(&pair.a, 0, &["rollback", "web", "--wait"]);
    scene.ask(&pair.a, 0, &["wait", "web", "--for", "serving"]);
    scene.matches("output/rollback");
}

#[test]
fn a_device() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("web.img");
    random_image(&image, MIB, 4);
    let node = Node::start(dir.path().join("a"), &["--disk", &format!("web={}", image.display())]);
    // Which it is, is not known before.
    let device = node.cli(&["attach", "web", "--via", "fuse"]);
    let mut scene = Scene::new(&[(dir.path().to_str().unwrap(), "DIR"), (&device, "/dev/DEVICE")]);
    scene.ask(&node, 0, &["attach", "web", "--via", "fuse"]);
    scene.ask(&node, 0, &["status"]);
    scene.ask(&node, 3, &["remove", "web"]);
    scene.ask(&node, 0, &["detach", "web"]);
    scene.ask(&node, 0, &["detach", "web"]);
    scene.ask(&node, 0, &["status"]);
    let again = node.cli(&["attach", "web", "--via", "fuse"]);
    assert!(again.starts_with("/dev/loop"), "{again}");
    node.cli(&["detach", "web"]);
    scene.matches("output/device");
}

#[test]
fn certificates() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (dir.path().join("one"), dir.path().join("two"));
    let (first, second) = (first.to_str().unwrap(), second.to_str().unwrap());
    let mut scene = Scene::new(&[(dir.path().to_str().unwrap(), "DIR")]);
    scene.run(0, &["tls", "init", first, "--host", "a.example", "--host", "10.0.0.1"]);
    scene.run(0, &["tls", "init", second, "--host", "b.example", "--ca", first]);
    scene.run(3, &["tls", "init", first, "--host", "a.example"]);
    scene.matches("output/tls");
}
