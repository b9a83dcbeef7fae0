//! Programs of others, run by the tests.

#![allow(dead_code, reason = "each test binary uses a part")]

use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::time::Duration;

use nbd::address::Address;
use nbd::client::{Client, ClientError, ConnectOptions};
use nbd::export::Export;
use nbd::memory::SingleExport;
use nbd::server::{Listener, ServeOptions};
use nbd::uri::NbdUri;
use tempfile::TempDir;
use tokio::process::Command;
use tokio_util::sync::{CancellationToken, DropGuard};

/// The system's directories come first: Debian's nbdsh needs Debian's python3.
const DIRECTORIES: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// Names a directory of programs to be preferred.
const NEWER: &str = "NBD_TEST_PEERS";

/// A program, or a failure that names the Debian package to install.
pub fn tool(name: &str) -> Command {
    let package = match name {
        "nbdinfo" | "nbdcopy" | "nbdfuse" => "libnbd-bin",
        "fusermount3" => "fuse3",
        "nbd-server" => "nbd-server",
        "fio" => "fio",
        "nbdsh" => "python3-libnbd",
        "qemu-img" | "qemu-io" | "qemu-nbd" => "qemu-utils",
        "nbdkit" => "nbdkit",
        other => panic!("no package is known for {other}"),
    };
    // Newer programs than the system's can be put in front.
    let newer = std::env::var(NEWER).ok();
    let directories = newer.as_deref().into_iter().chain(DIRECTORIES.split(':'));
    let path = directories.map(|directory| Path::new(directory).join(name)).find(|path| path.exists());
    let path = path.unwrap_or_else(|| panic!("{name} is missing: apt-get install {package}"));
    let mut command = Command::new(path);
    command.env("PATH", DIRECTORIES).stdin(Stdio::null()).kill_on_drop(true);
    command
}

/// Runs a program to its end; what it printed, or a failure with what it complained of.
pub async fn run(name: &str, arguments: &[&str]) -> String {
    let (success, out, error) = attempt(name, arguments).await;
    assert!(success, "{name} {arguments:?} failed:\n{out}\n{error}");
    out
}

/// Runs a program to its end: whether it succeeded, its output and its complaints.
pub async fn attempt(name: &str, arguments: &[&str]) -> (bool, String, String) {
    let output = tokio::time::timeout(Duration::from_secs(60), tool(name).args(arguments).output());
    let output = output.await.unwrap_or_else(|_| panic!("{name} {arguments:?} hangs")).unwrap();
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    (output.status.success(), text(&output.stdout), text(&output.stderr))
}

/// Our server on a Unix socket, until it is dropped.
pub struct OurServer {
    pub directory: TempDir,
    _shutdown: DropGuard,
}

impl OurServer {
    pub async fn start(export: Arc<dyn Export>) -> OurServer {
        let directory = tempfile::tempdir().unwrap();
        let listener = Listener::bind(&Address::Unix(directory.path().join("s"))).await.unwrap();
        let shutdown = CancellationToken::new();
        let exports = Arc::new(SingleExport::new("disk", export));
        tokio::spawn(listener.run(exports, ServeOptions::default(), shutdown.clone()));
        OurServer { directory, _shutdown: shutdown.drop_guard() }
    }

    pub fn uri(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.path("s"))
    }

    /// A path in the server's own directory.
    pub fn path(&self, name: &str) -> String {
        self.directory.path().join(name).to_str().unwrap().to_owned()
    }
}

/// A server of others on a Unix socket, killed when it is dropped.
pub struct TheirServer {
    pub directory: TempDir,
    child: Child,
}

impl TheirServer {
    /// `nbdkit` with these arguments; `DIR` in them is the server's directory.
    pub fn nbdkit(arguments: &[&str]) -> TheirServer {
        TheirServer::start("nbdkit", &["-f", "--exit-with-parent", "-U", "DIR/s"], arguments, None)
    }

    /// `qemu-nbd` of an image with this content, as the export `disk`.
    pub fn qemu_nbd(content: &[u8]) -> TheirServer {
        let fixed = ["-f", "raw", "-t", "-e", "8", "-x", "disk", "--discard=unmap", "-k", "DIR/s"];
        TheirServer::start("qemu-nbd", &fixed, &["DIR/image"], Some(content))
    }

    /// `nbdkit file` of an image with this content.
    pub fn nbdkit_file(content: &[u8]) -> TheirServer {
        let fixed = ["-f", "--exit-with-parent", "-U", "DIR/s"];
        TheirServer::start("nbdkit", &fixed, &["file", "DIR/image"], Some(content))
    }

    /// Any server that listens on `DIR/s`, with `DIR/image` of this content.
    pub fn start(program: &str, fixed: &[&str], arguments: &[&str], content: Option<&[u8]>) -> TheirServer {
        let directory = tempfile::tempdir().unwrap();
        if let Some(content) = content {
            std::fs::write(directory.path().join("image"), content).unwrap();
        }
        let place = directory.path().to_str().unwrap();
        let arguments = fixed.iter().chain(arguments).map(|argument| argument.replace("DIR", place));
        let child =
            tool(program).into_std().args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        TheirServer { directory, child }
    }

    /// Another server in the place of this one, which was killed.
    pub fn again(&self, program: &str, arguments: &[&str]) -> TheirServer {
        std::fs::remove_file(self.directory.path().join("s")).unwrap();
        let place = self.directory.path().to_str().unwrap();
        let arguments = arguments.iter().map(|argument| argument.replace("DIR", place));
        let child =
            tool(program).into_std().args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        TheirServer { directory: tempfile::tempdir().unwrap(), child }
    }

    pub fn image(&self) -> PathBuf {
        self.directory.path().join("image")
    }

    /// Connects as soon as it listens.
    pub async fn connect(&mut self, options: &ConnectOptions) -> Client {
        self.try_connect("disk", options).await.unwrap()
    }

    pub async fn try_connect(&mut self, export: &str, options: &ConnectOptions) -> Result<Client, ClientError> {
        let address = Address::Unix(self.directory.path().join("s"));
        let uri = NbdUri::new(address, export);
        let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
        loop {
            match Client::connect(&uri, options).await {
                Err(ClientError::Connect { .. }) if tokio::time::Instant::now() < deadline => {
                    if let Some(status) = self.child.try_wait().unwrap() {
                        panic!("the server did not start: {status}");
                    }
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                other => return other,
            }
        }
    }

    /// Kills it and waits for its end.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for TheirServer {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The protocol authors' own server, of an image as the export `disk`, on TCP. It becomes a daemon: ended by its pid.
pub struct NbdServer {
    pub directory: TempDir,
    pub address: Address,
}

impl NbdServer {
    pub async fn start(content: &[u8]) -> NbdServer {
        NbdServer::start_with(content, "").await
    }

    /// With further lines for all exports.
    pub async fn start_with(content: &[u8], generic: &str) -> NbdServer {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path().to_str().unwrap();
        std::fs::write(directory.path().join("image"), content).unwrap();
        // A port that was free a moment ago.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let config = format!(
            "[generic]\nlistenaddr = 127.0.0.1\nport = {port}\nallowlist = true\n{generic}\
             [disk]\nexportname = {place}/image\nflush = true\nfua = true\ntrim = true\n"
        );
        std::fs::write(directory.path().join("config"), config).unwrap();
        run("nbd-server", &["-C", &format!("{place}/config"), "-p", &format!("{place}/pid")]).await;
        NbdServer { directory, address: Address::Tcp { host: "127.0.0.1".to_owned(), port } }
    }

    pub async fn connect(&self, export: &str, options: &ConnectOptions) -> Result<Client, ClientError> {
        let uri = NbdUri::new(self.address.clone(), export);
        let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
        loop {
            match Client::connect(&uri, options).await {
                Err(ClientError::Connect { .. }) if tokio::time::Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                other => return other,
            }
        }
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        let pid = std::fs::read_to_string(self.directory.path().join("pid")).ok();
        if let Some(pid) = pid.and_then(|pid| pid.trim().parse().ok()) {
            // It may have ended by itself.
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
    }
}
