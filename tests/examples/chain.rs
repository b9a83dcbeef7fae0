//! `examples/chain.sh`: a disk goes on from B to C, although B has not all of it yet.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::client::{Client, repeated};
use crate::pair::{MIB, Pair};
use crate::script::{run, start};
use crate::support::network::{Fault, Network};
use crate::support::{Node, free_port, random_image};

const SIZE: u64 = 32 * MIB;
const TO_C: &str = "10.99.0.2:10811";

/// Writes to the export's first MiB until it belongs to somebody else; returns what was acknowledged last.
fn write_all_the_while(client: &mut Client, stop: &AtomicBool) -> u64 {
    let mut number = 0;
    while !stop.load(Ordering::Relaxed) {
        match client.ask(&format!("write {} 4096 {}", number % 256 * 4096, number + 1)).as_str() {
            "ok" => number += 1,
            "error EPERM" => break,
            other => panic!("write {number}: {other}"),
        }
    }
    number
}

#[test]
fn a_disk_moves_on_while_it_is_written_and_its_first_host_is_cut_off_for_a_while() {
    let network = Network::new("chain", "40mbit");
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("web.img");
    random_image(&image, SIZE, 91);
    let original = std::fs::read(&image).unwrap();
    let disk = format!("web={}", image.display());
    let node = |host: &str, at: &str, more: &[&str]| {
        let arguments = [&["--insecure", "--lease", "2s", "--peer", at], more].concat();
        let namespace = if host == "a" { &network.a } else { &network.b };
        Node::start_in(Some(namespace), dir.path().join(host), &arguments)
    };
    let a = node("a", "10.99.0.1:10810", &["--disk", &disk]);
    let b = node("b", "10.99.0.2:10810", &[]);
    let c = node("c", TO_C, &[]);
    a.cli(&["prepare", "web", "--to", "10.99.0.2:10810"]);
    a.cli(&["handover", "web"]);
    let mut writer = Client::connect(&b.uri("web"));
    writer.write(0, 4096, 1);

    let stop = AtomicBool::new(false);
    let written = std::thread::scope(|scope| {
        let writer = scope.spawn(|| write_all_the_while(&mut writer, &stop));
        let script = start(&b, "chain.sh", &["web", "--to", TO_C]);
        script.says("bytes are here");
        network.break_by(Fault::Down);
        script.says("10.99.0.1:10810 is not heard: web stands still");
        assert_eq!(b.status("web")["phase"], "fenced");
        network.mend();
        script.says("all of web is here; moving it on");
        let said = script.end();
        stop.store(true, Ordering::Relaxed);
        assert_eq!(said.code, 0, "{}", said.stderr);
        writer.join().unwrap()
    });
    assert_eq!((&a.status("web")["phase"], &b.status("web")["phase"]), (&"released".into(), &"released".into()));
    assert_eq!(c.status("web")["phase"], "complete");
    assert!(c.cli(&["verify", "web"]).ends_with("identical"));
    assert!(written > 256, "only {written} writes");
    let mut reader = Client::connect(&c.uri("web"));
    for slot in 0..256 {
        // The last number that went to this place.
        let number = (0..written).rev().find(|number| number % 256 == slot).unwrap() + 1;
        assert!(reader.read(slot * 4096, 4096) == repeated(number, 4096), "place {slot}, of {written} writes");
    }
    for at in (MIB..SIZE).step_by(MIB as usize) {
        assert!(reader.read(at, MIB) == original[at as usize..][..MIB as usize], "what nobody wrote, at {at}");
    }
}

#[test]
fn a_hurry_is_not_limited_and_a_second_time_there_is_nothing_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("web.img");
    random_image(&image, SIZE, 92);
    let disk = format!("web={}", image.display());
    let [to_a, to_b, to_c] = [(); 3].map(|()| format!("127.0.0.1:{}", free_port()));
    let a = Node::start(dir.path().join("a"), &["--peer", &to_a, "--disk", &disk]);
    // A minute and more for all of it.
    let b = Node::start(dir.path().join("b"), &["--peer", &to_b, "--pull-rate", "400k"]);
    let c = Node::start(dir.path().join("c"), &["--peer", &to_c]);
    let wrong = run(&b, "chain.sh", &["web", "--to", &to_c]);
    assert_eq!(wrong.code, 1, "{wrong:?}");
    assert!(wrong.stderr.contains("no export 'web'"), "{wrong:?}");
    a.cli(&["prepare", "web", "--to", &to_b]);
    a.cli(&["handover", "web"]);

    let script = start(&b, "chain.sh", &["web", "--to", &to_c]);
    script.says("bytes are here");
    script.interrupt();
    let said = script.end();
    assert_eq!(said.code, 130, "{said:?}");
    assert!(said.stderr.ends_with("type it again to go on"), "{said:?}");
    assert_eq!(b.status("web")["phase"], "active");
    let late = run(&b, "chain.sh", &["web", "--to", &to_c, "--timeout", "1"]);
    assert_eq!(late.code, 5, "{late:?}");

    let begun = Instant::now();
    let said = run(&b, "chain.sh", &["web", "--to", &to_c, "--hurry"]);
    assert_eq!(said.code, 0, "{said:?}");
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    assert_eq!(b.status("web")["device"], serde_json::Value::Null, "it is detached again");
    assert!(c.cli(&["verify", "web"]).ends_with("identical"));
    assert_eq!(run(&b, "chain.sh", &["web", "--to", &to_c]).code, 0);
    let elsewhere = run(&b, "chain.sh", &["web", "--to", &to_a]);
    assert_eq!(elsewhere.code, 3, "{elsewhere:?}");
    for wrong in [&["web"][..], &["web", "--to"], &["web", "--to", &to_c, "--container", "web"], &["web", "--nothing"]]
    {
        assert_eq!(run(&b, "chain.sh", wrong).code, 2, "{wrong:?}");
    }
}

#[test]
fn what_was_taken_back_does_not_move_on() {
    let pair = Pair::handed_over(93);
    let script = start(&pair.b, "chain.sh", &["web", "--to", "127.0.0.1:1"]);
    script.says("bytes are here");
    pair.a.cli(&["rollback", "web"]);
    let said = script.end();
    assert_eq!(said.code, 3, "{said:?}");
    assert!(said.stderr.contains("has taken it back"), "{said:?}");
    assert_eq!(pair.phase_a(), "serving");
}
