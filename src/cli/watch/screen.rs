//! What stands on the screen: lines of coloured pieces, for a given size. Pure.

use std::collections::BTreeMap;

use crate::cli::answers::bytes;
use crate::control::status::DiskStatus;
use crate::export::Overview;

/// How many disks a page key moves by.
pub(super) const PAGE: isize = 5;

/// The rows of one disk, with the empty one behind it.
const ROWS: usize = 6;
/// Rows at the top and at the bottom that are no disks.
const FRAME_ROWS: usize = 4;

/// The colour of a piece, by meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ink {
    Plain,
    Title,
    Good,
    Written,
    Warm,
    Bad,
    Faint,
}

/// One row.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Line(Vec<(Ink, String)>);

impl Line {
    /// Its pieces from the left.
    pub(super) fn pieces(&self) -> &[(Ink, String)] {
        &self.0
    }

    fn put(&mut self, ink: Ink, text: impl AsRef<str>) {
        // What a peer or a file says must not steer the terminal.
        let text = text.as_ref().chars().map(|c| if c.is_control() { '?' } else { c });
        match self.0.last_mut() {
            Some((last, piece)) if *last == ink => piece.extend(text),
            _ => self.0.push((ink, text.collect())),
        }
    }

    fn with(mut self, ink: Ink, text: impl AsRef<str>) -> Self {
        self.put(ink, text);
        self
    }

    /// Not wider than `columns`.
    fn cut(mut self, columns: usize) -> Self {
        let mut left = columns;
        for (_, piece) in &mut self.0 {
            let end = piece.char_indices().nth(left).map_or(piece.len(), |(at, _)| at);
            piece.truncate(end);
            left -= piece.chars().count();
        }
        self
    }

    #[cfg(test)]
    fn text(&self) -> String {
        self.0.iter().map(|(_, piece)| piece.as_str()).collect()
    }
}

/// How it is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Style {
    /// With colours.
    pub(super) colour: bool,
    /// The signs of the strip.
    signs: Signs,
}

/// The signs of the strip: each is another one, so that colours only help.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Signs {
    present: char,
    partly: char,
    written: char,
    hot: char,
    missing: char,
}

const BLOCKS: Signs = Signs { present: '█', partly: '▄', written: 'w', hot: '!', missing: '·' };
const ASCII: Signs = Signs { present: '#', partly: '+', written: 'w', hot: '!', missing: '.' };

impl Style {
    /// As the environment wants it: `NO_COLOR`, and the locale's character set.
    pub(super) fn of_environment() -> Self {
        let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let locale = set("LC_ALL").or_else(|| set("LC_CTYPE")).or_else(|| set("LANG")).unwrap_or_default();
        Self::of(set("NO_COLOR").is_none(), &locale)
    }

    fn of(colour: bool, locale: &str) -> Self {
        let locale = locale.to_ascii_lowercase();
        let utf8 = locale.contains("utf-8") || locale.contains("utf8");
        Self { colour, signs: if utf8 { BLOCKS } else { ASCII } }
    }
}

/// What is known, and where the view is.
#[derive(Debug, Default)]
pub(super) struct Screen {
    /// All disks.
    pub(super) disks: Vec<DiskStatus>,
    /// The maps of those in sight, by name.
    pub(super) maps: BTreeMap<String, Overview>,
    /// Why the node cannot be asked, if so. What is shown is as it was before.
    pub(super) gone: Option<String>,
    /// The first disk in sight.
    first: usize,
}

impl Screen {
    /// These disks, from the first one.
    pub(super) fn of(disks: Vec<DiskStatus>) -> Self {
        Self { disks, ..Self::default() }
    }

    /// So many disks down, or up, on a screen of this size.
    pub(super) fn scroll(&mut self, by: isize, size: (usize, usize)) {
        let last = self.disks.len().saturating_sub(fit(size));
        self.first = self.first.min(last).saturating_add_signed(by).min(last);
    }

    /// Those of these disks that a screen of this size shows.
    pub(super) fn in_sight<'a>(&self, disks: &'a [DiskStatus], size: (usize, usize)) -> &'a [DiskStatus] {
        let first = self.first.min(disks.len().saturating_sub(fit(size)));
        &disks[first..(first + fit(size)).min(disks.len())]
    }

    /// The whole screen, not more than `size`: columns and rows.
    pub(super) fn lines(&self, size: (usize, usize), style: &Style) -> Vec<Line> {
        let (columns, rows) = size;
        let in_sight = self.in_sight(&self.disks, size);
        let first = self.disks.len().min(self.first.min(self.disks.len().saturating_sub(in_sight.len())) + 1);
        let mut lines = vec![match self.disks.len() {
            0 => Line::default().with(Ink::Title, "lazy-migrate").with(Ink::Plain, ": no exports"),
            count if count == in_sight.len() => {
                Line::default().with(Ink::Title, "lazy-migrate").with(Ink::Plain, format!(": exports {count}"))
            }
            count => Line::default().with(Ink::Title, "lazy-migrate").with(
                Ink::Plain,
                format!(": exports {first}-{} of {count}, arrow keys show the others", first + in_sight.len() - 1),
            ),
        }];
        lines.push(match &self.gone {
            None => Line::default(),
            Some(why) => Line::default().with(Ink::Bad, format!("NOT NOW: {why}")),
        });
        for disk in in_sight {
            lines.extend(rows_of(disk, self.maps.get(&disk.name), columns, style));
        }
        lines.truncate(rows.saturating_sub(1));
        lines.resize(rows.saturating_sub(1), Line::default());
        lines.push(legend(&style.signs));
        lines.truncate(rows);
        lines.into_iter().map(|line| line.cut(columns)).collect()
    }
}

/// How many disks a screen of this size shows.
fn fit(size: (usize, usize)) -> usize {
    (size.1.saturating_sub(FRAME_ROWS) / ROWS).max(1)
}

/// The cells of a strip on a screen of so many columns.
pub(super) fn strip_width(columns: usize) -> usize {
    columns.saturating_sub(4).max(1)
}

fn legend(signs: &Signs) -> Line {
    let mut line = Line::default();
    for (ink, sign, what) in [
        (Ink::Good, signs.present, "present"),
        (Ink::Good, signs.partly, "partly"),
        (Ink::Written, signs.written, "written here"),
        (Ink::Warm, signs.hot, "hot, missing"),
        (Ink::Faint, signs.missing, "missing"),
    ] {
        line.put(ink, sign.to_string());
        line.put(Ink::Plain, format!(" {what}   "));
    }
    line.with(Ink::Plain, "q quits")
}

fn rows_of(disk: &DiskStatus, map: Option<&Overview>, columns: usize, style: &Style) -> [Line; ROWS] {
    let phase = match disk.phase.as_str() {
        "complete" | "released" | "active" => Ink::Good,
        "fenced" | "discarded" => Ink::Bad,
        "pulling" | "preparing" | "ready" | "frozen" | "handed-over" | "rolled-back" => Ink::Warm,
        _ => Ink::Plain,
    };
    let mut head = Line::default()
        .with(Ink::Title, &disk.name)
        .with(Ink::Plain, format!("  {}  ", disk.role))
        .with(phase, &disk.phase)
        .with(Ink::Plain, format!("  epoch {}", disk.epoch));
    if let Some(peer) = &disk.peer {
        head.put(Ink::Plain, format!("  peer {peer}"));
    }
    head.put(Ink::Plain, "  link ");
    head.put(if disk.link == "down" { Ink::Bad } else { Ink::Plain }, &disk.link);
    if let Some(lease) = disk.lease_remaining_ms {
        head.put(if lease < 1000 { Ink::Bad } else { Ink::Plain }, format!("  lease {:.1} s", lease as f64 / 1000.0));
    }
    [
        head,
        bar(disk, columns, &style.signs),
        strip(disk, map, columns, &style.signs),
        waits(disk),
        notes(disk),
        Line::default(),
    ]
}

fn bar(disk: &DiskStatus, columns: usize, signs: &Signs) -> Line {
    let filling = disk.filling();
    let share = if disk.size == 0 { 1.0 } else { filling.present_bytes as f64 / disk.size as f64 };
    // 100 % is said only when nothing is missing.
    let percent = if filling.missing_bytes == 0 { 100 } else { ((share * 100.0) as u64).min(99) };
    let mut figures = format!(" {percent:3} %  {} of {}", bytes(filling.present_bytes), bytes(disk.size));
    if filling.missing_bytes > 0 {
        figures += &format!("  {}/s", bytes(filling.pull_rate));
        match filling.eta_s {
            Some(eta) => figures += &format!("  {} left", duration(eta)),
            None => figures += "  no end in sight",
        }
    }
    let width = columns.saturating_sub(figures.chars().count() + 4).min(40);
    let full = if filling.missing_bytes == 0 { width } else { (share * width as f64) as usize };
    let repeat = |sign: char, count: usize| sign.to_string().repeat(count);
    Line::default()
        .with(Ink::Plain, "  [")
        .with(Ink::Good, repeat(signs.present, full))
        .with(Ink::Faint, repeat(signs.missing, width - full))
        .with(Ink::Plain, "]")
        .with(Ink::Plain, figures)
}

fn strip(disk: &DiskStatus, map: Option<&Overview>, columns: usize, signs: &Signs) -> Line {
    let mut line = Line::default().with(Ink::Plain, "  ");
    let Some(map) = map else {
        return line;
    };
    let own = matches!(disk.role.as_str(), "local" | "source");
    // A small disk has fewer blocks than the screen has columns, and a screen may have changed since the map was asked for.
    let (width, cells) = (strip_width(columns), map.present.len());
    for cell in (0..width).map(|column| column * cells / width).filter(|&cell| cell < cells) {
        let (present, dirty) = (map.present[cell], map.dirty.get(cell).copied().unwrap_or(0));
        let hot = map.hot.get(cell).is_some_and(|&hot| hot != 0);
        let (ink, sign) = match (present, dirty, hot) {
            // On a disk that is this host's own, what its clients wrote is the heat.
            (_, 1.., _) => (Ink::Written, signs.written),
            (1000, _, true) if own => (Ink::Written, signs.written),
            (1000, _, _) => (Ink::Good, signs.present),
            (_, _, true) => (Ink::Warm, signs.hot),
            (1.., _, _) => (Ink::Good, signs.partly),
            (0, _, _) => (Ink::Faint, signs.missing),
        };
        line.put(ink, sign.to_string());
    }
    line
}

fn waits(disk: &DiskStatus) -> Line {
    let mut line = Line::default();
    let faults = &disk.faults;
    line.put(
        Ink::Plain,
        format!("  faults {}  p50 {}  p99 {}", faults.count, micros(faults.p50_us), micros(faults.p99_us)),
    );
    line.put(
        if disk.stalled_us > 0 { Ink::Warm } else { Ink::Plain },
        format!("  stalled {}", micros(disk.stalled_us)),
    );
    if let Some(frozen) = disk.frozen_ms {
        line.put(Ink::Plain, format!("  frozen {frozen} ms"));
    }
    line.put(Ink::Plain, format!("  clients {}", disk.clients));
    if let Some(device) = &disk.device {
        line.put(Ink::Plain, format!("  on {}", device.display()));
    }
    if disk.upstream != "none" {
        line.put(Ink::Plain, format!("  upstream {}", disk.upstream));
    }
    line
}

fn notes(disk: &DiskStatus) -> Line {
    let mut line = Line::default();
    if let Some(stuck) = disk.stuck() {
        line.put(Ink::Bad, format!("  {stuck}"));
    }
    if let Some(paused) = &disk.paused {
        line.put(Ink::Bad, format!("  PAUSED: {paused}"));
    }
    if let Some(error) = &disk.last_error {
        line.put(Ink::Warm, format!("  last error: {error}"));
    }
    line
}

/// `850 us`, `1.2 ms`, `3.40 s`.
fn micros(us: u64) -> String {
    match us {
        0..1000 => format!("{us} us"),
        1000..1_000_000 => format!("{:.1} ms", us as f64 / 1e3),
        _ => format!("{:.2} s", us as f64 / 1e6),
    }
}

fn duration(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        _ => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
    }
}

#[cfg(test)]
#[path = "screen_tests.rs"]
mod tests;
