//! A real file system on a disk that has just been handed over and is still filling, by FUSE and a loop device, which
//! every kernel has.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::pair::{LEASE, MIB, Pair};
use crate::support::{Node, allocated, hash, image, random_image, run, wait_for};

/// A mount that is taken away when dropped.
struct Mount(Option<PathBuf>);

impl Mount {
    fn new(what: &Path, at: PathBuf, options: &str) -> Mount {
        std::fs::create_dir_all(&at).unwrap();
        run("mount", "mount", &["-o", options, what.to_str().unwrap(), at.to_str().unwrap()]);
        Mount(Some(at))
    }

    fn path(&self) -> &Path {
        self.0.as_ref().unwrap()
    }

    /// Unmounts, and must succeed. A process that another test is just starting holds copies of this one's files until
    /// it runs its own program: the file system is busy for that long.
    fn end(mut self) {
        let at = self.path().to_owned();
        wait_for("unmounting", || Command::new("umount").arg(&at).output().unwrap().status.success());
        self.0 = None;
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if let Some(at) = &self.0 {
            let _ = Command::new("umount").args(["-l".as_ref(), at.as_os_str()]).status();
        }
    }
}

/// Every file below a directory, by its path in there, with its hash.
fn files(root: &Path) -> BTreeMap<PathBuf, blake3::Hash> {
    let (mut found, mut directories) = (BTreeMap::new(), vec![root.to_owned()]);
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let entry = entry.unwrap();
            match entry.file_type().unwrap().is_dir() {
                true => directories.push(entry.path()),
                false => drop(found.insert(entry.path().strip_prefix(root).unwrap().into(), hash(&entry.path()))),
            }
        }
    }
    found
}

/// An attached disk; when a test fails before it has detached, this does.
struct Attached<'a> {
    node: &'a Node,
    device: PathBuf,
    directory: PathBuf,
}

impl Drop for Attached<'_> {
    fn drop(&mut self) {
        if self.node.try_cli(&["detach", "web"]).code == 0 {
            return;
        }
        for (program, path) in [("losetup", &self.device), ("umount", &self.directory.join("fuse/mount"))] {
            let option = if program == "losetup" { "-d" } else { "-l" };
            let _ = std::process::Command::new(program).args([option.as_ref(), path.as_os_str()]).status();
        }
    }
}

fn write_synced(path: &Path, content: &[u8]) {
    std::fs::write(path, content).unwrap();
    std::fs::File::open(path).unwrap().sync_all().unwrap();
}

/// What the machine has of loop devices, mounts and nbdfuse processes that name something.
fn traces(of: &str) -> Vec<String> {
    let mut found: Vec<String> = run("losetup", "mount", &["--all", "--noheadings", "--output", "NAME,BACK-FILE"])
        .lines()
        .chain(std::fs::read_to_string("/proc/mounts").unwrap().lines())
        .filter(|line| line.contains(of))
        .map(str::to_owned)
        .collect();
    for process in std::fs::read_dir("/proc").unwrap().flatten() {
        let command = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        if command.starts_with("nbdfuse") && command.contains(of) {
            found.push(command);
        }
    }
    found
}

#[test]
fn ext4_on_a_disk_that_is_still_filling() {
    assert!(nix::unistd::geteuid().is_root(), "this test mounts file systems: run it as root");
    let dir = tempfile::tempdir().unwrap();
    let web = dir.path().join("web.img");
    image(&web, 96 * MIB, 1, &[]);
    run("mkfs.ext4", "e2fsprogs", &["-q", web.to_str().unwrap()]);
    let mount = Mount::new(&web, dir.path().join("source"), "loop");
    for number in 0..60_u64 {
        let directory = mount.path().join(format!("d{}", number % 7));
        std::fs::create_dir_all(&directory).unwrap();
        random_image(&directory.join(format!("f{number}")), 1 + number * 12_345, number);
    }
    let originals = files(mount.path());
    assert_eq!(originals.len(), 60);
    mount.end();

    let pair = Pair::of_image(dir, LEASE).hand_over();
    let b = &pair.b;
    let device = PathBuf::from(b.cli(&["attach", "web", "--via", "fuse"]));
    let _attached = Attached { node: b, device: device.clone(), directory: pair.b_directory() };
    assert_eq!(b.cli(&["attach", "web", "--via", "fuse"]), device.to_str().unwrap(), "attached is attached");
    assert_eq!(b.status("web")["device"], device.to_str().unwrap());
    assert!(b.fails(3, &["attach", "web", "--via", "kernel"]).contains("already, by FUSE"));
    assert!(b.fails(3, &["remove", "web"]).contains("detach"));
    let mount = Mount::new(&device, pair.dir.path().join("moved"), "rw");
    assert!(b.status("web")["missing_bytes"].as_u64().unwrap() > 0, "it is still filling");
    assert!(files(mount.path()) == originals, "every file of the source, and no other");
    assert!(b.fails(3, &["detach", "web"]).contains(mount.path().to_str().unwrap()), "in use");

    // Writes, deletions and trims.
    write_synced(&mount.path().join("new"), &[7; 3 << 20]);
    write_synced(&mount.path().join("d1/f1"), b"changed");
    let big = mount.path().join("big");
    random_image(&big, 16 * MIB, 99);
    std::fs::File::open(&big).unwrap().sync_all().unwrap();
    let store = pair.b_directory().join("disk.img");
    let full = allocated(&store);
    std::fs::remove_file(&big).unwrap();
    run("sync", "coreutils", &["-f", mount.path().to_str().unwrap()]);
    run("fstrim", "util-linux", &[mount.path().to_str().unwrap()]);
    // The pull may fill the rest meanwhile; what was trimmed is not among that.
    pair.wire.open();
    b.cli(&["wait", "web", "--timeout", "60s"]);
    let missing = 96 * MIB - full.min(96 * MIB);
    assert!(allocated(&store) + 12 * MIB < full + missing, "{} then {}", full, allocated(&store));
    let mut expected = originals;
    expected.insert("new".into(), blake3::hash(&[7; 3 << 20]));
    expected.insert("d1/f1".into(), blake3::hash(b"changed"));
    assert!(files(mount.path()) == expected);
    mount.end();
    run("fsck.ext4", "e2fsprogs", &["-f", "-n", device.to_str().unwrap()]);
    b.cli(&["detach", "web"]);
    assert_eq!(b.status("web")["device"], serde_json::Value::Null);
    let name = pair.dir.path().to_str().unwrap();
    wait_for("everything of the attachment is gone", || traces(name).is_empty());
    pair.complete();
    assert!(b.cli(&["verify", "web"]).ends_with("identical"));
    pair.assert_source_untouched();

    // What was written through the device is what any client of the export sees.
    let copy = pair.dir.path().join("copy.img");
    run("nbdcopy", "libnbd-bin", &[&b.uri("web"), copy.to_str().unwrap()]);
    run("fsck.ext4", "e2fsprogs", &["-f", "-n", copy.to_str().unwrap()]);
    let mount = Mount::new(&copy, pair.dir.path().join("copied"), "loop,ro,noload");
    assert!(files(mount.path()) == expected);
    mount.end();
}

#[test]
fn a_node_that_died_leaves_a_device_by_fuse_that_can_be_detached() {
    assert!(nix::unistd::geteuid().is_root(), "this test attaches devices: run it as root");
    let dir = tempfile::tempdir().unwrap();
    let web = dir.path().join("web.img");
    random_image(&web, MIB, 3);
    let mut node = Node::start(dir.path().join("a"), &["--disk", &format!("web={}", web.display())]);
    let device = PathBuf::from(node.cli(&["attach", "web", "--via", "fuse"]));
    // Left in the kernel's cache, for nobody to take.
    std::fs::OpenOptions::new().write(true).open(&device).unwrap().write_all_at(&[1; 4096], 0).unwrap();
    node.kill();
    node.start_again();
    let attached = Attached { node: &node, device, directory: node.dir.join("state/disks/web") };
    node.cli(&["detach", "web"]);
    assert_eq!(node.status("web")["device"], serde_json::Value::Null);
    let name = dir.path().to_str().unwrap();
    wait_for("everything of the attachment is gone", || traces(name).is_empty());
    // And again, as if nothing had been.
    node.cli(&["attach", "web", "--via", "fuse"]);
    node.cli(&["detach", "web"]);
    drop(attached);
}
