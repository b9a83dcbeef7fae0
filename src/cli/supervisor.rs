//! What a service manager is told: that the node serves, how it is, that it lives, that it stops.
//!
//! This is systemd's notification protocol, a line or more in a datagram to the socket that `NOTIFY_SOCKET` names. The
//! keepalives of its watchdog are sent only as long as the node answers over its control socket, as its users ask it. A node that
//! is stuck is so ended and started again, which hurts no container: the kernel holds its I/O meanwhile. A disk whose storage
//! hangs is no reason: it holds up nobody else, and a new node would meet the same storage.
//!
//! The variables are taken out of the environment before anything else is started: runc, for one, makes a notification
//! socket inside each container that it restores when it finds the variable.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use crate::control::client::ControlClient;
use crate::control::status::NodeStatus;
use crate::error::{Failure, Outcome};

const SOCKET: &str = "NOTIFY_SOCKET";
const WATCHDOG: &str = "WATCHDOG_USEC";
const WATCHDOG_PID: &str = "WATCHDOG_PID";
/// How many keepalives there are in the time that the watchdog gives: one late answer must not end the node.
const BEATS: u32 = 4;
/// How often the line that says how the node is is made anew where there is no watchdog.
const STATUS_EVERY: Duration = Duration::from_secs(15);

/// Who started this process, if it wants to be told.
#[derive(Debug, Default)]
pub(super) struct Supervisor {
    socket: Option<UnixDatagram>,
    watchdog: Option<Duration>,
}

impl Supervisor {
    /// What the environment says. What is said there wrongly counts as not said: a node without a supervisor serves as well.
    pub(super) fn of_environment() -> Supervisor {
        let [socket, limit, pid] = [SOCKET, WATCHDOG, WATCHDOG_PID].map(std::env::var_os);
        let Some(socket) = socket else { return Supervisor::default() };
        forget_environment();
        Supervisor { socket: connect(&socket).ok(), watchdog: watchdog(limit, pid, std::process::id()) }
    }

    /// Says something. Who does not listen misses it.
    fn say(&self, words: &str) {
        if let Some(socket) = &self.socket
            && let Err(error) = socket.send(words.as_bytes())
        {
            tracing::debug!(%error, "the service manager does not listen");
        }
    }

    /// Everything listens.
    pub(super) fn ready(&self) {
        self.say("READY=1");
    }

    /// The end has begun.
    pub(super) fn stopping(&self) {
        self.say("STOPPING=1\nSTATUS=Making all disks durable");
    }

    /// Says that the node lives, and how it is, for as long as it answers. Does not end.
    pub(super) async fn keep_told(&self, control: &ControlClient) -> ! {
        if self.socket.is_none() {
            loop {
                std::future::pending::<()>().await;
            }
        }
        let every = self.watchdog.map_or(STATUS_EVERY, |limit| limit / BEATS);
        let mut beat = tokio::time::interval(every);
        beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            beat.tick().await;
            match answers(control, every * (BEATS - 1)).await {
                Ok(status) => self.say(&format!("WATCHDOG=1\nSTATUS={}", summary(&status))),
                Err(failure) => tracing::warn!(%failure, "no word to the watchdog: the node does not answer"),
            }
        }
    }
}

/// The answer that a user gets.
async fn answers(control: &ControlClient, within: Duration) -> Outcome<NodeStatus> {
    let late = |_| Failure::timed_out(format!("no answer within {} ms", within.as_millis()));
    tokio::time::timeout(within, control.get("/v1/status")).await.map_err(late)?
}

/// `3 disks: 1 active, 2 serving`.
fn summary(status: &NodeStatus) -> String {
    let mut phases = BTreeMap::new();
    for disk in &status.disks {
        *phases.entry(disk.phase.as_str()).or_insert(0u64) += 1;
    }
    let phases: Vec<_> = phases.iter().map(|(phase, count)| format!("{count} {phase}")).collect();
    match status.disks.len() {
        0 => "No disks".into(),
        1 => format!("1 disk: {}", phases.join(", ")),
        count => format!("{count} disks: {}", phases.join(", ")),
    }
}

fn connect(name: &OsStr) -> io::Result<UnixDatagram> {
    let address = match name.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(name)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    // The node does not wait for who watches it.
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// The watchdog's limit, if it is meant for this process.
fn watchdog(limit: Option<OsString>, pid: Option<OsString>, own: u32) -> Option<Duration> {
    if pid.is_some_and(|pid| pid.to_str().and_then(|pid| pid.parse().ok()) != Some(own)) {
        return None;
    }
    let limit: u64 = limit?.to_str()?.parse().ok()?;
    (limit > 0).then(|| Duration::from_micros(limit))
}

#[allow(unsafe_code)]
fn forget_environment() {
    for name in [SOCKET, WATCHDOG, WATCHDOG_PID] {
        // SAFETY: `main` calls this before it starts the runtime or any other thread, so nobody reads the environment now.
        unsafe { std::env::remove_var(name) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_watchdog_is_that_of_this_process() {
        let some = |text: &str| Some(OsString::from(text));
        let ten = Some(Duration::from_secs(10));
        assert_eq!(watchdog(some("10000000"), None, 7), ten);
        assert_eq!(watchdog(some("10000000"), some("7"), 7), ten);
        assert_eq!(watchdog(some("10000000"), some("8"), 7), None, "another's");
        for nothing in ["0", "", "soon"] {
            assert_eq!(watchdog(some(nothing), None, 7), None);
        }
        assert_eq!(watchdog(None, None, 7), None);
    }

    #[test]
    fn the_manager_hears_what_is_said_at_a_path_and_at_an_abstract_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let abstract_name = format!("@lazy-migrate-test-{}", std::process::id());
        let at_name = SocketAddr::from_abstract_name(&abstract_name.as_bytes()[1..]).unwrap();
        let listeners = [
            (path.clone().into_os_string(), UnixDatagram::bind(&path).unwrap()),
            (abstract_name.into(), UnixDatagram::bind_addr(&at_name).unwrap()),
        ];
        for (name, listener) in listeners {
            let supervisor = Supervisor { socket: Some(connect(&name).unwrap()), watchdog: None };
            supervisor.ready();
            let mut buffer = [0; 64];
            let length = listener.recv(&mut buffer).unwrap();
            assert_eq!(&buffer[..length], b"READY=1");
            drop(listener);
            // Nobody listens any more, and nothing happens.
            supervisor.stopping();
        }
        assert!(connect("/nonexistent/socket".as_ref()).is_err());
    }
}
