//! The manual in its forms, all made from the commands' own descriptions: pages for `man`, one a command, and
//! `docs/cli.md`.

use std::fmt::Write;
use std::io;
use std::path::{Path, PathBuf};

use clap::builder::{Arg, Command};
use clap_mangen::Man;

use crate::error::{Failure, Outcome};

#[derive(Debug, clap::Args)]
pub(super) struct ManArguments {
    /// Write a page for each command into this directory instead: lazy-migrate.1, lazy-migrate-serve.1 and so on.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Print all of it as Markdown instead: docs/cli.md.
    #[arg(long, hide = true, conflicts_with = "dir")]
    markdown: bool,
}

/// What is printed; nothing if it went into files.
pub(super) fn run(arguments: &ManArguments, command: Command) -> Outcome<String> {
    if arguments.markdown {
        return Ok(markdown(command));
    }
    if let Some(directory) = &arguments.dir {
        let failed = |error: io::Error| {
            Failure::failed(format!("cannot write the manual pages into {}: {error}", directory.display()))
        };
        std::fs::create_dir_all(directory).and_then(|()| pages(&built(command), directory)).map_err(failed)?;
        return Ok(String::new());
    }
    let mut text = Vec::new();
    page(built(command))
        .render(&mut text)
        .map_err(|error| Failure::failed(format!("cannot make the manual page: {error}")))?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

fn built(command: Command) -> Command {
    let mut command = command.disable_help_subcommand(true);
    command.build();
    command
}

fn pages(command: &Command, directory: &Path) -> io::Result<()> {
    page(command.clone()).generate_to(directory)?;
    command.get_subcommands().filter(|sub| !sub.is_hide_set()).try_for_each(|sub| pages(sub, directory))
}

fn page(command: Command) -> Man {
    Man::new(command).source(concat!("lazy-migrate ", env!("CARGO_PKG_VERSION"))).manual("User Commands")
}

/// All commands, each with what it is for, how it is called and what can be said to it.
fn markdown(command: Command) -> String {
    let mut text = String::from(
        "# The command line\n\nMade from the program by `lazy-migrate man --markdown`: change it there.\n",
    );
    describe(&built(command), &mut text);
    text
}

fn describe(command: &Command, text: &mut String) {
    let name = command.get_bin_name().unwrap_or(command.get_name());
    let usage = command.clone().render_usage().to_string();
    let usage = usage.trim_start_matches("Usage: ");
    // Nothing that is written to a String fails.
    let _ = writeln!(text, "\n## {name}");
    if let Some(about) = command.get_long_about().or(command.get_about()) {
        let _ = writeln!(text, "\n{}", sentence(&about.to_string()));
    }
    let _ = writeln!(text, "\n```\n{usage}\n```");
    let is_own = |argument: &&Arg| {
        let shared = argument.is_global_set() && command.get_name() != "lazy-migrate";
        !argument.is_hide_set() && !shared && !matches!(argument.get_id().as_str(), "help" | "version")
    };
    let arguments: Vec<_> = command.get_arguments().filter(is_own).collect();
    if !arguments.is_empty() {
        let _ = writeln!(text);
    }
    for argument in arguments {
        let _ = writeln!(text, "- `{}`: {}", argument.to_string().trim_end_matches("..."), explain(argument));
    }
    if let Some(after) = command.get_after_long_help().or(command.get_after_help()) {
        let _ = writeln!(text, "\n{after}");
    }
    for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
        describe(sub, text);
    }
}

fn explain(argument: &Arg) -> String {
    let help = argument.get_long_help().or(argument.get_help()).map(ToString::to_string).unwrap_or_default();
    let mut parts = vec![sentence(&help)];
    let values = argument.get_possible_values();
    if argument.get_action().takes_values() && !values.is_empty() {
        let names: Vec<_> = values.iter().filter(|value| !value.is_hide_set()).map(|value| value.get_name()).collect();
        parts.push(format!("One of: {}.", names.join(", ")));
    }
    if argument.get_action().takes_values() && !argument.get_default_values().is_empty() {
        let defaults: Vec<_> = argument.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
        parts.push(format!("Default: {}.", defaults.join(", ")));
    }
    if let Some(variable) = argument.get_env() {
        parts.push(format!("Environment: {}.", variable.to_string_lossy()));
    }
    parts.retain(|part| !part.is_empty());
    parts.join(" ")
}

/// With its full stop, which clap takes away.
fn sentence(text: &str) -> String {
    let text = text.trim();
    match text.is_empty() || text.ends_with(['.', ']']) {
        true => text.to_owned(),
        false => format!("{text}."),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::super::Arguments;
    use super::*;

    #[test]
    fn the_page_about_the_command_line_is_that_of_the_program() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/cli.md");
        let made = markdown(Arguments::command());
        if std::env::var_os("REWRITE").is_some() {
            std::fs::write(path, &made).unwrap();
        }
        let found = std::fs::read_to_string(path).unwrap_or_default();
        let first = made.lines().zip(found.lines()).find(|(made, found)| made != found);
        assert!(
            made == found,
            "docs/cli.md is not what the program says; REWRITE=1 cargo test --lib command_line makes it anew. First: {first:?}"
        );
    }

    #[test]
    fn each_command_has_a_page() {
        let directory = tempfile::tempdir().unwrap();
        let into = directory.path().join("man");
        let arguments = ManArguments { dir: Some(into.clone()), markdown: false };
        assert_eq!(run(&arguments, Arguments::command()).unwrap(), "");
        for sub in built(Arguments::command()).get_subcommands().filter(|sub| !sub.is_hide_set()) {
            let page = std::fs::read_to_string(into.join(format!("lazy-migrate-{}.1", sub.get_name()))).unwrap();
            assert!(page.contains(&format!("lazy\\-migrate\\-{}", sub.get_name().replace('-', "\\-"))), "{page}");
        }
        let serve = std::fs::read_to_string(into.join("lazy-migrate-serve.1")).unwrap();
        assert!(serve.contains("state\\-dir") && serve.contains(env!("CARGO_PKG_VERSION")), "{serve}");
        assert!(into.join("lazy-migrate-tls-init.1").exists() && into.join("lazy-migrate.1").exists());
    }
}
