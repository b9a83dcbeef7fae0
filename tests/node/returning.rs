//! A disk that goes back to where it came from: only what was written meanwhile crosses the link, and whatever goes wrong
//! leaves each host with what it had.

use std::os::unix::fs::FileExt;

use crate::client::{Client, repeated};
use crate::pair::{MIB, SIZE};
use crate::support::{Node, free_port, hash, random_image, run, wait_for};

/// Two nodes that can each be the destination of the other, and what the disk holds.
struct Shuttle {
    a: Node,
    b: Node,
    to_a: String,
    to_b: String,
    image: std::path::PathBuf,
    content: Vec<u8>,
    dir: tempfile::TempDir,
}

impl Shuttle {
    /// The disk has been at A, and is complete at B.
    fn at_b(seed: u64, options_of_a: &[&str]) -> Shuttle {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("web.img");
        random_image(&image, SIZE, seed);
        let to_a = format!("127.0.0.1:{}", free_port());
        let to_b = format!("127.0.0.1:{}", free_port());
        let disk = format!("web={}", image.display());
        let mut options = vec!["--peer", &to_a, "--lease", "2s", "--disk", &disk];
        options.extend(options_of_a);
        let a = Node::start(dir.path().join("a"), &options);
        let b = Node::start(dir.path().join("b"), &["--peer", &to_b, "--lease", "2s"]);
        let content = std::fs::read(&image).unwrap();
        let shuttle = Shuttle { a, b, to_a, to_b, image, content, dir };
        shuttle.moved_to_b();
        shuttle
    }

    #[track_caller]
    fn moved_to_b(&self) {
        self.a.cli(&["prepare", "web", "--to", &self.to_b]);
        self.a.cli(&["handover", "web"]);
        self.b.cli(&["wait", "web", "--timeout", "60s"]);
        self.a.cli(&["wait", "web", "--timeout", "60s"]);
    }

    #[track_caller]
    fn moved_to_a(&self) {
        self.b.cli(&["prepare", "web", "--to", &self.to_a]);
        self.b.cli(&["handover", "web"]);
        self.a.cli(&["wait", "web", "--timeout", "60s"]);
        self.b.cli(&["wait", "web", "--timeout", "60s"]);
    }

    fn write(&mut self, node: char, offset: u64, length: u64, number: u64) {
        let node = if node == 'a' { &self.a } else { &self.b };
        let mut client = Client::connect(&node.uri("web"));
        client.write(offset, length, number);
        assert_eq!(client.ask("flush"), "ok");
        self.content[offset as usize..(offset + length) as usize].copy_from_slice(&repeated(number, length));
    }

    #[track_caller]
    fn assert_content(&self, node: &Node) {
        let copy = self.dir.path().join("copy.img");
        let _ = std::fs::remove_file(&copy);
        run("nbdcopy", "libnbd-bin", &[&node.uri("web"), copy.to_str().unwrap()]);
        assert!(hash(&copy) == blake3::hash(&self.content), "the disk has another content");
    }

    /// A is what it was when the disk had left it.
    #[track_caller]
    fn assert_a_released(&self) {
        let status = self.a.wait_status("web", "released", |status| status["phase"] == "released");
        assert_eq!((&status["role"], &status["epoch"]), (&"source".into(), &1.into()));
    }
}

#[test]
fn what_goes_back_is_only_what_was_written_and_it_lands_where_it_was() {
    let mut shuttle = Shuttle::at_b(71, &[]);
    // Whole blocks, a part of one, and one that becomes zero.
    shuttle.write('b', 5 * MIB, 3 * MIB, 0x1111);
    shuttle.write('b', 20 * MIB + 512, 1024, 0x2222);
    shuttle.write('b', SIZE - 4096, 4096, 0x3333);
    shuttle.write('b', 30 * MIB, 64 << 10, 0);
    let written = 3 * MIB + 4096 + 4096 + (64 << 10);
    shuttle.moved_to_a();
    let status = shuttle.a.status("web");
    let (pulled, skipped) = (status["pulled_bytes"].as_u64().unwrap(), status["skipped_bytes"].as_u64().unwrap());
    assert!((written - (64 << 10)..=written).contains(&pulled), "{pulled} bytes came for {written} that were written");
    assert!(skipped >= SIZE - written, "{skipped} bytes skipped");
    assert_eq!((&status["phase"], &status["role"]), (&"complete".into(), &"destination".into()));
    // In its old place, whole.
    assert!(hash(&shuttle.image) == blake3::hash(&shuttle.content));
    assert!(!shuttle.a.dir.join("state/disks/web/disk.img").exists(), "no second copy");

    // And there again, from where it is now: the same the other way round.
    shuttle.write('a', 9 * MIB, 8192, 0x4444);
    shuttle.moved_to_b();
    let pulled = shuttle.b.status("web")["pulled_bytes"].as_u64().unwrap();
    assert_eq!(pulled, 8192);
    shuttle.assert_content(&shuttle.b);

    // And back, by a node that was started again in between with the arguments that it always has.
    shuttle.a.stop();
    shuttle.a.start_again();
    shuttle.write('b', 0, 4096, 0x5555);
    shuttle.moved_to_a();
    assert_eq!(shuttle.a.status("web")["pulled_bytes"], 4096);
    shuttle.assert_content(&shuttle.a);
    shuttle.a.stop();
    shuttle.a.start_again();
    shuttle.assert_content(&shuttle.a);
    assert!(!shuttle.a.dir.join("state/disks/web/before").exists(), "nothing is kept of what was before");
}

#[test]
fn a_return_that_does_not_happen_leaves_the_disk_as_it_was() {
    let mut shuttle = Shuttle::at_b(72, &[]);
    shuttle.write('b', MIB, 4096, 7);
    let sealed = std::fs::read(&shuttle.image).unwrap();

    // Taken back by who asked.
    shuttle.b.cli(&["prepare", "web", "--to", &shuttle.to_a]);
    assert_eq!(shuttle.a.status("web")["role"], "destination");
    shuttle.b.cli(&["cancel", "web"]);
    shuttle.assert_a_released();

    // The node that it goes to ends in between, with and without a word.
    for kill in [true, false] {
        shuttle.b.cli(&["prepare", "web", "--to", &shuttle.to_a]);
        if kill {
            shuttle.a.kill()
        } else {
            shuttle.a.stop()
        }
        shuttle.a.start_again();
        shuttle.assert_a_released();
        let said = shuttle.b.fails(3, &["handover", "web"]);
        assert!(said.contains("prepare it again"), "{said}");
        shuttle.b.cli(&["cancel", "web"]);
    }
    assert!(std::fs::read(&shuttle.image).unwrap() == sealed, "not a byte of it has changed");

    // Nobody minds: it goes back all the same, and still only what was written.
    shuttle.moved_to_a();
    assert_eq!(shuttle.a.status("web")["pulled_bytes"], 4096);
    assert!(hash(&shuttle.image) == blake3::hash(&shuttle.content));
}

#[test]
fn who_prepares_and_cancels_again_and_again_finds_room_each_time() {
    let shuttle = Shuttle::at_b(77, &[]);
    let to_c = format!("127.0.0.1:{}", free_port());
    let _c = Node::start(shuttle.dir.path().join("c"), &["--peer", &to_c, "--lease", "2s"]);
    for _ in 0..20 {
        for to in [&to_c, &shuttle.to_a] {
            shuttle.b.cli(&["prepare", "web", "--to", to]);
            shuttle.b.cli(&["cancel", "web"]);
        }
    }
    shuttle.moved_to_a();
}

#[test]
fn what_is_not_the_disk_that_left_is_not_used() {
    let mut shuttle = Shuttle::at_b(73, &[]);
    let plan = shuttle.a.cli(&["rollback", "web", "--plan"]);
    assert!(plan.contains("there is no way back") && plan.contains(&shuttle.to_b), "{plan}");
    // Somebody uses it.
    let reader = Client::connect(&shuttle.a.uri("web"));
    let said = shuttle.b.fails(3, &["prepare", "web", "--to", &shuttle.to_a]);
    assert!(said.contains("1 clients use it"), "{said}");
    drop(reader);
    wait_for("the client has gone", || shuttle.a.status("web")["clients"] == 0);

    // Somebody wrote to it.
    let image = std::fs::File::options().write(true).open(&shuttle.image).unwrap();
    image.write_all_at(&[1], 12345).unwrap();
    let said = shuttle.b.fails(3, &["prepare", "web", "--to", &shuttle.to_a]);
    assert!(said.contains("its image was written to") && said.contains("remove it first"), "{said}");
    shuttle.assert_a_released();
    shuttle.assert_content(&shuttle.b);

    // It is another disk by now: then all of it comes, to a place of its own.
    shuttle.a.cli(&["remove", "web"]);
    shuttle.a.cli(&["add", "web", shuttle.image.to_str().unwrap()]);
    let said = shuttle.b.fails(3, &["prepare", "web", "--to", &shuttle.to_a]);
    assert!(said.contains("did not leave this host"), "{said}");
    shuttle.a.cli(&["remove", "web"]);
    shuttle.write('b', 0, 4096, 1);
    shuttle.moved_to_a();
    assert_eq!(shuttle.a.status("web")["pulled_bytes"], SIZE);
    shuttle.assert_content(&shuttle.a);
    assert_eq!(std::fs::read(&shuttle.image).unwrap()[12345], 1, "the image is left alone");
}

#[test]
fn another_migration_in_between_makes_the_old_disk_useless() {
    let mut shuttle = Shuttle::at_b(74, &[]);
    // On to a third host and back to B: what B knows of its writes begins there.
    let to_c = format!("127.0.0.1:{}", free_port());
    let c = Node::start(shuttle.dir.path().join("c"), &["--peer", &to_c, "--lease", "2s"]);
    shuttle.write('b', 0, 4096, 1);
    shuttle.b.cli(&["prepare", "web", "--to", &to_c]);
    shuttle.b.cli(&["handover", "web"]);
    shuttle.b.cli(&["wait", "web", "--timeout", "60s"]);
    // Both sides: the source hears of the end before the destination has recorded it.
    c.cli(&["wait", "web", "--timeout", "60s"]);
    c.cli(&["prepare", "web", "--to", &shuttle.to_b]);
    c.cli(&["handover", "web"]);
    c.cli(&["wait", "web", "--timeout", "60s"]);
    shuttle.b.cli(&["wait", "web", "--timeout", "60s"]);
    assert_eq!(shuttle.b.status("web")["pulled_bytes"], 0, "nothing was written at C");
    let said = shuttle.b.fails(3, &["prepare", "web", "--to", &shuttle.to_a]);
    assert!(said.contains("not what the disk was when it came to the host that offers it"), "{said}");
    shuttle.a.cli(&["remove", "web"]);
    shuttle.moved_to_a();
    shuttle.assert_content(&shuttle.a);
}

#[test]
fn a_host_that_dies_as_the_disk_comes_back_has_every_byte_right() {
    // Slowly, so that the end comes in the middle.
    let rate = MIB.to_string();
    let mut shuttle = Shuttle::at_b(75, &["--pull-rate", &rate]);
    shuttle.write('b', 2 * MIB, 6 * MIB, 0x77);
    shuttle.b.cli(&["prepare", "web", "--to", &shuttle.to_a]);
    shuttle.b.cli(&["handover", "web"]);
    shuttle.a.wait_status("web", "what was not written is there", |status| {
        status["present_bytes"].as_u64().unwrap() >= SIZE - 6 * MIB
    });
    shuttle.write('a', 30 * MIB + 512, 512, 0x88);
    shuttle.a.kill();
    shuttle.a.start_again();
    assert!(!shuttle.a.dir.join("state/disks/web/before").exists(), "there is no way back to what was before");
    shuttle.a.cli(&["wait", "web", "--timeout", "60s"]);
    shuttle.assert_content(&shuttle.a);
    assert!(hash(&shuttle.image) == blake3::hash(&shuttle.content));
}

#[test]
fn after_a_rollback_the_old_disk_is_not_believed_any_more() {
    let rate = MIB.to_string();
    let mut shuttle = Shuttle::at_b(76, &["--pull-rate", &rate]);
    shuttle.write('b', 2 * MIB, 12 * MIB, 0x99);
    shuttle.b.cli(&["prepare", "web", "--to", &shuttle.to_a]);
    shuttle.b.cli(&["handover", "web"]);
    shuttle.a.cli(&["wait", "web", "--for", "active", "--timeout", "20s"]);
    // A change that is to be forgotten.
    let mut client = Client::connect(&shuttle.a.uri("web"));
    client.write(40 * MIB, 4096, 0x66);
    assert_eq!(client.ask("flush"), "ok");
    drop(client);
    shuttle.b.cli(&["rollback", "web", "--wait"]);
    shuttle.assert_content(&shuttle.b);
    // Now A's image is neither the old disk nor the new one.
    shuttle.b.cli(&["prepare", "web", "--to", &shuttle.to_a]);
    shuttle.b.cli(&["handover", "web"]);
    shuttle.a.cli(&["wait", "web", "--for", "active", "--timeout", "20s"]);
    let before = shuttle.a.status("web");
    assert!(before["skipped_bytes"].as_u64().unwrap() < MIB, "{before}");
    let mut client = Client::connect(&shuttle.a.uri("web"));
    assert!(client.read(40 * MIB, 4096) == shuttle.content[40 * MIB as usize..][..4096]);
    drop(client);
    shuttle.b.cli(&["rollback", "web", "--wait"]);
    shuttle.assert_content(&shuttle.b);
}
