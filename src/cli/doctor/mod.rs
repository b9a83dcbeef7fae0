//! `doctor`: is this host fit to send and to receive containers?
//!
//! Each area has a file: *facts* are gathered first (files read, programs asked, each within a time limit), then a pure
//! function of the facts gives the verdict. So a verdict can be tested for hosts that nobody has at hand. Nothing on the
//! host is changed: no module is loaded, nothing is installed.

mod certificates;
mod cgroup;
mod clock;
mod finding;
mod kernel;
mod limits;
mod lvm;
mod ports;
mod runtimes;
mod space;
mod tool;
mod udev;

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use self::finding::{Finding, Level};
use super::answers::Answer;
use crate::control::client::ControlClient;
use crate::control::status::NodeStatus;
use crate::error::{Failure, Outcome};

/// How long the node may take to say what it serves; doctor goes on without it.
const NODE_LIMIT: Duration = Duration::from_secs(5);

#[derive(Debug, clap::Args)]
pub(super) struct DoctorArguments {
    /// The state directory to look at [default: that of the running node].
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// The certificates to look at, as given to `serve --tls`.
    #[arg(long, value_name = "DIR")]
    tls: Option<PathBuf>,
}

/// What `doctor --json` says.
#[derive(Serialize)]
struct Report {
    /// The version of this shape.
    schema: u32,
    /// Whether nothing failed.
    fit: bool,
    /// Everything that was looked at, in a fixed order.
    checks: Vec<Finding>,
}

pub(super) async fn run(client: &ControlClient, answer: &Answer, arguments: DoctorArguments) -> Outcome<()> {
    let DoctorArguments { state_dir, tls } = arguments;
    let node = tokio::time::timeout(NODE_LIMIT, client.get::<NodeStatus>("/v1/status")).await;
    let node = node.ok().and_then(Result::ok);
    let mut checks = Vec::new();
    let facts = kernel::Facts::gather().await;
    checks.extend([kernel::nbd(&facts), kernel::fallback(&facts)]);
    checks.extend(runtimes::Facts::gather().await.verdicts());
    checks.push(cgroup::verdict(&cgroup::Facts::gather()));
    checks.push(udev::verdict(&udev::Facts::gather()));
    checks.extend(lvm::Facts::gather().verdicts());
    checks.push(clock::verdict(&clock::Facts::gather()));
    let state_dir = state_dir.or_else(|| node.as_ref().map(|node| node.state_dir.clone()));
    checks.push(space::verdict(&space::Facts::gather(state_dir, node.as_ref())));
    if let Some(directory) = tls {
        checks
            .extend(certificates::Facts::gather(&directory).verdicts(time::OffsetDateTime::now_utc().unix_timestamp()));
    }
    checks.extend(ports::gather(node.as_ref()).iter().map(ports::verdict));
    let facts = limits::Facts::gather(client.socket());
    checks.extend([limits::privilege(&facts), limits::memory(&facts), limits::files(&facts)]);

    let failed: Vec<_> = checks.iter().filter(|check| check.level == Level::Fail).map(|check| check.check).collect();
    let failure = (!failed.is_empty()).then(|| {
        Failure::failed(format!(
            "this host is not fit yet: {}; do what is said there, then run `lazy-migrate doctor` again",
            failed.join(", ")
        ))
    });
    let report = Report { schema: 1, fit: failure.is_none(), checks };
    answer.print(&report, || finding::text(&report.checks))?;
    failure.map_or(Ok(()), Err)
}
