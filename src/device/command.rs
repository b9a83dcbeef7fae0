//! Runs the system's own tools and turns their failures into errors for people.

use std::ffi::OsStr;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use std::{io, thread};

use super::DeviceError;

/// How often a tool's end is looked for.
const POLL_INTERVAL: Duration = Duration::from_millis(2);
/// How much of a tool's complaint is shown, in bytes.
const MAX_OUTPUT: usize = 400;

/// A tool and the package that brings it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tool {
    pub(super) program: &'static str,
    pub(super) package: &'static str,
}

impl Tool {
    /// A command without input, whose messages are not translated.
    pub(super) fn command(self) -> Command {
        let mut command = Command::new(self.program);
        command.stdin(Stdio::null()).env("LC_ALL", "C");
        command
    }

    /// The error for a tool that could not be started.
    pub(super) fn not_started(self, error: io::Error) -> DeviceError {
        if error.kind() == io::ErrorKind::NotFound {
            return DeviceError::Missing { program: self.program, package: self.package };
        }
        DeviceError::Io { what: "run", path: self.program.into(), source: error }
    }

    /// Starts it, with its output in pipes. Only for tools that write less than a pipe holds.
    pub(super) fn start(self, arguments: &[&OsStr]) -> Result<Running, DeviceError> {
        let mut command = self.command();
        command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().map_err(|error| self.not_started(error))?;
        let line = arguments.iter().map(|argument| argument.to_string_lossy()).collect::<Vec<_>>().join(" ");
        Ok(Running { tool: self, line, child })
    }

    /// What a finished tool wrote to stdout, if it succeeded.
    pub(super) fn check(self, arguments: &str, output: Output) -> Result<String, DeviceError> {
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned());
        }
        Err(DeviceError::Failed {
            command: format!("{} {arguments}", self.program),
            status: output.status.to_string(),
            output: one_line(&output.stderr),
        })
    }
}

/// A tool that was started.
#[derive(Debug)]
pub(super) struct Running {
    tool: Tool,
    line: String,
    child: Child,
}

impl Running {
    /// Waits for its end until a deadline, and returns what it wrote to stdout; gives it back, killed, if it takes longer.
    /// A tool that waits for a device that nobody answers for stays until that device fails. Blocks.
    pub(super) fn finish(mut self, deadline: Instant) -> Result<Result<String, DeviceError>, Running> {
        while let Ok(None) = self.child.try_wait() {
            if Instant::now() >= deadline {
                // It may end by itself in between.
                let _ = self.child.kill();
                return Err(self);
            }
            thread::sleep(POLL_INTERVAL);
        }
        let output = self.child.wait_with_output().map_err(|error| self.tool.not_started(error));
        Ok(output.and_then(|output| self.tool.check(&self.line, output)))
    }
}

/// A tool's complaint on one line, cut to its end if it is long.
pub(super) fn one_line(text: &[u8]) -> String {
    let text = &text[text.len().saturating_sub(MAX_OUTPUT)..];
    let text = String::from_utf8_lossy(text);
    let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    if lines.is_empty() { "it said nothing".to_owned() } else { lines.join("; ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn later(seconds: u64) -> Instant {
        Instant::now() + Duration::from_secs(seconds)
    }

    #[test]
    fn a_tool_that_is_missing_names_its_package() {
        let tool = Tool { program: "lazy-migrate-no-such-tool", package: "some-package" };
        let error = tool.start(&[]).unwrap_err().to_string();
        assert!(error.contains("install the Debian package some-package"), "{error}");
    }

    #[test]
    fn a_tool_that_fails_is_quoted_on_one_line() {
        let tool = Tool { program: "sh", package: "dash" };
        let running = tool.start(&["-c".as_ref(), "echo one >&2; echo two >&2; exit 3".as_ref()]).unwrap();
        let error = running.finish(later(20)).unwrap().unwrap_err().to_string();
        assert!(error.contains("one; two") && error.contains('3') && !error.contains('\n'), "{error}");
    }

    #[test]
    fn a_tool_that_hangs_is_killed_and_given_back() {
        let tool = Tool { program: "sleep", package: "coreutils" };
        let running = tool.start(&["1000".as_ref()]).unwrap().finish(Instant::now()).unwrap_err();
        let ended = running.finish(later(20)).unwrap().unwrap_err().to_string();
        assert!(ended.starts_with("sleep 1000 failed (signal: 9"), "{ended}");
    }
}
