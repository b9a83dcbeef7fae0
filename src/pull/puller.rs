//! The background pull as a task: reads the upstream's maps, and lets the background lanes run. They dial meanwhile, and
//! pull as far as the maps are known.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::future::join_all;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use super::{PullOrder, maps};
use crate::fetch::Fetcher;
use crate::fetch::lane::{self, LaneKind};
use crate::fetch::links::{Link, Links};
use crate::fetch::write_out;
use crate::limits::{BACKGROUND_CONNECTIONS, MAPS_TIMEOUT, RETRY_MIN};
use crate::thread::run_on;
use crate::upstream::ReadError;

/// Runs until it is cancelled; does not even connect before the background pull is switched on. Of a disk that `returns`
/// first all that was not written elsewhere is taken as it is.
pub(crate) async fn run(fetcher: Arc<Fetcher>, links: Arc<Links>, returns: bool, cancel: CancellationToken) {
    while !fetcher.background() {
        tokio::select! {
            () = cancel.cancelled() => return,
            () = fetcher.wake(lane_kind(0)).notified() => {}
        }
    }
    if returns {
        tokio::select! {
            () = cancel.cancelled() => return,
            () = keep_unwritten(&fetcher, &links) => {}
        }
    }
    fetcher.with_order(PullOrder::expect_zero);
    let lanes = join_all((0..BACKGROUND_CONNECTIONS).map(|index| {
        let lane = lane::run(fetcher.clone(), links.clone(), lane_kind(index), cancel.clone());
        run_on(links.runtime_of(index), lane.in_current_span())
    }));
    let maps = async {
        tokio::select! {
            () = cancel.cancelled() => {}
            () = load_maps(&fetcher, &links) => {}
        }
    };
    tokio::join!(maps, lanes, write_out::run(fetcher.clone(), cancel.clone()));
    links.end_threads();
}

fn lane_kind(index: usize) -> LaneKind {
    LaneKind::Background(index)
}

/// Asks the upstream, which nobody writes to any more, what was not written since the disk left here, and takes it as it
/// is. What is not told is fetched.
async fn keep_unwritten(fetcher: &Fetcher, links: &Links) {
    let mut known = 0;
    loop {
        let link = links.shared().await;
        match keep(fetcher, &link, &mut known).await {
            Ok(()) => return,
            Err(Stop::Slow) => {
                tracing::warn!(
                    "the upstream takes too long to tell what was written there; fetching the rest of the disk"
                );
                return;
            }
            Err(Stop::Lost(lost)) => tracing::info!("{lost}; reading the rest of what was written there"),
        }
        tokio::time::sleep(RETRY_MIN).await;
    }
}

async fn keep(fetcher: &Fetcher, link: &Link, known: &mut u64) -> Result<(), Stop> {
    let mut spans = std::pin::pin!(maps::unwritten(link.connection.as_ref(), *known));
    while let Some(span) = within(MAPS_TIMEOUT, spans.next()).await? {
        let span = span.map_err(Stop::Lost)?;
        for range in span.known {
            fetcher.keep(range);
            // It goes over the map: others want to be served meanwhile.
            tokio::task::yield_now().await;
        }
        *known = span.end;
    }
    Ok(())
}

/// Reads heat and zeroes over the demand connection, a few small requests at a time.
async fn load_maps(fetcher: &Fetcher, links: &Links) {
    let mut known = Known { heat: false, zero: 0 };
    loop {
        let link = links.shared().await;
        match load(fetcher, &link, &mut known).await {
            Ok(()) => break,
            Err(Stop::Slow) => {
                tracing::warn!("the upstream's maps take too long; pulling without the rest of them");
                break;
            }
            Err(Stop::Lost(lost)) => tracing::info!("{lost}; reading the rest of the upstream's maps"),
        }
        tokio::time::sleep(RETRY_MIN).await;
    }
    extend(fetcher, [], u64::MAX);
}

/// How much of the maps has been read.
struct Known {
    heat: bool,
    zero: u64,
}

enum Stop {
    Lost(ReadError),
    Slow,
}

async fn load(fetcher: &Fetcher, link: &Link, known: &mut Known) -> Result<(), Stop> {
    let connection = link.connection.as_ref();
    if !known.heat {
        let heat = within(MAPS_TIMEOUT, maps::heat(connection)).await?.map_err(Stop::Lost)?;
        fetcher.with_order(|order| order.set_heat(&heat));
        known.heat = true;
    }
    let mut spans = std::pin::pin!(maps::zeroes(connection, known.zero));
    while let Some(span) = within(MAPS_TIMEOUT, spans.next()).await? {
        let span = span.map_err(Stop::Lost)?;
        known.zero = span.end;
        if !extend(fetcher, span.known, span.end) {
            break;
        }
    }
    Ok(())
}

async fn within<T>(time: Duration, work: impl Future<Output = T>) -> Result<T, Stop> {
    timeout(time, work).await.map_err(|_| Stop::Slow)
}

/// More is known of the zeroes; whether there is room for more of them.
fn extend(fetcher: &Fetcher, zeroes: impl IntoIterator<Item = crate::units::ByteRange>, end: u64) -> bool {
    let room = fetcher.with_order(|order| order.add_zero(zeroes, end));
    fetcher.wake_background();
    room
}
