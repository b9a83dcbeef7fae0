//! An example, run as an operator would run it: with the node that it is for in the environment.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::support::{Node, Said, program, wait_for};

/// A script that runs; ended with all that it started when dropped.
pub struct Script {
    child: Child,
    stderr: Arc<Mutex<String>>,
    readers: Vec<JoinHandle<()>>,
    stdout: Arc<Mutex<String>>,
}

/// The command for a script below `examples/`, with nothing said about a node yet.
pub fn command(name: &str, arguments: &[&str]) -> Command {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples").join(name);
    let mut command = Command::new(path);
    command.args(arguments).env("LAZY_MIGRATE", program());
    command
}

/// Starts a script for a node.
pub fn start(node: &Node, name: &str, arguments: &[&str]) -> Script {
    Script::of(command(name, arguments).env("LAZY_MIGRATE_CONTROL", node.control()))
}

/// Runs a script for a node to its end.
#[track_caller]
pub fn run(node: &Node, name: &str, arguments: &[&str]) -> Said {
    start(node, name, arguments).end()
}

impl Script {
    /// Starts it, as the leader of a process group, as a terminal's job is.
    pub fn of(command: &mut Command) -> Script {
        let command = command.process_group(0).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (stdout, stderr) = (Arc::default(), Arc::default());
        let readers = vec![
            gather(child.stdout.take().unwrap(), Arc::clone(&stdout)),
            gather(child.stderr.take().unwrap(), Arc::clone(&stderr)),
        ];
        Script { child, stderr, readers, stdout }
    }

    /// What it has said on stderr so far.
    pub fn said(&self) -> String {
        self.stderr.lock().unwrap().clone()
    }

    /// Waits until it says something on stderr.
    #[track_caller]
    pub fn says(&self, words: &str) {
        wait_for(&format!("'{words}' among its words"), || self.said().contains(words));
    }

    /// Ctrl-C.
    pub fn interrupt(&self) {
        killpg(Pid::from_raw(self.child.id() as i32), Signal::SIGINT).unwrap();
    }

    /// Waits for its end.
    pub fn end(mut self) -> Said {
        let code = self.child.wait().unwrap().code().unwrap_or(-1);
        self.readers.drain(..).for_each(|reader| reader.join().unwrap());
        let text = |text: &Mutex<String>| text.lock().unwrap().trim_end().to_owned();
        Said { code, stdout: text(&self.stdout), stderr: text(&self.stderr) }
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = killpg(Pid::from_raw(self.child.id() as i32), Signal::SIGKILL);
            let _ = self.child.wait();
        }
    }
}

fn gather(from: impl Read + Send + 'static, to: Arc<Mutex<String>>) -> JoinHandle<()> {
    std::thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            println!("  | {line}");
            *to.lock().unwrap() += &format!("{line}\n");
        }
    })
}
