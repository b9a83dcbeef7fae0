//! A real Chromium without a window: what it made of a page, as markup and as a picture.

use std::process::{Command, Stdio};
use std::time::Instant;

use crate::kept;
use crate::support::PATIENCE;

/// What the page's own clock runs before the page is looked at: some looks at the node.
const BUDGET_MS: u32 = 4500;

/// Opens a page. `what` is how it looks: `--dump-dom` or `--screenshot=FILE`.
#[track_caller]
fn open(url: &str, what: &str) -> String {
    let profile = tempfile::tempdir().unwrap();
    let mut command = Command::new("chromium");
    command
        .args([
            "--headless",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            "--window-size=1100,2200",
        ])
        .args(["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"])
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .arg(format!("--virtual-time-budget={BUDGET_MS}"))
        .args([what, url]);
    if nix::unistd::geteuid().is_root() {
        command.arg("--no-sandbox");
    }
    let output = std::fs::File::create(profile.path().join("output")).unwrap();
    let errors = std::fs::File::create(profile.path().join("errors")).unwrap();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(errors)
        .spawn()
        .unwrap_or_else(|error| panic!("cannot run chromium ({error}); install the package chromium"));
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break Some(status);
        }
        if begun.elapsed() > 2 * PATIENCE {
            let _ = child.kill();
            let _ = child.wait();
            break None;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    };
    let read = |name: &str| std::fs::read_to_string(profile.path().join(name)).unwrap_or_default();
    assert!(status.is_some_and(|status| status.success()), "chromium {url}: {status:?}: {}", read("errors"));
    read("output")
}

/// The page as markup, after its script has run for a while; kept as a file.
#[track_caller]
pub fn markup(url: &str, name: &str) -> String {
    let text = open(url, "--dump-dom");
    std::fs::write(kept(&format!("{name}.html")), &text).unwrap();
    text
}

/// The page as a picture, kept as a file: how many of its points have each of these colours.
#[track_caller]
pub fn picture(url: &str, name: &str, colours: &[[u8; 3]]) -> Vec<usize> {
    let path = kept(&format!("{name}.png"));
    let _ = std::fs::remove_file(&path);
    open(url, &format!("--screenshot={}", path.display()));
    let file = std::io::BufReader::new(std::fs::File::open(&path).expect("the picture was taken"));
    let mut reader = png::Decoder::new(file).read_info().unwrap();
    let mut points = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut points).unwrap();
    let samples = info.color_type.samples();
    assert!(samples >= 3, "{info:?}");
    let points = points[..info.buffer_size()].chunks_exact(samples);
    colours.iter().map(|colour| points.clone().filter(|point| point[..3] == colour[..]).count()).collect()
}

/// What the page shows under a name, in the card of a disk.
#[track_caller]
pub fn figure(markup: &str, disk: &str, name: &str) -> String {
    let card = markup.split(&format!("data-disk=\"{disk}\"")).nth(1).unwrap_or_else(|| panic!("no {disk} in {markup}"));
    let card = card.split("</details>").next().unwrap();
    let rest = card.split(&format!("data-figure=\"{name}\"")).nth(1);
    let rest = rest.unwrap_or_else(|| panic!("{disk} has no {name}: {card}"));
    rest.split_once('>').unwrap().1.split("</dd>").next().unwrap().to_owned()
}
