//! The background pull as a task: reads the upstream's maps, then lets the background lanes run.

use std::sync::Arc;

use futures::future::join_all;
use tokio_util::sync::CancellationToken;

use super::maps;
use crate::fetch::Fetcher;
use crate::fetch::lane::{self, LaneKind};
use crate::fetch::links::{Link, Links};
use crate::fetch::write_out;
use crate::limits::{BACKGROUND_CONNECTIONS, MAPS_TIMEOUT, RETRY_MIN};
use crate::upstream::ReadError;

/// Runs until it is cancelled; does not even connect before the background pull is switched on.
pub(crate) async fn run(fetcher: Arc<Fetcher>, links: Arc<Links>, cancel: CancellationToken) {
    while !fetcher.background() {
        tokio::select! {
            () = cancel.cancelled() => return,
            () = fetcher.wake(lane_kind(0)).notified() => {}
        }
    }
    tokio::select! {
        () = cancel.cancelled() => return,
        () = load_maps(&fetcher, &links) => {}
    }
    let lanes = join_all(
        (0..BACKGROUND_CONNECTIONS)
            .map(|index| lane::run(fetcher.clone(), links.clone(), lane_kind(index), None, cancel.clone())),
    );
    tokio::join!(lanes, write_out::run(fetcher.clone(), cancel.clone()));
}

fn lane_kind(index: usize) -> LaneKind {
    LaneKind::Background(index)
}

/// Reads heat and zeroes over the demand connection; a few small requests, before any background request is sent.
async fn load_maps(fetcher: &Fetcher, links: &Links) {
    loop {
        let link = links.shared().await;
        match tokio::time::timeout(MAPS_TIMEOUT, load(fetcher, &link)).await {
            Ok(Ok(())) => return,
            Ok(Err(lost)) => tracing::info!("{lost}; reading the upstream's maps again"),
            Err(_) => {
                tracing::warn!("the upstream's maps take too long; pulling without the rest of them");
                return;
            }
        }
        tokio::time::sleep(RETRY_MIN).await;
    }
}

async fn load(fetcher: &Fetcher, link: &Link) -> Result<(), ReadError> {
    let heat = maps::heat(link.connection.as_ref()).await?;
    fetcher.with_order(|order| order.set_heat(&heat));
    let zeroes = maps::zeroes(link.connection.as_ref()).await?;
    fetcher.with_order(|order| order.set_zero(zeroes));
    Ok(())
}
