//! `report`: all that is known of a migration or a pull, for a person, a script or a browser.

use std::path::PathBuf;
use std::time::{Duration, UNIX_EPOCH};

use super::answers::{Answer, bytes};
use crate::control::client::ControlClient;
use crate::control::report::Report;
use crate::control::summary::{Ending, Still};
use crate::error::{Failure, Outcome};
use crate::files;
use crate::node::DiskName;
use crate::web;

#[derive(Debug, clap::Args)]
pub(super) struct ReportArguments {
    /// The export.
    name: DiskName,
    /// Draw it as one HTML page that needs nothing else, into this file.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

pub(super) async fn run(client: &ControlClient, answer: &Answer, arguments: ReportArguments) -> Outcome<()> {
    let ReportArguments { name, html } = arguments;
    let report: Report = client.get(&format!("/v1/disks/{name}/report")).await?;
    if let Some(path) = &html {
        let page = web::of_report(&report).map_err(Failure::failed)?;
        files::write_atomically(path, page.as_bytes())
            .map_err(|error| Failure::failed(format!("cannot write the report to {}: {error}", path.display())))?;
    }
    answer.print(&report, || describe(&report))
}

fn describe(report: &Report) -> String {
    let (status, summary) = (&report.status, &report.summary);
    let outcome = match summary.outcome {
        Ending::None => "no migration",
        Ending::UnderWay => "under way",
        Ending::Complete => "complete",
        Ending::Failed => "failed",
    };
    let mut lines = vec![format!("{}: {outcome} ({} {})", status.name, status.role, status.phase)];
    if let Some(why) = &summary.why {
        lines.push(format!("why       {why}"));
    }
    let time = |at: u64| humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_millis(at));
    if summary.began_ms > 0 {
        let took = summary.took_ms.map(|took| format!(", took {:.1} s", took as f64 / 1e3)).unwrap_or_default();
        lines.push(format!("began     {}{took}", time(summary.began_ms)));
    }
    if let Some(frozen) = summary.frozen_ms {
        lines.push(format!("frozen    {frozen} ms"));
    }
    let whole = summary.pulled_bytes + summary.skipped_bytes;
    let percent = (summary.skipped_bytes * 100).checked_div(whole).unwrap_or(0);
    lines.push(format!(
        "moved     {} over the link, {} saved by skipping holes and zeroes ({percent} %)",
        bytes(summary.pulled_bytes),
        bytes(summary.skipped_bytes)
    ));
    lines.push(format!(
        "fetches   {} on demand, {} in the background",
        summary.demand_fetches, summary.background_fetches
    ));
    let faults = &status.faults;
    let ms = |us: u64| us as f64 / 1e3;
    lines.push(format!(
        "waits     p50 {:.1} ms, p99 {:.1} ms, at most {:.1} ms, altogether {:.1} ms",
        ms(faults.p50_us),
        ms(faults.p99_us),
        ms(faults.max_us),
        ms(status.stalled_us)
    ));
    for (kind, name) in [(Still::Fenced, "fenced"), (Still::LinkDown, "link down"), (Still::Paused, "paused")] {
        let (times, still) = (
            summary.windows.iter().filter(|window| window.kind == kind).count(),
            summary.still_ms(kind, report.made_at_ms),
        );
        if times > 0 {
            lines.push(format!("{name:9} {times} times, {:.1} s altogether", still as f64 / 1e3));
        }
    }
    lines.join("\n")
}
