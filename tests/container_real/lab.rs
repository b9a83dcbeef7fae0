//! A disk with a container on it that counts into a file, and what it takes to start, watch, copy and end it.

use std::{
    fs::File,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use lazy_migrate::container::{ContainerId, Runc, Runtime};
use serde_json::{Value, json};

/// The container's program: one number a line, each written at once, about a hundred a second.
const COUNTER: &str = "#!/bin/sh\ni=0; exec 3>>/data.log\nwhile true; do i=$((i+1)); echo $i >&3; sleep 0.01; done\n";
/// How long anything may take here.
const PATIENCE: Duration = Duration::from_secs(60);

pub fn id(name: &str) -> ContainerId {
    ContainerId::new(name).unwrap()
}

/// Waits for a condition.
pub async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < PATIENCE, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Live processes with one of these names, apart from those that were there when the lab was made.
pub fn tasks_of(names: &[&str], lab: &Lab) -> Vec<String> {
    let mut found = Vec::new();
    for pid in processes().into_iter().filter(|pid| !lab.others.contains(pid)) {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let Some((name, rest)) = stat.split_once('(').and_then(|(_, s)| s.rsplit_once(") ")) else { continue };
        if names.contains(&name) && !rest.starts_with('Z') {
            found.push(stat);
        }
    }
    found
}

/// The firewall rules of a network namespace, in iptables' words.
pub fn rules(netns: &Path) -> String {
    let mut rules = String::new();
    for tables in ["iptables", "ip6tables"] {
        let list = Command::new("nsenter").arg(format!("--net={}", netns.display())).args([tables, "-S"]).output();
        let list = list.expect("no nsenter: install package util-linux");
        assert!(list.status.success(), "{tables}: {list:?}: install package iptables");
        rules += &String::from_utf8_lossy(&list.stdout);
    }
    rules
}

fn processes() -> Vec<u32> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    entries.filter_map(|e| e.file_name().to_str()?.parse().ok()).collect()
}

pub fn run(package: &str, program: &str, args: &[&str]) {
    let done = Command::new(program).args(args).stdin(Stdio::null()).output();
    let done = done.unwrap_or_else(|e| panic!("cannot run {program}: {e}: install package {package}"));
    assert!(done.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&done.stderr));
}

/// An ext4 disk image that is mounted, a bundle whose rootfs is on it, and room for other files.
pub struct Lab {
    dir: tempfile::TempDir,
    name: String,
    others: Vec<u32>,
}

impl Lab {
    pub fn new(name: &str) -> Self {
        let lab = Self::empty(name);
        let image = lab.path("disk.img");
        File::create(&image).unwrap().set_len(32 << 20).unwrap();
        run("e2fsprogs", "mkfs.ext4", &["-q", image.to_str().unwrap()]);
        lab.mount_disk();
        lab.fill();
        lab.bundle(&lab.bundle_dir(), &lab.mount().join("rootfs"));
        lab
    }

    fn empty(name: &str) -> Self {
        let dir = tempfile::Builder::new().prefix("lm-real-").tempdir().unwrap();
        Self { dir, name: name.to_owned(), others: processes() }
    }

    /// The same disk as it is now, mounted elsewhere, with a bundle of its own.
    pub fn copy(&self) -> Lab {
        let copy = Self::empty(&self.name);
        run("coreutils", "sync", &["-f", self.mount().to_str().unwrap()]);
        std::fs::copy(self.path("disk.img"), copy.path("disk.img")).unwrap();
        copy.mount_disk();
        copy.bundle(&copy.bundle_dir(), Path::new(&copy.mount().join("rootfs")));
        copy
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn mount(&self) -> PathBuf {
        self.path("mnt")
    }

    pub fn bundle_dir(&self) -> PathBuf {
        self.path("bundle")
    }

    fn mount_disk(&self) {
        std::fs::create_dir(self.mount()).unwrap();
        let (image, mount) = (self.path("disk.img"), self.mount());
        run("mount", "mount", &["-o", "loop", image.to_str().unwrap(), mount.to_str().unwrap()]);
    }

    fn fill(&self) {
        let root = self.mount().join("rootfs");
        for dir in ["bin", "proc", "sys", "dev", "tmp", "etc"] {
            std::fs::create_dir_all(root.join(dir)).unwrap();
        }
        std::fs::copy("/bin/busybox", root.join("bin/busybox"))
            .expect("no /bin/busybox: install package busybox-static");
        for applet in ["sh", "sleep"] {
            symlink("busybox", root.join("bin").join(applet)).unwrap();
        }
        std::fs::write(root.join("run.sh"), COUNTER).unwrap();
    }

    /// Makes a bundle from runc's own template.
    pub fn bundle(&self, dir: &Path, rootfs: &Path) {
        std::fs::create_dir(dir).unwrap();
        run("runc", "runc", &["spec", "--bundle", dir.to_str().unwrap()]);
        let file = dir.join("config.json");
        let mut config: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        config["root"] = json!({"path": rootfs, "readonly": false});
        config["process"]["terminal"] = json!(false);
        config["process"]["args"] = json!(["/bin/sh", "/run.sh"]);
        config["linux"]["namespaces"].as_array_mut().unwrap().retain(|n| n["type"] != "cgroup");
        std::fs::write(&file, config.to_string()).unwrap();
    }

    /// All paths on the disk.
    pub fn files(&self) -> Vec<PathBuf> {
        let (mut found, mut dirs) = (Vec::new(), vec![self.mount()]);
        while let Some(dir) = dirs.pop() {
            for entry in std::fs::read_dir(dir).unwrap().map(Result::unwrap) {
                if entry.file_type().unwrap().is_dir() {
                    dirs.push(entry.path());
                }
                found.push(entry.path());
            }
        }
        found.sort();
        found
    }

    /// Changes a bundle to one that echoes TCP on port 7000 in a network namespace that outlives it.
    pub fn serve_echo(&self, bundle: &Path, netns: &Path) {
        let file = bundle.join("config.json");
        let mut config: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        config["process"]["args"] = json!(["/bin/busybox", "nc", "-ll", "-p", "7000", "-e", "/bin/busybox", "cat"]);
        config["process"]["capabilities"] = Value::Null;
        for namespace in config["linux"]["namespaces"].as_array_mut().unwrap() {
            if namespace["type"] == "network" {
                namespace["path"] = json!(netns);
            }
        }
        std::fs::write(&file, config.to_string()).unwrap();
    }

    pub fn script(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    /// Starts the container.
    pub async fn start(&self, name: &str) -> ContainerId {
        let started = Command::new("runc")
            .args(["run", "--detach", "--bundle"])
            .arg(self.bundle_dir())
            .arg(name)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        assert!(started.expect("no runc: install package runc").success(), "runc cannot start {name}");
        id(name)
    }

    /// How far it has counted. Checks that no number is missing or there twice: nothing was lost, nothing ran twice.
    pub fn count(&self) -> u64 {
        let text = std::fs::read_to_string(self.mount().join("rootfs/data.log")).unwrap_or_default();
        let whole = &text[..text.rfind('\n').map_or(0, |at| at + 1)];
        let mut last = 0;
        for line in whole.lines() {
            // A container that was started anew begins at 1 again.
            let number: u64 = line.parse().unwrap_or_else(|_| panic!("line {line:?} after {last}"));
            assert!(number == last + 1 || number == 1, "{number} after {last}");
            last = number;
        }
        last
    }

    /// Waits until it has counted further than `number`.
    pub async fn counts_beyond(&self, number: u64) {
        until(&format!("{} to count beyond {number}", self.name), || self.count() > number).await;
    }

    /// Ends a container; its log was without a gap to the end.
    pub async fn end(&self, id: &ContainerId) {
        Runc::default().kill_and_delete(id).await.unwrap();
        self.count();
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // What a failed test left running on this disk, by its name's beginning.
        let list = Command::new("runc").args(["list", "--quiet"]).output();
        for left in list.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default().lines() {
            if left.starts_with(&self.name) && std::thread::panicking() {
                let _ = Command::new("runc").args(["kill", "--all", left, "KILL"]).status();
                let _ = Command::new("runc").args(["delete", "--force", left]).status();
            }
        }
        let _ = Command::new("fsfreeze").arg("-u").arg(self.mount()).stderr(Stdio::null()).status();
        let _ = Command::new("umount").arg("--lazy").arg(self.mount()).status();
    }
}
