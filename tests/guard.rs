//! The guard on real control groups: it freezes at the deadline, whatever becomes of the node, and at no other time.
//!
//! Needs root and a writable cgroup v2 file system, wherever it is mounted.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use lazy_migrate::clock;
use lazy_migrate::container::Cgroup;
use lazy_migrate::guard::{Error, GuardLease, Guarding, ensure_by};
use lazy_migrate::units::BootTime;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const PROGRAM: &str = env!("CARGO_BIN_EXE_lazy-migrate");
/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);
/// No deadline within a test's life, but one that the guard watches.
const LONG: Duration = Duration::from_secs(3600);

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn send(pid: u32, signal: Signal) {
    kill(Pid::from_raw(pid.try_into().unwrap()), signal).unwrap();
}

/// A control group of the test's own, with what runs in it.
struct Group {
    cgroup: Cgroup,
    tasks: Vec<Child>,
}

impl Group {
    /// A path that is not there yet.
    fn named(name: &str) -> Group {
        Group { cgroup: Cgroup::at(&format!("/guard-test-{}-{name}", std::process::id())).unwrap(), tasks: vec![] }
    }

    /// A group with a busy process in it.
    fn busy(name: &str) -> Group {
        let mut group = Group::named(name);
        group.make();
        group.tasks.push(Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap());
        fs::write(group.dir().join("cgroup.procs"), group.tasks[0].id().to_string()).unwrap();
        assert!(group.runs());
        group
    }

    fn make(&self) {
        fs::create_dir(self.dir()).expect("a test group cannot be made: root and a writable cgroup v2 are needed");
    }

    fn dir(&self) -> PathBuf {
        self.cgroup.dir().unwrap()
    }

    fn is_frozen(&self) -> bool {
        self.cgroup.is_frozen().unwrap()
    }

    /// Whether the busy process gets any time of a processor.
    fn runs(&self) -> bool {
        let used = || {
            let stat = fs::read_to_string(format!("/proc/{}/schedstat", self.tasks[0].id())).unwrap();
            stat.split(' ').next().unwrap().parse::<u64>().unwrap()
        };
        let (before, begun) = (used(), Instant::now());
        let wait = if self.is_frozen() { Duration::from_millis(100) } else { PATIENCE };
        while used() == before && begun.elapsed() < wait {
            std::thread::sleep(Duration::from_millis(5));
        }
        used() != before
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::write(self.dir().join("cgroup.kill"), "1");
        for task in &mut self.tasks {
            let _ = task.kill();
            let _ = task.wait();
        }
        let begun = Instant::now();
        while self.dir().exists() && fs::remove_dir(self.dir()).is_err() && begun.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// A node's files for one disk, and at most one guard that the test started itself.
struct Lab {
    directory: PathBuf,
    temporary: Option<tempfile::TempDir>,
    lease: GuardLease,
    group: Group,
    guard: Option<Child>,
}

impl Lab {
    fn new(group: Group) -> Lab {
        let temporary = tempfile::tempdir().unwrap();
        let mut lab = Lab::in_directory(temporary.path(), group);
        lab.temporary = Some(temporary);
        lab
    }

    fn in_directory(directory: &Path, group: Group) -> Lab {
        let lease = GuardLease::create(&directory.join("guard.lease")).unwrap();
        Lab { directory: directory.to_owned(), temporary: None, lease, group, guard: None }
    }

    /// With a guard that is ready, and a deadline that is far away.
    fn guarded(name: &str) -> Lab {
        let mut lab = Lab::new(Group::busy(name));
        lab.end_in(LONG);
        lab.start();
        lab
    }

    fn start(&mut self) {
        let log = fs::File::create(self.log_path()).unwrap();
        self.guard = Some(self.command().stderr(log).spawn().unwrap());
        until("a guard", || self.lease.is_guarded());
    }

    fn command(&self) -> Command {
        let mut command = Command::new(PROGRAM);
        command.arg("guard").arg("--lease").arg(self.path()).args(["--cgroup", self.group.cgroup.path()]);
        command.stdin(Stdio::null());
        command
    }

    fn ensure(&self) -> Result<Guarding, Error> {
        ensure_by(Path::new(PROGRAM), &self.path(), &self.group.cgroup, &self.log_path())
    }

    fn path(&self) -> PathBuf {
        self.directory.join("guard.lease")
    }

    fn log_path(&self) -> PathBuf {
        self.directory.join("guard.log")
    }

    fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap()
    }

    fn end_in(&self, span: Duration) -> BootTime {
        let deadline = clock::now().after(span);
        self.lease.set_deadline(Some(deadline));
        deadline
    }

    /// Waits until the guard has looked at the deadline after `time`, and has told what it did before that.
    fn looked_after(&self, time: BootTime) {
        until("the guard looks again", || self.lease.alive() > time);
    }

    fn guard(&self) -> u32 {
        self.guard.as_ref().unwrap().id()
    }

    /// The exit code of the guard that the test started.
    fn ended(&mut self) -> Option<i32> {
        let guard = self.guard.as_mut().unwrap();
        until("the guard ends", || guard.try_wait().unwrap().is_some());
        guard.wait().unwrap().code()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // Ends a guard that `ensure` started.
        self.lease.set_deadline(None);
        if let Some(guard) = &mut self.guard {
            let _ = guard.kill();
            let _ = guard.wait();
        }
        let begun = Instant::now();
        while self.lease.is_guarded() && begun.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// The guards of a lease file that `ensure` started.
fn guards_of(lease: &Path) -> Vec<u32> {
    let lease = lease.to_str().unwrap();
    let numbers = fs::read_dir("/proc").unwrap().flatten().filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
    let guards = numbers.filter(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<_> = line.split(|&byte| byte == 0).collect();
        words.get(1) == Some(&&b"guard"[..]) && words.contains(&lease.as_bytes())
    });
    guards.collect()
}

fn refused(output: &Output, code: i32, why: &str) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{text}");
    assert_eq!(text.lines().count(), 1, "not one line: {text}");
    assert!(text.contains(why), "{text}");
}

#[test]
fn the_container_stands_still_from_the_deadline_on_and_not_before() {
    let lab = Lab::guarded("deadline");
    let deadline = lab.end_in(Duration::from_millis(700));
    let mut seen = clock::now();
    until("the freeze", || {
        let frozen = lab.group.is_frozen();
        seen = clock::now();
        frozen
    });
    assert!(seen >= deadline, "frozen before the deadline");
    assert!(seen.since(deadline) < Duration::from_secs(1), "frozen only {:?} after it", seen.since(deadline));
    assert!(!lab.group.runs());
    assert!(lab.lease.fired() > 0);
    until("a line in the log", || lab.log().contains("frozen; the node thaws it"));

    // Who thaws it without a lease does not get far.
    lab.group.cgroup.set_frozen(false).unwrap();
    until("the freeze once more", || lab.group.is_frozen());
    assert_eq!(lab.log().lines().filter(|line| line.contains("frozen;")).count(), 1, "{}", lab.log());
}

#[test]
fn a_renewal_in_time_keeps_it_running() {
    let lab = Lab::guarded("renewal");
    let first = lab.end_in(Duration::from_millis(700));
    lab.end_in(LONG);
    lab.looked_after(first);
    assert_eq!(lab.lease.fired(), 0);
    assert!(!lab.group.is_frozen() && lab.group.runs());
}

#[test]
fn a_renewal_at_the_very_moment_of_the_freeze_leaves_nothing_frozen_for_good() {
    let lab = Lab::guarded("moment");
    let mut seen = lab.lease.fired();
    // The node's rule, at every beat: renewed, so thaw if the guard has fired since the last look.
    let mut beat = || {
        let fired = lab.lease.fired();
        if std::mem::replace(&mut seen, fired) != fired {
            lab.group.cgroup.set_frozen(false).unwrap();
        }
    };
    let (mut raced, mut round) = (0, 0);
    while round < 16 || raced == 0 {
        assert!(round < 100, "no round saw a freeze begin");
        let before = lab.lease.fired();
        // Long enough that the guard sees it coming and is there in time; then later and later.
        let deadline = lab.end_in(Duration::from_millis(300));
        while clock::now() < deadline.after(Duration::from_micros(50 * round)) {
            std::hint::spin_loop();
        }
        lab.end_in(LONG);
        let renewed = clock::now();
        beat();
        lab.looked_after(renewed);
        beat();
        let freeze = fs::read_to_string(lab.group.dir().join("cgroup.freeze")).unwrap();
        assert_eq!(freeze.trim(), "0", "round {round}");
        raced += u32::from(lab.lease.fired() != before);
        round += 1;
    }
}

#[test]
fn a_second_guard_ends_at_once() {
    let lab = Lab::guarded("second");
    let second = lab.command().output().unwrap();
    refused(&second, 3, "another guard already watches");
    assert!(lab.lease.is_guarded(), "the second took the first along");
}

#[test]
fn told_to_end_it_freezes_first() {
    let mut lab = Lab::guarded("told");
    // What a terminal sends is not meant for it.
    send(lab.guard(), Signal::SIGINT);
    send(lab.guard(), Signal::SIGHUP);
    lab.looked_after(clock::now());
    assert!(!lab.group.is_frozen());
    let before = lab.lease.fired();
    send(lab.guard(), Signal::SIGTERM);
    assert_eq!(lab.ended(), Some(0));
    until("the freeze", || lab.group.is_frozen());
    assert!(lab.lease.fired() > before, "the node cannot see that it has to thaw");
    assert!(lab.log().contains("told to end"), "{}", lab.log());
    assert!(!lab.lease.is_guarded());
}

#[test]
fn a_group_that_comes_after_the_deadline_is_frozen_once_it_is_there() {
    let mut lab = Lab::new(Group::named("late"));
    // The deadline of a new file is in the past.
    lab.start();
    until("a line in the log", || lab.log().contains("no such group yet"));
    let begun = Instant::now();
    lab.group.make();
    lab.group.tasks.push(Command::new("sleep").arg("1000").spawn().unwrap());
    fs::write(lab.group.dir().join("cgroup.procs"), lab.group.tasks[0].id().to_string()).unwrap();
    until("the freeze", || lab.group.is_frozen());
    assert!(begun.elapsed() < Duration::from_secs(1), "frozen only after {:?}", begun.elapsed());
    assert_eq!(lab.log().lines().filter(|line| line.contains("no such group")).count(), 1, "{}", lab.log());
}

#[test]
fn it_ends_when_no_lease_is_needed_any_more_and_freezes_nothing() {
    let mut lab = Lab::guarded("endless");
    lab.lease.set_deadline(None);
    assert_eq!(lab.ended(), Some(0));
    assert!(!lab.group.is_frozen() && lab.group.runs());
    assert_eq!(lab.lease.fired(), 0);
    assert!(lab.log().lines().all(|line| line.contains("warning: ")), "{}", lab.log());
}

#[test]
fn it_ends_when_the_lease_file_is_removed_or_replaced() {
    let mut lab = Lab::guarded("unlinked");
    fs::remove_file(lab.path()).unwrap();
    assert_eq!(lab.ended(), Some(0));
    lab.lease = GuardLease::create(&lab.path()).unwrap();
    lab.end_in(LONG);
    lab.start();
    let new = GuardLease::create(&lab.path()).unwrap();
    let old = std::mem::replace(&mut lab.lease, new);
    assert_eq!(lab.ended(), Some(0));
    assert!(old.deadline().is_some() && !lab.group.is_frozen());
}

/// A small file system on a loop device.
struct Disk(tempfile::TempDir);

impl Disk {
    fn new() -> Disk {
        let disk = Disk(tempfile::tempdir().unwrap());
        let image = disk.0.path().join("image");
        fs::File::create(&image).unwrap().set_len(16 << 20).unwrap();
        fs::create_dir(disk.mount()).unwrap();
        run("e2fsprogs", "mkfs.ext4", &[Path::new("-q"), &image]);
        run("mount", "mount", &[Path::new("-o"), Path::new("loop"), &image, &disk.mount()]);
        disk
    }

    fn mount(&self) -> PathBuf {
        self.0.path().join("mount")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path().join("mount")).status();
    }
}

/// Nothing is written to a disk while this lives: who tries waits in the kernel.
struct Stuck<'a>(&'a Disk);

impl Stuck<'_> {
    fn new(disk: &Disk) -> Stuck<'_> {
        run("util-linux", "fsfreeze", &[Path::new("-f"), &disk.mount()]);
        Stuck(disk)
    }
}

impl Drop for Stuck<'_> {
    fn drop(&mut self) {
        let _ = Command::new("fsfreeze").arg("-u").arg(self.0.mount()).status();
    }
}

fn run(package: &str, program: &str, arguments: &[&Path]) {
    let done = Command::new(program).args(arguments).output();
    let done = done.unwrap_or_else(|error| panic!("cannot run {program}: {error}: install package {package}"));
    assert!(done.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
}

#[test]
fn a_stuck_disk_under_its_own_files_does_not_hold_it_up() {
    let disk = Disk::new();
    let mut lab = Lab::in_directory(&disk.mount(), Group::busy("stuck"));
    lab.end_in(LONG);
    lab.start();
    let deadline = lab.end_in(Duration::from_secs(2));
    let stuck = Stuck::new(&disk);
    assert!(!lab.group.is_frozen(), "too slow to show anything");
    // Nothing more is reported, for the guard's report waits for the disk.
    let alive = lab.lease.alive();
    until("the freeze", || lab.group.is_frozen());
    let late = clock::now().since(deadline);
    assert!(late < Duration::from_secs(1), "frozen only {late:?} after the deadline");
    assert_eq!((lab.lease.fired(), lab.lease.alive() > alive.after(Duration::from_secs(1))), (0, false));

    drop(stuck);
    until("the report", || lab.lease.fired() > 0);
    until("a line in the log", || lab.log().contains("frozen; the node thaws it"));
}

#[test]
fn nothing_may_delay_it_as_far_as_this_host_allows() {
    let lab = Lab::guarded("privileged");
    let read = |name: &str| fs::read_to_string(format!("/proc/{}/{name}", lab.guard())).unwrap();
    let kilobytes = |key: &str| -> u64 {
        let status = read("status");
        let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    };
    let stat = read("stat");
    // Counted from the state, which is field 3 of proc_pid_stat(5): 19 is nice, 41 the policy (2 is round-robin).
    let fields: Vec<_> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let first = fields[41 - 3] == "2" || fields[19 - 3] == "-20";
    // A test machine may forbid one or the other; then the log says so.
    for (done, warning) in [
        (kilobytes("VmLck:") >= kilobytes("VmRSS:"), "cannot lock its memory"),
        (read("oom_score_adj").trim() == "-1000", "cannot protect itself"),
        (first, "cannot raise its priority"),
    ] {
        assert_ne!(done, lab.log().contains(warning), "{warning}: {}", lab.log());
    }
    assert!(kilobytes("VmRSS:") < 100 << 10, "{} kB of memory is more than a guard may lock", kilobytes("VmRSS:"));
}

#[test]
fn a_lease_file_that_is_damaged_or_of_another_boot_is_refused_by_all() {
    let lab = Lab::new(Group::named("damaged"));
    let good = fs::read(lab.path()).unwrap();
    let mut other_boot = good.clone();
    other_boot[8] ^= 1;
    for (content, why) in [(&good[..512], "it has 512 bytes"), (&[7; 4096], "mark"), (&other_boot, "another boot")] {
        // Another file, because the lab has this one mapped.
        fs::remove_file(lab.path()).unwrap();
        fs::write(lab.path(), content).unwrap();
        refused(&lab.command().output().unwrap(), 1, why);
        let text = lab.ensure().unwrap_err().to_string();
        assert!(text.contains(why), "{text}");
    }
    fs::remove_file(lab.path()).unwrap();
    refused(&lab.command().output().unwrap(), 1, "No such file");
    let no_group = Command::new(PROGRAM).args(["guard", "--lease", "/x", "--cgroup", "../.."]).output().unwrap();
    refused(&no_group, 2, "must be absolute");
}

#[test]
fn ensuring_twice_starts_one_and_again_after_its_death_another() {
    let lab = Lab::new(Group::busy("ensure"));
    lab.end_in(LONG);
    assert_eq!(lab.ensure().unwrap(), Guarding::Started);
    assert!(lab.lease.is_guarded());
    assert_eq!(lab.ensure().unwrap(), Guarding::Already);
    let first = guards_of(&lab.path());
    assert_eq!(first.len(), 1);

    send(first[0], Signal::SIGKILL);
    until("no guard", || !lab.lease.is_guarded());
    // Not a zombie either: its parent, this process, has taken note of its end.
    until("the guard's process is gone", || !Path::new(&format!("/proc/{}", first[0])).exists());
    assert_eq!(lab.ensure().unwrap(), Guarding::Started);
    let second = guards_of(&lab.path());
    assert!(second.len() == 1 && second != first);
    lab.end_in(Duration::ZERO);
    until("the freeze", || lab.group.is_frozen());
}

#[test]
fn a_guard_that_cannot_start_is_an_error_that_names_the_log() {
    let lab = Lab::new(Group::named("unable"));
    let text = ensure_by(Path::new("/bin/false"), &lab.path(), &lab.group.cgroup, &lab.log_path()).unwrap_err();
    assert!(matches!(text, Error::Ended { .. }), "{text}");
    assert!(text.to_string().contains("guard.log"), "{text}");
}

/// What a killed node had in hand, by the names of the environment.
const NODE_LEASE: &str = "GUARD_TEST_LEASE";
const NODE_GROUP: &str = "GUARD_TEST_GROUP";
const CONTAINER_GROUP: &str = "GUARD_TEST_CONTAINER";
/// Long enough to look at the guard first, on a busy machine too.
const BEFORE_THE_END: Duration = Duration::from_secs(4);

#[test]
fn the_death_of_the_node_and_of_its_group_changes_nothing() {
    let mut node_group = Group::named("node");
    node_group.make();
    let mut lab = Lab::new(Group::busy("orphan"));
    // This program again, as a node that makes the lease file and the guard.
    let node = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "stand_in_for_a_node", "--nocapture"])
        .env(NODE_LEASE, lab.path())
        .env(NODE_GROUP, node_group.cgroup.path())
        .env(CONTAINER_GROUP, lab.group.cgroup.path())
        .process_group(0)
        .spawn()
        .unwrap();
    let node_pid = node.id();
    node_group.tasks.push(node);
    until("a guard", || lab.lease.is_guarded());
    lab.lease = GuardLease::open(&lab.path()).unwrap();
    let guard = guards_of(&lab.path());
    assert_eq!(guard.len(), 1);
    let read = |name: &str| fs::read_to_string(format!("/proc/{}/{name}", guard[0])).unwrap();
    let stat = read("stat");
    let session = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(6 - 3).unwrap();
    assert_eq!(session, guard[0].to_string(), "not a session of its own: {stat}");
    until("the guard leaves the node's group", || read("cgroup").contains("0::/lazy-migrate-guard\n"));
    assert_eq!(fs::read_link(format!("/proc/{}/cwd", guard[0])).unwrap(), Path::new("/"));

    // As a service manager does it: the node, its process group, its control group.
    send(node_pid, Signal::SIGKILL);
    let _ = kill(Pid::from_raw(-i32::try_from(node_pid).unwrap()), Signal::SIGKILL);
    fs::write(node_group.dir().join("cgroup.kill"), "1").unwrap();
    until("the node's end", || node_group.tasks[0].try_wait().unwrap().is_some());
    assert!(clock::now() < lab.lease.deadline().unwrap(), "too slow to show anything");
    assert!(!lab.group.is_frozen());
    assert_eq!(guards_of(&lab.path()), guard);
    until("the freeze", || lab.group.is_frozen());
    assert!(clock::now() >= lab.lease.deadline().unwrap());
    lab.lease.set_deadline(None);
    until("no guard", || !lab.lease.is_guarded());
    // The guards' own group is left behind empty; another test's guard may still be in it.
    let _ = fs::remove_dir(Cgroup::at("/lazy-migrate-guard").unwrap().dir().unwrap());
}

/// The other process of the test before, and nothing when it is called as a test.
#[test]
fn stand_in_for_a_node() {
    let Some(path) = std::env::var_os(NODE_LEASE).map(PathBuf::from) else { return };
    let group = |name: &str| Cgroup::at(&std::env::var(name).unwrap()).unwrap();
    fs::write(group(NODE_GROUP).dir().unwrap().join("cgroup.procs"), "0").unwrap();
    let lease = GuardLease::create(&path).unwrap();
    lease.set_deadline(Some(clock::now().after(BEFORE_THE_END)));
    let log = path.with_extension("log");
    assert_eq!(ensure_by(Path::new(PROGRAM), &path, &group(CONTAINER_GROUP), &log).unwrap(), Guarding::Started);
    loop {
        std::thread::park();
    }
}
