//! A client's namespace with a bridge, and two places ("s", "d") with the same address where a container may be.

use std::{
    fs::File,
    io::{Read, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use crate::lab::{run, until};

pub struct Net;

/// The client's end of a connection, in the client's namespace.
pub struct Client(TcpStream);

const PREFIX: &str = "lmreal-";

fn ip(args: &str) {
    run("iproute2", "ip", &args.split(' ').collect::<Vec<_>>());
}

impl Net {
    pub fn new() -> Self {
        let net = Self;
        for n in ["a", "s", "d"] {
            ip(&format!("netns add {PREFIX}{n}"));
            ip(&format!("-n {PREFIX}{n} link set lo up"));
        }
        ip(&format!("-n {PREFIX}a link add br0 type bridge"));
        ip(&format!("-n {PREFIX}a addr add 10.79.0.1/24 dev br0"));
        ip(&format!("-n {PREFIX}a link set br0 up"));
        for n in ["s", "d"] {
            ip(&format!("link add v{n} netns {PREFIX}a type veth peer name eth0 netns {PREFIX}{n}"));
            ip(&format!("-n {PREFIX}a link set v{n} master br0 up"));
            ip(&format!("-n {PREFIX}{n} link set eth0 address 02:00:00:00:00:79"));
            ip(&format!("-n {PREFIX}{n} addr add 10.79.0.2/24 dev eth0"));
        }
        net
    }

    pub fn path(&self, place: &str) -> PathBuf {
        Path::new("/run/netns").join(format!("{PREFIX}{place}"))
    }

    pub fn plug(&self, place: &str) {
        ip(&format!("-n {PREFIX}{place} link set eth0 up"));
    }

    pub fn unplug(&self, place: &str) {
        ip(&format!("-n {PREFIX}{place} link set eth0 down"));
    }

    /// Connects to the service as soon as it listens.
    pub async fn connect(&self) -> Client {
        let mut stream = None;
        until("the service to listen", || {
            let namespace = File::open(self.path("a")).unwrap();
            let connect = move || {
                nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
                let address = "10.79.0.2:7000".parse().unwrap();
                TcpStream::connect_timeout(&address, Duration::from_secs(2)).ok()
            };
            stream = std::thread::spawn(connect).join().unwrap();
            stream.is_some()
        })
        .await;
        let stream = stream.unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream.set_nodelay(true).unwrap();
        Client(stream)
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for n in ["a", "s", "d"] {
            let _ = Command::new("ip").args(["netns", "del", &format!("{PREFIX}{n}")]).status();
        }
    }
}

impl Client {
    pub fn send(&mut self, text: &[u8]) {
        self.0.write_all(text).unwrap();
    }

    pub fn expect(&mut self, text: &[u8]) {
        let mut got = vec![0; text.len()];
        self.0.read_exact(&mut got).unwrap();
        assert_eq!(got, text);
    }

    pub fn roundtrip(&mut self, text: &[u8]) {
        self.send(text);
        self.expect(text);
    }
}
