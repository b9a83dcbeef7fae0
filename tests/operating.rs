//! `docs/operating.md` is true: its commands are run as they stand there, on two nodes with the configuration that stands there,
//! and print what it says, but for numbers. Blocks that are marked `console` are run; others need more than a test has.
//!
//! The hosts are two loopback addresses of this machine, and the paths are below a directory of the test.

#[path = "support/mod.rs"]
mod support;

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use support::{free_port, program, random_image, wait_for};

const MIB: u64 = 1 << 20;

/// A host of the document.
struct Host {
    letter: char,
    /// What the document's names are here.
    names: Vec<(String, String)>,
    node: Option<Child>,
}

impl Host {
    fn new(letter: char, dir: &Path, port: u16) -> Host {
        let own = dir.join(letter.to_string());
        fs::create_dir_all(own.join("run")).unwrap();
        let at = |name: &str| own.join(name).display().to_string();
        let names = [
            ("/etc/lazy-migrate", at("etc")),
            ("/var/lib/lazy-migrate", at("state")),
            ("/run/lazy-migrate", at("run")),
            // Carried over, as the document says.
            ("/root/tls-of-b", dir.join("b/etc/tls").display().to_string()),
            ("/srv/web.img", dir.join("web.img").display().to_string()),
            ("10810", port.to_string()),
            ("10.0.0.1", "127.0.0.1".into()),
            ("10.0.0.2", "127.0.0.2".into()),
        ];
        Host { letter, names: names.map(|(of, here)| (of.to_owned(), here)).into(), node: None }
    }

    /// As it is called here.
    fn here(&self, text: &str) -> String {
        self.names.iter().fold(text.to_owned(), |text, (of, here)| text.replace(of, here))
    }

    fn run(&self, line: &str) -> String {
        let line = self.here(line);
        let mut words = line.split_whitespace();
        assert_eq!(words.next(), Some("lazy-migrate"), "{line}");
        let output = Command::new(program())
            .env("LAZY_MIGRATE_CONTROL", self.here("/run/lazy-migrate/control.sock"))
            .args(words)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}$ {line}: {errors}", self.letter);
        String::from_utf8(output.stdout).unwrap()
    }

    /// The service.
    fn start(&mut self, config: &str) {
        let own = match self.letter {
            'a' => config.to_owned(),
            _ => config.replace("peer = \"10.0.0.1", "peer = \"10.0.0.2"),
        };
        let path = self.here("/etc/lazy-migrate/config.toml");
        fs::write(&path, self.here(&own)).unwrap();
        let node = Command::new(program())
            .args(["--control", &self.here("/run/lazy-migrate/control.sock"), "serve", "--config", &path])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        self.node = Some(node);
        let socket = self.here("/run/lazy-migrate/control.sock");
        support::wait_for_socket(Path::new(&socket));
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(mut node) = self.node.take() {
            let _ = node.kill();
            let _ = node.wait();
        }
    }
}

/// The text without what differs from run to run: each number is `#`, and so is how it is abbreviated.
fn shape(text: &str) -> String {
    let mut shape = String::new();
    for c in text.trim().chars() {
        match c {
            '0'..='9' => {
                if !shape.ends_with('#') {
                    shape.push('#');
                }
            }
            '.' if shape.ends_with('#') => {}
            c => shape.push(c),
        }
    }
    ["KiB", "GiB", "B"].iter().fold(shape, |shape, unit| shape.replace(&format!("# {unit}"), "# MiB"))
}

/// The blocks of a document with this mark.
fn blocks<'a>(document: &'a str, mark: &str) -> Vec<&'a str> {
    let begin = format!("\n```{mark}\n");
    document.split(&begin).skip(1).map(|rest| rest.split("\n```").next().unwrap()).collect()
}

/// The commands of a block: on which host, what, and what it prints.
fn said(block: &str) -> Vec<(char, &str, String)> {
    let mut commands: Vec<(char, &str, String)> = Vec::new();
    for line in block.lines() {
        match (line.split_once("$ "), commands.last_mut()) {
            (Some((letter @ ("a" | "b"), command)), _) => {
                commands.push((letter.chars().next().unwrap(), command, String::new()));
            }
            (_, Some((_, _, printed))) => *printed += &format!("{line}\n"),
            (_, None) => panic!("{line}: whose output is that?"),
        }
    }
    commands
}

#[test]
fn the_first_migration_goes_as_it_is_described() {
    let document = include_str!("../docs/operating.md");
    let dir = tempfile::tempdir().unwrap();
    let port = free_port();
    random_image(&dir.path().join("web.img"), 64 * MIB, 7);
    let mut hosts = ['a', 'b'].map(|letter| Host::new(letter, dir.path(), port));
    let config = blocks(document, "toml")[0];
    let mut commands = 0;
    for (number, block) in blocks(document, "console").into_iter().enumerate() {
        if number == 1 {
            // After the certificates.
            hosts.iter_mut().for_each(|host| host.start(config));
        }
        for (letter, line, wanted) in said(block) {
            let host = hosts.iter().find(|host| host.letter == letter).unwrap();
            let wanted = shape(&host.here(&wanted));
            // What the other host does by itself may take a moment: then the same command says it.
            if line.starts_with("lazy-migrate status") {
                wait_for(&format!("`{line}` to say: {wanted}"), || shape(&host.run(line)) == wanted);
            } else {
                assert_eq!(shape(&host.run(line)), wanted, "{letter}$ {line}");
            }
            commands += 1;
        }
    }
    assert!(commands >= 14, "only {commands} commands were found in the document");
}

#[test]
fn numbers_do_not_count_and_words_do() {
    assert_eq!(shape("51.00 MiB at 9.5 s\n"), shape("7 KiB at 10 s"));
    assert_ne!(shape("web: handed over at epoch 1"), shape("web: prepared at epoch 1"));
}
