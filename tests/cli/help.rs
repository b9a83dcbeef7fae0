//! The help of every command.

use std::collections::BTreeSet;

use crate::snapshot::{compare, directory, run};

/// The commands that a help text lists.
fn commands(help: &str) -> Vec<String> {
    let listed = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let name =
        |line: &str| Some(line.strip_prefix("  ")?.split(' ').next()?.to_owned()).filter(|name| !name.is_empty());
    listed.filter_map(name).filter(|name| name != "help").collect()
}

fn help(path: &[&str], seen: &mut BTreeSet<String>) {
    let said = run(&[path, &["--help"]].concat());
    assert_eq!((said.code, said.stderr.as_str()), (0, ""), "{path:?}");
    let name = if path.is_empty() { "lazy-migrate".to_owned() } else { path.join("-") };
    compare(&format!("help/{name}"), &said.stdout);
    seen.insert(name);
    for command in commands(&said.stdout) {
        help(&[path, &[command.as_str()]].concat(), seen);
    }
}

#[test]
fn every_command_has_the_help_that_is_documented() {
    let mut seen = BTreeSet::new();
    help(&[], &mut seen);
    assert!(["serve", "migrate", "rollback", "tls-init", "doctor"].iter().all(|name| seen.contains(*name)), "{seen:?}");
    let files = std::fs::read_dir(directory().join("help")).unwrap();
    let left: Vec<_> = files
        .map(|file| file.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned())
        .filter(|name| !seen.contains(name))
        .collect();
    assert!(left.is_empty(), "snapshots of commands that are no more: {left:?}");
}

#[test]
fn completions_and_the_manual_name_every_command() {
    let listed = commands(&run(&["--help"]).stdout);
    assert!(listed.len() > 15, "{listed:?}");
    for arguments in [&["man"][..], &["completions", "bash"], &["completions", "zsh"], &["completions", "fish"]] {
        let said = run(arguments);
        assert_eq!((said.code, said.stderr.as_str()), (0, ""), "{arguments:?}");
        let plain = said.stdout.replace('\\', "");
        let lacking: Vec<_> = listed.iter().filter(|command| !plain.contains(command.as_str())).collect();
        assert!(lacking.is_empty(), "{arguments:?} lacks {lacking:?}");
    }
}
