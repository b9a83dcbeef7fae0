//! What podman says of a container, and whether such a container can move at all.

use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

use crate::container::{ContainerId, Error, OciKind};

/// The networks of podman that are there before the container is, and after it: only those can be closed in time.
const NETWORK_HELP: &str = "podman makes it anew at each start, so that its packets cannot be dropped before; make the network namespace \
                            yourself, and create the container with --network ns:/run/netns/NAME (or none)";

/// One container, as `podman container inspect` prints it: the part that counts here.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Described {
    /// Podman's own id of it, which is its id for the OCI runtime as well.
    id: String,
    name: String,
    pub state: State,
    /// The OCI runtime: a name that podman's configuration explains, or a path.
    #[serde(rename = "OCIRuntime")]
    pub oci_runtime: String,
    /// The directory that is its root, where that is not made from an image.
    #[serde(default)]
    rootfs: String,
    #[serde(default)]
    mounts: Option<Vec<Mount>>,
    /// Podman's directory for it.
    #[serde(default)]
    static_dir: PathBuf,
    #[serde(default)]
    conmon_pid_file: PathBuf,
    #[serde(default)]
    pod: String,
    host_config: HostConfig,
    config: Config,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct State {
    /// `created`, `running`, `exited` and so on.
    pub status: String,
    pid: u32,
    #[serde(default)]
    conmon_pid: u32,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Mount {
    #[serde(rename = "Type")]
    kind: String,
    #[serde(default)]
    source: PathBuf,
    destination: PathBuf,
    #[serde(rename = "RW")]
    writable: bool,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HostConfig {
    #[serde(default)]
    network_mode: String,
    restart_policy: RestartPolicy,
    #[serde(default)]
    readonly_rootfs: bool,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct RestartPolicy {
    name: String,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Config {
    #[serde(default)]
    tty: bool,
}

impl Described {
    /// Reads what podman printed when it was asked for `id`. `None`: it spoke of another, whose id only begins like that.
    pub(super) fn read(text: &str, id: &ContainerId) -> Result<Option<Self>, String> {
        let list: Vec<Self> = serde_json::from_str(text).map_err(|error| error.to_string())?;
        let found = list.into_iter().find(|one| one.name == id.as_str() || one.id == id.as_str());
        if let Some(found) = &found
            && found.full_id().is_err()
        {
            return Err(format!("{:?} is no container's id", found.id));
        }
        Ok(found)
    }

    /// Its id for the OCI runtime.
    pub(super) fn full_id(&self) -> Result<ContainerId, Error> {
        ContainerId::new(self.id.clone())
    }

    /// Its first process, while podman takes it for live.
    pub(super) fn pid(&self) -> Option<u32> {
        let live = matches!(self.state.status.as_str(), "initialized" | "running" | "paused" | "stopping");
        (live && self.state.pid != 0).then_some(self.state.pid)
    }

    /// The process of podman's that is its parent.
    pub(super) fn conmon(&self) -> Option<u32> {
        let written = || std::fs::read_to_string(&self.conmon_pid_file).ok()?.trim().parse().ok();
        Some(self.state.conmon_pid).filter(|&pid| pid != 0).or_else(written)
    }

    /// Which of the programs that can checkpoint its OCI runtime is, if it is one.
    pub(super) fn oci_kind(&self) -> Option<OciKind> {
        match Path::new(&self.oci_runtime).file_name()?.to_str()? {
            "runc" => Some(OciKind::Runc),
            "crun" => Some(OciKind::Crun),
            _ => None,
        }
    }

    /// Its root, where it is a directory of the operator's.
    pub(super) fn own_root(&self) -> Option<&Path> {
        (!self.rootfs.is_empty()).then(|| Path::new(&self.rootfs))
    }

    /// Whether what it writes to its root is in a layer of podman's.
    pub(super) fn has_writable_layer(&self) -> bool {
        self.rootfs.is_empty() && !self.host_config.readonly_rootfs
    }

    /// Where its mounts are, within it.
    pub(super) fn destinations(&self) -> impl Iterator<Item = &Path> {
        self.mounts.iter().flatten().map(|mount| mount.destination.as_path())
    }

    /// Where podman keeps the content of its `/dev/shm`.
    pub(super) fn shm(&self) -> PathBuf {
        self.static_dir.join("shm")
    }

    /// The deepest directory of the host that holds everything that the container may write (but for what it has in memory,
    /// and its layer); it must be on the disk that moves.
    pub(super) fn writable(&self) -> PathBuf {
        let root = self.own_root().filter(|_| !self.host_config.readonly_rootfs);
        let binds = self.mounts.iter().flatten().filter(|mount| mount.writable && mount.kind != "tmpfs");
        let mut places = binds.map(|mount| mount.source.as_path()).chain(root);
        // One that writes nothing has its root looked at instead: it may be there to be moved.
        let Some(first) = places.next() else { return self.own_root().unwrap_or(Path::new("/")).to_owned() };
        places.fold(first.to_owned(), |common, place| common_ancestor(&common, place))
    }

    /// The network namespace that the operator made for it.
    pub(super) fn netns(&self) -> Option<PathBuf> {
        self.host_config.network_mode.strip_prefix("ns:").map(PathBuf::from)
    }

    /// Why it cannot move, and what to do about it.
    pub(super) fn obstacle(&self) -> Option<String> {
        let policy = &self.host_config.restart_policy.name;
        if !policy.is_empty() && policy != "no" {
            return Some(format!(
                "its restart policy is {policy}: podman would start it on a host that does not own it any more, or not \
                 yet; create it with --restart no"
            ));
        }
        if self.oci_kind().is_none() {
            return Some(format!("its OCI runtime is {}; create it with podman --runtime runc", self.oci_runtime));
        }
        if !self.pod.is_empty() {
            return Some(
                "it is in a pod, and shares namespaces with containers that do not move; create it outside".to_owned(),
            );
        }
        if self.config.tty {
            return Some("it has a terminal, and one that was moved has none; create it without --tty".to_owned());
        }
        match self.host_config.network_mode.as_str() {
            "none" | "host" => None,
            named if named.starts_with("ns:/") => None,
            other => Some(format!("its network is {other:?}: {NETWORK_HELP}")),
        }
    }
}

fn common_ancestor(one: &Path, other: &Path) -> PathBuf {
    let same = one.components().zip(other.components()).take_while(|(one, other)| one == other);
    same.map(|(component, _): (Component<'_>, _)| component).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What podman 4.3.1 prints, cut down to some of what is read and some of what is not.
    fn printed(change: impl Fn(&mut serde_json::Value)) -> String {
        let text = include_str!("fixtures/inspect.json");
        let mut value: serde_json::Value = serde_json::from_str(text).unwrap();
        change(&mut value[0]);
        value.to_string()
    }

    fn described(change: impl Fn(&mut serde_json::Value)) -> Described {
        Described::read(&printed(change), &ContainerId::new("web").unwrap()).unwrap().unwrap()
    }

    #[test]
    fn a_running_container_is_understood() {
        let web = described(|_| ());
        assert_eq!(web.full_id().unwrap().as_str(), "31b45baf00931ae2123841fba9cffe1e43971c01747a952dab801f1c66bd40ff");
        assert_eq!((web.pid(), web.conmon(), web.oci_kind()), (Some(200), Some(189), Some(OciKind::Runc)));
        assert_eq!((web.netns(), web.obstacle()), (Some("/run/netns/ca".into()), None));
        assert_eq!((web.writable(), web.has_writable_layer()), ("/scratch/a/mnt/rootfs".into(), false));
        assert!(web.shm().ends_with("userdata/shm"));
    }

    #[test]
    fn one_whose_id_only_begins_like_the_name_is_another() {
        let ask = |id: &str| Described::read(&printed(|_| ()), &ContainerId::new(id).unwrap()).unwrap();
        assert!(ask("31b45").is_none() && ask("we").is_none());
        assert!(ask("31b45baf00931ae2123841fba9cffe1e43971c01747a952dab801f1c66bd40ff").is_some());
        let bad = printed(|one| one["Id"] = "../up".into());
        assert!(Described::read(&bad, &ContainerId::new("web").unwrap()).is_err());
    }

    #[test]
    fn one_that_does_not_run_has_no_process() {
        for status in ["created", "exited", "stopped", "removing"] {
            assert_eq!(described(|one| one["State"]["Status"] = status.into()).pid(), None);
        }
    }

    #[test]
    fn what_it_may_write_has_to_have_one_place() {
        let bind = |source: &str, rw: bool| serde_json::json!({"Type": "bind", "Source": source, "Destination": "/d", "RW": rw, "Options": ["rbind"]});
        let binds = |list: &[(&str, bool)]| {
            let mounts: Vec<_> = list.iter().map(|(source, rw)| bind(source, *rw)).collect();
            described(|one| (one["Rootfs"], one["Mounts"]) = ("".into(), mounts.clone().into())).writable()
        };
        assert_eq!(binds(&[("/mnt/web/data", true), ("/etc/ssl", false)]), Path::new("/mnt/web/data"));
        assert_eq!(binds(&[("/mnt/web/data", true), ("/mnt/web/log", true)]), Path::new("/mnt/web"));
        assert_eq!(binds(&[("/mnt/web/data", true), ("/mnt/website", true)]), Path::new("/mnt"));
        assert_eq!(binds(&[("/mnt/web", true), ("/srv", true)]), Path::new("/"));
        assert_eq!(binds(&[]), Path::new("/"));
        assert!(described(|one| one["Rootfs"] = "".into()).has_writable_layer());
    }

    #[test]
    fn what_cannot_move_is_told_with_what_to_do() {
        type Change = fn(&mut serde_json::Value);
        for (change, word) in [
            ((|one| one["HostConfig"]["RestartPolicy"]["Name"] = "always".into()) as Change, "--restart no"),
            (|one| one["HostConfig"]["NetworkMode"] = "bridge".into(), "--network ns:"),
            (|one| one["HostConfig"]["NetworkMode"] = "container:abc".into(), "--network ns:"),
            (|one| one["OCIRuntime"] = "/usr/bin/kata".into(), "--runtime runc"),
            (|one| one["Pod"] = "abc".into(), "in a pod"),
            (|one| one["Config"]["Tty"] = true.into(), "without --tty"),
        ] {
            let why = described(change).obstacle().expect(word);
            assert!(why.contains(word) && !why.contains('\n'), "{why}");
        }
        for fine in ["none", "host"] {
            assert_eq!(described(|one| one["HostConfig"]["NetworkMode"] = fine.into()).obstacle(), None);
        }
        assert_eq!(described(|one| one["HostConfig"]["RestartPolicy"]["Name"] = "no".into()).obstacle(), None);
    }
}
