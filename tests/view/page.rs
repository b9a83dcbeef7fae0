//! `serve --http`: what a browser shows, and whom the page is refused to.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};

use crate::browser::{figure, markup, picture};
use crate::client::Client;
use crate::support::{Node, Said, free_port, image, program, random_image};

const MIB: u64 = 1 << 20;
/// The colours of the light page.
const PRESENT: [u8; 3] = [0x2f, 0x8f, 0x5b];
const MISSING: [u8; 3] = [0xe4, 0xe7, 0xeb];

fn ask(port: u16, head: &str) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    write!(stream, "{head}\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

fn status(answer: &str) -> u16 {
    answer.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or_else(|| panic!("no status: {answer:?}"))
}

#[test]
fn a_browser_shows_every_disk_as_it_fills() {
    let dir = tempfile::tempdir().unwrap();
    let port = free_port();
    let a = Node::start(dir.path().join("a"), &[]);
    let b = Node::start(dir.path().join("b"), &["--http", &format!("127.0.0.1:{port}")]);
    for (name, rate) in [("done", 64 * MIB), ("slow", 64 << 10)] {
        let path = dir.path().join(format!("{name}.img"));
        let half = 0..16 * MIB;
        image(&path, 32 * MIB, 81, std::slice::from_ref(&half));
        a.cli(&["add", name, path.to_str().unwrap()]);
        b.cli(&["pull", name, "--from", &a.uri(name), "--rate", &rate.to_string()]);
    }
    b.cli(&["wait", "done", "--timeout", "60s"]);
    let mut client = Client::connect(&b.uri("slow"));
    client.read(14 * MIB, 4096);
    let url = format!("http://127.0.0.1:{port}/");
    let page = markup(&url, "page");
    assert_eq!(figure(&page, "done", "present"), "100 %, 32.00 MiB of 32.00 MiB");
    assert_eq!(figure(&page, "done", "outcome"), "complete");
    assert_eq!(figure(&page, "done", "saved by skipping"), "16.00 MiB (50 %)");
    assert_eq!(figure(&page, "slow", "outcome"), "under-way");
    assert_eq!(figure(&page, "slow", "upstream"), "connected");
    assert!(figure(&page, "slow", "faults").starts_with("1, p50 "), "{}", figure(&page, "slow", "faults"));
    let percent = |page: &str| figure(page, "slow", "present").split(' ').next().unwrap().parse::<u64>().unwrap();
    assert!((1..100).contains(&percent(&page)), "{}", figure(&page, "slow", "present"));
    assert!(page.contains("data-row=\"slow\"") && page.contains("exports 2"), "{page}");
    assert!(page.contains("data-chart=\"waits\"") && page.contains("<path class=\"present area\""), "{page}");
    assert!(page.contains("<td>opened</td>"), "{page}");

    // A picture with blocks that are here and blocks that are not.
    let counts = picture(&url, "page", &[PRESENT, MISSING]);
    assert!(counts.iter().all(|&count| count > 2000), "{counts:?}");

    // A node that goes while the page is open is another matter: here the page is not there at all.
    drop(b);
    assert!(TcpStream::connect(("127.0.0.1", port)).is_err());
}

#[test]
fn it_only_shows_and_only_to_this_host() {
    let dir = tempfile::tempdir().unwrap();
    let port = free_port();
    let mut node = Node::start(dir.path().join("n"), &["--http", &format!("127.0.0.1:{port}")]);
    let path = dir.path().join("web.img");
    random_image(&path, MIB, 82);
    node.cli(&["add", "web", path.to_str().unwrap()]);

    let page = ask(port, &format!("GET / HTTP/1.1\r\nHost: localhost:{port}"));
    assert_eq!(status(&page), 200);
    let (head, body) = page.split_once("\r\n\r\n").unwrap();
    let head = head.to_ascii_lowercase();
    for header in ["content-security-policy: default-src 'none'; script-src 'self'", "x-frame-options: deny", "nosniff"]
    {
        assert!(head.contains(header), "{header} is not in {head}");
    }
    assert!(!body.contains("://"), "nothing comes from elsewhere: {body}");
    for path in ["/page.js", "/page.css", "/v1/status", "/v1/disks/web", "/v1/disks/web/map", "/v1/disks/web/history"] {
        let answer = ask(port, &format!("GET {path} HTTP/1.1\r\nHost: [::1]:{port}"));
        assert_eq!(status(&answer), 200, "{path}: {answer}");
    }
    let report = ask(port, &format!("GET /v1/disks/web/report HTTP/1.1\r\nHost: 127.0.0.1:{port}"));
    assert!(status(&report) == 200 && report.contains("\"outcome\":\"none\""), "{report}");

    for method in ["POST", "DELETE", "PUT", "PATCH", "OPTIONS", "HEAD"] {
        for path in ["/", "/v1/disks", "/v1/disks/web", "/v1/disks/web/detach"] {
            let answer = ask(port, &format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0"));
            assert_eq!(status(&answer), 405, "{method} {path}: {answer}");
        }
    }
    assert_eq!(node.status("web")["phase"], "serving", "it is still there");
    for host in ["evil.example", "localhost.evil.example", &format!("10.0.0.1:{port}")] {
        for path in ["/", "/v1/status"] {
            let answer = ask(port, &format!("GET {path} HTTP/1.1\r\nHost: {host}"));
            assert_eq!(status(&answer), 421, "{host} {path}: {answer}");
            assert!(!answer.contains("web"), "{answer}");
        }
    }
    assert_eq!(
        status(&ask(port, &format!("GET http://evil.example:{port}/v1/status HTTP/1.1\r\nHost: localhost"))),
        421
    );
    assert_eq!(status(&ask(port, "GET /v1/status HTTP/1.0")), 421, "who names no host is not shown anything");
    assert_eq!(status(&ask(port, "GET /metrics HTTP/1.1\r\nHost: localhost")), 404);
    // An open page does not keep the node.
    let mut open = TcpStream::connect(("127.0.0.1", port)).unwrap();
    write!(open, "GET /v1/status HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    open.read_exact(&mut [0; 12]).unwrap();
    node.stop();
}

#[test]
fn an_address_that_other_hosts_reach_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for address in ["0.0.0.0:8080", "8080"] {
        let said: Said = Command::new(program())
            .args(["serve", "--http", address, "--state-dir"])
            .arg(dir.path().join("state"))
            .arg("--control")
            .arg(dir.path().join("control.sock"))
            .stdin(Stdio::null())
            .output()
            .unwrap()
            .into();
        assert_eq!(said.code, 2, "{said:?}");
        assert!(said.stderr.lines().count() == 1 && said.stderr.contains("127.0.0.1:"), "{said:?}");
        assert!(!dir.path().join("state").exists(), "nothing was begun");
    }
}
