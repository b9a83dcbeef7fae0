//! The first words of a connection for peer messages: which versions of the protocol each side speaks.
//!
//! Nodes are upgraded one after the other, so two that meet may be of different versions. Who dials says [`Hello`] in the first
//! frame, who is dialled answers with its own; the highest version that both speak is the one that is spoken. Where there is
//! none, both say so: neither guesses what the other may have meant. That is never taken for an answer to a question, for the other
//! node may have done what it was asked before it was replaced.
//!
//! These two messages, the framing and the preamble stay as they are in all versions to come.

use serde::{Deserialize, Serialize};

use crate::error::{Failure, Outcome};

/// The oldest version of the peer messages that this program speaks.
pub const PROTOCOL_MIN: u32 = 1;
/// The newest one. It rises with every change that an older program would not understand.
pub const PROTOCOL_MAX: u32 = 1;

/// How much of the other's name for its version is shown, in characters.
const SHOWN: usize = 40;

/// Who speaks, and what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The oldest version that it speaks.
    pub protocol_min: u32,
    /// The newest one.
    pub protocol_max: u32,
    /// The version of the program, for people.
    pub program: String,
}

/// What is answered to a [`Hello`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HelloAnswer {
    /// The same of the other side.
    Ok(Hello),
    /// They do not understand each other; the connection ends.
    Err(Failure),
}

impl Hello {
    /// This program.
    pub fn own() -> Hello {
        Hello { protocol_min: PROTOCOL_MIN, protocol_max: PROTOCOL_MAX, program: env!("CARGO_PKG_VERSION").to_owned() }
    }

    /// The version that both speak.
    ///
    /// # Errors
    /// There is none. The text is the same on both sides, and says which of them has to change.
    pub fn agree(&self, other: &Hello) -> Outcome<u32> {
        let version = self.protocol_max.min(other.protocol_max);
        if version >= self.protocol_min.max(other.protocol_min) {
            return Ok(version);
        }
        let (older, newer) = if self.protocol_max < other.protocol_max { (self, other) } else { (other, self) };
        Err(Failure::refused(format!(
            "no common version of the peer protocol: {older} speaks {}, {newer} speaks {}; install a newer lazy-migrate on \
             the host that has {older}",
            older.versions(),
            newer.versions()
        )))
    }

    fn versions(&self) -> String {
        match self.protocol_min == self.protocol_max {
            true => self.protocol_max.to_string(),
            false => format!("{} to {}", self.protocol_min, self.protocol_max),
        }
    }
}

/// `lazy-migrate 1.2.3`, whatever the other side says of itself.
impl std::fmt::Display for Hello {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let program: String = self.program.chars().filter(char::is_ascii_graphic).take(SHOWN).collect();
        write!(f, "lazy-migrate {program}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    fn hello(protocol_min: u32, protocol_max: u32, program: &str) -> Hello {
        Hello { protocol_min, protocol_max, program: program.into() }
    }

    #[test]
    fn the_highest_common_version_is_spoken() {
        for (a, b, version) in [((1, 1), (1, 1), 1), ((1, 3), (2, 5), 3), ((2, 5), (1, 3), 3), ((1, 9), (4, 4), 4)] {
            assert_eq!(hello(a.0, a.1, "x").agree(&hello(b.0, b.1, "y")).unwrap(), version, "{a:?} {b:?}");
        }
        assert_eq!(Hello::own().agree(&Hello::own()).unwrap(), PROTOCOL_MAX);
    }

    #[test]
    fn without_one_both_sides_say_the_same_and_name_both() {
        let (old, new) = (hello(1, 2, "1.4.0"), hello(3, 3, "3.0.1"));
        let failure = old.agree(&new).unwrap_err();
        assert_eq!(failure, new.agree(&old).unwrap_err());
        assert_eq!(failure.kind, Kind::Refused);
        assert_eq!(
            failure.message,
            "no common version of the peer protocol: lazy-migrate 1.4.0 speaks 1 to 2, lazy-migrate 3.0.1 speaks 3; \
             install a newer lazy-migrate on the host that has lazy-migrate 1.4.0"
        );
    }

    #[test]
    fn what_another_node_calls_itself_does_no_harm() {
        let shown = hello(1, 1, &format!("\x1b[2J\n{}", "9".repeat(10_000))).to_string();
        assert!(shown.starts_with("lazy-migrate [2J9") && shown.len() < 60, "{shown}");
        // A version that says more of itself than this one knows.
        let later = r#"{"protocol_min": 1, "protocol_max": 7, "program": "7.0.0", "more": [1]}"#;
        assert_eq!(serde_json::from_str::<Hello>(later).unwrap().agree(&Hello::own()).unwrap(), PROTOCOL_MAX);
    }
}
