//! The hook runtime with real control groups, and commands that need no criu: needs root and cgroup v2.
//!
//! The service counts into a file; its checkpoint is a copy of that count, and its restore goes on from there.
// tests/run: host

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use lazy_migrate::container::{
    Cgroup, CheckpointOptions, ContainerId, ContainerStatus, Error, Hook, RestoreSpec, Runtime,
};

const PATIENCE: Duration = Duration::from_secs(20);

/// A service in a group of its own, and what it takes to move it. Ends all of it.
struct Lab {
    dir: tempfile::TempDir,
    groups: String,
    service: Option<Child>,
}

impl Lab {
    fn new(name: &str) -> Self {
        let groups = format!("/lm-hook-{}-{name}", std::process::id());
        let lab = Self { dir: tempfile::tempdir().unwrap(), groups, service: None };
        std::fs::create_dir(lab.path("root")).unwrap();
        std::fs::create_dir_all(lab.group("web").dir().expect("cgroup v2 has to be mounted")).unwrap();
        lab
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn group(&self, name: &str) -> Cgroup {
        Cgroup::at(&format!("{}/{name}", self.groups)).unwrap()
    }

    /// Starts it as an operator would.
    fn start(&mut self) {
        let script =
            format!("echo $$ >{}/cgroup.procs; cd {}; {COUNTER}", dir(&self.group("web")), self.path("root").display());
        let service = Command::new("/bin/sh").args(["-c", &script]).stdin(Stdio::null()).spawn().unwrap();
        self.service = Some(service);
        self.counts_on();
    }

    fn count(&self) -> u64 {
        std::fs::read_to_string(self.path("root/count")).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    }

    fn counts_on(&self) {
        let from = self.count();
        until("the service to count on", || self.count() > from);
    }

    /// The runtime, with what `more` adds to or changes of the commands.
    fn hooks(&self, checkpoint: &str, restore: &str, more: &str) -> Hook {
        let line = |script: &str| serde_json::json!(["/bin/sh", "-c", script]);
        let text = format!(
            "root = \"{}\"\ncgroup = \"{}/%n\"\ncheckpoint.command = {}\nrestore.command = {}\nrestore.limit = \"2s\"\n{more}",
            self.path("root").display(),
            self.groups,
            line(checkpoint),
            line(restore)
        );
        std::fs::write(self.path("hooks.toml"), text).unwrap();
        Hook::read(&self.path("hooks.toml"), Some(self.path("records"))).unwrap()
    }

    async fn spec(&self, runtime: &Hook, images: Option<PathBuf>) -> RestoreSpec {
        RestoreSpec {
            bundle: runtime.bundle(&web(), None).await.unwrap(),
            image_dir: images,
            work_dir: self.path("work"),
            state_dir: self.path("state"),
            cgroup: self.group("restored"),
            tcp_established: false,
            limit: Duration::from_secs(60),
        }
    }

    /// The service was ended, and its group is as good as new.
    async fn gone(&mut self, runtime: &Hook) {
        runtime.kill_and_delete(&web()).await.unwrap();
        runtime.kill_and_delete(&web()).await.unwrap();
        self.service.take().unwrap().wait().unwrap();
        assert!(matches!(runtime.inspect(&web()).await, Err(Error::NoSuchContainer { .. })));
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for group in ["web", "restored"].map(|name| self.group(name)) {
            let _ = group.kill();
            let begun = Instant::now();
            while group.is_populated().unwrap_or(false) && begun.elapsed() < PATIENCE {
                std::thread::sleep(Duration::from_millis(5));
            }
            let _ = std::fs::remove_dir(dir(&group));
        }
        if let Some(mut service) = self.service.take() {
            let _ = service.wait();
        }
        let _ = std::fs::remove_dir(Path::new(&dir(&self.group("web"))).parent().unwrap());
    }
}

const COUNTER: &str =
    "i=$(cat count 2>/dev/null || echo 0); while :; do i=$((i + 1)); echo $i >new; mv new count; sleep 0.01; done";
const DUMP: &str = "cp $LAZY_MIGRATE_ROOT/count $LAZY_MIGRATE_IMAGES/count && env | sort >$LAZY_MIGRATE_WORK/env";

fn restore() -> String {
    format!(
        "cd $LAZY_MIGRATE_ROOT; cp $LAZY_MIGRATE_IMAGES/count count; setsid /bin/sh -c '{COUNTER}' >/dev/null 2>&1 &"
    )
}

fn dir(group: &Cgroup) -> String {
    group.dir().unwrap().to_str().unwrap().to_owned()
}

fn web() -> ContainerId {
    ContainerId::new("web").unwrap()
}

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < PATIENCE, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[tokio::test]
async fn a_service_is_frozen_dumped_ended_and_restored() {
    let mut lab = Lab::new("whole");
    let runtime = lab.hooks(DUMP, &restore(), "");
    assert!(matches!(runtime.inspect(&web()).await, Err(Error::NoSuchContainer { .. })));
    lab.start();
    let found = runtime.inspect(&web()).await.unwrap();
    let pid = lab.service.as_ref().unwrap().id();
    assert_eq!((found.status, found.pid), (ContainerStatus::Running, Some(pid)));
    assert_eq!((found.cgroup, found.rootfs, found.netns), (Some(lab.group("web")), lab.path("root"), None));

    let (images, work) = (lab.path("images"), lab.path("work"));
    let (id, options) = (web(), CheckpointOptions { tcp_established: true, rounds: 0 });
    let dump = || runtime.checkpoint(&id, images.clone(), work.clone(), options);
    assert!(matches!(dump().await, Err(Error::WrongState { .. })), "a running service was dumped");
    for _ in 0..2 {
        runtime.freeze(&web()).await.unwrap();
        assert!(runtime.is_frozen(&web()).await.unwrap());
    }
    let frozen = lab.count();
    dump().await.unwrap();
    assert_eq!(lab.count(), frozen);
    // What the documents promise, and nothing else.
    let told = std::fs::read_to_string(work.join("env")).unwrap();
    let path = |name: &str, path: &Path| format!("LAZY_MIGRATE_{name}={}", path.display());
    let group = lab.group("web");
    let mut expected = vec![
        "LAZY_MIGRATE_ACTION=checkpoint".to_owned(),
        "LAZY_MIGRATE_CONTAINER=web".to_owned(),
        path("ROOT", &lab.path("root")),
        format!("LAZY_MIGRATE_CGROUP={}", group.path()),
        format!("LAZY_MIGRATE_CGROUP_DIR={}", dir(&group)),
        format!("LAZY_MIGRATE_PID={pid}"),
        path("IMAGES", &images),
        path("WORK", &work),
        "LAZY_MIGRATE_TCP_ESTABLISHED=1".to_owned(),
    ];
    expected.sort();
    let ours: Vec<_> = told.lines().filter(|line| line.starts_with("LAZY_MIGRATE")).collect();
    assert_eq!(ours, expected);

    // Rolled back, and moved in the end.
    runtime.thaw(&web()).await.unwrap();
    runtime.thaw(&web()).await.unwrap();
    lab.counts_on();
    assert!(matches!(
        runtime.restore(&web(), lab.spec(&runtime, Some(images.clone())).await).await,
        Err(Error::Exists { .. })
    ));
    runtime.freeze(&web()).await.unwrap();
    dump().await.unwrap();
    let frozen = lab.count();
    lab.gone(&runtime).await;
    assert_eq!(std::fs::read_to_string(Path::new(&dir(&group)).join("cgroup.freeze")).unwrap().trim(), "0");

    let spec = lab.spec(&runtime, Some(images.clone())).await;
    let restored = runtime.restore(&web(), spec).await.unwrap();
    assert_eq!(restored.cgroup, Some(lab.group("restored")));
    assert!(restored.bundle.starts_with(lab.path("state")), "nobody would know it again: {:?}", restored.bundle);
    until("the restored service to count on", || lab.count() > frozen);
    // As the guard does it.
    lab.group("restored").set_frozen(true).unwrap();
    until("the restored service to freeze", || lab.group("restored").is_frozen().unwrap());
    assert_eq!(runtime.inspect(&web()).await.unwrap().status, ContainerStatus::Paused);
    runtime.kill_and_delete(&web()).await.unwrap();
    assert!(!Path::new(&dir(&lab.group("restored"))).exists());
    assert_eq!(std::fs::read_dir(lab.path("records")).unwrap().count(), 0);
}

#[tokio::test]
async fn a_dump_is_used_only_if_the_command_says_so_and_the_kernel_too() {
    let mut lab = Lab::new("dump");
    lab.start();
    let options = CheckpointOptions::default();
    for (script, ran_on) in [("exit 4", false), ("echo 0 >$LAZY_MIGRATE_CGROUP_DIR/cgroup.freeze", true)] {
        let runtime = lab.hooks(script, "true", "");
        runtime.freeze(&web()).await.unwrap();
        let error = runtime.checkpoint(&web(), lab.path("images"), lab.path("work"), options).await.unwrap_err();
        assert_eq!(matches!(error, Error::RanOn { .. }), ran_on, "{error}");
        runtime.thaw(&web()).await.unwrap();
        lab.counts_on();
    }
    // Two trees: a command that dumps one would lose the other, so it is told of none.
    let mut second = Command::new("sleep").arg("600").spawn().unwrap();
    std::fs::write(Path::new(&dir(&lab.group("web"))).join("cgroup.procs"), second.id().to_string()).unwrap();
    let runtime = lab.hooks("[ -z \"$LAZY_MIGRATE_PID\" ]", "true", "");
    runtime.freeze(&web()).await.unwrap();
    let dumped = runtime.checkpoint(&web(), lab.path("images"), lab.path("work"), options).await;
    second.kill().unwrap();
    second.wait().unwrap();
    dumped.unwrap();
}

#[tokio::test]
async fn a_freeze_that_fails_lets_the_service_run() {
    let mut lab = Lab::new("freeze");
    lab.start();
    let freeze = |script: &str| format!("freeze.command = {}\n", serde_json::json!(["/bin/sh", "-c", script]));
    let half = "echo 1 >$LAZY_MIGRATE_CGROUP_DIR/cgroup.freeze; echo half done >&2; exit 1";
    let text = lab.hooks("true", "true", &freeze(half)).freeze(&web()).await.unwrap_err().to_string();
    assert_eq!(text, "cannot freeze container web: /bin/sh failed (exit status: 1): half done");
    lab.counts_on();
    let hangs =
        format!("{}freeze.limit = \"1s\"\n", freeze("echo 1 >$LAZY_MIGRATE_CGROUP_DIR/cgroup.freeze; sleep 600"));
    let error = lab.hooks("true", "true", &hangs).freeze(&web()).await.unwrap_err();
    assert!(matches!(error, Error::TimedOut { .. }), "{error}");
    lab.counts_on();
    // Its word is not taken for it: nothing was frozen.
    let error = lab.hooks("true", "true", &freeze("exit 0")).freeze(&web()).await.unwrap_err();
    assert!(matches!(error, Error::TimedOut { .. }), "{error}");
    lab.counts_on();
}

#[tokio::test]
async fn a_restore_that_fails_leaves_nothing() {
    let lab = Lab::new("restore");
    let child = format!("setsid sleep 600 >/dev/null 2>&1 & echo $! >{}", lab.path("pid").display());
    for (script, word, ran) in [
        (format!("{child}; echo nothing to see; echo no room >&2; exit 9"), "failed (exit status: 9): no room", true),
        (format!("{child}; sleep 601"), "within 2s", true),
        (format!("{child}; setsid sleep 600 &"), "keeps its output open", true),
        ("true".to_owned(), "left nothing in its control group", false),
        ("no-such-command".to_owned(), "not found", false),
    ] {
        let _ = std::fs::remove_file(lab.path("pid"));
        let runtime = lab.hooks("true", &script, "");
        let error = runtime.restore(&web(), lab.spec(&runtime, Some(lab.path("images"))).await).await.unwrap_err();
        let text = error.to_string();
        assert!(text.contains(word) && !text.contains('\n'), "{text:?} says nothing of {word:?}");
        assert!(error.may_have_run(), "{text}");
        assert_eq!(lab.path("pid").exists(), ran);
        if ran {
            let pid = std::fs::read_to_string(lab.path("pid")).unwrap();
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim()));
            assert!(stat.is_err() || stat.unwrap().contains(") Z "), "process {pid} lives on after: {text}");
        }
        assert!(!Path::new(&dir(&lab.group("restored"))).exists(), "the group was left after: {text}");
        assert!(!lab.path("state/bundle").exists());
        assert_eq!(std::fs::read_dir(lab.path("records")).unwrap().count(), 0);
    }
    let runtime = lab.hooks("true", "true", "");
    let text = runtime.restore(&web(), lab.spec(&runtime, None).await).await.unwrap_err().to_string();
    assert!(text.contains("[start]"), "{text}");
}
