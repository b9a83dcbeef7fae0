//! Asks another program, within a time limit.

use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

/// How much of what a program says is looked at, in bytes.
const OUTPUT_LIMIT: usize = 4096;

/// What came of asking a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// It is not installed.
    Missing,
    /// It ended well; what it wrote.
    Said(String),
    /// It did not; why, in its words.
    Failed(String),
}

impl Asked {
    /// What it wrote, if it ended well.
    pub(super) fn said(&self) -> Option<&str> {
        match self {
            Asked::Said(text) => Some(text),
            Asked::Missing | Asked::Failed(_) => None,
        }
    }
}

/// Runs a program to its end.
pub(super) async fn ask(program: &str, arguments: &[&str], limit: Duration) -> Asked {
    // Administrators' programs are not in everybody's path.
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin";
    let mut command = Command::new(program);
    command.args(arguments).env("PATH", path).env("LC_ALL", "C").stdin(Stdio::null()).kill_on_drop(true);
    let output = match tokio::time::timeout(limit, command.output()).await {
        Err(_) => return Asked::Failed(format!("it did not end within {} s", limit.as_secs())),
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::NotFound => return Asked::Missing,
        Ok(Err(error)) => return Asked::Failed(error.to_string()),
        Ok(Ok(output)) => output,
    };
    let text = |bytes: &[u8]| String::from_utf8_lossy(&bytes[..bytes.len().min(OUTPUT_LIMIT)]).trim().to_owned();
    let (told, complained) = (text(&output.stdout), text(&output.stderr));
    if output.status.success() {
        return Asked::Said(if told.is_empty() { complained } else { told });
    }
    let last = told.lines().chain(complained.lines()).rfind(|line| !line.trim().is_empty());
    Asked::Failed(format!("{}: {}", output.status, last.unwrap_or("it said nothing")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn programs_are_missing_or_speak_or_fail_or_hang() {
        let second = Duration::from_secs(20);
        assert_eq!(ask("lazy-migrate-no-such-program", &[], second).await, Asked::Missing);
        assert_eq!(ask("sh", &["-c", "echo 1.2; echo x >&2"], second).await, Asked::Said("1.2".into()));
        let failed = ask("sh", &["-c", "echo first >&2; echo why >&2; exit 3"], second).await;
        assert!(matches!(&failed, Asked::Failed(why) if why.contains('3') && why.ends_with("why")), "{failed:?}");
        let hung = ask("sleep", &["1000"], Duration::from_millis(20)).await;
        assert!(matches!(&hung, Asked::Failed(why) if why.contains("did not end")), "{hung:?}");
    }
}
