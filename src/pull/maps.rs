//! What the upstream says of its disk: heat and zeroes, read by BLOCK_STATUS.

use nbd::export::{Extent, STATE_ZERO};

use crate::limits::{MAX_ZERO_EXTENTS, STATUS_SPAN};
use crate::units::ByteRange;
use crate::upstream::{Connection, ReadError};

/// The meta context of holes and zeroes (protocol document, "Metadata querying").
const ALLOCATION: &str = "base:allocation";
/// Our own meta context of the write tracker: the flags are the score, 0 is never written.
const HEAT: &str = "lazy-migrate:heat";

/// What a connection to an upstream asks for.
pub(crate) const CONTEXTS: [&str; 2] = [ALLOCATION, HEAT];

/// The written ranges with their scores; empty from a server that does not know them.
pub(crate) async fn heat(connection: &dyn Connection) -> Result<Vec<(ByteRange, u32)>, ReadError> {
    let mut hot = Vec::new();
    walk(connection, HEAT, |range, flags| {
        if flags != 0 {
            hot.push((range, flags as u32));
        }
        true
    })
    .await?;
    Ok(hot)
}

/// The extents that read as zeroes, in order; empty from a server that does not tell.
pub(crate) async fn zeroes(connection: &dyn Connection) -> Result<Vec<ByteRange>, ReadError> {
    let mut zeroes: Vec<ByteRange> = Vec::new();
    walk(connection, ALLOCATION, |range, flags| {
        if flags & STATE_ZERO != 0 {
            match zeroes.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => zeroes.push(range),
            }
        }
        zeroes.len() < MAX_ZERO_EXTENTS
    })
    .await?;
    Ok(zeroes)
}

/// Goes over the whole disk, until `each` has enough. A server that refuses is treated as one that does not know.
async fn walk(
    connection: &dyn Connection,
    context: &str,
    mut each: impl FnMut(ByteRange, u64) -> bool,
) -> Result<(), ReadError> {
    if !connection.has_context(context) {
        return Ok(());
    }
    let mut at = 0;
    while at < connection.size() {
        let asked = (connection.size() - at).min(STATUS_SPAN);
        let extents = match connection.block_status(context, at, asked as u32).await {
            Ok(extents) => extents,
            Err(ReadError::Refused(why)) => {
                tracing::info!("the upstream does not tell {context} at {at}: {why}");
                return Ok(());
            }
            Err(lost) => return Err(lost),
        };
        let before = at;
        for Extent { length, flags } in extents {
            let end = at.saturating_add(length).min(connection.size());
            if at < end && !each(ByteRange::new(at, end), flags) {
                return Ok(());
            }
            at = end;
        }
        if at == before {
            tracing::info!("the upstream tells nothing of {context} at {at}");
            return Ok(());
        }
    }
    Ok(())
}
