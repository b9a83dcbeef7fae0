//! `add`, `pull`, `remove`, `attach`, `detach`.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::answers::{Answer, bytes};
use super::usage;
use crate::control::api::{AddAsk, AttachAsk, AttachReply, PullAsk};
use crate::control::client::ControlClient;
use crate::control::status::DiskStatus;
use crate::device::Via;
use crate::error::{Failure, Outcome};
use crate::node::DiskName;
use crate::pull::Order;

pub(super) async fn add(client: &ControlClient, answer: &Answer, name: DiskName, image: PathBuf) -> Outcome<()> {
    let ask = AddAsk { image: absolute(&image)?, name };
    let status: DiskStatus = client.post("/v1/disks", &ask).await?;
    answer.print(&status, || format!("{}: {} from {}", status.name, bytes(status.size), ask.image.display()))
}

pub(super) fn pull_ask(
    name: DiskName,
    from: String,
    store: Option<PathBuf>,
    order: Order,
    rate: Option<u64>,
    background: bool,
) -> Outcome<PullAsk> {
    from.parse::<nbd::uri::NbdUri>().map_err(|error| usage(format!("--from {from}: {error}")))?;
    if rate == Some(0) {
        return Err(usage("--rate 0 would never end; use --no-background to fetch only what is asked for"));
    }
    let store = store.map(|path| absolute(&path)).transpose()?;
    Ok(PullAsk { name, from, store, order, rate, background })
}

pub(super) async fn pull(client: &ControlClient, answer: &Answer, ask: PullAsk) -> Outcome<()> {
    let status: DiskStatus = client.post("/v1/pulls", &ask).await?;
    answer.print(&status, || {
        format!(
            "{}: {} from {}, serving; `lazy-migrate wait {}` waits for all of it",
            status.name,
            bytes(status.size),
            ask.from,
            status.name
        )
    })
}

pub(super) async fn remove(client: &ControlClient, answer: &Answer, name: DiskName) -> Outcome<()> {
    let reply: Value = client.delete(&format!("/v1/disks/{name}")).await?;
    answer.print(&reply, || format!("{name}: removed"))
}

pub(super) async fn attach(
    client: &ControlClient,
    answer: &Answer,
    name: DiskName,
    device: Option<PathBuf>,
    via: Via,
) -> Outcome<()> {
    let ask = AttachAsk { device, via };
    let reply: AttachReply = client.post(&format!("/v1/disks/{name}/attach"), &ask).await?;
    answer.print(&reply, || reply.device.display().to_string())
}

pub(super) async fn detach(client: &ControlClient, answer: &Answer, name: DiskName) -> Outcome<()> {
    let reply: Value = client.post(&format!("/v1/disks/{name}/detach"), &json!({})).await?;
    answer.print(&reply, || format!("{name}: detached"))
}

/// The node may run in another directory.
fn absolute(path: &Path) -> Outcome<PathBuf> {
    std::path::absolute(path)
        .map_err(|error| Failure::failed(format!("cannot make {} absolute: {error}", path.display())))
}
