//! Rounds of pre-dumps: the memory of a running container, and then again and again what it has written since. Pure.
//!
//! Round N lies in `pre-N` below the image directory, and the dump of the frozen container in the image directory itself:
//! so one name stands for the whole chain wherever images are marked, renamed, made durable or removed. Each link of the
//! chain holds what has changed since the one before, which criu finds by a symbolic link `parent` beside the files. Where
//! it points follows from the round's number alone, so the host that receives images makes it itself.

/// The most rounds: a container that writes faster than the link is not waited for any longer.
pub const MAX_ROUNDS: u32 = 8;
/// A round below this, in bytes, is the last one: the dump will hold about as much, and does not take long.
pub const SMALL: u64 = 16 << 20;

/// The name of the link to the images before.
pub(crate) const LINK: &str = "parent";

/// Whether another round is worth it, after rounds of these sizes in bytes: not when the last one was small, nor when it was
/// not smaller than half of the one before, for then the container writes about as fast as its memory travels.
pub fn another(sizes: &[u64]) -> bool {
    match sizes {
        [] => true,
        _ if sizes.len() >= MAX_ROUNDS as usize => false,
        [.., before, last] if *last >= before / 2 => false,
        [.., last] => *last >= SMALL,
    }
}

/// The directory of a round below the image directory; rounds are numbered from 1.
pub(crate) fn directory(round: u32) -> String {
    format!("pre-{round}")
}

/// Where a round's link points; the first has none.
pub(crate) fn parent_of_round(round: u32) -> Option<String> {
    (round > 1).then(|| format!("../{}", directory(round - 1)))
}

/// Where the link of the dump after so many rounds points, if there were any.
pub(crate) fn parent_of_dump(rounds: u32) -> Option<String> {
    (rounds > 0).then(|| directory(rounds))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn rounds_go_on_while_they_shrink_and_are_worth_it() {
        assert!(another(&[]));
        assert!(!another(&[SMALL - 1]), "nothing is gained");
        assert!(another(&[SMALL]));
        assert!(another(&[900 * MIB, 300 * MIB]));
        assert!(!another(&[900 * MIB, 300 * MIB, 15 * MIB]), "small");
        assert!(!another(&[900 * MIB, 450 * MIB]), "not less than half");
        assert!(!another(&[300 * MIB, 900 * MIB]), "it grows");
        let halving: Vec<u64> = (0..MAX_ROUNDS).map(|n| (u64::MAX / 2) >> (2 * n)).collect();
        assert!(another(&halving[..MAX_ROUNDS as usize - 1]));
        assert!(!another(&halving), "the bound");
    }

    #[test]
    fn the_chain_leads_from_the_dump_to_the_first_round() {
        assert_eq!((parent_of_dump(0), parent_of_round(1)), (None, None));
        assert_eq!(parent_of_dump(3).as_deref(), Some("pre-3"));
        assert_eq!(parent_of_round(3).as_deref(), Some("../pre-2"));
    }
}
