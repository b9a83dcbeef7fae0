//! Real nodes for tests: the built program, run as an operator would run it. Everything is ended by its process number
//! when a test ends, also when it fails.

#![allow(dead_code, reason = "each test crate uses its part of it")]

pub mod network;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// How long anything that a test waits for may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The program under test.
pub fn program() -> &'static str {
    env!("CARGO_BIN_EXE_lazy-migrate")
}

/// What a command said.
#[derive(Debug)]
pub struct Said {
    /// The exit code.
    pub code: i32,
    /// Without the last newline.
    pub stdout: String,
    /// Without the last newline.
    pub stderr: String,
}

impl From<Output> for Said {
    fn from(output: Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
        Said { code: output.status.code().unwrap_or(-1), stdout: text(&output.stdout), stderr: text(&output.stderr) }
    }
}

/// A node: `lazy-migrate serve` in a directory of its own.
pub struct Node {
    child: Option<Child>,
    /// Where its files and sockets are.
    pub dir: PathBuf,
    arguments: Vec<String>,
    namespace: Option<String>,
}

impl Node {
    /// Starts a node in `dir` (made if missing), with more arguments for `serve`, and waits until it answers.
    /// Its NBD socket is `dir/nbd.sock`, its log `dir/log`.
    pub fn start(dir: impl Into<PathBuf>, arguments: &[&str]) -> Node {
        Node::start_in(None, dir, arguments)
    }

    /// The same in a network namespace (see `ip netns`); its sockets in `dir` are reached from everywhere.
    pub fn start_in(namespace: Option<&str>, dir: impl Into<PathBuf>, arguments: &[&str]) -> Node {
        let dir = dir.into();
        std::fs::create_dir_all(&dir).unwrap();
        let arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
        let mut node = Node { child: None, dir, arguments, namespace: namespace.map(str::to_owned) };
        node.start_again();
        node
    }

    /// Starts it again after [`Node::kill`] or [`Node::stop`], with the same arguments.
    pub fn start_again(&mut self) {
        assert!(self.child.is_none(), "it runs");
        let log = std::fs::File::options().create(true).append(true).open(self.dir.join("log")).unwrap();
        let mut command = Command::new(program());
        if let Some(namespace) = &self.namespace {
            // It becomes the program, so the process number is the node's. `ip netns exec` would make a mount namespace
            // too, and hold in it what other tests have mounted at the moment.
            command = Command::new("nsenter");
            command.args([&format!("--net=/run/netns/{namespace}"), program()]);
        }
        let child = command
            .arg("serve")
            .args(["--state-dir".as_ref(), self.dir.join("state").as_os_str()])
            .args(["--control".as_ref(), self.control().as_os_str()])
            .arg("--nbd")
            .arg(format!("unix:{}", self.nbd_socket().display()))
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        // Ended by the drop from here on, whatever comes.
        self.child = Some(child);
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.as_mut().and_then(|child| child.try_wait().unwrap()) {
                panic!("the node ended at once ({status}): {}", self.log());
            }
            if self.try_cli(&["status"]).code == 0 {
                break;
            }
            assert!(begun.elapsed() < PATIENCE, "the node does not answer: {}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The control socket.
    pub fn control(&self) -> PathBuf {
        self.dir.join("control.sock")
    }

    /// Where all its exports are served.
    pub fn nbd_socket(&self) -> PathBuf {
        self.dir.join("nbd.sock")
    }

    /// The NBD URI of one of its exports.
    pub fn uri(&self, name: &str) -> String {
        format!("nbd+unix:///{name}?socket={}", self.nbd_socket().display())
    }

    /// Its process number.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("it runs").id()
    }

    /// Runs a command against it, whatever comes of it.
    pub fn try_cli(&self, arguments: &[&str]) -> Said {
        Command::new(program())
            .arg("--control")
            .arg(self.control())
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .unwrap()
            .into()
    }

    /// Starts a command against it that goes on for a while; what it prints can be read meanwhile.
    pub fn spawn_cli(&self, arguments: &[&str]) -> Background {
        let mut command = Command::new(program());
        command.arg("--control").arg(self.control()).args(arguments);
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        Background(child)
    }

    /// Asks its control socket, as `curl --unix-socket` would.
    #[track_caller]
    pub fn get(&self, path: &str) -> serde_json::Value {
        let mut stream = UnixStream::connect(self.control()).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200 "), "{path}: {answer}");
        serde_json::from_str(body).unwrap()
    }

    /// Runs a command that must succeed, and returns what it printed.
    #[track_caller]
    pub fn cli(&self, arguments: &[&str]) -> String {
        let said = self.try_cli(arguments);
        assert_eq!(said.code, 0, "{arguments:?}: {}\n{}", said.stderr, self.log());
        said.stdout
    }

    /// Runs a command that must fail with an exit code and one line on stderr, and returns that line. Before it there may
    /// be lines of progress, which are indented.
    #[track_caller]
    pub fn fails(&self, code: i32, arguments: &[&str]) -> String {
        let said = self.try_cli(arguments);
        assert_eq!(said.code, code, "{arguments:?}: {said:?}\n{}", self.log());
        let errors: Vec<&str> = said.stderr.lines().filter(|line| !line.starts_with("   ")).collect();
        assert_eq!(errors.len(), 1, "one line: {}", said.stderr);
        errors[0].to_owned()
    }

    /// `status NAME --json`.
    #[track_caller]
    pub fn status(&self, name: &str) -> serde_json::Value {
        serde_json::from_str(&self.cli(&["status", name, "--json"])).unwrap()
    }

    /// Waits until a status satisfies a condition, and returns it.
    #[track_caller]
    pub fn wait_status(
        &self,
        name: &str,
        what: &str,
        condition: impl Fn(&serde_json::Value) -> bool,
    ) -> serde_json::Value {
        let begun = Instant::now();
        loop {
            let status = self.status(name);
            if condition(&status) {
                return status;
            }
            assert!(begun.elapsed() < PATIENCE, "not {what}: {status}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// SIGTERM, and waits until it has ended in order.
    pub fn stop(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        signal(child.id(), nix::sys::signal::Signal::SIGTERM);
        let status = child.wait().unwrap();
        assert!(status.success(), "the node ended with {status}: {}", self.log());
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Sends a signal to a process that the test started.
pub fn signal(pid: u32, signal: nix::sys::signal::Signal) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), signal).unwrap();
}

/// Another program in the background, ended when dropped.
pub struct Background(Child);

impl Background {
    /// Starts it; `package` is what Debian calls its package.
    pub fn start(program: &str, package: &str, arguments: &[&str]) -> Background {
        Background::spawn(program, package, Command::new(program).args(arguments))
    }

    /// The same without its complaints: for one that is meant to fail.
    pub fn start_quietly(program: &str, package: &str, arguments: &[&str]) -> Background {
        Background::spawn(program, package, Command::new(program).args(arguments).stderr(Stdio::null()))
    }

    fn spawn(program: &str, package: &str, command: &mut Command) -> Background {
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn();
        Background(
            child.unwrap_or_else(|error| panic!("cannot run {program} ({error}); install the package {package}")),
        )
    }

    /// Its process number.
    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    /// What it prints from now on, where that was asked for.
    pub fn output(&mut self) -> impl Iterator<Item = String> + use<> {
        BufReader::new(self.0.stdout.take().expect("its output is asked for")).lines().map_while(Result::ok)
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> i32 {
        self.0.wait().unwrap().code().unwrap_or(-1)
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs another program to its end; `package` is what Debian calls its package.
#[track_caller]
pub fn run(program: &str, package: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("cannot run {program} ({error}); install the package {package}"));
    let said = Said::from(output);
    assert_eq!(said.code, 0, "{program} {arguments:?}: {}\n{}", said.stdout, said.stderr);
    said.stdout
}

/// Waits for something that another process brings about.
#[track_caller]
pub fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < PATIENCE, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Waits until a Unix socket is there.
#[track_caller]
pub fn wait_for_socket(path: &Path) {
    wait_for(&format!("a socket at {}", path.display()), || std::os::unix::net::UnixStream::connect(path).is_ok());
}

/// A file of `size` random bytes.
pub fn random_image(path: &Path, size: u64, seed: u64) {
    image(path, size, seed, std::slice::from_ref(&(0..size)));
}

/// A file of `size` bytes with random bytes (xorshift, by `seed`) in the given byte ranges, holes elsewhere.
pub fn image(path: &Path, size: u64, seed: u64, data: &[std::ops::Range<u64>]) {
    let file = std::fs::File::create(path).unwrap();
    file.set_len(size).unwrap();
    let mut state = seed | 1;
    let mut buffer = vec![0; 1 << 20];
    for range in data {
        let mut at = range.start;
        while at < range.end {
            let length = buffer.len().min((range.end - at) as usize);
            for chunk in buffer[..length].chunks_mut(8) {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                let length = chunk.len();
                chunk.copy_from_slice(&state.to_le_bytes()[..length]);
            }
            file.write_all_at(&buffer[..length], at).unwrap();
            at += length as u64;
        }
    }
    (&file).flush().unwrap();
}

/// A TCP port of this machine that nobody uses: outside of the range that outgoing connections take theirs from, so that
/// a node can be stopped and find it again.
pub fn free_port() -> u16 {
    static NEXT: std::sync::atomic::AtomicU16 = std::sync::atomic::AtomicU16::new(0);
    loop {
        let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let port = 12_000 + ((std::process::id() % 1000) as u16 * 20 + number) % 20_000;
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// A file's BLAKE3 hash.
pub fn hash(path: &Path) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    std::io::copy(&mut std::fs::File::open(path).unwrap(), &mut hasher).unwrap();
    hasher.finalize()
}

/// Bytes that a file takes on its file system.
pub fn allocated(path: &Path) -> u64 {
    std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(path).unwrap()) * 512
}
