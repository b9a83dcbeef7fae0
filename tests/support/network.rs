//! Two hosts' network: two network namespaces with a cable between them, and what can be wrong with a cable.

use std::process::Command;

use super::run;

/// The address of the first host's end.
pub const A_ADDRESS: &str = "10.99.0.1";
/// The address of the second host's end.
pub const B_ADDRESS: &str = "10.99.0.2";

/// What a link can do wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The cable is pulled.
    Down,
    /// Everything is lost, both ways, and nobody says so.
    Silent,
    /// What the first host sends is lost.
    NothingToB,
    /// What the second host sends is lost.
    NothingToA,
    /// Every connection is answered with a reset, those that are there are destroyed.
    Reset,
    /// One packet in twenty is lost, each way.
    Loss,
}

impl Fault {
    /// All of them.
    pub const ALL: [Fault; 6] =
        [Fault::Down, Fault::Silent, Fault::NothingToB, Fault::NothingToA, Fault::Reset, Fault::Loss];

    /// Whether nothing at all gets through, there and back.
    pub fn cuts(self) -> bool {
        self != Fault::Loss
    }
}

/// Two namespaces with a link that is slow enough for the test to have time; gone when dropped.
pub struct Network {
    /// The first host's namespace.
    pub a: String,
    /// The second host's namespace.
    pub b: String,
}

impl Network {
    /// What the first host sends is limited to `rate` (as `tc` writes it, `48mbit`); `name` is short, and unique within
    /// the test's process.
    pub fn new(name: &str, rate: &str) -> Network {
        assert!(nix::unistd::geteuid().is_root(), "this test makes network namespaces: run it as root");
        run("nft", "nftables", &["--version"]);
        let id = format!("lm-{}-{name}", std::process::id());
        let network = Network { a: format!("{id}-a"), b: format!("{id}-b") };
        let (a, b) = (network.a.as_str(), network.b.as_str());
        ip(&["netns", "add", a]);
        ip(&["netns", "add", b]);
        ip(&["link", "add", "link0", "netns", a, "type", "veth", "peer", "name", "link0", "netns", b]);
        for (namespace, address) in [(a, A_ADDRESS), (b, B_ADDRESS)] {
            ip(&["-n", namespace, "address", "add", &format!("{address}/24"), "dev", "link0"]);
            ip(&["-n", namespace, "link", "set", "lo", "up"]);
            ip(&["-n", namespace, "link", "set", "link0", "up"]);
        }
        let slow = ["rate", rate, "burst", "64kb", "latency", "50ms"];
        run("tc", "iproute2", &[&["-n", a, "qdisc", "add", "dev", "link0", "root", "tbf"][..], &slow].concat());
        network
    }

    /// From now on the link is out of order.
    pub fn break_by(&self, fault: Fault) {
        let (a, b) = (self.a.as_str(), self.b.as_str());
        match fault {
            Fault::Down => ip(&["-n", a, "link", "set", "link0", "down"]),
            Fault::Silent => [a, b].iter().for_each(|host| incoming(host, "drop")),
            Fault::NothingToB => incoming(b, "drop"),
            Fault::NothingToA => incoming(a, "drop"),
            Fault::Loss => [a, b].iter().for_each(|host| incoming(host, "numgen random mod 100 < 5 drop")),
            Fault::Reset => {
                // A reset is not answered with another one.
                let rules = "tcp flags & rst == rst accept\n meta l4proto tcp reject with tcp reset";
                [a, b].iter().for_each(|host| incoming(host, rules));
                for (host, other) in [(a, B_ADDRESS), (b, A_ADDRESS)] {
                    run("nsenter", "util-linux", &[&netns(host), "ss", "--kill", "--tcp", "dst", other]);
                }
            }
        }
    }

    /// The link is as it was.
    pub fn mend(&self) {
        ip(&["-n", &self.a, "link", "set", "link0", "up"]);
        for host in [&self.a, &self.b] {
            nft(host, "table inet fault\n delete table inet fault\n");
        }
    }

    /// The link is as fast as it can.
    pub fn full_speed(&self) {
        run("tc", "iproute2", &["-n", &self.a, "qdisc", "delete", "dev", "link0", "root"]);
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for namespace in [&self.a, &self.b] {
            let _ = Command::new("ip").args(["netns", "delete", namespace]).status();
        }
    }
}

/// What arrives at a host over the link is treated so.
fn incoming(host: &str, rules: &str) {
    let chain = format!("type filter hook input priority 0\n iifname != link0 accept\n {rules}\n");
    nft(host, &format!("table inet fault {{\n chain in {{\n {chain}}}\n }}\n"));
}

fn nft(host: &str, rules: &str) {
    run("nsenter", "util-linux", &[&netns(host), "nft", rules]);
}

fn netns(host: &str) -> String {
    format!("--net=/run/netns/{host}")
}

#[track_caller]
fn ip(arguments: &[&str]) {
    run("ip", "iproute2", arguments);
}
