//! What an NBD client may see: the exports that the operator gave to a name in its certificate, and no others.

use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;

use nbd::tls::Identity;

use super::DiskName;

/// Exports by the name of a client's certificate. A certificate whose names are not here sees nothing.
#[derive(Clone, Debug, Default)]
pub struct ClientRights(BTreeMap<String, Seen>);

/// The exports that somebody sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// All of the node's.
    All,
    /// These.
    Only(BTreeSet<DiskName>),
}

impl Seen {
    /// Whether an export is one of them.
    pub fn has(&self, name: &DiskName) -> bool {
        match self {
            Seen::All => true,
            Seen::Only(names) => names.contains(name),
        }
    }

    fn and(self, other: &Seen) -> Seen {
        match (self, other) {
            (Seen::Only(mut names), Seen::Only(more)) => {
                names.extend(more.iter().cloned());
                Seen::Only(names)
            }
            _ => Seen::All,
        }
    }
}

/// One line of the operator's: `NAME=EXPORT[,EXPORT...]`, or `NAME` for all exports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientRight {
    name: String,
    seen: Seen,
}

impl FromStr for ClientRight {
    type Err = String;

    fn from_str(text: &str) -> Result<ClientRight, String> {
        let (name, exports) = text.split_once('=').map_or((text, None), |(name, exports)| (name, Some(exports)));
        if name.is_empty() || name.contains('*') {
            return Err("it begins with the name in a client's certificate, without wildcards".into());
        }
        let seen = match exports {
            None => Seen::All,
            Some(exports) => {
                let names = exports.split(',').map(|export| export.parse().map_err(|error| format!("{error}")));
                Seen::Only(names.collect::<Result<_, _>>()?)
            }
        };
        Ok(ClientRight { name: name.to_ascii_lowercase(), seen })
    }
}

impl FromIterator<ClientRight> for ClientRights {
    fn from_iter<I: IntoIterator<Item = ClientRight>>(rights: I) -> Self {
        let mut all: BTreeMap<String, Seen> = BTreeMap::new();
        for ClientRight { name, seen } in rights {
            let sum = match all.remove(&name) {
                Some(known) => known.and(&seen),
                None => seen,
            };
            all.insert(name, sum);
        }
        Self(all)
    }
}

impl ClientRights {
    /// What a client with this certificate sees: the sum over its names.
    pub fn of(&self, client: &Identity) -> Seen {
        let given = self.0.iter().filter(|(name, _)| client.is(name));
        given.fold(Seen::Only(BTreeSet::new()), |sum, (_, seen)| sum.and(seen))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(seen: &Seen) -> Vec<&str> {
        match seen {
            Seen::All => vec!["*"],
            Seen::Only(names) => names.iter().map(DiskName::as_str).collect(),
        }
    }

    #[test]
    fn a_right_is_a_name_and_its_exports() {
        let right: ClientRight = "Db.example=web,mail".parse().unwrap();
        assert_eq!((right.name.as_str(), names(&right.seen)), ("db.example", vec!["mail", "web"]));
        assert_eq!("db".parse::<ClientRight>().unwrap().seen, Seen::All);
        for wrong in ["", "=web", "*=web", "db=", "db=../x", "db=a,,b"] {
            assert!(wrong.parse::<ClientRight>().is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn rights_add_up_and_nobody_sees_nothing() {
        let rights: ClientRights = ["a=x", "A=y", "b", "b=z"].iter().map(|text| text.parse().unwrap()).collect();
        assert_eq!(names(&rights.0["a"]), ["x", "y"]);
        assert_eq!(rights.0["b"], Seen::All);
        assert_eq!(rights.of(&Identity::default()), Seen::Only(BTreeSet::new()));
        assert!(Seen::All.has(&"q".parse().unwrap()) && !rights.0["a"].has(&"z".parse().unwrap()));
    }
}
