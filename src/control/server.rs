//! The node's side of the control socket.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{DefaultBodyLimit, Path as UrlPath, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use futures::StreamExt;
use nbd::server::unix_path::UnixPath;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::api::{
    AddAsk, AttachAsk, AttachReply, MigrateAsk, PrepareCommand, PullAsk, RollbackAsk, RollbackReport, VerifyReport,
    WaitFor,
};
use super::metrics;
use super::report::{Report, aside, gather};
use super::status::{DiskStatus, NodeStatus};
use crate::error::{Failure, Kind, Outcome, chain};
use crate::events::{Event, Sample};
use crate::export::Overview;
use crate::limits::{CONTROL_BODY_BYTES, MAP_CELLS};
use crate::node::{DiskName, Node};

/// The cells of a map, unless the question says how many.
const CELLS: usize = 1024;

type Reply<T> = Result<Json<T>, Failure>;

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = match self.kind {
            Kind::Failed => StatusCode::INTERNAL_SERVER_ERROR,
            Kind::Usage => StatusCode::BAD_REQUEST,
            Kind::Refused => StatusCode::CONFLICT,
            Kind::Unreachable => StatusCode::BAD_GATEWAY,
            Kind::TimedOut => StatusCode::GATEWAY_TIMEOUT,
        };
        (status, Json(self)).into_response()
    }
}

/// A control socket that is listened on; the file goes when this is dropped.
pub struct ControlSocket {
    listener: tokio::net::UnixListener,
    path: UnixPath,
}

impl ControlSocket {
    /// Binds the socket, for its owner only. A stale file is replaced when nobody listens on it.
    pub async fn bind(path: &Path) -> Outcome<Self> {
        let failed = |what: &str, error: std::io::Error| {
            Failure::failed(format!("cannot {what} the control socket {}: {error}", path.display()))
        };
        if let Some(directory) = path.parent() {
            std::fs::create_dir_all(directory).map_err(|error| failed("make the directory of", error))?;
        }
        let (listener, path) = nbd::server::unix_path::bind_owned_unix(path)
            .await
            .map_err(|error| Failure::refused(format!("cannot open the control socket: {}", chain(&error))))?;
        Ok(Self { listener, path })
    }

    /// Serves until `stop`.
    pub async fn serve(self, node: Arc<Node>, stop: CancellationToken) -> Outcome<()> {
        let router = views()
            .route("/v1/disks", post(add))
            .route("/v1/pulls", post(pull))
            .route("/v1/disks/{name}", delete(remove))
            .route("/v1/disks/{name}/attach", post(attach))
            .route("/v1/disks/{name}/detach", post(detach))
            .route("/v1/disks/{name}/prepare", post(prepare))
            .route("/v1/disks/{name}/handover", post(handover))
            .route("/v1/disks/{name}/cancel", post(cancel))
            .route("/v1/disks/{name}/migrate", post(migrate))
            .route("/v1/disks/{name}/rollback", post(rollback))
            .route("/v1/disks/{name}/verify", post(verify))
            .route("/v1/disks/{name}/cold-start", post(cold_start))
            .route("/v1/disks/{name}/wait", get(wait))
            .route("/metrics", get(prometheus))
            .fallback(|| async { Failure::usage("the control API has no such path; see docs/architecture.md") })
            .layer(DefaultBodyLimit::max(CONTROL_BODY_BYTES))
            .with_state(node);
        let Self { listener, path } = self;
        let served = axum::serve(listener, router).with_graceful_shutdown(stop.clone().cancelled_owned());
        let result = tokio::select! {
            result = served => result,
            // A command that waits for a migration must not keep the node from stopping.
            () = async { stop.cancelled().await; tokio::time::sleep(Duration::from_millis(500)).await } => Ok(()),
        };
        drop(path);
        result.map_err(|error| Failure::failed(format!("the control socket failed: {error}")))
    }
}

/// What only looks: on the control socket, and on the page for a browser.
pub fn views() -> Router<Arc<Node>> {
    Router::new()
        .route("/v1/status", get(all))
        .route("/v1/disks/{name}", get(one))
        .route("/v1/disks/{name}/history", get(history))
        .route("/v1/disks/{name}/map", get(map))
        .route("/v1/disks/{name}/report", get(report))
        .route("/v1/events", get(events))
}

/// A name in a path is checked here, so that a wrong one is told in the same words as everywhere.
fn name(text: &str) -> Result<DiskName, Failure> {
    text.parse().map_err(Failure::usage)
}

async fn all(State(node): State<Arc<Node>>) -> Json<NodeStatus> {
    Json(node.status())
}

async fn one(State(node): State<Arc<Node>>, UrlPath(disk): UrlPath<String>) -> Reply<DiskStatus> {
    Ok(Json(node.disk(&name(&disk)?)?.status()))
}

/// Does what must not stop half way, to its end: a client that leaves (an interrupted command) drops its question.
async fn to_the_end<T: Send + 'static>(work: impl Future<Output = Outcome<T>> + Send + 'static) -> Outcome<T> {
    tokio::spawn(work).await.map_err(|error| {
        Failure::failed(format!("the command broke off ({error}); look at `lazy-migrate status` and the node's log"))
    })?
}

async fn add(State(node): State<Arc<Node>>, Json(ask): Json<AddAsk>) -> Reply<DiskStatus> {
    Ok(Json(to_the_end(async move { node.add(ask.name, ask.image).await }).await?.status()))
}

async fn pull(State(node): State<Arc<Node>>, Json(ask): Json<PullAsk>) -> Reply<DiskStatus> {
    Ok(Json(to_the_end(async move { node.pull(ask).await }).await?.status()))
}

async fn remove(State(node): State<Arc<Node>>, UrlPath(disk): UrlPath<String>) -> Reply<Value> {
    let disk = name(&disk)?;
    let name = disk.clone();
    to_the_end(async move { node.remove(&name).await }).await?;
    Ok(Json(json!({ "name": disk, "removed": true })))
}

async fn attach(
    State(node): State<Arc<Node>>,
    UrlPath(disk): UrlPath<String>,
    Json(ask): Json<AttachAsk>,
) -> Reply<AttachReply> {
    let disk = name(&disk)?;
    let device = to_the_end(async move { node.attach(&disk, ask.via, ask.device).await }).await?;
    Ok(Json(AttachReply { device }))
}

async fn detach(State(node): State<Arc<Node>>, UrlPath(disk): UrlPath<String>) -> Reply<Value> {
    let disk = name(&disk)?;
    let name = disk.clone();
    to_the_end(async move { node.detach(&name).await }).await?;
    Ok(Json(json!({ "name": disk, "attached": false })))
}

async fn prepare(
    State(node): State<Arc<Node>>,
    UrlPath(disk): UrlPath<String>,
    Json(ask): Json<PrepareCommand>,
) -> Reply<DiskStatus> {
    let disk = name(&disk)?;
    node.prepare(&disk, &ask.to, ask.policy).await?;
    Ok(Json(node.disk(&disk)?.status()))
}

async fn handover(State(node): State<Arc<Node>>, UrlPath(disk): UrlPath<String>) -> Reply<DiskStatus> {
    let disk = name(&disk)?;
    node.handover(&disk).await?;
    Ok(Json(node.disk(&disk)?.status()))
}

async fn cancel(State(node): State<Arc<Node>>, UrlPath(disk): UrlPath<String>) -> Reply<DiskStatus> {
    let disk = name(&disk)?;
    node.cancel(&disk).await?;
    Ok(Json(node.disk(&disk)?.status()))
}

async fn migrate(
    State(node): State<Arc<Node>>,
    UrlPath(disk): UrlPath<String>,
    Json(ask): Json<MigrateAsk>,
) -> Result<Response, Failure> {
    Ok(lines(tokio_stream_of(node.migrate(&name(&disk)?, ask)?)))
}

/// One JSON object a line.
fn lines(stream: impl futures::Stream<Item = impl Serialize> + Send + 'static) -> Response {
    let lines = stream.map(|value| {
        let mut line = serde_json::to_vec(&value)?;
        line.push(b'\n');
        Ok::<_, serde_json::Error>(line)
    });
    ([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response()
}

fn tokio_stream_of<T>(mut receiver: tokio::sync::mpsc::Receiver<T>) -> impl futures::Stream<Item = T> {
    futures::stream::poll_fn(move |context| receiver.poll_recv(context))
}

async fn rollback(
    State(node): State<Arc<Node>>,
    UrlPath(disk): UrlPath<String>,
    Json(ask): Json<RollbackAsk>,
) -> Reply<RollbackReport> {
    let disk = name(&disk)?;
    if ask.plan {
        return Ok(Json(node.rollback_plan(&disk).await?));
    }
    // Once the destination was told to give the disk back, somebody has to take it.
    Ok(Json(to_the_end(async move { node.rollback(&disk, ask.wait).await }).await?))
}

async fn cold_start(State(node): State<Arc<Node>>, UrlPath(disk): UrlPath<String>) -> Reply<DiskStatus> {
    let disk = name(&disk)?;
    let status = to_the_end(async move {
        node.cold_start(&disk).await?;
        Ok(node.disk(&disk)?.status())
    });
    Ok(Json(status.await?))
}

async fn verify(State(node): State<Arc<Node>>, UrlPath(disk): UrlPath<String>) -> Reply<VerifyReport> {
    Ok(Json(node.verify(&name(&disk)?).await?))
}

#[derive(Deserialize)]
struct WaitQuery {
    #[serde(rename = "for")]
    what: WaitFor,
    timeout_ms: Option<u64>,
}

async fn wait(
    State(node): State<Arc<Node>>,
    UrlPath(disk): UrlPath<String>,
    Query(query): Query<WaitQuery>,
) -> Reply<DiskStatus> {
    let timeout = query.timeout_ms.map(Duration::from_millis);
    Ok(Json(node.wait(&name(&disk)?, query.what, timeout).await?))
}

async fn history(State(node): State<Arc<Node>>, UrlPath(disk): UrlPath<String>) -> Reply<Vec<Sample>> {
    Ok(Json(node.disk(&name(&disk)?)?.history().samples().to_vec()))
}

#[derive(Deserialize)]
struct CellsQuery {
    cells: Option<usize>,
}

impl CellsQuery {
    fn cells(&self) -> Outcome<usize> {
        match self.cells.unwrap_or(CELLS) {
            cells @ 1..=MAP_CELLS => Ok(cells),
            cells => Err(Failure::usage(format!("cells={cells}: a map is shown in 1 to {MAP_CELLS} cells"))),
        }
    }
}

async fn map(
    State(node): State<Arc<Node>>,
    UrlPath(disk): UrlPath<String>,
    Query(query): Query<CellsQuery>,
) -> Reply<Overview> {
    let (export, cells) = (node.disk(&name(&disk)?)?.export.clone(), query.cells()?);
    Ok(Json(aside(move || export.overview(cells)).await?))
}

async fn report(
    State(node): State<Arc<Node>>,
    UrlPath(disk): UrlPath<String>,
    Query(query): Query<CellsQuery>,
) -> Reply<Report> {
    let (disk, cells) = (node.disk(&name(&disk)?)?, query.cells()?);
    Ok(Json(aside(move || gather(&disk, cells)).await?))
}

#[derive(Deserialize)]
struct EventsQuery {
    #[serde(default)]
    after: u64,
    #[serde(default)]
    follow: bool,
    disk: Option<DiskName>,
}

async fn events(State(node): State<Arc<Node>>, Query(query): Query<EventsQuery>) -> Response {
    let EventsQuery { after, follow, disk } = query;
    let wanted = move |event: &Event| disk.as_ref().is_none_or(|disk| disk.as_str() == event.disk);
    let last = node.events().last();
    let stopping = Box::pin(node.stopping());
    let batches = futures::stream::unfold((node, after, last, stopping), move |state| async move {
        let (node, after, mut last, mut stopping) = state;
        loop {
            last.mark_unchanged();
            let events = node.events().after(after);
            if let Some(newest) = events.last().map(|event| event.seq) {
                return Some((events, (node, newest, last, stopping)));
            }
            tokio::select! {
                changed = last.changed(), if follow => changed.ok()?,
                () = &mut stopping, if follow => return None,
                else => return None,
            }
        }
    });
    lines(batches.flat_map(futures::stream::iter).filter(move |event| std::future::ready(wanted(event))))
}

async fn prometheus(State(node): State<Arc<Node>>) -> impl IntoResponse {
    let disks = node.disks();
    let waits: Vec<_> = disks.iter().map(|disk| disk.export.fault_waits()).collect();
    let status = node.status_of(&disks);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], metrics::page(&status, &waits))
}
