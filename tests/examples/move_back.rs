//! `examples/move-back.sh`: a disk goes back to the host that it came from, with what was written meanwhile.

use std::fs;
use std::os::unix::fs::FileExt;

use crate::client::repeated;
use crate::pair::{MIB, Pair, SIZE};
use crate::script::{run, start};
use crate::support::program;

#[test]
fn a_disk_goes_back_with_what_was_written_elsewhere() {
    let pair = Pair::handed_over(95);
    let mut writer = pair.client_b();
    writer.write(MIB, 8192, 7);
    let there = format!("{} --control {}", program(), pair.a.control().display());
    let script = start(&pair.b, "move-back.sh", &["web", "--there", &there]);
    script.says("still arriving");
    writer.write(5 * MIB, 4096, 8);
    pair.wire.open();
    let said = script.end();
    assert_eq!(said.code, 0, "{said:?}");
    assert_eq!((pair.phase_a().as_str(), pair.phase_b().as_str()), ("complete", "released"));
    assert_eq!(writer.ask("write 0 4096 9"), "error EPERM", "it is A's now");
    assert!(pair.a.cli(&["verify", "web"]).ends_with("identical"));
    // Two blocks here and one there, and not the rest of the disk.
    assert!(said.stderr.contains(": 12288 bytes were sent"), "{said:?}");
    let mut reader = pair.client_a();
    assert!(reader.read(MIB, 8192) == repeated(7, 8192) && reader.read(5 * MIB, 4096) == repeated(8, 4096));
    for at in (6 * MIB..SIZE).step_by(MIB as usize) {
        assert!(reader.read(at, MIB) == pair.bytes(at, MIB), "at {at}");
    }
    reader.write(0, 4096, 3);
    let again = run(&pair.b, "move-back.sh", &["web", "--there", &there]);
    assert_eq!(again.code, 0, "{again:?}");

    // And from there once more, so that both directions have been the way back.
    // Whoever still reads the old disk there is in its way. And somebody has begun it by hand.
    drop(writer);
    pair.b.wait_status("web", "left by its clients", |status| status["clients"] == 0);
    pair.a.cli(&["prepare", "web", "--to", &pair.to_b]);
    let there = format!("{} --control {}", program(), pair.b.control().display());
    let said = run(&pair.a, "move-back.sh", &["web", "--there", &there]);
    assert_eq!(said.code, 0, "{said:?}");
    assert_eq!((pair.phase_a().as_str(), pair.phase_b().as_str()), ("released", "complete"));
    assert!(pair.client_b().read(0, 4096) == repeated(3, 4096) && pair.client_b().read(MIB, 8192) == repeated(7, 8192));
}

#[test]
fn a_disk_whose_old_image_was_changed_goes_back_as_a_whole_and_only_when_told_to() {
    let pair = Pair::handed_over(96);
    pair.complete();
    pair.client_b().write(0, 4096, 5);
    fs::File::options().write(true).open(&pair.image).unwrap().write_all_at(b"!", 9 * MIB).unwrap();
    let there = format!("{} --control {}", program(), pair.a.control().display());
    let refused = run(&pair.b, "move-back.sh", &["web", "--there", &there]);
    assert_eq!(refused.code, 3, "{refused:?}");
    assert!(refused.stderr.contains("was written to since it left"), "{refused:?}");
    assert_eq!(pair.phase_a(), "released");
    let scratch = ["web", "--there", &there, "--from-scratch"];
    let unknown = run(&pair.b, "move-back.sh", &scratch);
    assert!(unknown.code == 2 && unknown.stderr.contains("--to is needed"), "{unknown:?}");
    let to_a = format!("127.0.0.1:{}", pair.wire.port);
    let said = run(&pair.b, "move-back.sh", &[&scratch[..], &["--to", &to_a]].concat());
    assert_eq!(said.code, 0, "{said:?}");
    assert!(said.stderr.contains(&format!("{SIZE} bytes were sent")), "{said:?}");
    assert!(pair.client_a().read(0, 4096) == repeated(5, 4096));
    assert!(pair.client_a().read(9 * MIB, 4096) == pair.bytes(9 * MIB, 4096));
}

#[test]
fn a_disk_that_came_from_nowhere_or_whose_place_is_taken_does_not_go_back() {
    let pair = Pair::handed_over(99);
    pair.complete();
    assert_eq!(run(&pair.a, "move-back.sh", &["web"]).code, 0, "it was given away, and has arrived");
    // What is there under this name is not what it gave away.
    pair.a.cli(&["remove", "web"]);
    pair.a.cli(&["add", "web", &pair.image.display().to_string()]);
    let there = format!("{} --control {}", program(), pair.a.control().display());
    let refused = run(&pair.b, "move-back.sh", &["web", "--there", &there, "--from-scratch"]);
    assert_eq!(refused.code, 3, "{refused:?}");
    assert!(refused.stderr.contains("is local serving on the other host"), "{refused:?}");
    assert_eq!((pair.phase_a().as_str(), pair.phase_b().as_str()), ("serving", "complete"));
    assert_eq!(run(&pair.a, "move-back.sh", &["web"]).code, 3);
    assert_eq!(run(&pair.b, "move-back.sh", &["web", "--there", "false"]).code, 4);
    for wrong in [&[][..], &["web", "--from-scratch"], &["web", "--runtime", "runc"]] {
        assert_eq!(run(&pair.b, "move-back.sh", wrong).code, 2, "{wrong:?}");
    }
}
