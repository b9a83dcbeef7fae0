//! What commands say when they do not: one line, and the exit code that is documented.

use crate::pair::{MIB, Pair};
use crate::snapshot::Scene;
use crate::support::{Node, random_image};

#[test]
fn wrong_arguments() {
    let mut scene = Scene::new(&[]);
    scene.run(2, &["fly"]);
    scene.run(2, &["add", "web"]);
    scene.run(2, &["add", "a/b", "/dev/null"]);
    scene.run(2, &["pull", "web", "--from", "http://host/x"]);
    scene.run(2, &["pull", "web", "--from", "nbd://host/x", "--rate", "0"]);
    scene.run(2, &["pull", "web", "--from", "nbd://host/x", "--rate", "fast"]);
    scene.run(2, &["wait", "web", "--for", "christmas"]);
    scene.run(2, &["wait", "web", "--timeout", "soon"]);
    scene.run(2, &["migrate", "web", "--to", "b:10810"]);
    scene.run(2, &["migrate", "web", "--to", "b:10810", "--container", "web", "--memory", "lazy"]);
    scene.run(2, &["prepare", "web", "--to", "b:10810", "--on-link-failure", "panic"]);
    scene.run(2, &["serve", "--state-dir", "/nonexistent", "--log", "xml"]);
    scene.run(2, &["serve", "--state-dir", "/nonexistent", "--peer", "b"]);
    scene.run(2, &["serve", "--state-dir", "/nonexistent", "--nbd", "0.0.0.0:10809"]);
    scene.run(2, &["tls", "init", "/nonexistent/x", "--host", "not a host"]);
    scene.run(2, &["completions", "cmd"]);
    scene.matches("errors/usage");
}

#[test]
fn without_a_node() {
    let mut scene = Scene::new(&[]);
    let control = ["--control", "/nonexistent/control.sock"];
    for command in [
        &["status"][..],
        &["status", "web", "--json"],
        &["add", "web", "/dev/null"],
        &["wait", "web"],
        &["handover", "web"],
        &["rollback", "web"],
    ] {
        scene.run(4, &[&control, command].concat());
    }
    scene.matches("errors/no-node");
}

#[test]
fn in_the_wrong_phase() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("web.img");
    random_image(&image, MIB, 3);
    let node = Node::start(dir.path().join("a"), &["--disk", &format!("web={}", image.display())]);
    let mut scene = Scene::new(&[(dir.path().to_str().unwrap(), "DIR")]);
    scene.ask(&node, 1, &["status", "db"]);
    scene.ask(&node, 1, &["add", "db", "/nonexistent/db.img"]);
    scene.ask(&node, 3, &["add", "db", image.to_str().unwrap()]);
    scene.ask(&node, 3, &["handover", "web"]);
    scene.ask(&node, 3, &["rollback", "web"]);
    scene.ask(&node, 3, &["rollback", "web", "--plan"]);
    scene.ask(&node, 3, &["cold-start", "web"]);
    scene.ask(&node, 3, &["verify", "web"]);
    scene.ask(&node, 3, &["wait", "web", "--for", "active", "--timeout", "1"]);
    scene.ask(&node, 3, &["migrate", "web", "--to", "127.0.0.1:1", "--container", "web", "--runtime", "none"]);
    scene.ask(&node, 1, &["events", "db"]);
    scene.ask(&node, 1, &["attach", "db"]);
    scene.ask(&node, 3, &["prepare", "web", "--to", "127.0.0.1:1"]);
    scene.ask(&node, 4, &["pull", "db", "--from", "nbd+unix:///x?socket=/nonexistent/nbd.sock"]);
    scene.matches("errors/phase");
}

#[test]
fn during_a_migration() {
    let pair = Pair::handed_over(9);
    let source = format!("127.0.0.1:{}", pair.wire.port);
    let names = [(pair.dir.path().to_str().unwrap(), "DIR"), (&pair.to_b, "B:10810"), (&source, "A:10810")];
    let mut scene = Scene::new(&names);
    scene.ask(&pair.b, 5, &["wait", "web", "--timeout", "300ms"]);
    scene.ask(&pair.a, 5, &["wait", "web", "--timeout", "300ms"]);
    scene.ask(&pair.b, 3, &["rollback", "web"]);
    scene.ask(&pair.b, 3, &["remove", "web"]);
    scene.ask(&pair.b, 3, &["prepare", "web", "--to", "127.0.0.1:1"]);
    scene.ask(&pair.a, 3, &["remove", "web"]);
    scene.ask(&pair.a, 3, &["cancel", "web"]);
    scene.ask(&pair.a, 3, &["prepare", "web", "--to", "127.0.0.1:1"]);
    pair.complete();
    scene.ask(&pair.a, 3, &["rollback", "web"]);
    scene.ask(&pair.a, 3, &["handover", "web"]);
    scene.matches("errors/migration");
}
