//! Values as people type them.

use std::time::Duration;

/// `90`, `90s`, `500ms`, `5m`: whole seconds, or a number with its unit.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    if let Ok(seconds) = text.parse::<u64>() {
        return Ok(Duration::from_secs(seconds));
    }
    humantime::parse_duration(text).map_err(|error| format!("{error}; write seconds, or for example 500ms or 5m"))
}

/// `1048576`, `512K`, `20M`, `20MiB`, `1G`: bytes, with binary units.
pub(super) fn byte_count(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = text[digits.len()..].trim_end_matches("iB").trim_end_matches('B');
    let shift = match unit {
        "" => 0,
        "k" | "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err("the unit is none of K, M, G, T".into()),
    };
    let count: u64 = digits.parse().map_err(|_| "write a whole number, with K, M, G or T if you like".to_string())?;
    count.checked_mul(1 << shift).ok_or_else(|| "it is too large".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_seconds_or_have_a_unit() {
        assert_eq!(duration("90"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert!(duration("soon").is_err());
    }

    #[test]
    fn byte_counts_have_binary_units() {
        for (text, bytes) in [("0", 0), ("512K", 512 << 10), ("20M", 20 << 20), ("20MiB", 20 << 20), ("1GB", 1 << 30)] {
            assert_eq!(byte_count(text), Ok(bytes), "{text}");
        }
        for bad in ["", "M", "-1", "1.5G", "20X", "99999999999T"] {
            assert!(byte_count(bad).is_err(), "{bad}");
        }
    }
}
