//! The configuration file of `serve`: its options, written down.
//!
//! The file is TOML, its keys are the names of the options, and it becomes options before anything else looks at them:
//! so names, forms and defaults exist once, in `serve`. What is said on the command line (or, for `control`, in the
//! environment) replaces what the file says of the same option. A node that is not told its state directory is the host's
//! own, and reads the host's file, [`DEFAULT_PATH`]; whoever names one describes another node, and gets no settings that he
//! did not write.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

use clap::builder::{Arg, ArgAction};
use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{ArgMatches, Command};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::usage;
use crate::error::{Failure, Outcome};

/// The host's own file.
pub(super) const DEFAULT_PATH: &str = "/etc/lazy-migrate/config.toml";

/// The largest file that is read, in bytes.
const MAX_BYTES: u64 = 1 << 20;
/// The command that has a file.
const SERVE: &str = "serve";
/// Options of `serve` that make no sense in the file: which file, and what is for the other commands.
const NOT_IN_THE_FILE: [&str; 4] = ["config", "json", "help", "version"];

/// The arguments of the process, with those of the file between them if there is one. What is wrong with the arguments
/// themselves is left to who parses them.
///
/// # Errors
/// [`Usage`](crate::error::Kind::Usage), naming the file, the line and the key: it cannot be read, is no TOML, has a key
/// that is no option or a value that the option does not take; or all together make no sense.
pub(super) fn complete(command: &Command, arguments: Vec<OsString>, default: &Path) -> Outcome<Vec<OsString>> {
    let mut lenient = command.clone().ignore_errors(true);
    // A question for help is no error; and it is answered without a file.
    let Ok(matches) = lenient.try_get_matches_from_mut(&arguments) else { return Ok(arguments) };
    let Some((SERVE, given)) = matches.subcommand() else { return Ok(arguments) };
    let chosen = given.get_one::<PathBuf>("config").cloned();
    let path = match &chosen {
        Some(path) => path.as_path(),
        None if is_given(given, "state_dir") || !default.exists() => return Ok(arguments),
        None => default,
    };
    let Some(serve) = lenient.find_subcommand(SERVE) else { return Ok(arguments) };
    let text = read(path)?;
    let mut added = settings(command, serve, given, path, &text)?;
    if chosen.is_none() {
        added.push(joined("config", path.as_os_str().to_owned()));
    }
    let place = (1..=arguments.len())
        .find(|&end| {
            let begin = lenient.try_get_matches_from_mut(&arguments[..end]);
            begin.is_ok_and(|matches| matches.subcommand_name() == Some(SERVE))
        })
        .unwrap_or(arguments.len());
    let mut completed = arguments;
    completed.splice(place..place, added);
    match command.clone().try_get_matches_from(&completed) {
        Err(error) if error.use_stderr() => {
            Err(usage(format!("{} (settings also come from {})", words(&error), path.display())))
        }
        _ => Ok(completed),
    }
}

fn read(path: &Path) -> Outcome<String> {
    let failed = |why: std::io::Error| {
        usage(format!("cannot read the configuration file {}: {why}; --config names another", path.display()))
    };
    let mut text = String::new();
    File::open(path).map_err(failed)?.take(MAX_BYTES + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > MAX_BYTES {
        return Err(usage(format!("{} is larger than {MAX_BYTES} bytes: it is no configuration file", path.display())));
    }
    Ok(text)
}

/// The file's settings as options, without those that are given.
fn settings(command: &Command, serve: &Command, given: &ArgMatches, path: &Path, text: &str) -> Outcome<Vec<OsString>> {
    let at = |span: Range<usize>, what: String| {
        let line = 1 + text.bytes().take(span.start).filter(|&byte| byte == b'\n').count();
        usage(format!("{}:{line}: {what}", path.display()))
    };
    let table = DeTable::parse(text).map_err(|error| at(error.span().unwrap_or(0..0), error.message().to_owned()))?;
    let mut keys: Vec<_> = table.get_ref().iter().collect();
    keys.sort_by_key(|(key, _)| key.span().start);
    let mut options = Vec::new();
    for (key, value) in keys {
        let name: &str = key.get_ref();
        let Some(option) = option(serve, name) else {
            let known: Vec<_> = serve.get_arguments().filter_map(|option| key_of(option)).collect();
            let what = format!("unknown key '{name}'; the keys are the options of serve: {}", known.join(", "));
            return Err(at(key.span(), what));
        };
        for (word, span) in words_of(option, name, value).map_err(|(span, what)| at(span, what))? {
            let alone = [OsString::from("lazy-migrate"), SERVE.into(), word.clone()];
            match command.clone().try_get_matches_from(alone) {
                Err(error) if matches!(error.kind(), ErrorKind::ValueValidation | ErrorKind::InvalidValue) => {
                    return Err(at(span, format!("key '{name}': {}", words(&error))));
                }
                _ if is_given(given, option.get_id().as_str()) => {}
                _ => options.push(word),
            }
        }
    }
    Ok(options)
}

/// Which option of `serve` a key is.
fn option<'a>(serve: &'a Command, key: &str) -> Option<&'a Arg> {
    serve.get_arguments().find(|option| key_of(option) == Some(key))
}

fn key_of(option: &Arg) -> Option<&str> {
    option.get_long().filter(|name| !NOT_IN_THE_FILE.contains(name))
}

/// Whether something stronger than the file says it.
fn is_given(given: &ArgMatches, id: &str) -> bool {
    matches!(given.value_source(id), Some(ValueSource::CommandLine | ValueSource::EnvVariable))
}

type Place<T> = (T, Range<usize>);

/// The words of the command line that say the same as the value of a key.
fn words_of(
    option: &Arg,
    key: &str,
    value: &Spanned<DeValue<'_>>,
) -> Result<Vec<Place<OsString>>, (Range<usize>, String)> {
    let wrong = |value: &Spanned<DeValue<'_>>, wanted: &str| {
        let what = format!("key '{key}' must be {wanted}, and is of type {}", value.get_ref().type_str());
        (value.span(), what)
    };
    let scalar = |value: &Spanned<DeValue<'_>>| match value.get_ref() {
        DeValue::String(text) => Some((joined(key, text.as_ref().into()), value.span())),
        DeValue::Integer(number) if number.radix() == 10 => Some((joined(key, number.as_str().into()), value.span())),
        _ => None,
    };
    match (option.get_action(), value.get_ref()) {
        (ArgAction::SetTrue, DeValue::Boolean(true)) => Ok(vec![(format!("--{key}").into(), value.span())]),
        (ArgAction::SetTrue, DeValue::Boolean(false)) => Ok(Vec::new()),
        (ArgAction::SetTrue, _) => Err(wrong(value, "true or false")),
        (ArgAction::Append, DeValue::Array(items)) => items
            .iter()
            .map(|item| scalar(item).ok_or_else(|| wrong(item, "a list of texts or whole numbers")))
            .collect(),
        (ArgAction::Append, _) => Err(wrong(value, "a list, for example [\"...\"]")),
        (_, _) => Ok(vec![scalar(value).ok_or_else(|| wrong(value, "a text or a whole number"))?]),
    }
}

fn joined(key: &str, value: OsString) -> OsString {
    let mut word = OsString::from(format!("--{key}="));
    word.push(value);
    word
}

/// What clap says is wrong, without its hints how to call the program.
fn words(error: &clap::Error) -> String {
    let text = error.to_string();
    let text = text.split("\n\nUsage:").next().unwrap_or_default();
    let text = text.split("\n\nFor more information").next().unwrap_or_default();
    Failure::usage(text.trim_start_matches("error: ")).message
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::super::{Arguments, Command as Ask, Process, serve::ServeArguments};
    use super::*;
    use crate::error::Kind;

    /// What `lazy-migrate LINE` is, where the host's file has this content.
    fn parse_with(host: Option<&str>, line: &str) -> Outcome<(ServeArguments, PathBuf)> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.toml");
        if let Some(host) = host {
            std::fs::write(&path, host).unwrap();
        }
        let line = line.replace("FILE", &path.to_string_lossy());
        let arguments = std::iter::once("lazy-migrate").chain(line.split_whitespace()).map(OsString::from).collect();
        // The default is that file, unless it is named.
        let completed = complete(&Arguments::command(), arguments, &path)?;
        let parsed = Arguments::try_parse_from(completed).map_err(|error| usage(words(&error)))?;
        match parsed.process {
            Process::Command(command) => match *command {
                Ask::Serve(arguments) => Ok((*arguments, parsed.control)),
                _ => panic!("another command"),
            },
            Process::Guard(_) | Process::InPodman(_) => panic!("another command"),
        }
    }

    fn refused(host: &str) -> String {
        let failure = parse_with(Some(host), "serve --config FILE").unwrap_err();
        assert_eq!(failure.kind, Kind::Usage);
        failure.message
    }

    const WHOLE: &str = r#"
# A comment.
state-dir = "/var/lib/x"
nbd = ["unix:/run/x/nbd.sock", "127.0.0.1:10809"]
peer = "10.0.0.1:10810"
insecure = true
lease = 20
runtime = ["runc=/usr/sbin/runc,root=/run/runc"]
control = "/run/x/control.sock"
"#;

    #[test]
    fn the_file_says_what_the_options_say() {
        let (arguments, control) = parse_with(Some(WHOLE), "serve").unwrap();
        let shown = format!("{arguments:?}");
        for part in ["\"/var/lib/x\"", "10.0.0.1:10810", "insecure: true", "lease: 20s", "root=/run/runc", "10809"] {
            assert!(shown.contains(part), "{part} is not in {shown}");
        }
        assert_eq!(control, Path::new("/run/x/control.sock"));
        // The same, however it is asked for.
        let (named, _) = parse_with(Some(WHOLE), "--json serve --config FILE").unwrap();
        let settings = |shown: &str| shown.split_once("state_dir").map(|(_, rest)| rest.to_owned());
        assert_eq!(settings(&format!("{named:?}")), settings(&shown));
    }

    #[test]
    fn the_command_line_replaces_the_file() {
        let line = "--control /c serve --lease 5s --config=FILE --nbd unix:/only";
        let (arguments, control) = parse_with(Some(WHOLE), line).unwrap();
        let shown = format!("{arguments:?}");
        assert!(shown.contains("lease: 5s") && shown.contains("/only"), "{shown}");
        assert!(!shown.contains("10809"), "a list of the file is replaced, not continued: {shown}");
        assert!(shown.contains("/var/lib/x"), "{shown}");
        assert_eq!(control, Path::new("/c"));
    }

    #[test]
    fn who_names_a_state_directory_gets_no_settings_of_the_host() {
        let (arguments, _) = parse_with(Some(WHOLE), "serve --state-dir /mine").unwrap();
        let shown = format!("{arguments:?}");
        assert!(shown.contains("/mine") && !shown.contains("10809"), "{shown}");
        let missing = parse_with(None, "serve").unwrap_err().message;
        assert!(missing.contains("--state-dir"), "{missing}");
        let named = parse_with(None, "serve --config FILE").unwrap_err();
        assert_eq!(named.kind, Kind::Usage);
        assert!(named.message.contains("cannot read the configuration file"), "{}", named.message);
    }

    #[test]
    fn a_word_before_the_command_is_not_taken_for_it() {
        let (arguments, control) = parse_with(Some(WHOLE), "--control serve serve").unwrap();
        assert!(format!("{arguments:?}").contains("10809"));
        assert_eq!(control, Path::new("serve"));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        for (text, line, what) in [
            ("state-dir = \"/x\"\nnbds = [\"unix:/n\"]\n", 2, "unknown key 'nbds'"),
            ("\n\nstate_dir = \"/x\"\n", 3, "unknown key 'state_dir'; the keys are the options of serve:"),
            ("config = \"/x\"\n", 1, "unknown key 'config'"),
            ("json = true\n", 1, "unknown key 'json'"),
            ("nbd = \"unix:/n\"\n", 1, "key 'nbd' must be a list"),
            ("nbd = [\n\"unix:/n\",\n7.5]\n", 3, "key 'nbd' must be a list of texts"),
            ("insecure = \"yes\"\n", 1, "key 'insecure' must be true or false, and is of type string"),
            ("lease = true\n", 1, "key 'lease' must be a text or a whole number, and is of type boolean"),
            ("[lease]\na = 1\n", 1, "key 'lease' must be a text or a whole number, and is of type table"),
            ("lease = \"soon\"\n", 1, "key 'lease': invalid value 'soon' for '--lease <TIME>'"),
            ("nbd = [\"unix:/n\",\n  \"unix:\"]\n", 2, "key 'nbd': invalid value 'unix:'"),
            ("lease = 1\nlease = 2\n", 2, "duplicate key"),
            ("lease\n", 1, ""),
        ] {
            let message = refused(text);
            assert!(message.contains(&format!("config.toml:{line}: {what}")), "{text:?}: {message}");
        }
    }

    #[test]
    fn what_makes_no_sense_together_names_the_file() {
        let message = refused("state-dir = \"/x\"\nallow-peer = [\"b\"]\n");
        assert!(message.contains("--tls <DIR>") && message.contains("(settings also come from /"), "{message}");
        let both = parse_with(Some("state-dir = \"/x\"\ntls = \"/t\"\n"), "serve --insecure").unwrap_err().message;
        assert!(both.contains("cannot be used with") && both.contains("config.toml"), "{both}");
        let without = refused("lease = 3\n");
        assert!(without.contains("--state-dir <DIR>"), "{without}");
    }
}
