//! The way back: at once where the destination answers, after its lease where it does not.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal::{SIGCONT, SIGSTOP};

use crate::client::repeated;
use crate::pair::{LEASE, MIB, Pair};
use crate::support::signal;

/// The source's word for how long the destination may still run.
fn lease_left(pair: &Pair) -> Duration {
    Duration::from_millis(pair.a.status("web")["lease_remaining_ms"].as_u64().unwrap())
}

fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap()
}

#[test]
fn a_destination_that_answers_gives_the_disk_back_at_once() {
    let pair = Pair::handed_over(31);
    let mut client = pair.client_b();
    client.write(0, 8192, 1);
    pair.a.wait_status("web", "told of the write", |_| {
        json(&pair.a.cli(&["rollback", "web", "--plan", "--json"]))["lost_bytes"].as_u64().unwrap() >= 8192
    });
    let plan = json(&pair.a.cli(&["rollback", "web", "--plan", "--json"]));
    assert_eq!((&plan["rolled_back"], &plan["safe_now"]), (&false.into(), &true.into()), "{plan}");
    assert_eq!((&plan["peer_reachable"], &plan["phase"]), (&true.into(), &"handed-over".into()), "{plan}");
    assert_eq!((pair.phase_a().as_str(), pair.phase_b().as_str()), ("handed-over", "active"), "a plan changes nothing");
    client.write(8192, 4096, 2);

    let begun = Instant::now();
    let done = json(&pair.a.cli(&["rollback", "web", "--json"]));
    assert_eq!(done["rolled_back"], true, "{done}");
    assert!(begun.elapsed() < LEASE, "no lease is waited for: {:?}", begun.elapsed());
    assert!(pair.client_a().read(0, 12288) == pair.bytes(0, 12288), "the freeze point");
    pair.assert_source_untouched();
    pair.client_a().write(4 * MIB, 4096, 3);
    for request in ["read 0 4096", "write 0 4096 4", "flush"] {
        assert_eq!(client.ask(request), "error ESHUTDOWN", "{request}");
    }
    let status = pair.b.status("web");
    assert_eq!(status["phase"], "discarded", "{status}");
    assert!(pair.b_directory().join("disk.img").exists(), "what was written there is kept until somebody decides");
    assert!(pair.a.fails(3, &["rollback", "web"]).contains("nothing was handed over"));
    assert!(status["epoch"].as_u64() < pair.a.status("web")["epoch"].as_u64(), "the epoch has risen");

    // The next move takes what A wrote since, and nothing of what B did.
    pair.a.cli(&["prepare", "web", "--to", &pair.to_b]);
    pair.a.cli(&["handover", "web"]);
    let mut client = pair.client_b();
    assert!(client.read(0, 8192) == pair.bytes(0, 8192));
    assert!(client.read(4 * MIB, 4096) == repeated(3, 4096));
    pair.complete();
    assert!(pair.b.dir.join("state/removed/web.1/disk.img").exists(), "the discarded store was moved aside");
}

#[test]
fn a_dead_destination_is_waited_for_until_its_lease_has_ended() {
    let mut pair = Pair::handed_over(32);
    let mut client = pair.client_b();
    client.write(0, 4096, 1);
    drop(client);
    pair.b.kill();
    let (left, begun) = (lease_left(&pair), Instant::now());
    assert!(left > Duration::ZERO);
    let refused = pair.a.fails(3, &["rollback", "web"]);
    assert!(refused.contains("lease ends in") && refused.contains("--wait"), "{refused}");
    assert_eq!(pair.client_a().ask("write 0 4096 9"), "error EPERM");
    let plan = json(&pair.a.cli(&["rollback", "web", "--plan", "--json"]));
    assert_eq!(plan["peer_reachable"], false, "{plan}");
    pair.a.cli(&["rollback", "web", "--wait"]);
    assert!(begun.elapsed() >= left, "after {:?}, when {left:?} of the lease were left", begun.elapsed());
    pair.assert_source_untouched();
    pair.client_a().write(0, 4096, 2);
    // It comes back, and learns that it has lost.
    pair.b.start_again();
    pair.wait_b("discarded");
    let mut late = pair.client_b();
    assert_eq!(late.ask("read 0 4096"), "error ESHUTDOWN");
    assert!(pair.client_a().read(0, 4096) == repeated(2, 4096));
    // Also after another restart of both.
    drop(late);
    pair.a.kill();
    pair.b.kill();
    pair.a.start_again();
    pair.b.start_again();
    pair.wait_b("discarded");
    pair.a.cli(&["wait", "web", "--for", "serving", "--timeout", "10s"]);
    assert!(pair.client_a().read(0, 4096) == repeated(2, 4096));
    pair.client_a().write(0, 4096, 3);
}

#[test]
fn a_destination_that_wakes_up_after_its_lease_acknowledges_nothing() {
    // Longer than a rollback tries to reach the destination.
    let pair = Pair::with_lease(33, Duration::from_secs(6)).hand_over();
    let mut clients: Vec<_> = (0..4).map(|_| pair.client_b()).collect();
    clients.iter_mut().zip(0..).for_each(|(client, number)| client.write(number * MIB, 4096, 1));
    signal(pair.b.pid(), SIGSTOP);
    let (left, begun) = (lease_left(&pair), Instant::now());
    // These lie in its sockets when it wakes up: blocks that are there and blocks that are not, and a read.
    clients[0].send("write 0 4096 2");
    clients[1].send(&format!("write {} 512 2", 44 * MIB));
    clients[2].send("flush");
    clients[3].send(&format!("read {} 4096", 45 * MIB));
    let refused = pair.a.fails(3, &["rollback", "web"]);
    assert!(refused.contains("lease ends in"), "{refused}");
    pair.a.cli(&["rollback", "web", "--wait"]);
    assert!(begun.elapsed() >= left, "after {:?}, when {left:?} of the lease were left", begun.elapsed());
    pair.client_a().write(0, 4096, 3);
    signal(pair.b.pid(), SIGCONT);
    for client in &clients {
        assert_eq!(client.answer(crate::support::PATIENCE).as_deref(), Some("error ESHUTDOWN"));
    }
    pair.wait_b("discarded");
    assert!(pair.client_a().read(0, 4096) == repeated(3, 4096));
    assert!(pair.client_a().read(MIB, 4096) == pair.bytes(MIB, 4096));
}

#[test]
fn a_destination_that_wakes_up_before_anybody_took_the_disk_back_goes_on() {
    let pair = Pair::handed_over(34);
    let mut client = pair.client_b();
    signal(pair.b.pid(), SIGSTOP);
    client.send("write 0 4096 2");
    pair.a.wait_status("web", "past the lease", |status| status["lease_remaining_ms"] == 0);
    signal(pair.b.pid(), SIGCONT);
    assert_eq!(client.answer(crate::support::PATIENCE).as_deref(), Some("ok"), "it waited for the lease");
    pair.complete();
    assert!(client.read(0, 4096) == repeated(2, 4096));
    pair.assert_source_untouched();
}

#[test]
fn a_source_that_restarts_in_a_migration_can_still_be_rolled_back() {
    let mut pair = Pair::handed_over(35);
    pair.client_b().write(0, 4096, 1);
    pair.b.kill();
    pair.a.kill();
    pair.a.start_again();
    // It does not know when it granted last: the whole lease is waited for, from its start.
    let begun = Instant::now();
    assert!(pair.a.fails(3, &["rollback", "web"]).contains("lease ends in"));
    pair.a.cli(&["rollback", "web", "--wait"]);
    assert!(begun.elapsed() >= LEASE / 2, "{:?}", begun.elapsed());
    pair.assert_source_untouched();
    pair.client_a().write(0, 4096, 2);
}
