//! The operator's file: which commands do what, and where a container's parts are on this host.
//!
//! Commands are lists of arguments, never a shell's line. The only thing in them that a peer can choose is the container's
//! id, in place of `%n`, and [`ContainerId`] leaves nothing in it that could be taken for something else.

use std::{
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use serde::Deserialize;

use crate::container::{Cgroup, ContainerId, Error, absolute};

/// The largest file that is read, in bytes.
const FILE_LIMIT: u64 = 256 << 10;
/// The longest time limit that a command may get.
const LONGEST: Duration = Duration::from_secs(3600);

/// The file, read and checked.
#[derive(Clone, Debug)]
pub(super) struct Hooks {
    pub file: PathBuf,
    pub root: Template,
    pub cgroup: Option<Template>,
    pub netns: Option<Template>,
    pub inspect: Option<Hook>,
    pub freeze: Option<Hook>,
    pub thaw: Option<Hook>,
    pub checkpoint: Hook,
    pub restore: Hook,
    pub start: Option<Hook>,
    pub kill: Option<Hook>,
    pub probe: Option<Hook>,
}

/// One command.
#[derive(Clone, Debug)]
pub(super) struct Hook {
    pub program: PathBuf,
    pub arguments: Vec<Template>,
    pub limit: Duration,
}

/// Text in which `%n` stands for a container's id, and `%%` for a percent sign.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Template(String);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    root: String,
    cgroup: Option<String>,
    netns: Option<String>,
    inspect: Option<WrittenHook>,
    freeze: Option<WrittenHook>,
    thaw: Option<WrittenHook>,
    checkpoint: WrittenHook,
    restore: WrittenHook,
    start: Option<WrittenHook>,
    kill: Option<WrittenHook>,
    probe: Option<WrittenHook>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenHook {
    command: Vec<String>,
    limit: Option<String>,
}

impl Hooks {
    /// Reads and checks the file, and looks whether its programs are there. Only those who may become root anyway may be
    /// able to change it.
    pub fn read(file: &Path) -> Result<Self, Error> {
        let file = absolute(file)?;
        let bad = |why: String| Error::Hooks { file: file.clone(), why };
        let about = std::fs::metadata(&file).map_err(|e| bad(format!("it cannot be read: {e}")))?;
        let own = nix::unistd::geteuid().as_raw();
        if (about.uid() != 0 && about.uid() != own) || about.permissions().mode() & 0o022 != 0 {
            return Err(bad(
                "others could change it, and with it what this node runs: `chown root` and `chmod go-w` it".into(),
            ));
        }
        if about.len() > FILE_LIMIT {
            return Err(bad(format!("it has {} bytes, more than {FILE_LIMIT}", about.len())));
        }
        let text = std::fs::read_to_string(&file).map_err(|e| bad(format!("it cannot be read: {e}")))?;
        let hooks = Self::parse(&text, &file).map_err(bad)?;
        hooks.look()?;
        Ok(hooks)
    }

    fn parse(text: &str, file: &Path) -> Result<Self, String> {
        let written: Written = toml::from_str(text).map_err(|e| one_line(&e, text))?;
        let hook = |name: &str, written: Option<WrittenHook>, limit: u64| {
            let hook = written.map(|written| Hook::of(written, Duration::from_secs(limit)));
            hook.transpose().map_err(|why| format!("[{name}]: {why}"))
        };
        let required = |name: &str, written, limit| {
            hook(name, Some(written), limit)?.ok_or_else(|| format!("[{name}] is missing"))
        };
        let template = |name: &str, text: Option<String>| {
            let template = text.map(Template::of).transpose().map_err(|why| format!("{name}: {why}"))?;
            match &template {
                Some(Template(text)) if !text.starts_with('/') => Err(format!("{name} = {text:?} is not absolute")),
                _ => Ok(template),
            }
        };
        let hooks = Self {
            file: file.to_owned(),
            root: template("root", Some(written.root))?.ok_or("root is missing")?,
            cgroup: template("cgroup", written.cgroup)?,
            netns: template("netns", written.netns)?,
            inspect: hook("inspect", written.inspect, 20)?,
            freeze: hook("freeze", written.freeze, 15)?,
            thaw: hook("thaw", written.thaw, 15)?,
            checkpoint: required("checkpoint", written.checkpoint, 600)?,
            restore: required("restore", written.restore, 120)?,
            start: hook("start", written.start, 120)?,
            kill: hook("kill", written.kill, 30)?,
            probe: hook("probe", written.probe, 60)?,
        };
        if hooks.cgroup.is_none() && hooks.inspect.is_none() {
            return Err(
                "nothing says what a container's control group is: add cgroup = \"/path/%n\", or [inspect]".into()
            );
        }
        if let Some(Template(text)) = hooks.cgroup.as_ref().filter(|t| !t.has_id()) {
            return Err(format!("cgroup = {text:?} is the same for every container: put %n into it"));
        }
        Ok(hooks)
    }

    /// Whether every program is there and may be run.
    pub fn look(&self) -> Result<(), Error> {
        let optional = [&self.inspect, &self.freeze, &self.thaw, &self.start, &self.kill, &self.probe];
        for hook in optional.into_iter().flatten().chain([&self.checkpoint, &self.restore]) {
            let about = std::fs::metadata(&hook.program);
            let why = match about {
                Err(error) => error.to_string(),
                Ok(about) if !about.is_file() || about.permissions().mode() & 0o111 == 0 => "it is no program".into(),
                Ok(_) => continue,
            };
            let why = format!("cannot run {}: {why}", hook.program.display());
            return Err(Error::Hooks { file: self.file.clone(), why });
        }
        Ok(())
    }

    /// The group that the file names for a container.
    pub fn cgroup_of(&self, id: &ContainerId) -> Result<Option<Cgroup>, Error> {
        self.cgroup.as_ref().map(|template| Cgroup::at(&template.fill(id))).transpose()
    }
}

impl Hook {
    fn of(written: WrittenHook, default: Duration) -> Result<Self, String> {
        let mut words = written.command.into_iter();
        let program = PathBuf::from(words.next().ok_or("its command is empty")?);
        if !program.is_absolute() {
            return Err(format!("its program {} must be named by its absolute path", program.display()));
        }
        let arguments = words.map(Template::of).collect::<Result<_, _>>()?;
        let limit = match written.limit {
            None => default,
            Some(text) => {
                humantime::parse_duration(&text).map_err(|e| format!("limit {text:?}: {e}; write it as 30s"))?
            }
        };
        if limit.is_zero() || limit > LONGEST {
            return Err(format!("its limit must be more than nothing and at most {LONGEST:?}"));
        }
        Ok(Self { program, arguments, limit })
    }
}

impl Template {
    fn of(text: String) -> Result<Self, String> {
        let mut rest = text.as_str();
        while let Some((_, after)) = rest.split_once('%') {
            rest = after.strip_prefix(['n', '%']).ok_or(format!("{text:?}: only %n and %% have a meaning"))?;
        }
        if text.contains('\0') {
            return Err(format!("{text:?}: it has a byte in it that no argument can have"));
        }
        Ok(Self(text))
    }

    /// With the container's id in its place.
    pub fn fill(&self, id: &ContainerId) -> String {
        let (mut out, mut rest) = (String::new(), self.0.as_str());
        while let Some((before, after)) = rest.split_once('%') {
            out.push_str(before);
            out.push_str(if after.starts_with('n') { id.as_str() } else { "%" });
            rest = after.get(1..).unwrap_or("");
        }
        out + rest
    }

    /// Where there is no container: its place stays empty.
    pub fn without_id(&self) -> String {
        self.0.replace("%%", "\0").replace("%n", "").replace('\0', "%")
    }

    fn has_id(&self) -> bool {
        self.0.replace("%%", "").contains("%n")
    }
}

/// Where it is wrong, and why.
fn one_line(error: &toml::de::Error, text: &str) -> String {
    let line = error.span().map(|span| text[..span.start.min(text.len())].matches('\n').count() + 1);
    let said = error.message().replace('\n', " ");
    line.map_or(said.clone(), |line| format!("line {line}: {said}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAST: &str = "root = \"/srv/%n\"\ncgroup = \"/web/%n\"\n\
        checkpoint.command = [\"/bin/dump\", \"--of=%n\", \"100%%\"]\nrestore.command = [\"/bin/restore\"]\n";

    fn parse(text: &str) -> Result<Hooks, String> {
        Hooks::parse(text, Path::new("/etc/hooks.toml"))
    }

    #[test]
    fn the_id_stands_where_it_is_asked_for_and_nothing_else_changes() {
        let id = ContainerId::new("w+1").unwrap();
        let hooks = parse(LEAST).unwrap();
        let words: Vec<_> = hooks.checkpoint.arguments.iter().map(|word| word.fill(&id)).collect();
        assert_eq!(words, ["--of=w+1", "100%"]);
        assert_eq!(hooks.root.fill(&id), "/srv/w+1");
        assert_eq!(hooks.cgroup_of(&id).unwrap().unwrap().path(), "/web/w+1");
        assert_eq!(hooks.checkpoint.limit, Duration::from_secs(600));
        assert_eq!(Template::of("%%n %n%%".into()).unwrap().fill(&id), "%n w+1%");
    }

    #[test]
    fn what_is_wrong_is_told_with_its_place() {
        for (text, word) in [
            ("", "missing field `root`"),
            ("root = 1", "line 1"),
            (&LEAST.replace("/srv", "srv"), "root = \"srv/%n\" is not absolute"),
            (&LEAST.replace("/web/%n", "/web/100%%n"), "the same for every container"),
            (&LEAST.replace("cgroup = \"/web/%n\"", ""), "[inspect]"),
            (&LEAST.replace("/bin/dump", "dump"), "[checkpoint]: its program dump must be named by its absolute path"),
            (&LEAST.replace("--of=%n", "%s"), "only %n"),
            (&LEAST.replace("[\"/bin/restore\"]", "[]"), "[restore]: its command is empty"),
            (&LEAST.replace("[\"/bin/restore\"]", "\"/bin/restore\""), "line 4"),
            (&format!("{LEAST}[freeze]\ncommand = [\"/f\"]\nlimit = \"soon\""), "[freeze]: limit \"soon\""),
            (&format!("{LEAST}[freeze]\ncommand = [\"/f\"]\nlimit = \"2h\""), "at most"),
            (&format!("{LEAST}[thaw]\ncommand = [\"/f\"]\nlimits = \"2s\""), "unknown field `limits`"),
            (&format!("{LEAST}[unfreeze]\ncommand = [\"/f\"]"), "unknown field `unfreeze`"),
        ] {
            let why = parse(text).unwrap_err();
            assert!(why.contains(word) && !why.contains('\n'), "{why:?} says nothing of {word:?}");
        }
    }

    #[test]
    fn a_file_that_others_may_change_is_refused_and_so_are_missing_programs() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("hooks.toml");
        let said = || Hooks::read(&file).unwrap_err().to_string();
        assert!(said().contains("cannot be read"), "{}", said());
        std::fs::write(&file, LEAST).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o664)).unwrap();
        assert!(said().contains("others could change it"), "{}", said());
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(said().contains("cannot run /bin/dump"), "{}", said());
        std::fs::write(&file, LEAST.replace("/bin/dump", "/bin/true").replace("/bin/restore", "/bin/true")).unwrap();
        Hooks::read(&file).unwrap();
        // A program whose file cannot be run is none.
        std::fs::write(&file, LEAST.replace("/bin/dump", "/bin/true").replace("/bin/restore", file.to_str().unwrap()))
            .unwrap();
        assert!(said().contains("it is no program"), "{}", said());
    }
}
