//! The commands' side of it, without control groups: tests/container_hook.rs has those.

use std::{path::Path, time::Duration};

use super::Hook;
use crate::container::{CheckpointOptions, ContainerId, Error, Runtime};

const LEAST: &str = "root = \"/srv/%n\"\ncheckpoint.command = [\"/bin/true\"]\nrestore.command = [\"/bin/true\"]\n";

fn web() -> ContainerId {
    ContainerId::new("web").unwrap()
}

/// With an inspect command that is this script.
fn inspecting(dir: &Path, script: &str, more: &str) -> Hook {
    let file = dir.join("hooks.toml");
    let command = serde_json::json!(["/bin/sh", "-c", script, "%n"]);
    std::fs::write(&file, format!("{LEAST}inspect.command = {command}\n{more}\n")).unwrap();
    Hook::read(&file, Some(dir.join("records"))).unwrap()
}

async fn inspect(script: &str, more: &str) -> Error {
    let dir = tempfile::tempdir().unwrap();
    inspecting(dir.path(), script, more).inspect(&web()).await.unwrap_err()
}

#[tokio::test]
async fn what_the_inspect_command_says_is_told_apart() {
    assert!(matches!(inspect("exit 0", "").await, Error::NoSuchContainer { .. }));
    let nobody = "echo '{\"cgroup\": \"/lazy-migrate-test-nobody\"}'";
    assert!(matches!(inspect(nobody, "").await, Error::NoSuchContainer { .. } | Error::Cgroup { .. }));
    for (script, word) in [
        ("echo no such thing", "cannot be understood"),
        ("echo '{\"pids\": 1}'", "unknown field `pids`"),
        ("echo '{}'", "neither a cgroup nor a pid"),
        ("echo '{\"cgroup\": \"/../up\"}'", "outside of what this host can see"),
        (
            "echo first; echo of \"$0\" >&2; echo broken >&2; exit 3",
            "cannot inspect container web: /bin/sh failed (exit status: 3): of web; broken",
        ),
    ] {
        let text = inspect(script, "").await.to_string();
        assert!(text.contains(word) && !text.contains('\n'), "{text:?} says nothing of {word:?}");
    }
}

#[tokio::test]
async fn a_command_that_hangs_is_ended_with_all_it_started() {
    let dir = tempfile::tempdir().unwrap();
    let pid = dir.path().join("pid");
    // Its child is nobody's before the limit strikes, and still of its group.
    let script = format!("(sleep 600 & echo $! >{0}.new; mv {0}.new {0}); sleep 600", pid.display());
    let hook = inspecting(dir.path(), &script, "inspect.limit = \"1s\"");
    let error = hook.inspect(&web()).await.unwrap_err();
    assert!(matches!(&error, Error::TimedOut { limit, .. } if *limit == Duration::from_secs(1)), "{error}");
    let orphan = std::fs::read_to_string(&pid).unwrap();
    let stat = format!("/proc/{}/stat", orphan.trim());
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    let lives = || std::fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z "));
    while lives() {
        assert!(std::time::Instant::now() < deadline, "process {orphan} lives on");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn the_probe_is_told_where_to_work_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let scratch = dir.path().join("scratch");
    let script = "[ \"$LAZY_MIGRATE_ACTION$0\" = probe ] && echo x >\"$LAZY_MIGRATE_WORK/file\"";
    let command = |script: &str| format!("probe.command = {}", serde_json::json!(["/bin/sh", "-c", script, "%n"]));
    inspecting(dir.path(), "", &command(script)).probe(scratch.clone()).await.unwrap();
    assert_eq!(std::fs::read_dir(&scratch).unwrap().count(), 0);
    let bad = inspecting(dir.path(), "", &command("echo no criu here >&2; exit 1")).probe(scratch.clone()).await;
    let text = bad.unwrap_err().to_string();
    assert!(text.contains("try whether checkpoints work") && text.ends_with("no criu here"), "{text}");
    assert_eq!(std::fs::read_dir(&scratch).unwrap().count(), 0);
}

#[tokio::test]
async fn the_file_stands_for_a_bundle() {
    let dir = tempfile::tempdir().unwrap();
    let hook = inspecting(dir.path(), "", "netns = \"/run/netns/c-%n\"");
    let bundle = hook.bundle(&web(), None).await;
    // A key after a table's dotted ones is still the file's own.
    let bundle = bundle.unwrap();
    assert_eq!(bundle.rootfs(), Path::new("/srv/web"));
    assert_eq!(bundle.netns().as_deref(), Some(Path::new("/run/netns/c-web")));
    bundle.check_rootfs_below(Path::new("/srv")).unwrap();
}

#[tokio::test]
async fn memory_is_not_copied_in_rounds_and_that_is_known_before_anything_is_begun() {
    let dir = tempfile::tempdir().unwrap();
    let hook = inspecting(dir.path(), "exit 0", "");
    let text = hook.can_pre_dump().await.unwrap_err().to_string();
    assert!(text.contains("without --memory precopy") && !text.contains('\n'), "{text}");
    let images = dir.path().join("images");
    let refused = hook.pre_dump(&web(), images.clone(), dir.path().join("work"), CheckpointOptions::default()).await;
    assert!(matches!(refused, Err(Error::NoPreDump)), "{refused:?}");
    assert!(!images.exists());
}
