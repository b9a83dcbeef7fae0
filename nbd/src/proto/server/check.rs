//! Which requests an export may see: one pure function.

use crate::limits::MAX_PAYLOAD;
use crate::wire::{Command, CommandFlags, Errno, Framing, Request};

/// What the negotiation settled about a connection.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Size of the export in bytes.
    pub size: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// Offsets and lengths are multiples of it; a power of two.
    pub minimum_block: u32,
    /// FAST_ZERO was offered.
    pub fast_zero: bool,
    /// The form of requests and replies.
    pub framing: Framing,
    /// At least one meta context was negotiated.
    pub contexts: bool,
}

impl Rules {
    /// The flags that a command may have.
    fn known_flags(&self, command: Command) -> Option<CommandFlags> {
        let extended = self.framing == Framing::Extended;
        let none = CommandFlags::NONE;
        let own = match command {
            Command::READ => none.with_if(CommandFlags::DF, self.framing.has_chunks()),
            Command::WRITE => none.with_if(CommandFlags::PAYLOAD_LEN, extended),
            Command::WRITE_ZEROES => CommandFlags::NO_HOLE.with_if(CommandFlags::FAST_ZERO, self.fast_zero),
            Command::BLOCK_STATUS => {
                CommandFlags::REQ_ONE.with_if(CommandFlags::PAYLOAD_LEN, extended && self.contexts)
            }
            Command::FLUSH | Command::TRIM | Command::CACHE => none,
            _ => return None,
        };
        Some(own | CommandFlags::FUA)
    }
}

/// Whether a request may be carried out; if not, the error to answer. The connection goes on in either case.
///
/// A request of length 0 at or before the end is right and has no effect, except for BLOCK_STATUS, whose answer needs
/// at least one extent.
///
/// # Errors
/// EINVAL for unknown commands and flags, for reads that are too long, for ranges that are not aligned to the minimum
/// block, and for ranges beyond the end; EPERM for changes to a read-only export; ENOSPC for writes beyond the end.
pub fn check(request: &Request, rules: &Rules) -> Result<(), Errno> {
    let known = rules.known_flags(request.command).ok_or(Errno::EINVAL)?;
    if request.flags.without(known) != CommandFlags::NONE {
        return Err(Errno::EINVAL);
    }
    let changes = matches!(request.command, Command::WRITE | Command::TRIM | Command::WRITE_ZEROES);
    if changes && rules.read_only {
        return Err(Errno::EPERM);
    }
    if request.command == Command::FLUSH {
        return Ok(());
    }
    let with_payload = matches!(request.command, Command::READ | Command::WRITE);
    if with_payload && request.length > MAX_PAYLOAD.into() {
        return Err(Errno::EINVAL);
    }
    let inside = request.offset.checked_add(request.length).is_some_and(|end| end <= rules.size);
    if !inside {
        let writes = matches!(request.command, Command::WRITE | Command::WRITE_ZEROES);
        return Err(if writes { Errno::ENOSPC } else { Errno::EINVAL });
    }
    if (request.offset | request.length) & u64::from(rules.minimum_block - 1) != 0 {
        return Err(Errno::EINVAL);
    }
    if request.command == Command::BLOCK_STATUS && (!rules.contexts || request.length == 0) {
        return Err(Errno::EINVAL);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: Rules = Rules {
        size: 10_000,
        read_only: false,
        minimum_block: 1,
        fast_zero: false,
        framing: Framing::Structured,
        contexts: true,
    };

    fn request(command: Command, flags: CommandFlags, offset: u64, length: u64) -> Request {
        Request { flags, command, cookie: 1, offset, length }
    }

    fn answer(command: Command, offset: u64, length: u64) -> Result<(), Errno> {
        check(&request(command, CommandFlags::NONE, offset, length), &RULES)
    }

    #[test]
    fn ranges_beyond_the_end_are_refused_with_the_documents_error() {
        for command in [Command::READ, Command::TRIM, Command::CACHE, Command::BLOCK_STATUS] {
            assert_eq!(answer(command, 9_999, 2), Err(Errno::EINVAL), "{command}");
            assert_eq!(answer(command, u64::MAX, 2), Err(Errno::EINVAL), "{command}, overflow");
            assert_eq!(answer(command, 9_998, 2), Ok(()), "{command}");
        }
        for command in [Command::WRITE, Command::WRITE_ZEROES] {
            assert_eq!(answer(command, 9_999, 2), Err(Errno::ENOSPC), "{command}");
            assert_eq!(answer(command, u64::MAX - 1, 4), Err(Errno::ENOSPC), "{command}, overflow");
            assert_eq!(answer(command, 0, 10_000), Ok(()), "{command}");
        }
    }

    #[test]
    fn a_length_of_zero_is_a_success_except_for_block_status() {
        for command in [Command::READ, Command::WRITE, Command::TRIM, Command::WRITE_ZEROES, Command::CACHE] {
            assert_eq!(answer(command, 10_000, 0), Ok(()), "{command}");
        }
        assert_eq!(answer(Command::BLOCK_STATUS, 0, 0), Err(Errno::EINVAL));
    }

    #[test]
    fn unknown_commands_and_flags_are_refused() {
        assert_eq!(answer(Command(99), 0, 1), Err(Errno::EINVAL));
        assert_eq!(answer(Command::RESIZE, 0, 1), Err(Errno::EINVAL));
        let with = |command, flags| check(&request(command, flags, 0, 1), &RULES);
        assert_eq!(with(Command::WRITE, CommandFlags(1 << 12)), Err(Errno::EINVAL));
        assert_eq!(with(Command::WRITE, CommandFlags::DF), Err(Errno::EINVAL));
        assert_eq!(with(Command::WRITE_ZEROES, CommandFlags::FAST_ZERO), Err(Errno::EINVAL));
        assert_eq!(with(Command::READ, CommandFlags::DF), Ok(()));
        let simple = Rules { framing: Framing::Simple, ..RULES };
        assert_eq!(check(&request(Command::READ, CommandFlags::DF, 0, 1), &simple), Err(Errno::EINVAL));
    }

    #[test]
    fn fua_is_accepted_on_every_command() {
        for number in 0..8 {
            let command = Command(number);
            if command != Command::DISC {
                assert_eq!(check(&request(command, CommandFlags::FUA, 0, 1), &RULES), Ok(()), "{command}");
            }
        }
    }

    #[test]
    fn changes_to_a_read_only_export_are_refused() {
        let rules = Rules { read_only: true, ..RULES };
        for command in [Command::WRITE, Command::TRIM, Command::WRITE_ZEROES] {
            assert_eq!(check(&request(command, CommandFlags::NONE, 0, 1), &rules), Err(Errno::EPERM), "{command}");
        }
        for command in [Command::READ, Command::FLUSH, Command::CACHE, Command::BLOCK_STATUS] {
            assert_eq!(check(&request(command, CommandFlags::NONE, 0, 1), &rules), Ok(()), "{command}");
        }
    }

    #[test]
    fn only_payloads_are_limited() {
        let rules = Rules { size: 1 << 40, ..RULES };
        let long = u64::from(MAX_PAYLOAD) + 1;
        assert_eq!(check(&request(Command::READ, CommandFlags::NONE, 0, long), &rules), Err(Errno::EINVAL));
        assert_eq!(check(&request(Command::WRITE, CommandFlags::NONE, 0, long), &rules), Err(Errno::EINVAL));
        for command in [Command::TRIM, Command::WRITE_ZEROES, Command::BLOCK_STATUS, Command::CACHE] {
            assert_eq!(check(&request(command, CommandFlags::NONE, 0, 1 << 39), &rules), Ok(()), "{command}");
        }
    }

    #[test]
    fn block_status_needs_a_context() {
        let rules = Rules { contexts: false, ..RULES };
        assert_eq!(check(&request(Command::BLOCK_STATUS, CommandFlags::NONE, 0, 1), &rules), Err(Errno::EINVAL));
    }

    #[test]
    fn a_payload_is_for_commands_that_have_one() {
        let rules = Rules { framing: Framing::Extended, ..RULES };
        let with = |command| check(&request(command, CommandFlags::PAYLOAD_LEN, 0, 1), &rules);
        let without = |command| check(&request(command, CommandFlags::NONE, 0, 1), &rules);
        for command in [Command::READ, Command::FLUSH, Command::TRIM, Command::CACHE, Command::WRITE_ZEROES] {
            assert_eq!((with(command), without(command)), (Err(Errno::EINVAL), Ok(())), "{command}");
        }
        assert_eq!((with(Command::WRITE), without(Command::WRITE)), (Ok(()), Ok(())), "the flag may be left out");
        assert_eq!((with(Command::BLOCK_STATUS), without(Command::BLOCK_STATUS)), (Ok(()), Ok(())));
        let compact = check(&request(Command::WRITE, CommandFlags::PAYLOAD_LEN, 0, 1), &RULES);
        assert_eq!(compact, Err(Errno::EINVAL), "the flag is for extended headers");
    }

    #[test]
    fn what_is_not_aligned_to_the_minimum_block_is_refused() {
        let rules = Rules { minimum_block: 512, size: 10_240, ..RULES };
        for command in [Command::READ, Command::WRITE, Command::TRIM, Command::WRITE_ZEROES, Command::BLOCK_STATUS] {
            let at = |offset, length| check(&request(command, CommandFlags::NONE, offset, length), &rules);
            assert_eq!(at(512, 1024), Ok(()), "{command}");
            assert_eq!(at(1, 512), Err(Errno::EINVAL), "{command}");
            assert_eq!(at(512, 511), Err(Errno::EINVAL), "{command}");
        }
    }

    #[test]
    fn fast_zeroes_have_to_be_offered() {
        let rules = Rules { fast_zero: true, ..RULES };
        let fast = request(Command::WRITE_ZEROES, CommandFlags::FAST_ZERO | CommandFlags::NO_HOLE, 0, 1);
        assert_eq!((check(&fast, &rules), check(&fast, &RULES)), (Ok(()), Err(Errno::EINVAL)));
    }
}
