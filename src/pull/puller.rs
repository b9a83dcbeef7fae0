//! The background pull as a task: reads the upstream's maps, then lets the background lanes run.

use std::sync::Arc;

use futures::future::join_all;
use tokio_util::sync::CancellationToken;

use super::maps;
use crate::fetch::Fetcher;
use crate::fetch::lane::{self, LaneKind, wait};
use crate::fetch::links::{Link, Links};
use crate::limits::{BACKGROUND_CONNECTIONS, MAPS_TIMEOUT, RETRY_MAX, RETRY_MIN};
use crate::upstream::ReadError;

/// Runs until it is cancelled; does not even connect before the background pull is switched on.
pub(crate) async fn run(fetcher: Arc<Fetcher>, links: Arc<Links>, cancel: CancellationToken) {
    while !fetcher.background() {
        tokio::select! {
            () = cancel.cancelled() => return,
            () = fetcher.wake(lane_kind(0)).notified() => {}
        }
    }
    let Some(link) = load_maps(&fetcher, &links, &cancel).await else { return };
    let mut first = Some(link);
    join_all(
        (0..BACKGROUND_CONNECTIONS)
            .map(|index| lane::run(fetcher.clone(), links.clone(), lane_kind(index), first.take(), cancel.clone())),
    )
    .await;
}

fn lane_kind(index: usize) -> LaneKind {
    LaneKind::Background(index)
}

/// Reads heat and zeroes; the connection is then used for the pull. `None`: cancelled.
async fn load_maps(fetcher: &Fetcher, links: &Links, cancel: &CancellationToken) -> Option<Link> {
    let mut pause = RETRY_MIN;
    loop {
        let dialled = tokio::select! {
            () = cancel.cancelled() => return None,
            dialled = links.dial(lane_kind(0)) => dialled,
        };
        match dialled {
            Ok(link) => {
                let loading = tokio::time::timeout(MAPS_TIMEOUT, load(fetcher, &link));
                let loaded = tokio::select! {
                    () = cancel.cancelled() => return None,
                    loaded = loading => loaded,
                };
                match loaded {
                    Ok(Ok(())) => return Some(link),
                    Ok(Err(lost)) => tracing::info!("{lost}; reading the upstream's maps again"),
                    Err(_) => {
                        tracing::warn!("the upstream's maps take too long; pulling without the rest of them");
                        return Some(link);
                    }
                }
            }
            Err(error) => {
                pause = pause.max(links.failed(lane_kind(0), &error));
            }
        }
        if wait(pause, cancel).await {
            return None;
        }
        pause = (pause * 2).min(RETRY_MAX);
    }
}

async fn load(fetcher: &Fetcher, link: &Link) -> Result<(), ReadError> {
    let heat = maps::heat(link.connection.as_ref()).await?;
    fetcher.with_order(|order| order.set_heat(&heat));
    let zeroes = maps::zeroes(link.connection.as_ref()).await?;
    fetcher.with_order(|order| order.set_zero(zeroes));
    Ok(())
}
