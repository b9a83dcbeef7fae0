//! `docs/state-machine.md` shows the phase tables; here they are drawn from the code, and compared.
//!
//! `REWRITE=1 cargo test --lib migration::document` writes them into the document.

use std::fmt::{Display, Write};
use std::path::Path;

use super::phase::{DestinationPhase, DestinationStep, Refusal, Refused, SourcePhase, SourceStep};

const BEGIN: &str = "<!-- drawn from the code: begin -->\n";
const END: &str = "<!-- drawn from the code: end -->";

fn cell<P: Display>(result: &Result<P, Refused>) -> String {
    match result {
        Ok(phase) => format!("**{phase}**"),
        Err(Refused { refusal: Refusal::Already, .. }) => "already so".into(),
        Err(Refused { refusal: Refusal::Wrong(why), .. }) => format!("refused: {why}"),
    }
}

/// One role: a picture of what leads somewhere, and the whole table.
fn role<P: Display + Copy, S: Copy>(
    title: &str,
    phases: &[P],
    steps: &[S],
    name: impl Fn(S) -> &'static str,
    step: impl Fn(P, S) -> Result<P, Refused>,
) -> String {
    let (mut picture, mut table) = (String::new(), String::new());
    // A dash in a name would be read as an arrow.
    let node = |phase: P| phase.to_string().replace('-', "_");
    for &phase in phases {
        for &taken in steps {
            let result = step(phase, taken);
            if let Ok(next) = &result {
                let _ = writeln!(picture, "    {} --> {}: {}", node(phase), node(*next), name(taken));
            }
            let _ = writeln!(table, "| {phase} | {} | {} |", name(taken), cell(&result));
        }
    }
    format!(
        "### {title}\n\n```mermaid\nstateDiagram-v2\n{picture}```\n\n| phase | step | leads to |\n|---|---|---|\n{table}\n"
    )
}

fn drawn() -> String {
    role("The source", &SourcePhase::ALL, &SourceStep::ALL, SourceStep::name, SourcePhase::step)
        + &role(
            "The destination",
            &DestinationPhase::ALL,
            &DestinationStep::ALL,
            DestinationStep::name,
            DestinationPhase::step,
        )
}

#[test]
fn the_document_shows_the_whole_table() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/state-machine.md");
    let document = std::fs::read_to_string(&path).unwrap();
    let (head, rest) = document.split_once(BEGIN).expect("the document has its first mark");
    let (shown, tail) = rest.split_once(END).expect("the document has its second mark");
    let drawn = drawn();
    assert!(!drawn.contains("no such row"), "every refusal has its reason:\n{drawn}");
    if std::env::var_os("REWRITE").is_some() {
        std::fs::write(&path, format!("{head}{BEGIN}{drawn}{END}{tail}")).unwrap();
        return;
    }
    let missing = |from: &str, of: &str, mark: &str| -> String {
        let lines = from.lines().filter(|line| !of.lines().any(|other| other == *line));
        lines.map(|line| format!("{mark} {line}\n")).collect()
    };
    assert!(
        shown == drawn,
        "docs/state-machine.md does not show the phase tables as they are; if the change is meant, run \
         `REWRITE=1 cargo test --lib migration::document`\n{}{}",
        missing(shown, &drawn, "-"),
        missing(&drawn, shown, "+"),
    );
}
