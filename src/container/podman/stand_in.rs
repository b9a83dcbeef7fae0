//! What podman runs in the place of the OCI runtime, for one start of one container: where it wants the container made, it
//! gets it restored instead, in the control group that the node chose.
//!
//! Podman does all that it does at any start (monitor, network, mounts, records), from its own configuration of the
//! container, which this host's operator made. Only the last step is another. A small script goes between, so that all
//! other calls (and those after the node has gone) reach the OCI runtime as they are.

use std::{
    ffi::{OsStr, OsString},
    io::Write,
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    process::Command,
};

use serde::{Deserialize, Serialize};

use super::settings::Settings;
use crate::container::{Bundle, Cgroup, Error, private_dir};
use crate::error::{Failure, Outcome, chain};

/// What is to be done once instead of the start.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Order {
    /// The real OCI runtime.
    pub runtime: PathBuf,
    /// The complete images; without them the container is made anew, but in its group.
    pub images: Option<PathBuf>,
    /// For criu's log.
    pub work: PathBuf,
    /// The container's control group.
    pub cgroup: String,
    /// As it was at the dump.
    pub tcp_established: bool,
}

/// The directory with all that belongs to one order.
#[derive(Debug)]
pub(super) struct Desk(PathBuf);

impl Desk {
    /// At that place, which need not exist.
    pub(super) fn at(directory: &Path) -> Self {
        Self(directory.to_owned())
    }

    /// Podman's configuration for this start.
    pub(super) fn settings(&self) -> PathBuf {
        self.0.join("containers.conf")
    }

    fn order(&self) -> PathBuf {
        self.0.join("order.json")
    }

    /// Holds the number of the process that began to restore. There is no second one: memory is restored once.
    fn begun(&self) -> PathBuf {
        self.0.join("begun")
    }

    /// There when the container was made.
    fn made(&self) -> PathBuf {
        self.0.join("made")
    }

    /// Whether the container was made by the order.
    pub(super) fn is_made(&self) -> bool {
        self.made().exists()
    }

    /// The process that carries the order out, while it does.
    pub(super) fn worker(&self) -> Option<u32> {
        let pid: u32 = std::fs::read_to_string(self.begun()).ok()?.trim().parse().ok()?;
        let words = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        // Its number may be another's by now.
        let own = self.0.as_os_str().as_encoded_bytes();
        words.split(|&byte| byte == 0).any(|word| word == own).then_some(pid)
    }

    /// Puts everything there. `name` is what podman calls the OCI runtime; `state_dir` is where that keeps the container's
    /// state.
    pub(super) fn lay_out(&self, order: &Order, settings: Settings, name: &str, state_dir: &Path) -> Result<(), Error> {
        private_dir(&self.0)?;
        for mark in [self.begun(), self.made()] {
            crate::container::state::remove_old(&mark)?;
        }
        let text = serde_json::to_vec(order).map_err(|e| Error::io("write", self.order())(std::io::Error::other(e)))?;
        write(&self.order(), &text, 0o600)?;
        let program = PathBuf::from(format!("/proc/{}/exe", std::process::id()));
        let script = self.0.join("runtime");
        write(&script, self.script(&order.runtime, &program, state_dir).as_bytes(), 0o700)?;
        write(&self.settings(), settings.with_oci_runtime(name, &script).as_bytes(), 0o600)
    }

    /// Before the OCI runtime deletes anything, what it had mounted in its state directory goes: it would delete through it.
    fn script(&self, runtime: &Path, program: &Path, state_dir: &Path) -> String {
        format!(
            "#!/bin/sh\n\
             # Made by lazy-migrate for one start of one container; it may go when the container has.\n\
             for word; do\n\
             case $word in\n\
             create | start) exec {} in-podman {} -- \"$@\" ;;\n\
             delete) while umount -l {} 2>/dev/null; do :; done; break ;;\n\
             esac\n\
             done\n\
             exec {} \"$@\"\n",
            shell(program),
            shell(&self.0),
            shell(&state_dir.join("criu-root")),
            shell(runtime),
        )
    }
}

/// What podman's monitor asked the OCI runtime for.
#[derive(Debug, PartialEq, Eq)]
struct Asked<'a> {
    /// Options that stand before the command, without those about the control group: that is ours.
    global: Vec<&'a OsStr>,
    command: &'a OsStr,
    bundle: Option<&'a Path>,
    pid_file: Option<&'a Path>,
    /// The container.
    id: &'a OsStr,
}

impl<'a> Asked<'a> {
    fn read(words: &'a [OsString]) -> Option<Self> {
        let at = words.iter().position(|word| word == "create" || word == "start")?;
        let (global, rest) = words.split_at(at);
        let (command, options) = rest.split_first()?;
        let (id, options) = options.split_last()?;
        let value = |name: &str| {
            let at = options.iter().position(|word| word == name)?;
            options.get(at + 1).map(Path::new)
        };
        let global = global.iter().map(OsString::as_os_str).filter(|word| *word != "--systemd-cgroup").collect();
        Some(Self { global, command, bundle: value("--bundle"), pid_file: value("--pid-file"), id })
    }
}

/// Does what the OCI runtime would be asked for by `words`, by the order in `directory`. Its output is the container's own.
pub(crate) fn run(directory: &Path, words: &[OsString]) -> Outcome<()> {
    let desk = Desk::at(directory);
    let asked = Asked::read(words).ok_or_else(|| Failure::usage("neither create nor start was asked for"))?;
    let order = desk.order();
    let order: Order = std::fs::read(&order)
        .map_err(|error| Failure::failed(format!("cannot read {}: {error}", order.display())))
        .and_then(|text| serde_json::from_slice(&text).map_err(Failure::failed))?;
    if asked.command == "create" {
        return desk.make(&order, &asked).map_err(|error| Failure::failed(chain(&error)))?;
    }
    match order.images {
        // It runs already.
        Some(_) if desk.is_made() => Ok(()),
        Some(_) => Err(Failure::failed("it was not restored, so it is not started")),
        None => call(Command::new(&order.runtime).args(words), "start"),
    }
}

impl Desk {
    fn make(&self, order: &Order, asked: &Asked<'_>) -> Result<Outcome<()>, Error> {
        let (Some(bundle), Some(pid_file)) = (asked.bundle, asked.pid_file) else {
            return Ok(Err(Failure::usage("podman names no bundle, or no file for the process's number")));
        };
        // Its memory is of one moment of the disk: whoever asks again gets nothing.
        let begun = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(self.begun());
        let mut begun = begun.map_err(Error::io("restore a second time: there is", self.begun()))?;
        write!(begun, "{}", std::process::id()).map_err(Error::io("write", self.begun()))?;
        Bundle::read(bundle)?.derive(&self.0, &Cgroup::at(&order.cgroup)?, order.tcp_established)?;
        let mut command = Command::new(&order.runtime);
        command.args(&asked.global);
        match &order.images {
            None => command.arg("create"),
            Some(images) => {
                let command = command.args(["restore", "--detach"]).arg("--image-path").arg(images);
                let command = command.arg("--work-path").arg(&order.work);
                if order.tcp_established { command.arg("--tcp-established") } else { command }
            }
        };
        command.arg("--bundle").arg(&self.0).arg("--pid-file").arg(pid_file).arg(asked.id);
        let made = call(&mut command, "make or restore the container");
        if made.is_ok() {
            write(&self.made(), b"", 0o600)?;
        }
        Ok(made)
    }
}

/// Runs the OCI runtime, which has our input and output: the container gets them.
fn call(command: &mut Command, what: &str) -> Outcome<()> {
    let program = command.get_program().to_owned();
    let status = command.status();
    let status = status.map_err(|error| Failure::failed(format!("cannot start {}: {error}", program.display())))?;
    if status.success() {
        return Ok(());
    }
    Err(Failure::failed(format!("{} did not {what} ({status})", program.display())))
}

fn write(path: &Path, content: &[u8], mode: u32) -> Result<(), Error> {
    std::fs::write(path, content).map_err(Error::io("write", path))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(Error::io("set the mode of", path))
}

/// A word for the shell, whatever is in it.
fn shell(word: &Path) -> String {
    format!("'{}'", word.display().to_string().replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<OsString> {
        line.split(' ').map(OsString::from).collect()
    }

    /// As conmon of podman 4.3.1 calls it.
    const CREATE: &str = "--systemd-cgroup --log-format=json --log /run/c/oci-log create --bundle BUNDLE --pid-file /run/c/pidfile 2779dabb";

    #[test]
    fn the_monitors_words_are_understood() {
        let words = words(CREATE);
        let asked = Asked::read(&words).unwrap();
        assert_eq!(asked.global, ["--log-format=json", "--log", "/run/c/oci-log"]);
        assert_eq!((asked.command, asked.id), (OsStr::new("create"), OsStr::new("2779dabb")));
        assert_eq!((asked.bundle, asked.pid_file), (Some(Path::new("BUNDLE")), Some(Path::new("/run/c/pidfile"))));
        assert_eq!(Asked::read(&[OsString::from("delete")]), None);
    }

    /// A desk with an OCI runtime that writes down how it was called.
    fn desk(dir: &Path, images: Option<PathBuf>) -> Desk {
        let runtime = dir.join("runc");
        write(&runtime, format!("#!/bin/sh\necho \"$*\" >>{}\n", dir.join("calls").display()).as_bytes(), 0o700)
            .unwrap();
        let order = Order {
            runtime,
            images,
            work: "/work".into(),
            cgroup: "/lazy-migrate-web-2".into(),
            tcp_established: true,
        };
        let desk = Desk::at(&dir.join("a desk"));
        desk.lay_out(&order, Settings::default(), "runc", &dir.join("state")).unwrap();
        desk
    }

    fn bundle(dir: &Path) -> Vec<OsString> {
        std::fs::write(dir.join("config.json"), r#"{"root": {"path": "/r"}, "linux": {"cgroupsPath": "m:l:x"}}"#)
            .unwrap();
        words(&CREATE.replace("BUNDLE", &dir.display().to_string()))
    }

    #[test]
    fn what_should_be_made_is_restored_once_in_its_group_and_then_not_started() {
        let dir = tempfile::tempdir().unwrap();
        let desk = desk(dir.path(), Some("/images".into()));
        let create = bundle(dir.path());
        assert!(run(&desk.0, &words("start 2779dabb")).is_err(), "it was not restored yet");
        run(&desk.0, &create).unwrap();
        run(&desk.0, &words("start 2779dabb")).unwrap();
        assert!(desk.is_made());
        let again = run(&desk.0, &create).unwrap_err().to_string();
        assert!(again.contains("second time"), "{again}");
        let calls = std::fs::read_to_string(dir.path().join("calls")).unwrap();
        let at = desk.0.display();
        assert_eq!(
            calls,
            format!(
                "--log-format=json --log /run/c/oci-log restore --detach --image-path /images --work-path /work \
                 --tcp-established --bundle {at} --pid-file /run/c/pidfile 2779dabb\n"
            )
        );
        let config = std::fs::read_to_string(desk.0.join("config.json")).unwrap();
        assert!(config.contains(r#""cgroupsPath":"/lazy-migrate-web-2""#), "{config}");
        // Laid out anew it may be used anew.
        let desk = super::tests::desk(dir.path(), Some("/images".into()));
        assert!(!desk.is_made());
        run(&desk.0, &create).unwrap();
    }

    #[test]
    fn without_images_it_is_made_and_started() {
        let dir = tempfile::tempdir().unwrap();
        let desk = desk(dir.path(), None);
        run(&desk.0, &bundle(dir.path())).unwrap();
        run(&desk.0, &words("--log x start 2779dabb")).unwrap();
        let calls = std::fs::read_to_string(dir.path().join("calls")).unwrap();
        let calls: Vec<_> = calls.lines().collect();
        assert!(calls[0].contains(" create --bundle") && calls[1] == "--log x start 2779dabb", "{calls:?}");
    }

    #[test]
    fn a_failure_of_the_runtime_is_no_success() {
        let dir = tempfile::tempdir().unwrap();
        let desk = desk(dir.path(), Some("/images".into()));
        write(&dir.path().join("runc"), b"#!/bin/sh\nexit 3\n", 0o700).unwrap();
        let error = run(&desk.0, &bundle(dir.path())).unwrap_err().to_string();
        assert!(error.contains("exit status: 3") && !desk.is_made(), "{error}");
        assert_eq!(desk.worker(), None, "this process carries no order out");
    }

    #[test]
    fn the_script_passes_other_calls_on() {
        let dir = tempfile::tempdir().unwrap();
        let desk = desk(dir.path(), Some("/images".into()));
        let said =
            Command::new(desk.0.join("runtime")).args(["--log", "x y", "delete", "--force", "2779dabb"]).status();
        assert!(said.unwrap().success());
        assert_eq!(std::fs::read_to_string(dir.path().join("calls")).unwrap(), "--log x y delete --force 2779dabb\n");
        let settings = std::fs::read_to_string(desk.settings()).unwrap();
        assert!(settings.contains("a desk/runtime"), "{settings}");
        assert_eq!(shell(Path::new("/it's")), r"'/it'\''s'");
    }
}
