//! Bundles: the `config.json` that the operator of the destination made, and the derived one that a restore runs from.
//!
//! Only what a restore depends on is read; everything else is carried over as it is. No part of it comes over the link.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::{Cgroup, Error, absolute, private_dir};

/// The largest `config.json` that is read, in bytes.
const CONFIG_LIMIT: u64 = 4 << 20;
/// The annotation of a derived bundle that names the operator's one.
const MADE_FROM: &str = "lazy-migrate.bundle";

/// An operator's bundle, read and checked.
#[derive(Clone, Debug)]
pub struct Bundle {
    dir: PathBuf,
    config: Map<String, Value>,
    rootfs: PathBuf,
}

impl Bundle {
    /// Reads `dir/config.json`.
    pub fn read(dir: &Path) -> Result<Self, Error> {
        let dir = absolute(dir)?;
        let bad = |why: String| Error::Bundle { bundle: dir.clone(), why };
        let file = dir.join("config.json");
        let size = std::fs::metadata(&file)
            .map_err(|e| bad(format!("cannot read its config.json: {e}; make one with `runc spec`")))?
            .len();
        if size > CONFIG_LIMIT {
            return Err(bad(format!("its config.json has {size} bytes, more than {CONFIG_LIMIT}")));
        }
        let text = std::fs::read(&file).map_err(Error::io("read", &file))?;
        let config: Map<String, Value> = serde_json::from_slice(&text)
            .map_err(|e| bad(format!("its config.json is not a JSON object that can be read: {e}")))?;
        let root = config.get("root").and_then(|r| r["path"].as_str()).filter(|p| !p.is_empty());
        let root = root.ok_or_else(|| bad("its config.json has no root.path".to_owned()))?;
        if config.get("process").is_some_and(|p| p["terminal"] == true) {
            return Err(bad(
                "process.terminal is true, but a container that was moved has no terminal: set it to false \
                            here and on the source"
                    .to_owned(),
            ));
        }
        let rootfs = dir.join(root);
        Ok(Self { dir, config, rootfs })
    }

    /// What stands for a bundle where there is none: a root and a network, which `source` names.
    pub(crate) fn described(source: &Path, rootfs: &Path, netns: Option<&Path>) -> Self {
        let namespaces: Vec<Value> = netns.iter().map(|path| json!({"type": "network", "path": path})).collect();
        let mut config = Map::new();
        set(&mut config, "linux", "namespaces", json!(namespaces));
        Self { dir: source.to_owned(), config, rootfs: rootfs.to_owned() }
    }

    /// The operator's bundle of a container that was restored from a derived one, which does not outlive the container;
    /// otherwise `dir` itself.
    pub fn origin(dir: &Path) -> PathBuf {
        let derived = Self::read(dir).ok();
        let origin = derived.as_ref().and_then(|bundle| bundle.config.get("annotations")?[MADE_FROM].as_str());
        origin.map_or_else(|| dir.to_owned(), PathBuf::from)
    }

    /// The directory of the `config.json`.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The root directory, absolute; it need not exist yet, since its device may not be mounted.
    pub fn rootfs(&self) -> &Path {
        &self.rootfs
    }

    /// The path of the network namespace that the container joins, if the bundle names one.
    pub fn netns(&self) -> Option<PathBuf> {
        let list = self.config.get("linux")?["namespaces"].as_array()?;
        let entry = list.iter().find(|n| n["type"] == "network")?;
        entry["path"].as_str().filter(|p| !p.is_empty()).map(PathBuf::from)
    }

    /// Whether the container has a network apart from the host's.
    pub fn has_own_network(&self) -> bool {
        let list = self.config.get("linux").and_then(|l| l["namespaces"].as_array());
        list.is_some_and(|list| list.iter().any(|n| n["type"] == "network"))
    }

    /// The control group that the bundle asks for, if any.
    pub fn cgroups_path(&self) -> Option<&str> {
        self.config.get("linux")?["cgroupsPath"].as_str().filter(|p| !p.is_empty())
    }

    /// Checks, before the move, that the root directory will be on the file system that is mounted at `mount_dir`.
    pub fn check_rootfs_below(&self, mount_dir: &Path) -> Result<(), Error> {
        let mount_dir = absolute(mount_dir)?;
        let climbs = self.rootfs.components().any(|c| c == std::path::Component::ParentDir);
        if !climbs && self.rootfs.starts_with(&mount_dir) {
            return Ok(());
        }
        Err(self.bad(format!(
            "its root.path is {}, which is not below {}, where the moved disk gets mounted: change one of them",
            self.rootfs.display(),
            mount_dir.display()
        )))
    }

    /// Checks, once the disk is mounted, that the root directory is there and that no link leads out of `mount_dir`.
    pub fn check_rootfs_present(&self, mount_dir: &Path) -> Result<(), Error> {
        let resolve = |path: &Path| path.canonicalize().map_err(Error::io("find", path));
        let (root, mount) = (resolve(&self.rootfs)?, resolve(mount_dir)?);
        if root.is_dir() && root.starts_with(&mount) {
            return Ok(());
        }
        Err(self.bad(format!("its root {} is not a directory on the disk at {}", root.display(), mount.display())))
    }

    /// Writes the bundle that a restore runs from to `dir`: the operator's one, with its relative paths made absolute,
    /// in the control group `cgroup`, and with a criu configuration. criu would otherwise put the tasks into the group
    /// that they had on the source, which hangs when that group exists here.
    pub(crate) fn derive(&self, dir: &Path, cgroup: &Cgroup, tcp_established: bool) -> Result<(), Error> {
        private_dir(dir)?;
        let criu_conf = dir.join("criu.conf");
        let mut config = self.config.clone();
        set(&mut config, "root", "path", json!(self.rootfs));
        for mount in config.get_mut("mounts").and_then(Value::as_array_mut).into_iter().flatten() {
            let options = mount["options"].as_array();
            let bind =
                mount["type"] == "bind" || options.is_some_and(|o| o.iter().any(|o| o == "bind" || o == "rbind"));
            if let (true, Some(source)) = (bind, mount["source"].as_str()) {
                mount["source"] = json!(self.dir.join(source));
            }
        }
        // runc's own view must be the same group, or it pauses and limits an empty one.
        set(&mut config, "linux", "cgroupsPath", json!(cgroup.path()));
        set(&mut config, "annotations", "org.criu.config", json!(criu_conf));
        set(&mut config, "annotations", MADE_FROM, json!(self.dir));
        let mut conf = format!("cgroup-root {}\n", cgroup.path());
        if tcp_established {
            conf.push_str("tcp-established\n");
        }
        std::fs::write(&criu_conf, conf).map_err(Error::io("write", &criu_conf))?;
        let file = dir.join("config.json");
        std::fs::write(&file, Value::Object(config).to_string()).map_err(Error::io("write", &file))
    }

    fn bad(&self, why: String) -> Error {
        Error::Bundle { bundle: self.dir.clone(), why }
    }
}

/// Sets `config[section][key]`; the section is made when it is missing or not an object.
fn set(config: &mut Map<String, Value>, section: &str, key: &str, value: Value) {
    let mut inner = match config.remove(section) {
        Some(Value::Object(inner)) => inner,
        _ => Map::new(),
    };
    inner.insert(key.to_owned(), value);
    config.insert(section.to_owned(), Value::Object(inner));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle(config: Value) -> (tempfile::TempDir, Result<Bundle, Error>) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let bundle = Bundle::read(dir.path());
        (dir, bundle)
    }

    #[test]
    fn the_parts_that_matter_are_read() {
        let config = json!({"root": {"path": "/srv/d/rootfs"}, "linux": {"cgroupsPath": "/web",
            "namespaces": [{"type": "pid"}, {"type": "network", "path": "/run/netns/web"}]}});
        let (_dir, bundle) = bundle(config);
        let bundle = bundle.unwrap();
        assert_eq!(bundle.rootfs(), Path::new("/srv/d/rootfs"));
        assert_eq!(bundle.netns(), Some(PathBuf::from("/run/netns/web")));
        assert_eq!(bundle.cgroups_path(), Some("/web"));
        assert!(bundle.has_own_network());
        bundle.check_rootfs_below(Path::new("/srv/d")).unwrap();
        assert!(bundle.check_rootfs_below(Path::new("/srv/e")).is_err());
        assert!(bundle.check_rootfs_below(Path::new("/srv/d/rootfs/below")).is_err());
    }

    #[test]
    fn a_root_that_climbs_or_links_out_of_the_disk_is_refused() {
        let (_dir, climbing) = bundle(json!({"root": {"path": "/srv/d/../../etc"}}));
        assert!(climbing.unwrap().check_rootfs_below(Path::new("/srv/d")).is_err());
        let disk = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/etc", disk.path().join("rootfs")).unwrap();
        let (_dir, linked) = bundle(json!({"root": {"path": disk.path().join("rootfs")}}));
        let linked = linked.unwrap();
        linked.check_rootfs_below(disk.path()).unwrap();
        assert!(linked.check_rootfs_present(disk.path()).is_err());
    }

    #[test]
    fn what_cannot_be_restored_is_refused_with_a_reason() {
        let text = Bundle::read(Path::new("/nonexistent")).unwrap_err().to_string();
        assert!(text.starts_with("bundle /nonexistent: cannot read its config.json"), "{text}");
        for (config, word) in [
            (json!({"root": {"path": "r"}, "process": {"terminal": true}}), "terminal"),
            (json!({"process": {}}), "root.path"),
            (json!([1]), "JSON object"),
        ] {
            let text = bundle(config).1.unwrap_err().to_string();
            assert!(text.contains(word) && !text.contains('\n'), "{text}");
        }
    }

    #[test]
    fn the_derived_bundle_differs_only_where_it_must() {
        let (dir, bundle) = bundle(json!({
            "root": {"path": "rootfs", "readonly": true}, "hostname": "web", "annotations": {"mine": "1"},
            "mounts": [{"destination": "/p", "type": "proc", "source": "proc"},
                {"destination": "/d", "type": "none", "options": ["rbind"], "source": "data"},
                {"destination": "/e", "type": "bind", "source": "/abs"}],
            "linux": {"cgroupsPath": "/old", "resources": {"pids": {"limit": 9}}}}));
        let out = tempfile::tempdir().unwrap();
        let derived = out.path().join("b");
        let cgroup = Cgroup::at("/lm/web").unwrap();
        bundle.unwrap().derive(&derived, &cgroup, true).unwrap();
        let config: Value = serde_json::from_slice(&std::fs::read(derived.join("config.json")).unwrap()).unwrap();
        assert_eq!(config["root"], json!({"path": dir.path().join("rootfs"), "readonly": true}));
        assert_eq!((&config["hostname"], &config["annotations"]["mine"]), (&json!("web"), &json!("1")));
        assert_eq!(config["annotations"]["org.criu.config"], json!(derived.join("criu.conf")));
        let origins = [&derived, dir.path()].map(Bundle::origin);
        assert_eq!(origins, [dir.path(), dir.path()]);
        assert_eq!(config["linux"], json!({"cgroupsPath": "/lm/web", "resources": {"pids": {"limit": 9}}}));
        let sources: Vec<_> = config["mounts"].as_array().unwrap().iter().map(|m| m["source"].clone()).collect();
        assert_eq!(sources, [json!("proc"), json!(dir.path().join("data")), json!("/abs")]);
        let conf = std::fs::read_to_string(derived.join("criu.conf")).unwrap();
        assert_eq!(conf, "cgroup-root /lm/web\ntcp-established\n");
    }
}
