//! `report`: of migrations between two nodes that went well, and that did not.

use std::io::Write;
use std::path::Path;

use serde_json::Value;

use crate::browser::{figure, markup, picture};
use crate::pair::{MIB, Pair, SIZE};
use crate::support::Node;

fn json(node: &Node) -> Value {
    serde_json::from_str(&node.cli(&["report", "web", "--json"])).unwrap()
}

/// The report as a page, in a browser.
fn opened(node: &Node, file: &Path, name: &str) -> String {
    node.cli(&["report", "web", "--html", file.to_str().unwrap()]);
    let text = std::fs::read_to_string(file).unwrap();
    assert!(!text.contains("://"), "nothing comes from elsewhere");
    markup(&format!("file://{}", file.display()), name)
}

#[test]
fn a_finished_migration_is_told_on_both_sides() {
    let pair = Pair::handed_over(91);
    let mut client = pair.client_b();
    for at in 0..8 {
        client.read((40 - at) * MIB, 4096);
    }
    pair.complete();
    let (a, b) = (json(&pair.a), json(&pair.b));
    for (report, role, phase) in [(&a, "source", "released"), (&b, "destination", "complete")] {
        let summary = &report["summary"];
        assert_eq!(report["schema"], 1);
        assert_eq!((&report["status"]["role"], &report["status"]["phase"]), (&role.into(), &phase.into()));
        assert_eq!((&summary["outcome"], &summary["why"]), (&"complete".into(), &Value::Null), "{summary}");
        assert!(summary["took_ms"].as_u64().is_some_and(|took| took > 0), "{summary}");
    }
    let moved = &b["summary"];
    assert!(moved["pulled_bytes"].as_u64().unwrap() + moved["skipped_bytes"].as_u64().unwrap() >= SIZE, "{moved}");
    assert!(moved["demand_fetches"].as_u64() >= Some(1) && moved["background_fetches"].as_u64() >= Some(1), "{moved}");
    let text = pair.b.cli(&["report", "web"]);
    assert!(text.starts_with("web: complete (destination complete)\nbegan     20"), "{text}");
    assert!(text.lines().any(|line| line.starts_with("moved     48.0") && line.ends_with("zeroes (0 %)")), "{text}");

    for (node, name) in [(&pair.a, "report-source"), (&pair.b, "report-destination")] {
        let file = pair.dir.path().join(format!("{name}.html"));
        let page = opened(node, &file, name);
        assert_eq!(figure(&page, "web", "outcome"), "complete");
        assert!(figure(&page, "web", "over the link").starts_with("48.0"), "{}", figure(&page, "web", "over the link"));
        assert!(page.contains("<title>web: complete</title>") && page.contains("<td>phase</td>"), "{page}");
        let counts = picture(&format!("file://{}", file.display()), name, &[[0x2f, 0x8f, 0x5b]]);
        assert!(counts[0] > 5000, "{counts:?}");
    }
    let unwritable = pair.b.fails(1, &["report", "web", "--html", "/nowhere/at/all.html"]);
    assert!(unwritable.contains("cannot write the report to /nowhere/at/all.html"), "{unwritable}");
    assert!(pair.b.fails(1, &["report", "none"]).contains("no export 'none'"));
}

#[test]
fn a_failed_one_is_told_too_and_what_a_text_says_is_only_text() {
    let mut pair = Pair::handed_over(92);
    pair.a.cli(&["rollback", "web", "--wait"]);
    pair.wait_b("discarded");
    for (node, start) in [(&pair.a, "web: failed (source "), (&pair.b, "web: failed (destination discarded)")] {
        assert_eq!(json(node)["summary"]["outcome"], "failed");
        assert!(node.cli(&["report", "web"]).starts_with(start));
    }

    // Where a container moved with the disk, its pause is in the picture.
    pair.a.stop();
    let events = pair.a.dir.join("state/disks/web/events.jsonl");
    let text = std::fs::read_to_string(&events).unwrap();
    let rows = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let at = rows.map(|event| event["at_ms"].as_u64().unwrap()).max().unwrap();
    let mut file = std::fs::File::options().append(true).open(&events).unwrap();
    for (seq, after, kind) in [(901, 100, "frozen"), (902, 900, "resumed")] {
        let event = serde_json::json!({
            "seq": seq, "at_ms": at + after, "disk": "web", "role": "source", "phase": "serving", "epoch": 1,
            "event": kind, "after_ms": after, "frozen_ms": 800
        });
        writeln!(file, "{event}").unwrap();
    }
    pair.a.start_again();
    let page = opened(&pair.a, &pair.dir.path().join("frozen.html"), "report-frozen");
    assert_eq!(figure(&page, "web", "frozen"), "800 ms");
    assert!(page.contains("class=\"window frozen\"><title>frozen 0.8 s</title>"), "{page}");

    // A text of somebody else's making, as an error of a peer would be one.
    pair.b.stop();
    let evil = "</script><b id=harm>x</b><img src=x onerror=\"document.title='harm'\">";
    let event = serde_json::json!({
        "seq": 900, "at_ms": 1_800_000_000_000_u64, "disk": "web", "role": "destination", "phase": "discarded", "epoch": 1,
        "event": "error", "message": evil
    });
    let events = pair.b_directory().join("events.jsonl");
    writeln!(std::fs::File::options().append(true).open(events).unwrap(), "{event}").unwrap();
    pair.b.start_again();
    assert_eq!(json(&pair.b)["summary"]["why"], evil);
    let page = opened(&pair.b, &pair.dir.path().join("failed.html"), "report-failed");
    assert_eq!(figure(&page, "web", "outcome"), "failed");
    assert!(
        figure(&page, "web", "why").contains("&lt;/script&gt;&lt;b id=harm&gt;"),
        "{}",
        figure(&page, "web", "why")
    );
    assert!(page.contains("<title>web: failed</title>"), "{page}");
    let shown = page.rsplit("</script>").next().unwrap();
    assert!(!page.contains("<b id=\"harm\"") && !shown.contains("<img"), "{page}");
}
