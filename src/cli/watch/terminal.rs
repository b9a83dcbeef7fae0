//! The terminal, taken and given back.

use std::io::{self, Stdout, Write};

use crossterm::cursor::{Hide, MoveTo, Show};
use crossterm::style::{Attribute, Color, Print, ResetColor, SetAttribute, SetForegroundColor};
use crossterm::terminal::{
    self, BeginSynchronizedUpdate, Clear, ClearType, DisableLineWrap, EnableLineWrap, EndSynchronizedUpdate,
    EnterAlternateScreen, LeaveAlternateScreen,
};
use crossterm::{execute, queue};

use super::screen::{Ink, Line};

/// The terminal while it is ours: another screen, no echo, no cursor. Given back when this is dropped.
pub(super) struct Terminal {
    out: Stdout,
}

impl Terminal {
    /// Takes it.
    pub(super) fn take() -> io::Result<Self> {
        terminal::enable_raw_mode()?;
        // From here on the drop gives it back.
        let mut terminal = Self { out: io::stdout() };
        execute!(terminal.out, EnterAlternateScreen, Hide, DisableLineWrap)?;
        Ok(terminal)
    }

    /// Columns and rows.
    pub(super) fn size() -> io::Result<(usize, usize)> {
        let (columns, rows) = terminal::size()?;
        Ok((usize::from(columns), usize::from(rows)))
    }

    /// Shows these lines, and nothing else.
    pub(super) fn draw(&mut self, lines: &[Line], colour: bool) -> io::Result<()> {
        queue!(self.out, BeginSynchronizedUpdate)?;
        for (row, line) in lines.iter().enumerate() {
            queue!(self.out, MoveTo(0, u16::try_from(row).unwrap_or(u16::MAX)))?;
            for (ink, text) in line.pieces() {
                self.dip(*ink, colour)?;
                queue!(self.out, Print(text))?;
            }
            self.dip(Ink::Plain, colour)?;
            queue!(self.out, Clear(ClearType::UntilNewLine))?;
        }
        if let Ok(below) = u16::try_from(lines.len()) {
            queue!(self.out, MoveTo(0, below), Clear(ClearType::FromCursorDown))?;
        }
        queue!(self.out, EndSynchronizedUpdate)?;
        self.out.flush()
    }

    fn dip(&mut self, ink: Ink, colour: bool) -> io::Result<()> {
        queue!(self.out, SetAttribute(Attribute::Reset))?;
        if ink == Ink::Title {
            queue!(self.out, SetAttribute(Attribute::Bold))?;
        }
        if !colour {
            return Ok(());
        }
        match ink {
            Ink::Plain | Ink::Title => queue!(self.out, ResetColor)?,
            Ink::Good => queue!(self.out, SetForegroundColor(Color::Green))?,
            Ink::Written => queue!(self.out, SetForegroundColor(Color::Blue))?,
            Ink::Warm => queue!(self.out, SetForegroundColor(Color::Yellow))?,
            Ink::Bad => queue!(self.out, SetForegroundColor(Color::Red))?,
            Ink::Faint => queue!(self.out, SetForegroundColor(Color::DarkGrey))?,
        }
        if ink == Ink::Title {
            queue!(self.out, SetAttribute(Attribute::Bold))?;
        }
        Ok(())
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // A terminal that has gone needs nothing back.
        let _ = execute!(self.out, EnableLineWrap, Show, LeaveAlternateScreen);
        let _ = terminal::disable_raw_mode();
    }
}
