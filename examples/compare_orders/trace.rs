//! A recorded trace, as text: `disk BYTES`; `data BLOCK BLOCKS` for what is not zero; after `source` and after `destination` one
//! line for each request, `MICROSECONDS r|w BLOCK BLOCKS`, with the time since the request before. Blocks are of 4 KiB.

use std::path::Path;
use std::time::Duration;

use lazy_migrate::units::{BlockIndex, BlockRange};

/// One request.
pub struct Access {
    /// Since the request before.
    pub gap: Duration,
    /// Whether it writes.
    pub writes: bool,
    /// Where.
    pub blocks: BlockRange,
}

/// What a disk was asked for, before and after a move.
#[derive(Default)]
pub struct Trace {
    /// Bytes of the disk.
    pub size: u64,
    /// What is not zero.
    pub data: Vec<BlockRange>,
    /// Writes at the source.
    pub source: Vec<Access>,
    /// What happens at the destination.
    pub destination: Vec<Access>,
}

/// Not a trace.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The file.
    #[error("cannot be read: {0}")]
    Read(#[from] std::io::Error),
    /// A line of it.
    #[error("line {0} is not of a trace")]
    Line(usize),
}

impl Trace {
    /// Reads a file.
    ///
    /// # Errors
    /// It cannot be read, or is something else.
    pub fn load(path: &Path) -> Result<Trace, TraceError> {
        let text = std::fs::read_to_string(path)?;
        let mut trace = Trace::default();
        let mut moved = false;
        for (number, line) in text.lines().enumerate() {
            let words: Vec<&str> = line.split(' ').collect();
            trace.line(&words, &mut moved).ok_or(TraceError::Line(number + 1))?;
        }
        Ok(trace)
    }

    fn line(&mut self, words: &[&str], moved: &mut bool) -> Option<()> {
        let range = |first: &str, blocks: &str| {
            let first: u64 = first.parse().ok()?;
            Some(BlockRange::new(BlockIndex(first), BlockIndex(first.checked_add(blocks.parse().ok()?)?)))
        };
        match words {
            ["disk", bytes] => self.size = bytes.parse().ok()?,
            ["data", first, blocks] => self.data.push(range(first, blocks)?),
            ["source"] => *moved = false,
            ["destination"] => *moved = true,
            [gap, kind @ ("r" | "w"), first, blocks] => {
                let gap = Duration::from_micros(gap.parse().ok()?);
                let access = Access { gap, writes: *kind == "w", blocks: range(first, blocks)? };
                if *moved { self.destination.push(access) } else { self.source.push(access) }
            }
            _ => return None,
        }
        Some(())
    }
}
