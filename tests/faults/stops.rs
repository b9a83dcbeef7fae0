//! Nodes that stand still for longer than the lease, and then go on as if nothing had been.

use std::time::Duration;

use nix::sys::signal::Signal::{SIGCONT, SIGSTOP};

use crate::client::{EPERM, ESHUTDOWN, Fail, boottime};
use crate::hosts::{Case, Hosts, run_all};
use crate::service::{
    Acknowledged, DISK, Load, Log, Part, Prober, accepted, assert_only_errors, assert_served, last_of,
};
use crate::support::network::Fault;
use crate::support::signal;

const LEASE: Duration = Duration::from_secs(2);
const MIB: u64 = 16;

/// Writers that never pause, so that there is always something to acknowledge when the node wakes up, and a reader.
fn hard_load(hosts: &Hosts) -> Load {
    let parts = [Part::Writes, Part::Writes, Part::Changes, Part::Writes, Part::Reads];
    let load = Load::start(hosts.b.nbd_socket(), &hosts.model, &parts, Duration::ZERO);
    load.wait_for_all(0, 5);
    load
}

/// Acknowledgements within a time.
fn between(logs: &[Log], from: i64, to: i64) -> Vec<Acknowledged> {
    let all = logs.iter().flat_map(|log| &log.acknowledged);
    all.filter(|(_, at)| (from..to).contains(at)).copied().collect()
}

/// Stops B for longer than its lease; nothing it said meanwhile lies in a socket any more.
fn stop_b(hosts: &Hosts, load: &Load) {
    signal(hosts.b.pid(), SIGSTOP);
    hosts.a.wait_status(DISK, "past the lease", |status| status["lease_remaining_ms"] == 0);
    assert!(load.last_acknowledged() < boottime() - LEASE.as_nanos() as i64 / 2, "it stands still");
}

/// B runs for as long as its clients would have been served a thousand times.
fn stay_awake(hosts: &Hosts) {
    for _ in 0..40 {
        assert_eq!(hosts.b.status(DISK)["phase"], "fenced");
    }
}

/// B wakes up after its lease and cannot renew it: it acknowledges nothing until it can.
fn b_wakes_up_alone() {
    let hosts = Hosts::new("s-alone", MIB, LEASE);
    hosts.hand_over();
    let load = hard_load(&hosts);
    stop_b(&hosts, &load);
    hosts.network.break_by(Fault::Silent);
    let woken = boottime();
    signal(hosts.b.pid(), SIGCONT);
    hosts.wait_b("fenced");
    stay_awake(&hosts);
    let mended = boottime();
    hosts.network.mend();
    load.wait_for_all(mended, 5);
    hosts.network.full_speed();
    let logs = load.finish();
    let early = between(&logs, woken, mended);
    assert!(early.is_empty(), "{} acknowledged without a lease, the first {early:?}", early.len());
    assert_served(&logs);
    hosts.assert_complete();
    hosts.assert_freeze_point(false);
}

/// B wakes up after its lease, nobody has taken the disk back: it goes on, and nothing is lost.
fn b_wakes_up_in_time() {
    let hosts = Hosts::new("s-time", MIB, LEASE);
    hosts.hand_over();
    let load = hard_load(&hosts);
    let prober = Prober::start(hosts.a.nbd_socket(), hosts.probed());
    stop_b(&hosts, &load);
    let woken = boottime();
    signal(hosts.b.pid(), SIGCONT);
    load.wait_for_all(woken, 5);
    hosts.network.full_speed();
    let (logs, tries) = (load.finish(), prober.finish());
    assert_served(&logs);
    assert!(tries.iter().all(|tried| tried.2 == Err(Fail::Errno(EPERM))), "A took a write while B had the disk");
    hosts.assert_complete();
}

/// B wakes up when A has taken the disk back.
fn b_wakes_up_too_late() {
    let hosts = Hosts::new("s-late", MIB, LEASE);
    hosts.hand_over();
    let load = hard_load(&hosts);
    let prober = Prober::start(hosts.a.nbd_socket(), hosts.probed());
    stop_b(&hosts, &load);
    hosts.a.cli(&["rollback", DISK, "--wait"]);
    prober.wait_accepted(5);
    let woken = boottime();
    signal(hosts.b.pid(), SIGCONT);
    hosts.wait_b("discarded");
    load.wait_until_shut_down();
    let (logs, tries) = (load.finish(), prober.finish());
    assert_only_errors(&logs, &[ESHUTDOWN]);
    let late = between(&logs, woken, i64::MAX);
    assert!(late.is_empty(), "{} acknowledged after A had the disk back, the first {late:?}", late.len());
    assert!(last_of(&logs) < accepted(&tries)[0].1);
    assert!(hosts.b.dir.join("state/disks/web/disk.img").exists());
    hosts.assert_freeze_point(true);
}

/// A stands still: B's reads wait, it is fenced, and it goes on.
fn a_sleeps() {
    let hosts = Hosts::new("s-a", MIB, LEASE);
    hosts.hand_over();
    let load = Load::service(hosts.b.nbd_socket(), &hosts.model);
    load.wait_for_all(0, 10);
    signal(hosts.a.pid(), SIGSTOP);
    hosts.wait_b("fenced");
    let fenced = boottime();
    stay_awake(&hosts);
    let woken = boottime();
    signal(hosts.a.pid(), SIGCONT);
    load.wait_for_all(woken, 5);
    hosts.network.full_speed();
    hosts.b.cli(&["wait", DISK, "--timeout", "60s"]);
    let logs = load.finish();
    assert_served(&logs);
    let early = between(&logs, fenced, woken);
    assert!(early.is_empty(), "{} acknowledged while fenced, the first {early:?}", early.len());
    hosts.assert_complete();
    hosts.assert_freeze_point(false);
}

#[test]
fn nodes_that_stand_still_for_longer_than_the_lease() {
    let cases: [(&str, fn()); 4] = [
        ("B wakes up without a link", b_wakes_up_alone),
        ("B wakes up before anybody took the disk back", b_wakes_up_in_time),
        ("B wakes up after A took the disk back", b_wakes_up_too_late),
        ("A stands still", a_sleeps),
    ];
    run_all(2, cases.into_iter().map(|(name, run)| Case::new(name, run)).collect());
}
