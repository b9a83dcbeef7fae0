//! `events`: what happened on the node, and what happens.

use std::time::{Duration, UNIX_EPOCH};

use super::answers::{Answer, bytes};
use crate::control::client::ControlClient;
use crate::error::{Failure, Outcome};
use crate::events::{Event, EventKind};
use crate::node::DiskName;

#[derive(Debug, clap::Args)]
pub(super) struct EventsArguments {
    /// The export [default: all].
    name: Option<DiskName>,
    /// Go on with what happens, until interrupted.
    #[arg(long)]
    follow: bool,
    /// Only those after the one with this number.
    #[arg(long, value_name = "SEQ", default_value = "0")]
    after: u64,
}

pub(super) async fn run(client: &ControlClient, answer: &Answer, arguments: EventsArguments) -> Outcome<()> {
    let EventsArguments { name, follow, after } = arguments;
    if let Some(name) = &name {
        // Whoever follows a disk that is not there would wait for ever.
        client.get::<serde_json::Value>(&format!("/v1/disks/{name}")).await?;
    }
    let disk = name.map(|name| format!("&disk={name}")).unwrap_or_default();
    let path = format!("/v1/events?after={after}&follow={follow}{disk}");
    client.lines(&path, |event: Event| answer.print(&event, || line(&event))).await?;
    if follow {
        return Err(Failure::unreachable("the node has stopped; start it again, then follow it again"));
    }
    Ok(())
}

/// `2026-11-22T06:14:19.123Z web source frozen 3: the container stands still after 12 ms`
fn line(event: &Event) -> String {
    let at = UNIX_EPOCH + Duration::from_millis(event.at_ms);
    let what = describe(event);
    let Event { disk, role, phase, epoch, .. } = event;
    format!("{} {disk} {role} {phase} {epoch}: {what}", humantime::format_rfc3339_millis(at))
}

fn describe(event: &Event) -> String {
    match &event.kind {
        EventKind::Opened { size, present_bytes } => {
            format!("opened, {} of {} present", bytes(*present_bytes), bytes(*size))
        }
        EventKind::Closed => "closed".into(),
        EventKind::Phase { from } => format!("from {from} to {}", event.phase),
        EventKind::LinkUp => "the other host is heard".into(),
        EventKind::LinkDown => "the other host is not heard".into(),
        EventKind::Attached { device } => format!("attached to {}", device.display()),
        EventKind::Detached { device } => format!("detached from {}", device.display()),
        EventKind::Clients { count: 0 } => "the last NBD client has gone".into(),
        EventKind::Clients { .. } => "an NBD client has come".into(),
        EventKind::Upstream { state } => format!("upstream {state}"),
        EventKind::PullPaused { why } => format!("the pull stands still: {why}"),
        EventKind::PullResumed => "the pull goes on".into(),
        EventKind::Container { state } => match state.and_then(|state| serde_json::to_value(state).ok()) {
            Some(state) => format!("the container is {}", state.as_str().unwrap_or_default()),
            None => "the container is not looked after any more".into(),
        },
        EventKind::Error { message } => message.clone(),
        EventKind::Prepared { after_ms } => format!("the destination is ready after {after_ms} ms"),
        EventKind::Precopied { after_ms, round, image_bytes } => {
            format!("round {round} of the memory, {}, is copied after {after_ms} ms", bytes(*image_bytes))
        }
        EventKind::Frozen { after_ms } => format!("the container stands still after {after_ms} ms"),
        EventKind::Checkpointed { after_ms, image_bytes } => {
            format!("the checkpoint of {} is at the destination after {after_ms} ms", bytes(*image_bytes))
        }
        EventKind::HandedOver { after_ms } => format!("the destination owns the disk after {after_ms} ms"),
        EventKind::Resumed { frozen_ms, .. } => {
            format!("the container runs at the destination; it stood still for {frozen_ms} ms")
        }
        EventKind::Migrated(report) => format!("all of it is at the destination after {:.1} s", report.total_s),
        EventKind::MigrateFailed { failure } => format!("the migration failed: {failure}"),
    }
}
