//! What the upstream says of its disk: heat, zeroes and what was not written there, read by BLOCK_STATUS.
//!
//! Several requests are on their way at a time, each for a span of its own, so that a large disk costs a few round trips
//! and not one a span. Answers are used in the order of the disk, as they come.

use futures::{Stream, StreamExt, stream};
use nbd::export::{Extent, STATE_ZERO};

use crate::limits::{STATUS_SPAN, STATUS_SPANS_AHEAD};
use crate::units::ByteRange;
use crate::upstream::{Connection, ReadError};

/// The meta context of holes and zeroes (protocol document, "Metadata querying").
const ALLOCATION: &str = "base:allocation";
/// Our own meta context of the write tracker: the flags are the score, 0 is never written.
const HEAT: &str = "lazy-migrate:heat";
/// Our own meta context of what is there, and of what was written since it came there.
const PRESENT: &str = "lazy-migrate:present";
/// Its flags of a block that came from elsewhere and was not written since: bit 0 present, bit 1 not dirty.
const PRESENT_AND_CLEAN: u64 = 1;

/// What a connection to an upstream asks for.
pub(crate) const CONTEXTS: [&str; 3] = [ALLOCATION, HEAT, PRESENT];

/// The written ranges with their scores; empty from a server that does not know them.
pub(crate) async fn heat(connection: &dyn Connection) -> Result<Vec<(ByteRange, u32)>, ReadError> {
    let mut hot = Vec::new();
    let mut spans =
        std::pin::pin!(spans(connection, HEAT, 0, |range, flags| (flags != 0).then_some((range, flags as u32))));
    while let Some(span) = spans.next().await {
        hot.extend(span?.known);
    }
    Ok(hot)
}

/// The extents that read as zeroes, from `from` on, span by span; nothing from a server that does not tell.
pub(crate) fn zeroes(
    connection: &dyn Connection,
    from: u64,
) -> impl Stream<Item = Result<Span<ByteRange>, ReadError>> + '_ {
    spans(connection, ALLOCATION, from, |range, flags| (flags & STATE_ZERO != 0).then_some(range))
}

/// The extents that were not written at the upstream since they came there, from `from` on, span by span; nothing from a
/// server that does not tell.
pub(crate) fn unwritten(
    connection: &dyn Connection,
    from: u64,
) -> impl Stream<Item = Result<Span<ByteRange>, ReadError>> + '_ {
    spans(connection, PRESENT, from, |range, flags| (flags == PRESENT_AND_CLEAN).then_some(range))
}

/// What the server has told of the disk, up to `end`.
pub(crate) struct Span<T> {
    pub(crate) known: Vec<T>,
    pub(crate) end: u64,
    /// It told all of it.
    whole: bool,
}

/// Goes over the disk until its end, or until the server stops to tell: one that refuses is treated as one that does not
/// know.
fn spans<'a, T: 'a>(
    connection: &'a dyn Connection,
    context: &'static str,
    from: u64,
    pick: impl Fn(ByteRange, u64) -> Option<T> + Copy + 'a,
) -> impl Stream<Item = Result<Span<T>, ReadError>> + 'a {
    let size = if connection.has_context(context) { connection.size() } else { 0 };
    let starts = (from..size).step_by(STATUS_SPAN as usize);
    stream::iter(starts)
        .map(move |start| ask(connection, context, ByteRange::new(start, size.min(start + STATUS_SPAN)), pick))
        .buffered(STATUS_SPANS_AHEAD)
        // Behind a gap nothing is of use.
        .scan(true, |goes_on, span| {
            let this = std::mem::replace(goes_on, matches!(&span, Ok(Span { whole: true, .. })));
            std::future::ready(this.then_some(span))
        })
}

async fn ask<T>(
    connection: &dyn Connection,
    context: &str,
    span: ByteRange,
    pick: impl Fn(ByteRange, u64) -> Option<T>,
) -> Result<Span<T>, ReadError> {
    let (mut known, mut at) = (Vec::new(), span.start);
    while at < span.end {
        let extents = match connection.block_status(context, at, (span.end - at) as u32).await {
            Ok(extents) => extents,
            Err(ReadError::Refused(why)) => {
                tracing::info!("the upstream does not tell {context} at {at}: {why}");
                break;
            }
            Err(lost) => return Err(lost),
        };
        let before = at;
        for Extent { length, flags } in extents {
            // The last one may go on behind what was asked: there the next request has the word.
            let end = at.saturating_add(length).min(span.end);
            if at < end {
                known.extend(pick(ByteRange::new(at, end), flags));
            }
            at = end;
        }
        if at == before {
            tracing::info!("the upstream tells nothing of {context} at {at}");
            break;
        }
    }
    Ok(Span { known, end: at, whole: at >= span.end })
}

#[cfg(test)]
mod tests {
    use futures::future::BoxFuture;

    use super::*;
    use crate::upstream::ReadDone;

    /// A disk whose every second half span is zero. It answers less than was asked, or more, and nothing from `silent` on.
    struct Striped {
        size: u64,
        silent: u64,
    }

    const HALF: u64 = STATUS_SPAN / 2;

    impl Connection for Striped {
        fn size(&self) -> u64 {
            self.size
        }
        fn has_context(&self, name: &str) -> bool {
            name == ALLOCATION
        }
        fn read(&self, _: u64, _: u32, _: ReadDone) {}
        fn block_status(&self, _: &str, offset: u64, _: u32) -> BoxFuture<'static, Result<Vec<Extent>, ReadError>> {
            let answer = if offset >= self.silent {
                Err(ReadError::Refused("it has had enough".into()))
            } else if offset % STATUS_SPAN < HALF {
                Ok(vec![Extent { length: HALF - offset % HALF, flags: STATE_ZERO }])
            } else {
                Ok(vec![Extent { length: 2 * STATUS_SPAN, flags: 0 }])
            };
            Box::pin(async move {
                // Later spans are answered first.
                for _ in 0..32_u64.saturating_sub(offset / STATUS_SPAN) {
                    tokio::task::yield_now().await;
                }
                answer
            })
        }
        fn closed(&self) -> BoxFuture<'static, String> {
            Box::pin(std::future::pending())
        }
        fn close(&self) -> BoxFuture<'static, ()> {
            Box::pin(std::future::ready(()))
        }
    }

    async fn told(disk: &Striped, from: u64) -> (Vec<ByteRange>, u64) {
        let (mut all, mut end) = (Vec::new(), from);
        let mut spans = std::pin::pin!(zeroes(disk, from));
        while let Some(span) = spans.next().await {
            let span = span.unwrap();
            all.extend(span.known);
            end = span.end;
        }
        (all, end)
    }

    #[tokio::test]
    async fn spans_that_are_asked_for_together_are_told_in_order_up_to_the_first_gap() {
        let size = 9 * STATUS_SPAN + 4096;
        let stripes = |count| (0..count).map(|span| ByteRange::at(span * STATUS_SPAN, HALF)).collect::<Vec<_>>();
        let mut wanted = stripes(9);
        wanted.push(ByteRange::new(9 * STATUS_SPAN, size));
        let mut disk = Striped { size, silent: u64::MAX };
        assert_eq!(told(&disk, 0).await, (wanted.clone(), size));
        let from = 2 * STATUS_SPAN + HALF;
        assert_eq!(told(&disk, from).await.1, size);
        disk.silent = 5 * STATUS_SPAN + HALF;
        assert_eq!(told(&disk, 0).await, (stripes(6), 5 * STATUS_SPAN + HALF));
        assert_eq!(heat(&disk).await, Ok(Vec::new()), "it knows none");
    }
}
