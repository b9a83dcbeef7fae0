//! What a disk may hold: for each cell the values that were written, in order, and how far they were acknowledged and
//! flushed. Clients never have two changes of one cell under way, so that there is an order.

use std::ops::Range;

use super::dice::Dice;
use super::shape::{Shape, Value};

#[derive(Clone, Debug)]
struct Cell {
    values: Vec<Value>,
    acknowledged: usize,
    flushed: usize,
}

/// See the module's text.
#[derive(Clone, Debug)]
pub struct Model {
    cells: Vec<Cell>,
}

/// How far each cell of a range, or of the disk, was acknowledged at some moment.
pub type Mark = Vec<usize>;

impl Model {
    /// A disk whose content is known and durable.
    pub fn new(content: &[Value]) -> Self {
        let cell = |value: &Value| Cell { values: vec![*value], acknowledged: 0, flushed: 0 };
        Self { cells: content.iter().map(cell).collect() }
    }

    /// A change is sent: from now on a reader may see it.
    pub fn send(&mut self, cells: &Range<usize>, value: Value) -> Mark {
        let of = |cell: &mut Cell| {
            cell.values.push(value);
            cell.values.len() - 1
        };
        self.cells[cells.clone()].iter_mut().map(of).collect()
    }

    /// The change is acknowledged: from now on a reader must see it, or a later one.
    pub fn acknowledge(&mut self, cells: &Range<usize>, sent: &[usize]) {
        for (cell, sent) in self.cells[cells.clone()].iter_mut().zip(sent) {
            cell.acknowledged = cell.acknowledged.max(*sent);
        }
    }

    /// How far the cells are acknowledged now.
    pub fn mark(&self, cells: &Range<usize>) -> Mark {
        self.cells[cells.clone()].iter().map(|cell| cell.acknowledged).collect()
    }

    /// A flush that was sent when the whole disk stood at `mark` is answered.
    pub fn flushed(&mut self, mark: &[usize]) {
        for (cell, mark) in self.cells.iter_mut().zip(mark) {
            cell.flushed = cell.flushed.max(*mark);
        }
    }

    /// The same for a change that was acknowledged as durable.
    pub fn flushed_part(&mut self, cells: &Range<usize>, sent: &[usize]) {
        for (cell, sent) in self.cells[cells.clone()].iter_mut().zip(sent) {
            cell.flushed = cell.flushed.max(*sent);
        }
    }

    /// The first cell of a read, begun when its range stood at `mark`, that it must not have seen so.
    pub fn wrong_read(&self, cells: &Range<usize>, mark: &[usize], seen: &[Value]) -> Option<usize> {
        let fits = |at: usize| self.cells[cells.start + at].values[mark[at]..].contains(&seen[at]);
        (0..seen.len()).find(|at| !fits(*at)).map(|at| cells.start + at)
    }

    /// Whether a cell may hold a value while the host has its power.
    pub fn may_hold(&self, cell: usize, value: Value) -> bool {
        let cell = &self.cells[cell];
        cell.values[cell.acknowledged..].contains(&value)
    }

    /// Whether a cell may hold a value after a power loss.
    pub fn may_survive(&self, cell: usize, value: Value) -> bool {
        let cell = &self.cells[cell];
        cell.values[cell.flushed..].contains(&value)
    }

    /// Nothing was ever written to it: it is still this content.
    pub fn is_untouched(&self, content: &[Value]) -> bool {
        self.cells.iter().zip(content).all(|(cell, value)| cell.values == [*value])
    }

    /// What a cell may hold, for people.
    pub fn describe(&self, cell: usize) -> String {
        let Cell { values, acknowledged, flushed } = &self.cells[cell];
        format!("cell {cell}: {values:?}, acknowledged {}, flushed {}", values[*acknowledged], values[*flushed])
    }
}

/// A range of cells for a client, short ones being more likely; often aligned to blocks.
pub fn some_cells(dice: &mut Dice, shape: Shape) -> Range<usize> {
    let start = dice.between(0, shape.cells as u64) as usize;
    let length = if dice.percent(70) { dice.between(1, 6) } else { dice.between(4, 16) } as usize;
    let mut cells = start..(start + length).min(shape.cells);
    if dice.percent(40) {
        cells = shape.cells_of(shape.cover(&cells));
    }
    cells
}
