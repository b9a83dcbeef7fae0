//! `examples/network-switch`: a client on the same switch finds the service where its disk is, wherever that goes.
//!
//! ```text
//!   host a: bridge -- port -- service's namespace          the same address in both,
//!             |                                            and not the same hardware address
//!   switch: bridge -- client
//!             |
//!   host b: bridge -- port -- service's namespace
//! ```

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use nix::sys::signal::Signal::{SIGCONT, SIGSTOP};

use crate::pair::MIB;
use crate::script::{Script, command};
use crate::support::{Node, program, random_image, run, signal, wait_for};

const SIZE: u64 = 24 * MIB;
const SERVICE: &str = "10.98.0.10:7000";
const HOSTS: [(&str, &str); 2] = [("a", "10.98.0.1"), ("b", "10.98.0.2")];

/// The namespaces, gone when dropped.
struct Net {
    id: String,
    dir: tempfile::TempDir,
}

impl Net {
    fn new() -> Net {
        assert!(nix::unistd::geteuid().is_root(), "this test makes network namespaces: run it as root");
        let net = Net { id: format!("lm-{}-switch", std::process::id()), dir: tempfile::tempdir().unwrap() };
        for name in ["switch", "client", "a", "b", "sa", "sb"] {
            ip(&format!("netns add {}", net.name(name)));
            net.ip(name, "link set lo up");
        }
        for name in ["switch", "a", "b"] {
            net.ip(name, "link add br0 type bridge");
            net.ip(name, "link set br0 up");
        }
        net.cable("switch", "pc", "client", "eth0");
        net.ip("switch", "link set pc master br0 up");
        net.ip("client", "address add 10.98.0.9/24 dev eth0");
        net.ip("client", "link set eth0 up");
        // The client asks nobody again whose address it is: who has it now must say so.
        net.inside("client", &["sysctl", "-qw", "net.ipv4.neigh.eth0.base_reachable_time_ms=3600000"]);
        for (host, address) in HOSTS {
            let (uplink, service) = (format!("p{host}"), format!("s{host}"));
            net.cable("switch", &uplink, host, "uplink");
            net.ip("switch", &format!("link set {uplink} master br0 up"));
            net.ip(host, "link set uplink master br0 up");
            net.ip(host, &format!("address add {address}/24 dev br0"));
            net.cable(host, "veth-web", &service, "eth0");
            net.ip(&service, "address add 10.98.0.10/24 dev eth0");
            net.ip(&service, "link set eth0 up");
            let settings = format!("BRIDGE=br0 PORT=veth-web\nNETNS={} INTERFACE=eth0\n", net.name(&service));
            std::fs::write(net.dir.path().join(format!("{host}.network")), settings).unwrap();
            net.serve(host, &service);
        }
        net
    }

    fn name(&self, name: &str) -> String {
        format!("{}-{name}", self.id)
    }

    fn ip(&self, name: &str, arguments: &str) {
        ip(&format!("-n {} {arguments}", self.name(name)));
    }

    fn cable(&self, from: &str, here: &str, to: &str, there: &str) {
        let [from, to] = [from, to].map(|name| self.name(name));
        ip(&format!("link add {here} netns {from} type veth peer name {there} netns {to}"));
    }

    fn inside(&self, name: &str, command: &[&str]) -> String {
        let namespace = format!("--net=/run/netns/{}", self.name(name));
        run("nsenter", "util-linux", &[&[namespace.as_str()], command].concat())
    }

    /// The service, which says on which host it is. Its thread ends with the test's process.
    fn serve(&self, host: &'static str, service: &str) {
        let namespace = self.file(service);
        std::thread::spawn(move || {
            setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
            for stream in TcpListener::bind("0.0.0.0:7000").unwrap().incoming().map_while(Result::ok) {
                let _ = (&stream).write_all(host.as_bytes());
            }
        });
    }

    fn file(&self, name: &str) -> File {
        File::open(format!("/run/netns/{}", self.name(name))).unwrap()
    }

    /// Which host the client reaches, if any.
    fn reached(&self) -> Option<String> {
        let namespace = self.file("client");
        let ask = move || {
            setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
            let limit = Duration::from_millis(500);
            let mut stream = TcpStream::connect_timeout(&SERVICE.parse().unwrap(), limit).ok()?;
            stream.set_read_timeout(Some(limit)).unwrap();
            let mut host = String::new();
            stream.read_to_string(&mut host).ok().map(|_| host)
        };
        std::thread::spawn(ask).join().unwrap()
    }

    fn plugged(&self, host: &str) -> bool {
        self.inside(host, &["ip", "link", "show", "dev", "veth-web"]).contains("master br0")
    }

    /// The client reaches the service on this host, and no other host has its address on the network.
    #[track_caller]
    fn goes_to(&self, host: &str) {
        let begun = Instant::now();
        wait_for(&format!("the client reaches {host}"), || self.reached().as_deref() == Some(host));
        println!("the client reaches {host} after {:.1?}", begun.elapsed());
        wait_for("one host is plugged in", || HOSTS.iter().all(|&(name, _)| self.plugged(name) == (name == host)));
        assert_eq!(self.reached().as_deref(), Some(host));
    }

    fn node(&self, host: &str, more: &[&str]) -> Node {
        let (_, address) = HOSTS.iter().find(|(name, _)| *name == host).unwrap();
        let peer = format!("{address}:10810");
        let arguments = [&["--insecure", "--lease", "4s", "--peer", &peer], more].concat();
        Node::start_in(Some(&self.name(host)), self.dir.path().join(host), &arguments)
    }

    fn follow(&self, host: &str, node: &Node) -> Script {
        let script = command("network-switch/follow.sh", &[]).get_program().to_owned();
        let hook = command("network-switch/bridge.sh", &[]).get_program().to_owned();
        let settings = self.dir.path().join(format!("{host}.network"));
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.name(host))).arg(script);
        command.args(["web", "--silence", "3", "--"]).args([hook, settings.into()]);
        Script::of(command.env("LAZY_MIGRATE", program()).env("LAZY_MIGRATE_CONTROL", node.control()))
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for name in ["switch", "client", "a", "b", "sa", "sb"] {
            let _ = Command::new("ip").args(["netns", "delete", &self.name(name)]).status();
        }
    }
}

#[track_caller]
fn ip(arguments: &str) {
    run("ip", "iproute2", &arguments.split(' ').collect::<Vec<_>>());
}

#[test]
fn a_client_finds_the_service_where_its_disk_is() {
    let net = Net::new();
    let image = net.dir.path().join("web.img");
    random_image(&image, SIZE, 97);
    let a = net.node("a", &["--disk", &format!("web={}", image.display())]);
    let b = net.node("b", &["--pull-rate", "300k"]);
    let followers = [net.follow("a", &a), net.follow("b", &b)];
    followers[1].says("down: web is not known here");
    net.goes_to("a");

    // A move that is given up.
    a.cli(&["prepare", "web", "--to", "10.98.0.2:10810"]);
    followers[1].says("down: web is not known here");
    a.cli(&["cancel", "web"]);
    net.goes_to("a");
    let there = || {
        a.cli(&["prepare", "web", "--to", "10.98.0.2:10810"]);
        a.cli(&["handover", "web"]);
        net.goes_to("b");
    };
    // One that succeeds, and is taken back.
    there();
    a.cli(&["rollback", "web"]);
    net.goes_to("a");
    assert_eq!(b.status("web")["phase"], "discarded");
    // One whose destination hangs, and says nothing any more.
    there();
    signal(b.pid(), SIGSTOP);
    a.cli(&["rollback", "web", "--wait"]);
    followers[1].says("the node has not answered for 3 s");
    net.goes_to("a");
    signal(b.pid(), SIGCONT);
    b.wait_status("web", "discarded", |status| status["phase"] == "discarded");
    net.goes_to("a");
    // And one for good: whoever follows it may come and go, and so may the node.
    there();
    let mut reader = crate::client::Client::connect(&b.uri("web"));
    for at in (0..SIZE).step_by(MIB as usize) {
        reader.read(at, MIB);
    }
    b.cli(&["wait", "web", "--timeout", "60s"]);
    let [follows_a, follows_b] = followers;
    for follower in [follows_a, follows_b] {
        follower.interrupt();
        assert_eq!(follower.end().code, 130);
    }
    net.goes_to("b");
    let follower = net.follow("b", &b);
    follower.says("up: web is destination complete");
    drop((reader, b));
    net.goes_to("b");
}

#[test]
fn what_is_wrong_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let settings = dir.path().join("web");
    std::fs::write(&settings, "BRIDGE=br0\n").unwrap();
    let settings = settings.to_str().unwrap();
    for (name, arguments, words) in [
        ("network-switch/follow.sh", &["web"][..], "a DISK and a HOOK are needed"),
        ("network-switch/follow.sh", &["web", "--silence", "x", "--", "true"], "--silence x"),
        ("network-switch/bridge.sh", &["/nowhere", "up"], "cannot read the settings /nowhere"),
        ("network-switch/bridge.sh", &[settings, "up"], "PORT"),
        ("network-switch/bridge.sh", &[], "usage"),
    ] {
        let said = Script::of(&mut command(name, arguments)).end();
        assert!(said.code == 2 && said.stderr.contains(words), "{name} {arguments:?}: {said:?}");
    }
}
