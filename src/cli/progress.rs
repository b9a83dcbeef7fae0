//! How far long work is: a bar for a person, a plain line each tenth for a log. On stderr: the answer alone goes to stdout.

use super::answers::{bytes, watched};

/// The progress of one disk.
pub(super) struct Progress {
    name: String,
    bar: Option<indicatif::ProgressBar>,
    told_tenths: u64,
}

impl Progress {
    /// Nothing is shown yet.
    pub(super) fn new(name: impl ToString) -> Self {
        Self { name: name.to_string(), bar: None, told_tenths: 0 }
    }

    /// `present` of `size` bytes, at `rate` bytes a second.
    pub(super) fn show(&mut self, present: u64, size: u64, rate: u64) {
        if watched() {
            let name = &self.name;
            let bar = self.bar.get_or_insert_with(|| {
                let bar = indicatif::ProgressBar::new(size).with_prefix(name.clone());
                if let Ok(style) = indicatif::ProgressStyle::with_template(
                    "{prefix} {wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}",
                ) {
                    bar.set_style(style);
                }
                bar
            });
            bar.set_position(present);
            return;
        }
        let tenths = (present * 10).checked_div(size).unwrap_or(10);
        if tenths > self.told_tenths {
            self.told_tenths = tenths;
            eprintln!("            {}: {} of {}, {}/s", self.name, bytes(present), bytes(size), bytes(rate));
        }
    }

    /// The bar goes, if there is one.
    pub(super) fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}
