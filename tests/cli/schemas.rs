//! What `--json` says, against the schemas that are kept for its users.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::pair::{MIB, Pair};
use crate::snapshot;
use crate::support::{Node, Said, random_image};

/// Answers of the program, each with the name of its schema.
#[derive(Default)]
struct Answers(Vec<(String, Value)>);

impl Answers {
    #[track_caller]
    fn ask(&mut self, schema: &str, node: &Node, arguments: &[&str]) -> Value {
        let text = node.cli(&[arguments, &["--json"]].concat());
        let mut last = Value::Null;
        for line in text.lines() {
            last = serde_json::from_str(line).unwrap_or_else(|error| panic!("{arguments:?}: {error}: {text}"));
            self.0.push((schema.into(), last.clone()));
        }
        assert!(!last.is_null(), "{arguments:?} says nothing");
        last
    }

    fn checked(&self) -> Said {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        // Debian's own python3, which has Debian's modules.
        let child = Command::new("/usr/bin/python3")
            .args([root.join("tests/cli/validate.py"), root.join("schemas")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let mut child =
            child.unwrap_or_else(|error| panic!("cannot run /usr/bin/python3 ({error}); install the package python3"));
        child.stdin.take().unwrap().write_all(&serde_json::to_vec(&self.0).unwrap()).unwrap();
        child.wait_with_output().unwrap().into()
    }

    #[track_caller]
    fn valid(&self) {
        let said = self.checked();
        assert_eq!(said.code, 0, "{}\n{}", said.stdout, said.stderr);
    }
}

#[test]
fn exports_of_one_node() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path().join("a"), &[]);
    let image = dir.path().join("web.img");
    random_image(&image, MIB, 1);
    let mut answers = Answers::default();
    answers.ask("status", &node, &["status"]);
    answers.ask("disk", &node, &["add", "web", image.to_str().unwrap()]);
    answers.ask("disk", &node, &["pull", "copy", "--from", &node.uri("web")]);
    answers.ask("disk", &node, &["wait", "copy"]);
    answers.ask("status", &node, &["status"]);
    answers.ask("attached", &node, &["attach", "web", "--via", "fuse"]);
    answers.ask("disk", &node, &["status", "web"]);
    answers.ask("detached", &node, &["detach", "web"]);
    answers.ask("event", &node, &["events"]);
    answers.ask("removed", &node, &["remove", "copy"]);
    answers.valid();
}

#[test]
fn both_ends_of_a_migration() {
    let pair = Pair::new(31);
    let mut answers = Answers::default();
    answers.ask("disk", &pair.a, &["prepare", "web", "--to", &pair.to_b]);
    answers.ask("disk", &pair.a, &["cancel", "web"]);
    crate::support::wait_for("the end of the cancelled one", || pair.b.cli(&["status"]) == "no exports");
    answers.ask("disk", &pair.a, &["prepare", "web", "--to", &pair.to_b]);
    let handed = answers.ask("disk", &pair.a, &["handover", "web"]);
    assert_eq!((&handed["role"], &handed["phase"]), (&"source".into(), &"handed-over".into()));
    pair.client_b().read(40 * MIB, 4096);
    for node in [&pair.a, &pair.b] {
        let status = answers.ask("status", node, &["status"]);
        assert!(status["disks"][0]["lease_remaining_ms"].is_u64() && status["disks"][0]["link"] == "up", "{status}");
    }
    answers.ask("verify", &pair.b, &["verify", "web"]);
    let plan = answers.ask("rollback", &pair.a, &["rollback", "web", "--plan"]);
    assert_eq!(plan["rolled_back"], false);
    answers.0.push(("report".into(), pair.b.get("/v1/disks/web/report?cells=48")));
    answers.ask("rollback", &pair.a, &["rollback", "web", "--wait"]);
    answers.ask("event", &pair.a, &["events"]);
    answers.ask("event", &pair.b, &["events"]);
    answers.valid();
}

#[test]
fn what_needs_no_node() {
    let dir = tempfile::tempdir().unwrap();
    let made = dir.path().join("tls");
    let made = made.to_str().unwrap();
    let mut answers = Answers::default();
    let mut ask = |schema: &str, arguments: &[&str]| {
        let said = snapshot::run(arguments);
        let answer: Value = serde_json::from_str(&said.stdout).unwrap_or_else(|error| panic!("{error}: {said:?}"));
        answers.0.push((schema.into(), answer.clone()));
        (said, answer)
    };
    ask("tls-init", &["tls", "init", made, "--host", "a.example", "--json"]);
    let state = dir.path().to_str().unwrap();
    let control = "/nonexistent/control.sock";
    // What it finds is this machine's affair; that it says so in its shape, and by its exit code, is not.
    let (said, report) =
        ask("doctor", &["--control", control, "doctor", "--state-dir", state, "--tls", made, "--json"]);
    let levels: Vec<_> =
        report["checks"].as_array().unwrap().iter().map(|check| check["level"].as_str().unwrap()).collect();
    let failed = levels.contains(&"fail");
    assert_eq!((said.code, &report["fit"]), (i32::from(failed), &json!(!failed)), "{said:?}");
    assert_eq!(said.stderr.is_empty(), !failed, "{said:?}");
    let certificates = report["checks"].as_array().unwrap().iter().filter(|check| check["check"] == "certificate");
    assert!(certificates.clone().count() == 3 && certificates.clone().all(|check| check["level"] == "ok"), "{report}");
    answers.valid();
}

#[test]
fn failures_of_the_control_socket() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path().join("a"), &[]);
    let control = node.control();
    let ask = |arguments: &[&str]| -> Value {
        let socket = ["-s", "--unix-socket", control.to_str().unwrap()];
        serde_json::from_str(&crate::support::run("curl", "curl", &[&socket, arguments].concat())).unwrap()
    };
    let mut answers = Answers::default();
    answers.0.push(("failure".into(), ask(&["http://localhost/v1/disks/web"])));
    answers.0.push(("failure".into(), ask(&["http://localhost/v2"])));
    answers.0.push(("failure".into(), ask(&["-X", "POST", "http://localhost/v1/disks/web/handover"])));
    answers.valid();
}

#[test]
fn what_is_not_in_a_schema_is_found() {
    let good =
        json!({ "frozen_ms": 31, "demand_fetches": 2, "pulled_bytes": 4096, "skipped_bytes": 0, "total_s": 0.5 });
    Answers(vec![("migrate".into(), good.clone())]).valid();
    let mut lacking = good.clone();
    lacking.as_object_mut().unwrap().remove("total_s");
    let mut added = good.clone();
    added["surprise"] = json!(1);
    let mut negative = good;
    negative["frozen_ms"] = json!(-1);
    for (bad, word) in [(lacking, "total_s"), (added, "surprise"), (negative, "frozen_ms")] {
        let said = Answers(vec![("migrate".into(), bad)]).checked();
        assert!(said.code == 1 && said.stdout.contains(word), "{said:?}");
    }
}
