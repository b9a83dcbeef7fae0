//! `kill -9` of either node, or both, at every phase: who owns the disk afterwards, and that the documented command goes
//! on from there.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::signal::Signal::{SIGCONT, SIGSTOP};

use crate::client::{Connection, EPERM, ESHUTDOWN, Fail, boottime};
use crate::hosts::{B_PEER, Case, Hosts, in_background, publish, run_all};
use crate::service::{DISK, Load, Prober, Tried, accepted, assert_only_errors};
use crate::support::network::Fault;
use crate::support::{signal, wait_for};

const LEASE: Duration = Duration::from_secs(2);
const BESIDE: usize = 6;
const MIB: u64 = 12;

/// Where a migration is when a node is killed, and how it is held there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    /// Nothing was begun.
    Serving,
    /// B was asked and has not answered: its node is stopped.
    Preparing,
    /// B is prepared.
    Ready,
    /// A has frozen and given the disk away, and B has not heard of it: its node is stopped.
    Untold,
    /// B has just been told.
    Told,
    /// B runs, and fills.
    Filling,
    /// The link is cut, and B has noticed.
    Fenced,
    /// B has everything, and A does not know: its node is stopped.
    AllPresent,
    /// A is released.
    Complete,
    /// A took the disk back, and B has said so.
    RolledBack,
    /// A took the disk back while the link was cut: B does not know.
    TakenBackUnheard,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    A,
    B,
    Both,
}

/// Who accepts writes when what was killed runs again, before anybody types anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    A,
    B,
    /// Given away and not taken: writes wait on B or are refused, until somebody decides.
    Nobody,
    /// B, if the word that lay in its node's socket is still worth something when the node goes on; otherwise nobody.
    PerhapsB,
}

/// What the operator types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    /// `prepare` and `handover`, as if for the first time.
    Migrate,
    /// `cancel`, then the same.
    CancelAndMigrate,
    /// `handover` again: the word was lost.
    HandOverAgain,
    /// `rollback`, which asks B and need not wait; then the migration from its beginning.
    RollBackAndMigrate,
    /// Nothing but `wait`.
    Wait,
    /// Nothing is left to do; `rollback` says why not.
    Nothing,
}

/// The table: phase, and for each side that is killed, who owns the disk then and what goes on from there.
#[rustfmt::skip]
const TABLE: [(At, Side, Owner, Then); 33] = [
    (At::Serving,    Side::A,    Owner::A,      Then::Migrate),
    (At::Serving,    Side::B,    Owner::A,      Then::Migrate),
    (At::Serving,    Side::Both, Owner::A,      Then::Migrate),
    (At::Preparing,  Side::A,    Owner::A,      Then::Migrate),
    (At::Preparing,  Side::B,    Owner::A,      Then::Migrate),
    (At::Preparing,  Side::Both, Owner::A,      Then::Migrate),
    (At::Ready,      Side::A,    Owner::A,      Then::Migrate),
    (At::Ready,      Side::B,    Owner::A,      Then::CancelAndMigrate),
    (At::Ready,      Side::Both, Owner::A,      Then::Migrate),
    (At::Untold,     Side::A,    Owner::PerhapsB, Then::HandOverAgain),
    (At::Untold,     Side::B,    Owner::Nobody, Then::RollBackAndMigrate),
    (At::Untold,     Side::Both, Owner::Nobody, Then::RollBackAndMigrate),
    (At::Told,       Side::A,    Owner::B,      Then::Wait),
    (At::Told,       Side::B,    Owner::B,      Then::Wait),
    (At::Told,       Side::Both, Owner::B,      Then::Wait),
    (At::Filling,    Side::A,    Owner::B,      Then::Wait),
    (At::Filling,    Side::B,    Owner::B,      Then::Wait),
    (At::Filling,    Side::Both, Owner::B,      Then::Wait),
    (At::Fenced,     Side::A,    Owner::B,      Then::Wait),
    (At::Fenced,     Side::B,    Owner::B,      Then::Wait),
    (At::Fenced,     Side::Both, Owner::B,      Then::Wait),
    (At::AllPresent, Side::A,    Owner::B,      Then::Wait),
    (At::AllPresent, Side::B,    Owner::B,      Then::Wait),
    (At::AllPresent, Side::Both, Owner::B,      Then::Wait),
    (At::Complete,   Side::A,    Owner::B,      Then::Nothing),
    (At::Complete,   Side::B,    Owner::B,      Then::Nothing),
    (At::Complete,   Side::Both, Owner::B,      Then::Nothing),
    (At::RolledBack, Side::A,    Owner::A,      Then::Migrate),
    (At::RolledBack, Side::B,    Owner::A,      Then::Migrate),
    (At::RolledBack, Side::Both, Owner::A,      Then::Migrate),
    (At::TakenBackUnheard, Side::A,    Owner::A, Then::Migrate),
    (At::TakenBackUnheard, Side::B,    Owner::A, Then::Migrate),
    (At::TakenBackUnheard, Side::Both, Owner::A, Then::Migrate),
];

/// What holds a migration where it is.
#[derive(Default)]
struct Held {
    /// The command that waits.
    command: Option<JoinHandle<i32>>,
    stopped_a: bool,
    stopped_b: bool,
    cut: bool,
    load: Option<Load>,
}

impl At {
    fn reach(self, hosts: &Hosts) -> Held {
        let (a, b) = (&hosts.a, &hosts.b);
        let load = || Some(Load::service(b.nbd_socket(), &hosts.model));
        let phase_a = |phase: &str| drop(a.wait_status(DISK, phase, |status| status["phase"] == phase));
        match self {
            At::Serving => Held::default(),
            At::Preparing => {
                signal(b.pid(), SIGSTOP);
                let command = Some(in_background(a.control(), &["prepare", DISK, "--to", B_PEER]));
                phase_a("preparing");
                Held { command, stopped_b: true, ..Held::default() }
            }
            At::Ready => {
                a.cli(&["prepare", DISK, "--to", B_PEER]);
                Held::default()
            }
            At::Untold => {
                a.cli(&["prepare", DISK, "--to", B_PEER]);
                signal(b.pid(), SIGSTOP);
                let command = Some(in_background(a.control(), &["handover", DISK]));
                phase_a("handed-over");
                Held { command, stopped_b: true, ..Held::default() }
            }
            At::Told => {
                a.cli(&["prepare", DISK, "--to", B_PEER]);
                let load = load();
                a.cli(&["handover", DISK]);
                Held { load, ..Held::default() }
            }
            At::Filling => {
                hosts.hand_over();
                let load = load().unwrap();
                load.wait_for_all(0, 10);
                assert!(b.status(DISK)["missing_bytes"].as_u64().unwrap() > 0, "it is still filling");
                Held { load: Some(load), ..Held::default() }
            }
            At::Fenced => {
                let held = At::Filling.reach(hosts);
                hosts.network.break_by(Fault::Silent);
                hosts.wait_b("fenced");
                Held { cut: true, ..held }
            }
            At::AllPresent => {
                hosts.hand_over();
                let mut writer = Connection::open(&b.nbd_socket(), DISK, Arc::default()).unwrap();
                signal(a.pid(), SIGSTOP);
                // All of it, within the lease: what is written need not be fetched.
                for offset in (0..hosts.model.size()).step_by(1 << 20) {
                    let bytes = hosts.model.begin(offset, 1 << 20);
                    assert_eq!(writer.write(offset, &bytes), Ok(()));
                    hosts.model.acknowledged(offset, 1 << 20);
                }
                b.wait_status(DISK, "all there", |status| status["missing_bytes"] == 0);
                Held { stopped_a: true, ..Held::default() }
            }
            At::Complete => {
                hosts.hand_over();
                hosts.network.full_speed();
                let load = load().unwrap();
                b.cli(&["wait", DISK, "--timeout", "60s"]);
                a.cli(&["wait", DISK, "--timeout", "60s"]);
                load.wait_for_all(0, 20);
                Held { load: Some(load), ..Held::default() }
            }
            At::RolledBack => {
                let held = At::Filling.reach(hosts);
                a.cli(&["rollback", DISK]);
                held.load.as_ref().unwrap().wait_until_shut_down();
                held
            }
            At::TakenBackUnheard => {
                let held = At::Fenced.reach(hosts);
                a.cli(&["rollback", DISK, "--wait"]);
                held
            }
        }
    }

    /// Whether B had the disk before A took it back.
    fn is_taken_back(self) -> bool {
        matches!(self, At::RolledBack | At::TakenBackUnheard)
    }
}

/// Kills and starts again; what was stopped or cut goes on, and the command that waited has ended.
fn kill(hosts: &mut Hosts, held: &mut Held, side: Side) {
    if side != Side::B {
        hosts.a.kill();
    }
    if side != Side::A {
        hosts.b.kill();
    }
    if let Some(command) = held.command.take() {
        // Ended before anything is back: what becomes of it is not left to chance.
        assert_ne!(command.join().unwrap(), 0, "a command that came to nothing");
    }
    if side != Side::B {
        hosts.a.start_again();
    }
    if side != Side::A {
        hosts.b.start_again();
    }
    if held.stopped_a && side == Side::B {
        signal(hosts.a.pid(), SIGCONT);
    }
    if held.stopped_b && side == Side::A {
        signal(hosts.b.pid(), SIGCONT);
    }
    if held.cut {
        hosts.network.mend();
    }
}

fn killed(at: At, side: Side, owner: Owner, then: Then, name: &str) -> Vec<String> {
    let mut hosts = Hosts::new(name, MIB, LEASE);
    let mut held = at.reach(&hosts);
    // Both sides are tried all the time from here on.
    let (probed, a_socket, b_socket) = (hosts.probed(), hosts.a.nbd_socket(), hosts.b.nbd_socket());
    let (on_a, on_b) = (Prober::start(a_socket.clone(), probed), Prober::start(b_socket.clone(), probed));
    let killed_at = boottime();
    kill(&mut hosts, &mut held, side);
    let (a, b) = (&hosts.a, &hosts.b);
    match owner {
        Owner::A => on_a.wait_accepted(3),
        Owner::B => on_b.wait_accepted(3),
        Owner::Nobody | Owner::PerhapsB => {
            // Long enough for what goes on by itself: another lease.
            let lease_over = killed_at + 2 * LEASE.as_nanos() as i64;
            wait_for("another lease", || boottime() > lease_over);
        }
    }
    let stood = |tries: &[Tried]| {
        let first = accepted(tries).into_iter().find(|&(sent, _)| sent > killed_at);
        first.map(|(_, at)| (at - killed_at) / 1_000_000)
    };
    let (tries_a, tries_b) = (on_a.finish(), on_b.finish());
    let found = (!accepted(&tries_a).is_empty(), !accepted(&tries_b).is_empty());
    let expected = (owner == Owner::A, owner == Owner::B || owner == Owner::PerhapsB && found.1);
    assert_eq!(
        found,
        expected,
        "who accepted writes (A, B)\nA: {}\nB: {}",
        a.status(DISK),
        b.cli(&["status", "--json"])
    );
    let errors = |tries: &[Tried], allowed: &[u32]| {
        let wrong = tries.iter().find(|tried| matches!(tried.2, Err(Fail::Errno(errno)) if !allowed.contains(&errno)));
        assert!(wrong.is_none(), "a client that never saw such an error before: {wrong:?}");
    };
    errors(&tries_a, if owner == Owner::A { &[] } else { &[EPERM] });
    errors(&tries_b, if matches!(owner, Owner::B | Owner::PerhapsB) { &[] } else { &[ESHUTDOWN] });

    // B's clients: served to the end, or told that it is over.
    let finish_load = |held: &mut Held| {
        let Some(load) = held.load.take() else { return };
        if at.is_taken_back() {
            load.wait_until_shut_down();
            assert_only_errors(&load.finish(), &[ESHUTDOWN]);
        } else {
            load.wait_for_all(boottime(), 1);
            assert_only_errors(&load.finish(), &[]);
        }
    };
    finish_load(&mut held);
    hosts.assert_freeze_point(owner == Owner::A);
    go_on(&hosts, at, then);
    let row = [
        format!("{at:?}"),
        format!("{side:?}"),
        format!("{owner:?}"),
        format!("{then:?}"),
        stood(if owner == Owner::A { &tries_a } else { &tries_b }).map_or("-".into(), |ms| ms.to_string()),
    ];
    row.to_vec()
}

/// The operator goes on as the table says; at the end the disk is complete at B, and right.
fn go_on(hosts: &Hosts, at: At, then: Then) {
    let (a, b) = (&hosts.a, &hosts.b);
    let migrate = || {
        // What B had of an earlier attempt, it has given up by itself by now, or does so soon.
        wait_for("B has given the earlier attempt up", || {
            let status: serde_json::Value = serde_json::from_str(&b.cli(&["status", "--json"])).unwrap();
            status["disks"].as_array().unwrap().iter().all(|disk| disk["phase"] == "discarded")
        });
        hosts.hand_over();
    };
    // What an earlier attempt wrote on B is nothing to the next one.
    let mut model = hosts.model.clone();
    match then {
        Then::Migrate => {
            if at.is_taken_back() {
                model = crate::model::Model::new(hosts.original.clone());
            }
            migrate();
        }
        Then::CancelAndMigrate => {
            a.cli(&["cancel", DISK]);
            migrate();
        }
        Then::HandOverAgain => drop(a.cli(&["handover", DISK])),
        Then::RollBackAndMigrate => {
            a.cli(&["rollback", DISK]);
            migrate();
        }
        Then::Wait => {}
        Then::Nothing => {
            let refused = a.fails(3, &["rollback", DISK]);
            assert!(refused.contains("migrate in the other direction"), "{refused}");
        }
    }
    let prober = Prober::start(b.nbd_socket(), hosts.probed());
    prober.wait_accepted(1);
    if at != At::Complete {
        hosts.network.full_speed();
    }
    drop(prober.finish());
    hosts.assert_complete_as(&model);
    let mut client = Connection::open(&a.nbd_socket(), DISK, Arc::default()).unwrap();
    assert_eq!(client.write(0, &[1; 512]), Err(Fail::Errno(EPERM)), "A has released the disk");
}

#[test]
fn killed_at_every_phase_on_every_side() {
    let cases = TABLE.into_iter().enumerate().map(|(number, (at, side, owner, then))| {
        Case::new(format!("{at:?}, {side:?} killed"), move || killed(at, side, owner, then, &format!("k{number}")))
    });
    let rows = run_all(BESIDE, cases.collect());
    publish("kills.csv", &["phase", "killed", "owner", "then", "accepted_after_ms"], &rows);
}
