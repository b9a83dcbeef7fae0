//! `prepare`, `handover`, `cancel`, `migrate`, `verify`, `rollback`.

use std::time::Duration;

use serde_json::{Value, json};

use super::answers::{Answer, bytes};
use super::progress::Progress;
use crate::control::api::{
    Memory, MigrateAsk, MigrateEvent, MigrateReport, PrepareCommand, RollbackAsk, RollbackReport, VerifyReport,
};
use crate::control::client::ControlClient;
use crate::control::status::DiskStatus;
use crate::error::{Failure, Outcome};
use crate::migration::phase::SourcePhase;
use crate::migration::record::{LinkPolicy, OnLinkFailure};
use crate::node::DiskName;

#[derive(Debug, clap::Args)]
pub(super) struct LinkArguments {
    /// What this host does by itself when the destination falls silent after the handover.
    #[arg(long, value_enum, default_value = "wait")]
    on_link_failure: OnLinkFailure,
    /// After how long of silence.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = super::values::duration)]
    link_timeout: Duration,
}

impl LinkArguments {
    fn policy(&self) -> LinkPolicy {
        LinkPolicy { on_link_failure: self.on_link_failure, link_timeout: self.link_timeout }
    }
}

#[derive(Debug, clap::Args)]
pub(super) struct MigrateArguments {
    /// The export that holds the container's file system.
    name: DiskName,
    /// The destination's peer address.
    #[arg(long, value_name = "PEER")]
    to: String,
    /// The runtime's name for the container.
    #[arg(long, value_name = "ID")]
    container: String,
    /// The runtime that it runs in.
    #[arg(long, default_value = "runc")]
    runtime: String,
    /// Keep the container's TCP connections.
    #[arg(long)]
    tcp_established: bool,
    /// When its memory is copied. `lazy` is not offered: docs/runtimes.md says why.
    #[arg(long, value_enum, value_name = "WHEN", default_value = "frozen")]
    memory: When,
    #[command(flatten)]
    link: LinkArguments,
}

/// When a container's memory is copied.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum When {
    /// All of it while the container is frozen: the pause grows with it.
    Frozen,
    /// In rounds while it runs, then what it wrote since: a shorter pause, more bytes, and a moment's standstill each round.
    Precopy,
    /// After it runs at the destination: refused.
    #[value(hide = true)]
    Lazy,
}

impl When {
    fn memory(self) -> Outcome<Memory> {
        match self {
            Self::Frozen => Ok(Memory::Frozen),
            Self::Precopy => Ok(Memory::Precopy),
            Self::Lazy => Err(Failure::usage(
                "--memory lazy is not offered: when criu's page daemon dies at the destination, the container runs on with \
                 zeroes for the memory that is missing, and criu serves the memory in clear to whoever connects; use \
                 --memory precopy (docs/runtimes.md, \"Memory\", has what was found)",
            )),
        }
    }
}

pub(super) async fn prepare(
    client: &ControlClient,
    answer: &Answer,
    name: DiskName,
    to: String,
    link: LinkArguments,
) -> Outcome<()> {
    let command = PrepareCommand { to, policy: link.policy() };
    let status: DiskStatus = client.post(&format!("/v1/disks/{name}/prepare"), &command).await?;
    answer.print(&status, || {
        format!("{name}: {} is ready at epoch {}", status.peer.as_deref().unwrap_or("the peer"), status.epoch)
    })
}

pub(super) async fn handover(client: &ControlClient, answer: &Answer, name: DiskName) -> Outcome<()> {
    let status: DiskStatus = client.post(&format!("/v1/disks/{name}/handover"), &json!({})).await?;
    answer.print(&status, || format!("{name}: handed over at epoch {}", status.epoch))
}

pub(super) async fn cancel(client: &ControlClient, answer: &Answer, name: DiskName) -> Outcome<()> {
    let reply: Value = client.post(&format!("/v1/disks/{name}/cancel"), &json!({})).await?;
    answer.print(&reply, || format!("{name}: cancelled; this host serves it"))
}

pub(super) async fn cold_start(client: &ControlClient, answer: &Answer, name: DiskName) -> Outcome<()> {
    let status: DiskStatus = client.post(&format!("/v1/disks/{name}/cold-start"), &json!({})).await?;
    answer.print(&status, || {
        format!("{name}: {} runs again, from its disk alone", status.container.as_deref().unwrap_or("it"))
    })
}

pub(super) async fn run(client: &ControlClient, answer: &Answer, arguments: MigrateArguments) -> Outcome<()> {
    let MigrateArguments { name, to, container, runtime, tcp_established, memory, link } = arguments;
    let ask = MigrateAsk { to, container, runtime, tcp_established, memory: memory.memory()?, policy: link.policy() };
    let mut timeline = Timeline::new(&name);
    let path = format!("/v1/disks/{name}/migrate");
    let report: MigrateReport = client.stream(&path, &ask, |event| timeline.show(event)).await?;
    answer.print(&report, || {
        format!(
            "{name}: moved in {:.1} s; frozen for {} ms, {} pulled, {} skipped, {} demand fetches",
            report.total_s,
            report.frozen_ms,
            bytes(report.pulled_bytes),
            bytes(report.skipped_bytes),
            report.demand_fetches
        )
    })
}

pub(super) async fn verify(client: &ControlClient, answer: &Answer, name: DiskName) -> Outcome<()> {
    let report: VerifyReport = client.post(&format!("/v1/disks/{name}/verify"), &json!({})).await?;
    answer.print(&report, || {
        format!(
            "{name}: {} compared with the source, {} written here since the handover, {} not here yet: {}",
            bytes(report.compared_bytes),
            bytes(report.dirty_bytes),
            bytes(report.missing_bytes),
            if report.verified { "identical" } else { "DIFFERENT" }
        )
    })?;
    if report.verified {
        return Ok(());
    }
    Err(Failure::failed(format!(
        "{name} differs from the source's disk, first at offsets {:?}; do not release the source, and find out who wrote",
        report.differing
    )))
}

pub(super) async fn rollback(
    client: &ControlClient,
    answer: &Answer,
    name: DiskName,
    plan: bool,
    wait: bool,
) -> Outcome<()> {
    let ask = RollbackAsk { plan, wait };
    let report: RollbackReport = client.post(&format!("/v1/disks/{name}/rollback"), &ask).await?;
    answer.print(&report, || {
        if report.rolled_back {
            return format!(
                "{name}: rolled back in {} ms; this host owns it at epoch {}{}",
                report.took_ms,
                report.epoch,
                report.container.as_deref().map(|id| format!(", container {id} goes on")).unwrap_or_default()
            );
        }
        if let Some(why) = nothing_to_take_back(&report) {
            return format!("{name}: {} to {} at epoch {}; {why}", report.phase, report.peer, report.epoch);
        }
        let when = if report.safe_now {
            "is safe now".to_string()
        } else {
            format!("is safe in {:.1} s", report.safe_in_ms as f64 / 1000.0)
        };
        format!(
            "{name}: {} to {} at epoch {}; {} {}; a rollback {when}; what {} wrote since the handover is lost: {}; the \
             disk becomes read-write here{}; clients that the destination has served lose their connections",
            report.phase,
            report.peer,
            report.epoch,
            report.peer,
            if report.peer_reachable { "answers" } else { "does not answer" },
            report.peer,
            bytes(report.lost_bytes),
            report.container.as_deref().map(|id| format!(" and container {id} goes on")).unwrap_or_default(),
        )
    })
}

/// Why a rollback makes no sense in this phase, and what does.
fn nothing_to_take_back(report: &RollbackReport) -> Option<String> {
    let name = &report.name;
    let phase = |phase: SourcePhase| phase.name() == report.phase;
    if phase(SourcePhase::HandedOver) {
        None
    } else if phase(SourcePhase::Released) {
        Some(format!("there is no way back, it is the destination's for good: migrate it back from {}", report.peer))
    } else if phase(SourcePhase::Preparing) || phase(SourcePhase::Frozen) {
        Some(format!("nothing was handed over yet: `lazy-migrate cancel {name}` ends the migration"))
    } else if let Some(id) = &report.container {
        Some(format!(
            "it is this host's already, but container {id} does not go on: `lazy-migrate rollback {name}` tries again"
        ))
    } else {
        Some("it is this host's already".into())
    }
}

/// Shows what happens while it happens.
struct Timeline {
    name: String,
    progress: Progress,
}

impl Timeline {
    fn new(name: &DiskName) -> Self {
        Self { name: name.to_string(), progress: Progress::new(name) }
    }

    fn show(&mut self, event: MigrateEvent) -> Option<Outcome<MigrateReport>> {
        let name = &self.name;
        match event {
            MigrateEvent::Prepared { at_ms } => eprintln!("{at_ms:>7} ms  {name}: prepared"),
            MigrateEvent::Precopied { at_ms, round, image_bytes } => {
                eprintln!("{at_ms:>7} ms  {name}: memory, round {round}, {}", bytes(image_bytes));
            }
            MigrateEvent::Frozen { at_ms } => eprintln!("{at_ms:>7} ms  {name}: frozen"),
            MigrateEvent::Checkpointed { at_ms, image_bytes } => {
                eprintln!("{at_ms:>7} ms  {name}: checkpoint is there, {}", bytes(image_bytes));
            }
            MigrateEvent::HandedOver { at_ms } => eprintln!("{at_ms:>7} ms  {name}: handed over"),
            MigrateEvent::Resumed { at_ms, frozen_ms } => {
                eprintln!("{at_ms:>7} ms  {name}: resumed, frozen for {frozen_ms} ms");
            }
            MigrateEvent::Progress { present_bytes, size, pull_rate } => {
                self.progress.show(present_bytes, size, pull_rate);
            }
            MigrateEvent::Complete(report) => {
                self.progress.finish();
                eprintln!("{:>7.0} ms  {}: complete", report.total_s * 1000.0, self.name);
                return Some(Ok(report));
            }
            MigrateEvent::Failed(failure) => {
                self.progress.finish();
                return Some(Err(failure));
            }
        }
        None
    }
}
