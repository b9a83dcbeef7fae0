//! The clock that leases are counted on: it has to run during suspend, and to keep pace with the other host's.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use super::finding::Finding;

/// For how long the two clocks are compared.
const SPAN: Duration = Duration::from_millis(200);
/// Both are read within this time, or read again.
const SHARP: Duration = Duration::from_micros(50);
/// How often.
const TRIES: usize = 100;
/// What the lease allows two hosts' clocks together; one alone must stay well below.
const DRIFT_LIMIT_PPM: i64 = 5000;

/// What is known of the clock.
pub(super) struct Facts {
    /// The kernel's clock source; empty when it does not say.
    pub(super) source: String,
    /// Those that it could use.
    pub(super) available: String,
    /// How much faster CLOCK_BOOTTIME runs than the bare counter, in millionths; none when it could not be measured.
    pub(super) drift_ppm: Option<i64>,
}

impl Facts {
    /// Reads and measures; takes a fifth of a second.
    pub(super) fn gather() -> Self {
        let read = |name: &str| {
            let path = format!("/sys/devices/system/clocksource/clocksource0/{name}");
            std::fs::read_to_string(path).unwrap_or_default().trim().to_owned()
        };
        let drift = || {
            let (boot, raw) = both()?;
            std::thread::sleep(SPAN);
            let (boot_then, raw_then) = both()?;
            let span = raw_then.checked_sub(raw)?.as_nanos() as i64;
            let passed = boot_then.checked_sub(boot)?.as_nanos() as i64;
            (passed - span).checked_mul(1_000_000)?.checked_div(span)
        };
        Self { source: read("current_clocksource"), available: read("available_clocksource"), drift_ppm: drift() }
    }
}

/// CLOCK_BOOTTIME and the bare counter, at nearly the same time.
fn both() -> Option<(Duration, Duration)> {
    let read = |clock| clock_gettime(clock).ok().map(Duration::from);
    (0..TRIES).find_map(|_| {
        let before = read(ClockId::CLOCK_MONOTONIC_RAW)?;
        let boot = read(ClockId::CLOCK_BOOTTIME)?;
        let after = read(ClockId::CLOCK_MONOTONIC_RAW)?;
        (after.saturating_sub(before) <= SHARP).then_some((boot, before))
    })
}

/// Whether leases can be counted on it.
pub(super) fn verdict(facts: &Facts) -> Finding {
    const CHECK: &str = "clock";
    const WHY: &str = "one host alone may own a disk, and a lease that is counted wrong would let two";
    let source = if facts.source.is_empty() { "unknown" } else { &facts.source };
    match facts.drift_ppm {
        None => {
            let advice = "run it again when the machine is less busy; if it stays so, look at the hypervisor's clock";
            return Finding::warn(CHECK, format!("source {source}; its pace could not be measured"), WHY, advice);
        }
        Some(drift) if drift.abs() > DRIFT_LIMIT_PPM => {
            let found = format!("source {source}; CLOCK_BOOTTIME is off by {drift} millionths");
            let advice =
                "let chrony or systemd-timesyncd steer the clock gently, and choose another source: tsc or kvm-clock";
            return Finding::fail(CHECK, found, WHY, advice);
        }
        Some(_) => {}
    }
    if source.contains("jiffies") {
        return Finding::fail(
            CHECK,
            format!("source {source}"),
            format!("it stands still while interrupts are lost; {WHY}"),
            format!("choose one of: {} (kernel parameter clocksource=)", facts.available),
        );
    }
    let drift = facts.drift_ppm.unwrap_or_default();
    Finding::ok(CHECK, format!("source {source}; CLOCK_BOOTTIME within {} millionths", drift.abs().max(1)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::finding::Level;

    fn level(source: &str, drift_ppm: Option<i64>) -> Level {
        verdict(&Facts { source: source.into(), available: "tsc hpet".into(), drift_ppm }).level
    }

    #[test]
    fn a_clock_that_keeps_pace_is_well() {
        assert_eq!(level("tsc", Some(3)), Level::Ok);
        assert_eq!(level("kvm-clock", Some(-499)), Level::Ok);
        assert_eq!(level("", Some(0)), Level::Ok);
    }

    #[test]
    fn a_clock_that_does_not_or_stands_still_fails() {
        assert_eq!(level("tsc", Some(DRIFT_LIMIT_PPM + 1)), Level::Fail);
        assert_eq!(level("tsc", Some(-20_000)), Level::Fail);
        assert_eq!(level("refined-jiffies", Some(0)), Level::Fail);
        assert_eq!(level("tsc", None), Level::Warn);
    }

    #[test]
    fn this_hosts_clock_can_be_measured() {
        let (boot, raw) = both().unwrap();
        let (later, raw_later) = both().unwrap();
        assert!(later >= boot && raw_later >= raw);
    }
}
