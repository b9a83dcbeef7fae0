//! The log of `serve`: one line an event, on stderr, as text or as JSON.
//!
//! Everything that belongs to a disk runs in that disk's span, whose `disk`, `epoch` and `phase` its migration's driver
//! keeps true; so a line carries them without each place that logs having to know them. Names of fields are documented in
//! docs/monitoring.md. A line is bounded: a value is cut at [`VALUE_LIMIT`], and events have a few fields.

use std::fmt::{self, Write as _};
use std::io::{IsTerminal, Write as _};
use std::time::SystemTime;

use serde::ser::{SerializeMap, Serializer};
use serde_json::Value;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

/// The longest value of a field, in bytes.
const VALUE_LIMIT: usize = 2048;

/// How lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Format {
    /// For people: time, level, place, message, then name=value.
    Text,
    /// One JSON object a line.
    Json,
}

/// From now on everything is logged to stderr; RUST_LOG says what, by default `info` and worse.
pub(super) fn begin(format: Format) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let write = |line: &[u8]| {
        // A log that nobody takes is no reason to stop.
        let _ = std::io::stderr().lock().write_all(line);
    };
    let lines = Lines { format, colours: std::io::stderr().is_terminal(), write };
    tracing_subscriber::registry().with(filter).with(lines).init();
}

/// The layer that writes a line for each event.
struct Lines<W> {
    format: Format,
    colours: bool,
    write: W,
}

/// Fields in the order in which they were given; a span keeps them as an extension.
#[derive(Clone, Debug, Default)]
struct Fields(Vec<(&'static str, Value)>);

impl Fields {
    fn set(&mut self, field: &Field, value: Value) {
        let value = match value {
            Value::String(text) if text.len() > VALUE_LIMIT => {
                let end = (0..=VALUE_LIMIT).rfind(|&at| text.is_char_boundary(at)).unwrap_or(0);
                Value::String(format!("{}...", &text[..end]))
            }
            value => value,
        };
        match self.0.iter_mut().find(|(name, _)| *name == field.name()) {
            Some((_, old)) => *old = value,
            None => self.0.push((field.name(), value)),
        }
    }

    fn take(&mut self, name: &str) -> Option<Value> {
        let at = self.0.iter().position(|(known, _)| *known == name)?;
        Some(self.0.remove(at).1)
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.set(field, Value::String(format!("{value:?}")));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.set(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.set(field, value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.set(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.set(field, value.into());
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.set(field, value.into());
    }

    fn record_u128(&mut self, field: &Field, value: u128) {
        self.set(field, u64::try_from(value).unwrap_or(u64::MAX).into());
    }
}

impl<S, W> Layer<S> for Lines<W>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    W: Fn(&[u8]) + 'static,
{
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        if let Some(span) = context.span(id) {
            let mut fields = Fields::default();
            attributes.record(&mut fields);
            span.extensions_mut().replace(fields);
        }
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        if let Some(span) = context.span(id)
            && let Some(fields) = span.extensions_mut().get_mut::<Fields>()
        {
            values.record(fields);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        // The outermost span first; what is nearer to the event counts more.
        let mut fields = Fields::default();
        for span in context.event_scope(event).into_iter().flat_map(|scope| scope.from_root()) {
            if let Some(Fields(known)) = span.extensions().get::<Fields>() {
                known.iter().for_each(|(name, value)| {
                    fields.take(name);
                    fields.0.push((name, value.clone()));
                });
            }
        }
        event.record(&mut fields);
        let message = match fields.take("message") {
            Some(Value::String(text)) => text,
            _ => String::new(),
        };
        let line = Line {
            time: humantime::format_rfc3339_micros(SystemTime::now()).to_string(),
            level: *event.metadata().level(),
            target: event.metadata().target(),
            message,
            fields,
        };
        let mut text = match self.format {
            Format::Text => line.text(self.colours),
            // Strings, numbers and their names: it cannot fail.
            Format::Json => line.json().unwrap_or_default(),
        };
        text.push('\n');
        // In one piece, so that lines of several threads are not mixed.
        (self.write)(text.as_bytes());
    }
}

/// One event.
struct Line {
    time: String,
    level: Level,
    target: &'static str,
    message: String,
    fields: Fields,
}

impl Line {
    fn json(&self) -> serde_json::Result<String> {
        let mut out = Vec::new();
        let mut writer = serde_json::Serializer::new(&mut out);
        let mut map = writer.serialize_map(None)?;
        map.serialize_entry("time", &self.time)?;
        map.serialize_entry("level", self.level.as_str())?;
        map.serialize_entry("target", self.target)?;
        map.serialize_entry("message", &self.message)?;
        for (name, value) in self.fields.0.iter().filter(|(name, _)| !["time", "level", "target"].contains(name)) {
            map.serialize_entry(name, value)?;
        }
        map.end()?;
        Ok(String::from_utf8_lossy(&out).into_owned())
    }

    fn text(&self, colours: bool) -> String {
        let (begin, end) = match (colours, self.level) {
            (false, _) => ("", ""),
            (true, Level::ERROR) => ("\x1b[31m", "\x1b[0m"),
            (true, Level::WARN) => ("\x1b[33m", "\x1b[0m"),
            (true, Level::INFO) => ("\x1b[32m", "\x1b[0m"),
            (true, _) => ("\x1b[2m", "\x1b[0m"),
        };
        let mut line =
            format!("{} {begin}{:>5}{end} {}: {}", self.time, self.level, self.target, printable(&self.message));
        for (name, value) in &self.fields.0 {
            let _ = match value {
                Value::String(text) if text.is_empty() || text.contains(|c: char| c.is_whitespace() || c == '"') => {
                    write!(line, " {name}=\"{}\"", printable(&text.replace('"', "\\\"")))
                }
                Value::String(text) => write!(line, " {name}={}", printable(text)),
                value => write!(line, " {name}={value}"),
            };
        }
        line
    }
}

/// Without line ends and what else would lead a terminal astray: peers and programs are quoted here.
fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    fn logged(format: Format, work: impl FnOnce()) -> String {
        let out = Arc::new(Mutex::new(Vec::new()));
        let sink = out.clone();
        let lines =
            Lines { format, colours: false, write: move |line: &[u8]| sink.lock().unwrap().extend_from_slice(line) };
        tracing::subscriber::with_default(tracing_subscriber::registry().with(lines), work);
        let bytes = out.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    fn sample() {
        let span = tracing::error_span!("disk", disk = "web", epoch = 1u64, phase = "ready");
        let _entered = span.enter();
        span.record("phase", "active");
        tracing::warn!(error = "no\nroute", count = 3, "it \x1b[31mfailed");
    }

    #[test]
    fn a_span_that_changes_shows_its_last_values_in_json() {
        let line: Value = serde_json::from_str(&logged(Format::Json, sample)).unwrap();
        assert_eq!((&line["disk"], &line["epoch"], &line["phase"]), (&"web".into(), &1.into(), &"active".into()));
        assert_eq!((&line["level"], &line["error"], &line["count"]), (&"WARN".into(), &"no\nroute".into(), &3.into()));
        assert_eq!(line["message"], "it \x1b[31mfailed");
    }

    #[test]
    fn text_is_one_line_without_what_a_terminal_obeys() {
        let line = logged(Format::Text, sample);
        assert!(line.ends_with("disk=web epoch=1 phase=active error=\"no\\nroute\" count=3\n"), "{line}");
        assert!(line.contains("it \\u{1b}[31mfailed") && line.matches('\n').count() == 1, "{line}");
    }

    #[test]
    fn what_the_event_says_itself_counts_and_long_values_are_cut() {
        let line = logged(Format::Json, || {
            let _entered = tracing::error_span!("disk", disk = "web", epoch = 1u64).entered();
            tracing::info!(epoch = 2u64, text = "ä".repeat(VALUE_LIMIT), "moved");
        });
        let line: Value = serde_json::from_str(&line).unwrap();
        assert_eq!((&line["epoch"], &line["disk"]), (&2.into(), &"web".into()));
        assert_eq!(line["text"].as_str().unwrap().len(), VALUE_LIMIT + 3);
    }
}
