//! The name of a disk: what a user types, what stands in a path, what goes over the wire.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The longest name: it is the name of a directory.
pub const MAX_NAME_BYTES: usize = 200;

/// A checked name: letters, digits, `_`, `-`, `.`, `+`; not beginning with `-` or `.`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DiskName(String);

/// A name that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{}' cannot be a disk's name: use 1 to {MAX_NAME_BYTES} letters, digits, '_', '-', '.' or '+', not beginning with '-' or '.'",
    .0.escape_default()
)]
pub struct BadName(pub String);

impl DiskName {
    /// The name itself.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for DiskName {
    type Err = BadName;
    fn from_str(text: &str) -> Result<Self, BadName> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.+".contains(&byte);
        let fits = (1..=MAX_NAME_BYTES).contains(&text.len());
        if fits && text.bytes().all(plain) && !text.starts_with(['-', '.']) {
            Ok(Self(text.into()))
        } else {
            Err(BadName(text.chars().take(MAX_NAME_BYTES).collect()))
        }
    }
}

impl TryFrom<String> for DiskName {
    type Error = BadName;
    fn try_from(text: String) -> Result<Self, BadName> {
        text.parse()
    }
}

impl From<DiskName> for String {
    fn from(name: DiskName) -> String {
        name.0
    }
}

impl fmt::Display for DiskName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_the_directory_are_refused() {
        for bad in ["", ".", "..", "../x", "a/b", "/a", ".hidden", "-x", "a\0b", "a b", "ä", &"x".repeat(201)] {
            assert!(bad.parse::<DiskName>().is_err(), "{bad:?}");
        }
        for good in ["web", "db-1", "a.b_c+d", "0", &"x".repeat(200)] {
            assert!(good.parse::<DiskName>().is_ok(), "{good:?}");
        }
    }
}
