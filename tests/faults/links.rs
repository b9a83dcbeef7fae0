//! The link breaks, in every way and for every length of time, while B fills its disk; then it is mended, or never.

use std::time::{Duration, Instant};

use crate::client::{Connection, EPERM, ESHUTDOWN, Fail, boottime};
use crate::hosts::{Case, Hosts, publish, run_all};
use crate::service::{DISK, Load, Log, Part, Prober, accepted, assert_only_errors, assert_served, last_of};
use crate::support::network::Fault;

const LEASE: Duration = Duration::from_secs(2);
/// Longer than a rollback tries to reach the destination, so that there is something to refuse.
const LONG_LEASE: Duration = Duration::from_secs(6);
/// As the issue of a real outage has it: far longer than the lease, and than any TCP connection lives without an answer.
const REAL_OUTAGE: Duration = Duration::from_secs(20);
/// Cases beside each other.
const BESIDE: usize = 6;
const MIB: u64 = 16;

fn seconds(time: Duration) -> String {
    format!("{:.2}", time.as_secs_f64())
}

fn standstill(logs: &[Log], part: Part, from: i64, to: i64) -> Duration {
    logs.iter().filter(|log| log.part == part).map(|log| log.standstill(from, to)).max().unwrap()
}

/// The link is mended: B goes on by itself, to the end, and nobody has lost or seen anything wrong.
fn mended(name: &str, fault: Fault, outage: Duration) -> Vec<String> {
    let hosts = Hosts::new(name, MIB, LEASE);
    hosts.hand_over();
    let load = Load::service(hosts.b.nbd_socket(), &hosts.model);
    let prober = Prober::start(hosts.a.nbd_socket(), hosts.probed());
    load.wait_for_all(0, 20);
    assert!(hosts.b.status(DISK)["missing_bytes"].as_u64().unwrap() > 0, "it is still filling");
    let (broken, begun) = (boottime(), Instant::now());
    hosts.network.break_by(fault);
    // The outage itself: this is how long it lasts.
    std::thread::sleep(outage.saturating_sub(begun.elapsed()));
    let fenced = hosts.b.status(DISK)["phase"] == "fenced";
    if fault.cuts() && outage > LEASE {
        assert!(fenced, "without its lease B does not run: {}", hosts.b.status(DISK));
    }
    let mended = boottime();
    hosts.network.mend();
    hosts.b.cli(&["wait", DISK, "--for", "active", "--timeout", "30s"]);
    load.wait_for_all(mended, 1);
    let again = boottime();
    hosts.network.full_speed();
    hosts.b.cli(&["wait", DISK, "--timeout", "60s"]);
    let (logs, tries) = (load.finish(), prober.finish());
    assert_served(&logs);
    hosts.assert_complete();
    assert!(tries.len() > 5, "{} tries on A", tries.len());
    assert!(tries.iter().all(|tried| tried.2 == Err(Fail::Errno(EPERM))), "A took a write while B had the disk");
    hosts.assert_freeze_point(false);
    let (writes, reads) = (Part::Writes, Part::Reads);
    vec![
        format!("{fault:?}"),
        seconds(outage),
        fenced.to_string(),
        seconds(standstill(&logs, writes, broken, again)),
        seconds(standstill(&logs, reads, broken, again)),
        seconds(Duration::from_nanos((again - mended) as u64)),
        hosts.b.status(DISK)["stalled_us"].to_string(),
    ]
}

#[test]
fn a_link_that_comes_back() {
    let mut cases = Vec::new();
    // The long ones first: the short ones fit beside them.
    for outage in [REAL_OUTAGE, LEASE * 3 / 2, LEASE / 2] {
        for (number, fault) in Fault::ALL.into_iter().enumerate() {
            let name = format!("m{number}-{}", outage.as_millis() / 100);
            cases.push(Case::new(format!("{fault:?} for {outage:?}"), move || mended(&name, fault, outage)));
        }
    }
    let rows = run_all(BESIDE, cases);
    let header = ["fault", "outage_s", "fenced", "writes_stood_s", "reads_stood_s", "back_after_s", "stalled_us"];
    publish("link_outages.csv", &header, &rows);
}

/// The link is never mended: A takes the disk back, and not before that is safe.
fn taken_back(name: &str, fault: Fault) -> Vec<String> {
    let hosts = Hosts::new(name, MIB, LONG_LEASE);
    let mut device = Connection::open(&hosts.a.nbd_socket(), DISK, Default::default()).unwrap();
    hosts.hand_over();
    let load = Load::service(hosts.b.nbd_socket(), &hosts.model);
    let prober = Prober::start(hosts.a.nbd_socket(), hosts.probed());
    load.wait_for_all(0, 20);
    let (broken, begun) = (boottime(), Instant::now());
    hosts.network.break_by(fault);
    let mut refused = "-".to_owned();
    if fault.cuts() {
        refused = hosts.a.fails(3, &["rollback", DISK]);
        assert!(refused.contains("lease ends in") && refused.contains("--wait"), "{refused}");
        refused = refused.split_once("lease ends in ").unwrap().1.chars().take_while(|&c| c != ' ').collect();
        let left: f64 = refused.parse().expect("the seconds that are left");
        assert!(left > 0.0 && left < LONG_LEASE.as_secs_f64() * 1.2, "{left}");
        assert!(!prober.was_accepted());
    }
    hosts.a.cli(&["rollback", DISK, "--wait"]);
    let (rolled_back, took) = (boottime(), begun.elapsed());
    if fault.cuts() {
        assert!(took > LONG_LEASE - LONG_LEASE / 5, "taken back after {took:?}, before B's lease can have ended");
    }
    assert_eq!(device.write(hosts.probed(), &[1; 512]), Ok(()), "who was connected all the time goes on as well");
    prober.wait_accepted(1);
    hosts.assert_freeze_point(true);
    prober.wait_accepted(20);
    hosts.network.mend();
    hosts.wait_b("discarded");
    load.wait_until_shut_down();
    let (logs, tries) = (load.finish(), prober.finish());
    assert_only_errors(&logs, &[ESHUTDOWN]);
    let (last_b, first_a) = (last_of(&logs), accepted(&tries)[0]);
    for log in &logs {
        let late = log.acknowledged.iter().find(|(sent, _)| *sent > rolled_back);
        assert!(late.is_none(), "{:?}: asked after the rollback and acknowledged: {late:?}", log.part);
    }
    if fault.cuts() {
        assert!(last_b < first_a.1, "B acknowledged {} ms after A did", (last_b - first_a.1) / 1_000_000);
    }
    let wrong = tries.iter().find(|tried| !matches!(tried.2, Ok(()) | Err(Fail::Errno(EPERM))));
    assert!(wrong.is_none(), "A's client: {wrong:?}");
    assert!(hosts.b.dir.join("state/disks/web/disk.img").exists(), "what B wrote is kept until somebody decides");
    hosts.assert_freeze_point(true);
    assert!(hosts.b.status(DISK)["epoch"].as_u64() < hosts.a.status(DISK)["epoch"].as_u64());
    let millis = |from: i64, to: i64| ((to - from) / 1_000_000).to_string();
    vec![format!("{fault:?}"), refused, millis(broken, last_b), millis(broken, first_a.1), millis(last_b, first_a.1)]
}

#[test]
fn a_link_that_never_comes_back() {
    let cases = Fault::ALL.into_iter().enumerate().map(|(number, fault)| {
        Case::new(format!("rollback under {fault:?}"), move || taken_back(&format!("r{number}"), fault))
    });
    let rows = run_all(BESIDE, cases.collect());
    let header = ["fault", "refused_with_s_left", "last_ack_of_b_ms", "first_ack_of_a_ms", "nobody_ms"];
    publish("link_rollbacks.csv", &header, &rows);
}

/// A rollback that is refused for want of an answer may have been heard all the same: B stands still then, and A takes the disk
/// as soon as it hears so.
#[test]
fn a_refused_rollback_that_was_heard() {
    let hosts = Hosts::new("heard", MIB, LONG_LEASE);
    hosts.hand_over();
    let load = Load::service(hosts.b.nbd_socket(), &hosts.model);
    load.wait_for_all(0, 5);
    hosts.network.break_by(Fault::NothingToA);
    assert!(hosts.a.fails(3, &["rollback", DISK]).contains("lease ends in"));
    hosts.wait_b("discarded");
    load.wait_until_shut_down();
    let logs = load.finish();
    assert_only_errors(&logs, &[ESHUTDOWN]);
    let prober = Prober::start(hosts.a.nbd_socket(), hosts.probed());
    assert_eq!(hosts.a.status(DISK)["phase"], "handed-over", "A has not heard that B gave it back");
    assert!(!prober.was_accepted());
    hosts.network.mend();
    prober.wait_accepted(1);
    assert!(last_of(&logs) < accepted(&prober.finish())[0].1);
    hosts.assert_freeze_point(true);
}

/// Writers that never pause, all through the fence and the rollback behind it.
#[test]
fn writes_all_through_the_fence() {
    let hosts = Hosts::new("fence", MIB, LEASE);
    hosts.hand_over();
    let load = Load::start(hosts.b.nbd_socket(), &hosts.model, &[Part::Writes; 6], Duration::ZERO);
    let prober = Prober::start(hosts.a.nbd_socket(), hosts.probed());
    load.wait_for_all(0, 200);
    hosts.network.break_by(Fault::Silent);
    hosts.a.cli(&["rollback", DISK, "--wait"]);
    prober.wait_accepted(20);
    hosts.network.mend();
    hosts.wait_b("discarded");
    load.wait_until_shut_down();
    let (logs, tries) = (load.finish(), prober.finish());
    assert_only_errors(&logs, &[ESHUTDOWN]);
    let (last_b, first_a) = (last_of(&logs), accepted(&tries)[0].1);
    let count: usize = logs.iter().map(|log| log.acknowledged.len()).sum();
    let apart = (first_a - last_b) / 1_000_000;
    println!("{count} writes on B; the first on A {apart} ms after the last of them");
    assert!(apart > 0, "B acknowledged a write {} ms after A had the disk back", -apart);
    hosts.assert_freeze_point(true);
}
