//! The flag words of the protocol.

open_flags! {
    /// What the server can do in the handshake (document: "Handshake flags").
    HandshakeFlags(u16) {
        /// The fixed newstyle negotiation is spoken.
        FIXED_NEWSTYLE = 0,
        /// The padding after the reply to EXPORT_NAME may be left out.
        NO_ZEROES = 1,
    }
}

open_flags! {
    /// The client's answer to [`HandshakeFlags`] (document: "Client flags").
    ClientFlags(u32) {
        /// The client speaks fixed newstyle.
        FIXED_NEWSTYLE = 0,
        /// The client wants no padding after the reply to EXPORT_NAME.
        NO_ZEROES = 1,
    }
}

open_flags! {
    /// What an export can do (document: "Transmission flags").
    TransmissionFlags(u16) {
        /// Always set.
        HAS_FLAGS = 0,
        /// The export is read-only.
        READ_ONLY = 1,
        /// FLUSH is understood.
        SEND_FLUSH = 2,
        /// The FUA flag is understood, on every command.
        SEND_FUA = 3,
        /// The medium has the characteristics of a rotating disk.
        ROTATIONAL = 4,
        /// TRIM is understood.
        SEND_TRIM = 5,
        /// WRITE_ZEROES is understood.
        SEND_WRITE_ZEROES = 6,
        /// The DF flag of READ is understood.
        SEND_DF = 7,
        /// A flush on one connection covers what was answered on all others.
        CAN_MULTI_CONN = 8,
        /// RESIZE (experimental) is understood.
        SEND_RESIZE = 9,
        /// CACHE is understood.
        SEND_CACHE = 10,
        /// The FAST_ZERO flag of WRITE_ZEROES is understood.
        SEND_FAST_ZERO = 11,
        /// The PAYLOAD_LEN flag of BLOCK_STATUS is understood (extended headers).
        BLOCK_STATUS_PAYLOAD = 12,
    }
}

open_flags! {
    /// Flags of one request (document: "Command flags").
    CommandFlags(u16) {
        /// The data is durable before the reply.
        FUA = 0,
        /// WRITE_ZEROES: allocate, do not punch a hole.
        NO_HOLE = 1,
        /// READ: answer in one piece.
        DF = 2,
        /// BLOCK_STATUS: one extent a context.
        REQ_ONE = 3,
        /// WRITE_ZEROES: fail at once where it would not be faster than writing.
        FAST_ZERO = 4,
        /// The length is that of a payload (extended headers).
        PAYLOAD_LEN = 5,
    }
}

open_flags! {
    /// Flags of a structured reply's chunk (document: "Structured reply flags").
    ChunkFlags(u16) {
        /// The last chunk of its reply.
        DONE = 0,
    }
}
