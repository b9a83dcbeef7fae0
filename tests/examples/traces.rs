//! `examples/traces/record.sh` and `examples/compare_orders`: a trace is recorded, and replayed in every order.

use crate::script::{Script, command};
use crate::support::run;

#[test]
fn a_trace_that_was_just_recorded_is_replayed_in_every_order() {
    let dir = tempfile::tempdir().unwrap();
    let into = dir.path().to_str().unwrap();
    let said = Script::of(&mut command("traces/record.sh", &[into, "container-start"])).end();
    assert_eq!(said.code, 0, "{said:?}");
    let files: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(files, ["container-start.trace"], "only what was asked for");

    let trace = dir.path().join("container-start.trace");
    let run_example = ["run", "--quiet", "--example", "compare_orders", "--", trace.to_str().unwrap()];
    let table = run(env!("CARGO"), "cargo", &run_example);
    println!("{table}");
    let rows: Vec<Vec<&str>> = table.lines().skip(2).map(|row| row.split('|').map(str::trim).collect()).collect();
    assert_eq!(rows.len(), 15, "five orders at three distances");
    for rows in rows.chunks(5) {
        let fetches: Vec<u64> = rows.iter().map(|row| row[4].parse().unwrap()).collect();
        assert_eq!((rows[0][3], rows[4][3]), ("on demand only", "dirty-tracked + neighbourhood"));
        assert!(fetches[4] < fetches[0], "whoever follows the tracker waits less often: {fetches:?}");
        assert!(rows[0][6] == "-" && rows[4][6].ends_with(" s"), "only on demand it is never whole: {rows:?}");
    }
}
