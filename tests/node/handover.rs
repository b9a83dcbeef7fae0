//! Ownership moves between two nodes, and stays where the journals say.

use std::time::Duration;

use crate::client::{Client, bytes, repeated};
use crate::pair::{MIB, Pair};
use crate::support::{Node, free_port, run};

const A_MOMENT: Duration = Duration::from_millis(300);

#[test]
fn a_disk_moves_and_its_source_stays_as_it_was() {
    let mut pair = Pair::new(21);
    let (a, b) = (&pair.a, &pair.b);
    let mut old_client = pair.client_a();
    old_client.write(0, 4096, 1);
    pair.original[..4096].copy_from_slice(&repeated(1, 4096));
    a.cli(&["prepare", "web", "--to", &pair.to_b]);
    a.cli(&["wait", "web", "--for", "ready", "--timeout", "10s"]);
    b.cli(&["wait", "web", "--for", "ready", "--timeout", "10s"]);
    assert_eq!((pair.phase_a().as_str(), pair.phase_b().as_str()), ("preparing", "ready"));
    // Prepared, it is still in use at the source, and nothing is served at the destination.
    old_client.write(4096, 4096, 2);
    pair.original[4096..8192].copy_from_slice(&repeated(2, 4096));
    let mut client = pair.client_b();
    client.send("read 4096 4096");
    assert!(client.answer(A_MOMENT).is_none(), "I/O is held before the handover");
    a.cli(&["handover", "web"]);
    let answer = client.answer(crate::support::PATIENCE).expect("the read goes on");
    assert!(bytes(&answer) == repeated(2, 4096), "the last write before the freeze is seen");
    for command in ["active", "complete"].iter().zip(["60s", "100ms"]) {
        let said = b.try_cli(&["wait", "web", "--for", command.0, "--timeout", command.1]);
        assert_eq!(said.code, if *command.0 == "active" { 0 } else { 5 }, "{said:?}");
    }
    let status = b.status("web");
    assert_eq!((&status["role"], &status["phase"]), (&"destination".into(), &"active".into()), "{status}");
    assert!(status["faults"]["count"].as_u64().unwrap() >= 1 && status["missing_bytes"].as_u64().unwrap() > 0);
    assert!(status["lease_remaining_ms"].as_u64().unwrap() <= 2000, "{status}");
    assert_eq!(status["epoch"], a.status("web")["epoch"]);
    // Reads fetch on demand, writes stay here.
    assert!(client.read(40 * MIB + 100, 5000) == pair.bytes(40 * MIB + 100, 5000));
    client.write(40 * MIB, 512, 3);
    client.write(41 * MIB, 65536, 4);
    assert_eq!(client.ask("flush"), "ok");
    // The old owner refuses writes, from clients old and new, and still reads the freeze point.
    assert_eq!(old_client.ask("write 0 4096 9"), "error EPERM");
    assert_eq!(old_client.ask(&format!("trim {MIB} 4096")), "error EPERM");
    assert_eq!(pair.client_a().ask("write 0 4096 9"), "error EPERM");
    assert!(old_client.read(40 * MIB, 512) == pair.bytes(40 * MIB, 512));
    pair.assert_source_untouched();
    pair.complete();
    assert!(b.cli(&["verify", "web"]).ends_with("identical"));
    let verified: serde_json::Value = serde_json::from_str(&b.cli(&["verify", "web", "--json"])).unwrap();
    assert_eq!((&verified["missing_bytes"], &verified["verified"]), (&0.into(), &true.into()), "{verified}");
    assert!(a.fails(3, &["wait", "web", "--for", "serving"]).contains("released"));
    pair.assert_source_untouched();

    let mut expected = pair.original.clone();
    expected[40 * MIB as usize..][..512].copy_from_slice(&repeated(3, 512));
    expected[41 * MIB as usize..][..65536].copy_from_slice(&repeated(4, 65536));
    let copy = pair.dir.path().join("copy.img");
    run("nbdcopy", "libnbd-bin", &[&b.uri("web"), copy.to_str().unwrap()]);
    assert!(std::fs::read(&copy).unwrap() == expected);

    // Both nodes begin again: roles and content are what they were.
    drop((old_client, client));
    pair.a.stop();
    pair.b.stop();
    pair.a.start_again();
    pair.b.start_again();
    assert_eq!(pair.phase_a(), "released");
    pair.wait_b("complete");
    assert_eq!(pair.client_a().ask("write 0 4096 9"), "error EPERM");
    pair.client_b().write(0, 4096, 10);
    assert!(pair.client_b().read(41 * MIB, 65536) == repeated(4, 65536));
    pair.assert_source_untouched();
}

#[test]
fn a_cancel_leaves_nothing_at_the_destination() {
    let pair = Pair::new(22);
    pair.a.cli(&["prepare", "web", "--to", &pair.to_b]);
    pair.a.cli(&["prepare", "web", "--to", &pair.to_b]);
    assert!(pair.b_directory().exists());
    pair.a.cli(&["cancel", "web"]);
    crate::support::wait_for("the destination forgets", || pair.b.cli(&["status"]) == "no exports");
    crate::support::wait_for("its files are gone", || !pair.b_directory().exists());
    assert!(!pair.b.dir.join("state/removed").exists(), "nothing that was never owned is kept");
    assert_eq!(pair.phase_a(), "serving");
    pair.a.cli(&["wait", "web", "--for", "serving", "--timeout", "1s"]);
    pair.client_a().write(0, 4096, 5);
    pair.a.cli(&["cancel", "web"]);
    // And again, to the end.
    pair.a.cli(&["prepare", "web", "--to", &pair.to_b]);
    pair.a.cli(&["handover", "web"]);
    pair.a.cli(&["handover", "web"]);
    assert!(pair.client_b().read(0, 4096) == repeated(5, 4096));
    assert!(pair.a.fails(3, &["cancel", "web"]).contains("use rollback"));
    pair.complete();
    assert!(pair.b.cli(&["verify", "web"]).ends_with("identical"));
}

#[test]
fn a_source_that_restarts_before_the_handover_has_given_nothing_away() {
    let mut pair = Pair::new(23);
    pair.a.cli(&["prepare", "web", "--to", &pair.to_b]);
    pair.a.kill();
    pair.a.start_again();
    pair.a.cli(&["wait", "web", "--for", "serving", "--timeout", "10s"]);
    pair.client_a().write(0, 4096, 6);
    crate::support::wait_for("the destination forgets", || pair.b.cli(&["status"]) == "no exports");
}

#[test]
fn a_destination_that_restarts_before_the_handover_is_not_given_anything() {
    let mut pair = Pair::new(24);
    pair.a.cli(&["prepare", "web", "--to", &pair.to_b]);
    pair.b.kill();
    pair.b.start_again();
    crate::support::wait_for("the destination forgets", || pair.b.cli(&["status"]) == "no exports");
    let refused = pair.a.fails(3, &["handover", "web"]);
    assert!(refused.contains("handover of web") && refused.contains("prepare it again"), "{refused}");
    assert_eq!(pair.phase_a(), "serving", "it certainly was not taken, so it is not given");
    pair.client_a().write(0, 4096, 6);
    pair.a.cli(&["cancel", "web"]);
    pair.a.cli(&["prepare", "web", "--to", &pair.to_b]);
    pair.a.cli(&["handover", "web"]);
    pair.complete();
}

#[test]
fn reads_wait_while_the_source_is_away_and_then_go_on() {
    let mut pair = Pair::handed_over(25);
    let mut client = pair.client_b();
    client.write(0, 4096, 7);
    pair.a.kill();
    client.send(&format!("read {} 4096", 47 * MIB));
    pair.wait_b("fenced");
    assert!(client.answer(A_MOMENT).is_none(), "a missing block is waited for: no error, no zeroes");
    client.send("write 4096 4096 8");
    assert!(client.answer(A_MOMENT).is_none(), "and nothing is acknowledged while fenced");
    pair.a.start_again();
    assert_eq!(pair.phase_a(), "handed-over");
    assert_eq!(pair.client_a().ask("write 0 4096 9"), "error EPERM");
    let answer = client.answer(crate::support::PATIENCE).expect("the read goes on");
    assert!(bytes(&answer) == pair.bytes(47 * MIB, 4096));
    assert_eq!(client.answer(crate::support::PATIENCE).as_deref(), Some("ok"), "so does the write");
    pair.wait_b("active");
    pair.complete();
    assert!(client.read(0, 8192) == [repeated(7, 4096), repeated(8, 4096)].concat());
    assert!(pair.b.cli(&["verify", "web"]).ends_with("identical"));
    pair.assert_source_untouched();
}

#[test]
fn a_destination_that_restarts_goes_on_as_the_owner() {
    let mut pair = Pair::handed_over(26);
    let mut client = pair.client_b();
    for number in 0..64 {
        client.write(number * 300 * 1024, 2048, number + 1);
    }
    drop(client);
    pair.b.kill();
    pair.b.start_again();
    let first = pair.b.status("web");
    assert!(["fenced", "active"].contains(&first["phase"].as_str().unwrap()), "it waits for its lease: {first}");
    pair.b.cli(&["wait", "web", "--for", "active", "--timeout", "20s"]);
    let mut client = pair.client_b();
    for number in 0..64 {
        assert!(client.read(number * 300 * 1024, 2048) == repeated(number + 1, 2048), "write {number} is lost");
    }
    assert_eq!(pair.phase_a(), "handed-over");
    pair.complete();
    assert!(pair.b.cli(&["verify", "web"]).ends_with("identical"));
    pair.assert_source_untouched();
}

#[test]
fn a_disk_moves_on_from_where_it_came_to() {
    let pair = Pair::handed_over(27);
    pair.client_b().write(0, 4096, 11);
    pair.complete();
    let c_peer = format!("127.0.0.1:{}", free_port());
    let c = Node::start(pair.dir.path().join("c"), &["--peer", &c_peer]);
    pair.b.cli(&["prepare", "web", "--to", &c_peer]);
    pair.b.cli(&["handover", "web"]);
    let mut client = Client::connect(&c.uri("web"));
    assert!(client.read(0, 8192) == [&repeated(11, 4096)[..], pair.bytes(4096, 4096)].concat());
    client.write(4096, 4096, 12);
    assert_eq!(pair.client_b().ask("write 0 4096 9"), "error EPERM");
    c.cli(&["wait", "web", "--timeout", "60s"]);
    pair.b.cli(&["wait", "web", "--timeout", "60s"]);
    assert!(c.cli(&["verify", "web"]).ends_with("identical"));
    let (b, c_status) = (pair.b.status("web"), c.status("web"));
    assert_eq!((&b["role"], &b["phase"]), (&"source".into(), &"released".into()), "{b}");
    assert_eq!((&c_status["phase"], &c_status["epoch"]), (&"complete".into(), &2.into()), "{c_status}");
    // What was released can be removed; the store, which might be the only copy, is moved aside.
    pair.b.cli(&["remove", "web"]);
    assert_eq!(pair.b.cli(&["status"]), "no exports");
    assert!(pair.b.dir.join("state/removed/web.1/disk.img").exists());
    pair.a.cli(&["remove", "web"]);
    assert!(pair.image.exists(), "an image that was added stays where it is");
    assert!(client.read(0, 8192) == [repeated(11, 4096), repeated(12, 4096)].concat());
}
