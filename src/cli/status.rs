//! `status` and `wait`.

use std::time::Duration;

use super::answers::{Answer, bytes};
use super::progress::Progress;
use crate::control::api::WaitFor;
use crate::control::client::ControlClient;
use crate::control::status::{DiskStatus, NodeStatus};
use crate::error::Outcome;
use crate::node::DiskName;

/// How often `--watch` looks where no person watches.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);

/// How often a wait looks how far it is.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(250);

pub(super) async fn run(client: &ControlClient, answer: &Answer, name: Option<DiskName>, watch: bool) -> Outcome<()> {
    if watch && !answer.json && super::watch::possible() {
        return super::watch::run(client, name).await;
    }
    loop {
        match &name {
            Some(name) => {
                let status: DiskStatus = client.get(&format!("/v1/disks/{name}")).await?;
                answer.print(&status, || describe(&status))?;
            }
            None => {
                let status: NodeStatus = client.get("/v1/status").await?;
                answer.print(&status, || {
                    let lines: Vec<_> = status.disks.iter().map(describe).collect();
                    if lines.is_empty() { "no exports".into() } else { lines.join("\n") }
                })?;
            }
        }
        if !watch {
            return Ok(());
        }
        tokio::time::sleep(WATCH_INTERVAL).await;
    }
}

/// The named disk, or all of them.
pub(super) async fn look(client: &ControlClient, name: Option<&DiskName>) -> Outcome<Vec<DiskStatus>> {
    match name {
        Some(name) => Ok(vec![client.get(&format!("/v1/disks/{name}")).await?]),
        None => Ok(client.get::<NodeStatus>("/v1/status").await?.disks),
    }
}

pub(super) async fn wait(
    client: &ControlClient,
    answer: &Answer,
    name: DiskName,
    what: WaitFor,
    timeout: Option<Duration>,
) -> Outcome<()> {
    let what = serde_json::to_value(what).map_err(crate::error::Failure::failed)?;
    let what = what.as_str().unwrap_or_default();
    let timeout = timeout.map(|timeout| format!("&timeout_ms={}", timeout.as_millis())).unwrap_or_default();
    let path = format!("/v1/disks/{name}/wait?for={what}{timeout}");
    let mut progress = Progress::new(&name);
    let waited = client.get::<DiskStatus>(&path);
    let mut waited = std::pin::pin!(waited);
    let outcome = loop {
        tokio::select! {
            outcome = &mut waited => break outcome,
            () = tokio::time::sleep(PROGRESS_INTERVAL) => {}
        }
        // Only while something comes; why the wait itself ends is told by its own answer.
        if let Ok(status) = client.get::<DiskStatus>(&format!("/v1/disks/{name}")).await
            && let filling = status.filling()
            && filling.missing_bytes > 0
        {
            progress.show(filling.present_bytes, status.size, filling.pull_rate);
        }
    };
    progress.finish();
    let status = outcome?;
    answer.print(&status, || describe(&status))
}

fn describe(status: &DiskStatus) -> String {
    let mut text = format!("{}: {} {}", status.name, status.role, status.phase);
    if status.epoch > 0 {
        text += &format!(", epoch {}", status.epoch);
    }
    text += &format!(", {}", bytes(status.size));
    let filling = status.filling();
    if filling.missing_bytes > 0 {
        let there = if status.destination.is_some() { " at the destination" } else { "" };
        text += &format!(", {} missing{there}", bytes(filling.missing_bytes));
        if filling.pull_rate > 0 {
            text += &format!(", pulling {}/s", bytes(filling.pull_rate));
        }
        if let Some(eta) = filling.eta_s {
            text += &format!(", {eta} s left");
        }
    }
    if status.dirty_bytes > 0 {
        text += &format!(", {} dirty", bytes(status.dirty_bytes));
    }
    if let Some(peer) = &status.peer {
        text += &format!(", peer {peer} {}", status.link);
    }
    if let Some(lease) = status.lease_remaining_ms {
        text += &format!(", lease {:.1} s", lease as f64 / 1000.0);
    }
    if let Some(device) = &status.device {
        text += &format!(", on {}", device.display());
    }
    if let Some(stuck) = status.stuck() {
        text += &format!(", {stuck}");
    }
    if let Some(paused) = &status.paused {
        text += &format!(", PAUSED: {paused}");
    }
    text
}
