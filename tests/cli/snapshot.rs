//! Snapshots: what was said, without what differs each time, against a file.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::support::{Node, Said, program};

/// What users type and what they are answered, in the order in which it happens.
#[derive(Default)]
pub struct Scene {
    text: String,
    /// What differs each time, and what stands in its place.
    volatile: Vec<(String, String)>,
}

impl Scene {
    /// A scene in which `text` differs each time.
    pub fn new(volatile: &[(&str, &str)]) -> Scene {
        let volatile = volatile.iter().map(|(text, name)| (text.to_string(), name.to_string())).collect();
        Scene { text: String::new(), volatile }
    }

    /// A command to a node.
    #[track_caller]
    pub fn ask(&mut self, node: &Node, code: i32, arguments: &[&str]) {
        let said = node.try_cli(arguments);
        self.add(code, arguments, said);
    }

    /// A command without a node.
    #[track_caller]
    pub fn run(&mut self, code: i32, arguments: &[&str]) {
        self.add(code, arguments, run(arguments));
    }

    #[track_caller]
    fn add(&mut self, code: i32, arguments: &[&str], said: Said) {
        assert_eq!(said.code, code, "{arguments:?}: {said:?}");
        let error = |line: &&str| !line.starts_with("      "); // progress is indented
        let errors: Vec<_> = said.stderr.lines().filter(error).map(|line| format!("! {line}")).collect();
        let lines = [vec![format!("$ lazy-migrate {}", arguments.join(" ")), said.stdout], errors].concat();
        for line in lines.iter().flat_map(|text| text.lines()) {
            self.text += self.steady(line).trim_end();
            self.text += "\n";
        }
        self.text += &format!("= {code}\n\n");
    }

    /// Without what differs each time: paths and ports that were named, times, and numbers before a unit of time.
    fn steady(&self, line: &str) -> String {
        let mut line = line.to_owned();
        for (text, name) in &self.volatile {
            line = line.replace(text.as_str(), name);
        }
        let words: Vec<&str> = line.split(' ').collect();
        let number = |word: &str| !word.is_empty() && word.chars().all(|c| c.is_ascii_digit() || c == '.');
        let unit = |word: &&str| ["ms", "s"].contains(&word.trim_end_matches([',', ';', ':', '.']));
        let word = |at: usize| match words[at] {
            word if number(word) && words.get(at + 1).is_some_and(unit) => "N",
            word if word.len() > 20 && word.starts_with("20") && word.ends_with('Z') => "TIME",
            word => word,
        };
        (0..words.len()).map(word).collect::<Vec<_>>().join(" ")
    }

    /// Compares it with the file of that name.
    #[track_caller]
    pub fn matches(self, name: &str) {
        compare(name, self.text.trim_end());
    }
}

/// Runs the program, without a node and with no settings from outside.
pub fn run(arguments: &[&str]) -> Said {
    let mut command = Command::new(program());
    // Nor a terminal's width.
    command.args(arguments).env_remove("LAZY_MIGRATE_CONTROL").env_remove("COLUMNS").stdin(Stdio::null());
    command.output().unwrap().into()
}

/// Compares a text with the file `snapshots/NAME.txt`, or makes it the file with `REWRITE=1`.
#[track_caller]
pub fn compare(name: &str, text: &str) {
    let path = directory().join(format!("{name}.txt"));
    if std::env::var_os("REWRITE").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, format!("{text}\n")).unwrap();
        return;
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    let mut lines = expected.trim_end().lines().zip(text.lines());
    let (said, file) = (text.lines().count(), expected.trim_end().lines().count());
    if let Some((at, (expected, found))) = lines.by_ref().enumerate().find(|(_, (expected, found))| expected != found) {
        let path = path.display();
        panic!("{path}, line {}:\nexpected {expected}\n   found {found}\n(REWRITE=1 takes what is found)", at + 1);
    }
    assert_eq!(said, file, "{}: as many lines (REWRITE=1 takes what is found):\n{text}", path.display());
}

/// Where the files are.
pub fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cli/snapshots")
}
