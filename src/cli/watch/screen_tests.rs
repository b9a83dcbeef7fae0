use super::*;
use crate::migration::driver::ContainerState;

fn disk(name: &str) -> DiskStatus {
    serde_json::from_value(serde_json::json!({
        "name": name, "role": "destination", "phase": "active", "epoch": 3, "size": 1 << 20, "block_size": 4096,
        "present_bytes": 1 << 19, "dirty_bytes": 0, "missing_bytes": 1 << 19, "pulled_bytes": 0, "skipped_bytes": 0,
        "pull_rate": 1 << 16, "eta_s": 8, "faults": { "count": 7, "p50_us": 900, "p99_us": 1500, "max_us": 1600 },
        "stalled_us": 2_000_000, "lease_remaining_ms": 900, "link": "up", "frozen_ms": null, "upstream": "connected",
        "clients": 1, "device": "/dev/nbd0", "peer": "10.0.0.1:10810", "container": null, "container_state": null,
        "paused": null, "last_error": null
    }))
    .unwrap()
}

fn map(present: &[u16], dirty: &[u16], hot: &[u8]) -> Overview {
    Overview { size: 1 << 20, block_size: 4096, present: present.into(), dirty: dirty.into(), hot: hot.into() }
}

fn shown(screen: &Screen, size: (usize, usize), style: &Style) -> Vec<String> {
    screen.lines(size, style).iter().map(|line| line.text().trim_end().to_owned()).collect()
}

#[test]
fn a_disk_is_told_in_full_and_each_kind_of_cell_has_a_sign_of_its_own() {
    let map = map(&[1000, 500, 1000, 500, 0, 0, 700], &[0, 0, 1, 1, 0, 0, 0], &[0, 0, 0, 0, 0, 1, 1]);
    let screen = Screen { disks: vec![disk("web")], maps: BTreeMap::from([("web".into(), map)]), ..Screen::default() };
    let wide = shown(&screen, (110, 10), &Style::of(true, "C"));
    let expected = [
        "lazy-migrate: exports 1",
        "",
        "web  destination  active  epoch 3  peer 10.0.0.1:10810  link up  lease 0.9 s",
        "  [####################....................]  50 %  512.00 KiB of 1.00 MiB  64.00 KiB/s  8 s left",
    ];
    assert_eq!(wide[..4], expected);
    assert_eq!(
        wide[5],
        "  faults 7  p50 900 us  p99 1.5 ms  stalled 2.00 s  clients 1  on /dev/nbd0  upstream connected"
    );
    assert_eq!(wide[9], "# present   + partly   w written here   ! hot, missing   . missing   q quits");
    // Seven cells on seven columns.
    let narrow = shown(&screen, (11, 10), &Style::of(false, "en_US.UTF-8"));
    assert_eq!(narrow[4], "  █▄ww·!!");
}

#[test]
fn nothing_is_wider_or_longer_than_the_screen() {
    let mut one = disk("a-name-that-is-rather-long");
    one.last_error = Some("an error of more words than there is room for on any small screen".into());
    let map = map(&[1000; 300], &[0; 300], &[0; 300]);
    let maps = BTreeMap::from([(one.name.clone(), map)]);
    let screen = Screen { disks: vec![one; 3], maps, gone: Some("gone ".repeat(40)), ..Screen::default() };
    for size in [(0, 0), (1, 1), (5, 3), (20, 8), (80, 24), (300, 100)] {
        let lines = screen.lines(size, &Style::of(true, "C.UTF-8"));
        assert_eq!(lines.len(), size.1, "{size:?}");
        assert!(lines.iter().all(|line| line.text().chars().count() <= size.0), "{size:?}");
    }
}

#[test]
fn many_disks_scroll_to_the_last_and_back_to_the_first() {
    let disks: Vec<_> = (0..20).map(|number| disk(&format!("disk-{number}"))).collect();
    let mut screen = Screen { disks, ..Screen::default() };
    let style = Style::of(false, "");
    let top = |screen: &Screen| shown(screen, (100, 24), &style)[2].split(' ').next().unwrap().to_owned();
    assert_eq!(top(&screen), "disk-0");
    assert_eq!(shown(&screen, (100, 24), &style)[0], "lazy-migrate: exports 1-3 of 20, arrow keys show the others");
    screen.scroll(1, (100, 24));
    assert_eq!(top(&screen), "disk-1");
    screen.scroll(isize::MAX, (100, 24));
    assert_eq!(top(&screen), "disk-17", "the last screen is a full one");
    assert_eq!(shown(&screen, (100, 24), &style)[0], "lazy-migrate: exports 18-20 of 20, arrow keys show the others");
    screen.scroll(-1, (100, 24));
    assert_eq!(top(&screen), "disk-16", "the first key is not lost");
    screen.scroll(isize::MIN, (100, 24));
    assert_eq!(top(&screen), "disk-0");
    // Disks that went leave the view where disks are.
    screen.scroll(19, (100, 24));
    screen.disks.truncate(2);
    assert_eq!(top(&screen), "disk-0");
}

#[test]
fn what_others_say_does_not_steer_the_terminal() {
    let mut one = disk("web");
    one.last_error = Some("\u{1b}[2Jgone\nsecond".into());
    let screen = Screen { disks: vec![one], ..Screen::default() };
    let shown = shown(&screen, (100, 10), &Style::of(true, ""));
    assert!(shown[6].contains("last error: ?[2Jgone?second"), "{shown:?}");
}

#[test]
fn the_bar_of_a_disk_that_was_given_away_is_that_of_its_new_host() {
    let mut one = disk("web");
    (one.present_bytes, one.missing_bytes) = (1 << 20, 0);
    one.destination = Some(crate::control::status::Filling::of(1 << 20, 1 << 18, 1 << 17));
    let line = bar(&one, 100, &ASCII).text();
    assert!(line.contains(" 25 %  256.00 KiB of 1.00 MiB  128.00 KiB/s  6 s left"), "{line}");
}

#[test]
fn all_of_it_is_said_only_when_nothing_is_missing() {
    let mut one = disk("web");
    (one.present_bytes, one.missing_bytes) = ((1 << 20) - 1, 1);
    let line = |disk: &DiskStatus| bar(disk, 100, &ASCII).text();
    assert!(line(&one).contains(" 99 %"), "{}", line(&one));
    assert!(line(&one).contains(".]"), "{}", line(&one));
    (one.present_bytes, one.missing_bytes) = (1 << 20, 0);
    assert!(line(&one).contains("100 %  1.00 MiB of 1.00 MiB") && line(&one).contains("##]"), "{}", line(&one));
}

#[test]
fn a_container_that_does_not_go_on_is_told_with_what_to_type() {
    let told = "container web DOES NOT GO ON: `lazy-migrate rollback disk` tries again";
    let mut status = disk("disk");
    status.container = Some("web".into());
    let lines = |status: &DiskStatus| {
        shown(&Screen { disks: vec![status.clone()], ..Screen::default() }, (110, 10), &Style::of(true, "C"))
    };
    assert!(!lines(&status).iter().any(|line| line.contains("DOES NOT")));
    status.container_state = Some(ContainerState::Stuck);
    assert!(lines(&status).iter().any(|line| line.trim() == told), "{:?}", lines(&status));
}
