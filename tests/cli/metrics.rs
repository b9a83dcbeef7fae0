//! The metrics page, by Prometheus' own checker, and the examples that are made for it.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::pair::{MIB, Pair};
use crate::support::{Node, Said, run};

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn page(node: &Node) -> String {
    let mut stream = UnixStream::connect(node.control()).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.0 200 ") && head.contains("text/plain; version=0.0.4"), "{head}");
    body.to_owned()
}

/// `promtool check metrics`, which reads the page from its input.
fn checked(page: &str) -> Said {
    let child = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child =
        child.unwrap_or_else(|error| panic!("cannot run promtool ({error}); install the package prometheus"));
    child.stdin.take().unwrap().write_all(page.as_bytes()).unwrap();
    child.wait_with_output().unwrap().into()
}

/// The figure of a line of the page.
#[track_caller]
fn figure(page: &str, series: &str) -> f64 {
    let line = page.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {series} in {page}")).parse().unwrap()
}

/// The names of metrics that a text speaks of.
fn names(text: &str) -> BTreeSet<&str> {
    let part = |c: char| c.is_ascii_lowercase() || c == '_';
    let all = text.match_indices("lazy_migrate_").map(|(at, _)| {
        let name = &text[at..];
        &name[..name.find(|c| !part(c)).unwrap_or(name.len())]
    });
    all.collect()
}

#[test]
fn the_page_keeps_to_the_conventions_and_the_examples_to_the_page() {
    let pair = Pair::handed_over(21);
    // Somebody waits for a block that the pull has not brought yet.
    pair.client_b().read(40 * MIB, 4096);
    let (a, b) = (page(&pair.a), page(&pair.b));
    for page in [&a, &b] {
        let said = checked(page);
        assert_eq!((said.code, said.stdout.as_str(), said.stderr.as_str()), (0, "", ""), "{page}");
    }
    let wrong = checked("# TYPE lazy_migrate_wait_milliseconds counter\nlazy_migrate_wait_milliseconds 1\n");
    assert_ne!(wrong.code, 0, "the checker would say if they did not: {wrong:?}");

    assert_eq!(figure(&a, r#"lazy_migrate_disk_phase{disk="web",phase="handed-over"}"#), 1.0);
    assert_eq!(figure(&a, r#"lazy_migrate_disk_phase{disk="web",phase="serving"}"#), 0.0);
    assert_eq!(figure(&b, r#"lazy_migrate_disk_phase{disk="web",phase="active"}"#), 1.0);
    assert_eq!(figure(&b, r#"lazy_migrate_disk_link_up{disk="web"}"#), 1.0);
    let lease = figure(&b, r#"lazy_migrate_disk_lease_remaining_seconds{disk="web"}"#);
    assert!(lease > 0.0 && lease <= 2.0, "in seconds: {lease}");
    let of = |name: &str| figure(&b, &format!(r#"lazy_migrate_disk_{name}{{disk="web"}}"#));
    assert_eq!(of("present_bytes") + of("missing_bytes"), of("size_bytes"));
    assert!(of("fault_wait_seconds_count") >= 1.0 && of("fault_wait_seconds_sum") > 0.0);
    let all = figure(&b, r#"lazy_migrate_disk_fault_wait_seconds_bucket{disk="web",le="+Inf"}"#);
    assert_eq!(all, of("fault_wait_seconds_count"));

    let there = a + &b;
    for file in ["docs/alerts.yml", "docs/grafana.json", "docs/monitoring.md"] {
        let text = std::fs::read_to_string(repository(file)).unwrap();
        // A line of the page, or one that there would be if a disk had such a figure.
        let known = |name: &str| there.contains(&format!("\n{name}")) || there.contains(&format!("\n# TYPE {name} "));
        let missing: Vec<_> = names(&text).into_iter().filter(|name| !known(name)).collect();
        assert!(missing.is_empty(), "{file} speaks of what is not on the page: {missing:?}");
        assert!(names(&text).len() > 5, "{file}");
    }
    let documented = std::fs::read_to_string(repository("docs/monitoring.md")).unwrap();
    for name in there.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()) {
        assert!(documented.contains(name), "docs/monitoring.md does not say what {name} is");
    }
}

#[test]
fn the_alerts_fire_when_they_should_and_the_dashboard_is_one() {
    run("promtool", "prometheus", &["check", "rules", repository("docs/alerts.yml").to_str().unwrap()]);
    run("promtool", "prometheus", &["test", "rules", repository("tests/cli/alerts.yml").to_str().unwrap()]);
    let dashboard = std::fs::read_to_string(repository("docs/grafana.json")).unwrap();
    let dashboard: serde_json::Value = serde_json::from_str(&dashboard).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    assert!(panels.iter().all(|panel| panel["title"].is_string() && panel["gridPos"].is_object()));
    let asked = panels.iter().flat_map(|panel| panel["targets"].as_array().unwrap());
    assert!(asked.clone().count() >= 8 && asked.clone().all(|target| target["expr"].is_string()));
    // Each question is one that Prometheus understands: as rules, which promtool checks.
    let rule = |expr: &str| format!("  - record: x:y\n    expr: {}\n", serde_json::Value::from(expr));
    let rules: String =
        asked.map(|target| rule(&target["expr"].as_str().unwrap().replace("$__rate_interval", "1m"))).collect();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), format!("groups:\n- name: dashboard\n  rules:\n{rules}")).unwrap();
    run("promtool", "prometheus", &["check", "rules", "--lint=none", file.path().to_str().unwrap()]);
}
