//! Podman as a shell script that prints what podman printed, and writes down how it was called. The real one is moved in the
//! guest.

use std::os::unix::fs::PermissionsExt;

use super::*;

struct Lab {
    dir: tempfile::TempDir,
    podman: Podman,
}

impl Lab {
    /// The one container of this podman is as in the fixture, but for its status.
    fn new(status: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().display().to_string();
        let printed = include_str!("fixtures/inspect.json")
            .replace("\"running\"", &format!("\"{status}\""))
            .replace("/usr/sbin/runc", &format!("{at}/runc"));
        std::fs::write(dir.path().join("printed"), printed).unwrap();
        let script = |name: &str, text: String| {
            let path = dir.path().join(name);
            std::fs::write(&path, format!("#!/bin/sh\necho \"{name} $*\" >>{at}/calls\n{text}")).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
            path
        };
        let unknown = "echo \"Error: inspecting object: no such container $3\" >&2; exit 125";
        let podman = script(
            "podman",
            format!(
                "case \"$1 $2 $3\" in 'container inspect web') cat {at}/printed ;; 'container inspect '*) {unknown} ;; esac"
            ),
        );
        script("runc", "case $1 in state) echo 'container does not exist' >&2; exit 1 ;; esac".to_owned());
        Self { podman: Podman::new(podman), dir }
    }

    fn calls(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("calls")).unwrap_or_default()
    }
}

fn id(name: &str) -> ContainerId {
    ContainerId::new(name).unwrap()
}

#[tokio::test]
async fn one_that_was_only_created_is_a_bundle_and_stays_when_a_container_is_ended() {
    let lab = Lab::new("created");
    let error = lab.podman.inspect(&id("web")).await.unwrap_err();
    assert!(matches!(error, Error::NoSuchContainer { .. }) && error.to_string().contains("created"), "{error}");
    let bundle = lab.podman.bundle(&id("web"), None).await.unwrap();
    assert_eq!(bundle.rootfs(), Path::new("/scratch/a/mnt/rootfs"));
    assert_eq!(bundle.netns().as_deref(), Some(Path::new("/run/netns/ca")));
    bundle.check_rootfs_below(Path::new("/scratch/a/mnt")).unwrap();
    lab.podman.kill_and_delete(&id("web")).await.unwrap();
    assert!(!lab.calls().contains("podman rm") && !lab.calls().contains("podman stop"), "{}", lab.calls());
}

#[tokio::test]
async fn one_that_is_not_there_is_to_be_created_and_is_gone_already() {
    let lab = Lab::new("running");
    let other = id("other");
    assert!(matches!(lab.podman.inspect(&other).await, Err(Error::NoSuchContainer { .. })));
    let told = lab.podman.bundle(&other, None).await.unwrap_err().to_string();
    assert!(told.contains("podman create --name other"), "{told}");
    lab.podman.kill_and_delete(&other).await.unwrap();
    lab.podman.release(&other).await.unwrap();
    assert!(!lab.calls().contains("runc"), "{}", lab.calls());
}

#[tokio::test]
async fn a_release_takes_the_record_too() {
    let lab = Lab::new("exited");
    lab.podman.release(&id("web")).await.unwrap();
    let full = "31b45baf00931ae2123841fba9cffe1e43971c01747a952dab801f1c66bd40ff";
    assert!(lab.calls().contains(&format!("podman rm --force --time 0 {full}\n")), "{}", lab.calls());
}

#[tokio::test]
async fn a_podman_that_goes_its_own_way_is_found_out_before_anything_runs() {
    let lab = Lab::new("created");
    let images = lab.dir.path().join("images");
    std::fs::create_dir(&images).unwrap();
    let spec = RestoreSpec {
        bundle: lab.podman.bundle(&id("web"), None).await.unwrap(),
        image_dir: Some(images),
        work_dir: lab.dir.path().join("work"),
        state_dir: lab.dir.path().join("state"),
        cgroup: Cgroup::at("/lazy-migrate-test-podman-none").unwrap(),
        tcp_established: false,
        limit: QUICK,
    };
    let found = lab.podman.movable(&id("web")).await.unwrap();
    let (oci, desk) = (lab.podman.oci(&found).unwrap(), Desk::at(&lab.dir.path().join("desk")));
    // Its `init` is content, and has asked no OCI runtime.
    let error = lab.podman.start(&id("web"), &found, &oci, &spec, &desk).await.unwrap_err();
    assert!(error.to_string().contains("did not use the OCI runtime") && error.may_have_run(), "{error}");
    let calls = lab.calls();
    assert!(calls.contains("podman init") && !calls.contains("podman start"), "{calls}");
}

#[test]
fn a_root_is_known_by_what_is_mounted_there() {
    let mounts =
        "60 38 254:16 /rootfs / rw,relatime master:1 - ext4 /dev/nbd0 rw\n61 60 0:5 / /proc rw - proc proc rw\n";
    assert_eq!(root_type(mounts), Some("ext4"));
    let over = "60 38 0:44 / / rw - overlay overlay rw,lowerdir=/mnt/web/rootfs,upperdir=/u,workdir=/w\n";
    assert_eq!((root_type(over), root_type("")), (Some("overlay"), None));
}
