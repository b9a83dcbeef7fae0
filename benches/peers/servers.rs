//! Who serves: the peers and our node, each as its documentation says to run it, until dropped.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use tempfile::TempDir;

use crate::lab::Lab;
use crate::support::{Background, Node, free_port, run, wait_for, wait_for_socket};

/// The certificates of both sides, as `tls init` makes them: for the node, and for everybody else.
pub fn certificates() -> &'static Path {
    static PLACE: OnceLock<PathBuf> = OnceLock::new();
    PLACE.get_or_init(|| {
        let place = crate::lab::keep_until_the_end().join("tls");
        let hosts = ["--host", "localhost", "--host", "127.0.0.1"];
        run(crate::support::program(), "lazy-migrate", &[&["tls", "init", text(&place)], &hosts[..]].concat());
        place
    })
}

/// A home directory in which libnbd finds the client's certificates without being told; it looks there for nobody's sake
/// only, not for root's.
pub fn home_of_nobody() -> &'static Path {
    static HOME: OnceLock<PathBuf> = OnceLock::new();
    HOME.get_or_init(|| {
        use std::os::unix::fs::{PermissionsExt, chown};
        let memory = crate::lab::keep_in_memory();
        std::fs::set_permissions(&memory, PermissionsExt::from_mode(0o711)).expect("our own directory");
        let place = memory.join("home/.pki/libnbd");
        std::fs::create_dir_all(&place).expect("a directory");
        for name in ["ca-cert.pem", "client-cert.pem", "client-key.pem"] {
            let copy = place.join(name);
            std::fs::copy(certificates().join(name), &copy).expect("a certificate");
            chown(&copy, Some(NOBODY), Some(NOBODY)).expect("our own file");
        }
        memory.join("home")
    })
}

/// The number of Debian's user and group for those who own nothing.
pub const NOBODY: u32 = 65534;

/// A server of one disk.
pub struct Server {
    /// What it is called in the table.
    pub name: &'static str,
    /// Where clients find it.
    pub uri: String,
    /// Its TCP port, if it has one.
    pub port: u16,
    /// Its process.
    pub pid: u32,
    _process: Process,
    _place: TempDir,
}

/// A server's process.
enum Process {
    /// One that stays in the foreground.
    Child(Background),
    /// One that goes away into the background; it comes back to this process, which is its subreaper (see `lab`).
    Daemon(u32),
}

impl Process {
    fn pid(&self) -> u32 {
        match self {
            Process::Child(child) => child.pid(),
            Process::Daemon(pid) => *pid,
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Process::Daemon(pid) = self {
            crate::lab::end(*pid);
        }
    }
}

/// How its clients come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// A Unix socket.
    Unix,
    /// TCP on loopback.
    Tcp,
    /// TCP on loopback, encrypted.
    Tls,
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path of text")
}

fn uri(way: Way, socket: &Path, port: u16, export: &str) -> String {
    match way {
        Way::Unix => format!("nbd+unix:///{export}?socket={}", text(socket)),
        Way::Tcp => format!("nbd://127.0.0.1:{port}/{export}"),
        Way::Tls => format!("nbds://127.0.0.1:{port}/{export}?tls-certificates={}", text(certificates())),
    }
}

/// A port that answers. The server may take the connection for a client that went away, which is one.
pub fn wait_for_port(port: u16) {
    wait_for(&format!("a server at port {port}"), || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
}

impl Server {
    /// `SOCKET`, `PORT` and `DIR` in the arguments are the server's; `CONFIG=...` becomes a file; one whose arguments name
    /// `DIR/pid` becomes a daemon.
    fn start(
        lab: &Lab,
        name: &'static str,
        way: Way,
        export: &str,
        program: (&str, &str),
        arguments: &[&str],
    ) -> Server {
        let place = lab.in_memory();
        let (socket, port) = (place.path().join("nbd.sock"), free_port());
        let (config, pid) = (place.path().join("config"), place.path().join("pid"));
        let fill = |argument: &&str| {
            let argument = argument.replace("SOCKET", text(&socket)).replace("PORT", &port.to_string());
            match argument.strip_prefix("CONFIG=") {
                Some(content) => {
                    std::fs::write(&config, content).expect("a configuration");
                    text(&config).to_owned()
                }
                None => argument.replace("DIR", text(place.path())),
            }
        };
        let arguments: Vec<String> = arguments.iter().map(fill).collect();
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let process = if arguments.contains(&text(&pid)) {
            run(program.0, program.1, &arguments);
            let number = || std::fs::read_to_string(&pid).ok()?.trim().parse().ok();
            wait_for("a daemon's process number", || number().is_some());
            Process::Daemon(number().expect("it was there"))
        } else {
            Process::Child(Background::start(program.0, program.1, &arguments))
        };
        match way {
            Way::Unix => wait_for_socket(&socket),
            Way::Tcp | Way::Tls => wait_for_port(port),
        }
        Server {
            name,
            uri: uri(way, &socket, port, export),
            port,
            pid: process.pid(),
            _process: process,
            _place: place,
        }
    }

    /// `nbdkit file`.
    pub fn nbdkit_file(lab: &Lab, way: Way, image: &Path) -> Server {
        Server::nbdkit(lab, "nbdkit file", way, &["file", text(image)])
    }

    /// `nbdkit` with these filters, plugin and parameters; its overlays are in memory.
    pub fn nbdkit(lab: &Lab, name: &'static str, way: Way, what: &[&str]) -> Server {
        let tls = format!("--tls-certificates={}", text(certificates()));
        let listen: &[&str] = match way {
            Way::Unix => &["-U", "SOCKET"],
            Way::Tcp => &["-i", "127.0.0.1", "-p", "PORT"],
            Way::Tls => &["-i", "127.0.0.1", "-p", "PORT", "--tls=require", &tls],
        };
        Server::start(
            lab,
            name,
            way,
            "",
            ("env", "nbdkit"),
            &[&["TMPDIR=DIR", "nbdkit", "-f", "--exit-with-parent"], listen, what].concat(),
        )
    }

    /// `nbd-server`, on a Unix socket. (Behind its TLS libnbd, and so fio, sees a disk of no bytes.)
    pub fn nbd_server(lab: &Lab, image: &Path) -> Server {
        let config = format!(
            "CONFIG=[generic]\nlistenaddr = 127.0.0.1\nport = PORT\nunixsock = SOCKET\nallowlist = true\n[disk]\n\
             exportname = {}\nflush = true\nfua = true\n",
            text(image)
        );
        Server::start(
            lab,
            "nbd-server",
            Way::Unix,
            "disk",
            ("nbd-server", "nbd-server"),
            &["-C", &config, "-p", "DIR/pid"],
        )
    }

    /// `qemu-nbd`.
    pub fn qemu_nbd(lab: &Lab, way: Way, image: &Path) -> Server {
        let credentials = format!("tls-creds-x509,id=tls,endpoint=server,dir={}", text(certificates()));
        let listen: &[&str] = match way {
            Way::Unix => &["-k", "SOCKET"],
            Way::Tcp => &["-b", "127.0.0.1", "-p", "PORT"],
            Way::Tls => &["-b", "127.0.0.1", "-p", "PORT", "--object", &credentials, "--tls-creds", "tls"],
        };
        let what = ["-f", "raw", "-t", "-e", "8", "-x", "disk", text(image)];
        Server::start(lab, "qemu-nbd", way, "disk", ("qemu-nbd", "qemu-utils"), &[listen, &what].concat())
    }
}

/// nbdkit's cow filter over another server, in memory, with what clients read kept.
pub fn cow_over(lab: &Lab, name: &'static str, from: &str, filters: &[&str], more: &[&str]) -> Server {
    let uri = format!("uri={from}");
    let keep = ["--filter=cow", "nbd", &uri, "shared=true", "cow-on-read=true"];
    Server::nbdkit(lab, name, Way::Unix, &[filters, &keep, more].concat())
}

/// Our node, as an operator runs it.
pub struct OurNode {
    /// The node.
    pub node: Node,
    /// Where clients find the disk `disk`.
    pub uri: String,
    _place: TempDir,
}

impl OurNode {
    /// A node without exports, whose files are in `place`.
    pub fn start(place: TempDir, way: Way, more: &[&str]) -> OurNode {
        let port = free_port();
        let (address, tls) = (format!("127.0.0.1:{port}"), text(certificates()));
        let listen: &[&str] = match way {
            Way::Unix => &[],
            Way::Tcp => &["--nbd", &address],
            Way::Tls => {
                &["--nbd", &address, "--tls", tls, "--allow-client", "localhost", "--allow-client", "127.0.0.1"]
            }
        };
        let node = Node::start(place.path().join("node"), &[listen, more].concat());
        let uri = uri(way, &node.nbd_socket(), port, "disk");
        OurNode { node, uri, _place: place }
    }

    /// A node that serves an image that is there.
    pub fn of_image(lab: &Lab, way: Way, image: &Path) -> OurNode {
        let node = OurNode::start(lab.on_disk(), way, &[]);
        node.node.cli(&["add", "disk", text(image)]);
        node
    }
}
