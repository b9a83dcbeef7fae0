//! `examples/two-hosts-ssh.sh`: two bare hosts with an sshd each, and what an operator types on one of them.
//!
//! A host is a network namespace, and a process and a mount namespace in it: its own /etc, /run, /var/lib and /var/log, so
//! that the script finds and makes what it would on a real one.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::pair::MIB;
use crate::script::{Script, command};
use crate::support::network::{A_ADDRESS, B_ADDRESS, Network};
use crate::support::{Said, program, random_image, run, wait_for};

const SIZE: u64 = 24 * MIB;

/// What makes a host of a directory and is its first process then: the sshd.
const HOST: &str = r#"
mount --make-rprivate /
mount -t tmpfs run /run
mkdir -m 755 /run/sshd
for directory in etc var/lib var/log usr/local/bin; do mount --bind "$0/$directory" "/$directory"; done
exec /usr/sbin/sshd -D -e -f /etc/ssh/sshd_config
"#;

struct Host {
    child: Child,
    /// Its first process.
    first: u32,
    namespace: String,
}

impl Host {
    fn start(dir: &Path, name: &str, namespace: &str, key: &Path) -> Host {
        let own = dir.join(name);
        for directory in ["var/lib", "var/log", "usr/local/bin"] {
            fs::create_dir_all(own.join(directory)).unwrap();
        }
        run("cp", "coreutils", &["-a", "/etc", own.to_str().unwrap()]);
        for directory in ["lazy-migrate", "ssh/sshd_config.d"] {
            let _ = fs::remove_dir_all(own.join("etc").join(directory));
        }
        std::os::unix::fs::symlink(program(), own.join("usr/local/bin/lazy-migrate")).unwrap();
        let host_key = own.join("etc/ssh/test_key");
        key_pair(&host_key);
        let config = format!(
            "Port 2222\nHostKey /etc/ssh/test_key\nUsePAM no\nPermitRootLogin prohibit-password\n\
             PasswordAuthentication no\nStrictModes no\nAuthorizedKeysFile {}.pub\n",
            key.display()
        );
        fs::write(own.join("etc/ssh/sshd_config"), config).unwrap();
        // A locked account does not log in, not even with a key.
        let shadow = fs::read_to_string(own.join("etc/shadow")).unwrap();
        let open = shadow.lines().map(|line| match line.strip_prefix("root:") {
            Some(rest) => format!("root:*:{}\n", rest.split_once(':').unwrap().1),
            None => format!("{line}\n"),
        });
        fs::write(own.join("etc/shadow"), open.collect::<String>()).unwrap();
        let network = format!("--net=/run/netns/{namespace}");
        let unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-euc", HOST];
        let child = Command::new("nsenter")
            .arg(&network)
            .args(unshare)
            .arg(&own)
            .stdin(Stdio::null())
            .stderr(fs::File::create(dir.join(format!("{name}.log"))).unwrap())
            .spawn()
            .unwrap();
        let mut host = Host { child, first: 0, namespace: namespace.to_owned() };
        let listens = ["sh", "-c", "exec ss -Hltn 'sport = 2222' | grep -q ."];
        wait_for("an sshd (package openssh-server)", || {
            Command::new("nsenter").arg(&network).args(listens).status().unwrap().success()
        });
        let id = host.child.id();
        let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap();
        host.first = children.trim().parse().unwrap();
        host
    }

    /// A command as somebody types it who is logged in there.
    fn inside(&self) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["-t", &self.first.to_string(), "-m", "-p"]).arg(format!("--net=/run/netns/{}", self.namespace));
        command.stdin(Stdio::null());
        command
    }

    fn lazy_migrate(&self, arguments: &[&str]) -> Said {
        self.inside().arg(program()).args(arguments).output().unwrap().into()
    }

    /// Its node ends.
    fn kill_node(&self) {
        let script = "kill -9 $(cat /run/lazy-migrate/node.pid)";
        assert!(self.inside().args(["sh", "-c", script]).status().unwrap().success());
        wait_for("the node has ended", || self.lazy_migrate(&["status"]).code == 4);
    }

    fn has(&self, path: &str) -> bool {
        Path::new(&format!("/proc/{}/root{path}", self.first)).exists()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // Its loop device would outlive it.
        let _ = self.inside().args(["timeout", "20", program(), "detach", "web"]).output();
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn key_pair(path: &Path) {
    run("ssh-keygen", "openssh-client", &["-q", "-t", "ed25519", "-N", "", "-f", path.to_str().unwrap()]);
}

struct Hosts {
    a: Host,
    b: Host,
    ssh: String,
    original: Vec<u8>,
    image: PathBuf,
    network: Network,
    // Last, for it is dropped last.
    dir: tempfile::TempDir,
}

impl Hosts {
    fn new(name: &str, rate: &str) -> Hosts {
        let network = Network::new(name, rate);
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let key = dir.path().join("key");
        key_pair(&key);
        let config = dir.path().join("ssh_config");
        let known = dir.path().join("known_hosts");
        let settings = format!(
            "Host a\n HostName {A_ADDRESS}\nHost b\n HostName {B_ADDRESS}\nHost *\n User root\n Port 2222\n \
             IdentityFile {}\n StrictHostKeyChecking accept-new\n UserKnownHostsFile {}\n LogLevel error\n",
            key.display(),
            known.display()
        );
        fs::write(&config, settings).unwrap();
        let image = dir.path().join("web.img");
        random_image(&image, SIZE, 98);
        Hosts {
            a: Host::start(dir.path(), "a", &network.a, &key),
            b: Host::start(dir.path(), "b", &network.b, &key),
            ssh: format!("ssh -F {}", config.display()),
            original: fs::read(&image).unwrap(),
            image,
            network,
            dir,
        }
    }

    /// Typed on a machine that is on the same network: the first host's namespace, and none of its files.
    fn start(&self, arguments: &[&str]) -> Script {
        let typed = command("two-hosts-ssh.sh", &["--ssh", &self.ssh, "--disk", "web"]);
        let mut here = Command::new("nsenter");
        here.arg(format!("--net=/run/netns/{}", self.network.a)).arg(typed.get_program()).args(typed.get_args());
        Script::of(here.args(arguments).env("TMPDIR", self.dir.path()))
    }

    fn run(&self, arguments: &[&str]) -> Said {
        self.start(arguments).end()
    }
}

#[test]
fn two_bare_hosts_move_a_disk_there_and_back() {
    let hosts = Hosts::new("ssh", "40mbit");
    let refused = hosts.run(&["--from", "a", "--to", "b"]);
    assert_eq!(refused.code, 3, "{refused:?}");
    assert!(refused.stderr.contains("has no disk web; --image"), "{refused:?}");
    let image = hosts.image.to_str().unwrap();
    let there = ["--from", "a", "--to", "b", "--image", image];
    // It is interrupted while the rest arrives, and typed again.
    let script = hosts.start(&there);
    script.says("what is missing is fetched when it is read");
    script.interrupt();
    let said = script.end();
    assert_eq!(said.code, 130, "{said:?}");
    let said = hosts.run(&there);
    assert_eq!(said.code, 0, "{said:?}");
    assert!(said.stderr.contains("going on from there") && said.stderr.contains("identical"), "{said:?}");
    assert!(said.stderr.ends_with("--from b --to a --disk web"), "{said:?}");
    let device = said.stdout;
    assert!(fs::read(&device).unwrap() == hosts.original, "{device}");
    assert!(hosts.a.has("/etc/lazy-migrate/tls/ca-key.pem") && !hosts.b.has("/etc/lazy-migrate/tls/ca-key.pem"));
    assert!(hosts.b.has("/etc/lazy-migrate/tls/server-key.pem"));
    let left = fs::read_dir(hosts.dir.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert!(left.into_iter().all(|name| !name.starts_with("tmp.")), "its scratch directory stays");

    // Once more there is nothing to do; and then the way back, from that host itself, whose node has died meanwhile.
    let again = hosts.run(&there);
    assert_eq!((again.code, &again.stdout), (0, &device), "{again:?}");
    fs::File::options().write(true).open(&device).unwrap().write_all_at(&[7; 4096], 5 * MIB).unwrap();
    run("sync", "coreutils", &[&device]);
    assert_eq!(hosts.b.lazy_migrate(&["detach", "web"]).code, 0);
    hosts.b.kill_node();
    let typed = command("two-hosts-ssh.sh", &["--ssh", &hosts.ssh, "--disk", "web", "--from", "here", "--to", "a"]);
    let mut on_b = hosts.b.inside();
    on_b.arg(typed.get_program()).args(typed.get_args());
    let unknown = Script::of(&mut on_b).end();
    assert_eq!(unknown.code, 2, "{unknown:?}");
    assert!(unknown.stderr.contains("--from-address is needed"), "{unknown:?}");
    let said = Script::of(on_b.args(["--from-address", B_ADDRESS])).end();
    assert_eq!(said.code, 0, "{said:?}");
    let mut content = hosts.original.clone();
    content[5 * MIB as usize..][..4096].fill(7);
    assert!(fs::read(&said.stdout).unwrap() == content, "{said:?}");
    let status = hosts.a.lazy_migrate(&["status", "web"]);
    assert!(status.stdout.contains("destination complete"), "{status:?}");
    let sent: serde_json::Value =
        serde_json::from_str(&hosts.a.lazy_migrate(&["status", "web", "--json"]).stdout).unwrap();
    assert_eq!(sent["pulled_bytes"], 4096, "what was written there, and no more: {sent}");
    assert!(said.stderr.ends_with(&format!("--from a --to here --disk web --to-address {B_ADDRESS}")), "{said:?}");
}

#[test]
fn who_cannot_be_reached_or_believed_is_named() {
    let hosts = Hosts::new("sshno", "100mbit");
    let image = hosts.image.to_str().unwrap();
    let nobody = hosts.run(&["--from", "a", "--to", "10.99.0.3", "--image", image]);
    assert_eq!(nobody.code, 4, "{nobody:?}");
    assert!(nobody.stderr.contains("cannot log in to 10.99.0.3"), "{nobody:?}");
    // Two authorities.
    for (host, address) in [(&hosts.a, A_ADDRESS), (&hosts.b, B_ADDRESS)] {
        assert_eq!(host.lazy_migrate(&["tls", "init", "/etc/lazy-migrate/tls", "--host", address]).code, 0);
    }
    let strangers = hosts.run(&["--from", "a", "--to", "b", "--image", image]);
    assert_eq!(strangers.code, 3, "{strangers:?}");
    assert!(strangers.stderr.contains("two authorities"), "{strangers:?}");
    let unfit = hosts.run(&["--from", "a", "--to", "b", "--image", image, "--container", "web"]);
    assert_eq!(unfit.code, 3, "criu does not work on this kernel, and a container needs it: {unfit:?}");
    for wrong in [&["--from", "a"][..], &["--to"], &["--from", "a", "--to", "b", "--port", "x"], &["web"]] {
        assert_eq!(hosts.run(wrong).code, 2, "{wrong:?}");
    }
}
