//! An NBD client that is not ours (libnbd, steered by `client.py`), and what nbdkit says about the reads it served.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use crate::support::{Background, PATIENCE, wait_for_socket};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/node/client.py");

/// One connection, kept open between requests.
pub struct Client {
    child: Child,
    requests: ChildStdin,
    answers: Receiver<String>,
}

impl Client {
    /// Connects to an export.
    #[track_caller]
    pub fn connect(uri: &str) -> Client {
        let client = Client::try_connect(uri);
        client
            .unwrap_or_else(|| panic!("cannot connect to {uri} with libnbd; is the package python3-libnbd installed?"))
    }

    /// Connects to an export that may not be there.
    pub fn try_connect(uri: &str) -> Option<Client> {
        // Debian's own python3: another one does not have Debian's libnbd.
        let mut child = Command::new("/usr/bin/python3")
            .args([SCRIPT, uri])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot run /usr/bin/python3 ({error}); install the package python3"));
        let (requests, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let (tell, answers) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                let _ = tell.send(line);
            }
        });
        let client = Client { child, requests, answers };
        (client.answers.recv_timeout(PATIENCE).as_deref() == Ok("connected")).then_some(client)
    }

    /// Sends a request and does not wait for its answer.
    pub fn send(&mut self, request: &str) {
        // A client whose server has gone says so in its next answer.
        let _ = writeln!(self.requests, "{request}");
    }

    /// The answer to the oldest request without one, if it comes in time.
    pub fn answer(&self, within: Duration) -> Option<String> {
        match self.answers.recv_timeout(within) {
            Ok(answer) => Some(answer),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some("error: the client has gone".into()),
        }
    }

    /// Sends a request and waits for its answer.
    #[track_caller]
    pub fn ask(&mut self, request: &str) -> String {
        self.send(request);
        self.answer(PATIENCE).unwrap_or_else(|| panic!("no answer to '{request}'"))
    }

    /// Reads.
    #[track_caller]
    pub fn read(&mut self, offset: u64, length: u64) -> Vec<u8> {
        bytes(&self.ask(&format!("read {offset} {length}")))
    }

    /// Writes a number, repeated.
    #[track_caller]
    pub fn write(&mut self, offset: u64, length: u64, number: u64) {
        assert_eq!(self.ask(&format!("write {offset} {length} {number}")), "ok");
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What [`Client::write`] writes.
pub fn repeated(number: u64, length: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(length as usize / 8)
}

/// The bytes of a read's answer.
#[track_caller]
pub fn bytes(answer: &str) -> Vec<u8> {
    let hex = answer.strip_prefix("ok ").unwrap_or_else(|| panic!("not read: {answer}"));
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
}

/// Many connections that ask for the same bytes at the same time. Returns how many different answers there were, and one
/// of them.
pub fn crowd(uri: &str, count: usize, offset: u64, length: u64) -> (usize, Vec<u8>) {
    let numbers = [count as u64, offset, length].map(|number| number.to_string());
    let output = crate::support::run(
        "/usr/bin/python3",
        "python3-libnbd",
        &[&[SCRIPT, "--crowd", uri][..], &numbers.each_ref().map(String::as_str)].concat(),
    );
    let last = output.lines().last().unwrap();
    let (different, hex) = last.split_once(' ').unwrap();
    (different.parse().unwrap(), bytes(&format!("ok {hex}")))
}

/// An image behind nbdkit, which logs every read.
pub struct Nbdkit {
    server: Option<Background>,
    image: PathBuf,
    socket: PathBuf,
    log: PathBuf,
}

impl Nbdkit {
    /// Serves `image`; `delay_ms` is how long each read takes.
    pub fn start(dir: &Path, image: &Path, delay_ms: u32) -> Nbdkit {
        let (socket, log) = (dir.join("nbdkit.sock"), dir.join("nbdkit.log"));
        let mut server = Nbdkit { server: None, image: image.into(), socket, log };
        server.start_again(delay_ms);
        server
    }

    /// Starts it again after [`Nbdkit::kill`].
    pub fn start_again(&mut self, delay_ms: u32) {
        let _ = std::fs::remove_file(&self.socket);
        let server = Background::start(
            "nbdkit",
            "nbdkit",
            &[
                "--foreground",
                "--unix",
                self.socket.to_str().unwrap(),
                "--filter=log",
                "--filter=delay",
                "file",
                self.image.to_str().unwrap(),
                &format!("logfile={}", self.log.display()),
                "logappend=true",
                &format!("rdelay={delay_ms}ms"),
            ],
        );
        wait_for_socket(&self.socket);
        self.server = Some(server);
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        self.server = None;
    }

    /// Where it serves.
    pub fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }

    /// The reads so far, as offset and length, in order.
    pub fn reads(&self) -> Vec<(u64, u64)> {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let number = |line: &str, key: &str| {
            let text = line.split_once(key).unwrap().1;
            let hex = text.strip_prefix("0x").unwrap();
            let end = hex.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(hex.len());
            u64::from_str_radix(&hex[..end], 16).unwrap()
        };
        log.lines()
            .filter(|line| line.contains(" Read id="))
            .map(|line| (number(line, "offset="), number(line, "count=")))
            .collect()
    }
}

/// The extents of a metadata context, by `nbdinfo`: offset to length and flags.
pub fn map(uri: &str, context: &str) -> BTreeMap<u64, (u64, u64)> {
    let json = crate::support::run("nbdinfo", "libnbd-bin", &["--json", &format!("--map={context}"), uri]);
    let extents: Vec<serde_json::Value> = serde_json::from_str(&json).unwrap();
    let number = |extent: &serde_json::Value, key: &str| extent[key].as_u64().unwrap();
    extents
        .iter()
        .map(|extent| (number(extent, "offset"), (number(extent, "length"), number(extent, "type"))))
        .collect()
}
