//! What a node tells of what happened: to those who follow, to those who ask later, and after a restart.

use serde_json::Value;

use crate::client::Client;
use crate::pair::{MIB, Pair, SIZE};
use crate::support::Node;

fn events(node: &Node, arguments: &[&str]) -> Vec<Value> {
    let mut all = vec!["events", "--json"];
    all.extend(arguments);
    node.cli(&all).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The kinds, and for a phase which one.
fn told(events: &[Value]) -> Vec<String> {
    let text = |event: &Value, key: &str| event[key].as_str().unwrap_or_default().to_owned();
    let kind = |event: &Value| match text(event, "event").as_str() {
        "phase" => text(event, "phase"),
        kind => kind.to_owned(),
    };
    events.iter().map(kind).collect()
}

fn seqs(events: &[Value]) -> Vec<u64> {
    events.iter().map(|event| event["seq"].as_u64().unwrap()).collect()
}

#[test]
fn a_handover_is_told_on_both_sides_at_once_later_and_after_a_restart() {
    let mut pair = Pair::new(61);
    let mut follower = pair.b.spawn_cli(&["events", "--follow", "--json"]);
    let mut lines = follower.output();
    let mut next = || serde_json::from_str::<Value>(&lines.next().unwrap()).unwrap();
    pair = pair.hand_over();
    assert_eq!(next()["event"], "opened");
    while next()["phase"] != "active" {}
    let mut client = pair.client_b();
    client.read(40 * MIB, 4096);
    pair.complete();
    while next()["phase"] != "complete" {}

    let (a, b) = (events(&pair.a, &["web"]), events(&pair.b, &[]));
    let at_a = told(&a);
    for phase in ["opened", "preparing", "handed-over", "released"] {
        assert!(at_a.contains(&phase.to_owned()), "{phase} is missing in {at_a:?}");
    }
    let at_b = told(&b);
    for phase in ["opened", "clients", "active", "complete"] {
        assert!(at_b.contains(&phase.to_owned()), "{phase} is missing in {at_b:?}");
    }
    assert!(seqs(&a).is_sorted_by(|a, b| a + 1 == *b), "{a:?}");
    assert!(b.iter().all(|event| event["disk"] == "web" && event["at_ms"].as_u64() > Some(1_700_000_000_000)));
    let last = *seqs(&b).last().unwrap();
    assert_eq!(events(&pair.b, &["--after", &last.to_string()]), [] as [Value; 0]);
    let text = pair.b.cli(&["events", "web"]);
    assert!(text.lines().any(|line| line.ends_with("web destination complete 1: from active to complete")), "{text}");

    // The picture and the history: it filled from nothing to all, and somebody waited.
    let report = pair.b.get("/v1/disks/web/report?cells=48");
    let history = report["history"].as_array().unwrap();
    assert!(history.len() >= 2, "{report}");
    assert_eq!(history.last().unwrap()["present_bytes"], SIZE);
    let waits: u64 = history.iter().map(|sample| sample["waits"].as_u64().unwrap()).sum();
    let counted: u64 = report["waits"].as_array().unwrap().iter().map(|it| it["count"].as_u64().unwrap()).sum();
    assert!(waits >= 1 && counted >= waits, "{report}");
    assert_eq!(report["map"]["present"].as_array().unwrap(), &vec![Value::from(1000); 48]);
    let source = pair.a.get("/v1/disks/web/history");
    let seen = source.as_array().unwrap().iter().map(|sample| sample["present_bytes"].as_u64().unwrap());
    assert!(seen.clone().max() > Some(0), "{source}");

    // All of it is there again after a restart, and the numbers go on.
    drop(client);
    pair.b.stop();
    assert_eq!(follower.wait(), 4, "who follows is told that the node has gone");
    pair.b.start_again();
    let again = events(&pair.b, &[]);
    assert_eq!(again[..b.len()], b[..]);
    assert!(seqs(&again).is_sorted_by(|a, b| a + 1 == *b) && told(&again[b.len()..]).contains(&"opened".into()));
    assert_eq!(pair.b.get("/v1/disks/web/report?cells=48")["history"], report["history"]);
}

#[test]
fn a_removed_disk_leaves_no_directory_behind_and_its_end_is_told() {
    let pair = Pair::new(62);
    let mut client = Client::connect(&pair.a.uri("web"));
    client.read(0, 512);
    drop(client);
    pair.a.cli(&["remove", "web"]);
    assert!(!pair.a.dir.join("state/disks/web").exists());
    assert_eq!(told(&events(&pair.a, &[])).last().unwrap(), "closed");
    assert!(pair.a.fails(1, &["events", "web"]).contains("no export 'web'"));
    assert_eq!(pair.a.try_cli(&["events", "--after", "x"]).code, 2);
}
