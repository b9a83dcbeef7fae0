//! Podman's configuration on this host, as one file that names another OCI runtime.
//!
//! The file that podman is given by `CONTAINERS_CONF` stands for all others, so it has to say what they say.

use std::{
    io,
    path::{Path, PathBuf},
};

use toml::{Table, Value};

use crate::container::Error;

/// Where podman looks when nothing else is said, in its order: what comes later counts more.
const FILES: [&str; 2] = ["/usr/share/containers/containers.conf", "/etc/containers/containers.conf"];
/// And then each `*.conf` in here, by name.
const PARTS: &str = "/etc/containers/containers.conf.d";
/// The largest file that is read, in bytes.
const FILE_LIMIT: u64 = 1 << 20;

/// All that the files say.
#[derive(Clone, Debug, Default)]
pub(super) struct Settings(Table);

impl Settings {
    /// Reads them as podman would, which a `CONTAINERS_CONF` in this process's environment changes.
    pub(super) fn read() -> Result<Self, Error> {
        let files = match std::env::var_os("CONTAINERS_CONF") {
            Some(file) => vec![PathBuf::from(file)],
            None => FILES.iter().map(PathBuf::from).chain(parts(Path::new(PARTS))?).collect(),
        };
        Self::of_files(&files)
    }

    fn of_files(files: &[PathBuf]) -> Result<Self, Error> {
        let mut all = Table::new();
        for file in files {
            match std::fs::metadata(file) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Ok(metadata) if metadata.len() > FILE_LIMIT => {
                    return Err(Error::io("read", file)(io::Error::other("it is too large for a containers.conf")));
                }
                _ => {}
            }
            let text = std::fs::read_to_string(file).map_err(Error::io("read", file))?;
            let table = text.parse::<Table>();
            merge(&mut all, table.map_err(|error| Error::io("understand", file)(io::Error::other(one_line(&error))))?);
        }
        Ok(Self(all))
    }

    /// The program that podman means by an OCI runtime's name.
    pub(super) fn oci_runtime(&self, name: &str) -> PathBuf {
        let paths = self.0.get("engine").and_then(|engine| engine.get("runtimes")?.get(name)?.as_array());
        let mut paths = paths.into_iter().flatten().filter_map(Value::as_str).map(PathBuf::from);
        // Without one, PATH is looked through, or it is a path itself.
        paths.find(|path| path.exists()).unwrap_or_else(|| name.into())
    }

    /// The same, but that an OCI runtime's name means this program; as a file's text.
    pub(super) fn with_oci_runtime(mut self, name: &str, program: &Path) -> String {
        let program = Value::Array(vec![Value::String(program.display().to_string())]);
        let runtimes = Table::from_iter([(name.to_owned(), program)]);
        let engine = Table::from_iter([("runtimes".to_owned(), Value::Table(runtimes))]);
        merge(&mut self.0, Table::from_iter([("engine".to_owned(), Value::Table(engine))]));
        self.0.to_string()
    }
}

/// The files that stand in the directory, by name.
fn parts(directory: &Path) -> Result<Vec<PathBuf>, Error> {
    let entries = match std::fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(Error::io("read", directory))?,
    };
    let files = entries.flatten().map(|entry| entry.path());
    let mut files: Vec<_> = files.filter(|path| path.extension().is_some_and(|kind| kind == "conf")).collect();
    files.sort();
    Ok(files)
}

/// What `over` says counts; tables are joined.
fn merge(under: &mut Table, over: Table) {
    for (key, value) in over {
        match (under.get_mut(&key), value) {
            (Some(Value::Table(below)), Value::Table(above)) => merge(below, above),
            (_, value) => {
                under.insert(key, value);
            }
        }
    }
}

fn one_line(error: &toml::de::Error) -> String {
    error.message().replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_files_are_one_and_the_later_counts() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let first = file(
            "first",
            "[containers]\ndefault_ulimits = [\"nofile=1:1\"]\n[engine]\nruntime = \"crun\"\nretry = 3\n\
             [engine.runtimes]\nrunc = [\"/nonexistent/runc\", \"/bin/sh\"]\n",
        );
        let second = file("second", "[engine]\nruntime = \"runc\"\nodd = \"a\\\"b\\\\c\\n\\u007f\"\nflag = true\n");
        let missing = dir.path().join("none");
        let settings = Settings::of_files(&[first, missing, second.clone()]).unwrap();
        assert_eq!(settings.oci_runtime("runc"), Path::new("/bin/sh"), "the first that is there");
        assert_eq!(settings.oci_runtime("crun"), Path::new("crun"));
        assert_eq!(settings.oci_runtime("/usr/sbin/runc"), Path::new("/usr/sbin/runc"));
        let text = settings.with_oci_runtime("/usr/sbin/runc", Path::new("/state/a b/runtime"));
        let read: Table = text.parse().unwrap();
        let engine = read["engine"].as_table().unwrap();
        assert_eq!((engine["runtime"].as_str(), engine["retry"].as_integer()), (Some("runc"), Some(3)));
        assert_eq!((engine["odd"].as_str(), engine["flag"].as_bool()), (Some("a\"b\\c\n\u{7f}"), Some(true)));
        assert_eq!(engine["runtimes"]["/usr/sbin/runc"][0].as_str(), Some("/state/a b/runtime"));
        assert_eq!(engine["runtimes"]["runc"][1].as_str(), Some("/bin/sh"), "others are as they were");
        assert_eq!(read["containers"]["default_ulimits"][0].as_str(), Some("nofile=1:1"));
        std::fs::write(&second, "[engine\n").unwrap();
        let error = Settings::of_files(&[second]).unwrap_err().to_string();
        assert!(error.starts_with("cannot understand") && !error.contains('\n'), "{error}");
    }

    #[test]
    fn parts_are_read_by_name() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["20-b.conf", "10-a.conf", "readme"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let names: Vec<_> = parts(dir.path()).unwrap();
        assert_eq!(names, [dir.path().join("10-a.conf"), dir.path().join("20-b.conf")]);
        assert!(parts(Path::new("/nonexistent")).unwrap().is_empty());
    }
}
