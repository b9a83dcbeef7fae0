//! `status --watch`, as a person at a terminal sees it.

use std::io::{Read, Write};
use std::num::NonZeroU16;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use portable_pty::{Child, CommandBuilder, MasterPty, PtySize, native_pty_system};

use crate::kept;
use crate::support::{Node, PATIENCE, program, random_image, signal};

const MIB: u64 = 1 << 20;

/// The command in a terminal, and what stands on its screen.
struct Terminal {
    child: Box<dyn Child + Send + Sync>,
    master: Box<dyn MasterPty + Send>,
    keys: Box<dyn Write + Send>,
    screen: Arc<Mutex<vt100::Parser>>,
    reader: Option<std::thread::JoinHandle<()>>,
    /// The modes that it had before the command.
    before: String,
}

impl Terminal {
    fn start(control: &Path, arguments: &[&str], environment: &[(&str, &str)], size: (u16, u16)) -> Terminal {
        let (columns, rows) = size;
        let pty =
            native_pty_system().openpty(PtySize { rows, cols: columns, pixel_width: 0, pixel_height: 0 }).unwrap();
        let before = format!("{:?}", pty.master.get_termios());
        let mut command = CommandBuilder::new(program());
        command.arg("--control");
        command.arg(control);
        command.args(arguments);
        command.env("TERM", "xterm-256color");
        command.env("LC_ALL", "C.UTF-8");
        command.env_remove("NO_COLOR");
        for (name, value) in environment {
            command.env(name, value);
        }
        let child = pty.slave.spawn_command(command).unwrap();
        drop(pty.slave);
        let screen = Arc::new(Mutex::new(vt100::Parser::new(cells(rows), cells(columns), 0)));
        let (mut output, shared) = (pty.master.try_clone_reader().unwrap(), screen.clone());
        let reader = std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            // A terminal whose last user has gone reads as an error.
            while let Ok(length @ 1..) = output.read(&mut bytes) {
                shared.lock().unwrap().process(&bytes[..length]);
            }
        });
        let keys = pty.master.take_writer().unwrap();
        Terminal { child, keys, master: pty.master, screen, reader: Some(reader), before }
    }

    fn modes(&self) -> String {
        format!("{:?}", self.master.get_termios())
    }

    fn text(&self) -> String {
        self.screen.lock().unwrap().screen().contents()
    }

    /// Waits until the screen satisfies a condition, keeps it as a file, and returns it.
    #[track_caller]
    fn shows(&self, what: &str, condition: impl Fn(&str) -> bool) -> String {
        let begun = Instant::now();
        loop {
            let text = self.text();
            if condition(&text) {
                std::fs::write(kept(&format!("screen-{what}.txt")), &text).unwrap();
                return text;
            }
            assert!(begun.elapsed() < PATIENCE, "the screen does not show {what}:\n{text}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
        self.keys.flush().unwrap();
    }

    fn resize(&self, columns: u16, rows: u16) {
        self.screen.lock().unwrap().screen_mut().set_size(cells(rows), cells(columns));
        self.master.resize(PtySize { rows, cols: columns, pixel_width: 0, pixel_height: 0 }).unwrap();
    }

    /// It ends by itself, and the terminal is as it was: the first screen, a cursor, echo.
    #[track_caller]
    fn ends_in_order(mut self) {
        let begun = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(begun.elapsed() < PATIENCE, "it does not end:\n{}", self.text());
            std::thread::sleep(Duration::from_millis(10));
        };
        assert_eq!(status.exit_code(), 0);
        assert_eq!(self.modes(), self.before, "echo and the rest are as they were");
        if let Some(reader) = self.reader.take() {
            reader.join().unwrap();
        }
        let screen = self.screen.lock().unwrap();
        assert!(!screen.screen().alternate_screen() && !screen.screen().hide_cursor());
        assert_eq!(screen.screen().contents().trim(), "", "nothing is left on the first screen");
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn cells(count: u16) -> NonZeroU16 {
    NonZeroU16::new(count).expect("a screen has rows and columns")
}

/// A node with disks that another node pulls slowly: the second of them.
fn slow(dir: &Path, count: usize, size: u64, rate: u64) -> (Node, Node) {
    let a = Node::start(dir.join("a"), &[]);
    let b = Node::start(dir.join("b"), &[]);
    for number in 0..count {
        let (name, image) = (format!("disk-{number}"), dir.join(format!("{number}.img")));
        random_image(&image, size, 70 + number as u64);
        a.cli(&["add", &name, image.to_str().unwrap()]);
        b.cli(&["pull", &name, "--from", &a.uri(&name), "--rate", &rate.to_string()]);
    }
    (a, b)
}

fn row(text: &str, number: usize) -> &str {
    text.lines().nth(number).unwrap_or_default()
}

fn full_cells(text: &str) -> usize {
    row(text, 4).matches('█').count()
}

#[test]
fn a_pull_fills_the_strip_and_the_terminal_is_given_back() {
    let dir = tempfile::tempdir().unwrap();
    let (_a, mut b) = slow(dir.path(), 1, 24 * MIB, 3 * MIB);
    let mut terminal = Terminal::start(&b.control(), &["status", "disk-0", "--watch"], &[], (100, 24));
    let begun = terminal.shows("pulling", |text| row(text, 4).contains('█') && row(text, 4).contains('·'));
    assert!(row(&begun, 2).starts_with("disk-0  pull  pulling  epoch 0  link none"), "{begun}");
    assert!(row(&begun, 3).contains(" of 24.00 MiB"), "{begun}");
    assert!(row(&begun, 5).contains("faults 0  p50 0 us") && row(&begun, 5).contains("upstream connected"), "{begun}");
    let before = full_cells(&begun);
    let there = |text: &str| full_cells(text) > before && row(text, 4).contains('·');
    terminal.shows("fuller", |text| there(text) && row(text, 3).contains("/s  ") && row(text, 3).ends_with(" left"));
    assert!(terminal.screen.lock().unwrap().screen().alternate_screen());
    assert_ne!(terminal.modes(), terminal.before);
    terminal.resize(50, 12);
    let narrow = terminal.shows("narrow", |text| row(text, 4).trim().chars().count() == 46);
    assert!(narrow.lines().count() <= 12, "{narrow}");
    terminal.resize(100, 24);
    let whole = terminal.shows("complete", |text| row(text, 2).starts_with("disk-0  pull  complete"));
    assert!(row(&whole, 3).contains("100 %  24.00 MiB of 24.00 MiB"), "{whole}");
    terminal.shows("full-strip", |text| full_cells(text) == 96);

    // A node that goes is told, and its disk is there again when the node is.
    b.stop();
    let gone = terminal.shows("gone", |text| row(text, 1).starts_with("NOT NOW: cannot reach the node at "));
    assert!(row(&gone, 2).starts_with("disk-0  pull  complete"), "what was known stays: {gone}");
    b.start_again();
    terminal.shows("back", |text| row(text, 1).is_empty() && row(text, 2).starts_with("disk-0  pull  complete"));
    terminal.press("q");
    terminal.ends_in_order();
}

#[test]
fn every_way_out_gives_the_terminal_back_and_many_disks_scroll() {
    let dir = tempfile::tempdir().unwrap();
    let (_a, b) = slow(dir.path(), 7, MIB, 16 * MIB);
    let watch = |arguments: &[&str], environment: &[(&str, &str)]| {
        let terminal = Terminal::start(&b.control(), arguments, environment, (80, 24));
        terminal.shows("first", |text| row(text, 0).starts_with("lazy-migrate: exports"));
        terminal
    };
    let mut many = watch(&["status", "--watch"], &[]);
    many.shows("top", |text| row(text, 0).contains("exports 1-3 of 7") && row(text, 2).starts_with("disk-0"));
    many.press("\x1b[B");
    many.shows("one-down", |text| row(text, 0).contains("exports 2-4 of 7") && row(text, 2).starts_with("disk-1"));
    many.press("\x1b[F");
    many.shows("bottom", |text| row(text, 0).contains("exports 5-7 of 7") && row(text, 2).starts_with("disk-4"));
    many.press("\x1b");
    many.ends_in_order();

    let mut interrupted = watch(&["status", "--watch"], &[]);
    interrupted.press("\x03");
    interrupted.ends_in_order();

    let terminated = watch(&["status", "--watch"], &[]);
    signal(terminated.child.process_id().unwrap(), Signal::SIGTERM);
    terminated.ends_in_order();

    // The same without colours: no cell has one.
    let mut plain = watch(&["status", "--watch"], &[("NO_COLOR", "1")]);
    plain.shows("plain", |text| row(text, 4).contains('█'));
    let coloured = |terminal: &Terminal| {
        let parser = terminal.screen.lock().unwrap();
        let cell = |row, column| parser.screen().cell(row, column).map(|cell| cell.fgcolor());
        (0..24)
            .flat_map(|row| (0..80).map(move |column| (row, column)))
            .any(|(row, column)| cell(row, column).is_some_and(|colour| colour != vt100::Color::Default))
    };
    assert!(!coloured(&plain));
    plain.press("q");
    plain.ends_in_order();
    let mut bright = watch(&["status", "--watch"], &[]);
    bright.shows("bright", |text| row(text, 4).contains('█'));
    assert!(coloured(&bright));
    bright.press("q");
    bright.ends_in_order();
}

#[test]
fn where_no_person_watches_there_are_plain_lines() {
    let dir = tempfile::tempdir().unwrap();
    let (_a, b) = slow(dir.path(), 1, MIB, 16 * MIB);
    b.cli(&["wait", "disk-0"]);
    for (arguments, begins) in [
        (&["status", "--watch"][..], "disk-0: pull complete, 1.00 MiB"),
        (&["status", "disk-0", "--watch", "--json"], "{\"name\":\"disk-0\",\"role\":\"pull\""),
    ] {
        let mut watch = b.spawn_cli(arguments);
        let lines: Vec<String> = watch.output().take(2).collect();
        assert!(lines.len() == 2 && lines.iter().all(|line| line.starts_with(begins)), "{lines:?}");
        assert!(lines.iter().all(|line| !line.contains('\x1b')), "{lines:?}");
    }
    // Also on a terminal: JSON is for programs.
    let terminal = Terminal::start(&b.control(), &["status", "--watch", "--json"], &[], (400, 24));
    let text = terminal.shows("json", |text| text.contains("\"disks\":[{"));
    assert!(!terminal.screen.lock().unwrap().screen().alternate_screen(), "{text}");
    drop(b);
    let dir = tempfile::tempdir().unwrap();
    let nobody = Terminal::start(&dir.path().join("none.sock"), &["status", "--watch"], &[], (100, 24));
    let text = nobody.shows("nobody", |text| text.contains("cannot reach the node"));
    assert!(!nobody.screen.lock().unwrap().screen().alternate_screen(), "{text}");
}
