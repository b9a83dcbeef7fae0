//! Does criu work here? A throwaway dump of a sleeping process tells, while the container still runs.
//!
//! The first run of criu after a boot takes seconds to learn the kernel's features (it keeps them in `/run/criu.kdat`),
//! which would otherwise be part of the pause.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use tokio::{
    process::{Child, Command},
    time::Instant,
};

use super::{
    Error, POLL,
    command::{Call, log_errors},
    private_dir,
};

/// How long the first criu run may take on a slow machine.
const DUMP_LIMIT: Duration = Duration::from_secs(60);
/// How long the sleeper may take to sleep.
const START_LIMIT: Duration = Duration::from_secs(10);

/// Programs that a dump or a restore calls later, each with its package and the argument that prints its version.
const HELPERS: [(&str, &str, &str); 3] = [
    ("iptables-restore", "iptables", "--version"),
    ("nft", "nftables", "--version"),
    ("nsenter", "util-linux", "--version"),
];

/// Dumps a process that does nothing, with all files below `scratch`, and removes them.
pub(crate) async fn criu(criu: &Path, scratch: &Path) -> Result<(), Error> {
    Call::new(criu, "criu", "ask for its version", START_LIMIT).arg("--version").run_ok().await?;
    for (program, package, argument) in HELPERS {
        let call = Call::new(Path::new(program), package, "ask for its version", START_LIMIT);
        call.arg(argument).run_ok().await?;
    }
    let dir = scratch.join(format!("criu-probe-{}", std::process::id()));
    private_dir(&dir)?;
    let done = dump_sleeper(criu, &dir).await;
    let removed = std::fs::remove_dir_all(&dir).map_err(Error::io("remove", &dir));
    done.and(removed)
}

/// Whether the kernel tells criu which pages were written since a pre-dump.
pub(crate) async fn page_tracking(criu: &Path) -> Result<(), Error> {
    // It may be the first run after a boot.
    let call = Call::new(criu, "criu", "ask what the kernel can do", DUMP_LIMIT);
    let said = call.args(["check", "--feature", "mem_dirty_track"]).run().await?;
    if said.success { Ok(()) } else { Err(Error::NoPageTracking { why: said.why() }) }
}

async fn dump_sleeper(criu: &Path, dir: &Path) -> Result<(), Error> {
    let mut sleeper = Sleeper::start().await?;
    let log = dir.join("dump.log");
    let what = "checkpoint a test process (so no container on this host can be moved)";
    let call = Call::new(criu, "criu", what, DUMP_LIMIT);
    let program = call.program();
    let said = call.args(["dump", "--tree"]).arg(sleeper.pid.to_string()).arg("--images-dir").arg(dir);
    let said = said.args(["--log-file", "dump.log"]).run().await?;
    sleeper.end().await;
    if said.success {
        return Ok(());
    }
    let told = log_errors(&log);
    let detail = if told.is_empty() { said.why() } else { told };
    Err(Error::Failed { program, what: what.to_owned(), status: said.status, detail })
}

/// A process in a session of its own, which criu asks for, with nothing open but `/dev/null`.
struct Sleeper {
    child: Child,
    pid: u32,
}

impl Sleeper {
    async fn start() -> Result<Self, Error> {
        let what = "start a test process";
        let child = Command::new("setsid")
            .args(["sleep", "600"])
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .map_err(|source| Error::Spawn { program: "setsid".to_owned(), what: what.to_owned(), source })?;
        let late = || Error::TimedOut {
            program: "setsid sleep".to_owned(),
            what: what.to_owned(),
            limit: START_LIMIT,
            detail: String::new(),
        };
        let pid = child.id().ok_or_else(late)?;
        let comm = PathBuf::from(format!("/proc/{pid}/comm"));
        let deadline = Instant::now() + START_LIMIT;
        while std::fs::read_to_string(&comm).map_err(Error::io("read", &comm))?.trim() != "sleep" {
            if Instant::now() >= deadline {
                return Err(late());
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(Self { child, pid })
    }

    /// criu has killed it after a good dump; after a bad one it still sleeps.
    async fn end(&mut self) {
        if let Err(error) = self.child.kill().await {
            tracing::debug!(%error, "the test process was gone");
        }
    }
}
