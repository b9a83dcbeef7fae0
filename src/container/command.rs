//! Runs the programs that this module depends on: with a time limit, bounded output, and nothing left behind.
//!
//! A program that is late, or whose caller went away, is ended together with everything it started: runc leaves a
//! waiting criu behind when only runc is killed, and criu its half-made tasks.

use std::{
    collections::HashMap,
    ffi::{OsStr, OsString},
    io,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill, killpg},
    unistd::Pid,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    process::Command,
};

use super::Error;

/// How much of the end of a program's output is kept, in bytes; what is before it is read and thrown away.
const OUTPUT_LIMIT: usize = 64 * 1024;
/// How long output is waited for after its program has ended: whatever has it open still does not mean to close it.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);
/// How much of a log's end is looked at for error lines, in bytes.
const LOG_LIMIT: u64 = 1 << 20;
/// How many error lines an error text carries.
const ERROR_LINES: usize = 4;
/// How long each of them may be, in characters.
const ERROR_LINE: usize = 400;
/// How often the tree of a program's children is looked at again while it is ended.
const KILL_ROUNDS: usize = 16;

/// A program call being put together.
pub(crate) struct Call {
    program: PathBuf,
    package: &'static str,
    what: String,
    args: Vec<OsString>,
    limit: Duration,
    input: Option<Vec<u8>>,
    silent: bool,
    environment: Vec<(&'static str, OsString)>,
    only: bool,
}

/// What a program said.
#[derive(Debug)]
pub(crate) struct Said {
    pub success: bool,
    pub status: String,
    pub stdout: String,
    pub stderr: String,
}

impl Call {
    /// `what` completes "cannot ...", and `package` is named when the program is missing.
    pub fn new(program: &Path, package: &'static str, what: impl Into<String>, limit: Duration) -> Self {
        let (program, what) = (program.to_owned(), what.into());
        let environment = Vec::new();
        Self { program, package, what, args: Vec::new(), limit, input: None, silent: false, environment, only: false }
    }

    /// Adds one argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds several arguments.
    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args.extend(args.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    /// Gives the program something to read; without it its stdin is `/dev/null`.
    pub fn input(mut self, bytes: Vec<u8>) -> Self {
        self.input = Some(bytes);
        self
    }

    /// Output to `/dev/null`: for programs whose children keep stdout and stderr, as a restored container does.
    pub fn silent(mut self) -> Self {
        self.silent = true;
        self
    }

    /// The program's environment is this, with PATH and LC_ALL, and nothing of ours.
    pub fn only_environment(mut self, variables: Vec<(&'static str, OsString)>) -> Self {
        (self.environment, self.only) = (variables, true);
        self
    }

    /// Adds a variable to the program's environment.
    pub fn also_environment(mut self, name: &'static str, value: impl Into<OsString>) -> Self {
        self.environment.push((name, value.into()));
        self
    }

    /// The name for error texts.
    pub fn program(&self) -> String {
        self.program.display().to_string()
    }

    /// Runs it to its end. An answer other than 0 is not an error here: see [`Said`].
    pub async fn run(self) -> Result<Said, Error> {
        let output = || if self.silent { Stdio::null() } else { Stdio::piped() };
        let mut command = Command::new(&self.program);
        if self.only {
            command.env_clear();
        }
        let mut child = command
            .args(&self.args)
            .stdin(if self.input.is_some() { Stdio::piped() } else { Stdio::null() })
            .stdout(output())
            .stderr(output())
            .env("LC_ALL", "C")
            .env("PATH", search_path())
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(|source| self.cannot_start(source))?;
        let mut tree = KillTree(child.id());
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let feed = async {
            if let (Some(mut pipe), Some(bytes)) = (stdin, &self.input) {
                // A program that stops reading says why on stderr; its answer is what counts.
                let _ = pipe.write_all(bytes).await;
            }
        };
        let talk = async { tokio::join!(feed, read_end(stdout), read_end(stderr)) };
        tokio::pin!(talk);
        let mut said = None;
        let ended = async {
            loop {
                tokio::select! {
                    status = child.wait() => break status,
                    ((), stdout, stderr) = &mut talk, if said.is_none() => said = Some((stdout, stderr)),
                }
            }
        };
        let Ok(status) = tokio::time::timeout(self.limit, ended).await else {
            drop(tree);
            // Killed: reaping takes no more than a moment, unless it sits in uninterruptible I/O.
            let _ = tokio::time::timeout(Duration::from_secs(2), child.wait()).await;
            let (program, what, limit) = (self.program(), self.what, self.limit);
            return Err(Error::TimedOut { program, what, limit, detail: String::new() });
        };
        // Its number may be another's from here on.
        tree.disarm();
        let status = status.map_err(|source| self.cannot_start(source))?;
        if said.is_none() {
            said = tokio::time::timeout(DRAIN_LIMIT, talk).await.ok().map(|((), stdout, stderr)| (stdout, stderr));
        }
        match said {
            Some((stdout, stderr)) => {
                Ok(Said { success: status.success(), status: status.to_string(), stdout, stderr })
            }
            None => Err(Error::KeptOpen { program: self.program(), what: self.what }),
        }
    }

    /// Runs it, and takes any answer but 0 as an error with the last lines of stderr. Returns stdout.
    pub async fn run_ok(self) -> Result<String, Error> {
        let (program, what) = (self.program(), self.what.clone());
        let said = self.run().await?;
        if said.success {
            return Ok(said.stdout);
        }
        Err(Error::Failed { program, what, detail: said.why(), status: said.status })
    }

    fn cannot_start(&self, source: io::Error) -> Error {
        if source.kind() == io::ErrorKind::NotFound {
            Error::Missing { program: self.program(), package: self.package }
        } else {
            Error::Spawn { program: self.program(), what: self.what.clone(), source }
        }
    }
}

impl Said {
    /// The end of what it said, on one line.
    pub fn why(&self) -> String {
        let said = if self.stderr.trim().is_empty() { &self.stdout } else { &self.stderr };
        let lines: Vec<String> = said.lines().map(plain).filter(|l| !l.is_empty()).collect();
        match lines.len() {
            0 => "it said nothing".to_owned(),
            n => {
                let cut = |line: &String| line.chars().take(ERROR_LINE).collect::<String>();
                lines[n.saturating_sub(ERROR_LINES)..].iter().map(cut).collect::<Vec<_>>().join("; ")
            }
        }
    }
}

/// The lines of a criu log that tell why it failed, on one line; empty when there are none.
///
/// The first ones name the cause, the last one says that everything failed, so the first ones are kept.
pub(crate) fn log_errors(log: &Path) -> String {
    let Ok(text) = read_tail(log) else { return String::new() };
    let mut lines: Vec<String> = Vec::new();
    for line in text.lines().filter(|l| l.contains("Error (")) {
        let line = plain(line.split_once("Error ").map_or(line, |(_, rest)| rest));
        // Helpers that criu runs and whose failure is explained in another line.
        let explained_elsewhere = line.contains("criu/util.c") && !line.contains("execvp");
        if !explained_elsewhere && lines.len() < ERROR_LINES && !lines.contains(&line) {
            lines.push(line);
        }
    }
    if lines.iter().any(|l| l.contains("iptables-restore") || l.contains("ip6tables-restore")) {
        lines.push("criu needs iptables to hold a container's network: install package iptables".to_owned());
    }
    lines.join("; ")
}

/// The messages of a log that runc wrote with `--log-format json`, errors only, on one line.
pub(crate) fn runc_log_errors(log: &Path) -> String {
    let Ok(text) = read_tail(log) else { return String::new() };
    let mut lines: Vec<String> = Vec::new();
    for line in text.lines() {
        let Ok(entry) = serde_json::from_str::<serde_json::Value>(line) else { continue };
        if matches!(entry["level"].as_str(), Some("error" | "fatal"))
            && let Some(message) = entry["msg"].as_str()
        {
            lines.push(plain(&message.replace('\n', " ")));
        }
    }
    lines.split_off(lines.len().saturating_sub(ERROR_LINES)).join("; ")
}

/// Ends a process and all that descend from it. Processes that it started meanwhile are found by looking again.
pub(crate) fn kill_tree(root: u32) {
    for _ in 0..KILL_ROUNDS {
        let tree = descendants(root);
        for &pid in tree.iter().chain([&root]) {
            // Gone already, or a zombie: both are what is wanted.
            let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
        }
        if tree.is_empty() {
            return;
        }
    }
}

/// Kills the tree when dropped, which is what happens to a call whose caller gives up.
struct KillTree(Option<u32>);

impl KillTree {
    fn disarm(&mut self) {
        self.0 = None;
    }
}

impl Drop for KillTree {
    fn drop(&mut self) {
        if let Some(pid) = self.0 {
            kill_tree(pid);
            // And those whose parents have ended: it leads a group of its own, and is not reaped yet.
            let _ = killpg(Pid::from_raw(pid as i32), Signal::SIGKILL);
        }
    }
}

/// All live processes below `root`, without it and without zombies.
fn descendants(root: u32) -> Vec<u32> {
    let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
    let Ok(dir) = std::fs::read_dir("/proc") else { return Vec::new() };
    for pid in dir.flatten().filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok()) {
        let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
        // After the name, which may hold anything: state and parent.
        let Some((_, rest)) = stat.rsplit_once(") ") else { continue };
        let mut fields = rest.split(' ');
        let (state, parent) = (fields.next(), fields.next().and_then(|p| p.parse().ok()));
        if let (Some(state), Some(parent)) = (state, parent)
            && state != "Z"
        {
            children.entry(parent).or_default().push(pid);
        }
    }
    let (mut found, mut next) = (Vec::new(), vec![root]);
    while let Some(pid) = next.pop() {
        for child in children.remove(&pid).unwrap_or_default() {
            found.push(child);
            next.push(child);
        }
    }
    found
}

/// PATH with the directories that criu, nft and iptables are in: a service or a plain `su` may leave them out.
fn search_path() -> OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin".into());
    path.push(":/usr/local/sbin:/usr/sbin:/sbin");
    path
}

/// All of it is read, so that its program is not held up, and the end is kept.
async fn read_end(pipe: Option<impl AsyncRead + Unpin>) -> String {
    let Some(mut pipe) = pipe else { return String::new() };
    let (mut kept, mut buffer) = (Vec::new(), vec![0; 8192]);
    // What cannot be read is missing from an error text, nothing worse.
    while let Ok(length @ 1..) = pipe.read(&mut buffer).await {
        kept.extend_from_slice(&buffer[..length]);
        if kept.len() > 2 * OUTPUT_LIMIT {
            kept.drain(..kept.len() - OUTPUT_LIMIT);
        }
    }
    kept.drain(..kept.len().saturating_sub(OUTPUT_LIMIT));
    String::from_utf8_lossy(&kept).into_owned()
}

fn read_tail(path: &Path) -> io::Result<String> {
    use std::io::{Read, Seek, SeekFrom};
    let mut file = std::fs::File::open(path)?;
    let size = file.metadata()?.len();
    file.seek(SeekFrom::Start(size.saturating_sub(LOG_LIMIT)))?;
    let mut bytes = Vec::new();
    file.take(LOG_LIMIT).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Without terminal colours and surrounding white space.
fn plain(line: &str) -> String {
    let mut out = String::new();
    let mut rest = line;
    while let Some(at) = rest.find('\u{1b}') {
        out.push_str(&rest[..at]);
        rest = rest[at..].split_once('m').map_or("", |(_, after)| after);
    }
    out.push_str(rest);
    // The log lines that Go programs write when stderr is no terminal: only the message is of interest.
    if let Some((_, message)) = out.split_once(" msg=\"").filter(|_| out.starts_with("time=")) {
        out = message.trim_end().trim_end_matches('"').replace("\\n", " ").replace("\\\"", "\"");
    }
    out.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str, limit: Duration) -> Call {
        Call::new(Path::new("/bin/sh"), "dash", "test", limit).args(["-c", script])
    }

    #[tokio::test]
    async fn output_and_status_are_told_apart() {
        let said = sh("echo out; echo '\u{1b}[31mwrong\u{1b}[0m way' >&2; exit 3", Duration::from_secs(10)).run().await;
        let said = said.unwrap();
        assert!(!said.success);
        assert_eq!(said.stdout, "out\n");
        assert_eq!(said.why(), "wrong way");
    }

    #[test]
    fn log_lines_are_cut_to_their_message() {
        let line = "time=\"2026-11-21T12:47:28Z\" level=error msg=\"cannot open \\\"x\\\": gone\"";
        assert_eq!(plain(line), "cannot open \"x\": gone");
        assert_eq!(plain("a msg=\"b\""), "a msg=\"b\"");
    }

    #[tokio::test]
    async fn output_is_bounded_and_does_not_block() {
        let said = sh("head -c 5000000 /dev/zero; echo; echo end", Duration::from_secs(10)).run().await.unwrap();
        assert!(said.success);
        assert_eq!(said.stdout.len(), OUTPUT_LIMIT);
        assert!(said.stdout.ends_with("\nend\n"), "the end is missing");
        let long = Said { stderr: "x".repeat(5000), ..said };
        assert_eq!(long.why().len(), ERROR_LINE);
    }

    #[tokio::test]
    async fn what_keeps_the_output_open_does_not_hold_up_its_starter() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("pid");
        let script = format!("sleep 600 & echo $! >{}; exit 0", file.display());
        let error = sh(&script, Duration::from_secs(60)).run().await.unwrap_err();
        let child: i32 = std::fs::read_to_string(&file).unwrap().trim().parse().unwrap();
        kill(Pid::from_raw(child), Signal::SIGKILL).unwrap();
        assert!(matches!(error, Error::KeptOpen { .. }), "{error}");
    }

    #[tokio::test]
    async fn nothing_of_our_environment_is_passed_on() {
        let call = sh("env", Duration::from_secs(10)).only_environment(vec![("LAZY_MIGRATE_CONTAINER", "web".into())]);
        let said = call.run_ok().await.unwrap();
        // What the shell itself adds.
        let own = ["PWD=", "SHLVL=", "_=", "OLDPWD="];
        let mut names: Vec<_> = said.lines().filter(|line| !own.iter().any(|name| line.starts_with(name))).collect();
        names.retain(|line| !line.starts_with("PATH="));
        names.sort_unstable();
        assert_eq!(names, ["LAZY_MIGRATE_CONTAINER=web", "LC_ALL=C"]);
    }

    #[tokio::test]
    async fn input_reaches_the_program() {
        let said = sh("cat", Duration::from_secs(10)).input(b"over there".to_vec()).run_ok().await.unwrap();
        assert_eq!(said, "over there");
    }

    #[tokio::test]
    async fn a_missing_program_names_its_package() {
        let call = Call::new(Path::new("/nonexistent/runc"), "runc", "look", Duration::from_secs(1));
        let text = call.run().await.unwrap_err().to_string();
        assert_eq!(text, "/nonexistent/runc is not on this host: install package runc");
    }

    #[tokio::test]
    async fn a_late_program_is_ended_with_its_children() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("pid");
        // The child leaves the process group, as a container's tasks do.
        let script = format!("setsid sleep 600 & echo $! > {}.new; mv {0}.new {0}; wait", file.display());
        let error = sh(&script, Duration::from_secs(1)).run().await.unwrap_err();
        assert!(matches!(error, Error::TimedOut { .. }), "{error}");
        let child: i32 = std::fs::read_to_string(&file).unwrap().trim().parse().unwrap();
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        let gone = || match std::fs::read_to_string(format!("/proc/{child}/stat")) {
            Ok(stat) => stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with('Z')),
            Err(_) => true,
        };
        while !gone() {
            assert!(std::time::Instant::now() < deadline, "process {child} lives on");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    #[test]
    fn criu_logs_give_their_causes() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("dump.log");
        let text = "(00.01) cg: fine\n\
            Error (criu/util.c:627): execvp(\"iptables-restore\", ...) failed: No such file or directory\n\
            (00.09) Error (criu/util.c:642): exited, status=1\n\
            (00.10) Error (criu/cr-dump.c:2053): Dumping FAILED.\n";
        std::fs::write(&log, text).unwrap();
        let told = log_errors(&log);
        assert!(told.contains("execvp") && told.contains("Dumping FAILED"), "{told}");
        assert!(told.ends_with("install package iptables") && !told.contains("status=1"), "{told}");
        assert_eq!(log_errors(&dir.path().join("none")), "");
    }
}
