//! Real containers through runc and criu, for a machine where criu works: Debian's kernel, cgroup v2, root. The guest
//! harness runs this binary inside the guest with `--test-threads=1`.

#[path = "container_real/lab.rs"]
mod lab;
#[path = "container_real/net.rs"]
mod net;

use std::{
    path::Path,
    time::{Duration, Instant},
};

use lab::{Lab, id, until};
use lazy_migrate::container::{
    Bundle, Cgroup, CheckpointOptions, ContainerStatus, Error, ImageFollower, ImageReceiver, NetDrop, RestoreSpec,
    Runc, Runtime, image_receiver::Limits, image_stream, quiesce,
};
use net::Net;
use tokio_util::sync::CancellationToken;

const TCP: CheckpointOptions = CheckpointOptions { tcp_established: true, rounds: 0 };

#[tokio::test]
async fn a_dump_leaves_the_container_frozen_and_it_goes_on_without_a_gap() {
    let lab = Lab::new("dump");
    let runc = Runc::default();
    let c = lab.start("dump1").await;
    lab.counts_beyond(5).await;
    let early = runc.checkpoint(&c, lab.path("img"), lab.path("work"), TCP).await.unwrap_err();
    assert!(matches!(early, Error::WrongState { .. }), "a running container was dumped: {early}");

    runc.freeze(&c).await.unwrap();
    runc.freeze(&c).await.unwrap();
    assert!(runc.is_frozen(&c).await.unwrap());
    let before = lab.count();
    let begun = Instant::now();
    runc.checkpoint(&c, lab.path("img"), lab.path("work"), TCP).await.unwrap();
    println!("checkpoint: {:?}", begun.elapsed());
    assert_eq!(lab.count(), before, "it ran during the dump");
    assert!(runc.is_frozen(&c).await.unwrap());
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(lab.path("img")).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o700);
    assert!(lab.path("img/inventory.img").exists());

    runc.thaw(&c).await.unwrap();
    runc.thaw(&c).await.unwrap();
    lab.counts_beyond(before + 5).await;
    lab.end(&c).await;
}

#[tokio::test]
async fn a_streamed_dump_is_restored_elsewhere_while_the_original_stays_paused() {
    let lab = Lab::new("move");
    let runc = Runc::default();
    let c = lab.start("move1").await;
    lab.counts_beyond(5).await;
    let inspected = runc.inspect(&c).await.unwrap();
    let netdrop = NetDrop::for_container(&inspected, "move").expect("it has a network of its own");
    netdrop.install().await.unwrap();
    runc.freeze(&c).await.unwrap();

    let (tx, rx) = tokio::sync::mpsc::channel(image_stream::QUEUE);
    let dumped = CancellationToken::new();
    let follower = tokio::spawn(ImageFollower::new(&lab.path("img"), tx).unwrap().run(dumped.clone()));
    let receiver = tokio::spawn(ImageReceiver::create(&lab.path("got"), Limits::default()).unwrap().run(rx));
    runc.checkpoint(&c, lab.path("img"), lab.path("work"), TCP).await.unwrap();
    dumped.cancel();
    let (sent, received) = (follower.await.unwrap().unwrap(), receiver.await.unwrap().unwrap());
    println!("streamed: {sent:?}");
    assert_eq!((sent.files, sent.bytes), (received.files, received.bytes));
    assert!(sent.files > 10, "{sent:?}");

    quiesce::freeze(&lab.mount(), Duration::from_secs(30)).await.unwrap();
    let other = lab.copy();
    let at_freeze = other.count();
    // The images must come from the stream alone.
    std::fs::remove_dir_all(lab.path("img")).unwrap();
    let spec = restore_spec(&lab, &other, "got", "/lazy-migrate-test/move2");
    let begun = Instant::now();
    let now = runc.restore(&id("move2"), spec.clone()).await.unwrap();
    println!("restore: {:?}", begun.elapsed());
    assert_eq!((now.status, now.rootfs.as_path()), (ContainerStatus::Running, spec.bundle.rootfs()));
    assert_eq!(now.cgroup, Some(spec.cgroup.clone()));
    other.counts_beyond(at_freeze + 5).await;
    assert_eq!(lab.count(), at_freeze, "the original ran");
    assert!(runc.is_frozen(&c).await.unwrap());
    // The restored container is one like any other.
    runc.freeze(&id("move2")).await.unwrap();
    let stopped = other.count();
    assert!(spec.cgroup.is_frozen().unwrap());
    runc.thaw(&id("move2")).await.unwrap();
    other.counts_beyond(stopped + 3).await;
    let taken = runc.restore(&id("move2"), spec.clone()).await.unwrap_err();
    assert!(matches!(taken, Error::Exists { .. }), "{taken}");
    let busy = runc.restore(&id("move3"), spec.clone()).await.unwrap_err();
    assert!(matches!(busy, Error::Cgroup { .. }), "{busy}");
    let running = other.count();
    other.counts_beyond(running).await;
    other.end(&id("move2")).await;
    assert!(!spec.cgroup.dir().unwrap().exists());

    // Rollback.
    let begun = Instant::now();
    quiesce::thaw(&lab.mount()).await.unwrap();
    runc.thaw(&c).await.unwrap();
    netdrop.remove().await.unwrap();
    println!("rollback: {:?}", begun.elapsed());
    lab.counts_beyond(at_freeze + 5).await;
    lab.end(&c).await;
}

/// The drop holds the client's packets on both sides, so that the connection neither loses data nor gets a reset.
#[tokio::test]
async fn a_tcp_connection_lives_over_the_move() {
    let net = Net::new();
    let lab = Lab::new("tcp");
    let runc = Runc::default();
    lab.serve_echo(&lab.bundle_dir(), &net.path("s"));
    let c = lab.start("tcp1").await;
    net.plug("s");
    let mut client = net.connect().await;
    client.roundtrip(b"before");
    let inspected = runc.inspect(&c).await.unwrap();
    assert_eq!(inspected.netns.as_deref(), Some(net.path("s").as_path()), "the lasting path is the better one");

    let source = NetDrop::for_container(&inspected, "tcp").unwrap();
    source.install().await.unwrap();
    runc.freeze(&c).await.unwrap();
    // Sent into the pause: the frozen side must not acknowledge it.
    client.send(b"during");
    runc.checkpoint(&c, lab.path("img"), lab.path("work"), TCP).await.unwrap();
    let other = lab.copy();
    lab.serve_echo(&other.bundle_dir(), &net.path("d"));
    let target = NetDrop::new(net.path("d"), "tcp");
    target.install().await.unwrap();
    net.unplug("s");
    net.plug("d");
    runc.restore(&id("tcp2"), restore_spec(&lab, &other, "img", "/lazy-migrate-test/tcp2")).await.unwrap();
    target.remove().await.unwrap();
    let begun = Instant::now();
    client.expect(b"during");
    println!("the client heard again after {:?}", begun.elapsed());
    client.roundtrip(b"after");
    assert!(runc.is_frozen(&c).await.unwrap());
    assert!(source.is_installed().await.unwrap());
    other.end(&id("tcp2")).await;
    lab.end(&c).await;
    // The namespace outlives the container, and so do the rules until they are removed.
    source.remove().await.unwrap();
    assert!(!lab::rules(&net.path("d")).contains("CRIU"));
}

#[tokio::test]
async fn a_dump_whose_criu_dies_is_reported_and_the_container_goes_on() {
    let lab = Lab::new("criudies");
    let c = lab.start("criudies1").await;
    lab.counts_beyond(3).await;
    let dying = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guest/dying-criu");
    let runc = Runc { criu: Some(dying), ..Runc::default() };
    runc.freeze(&c).await.unwrap();
    let frozen_at = lab.count();
    let error = runc.checkpoint(&c, lab.path("img"), lab.path("work"), TCP).await.unwrap_err();
    assert!(error.to_string().contains("criu was ended before it was done"), "{error}");
    // It died with the container's network held, which only a thaw lifts.
    let netns = runc.inspect(&c).await.unwrap().netns.unwrap();
    assert!(lab::rules(&netns).contains("-A CRIU -j DROP"), "nothing to be lifted:\n{}", lab::rules(&netns));
    runc.thaw(&c).await.unwrap();
    assert!(!lab::rules(&netns).contains("CRIU"), "{}", lab::rules(&netns));
    lab.counts_beyond(frozen_at + 5).await;

    // One that does not start at all: nothing has happened.
    let runc = Runc { criu: Some(lab.script("bad-criu", "#!/bin/sh\nexit 1\n")), ..Runc::default() };
    runc.freeze(&c).await.unwrap();
    let error = runc.checkpoint(&c, lab.path("img2"), lab.path("work2"), TCP).await.unwrap_err();
    println!("not started: {error}");
    assert!(error.to_string().starts_with("cannot checkpoint container criudies1: runc failed"), "{error}");
    assert!(runc.is_frozen(&c).await.unwrap());
    runc.thaw(&c).await.unwrap();
    // After both, a good one works.
    let runc = Runc::default();
    runc.freeze(&c).await.unwrap();
    runc.checkpoint(&c, lab.path("img3"), lab.path("work3"), TCP).await.unwrap();
    runc.thaw(&c).await.unwrap();
    let resumed = lab.count();
    lab.counts_beyond(resumed + 3).await;
    lab.end(&c).await;
}

#[tokio::test]
async fn a_failed_restore_leaves_nothing() {
    let lab = Lab::new("bad");
    let runc = Runc::default();
    let c = lab.start("bad1").await;
    lab.counts_beyond(3).await;
    runc.freeze(&c).await.unwrap();
    runc.checkpoint(&c, lab.path("img"), lab.path("work"), TCP).await.unwrap();
    let frozen_at = lab.count();
    let other = lab.copy();
    let pages = std::fs::read(lab.path("img/pages-1.img")).unwrap();
    let inventory = std::fs::read(lab.path("img/inventory.img")).unwrap();
    let mut spec = restore_spec(&lab, &other, "img", "/lazy-migrate-test/bad2");

    // criu says no.
    std::fs::write(lab.path("img/inventory.img"), "").unwrap();
    let error = runc.restore(&id("bad2"), spec.clone()).await.unwrap_err();
    println!("empty inventory: {error}");
    assert!(error.to_string().contains("criu/"), "the log's reason is missing: {error}");
    nothing_left(&lab, &spec, "bad2").await;
    std::fs::write(lab.path("img/inventory.img"), inventory).unwrap();

    let files = other.files();
    // criu says nothing: it waits for good with half-made tasks.
    std::fs::write(lab.path("img/pages-1.img"), &pages[..100]).unwrap();
    spec.limit = Duration::from_secs(8);
    let error = runc.restore(&id("bad2"), spec.clone()).await.unwrap_err();
    println!("cut pages: {error}");
    assert!(matches!(error, Error::TimedOut { .. } | Error::Failed { .. }), "{error}");
    nothing_left(&lab, &spec, "bad2").await;
    std::fs::write(lab.path("img/pages-1.img"), &pages).unwrap();

    assert_eq!(other.files(), files, "the clean-up touched the container's disk");

    // The rootfs is not there.
    let mut elsewhere = spec.clone();
    let empty = lab.path("empty-bundle");
    lab.bundle(&empty, &lab.path("no-such-rootfs"));
    elsewhere.bundle = Bundle::read(&empty).unwrap();
    let error = runc.restore(&id("bad2"), elsewhere.clone()).await.unwrap_err();
    println!("no rootfs: {error}");
    nothing_left(&lab, &elsewhere, "bad2").await;

    // The original has not noticed, and the same id, group and directories serve for a good one.
    assert_eq!(lab.count(), frozen_at);
    assert!(runc.is_frozen(&c).await.unwrap());
    spec.limit = Duration::from_secs(60);
    runc.restore(&id("bad2"), spec).await.unwrap();
    other.counts_beyond(frozen_at + 3).await;
    other.end(&id("bad2")).await;
    runc.thaw(&c).await.unwrap();
    lab.counts_beyond(frozen_at + 3).await;
    lab.end(&c).await;
}

#[tokio::test]
async fn a_paused_container_is_killed_and_deleted_without_running() {
    let lab = Lab::new("kill");
    let runc = Runc::default();
    let c = lab.start("kill1").await;
    lab.counts_beyond(3).await;
    runc.freeze(&c).await.unwrap();
    let now = runc.inspect(&c).await.unwrap();
    assert_eq!(now.status, ContainerStatus::Paused);
    let count = lab.count();
    let begun = Instant::now();
    runc.kill_and_delete(&c).await.unwrap();
    println!("kill and delete: {:?}", begun.elapsed());
    assert!(matches!(runc.inspect(&c).await, Err(Error::NoSuchContainer { .. })));
    assert!(!Path::new(&format!("/proc/{}", now.pid.unwrap())).exists());
    assert!(!now.cgroup.unwrap().dir().unwrap().exists());
    assert_eq!(lab.count(), count, "it ran while it was killed");
    runc.kill_and_delete(&c).await.unwrap();

    let c = lab.start("kill2").await;
    runc.kill_and_delete(&c).await.unwrap();
    assert!(matches!(runc.thaw(&c).await, Err(Error::NoSuchContainer { .. })));
    assert!(matches!(runc.freeze(&c).await, Err(Error::NoSuchContainer { .. })));
}

#[tokio::test]
async fn the_probe_tells_whether_criu_works() {
    let lab = Lab::new("probe");
    let begun = Instant::now();
    Runc::default().probe(lab.path("scratch")).await.unwrap();
    println!("probe: {:?}", begun.elapsed());
    assert_eq!(std::fs::read_dir(lab.path("scratch")).unwrap().count(), 0);
    let missing = Runc { criu: Some("/nonexistent/criu".into()), ..Runc::default() };
    let error = missing.probe(lab.path("scratch")).await.unwrap_err();
    assert!(error.to_string().ends_with("install package criu"), "{error}");
    let broken = "#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'Error (criu/x.c:1): no such kernel' >&2\nexit 1\n";
    let broken = Runc { criu: Some(lab.script("broken-criu", broken)), ..Runc::default() };
    let error = broken.probe(lab.path("scratch")).await.unwrap_err();
    assert!(error.to_string().contains("no such kernel"), "{error}");
    assert_eq!(std::fs::read_dir(lab.path("scratch")).unwrap().count(), 0);
}

fn restore_spec(lab: &Lab, other: &Lab, images: &str, cgroup: &str) -> RestoreSpec {
    let bundle = Bundle::read(&other.bundle_dir()).unwrap();
    bundle.check_rootfs_below(&other.mount()).unwrap();
    bundle.check_rootfs_present(&other.mount()).unwrap();
    RestoreSpec {
        bundle,
        image_dir: Some(lab.path(images)),
        work_dir: lab.path("restore-work"),
        state_dir: lab.path("state"),
        cgroup: Cgroup::at(cgroup).unwrap(),
        tcp_established: true,
        limit: Duration::from_secs(60),
    }
}

async fn nothing_left(lab: &Lab, spec: &RestoreSpec, name: &str) {
    assert!(!Path::new("/run/runc").join(name).exists(), "runc's own directory is left");
    assert!(matches!(Runc::default().inspect(&id(name)).await, Err(Error::NoSuchContainer { .. })));
    assert!(!spec.cgroup.dir().unwrap().exists(), "the control group is left");
    assert!(!spec.state_dir.join("bundle").exists(), "the derived bundle is left");
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let leftovers = |text: &str| text.contains("criu") || text.contains(&format!("/run/runc/{name}"));
    let left: Vec<_> = mounts.lines().filter(|line| leftovers(line)).collect();
    assert!(left.is_empty(), "mounts are left: {left:?}");
    let tmp = std::path::PathBuf::from("/tmp");
    for dir in [&spec.work_dir, &spec.state_dir, &tmp].into_iter().chain(&spec.image_dir) {
        let names = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.file_name());
        let left: Vec<_> = names.filter(|n| n.to_string_lossy().starts_with(".criu.")).collect();
        assert!(left.is_empty(), "{left:?} left in {}", dir.display());
    }
    // No task of it, and no criu, wherever they are.
    until("criu and its tasks to be gone", || lab::tasks_of(&["criu", "runc"], lab).is_empty()).await;
}
