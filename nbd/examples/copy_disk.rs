//! Copies a disk from one NBD server to another, and leaves out what the source knows to be zeroes:
//! `copy_disk nbd://source/disk nbd+unix:///copy?socket=/tmp/copy.sock`.
//!
//! The target has to be at least as large; what it holds where the source has zeroes is zeroed.

use std::error::Error;

use futures::{StreamExt, TryStreamExt, stream};
use nbd::client::{Client, ClientError, ConnectOptions, Reconnect};
use nbd::export::{STATE_ZERO, ZeroMode};
use nbd::uri::NbdUri;
use nbd::wire::{BASE_ALLOCATION, TransmissionFlags};

/// Length of one read and write.
const PIECE: u64 = 1 << 20;
/// Pieces that are copied at a time.
const AT_A_TIME: usize = 8;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1).map(|uri| uri.parse::<NbdUri>());
    let (Some(source), Some(target)) = (arguments.next(), arguments.next()) else {
        return Err("usage: copy_disk SOURCE-URI TARGET-URI".into());
    };
    // A server that is restarted meanwhile is waited for.
    let options = ConnectOptions {
        contexts: vec![BASE_ALLOCATION.to_owned()],
        reconnect: Some(Reconnect::default()),
        ..ConnectOptions::default()
    };
    let source = Client::connect(&source?, &options).await?;
    let target = Client::connect(&target?, &options).await?;
    let size = source.info().size;
    if target.info().size < size {
        return Err(format!("the target has {} bytes, and the source {size}", target.info().size).into());
    }

    let can_tell = !source.info().contexts.is_empty();
    let can_zero = target.info().flags.contains(TransmissionFlags::SEND_WRITE_ZEROES);
    let mut at = 0;
    while at < size {
        let (length, flags) = match can_tell {
            true => {
                // One extent at least; the answer may end before the disk does.
                let extents = source.block_status(BASE_ALLOCATION, at, size - at).await?;
                extents.first().map_or((size - at, 0), |extent| (extent.length, extent.flags))
            }
            false => (size - at, 0),
        };
        if flags & STATE_ZERO != 0 && can_zero {
            target.write_zeroes(at, length, ZeroMode::default(), false).await?;
        } else {
            copy(&source, &target, at, length).await?;
        }
        at += length;
    }
    target.flush().await?;
    source.close().await;
    target.close().await;
    Ok(())
}

async fn copy(source: &Client, target: &Client, start: u64, length: u64) -> Result<(), ClientError> {
    let end = start + length;
    stream::iter((start..end).step_by(PIECE as usize))
        .map(|at| async move {
            let data = source.read(at, (end - at).min(PIECE) as usize).await?;
            target.write(at, data, false).await
        })
        .buffer_unordered(AT_A_TIME)
        .try_collect()
        .await
}
