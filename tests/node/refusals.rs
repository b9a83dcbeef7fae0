//! What is refused: one line that says what to do, the documented exit code, and nothing changed.

use std::process::Command;

use crate::pair::{MIB, Pair};
use crate::support::{Node, Said, free_port, program, random_image};

/// The node's whole state: what `status` says (figures of the moment left out) and what lies in its state directory.
fn state(node: &Node) -> (serde_json::Value, Vec<String>) {
    let mut status: serde_json::Value = serde_json::from_str(&node.cli(&["status", "--json"])).unwrap();
    for disk in status["disks"].as_array_mut().unwrap() {
        let disk = disk.as_object_mut().unwrap();
        ["lease_remaining_ms", "last_error", "link", "clients"].iter().for_each(|key| drop(disk.remove(*key)));
    }
    let mut files = Vec::new();
    let mut directories = vec![node.dir.join("state")];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let entry = entry.unwrap();
            files.push(entry.path().display().to_string());
            if entry.file_type().unwrap().is_dir() {
                directories.push(entry.path());
            }
        }
    }
    files.sort();
    (status, files)
}

/// Runs a command that must be refused with an exit code and these words, and change nothing.
#[track_caller]
fn refused(node: &Node, code: i32, arguments: &[&str], words: &[&str]) {
    let before = state(node);
    let line = node.fails(code, arguments);
    for word in words {
        assert!(line.contains(word), "'{word}' is not in: {line}");
    }
    assert!(line.starts_with("lazy-migrate: "), "{line}");
    assert!(!line.contains("panicked") && !line.contains("Os {"), "for people: {line}");
    assert_eq!(state(node), before, "{arguments:?} has changed something");
}

/// Runs a command line that is wrong in itself.
#[track_caller]
fn usage(arguments: &[&str], words: &[&str]) {
    let said: Said = Command::new(program()).args(arguments).output().unwrap().into();
    assert_eq!(said.code, 2, "{arguments:?}: {said:?}");
    for word in words {
        assert!(said.stderr.contains(word), "'{word}' is not in: {}", said.stderr);
    }
}

#[test]
fn disks_that_cannot_be_made() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path().join("a"), &[]);
    let (one, two) = (dir.path().join("one.img"), dir.path().join("two.img"));
    random_image(&one, MIB, 1);
    random_image(&two, MIB, 2);
    let (one, two) = (one.to_str().unwrap(), two.to_str().unwrap());
    let missing = dir.path().join("missing.img");
    refused(&node, 1, &["add", "web", missing.to_str().unwrap()], &["missing.img", "No such file"]);
    assert!(!missing.exists());
    refused(&node, 1, &["add", "web", dir.path().to_str().unwrap()], &[dir.path().to_str().unwrap()]);
    node.cli(&["add", "web", one]);
    node.cli(&["add", "web", one]);
    refused(&node, 3, &["add", "web", two], &["'web' is there already", "choose another name"]);
    let elsewhere = "nbd+unix:///x?socket=/nonexistent";
    refused(&node, 3, &["pull", "web", "--from", elsewhere], &["'web' is there already"]);
    refused(&node, 4, &["pull", "db", "--from", elsewhere], &["/nonexistent"]);
    refused(&node, 4, &["pull", "db", "--from", &format!("nbd://127.0.0.1:{}/x", free_port())], &["127.0.0.1"]);
    refused(&node, 1, &["pull", "db", "--from", &node.uri("nothing")], &["nothing"]);
    for bad in ["web", "http://host/x", "nbd+unix:///x", "nbd://", "nbd://host:99999/x"] {
        refused(&node, 2, &["pull", "db", "--from", bad], &["--from"]);
    }
    refused(&node, 2, &["pull", "db", "--from", elsewhere, "--rate", "0"], &["--no-background"]);
}

#[test]
fn names_that_are_no_names() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path().join("a"), &[]);
    let control = node.control();
    for bad in ["a/b", "..", ".", "../../etc", ".hidden", "", "a b", "a\u{1}b", "ä", &"x".repeat(201)] {
        for command in [&["add", bad, "/dev/null"][..], &["remove", bad], &["status", bad], &["handover", bad]] {
            usage(&[&["--control", control.to_str().unwrap()], command].concat(), &["cannot be a disk's name"]);
        }
    }
    // And past the command line: whoever speaks to the socket gets no further.
    for (method, path, body) in [
        ("DELETE", "/v1/disks/..%2f..%2fstate", ""),
        ("GET", "/v1/disks/%2e%2e", ""),
        ("GET", "/v1/disks/a%00b", ""),
        ("POST", "/v1/disks", r#"{"name":"../x","image":"/dev/null"}"#),
    ] {
        let answer = crate::support::run(
            "curl",
            "curl",
            &[
                "-s",
                "-X",
                method,
                "--unix-socket",
                control.to_str().unwrap(),
                "-H",
                "content-type: application/json",
                "-d",
                body,
                "-w",
                " %{http_code}",
                &format!("http://localhost{path}"),
            ],
        );
        assert!(answer.contains("cannot be a disk's name") && !answer.ends_with(" 200"), "{path}: {answer}");
    }
    assert_eq!(node.cli(&["status"]), "no exports");
}

#[test]
fn unknown_exports_and_absent_nodes() {
    let dir = tempfile::tempdir().unwrap();
    let mut node = Node::start(dir.path().join("a"), &[]);
    for command in [
        &["status", "ghost"][..],
        &["remove", "ghost"],
        &["attach", "ghost"],
        &["detach", "ghost"],
        &["prepare", "ghost", "--to", "127.0.0.1:1"],
        &["handover", "ghost"],
        &["cancel", "ghost"],
        &["wait", "ghost"],
        &["verify", "ghost"],
        &["rollback", "ghost"],
        &["migrate", "ghost", "--to", "127.0.0.1:1", "--container", "c"],
    ] {
        refused(&node, 1, command, &["no export 'ghost'", "lazy-migrate status"]);
    }
    node.stop();
    let said = node.try_cli(&["status"]);
    assert_eq!((said.code, said.stderr.lines().count()), (4, 1), "{said:?}");
    assert!(said.stderr.contains("lazy-migrate serve") && said.stderr.contains("--control"), "{said:?}");
    assert!(!node.control().exists(), "a stopped node leaves no socket");
}

#[test]
fn phases_that_do_not_allow_it() {
    let pair = Pair::new(41);
    let a = &pair.a;
    refused(a, 3, &["handover", "web"], &["not being migrated", "prepare"]);
    refused(a, 3, &["rollback", "web"], &["not being migrated"]);
    refused(a, 3, &["rollback", "web", "--plan"], &["not being migrated"]);
    refused(a, 3, &["verify", "web"], &["web"]);
    refused(a, 3, &["wait", "web", "--for", "active"], &["not being migrated"]);
    // What is so already is done: scripts may repeat it.
    let before = state(a);
    a.cli(&["detach", "web"]);
    a.cli(&["cancel", "web"]);
    a.cli(&["cancel", "web"]);
    assert_eq!(state(a), before);
    refused(a, 2, &["prepare", "web", "--to", "nowhere"], &["--to", "host:port"]);

    a.cli(&["prepare", "web", "--to", &pair.to_b]);
    let elsewhere = format!("127.0.0.1:{}", free_port());
    refused(a, 3, &["prepare", "web", "--to", &elsewhere], &["preparing", "cancel"]);
    refused(a, 3, &["remove", "web"], &["migration is under way", "cancel"]);
    refused(a, 3, &["rollback", "web"], &["use cancel"]);
    refused(&pair.b, 3, &["remove", "web"], &["ready", "roll back there"]);
    refused(&pair.b, 3, &["handover", "web"], &["came to this host"]);
    refused(&pair.b, 3, &["prepare", "web", "--to", &elsewhere], &["web"]);
    refused(&pair.b, 3, &["attach", "web"], &["does not own it"]);

    a.cli(&["handover", "web"]);
    refused(a, 3, &["cancel", "web"], &["use rollback"]);
    refused(a, 3, &["remove", "web"], &["still needs this disk"]);
    refused(a, 3, &["prepare", "web", "--to", &elsewhere], &["handed-over"]);
    let line = a.fails(5, &["wait", "web", "--timeout", "50ms"]);
    assert!(line.contains("0.1 s") && line.contains("handed-over"), "{line}");
    let line = pair.b.fails(3, &["remove", "web"]);
    assert!(line.contains("active"), "{line}");
    pair.complete();
    refused(a, 3, &["rollback", "web"], &["migrate in the other direction"]);
}

#[test]
fn peers_that_cannot_be_reached() {
    let dir = tempfile::tempdir().unwrap();
    let web = dir.path().join("web.img");
    random_image(&web, MIB, 3);
    let disk = format!("web={}", web.display());
    let alone = Node::start(dir.path().join("alone"), &["--disk", &disk]);
    let nobody = format!("127.0.0.1:{}", free_port());
    refused(&alone, 3, &["prepare", "web", "--to", &nobody], &["--peer"]);

    let peer = format!("127.0.0.1:{}", free_port());
    let advertised = format!("127.0.0.1:{}", free_port());
    let a = Node::start(dir.path().join("a"), &["--peer", &peer, "--disk", &disk, "--advertise", &advertised]);
    let line = a.fails(4, &["prepare", "web", "--to", &nobody]);
    assert!(line.contains(&nobody) && line.contains("not prepared"), "{line}");
    assert_eq!(a.status("web")["phase"], "serving", "as if nothing had been asked");
    // The destination cannot reach the source: it says so, and keeps nothing.
    let b_peer = format!("127.0.0.1:{}", free_port());
    let b = Node::start(dir.path().join("b"), &["--peer", &b_peer]);
    let line = a.fails(4, &["prepare", "web", "--to", &b_peer]);
    assert!(line.contains(&advertised) && line.contains("--advertise"), "{line}");
    assert_eq!(b.cli(&["status"]), "no exports");
    assert!(!b.dir.join("state/disks/web").exists());
    // A name that the destination has already.
    b.cli(&["add", "web", web.to_str().unwrap()]);
    let line = a.fails(3, &["prepare", "web", "--to", &b_peer]);
    assert!(line.contains("'web' is there already"), "{line}");
    assert_eq!(a.status("web")["phase"], "serving");
}

#[test]
fn command_lines_that_make_no_sense() {
    usage(&["frobnicate"], &["frobnicate"]);
    usage(&["add", "web"], &["IMAGE"]);
    usage(&["wait", "web", "--for", "christmas"], &["christmas"]);
    usage(&["wait", "web", "--timeout", "soon"], &["soon"]);
    usage(&["prepare", "web"], &["--to"]);
    let dir = tempfile::tempdir().unwrap();
    let (state, control) = (dir.path().join("state"), dir.path().join("control.sock"));
    let serve = ["--control", control.to_str().unwrap(), "serve", "--state-dir", state.to_str().unwrap()];
    for (options, words) in [
        (&["--nbd", "0.0.0.0:10809"][..], &["--insecure", "0.0.0.0:10809"][..]),
        (&["--peer", "0.0.0.0:10810"], &["--insecure", "0.0.0.0:10810"]),
        (&["--nbd", "[::]:10809"], &["--insecure"]),
        (&["--nbd", "sideways"], &["sideways"]),
        (&["--disk", "web"], &["NAME=VALUE"]),
        (&["--disk", "a/b=/dev/null"], &["cannot be a disk's name"]),
        (&["--lease", "1ms"], &["--lease"]),
        (&["--runtime", "fridge"], &["fridge", "runc"]),
    ] {
        usage(&[&serve, options].concat(), words);
    }
    assert!(!state.exists() && !control.exists(), "nothing was begun");
}

#[test]
fn a_state_directory_that_cannot_be_used() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "not a directory").unwrap();
    // Root may write anywhere, but below a file nobody can.
    for state in [file.clone(), file.join("state"), "/proc/lazy-migrate".into()] {
        let control = dir.path().join("control.sock");
        let said: Said = Command::new(program())
            .args(["serve", "--state-dir", state.to_str().unwrap(), "--control", control.to_str().unwrap()])
            .output()
            .unwrap()
            .into();
        assert_eq!((said.code, said.stderr.lines().count()), (1, 1), "{said:?}");
        assert!(said.stderr.contains("state directory") && said.stderr.contains(state.to_str().unwrap()), "{said:?}");
        assert!(!control.exists());
    }
    assert_eq!(std::fs::read(&file).unwrap(), b"not a directory");
}
