//! `status --watch` on a terminal: all disks, redrawn in place, until the person leaves.
//!
//! [`terminal`] takes the terminal and gives it back whatever happens, [`screen`] says what stands on it (pure), and the loop
//! here asks the node. A node that has gone is told in the view, and looked for until it is back.

mod screen;
mod terminal;

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::Duration;

use crossterm::event::{Event, EventStream, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use futures::StreamExt;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{MissedTickBehavior, interval};

use super::status::look;
use crate::control::client::ControlClient;
use crate::control::status::DiskStatus;
use crate::error::{Failure, Outcome};
use crate::export::Overview;
use crate::limits::MAP_CELLS;
use crate::node::DiskName;
use screen::{Screen, Style};
use terminal::Terminal;

/// How often the node is asked.
const INTERVAL: Duration = Duration::from_millis(500);

/// A node that does not answer in this time is shown as gone.
const PATIENCE: Duration = Duration::from_secs(3);

/// Whether there is a terminal to draw on, with a person at it.
pub(super) fn possible() -> bool {
    std::io::stdout().is_terminal() && std::io::stdin().is_terminal()
}

/// What a key or a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    Leave,
    /// So many disks down, or up.
    Scroll(isize),
    Redraw,
}

/// Shows the disks, or one of them, until the person or a signal ends it. A node that is not there at the beginning is a failure.
pub(super) async fn run(client: &ControlClient, name: Option<DiskName>) -> Outcome<()> {
    let broken = |error: std::io::Error| Failure::failed(format!("cannot draw on the terminal: {error}"));
    let disks = look(client, name.as_ref()).await?;
    let mut terminate = signal(SignalKind::terminate()).map_err(Failure::failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Failure::failed)?;
    let mut terminal = Terminal::take().map_err(broken)?;
    let mut keys = EventStream::new();
    let mut tick = interval(INTERVAL);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut view = View { screen: Screen::of(disks), style: Style::of_environment() };
    loop {
        let wish = tokio::select! {
            _ = terminate.recv() => Wish::Leave,
            _ = interrupt.recv() => Wish::Leave,
            event = keys.next() => match event {
                Some(event) => wish_of(&event.map_err(broken)?),
                None => Wish::Leave,
            },
            _ = tick.tick() => {
                let size = Terminal::size().map_err(broken)?;
                // Keys are heard also while a node does not answer.
                tokio::select! {
                    () = view.ask(client, name.as_ref(), size) => Wish::Redraw,
                    _ = terminate.recv() => Wish::Leave,
                    _ = interrupt.recv() => Wish::Leave,
                    event = keys.next() => match event {
                        Some(event) => wish_of(&event.map_err(broken)?),
                        None => Wish::Leave,
                    },
                }
            }
        };
        let size = Terminal::size().map_err(broken)?;
        match wish {
            Wish::Leave => return Ok(()),
            Wish::Scroll(by) => view.screen.scroll(by, size),
            Wish::Redraw => {}
        }
        let lines = view.screen.lines(size, &view.style);
        terminal.draw(&lines, view.style.colour).map_err(broken)?;
    }
}

struct View {
    screen: Screen,
    style: Style,
}

impl View {
    /// Asks the node how things are, and for the maps of the disks that are in sight.
    async fn ask(&mut self, client: &ControlClient, name: Option<&DiskName>, size: (usize, usize)) {
        let asked = tokio::time::timeout(PATIENCE, async {
            let disks = look(client, name).await?;
            let mut maps = BTreeMap::new();
            for disk in self.screen.in_sight(&disks, size) {
                let cells = screen::strip_width(size.0).clamp(1, MAP_CELLS);
                let path = format!("/v1/disks/{}/map?cells={cells}", disk.name);
                // One that was removed in between has no map.
                if let Ok(map) = client.get::<Overview>(&path).await {
                    maps.insert(disk.name.clone(), map);
                }
            }
            Ok::<(Vec<DiskStatus>, BTreeMap<String, Overview>), Failure>((disks, maps))
        });
        let answer =
            asked.await.unwrap_or_else(|_| Err(Failure::timed_out("the node does not answer; look at its log")));
        match answer {
            Ok((disks, maps)) => {
                (self.screen.disks, self.screen.maps) = (disks, maps);
                self.screen.gone = None;
            }
            Err(failure) => self.screen.gone = Some(failure.to_string()),
        }
    }
}

fn wish_of(event: &Event) -> Wish {
    let Event::Key(KeyEvent { code, modifiers, kind: KeyEventKind::Press | KeyEventKind::Repeat, .. }) = event else {
        return Wish::Redraw;
    };
    match code {
        KeyCode::Char('c' | 'd') if modifiers.contains(KeyModifiers::CONTROL) => Wish::Leave,
        KeyCode::Char('q' | 'Q') | KeyCode::Esc => Wish::Leave,
        KeyCode::Down | KeyCode::Char('j') => Wish::Scroll(1),
        KeyCode::Up | KeyCode::Char('k') => Wish::Scroll(-1),
        KeyCode::PageDown | KeyCode::Char(' ') => Wish::Scroll(screen::PAGE),
        KeyCode::PageUp => Wish::Scroll(-screen::PAGE),
        KeyCode::Home => Wish::Scroll(isize::MIN),
        KeyCode::End => Wish::Scroll(isize::MAX),
        _ => Wish::Redraw,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_out_is_heard_and_a_plain_c_is_none() {
        let key = |code, modifiers| wish_of(&Event::Key(KeyEvent::new(code, modifiers)));
        for (code, modifiers) in [
            (KeyCode::Char('q'), KeyModifiers::NONE),
            (KeyCode::Esc, KeyModifiers::NONE),
            (KeyCode::Char('c'), KeyModifiers::CONTROL),
        ] {
            assert_eq!(key(code, modifiers), Wish::Leave, "{code:?}");
        }
        assert_eq!(key(KeyCode::Char('c'), KeyModifiers::NONE), Wish::Redraw);
        assert_eq!(key(KeyCode::Down, KeyModifiers::NONE), Wish::Scroll(1));
        assert_eq!(wish_of(&Event::Resize(10, 10)), Wish::Redraw);
    }
}
