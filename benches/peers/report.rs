//! What was measured: rows of contenders, their medians, our ratio and our bar; as Markdown and as JSON.

use std::fmt::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::lab::Scope;

/// How our own contender is called in every row.
pub const OURS: &str = "lazy-migrate";

/// Which way is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Better {
    /// Rates.
    Higher,
    /// Times, and memory.
    Lower,
}

/// What we want to reach.
#[derive(Clone, Copy, Debug)]
pub enum Bar {
    /// A multiple of a contender's median.
    Times(f64, &'static str),
    /// A value.
    Fixed(f64),
    /// Nothing: the row is for information.
    None,
}

/// One line of the table.
pub struct Row {
    measure: String,
    unit: &'static str,
    better: Better,
    bar: Bar,
    samples: Vec<(String, Vec<f64>)>,
}

impl Row {
    /// A row without samples.
    pub fn new(measure: impl Into<String>, unit: &'static str, better: Better, bar: Bar) -> Row {
        Row { measure: measure.into(), unit, better, bar, samples: Vec::new() }
    }

    /// One more sample of a contender.
    pub fn add(&mut self, contender: &str, sample: f64) {
        eprintln!("   {}: {contender}: {} {}", self.measure, figure(sample), self.unit);
        match self.samples.iter_mut().find(|(name, _)| name == contender) {
            Some((_, samples)) => samples.push(sample),
            None => self.samples.push((contender.to_owned(), vec![sample])),
        }
    }

    /// The median of a contender, if it was measured.
    pub fn median(&self, contender: &str) -> Option<f64> {
        let mut samples = self.samples.iter().find(|(name, _)| name == contender)?.1.clone();
        samples.sort_by(f64::total_cmp);
        let middle = samples.len() / 2;
        Some(if samples.len() % 2 == 1 { samples[middle] } else { (samples[middle - 1] + samples[middle]) / 2.0 })
    }

    /// Our ratio to what the bar refers to, and whether that is enough.
    fn verdict(&self) -> (Option<f64>, Option<bool>) {
        let ours = self.median(OURS);
        let enough = |value: f64, bar: f64| match self.better {
            Better::Higher => value >= bar,
            Better::Lower => value <= bar,
        };
        match self.bar {
            Bar::Times(factor, name) => {
                let ratio = ours.zip(self.median(name)).map(|(ours, other)| ours / other);
                (ratio, ratio.map(|ratio| enough(ratio, factor)))
            }
            Bar::Fixed(bar) => (None, ours.map(|ours| enough(ours, bar))),
            Bar::None => (None, None),
        }
    }

    fn bar_text(&self) -> String {
        let sign = if self.better == Better::Higher { ">=" } else { "<=" };
        match self.bar {
            Bar::Times(factor, name) => format!("{sign} {factor} x {name}"),
            Bar::Fixed(bar) => format!("{sign} {}", figure(bar)),
            Bar::None => String::new(),
        }
    }

    fn markdown(&self) -> String {
        let (ratio, enough) = self.verdict();
        let others = self.samples.iter().filter(|(name, _)| name != OURS);
        let others = others.map(|(name, _)| format!("{name} {}", figure(self.median(name).unwrap_or(f64::NAN))));
        let verdict = match enough {
            Some(true) => "met",
            Some(false) => "**below**",
            None => "",
        };
        format!(
            "| {} ({}) | {} | {} | {} | {} | {verdict} |",
            self.measure,
            self.unit,
            self.median(OURS).map_or_else(String::new, figure),
            others.collect::<Vec<_>>().join(", "),
            ratio.map_or_else(String::new, |ratio| format!("{ratio:.2}")),
            self.bar_text(),
        )
    }

    fn json(&self) -> Value {
        let (ratio, enough) = self.verdict();
        let contenders = self.samples.iter().map(|(name, samples)| {
            let minimum = samples.iter().copied().fold(f64::INFINITY, f64::min);
            let maximum = samples.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let median = self.median(name);
            (name.clone(), json!({ "median": median, "minimum": minimum, "maximum": maximum, "samples": samples }))
        });
        json!({
            "measure": self.measure,
            "unit": self.unit,
            "contenders": contenders.collect::<serde_json::Map<_, _>>(),
            "ratio": ratio,
            "bar": self.bar_text(),
            "met": enough,
        })
    }
}

/// All of it.
pub struct Report {
    scope: Scope,
    begun: Instant,
    rows: Vec<Row>,
    failed: Vec<String>,
}

impl Report {
    /// Nothing yet.
    pub fn new(scope: Scope) -> Report {
        Report { scope, begun: Instant::now(), rows: Vec::new(), failed: Vec::new() }
    }

    /// How long it takes already.
    pub fn elapsed(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Rows that are done.
    pub fn extend(&mut self, rows: impl IntoIterator<Item = Row>) {
        self.rows.extend(rows);
    }

    /// A suite came to nothing.
    pub fn failed(&mut self, suite: &str) {
        self.failed.push(suite.to_owned());
    }

    /// Whether every suite could be measured.
    pub fn is_whole(&self) -> bool {
        self.failed.is_empty()
    }

    /// Writes `target/peers.json`.
    pub fn save(&self) {
        let (runs, quick) = (self.scope.runs, self.scope.quick);
        let document = json!({
            "machine": machine(),
            "runs": runs,
            "quick": quick,
            "rows": self.rows.iter().map(Row::json).collect::<Vec<_>>(),
            "failed": self.failed,
        });
        let path = target_directory().join("peers.json");
        if let Err(error) = std::fs::write(&path, format!("{document:#}\n")) {
            eprintln!("cannot write {}: {error}", path.display());
        }
    }

    /// The table.
    pub fn markdown(&self) -> String {
        let mut text = format!("{}; medians of {} runs\n\n", machine(), self.scope.runs);
        text.push_str("| measure | lazy-migrate | others | ratio | bar | |\n|---|---|---|---|---|---|\n");
        for row in &self.rows {
            let _ = writeln!(text, "{}", row.markdown());
        }
        for suite in &self.failed {
            let _ = writeln!(text, "| {suite} | could not be measured | | | | |");
        }
        text
    }
}

/// Where cargo builds to: the program's own place is `TARGET/release/deps`.
pub fn target_directory() -> PathBuf {
    let own = std::env::current_exe().expect("this program's place");
    own.ancestors().nth(3).expect("cargo's target directory").to_owned()
}

fn machine() -> String {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let (info, memory) = (read("/proc/cpuinfo"), read("/proc/meminfo"));
    let field = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split(':').nth(1)).map(|value| value.trim().to_owned()).unwrap_or_default()
    };
    let kib: u64 = field(&memory, "MemTotal").split(' ').next().and_then(|kib| kib.parse().ok()).unwrap_or(0);
    let (kernel, load) = (read("/proc/sys/kernel/osrelease"), read("/proc/loadavg"));
    let load = load.split(' ').next().unwrap_or_default();
    let model = field(&info, "model name");
    format!("{cpus} x {model}, {} GiB, Linux {}, load {load} at the end", kib >> 20, kernel.trim())
}

/// Four significant digits are more than the noise leaves.
fn figure(value: f64) -> String {
    match value.abs() {
        large if large >= 10_000.0 => format!("{:.1}k", value / 1000.0),
        large if large >= 100.0 => format!("{value:.0}"),
        middle if middle >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}
