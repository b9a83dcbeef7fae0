//! Which process stands above all others of a group.

/// The process that all of `tasks` descend from, if there is one: the only one whose parent is not among them.
pub(super) fn head(tasks: &[u32]) -> Option<u32> {
    head_by(tasks, parent)
}

fn head_by(tasks: &[u32], parent: impl Fn(u32) -> Option<u32>) -> Option<u32> {
    let mut heads = tasks.iter().filter(|&&pid| parent(pid).is_none_or(|parent| !tasks.contains(&parent)));
    match (heads.next(), heads.next()) {
        (Some(&only), None) => Some(only),
        _ => None,
    }
}

/// From the process table; `None` when it has ended.
fn parent(pid: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // After the name, which may hold anything: state and parent.
    stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_the_only_one_with_a_parent_outside() {
        let parents = |pid| Some(if pid > 10 { pid / 10 } else { 1 });
        assert_eq!(head_by(&[50, 5, 500, 51], parents), Some(5));
        assert_eq!(head_by(&[50, 51], parents), None, "two trees");
        assert_eq!(head_by(&[], parents), None);
        assert_eq!(head(&[std::process::id()]), Some(std::process::id()));
    }
}
