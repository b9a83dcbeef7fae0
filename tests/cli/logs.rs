//! The log: lines that programs can read, and that say which disk they are about.

use serde_json::Value;

use crate::pair::MIB;
use crate::support::{Node, free_port, random_image};

/// Moves a disk between two nodes that log in that way, and returns what each has logged.
fn logs(format: &str) -> [String; 2] {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("web.img");
    random_image(&image, MIB, 5);
    let ports = [free_port(), free_port()].map(|port| format!("127.0.0.1:{port}"));
    let disk = format!("web={}", image.display());
    let mut a = Node::start(dir.path().join("a"), &["--peer", &ports[0], "--disk", &disk, "--log", format]);
    let mut b = Node::start(dir.path().join("b"), &["--peer", &ports[1], "--log", format]);
    a.cli(&["prepare", "web", "--to", &ports[1]]);
    a.cli(&["handover", "web"]);
    b.cli(&["wait", "web", "--timeout", "60s"]);
    a.cli(&["wait", "web", "--timeout", "60s"]);
    a.stop();
    b.stop();
    [a.log(), b.log()]
}

#[test]
fn every_line_is_an_object_and_those_of_a_disk_name_it_with_its_epoch_and_phase() {
    for (log, phases) in logs("json").iter().zip([["handed-over", "released"], ["active", "complete"]]) {
        let lines: Vec<Value> = log
            .lines()
            .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
            .collect();
        for line in &lines {
            for field in ["time", "level", "target", "message"] {
                assert!(line[field].is_string(), "{field} is missing: {line}");
            }
            let target = line["target"].as_str().unwrap();
            let of_a_disk = ["migration::driver", "export", "fetch", "pull::"].iter().any(|part| target.contains(part));
            if of_a_disk || line.get("disk").is_some() {
                assert!(line["disk"] == "web" && line["epoch"].is_u64() && line["phase"].is_string(), "{line}");
            }
        }
        for phase in phases {
            let found = lines.iter().any(|line| line["disk"] == "web" && line["epoch"] == 1 && line["phase"] == phase);
            assert!(found, "nothing is logged in phase {phase}: {log}");
        }
        assert!(
            lines.iter().any(|line| line["message"] == "ready")
                && lines.iter().any(|line| line["message"] == "stopping")
        );
    }
}

#[test]
fn the_text_says_the_same_on_one_line_each() {
    for (log, phase) in logs("text").iter().zip(["handed-over", "active"]) {
        let words = format!(" disk=web epoch=1 phase={phase}");
        assert!(log.lines().any(|line| line.contains(&words) && line.contains(" INFO ")), "{words} is not in: {log}");
        assert!(log.lines().all(|line| line.starts_with("20")), "{log}");
    }
}
