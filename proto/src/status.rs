//! Outcome of a call as ttrpc carries it: the `google.rpc.Code` numbers and one line of
//! text. Used by every process, on whatever thread handles or makes the call.

use std::fmt;

/// Longest message that is put into a status; longer text is cut at a character boundary.
pub const MAX_STATUS_MESSAGE: usize = 1024;

/// `google.rpc.Code`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
#[allow(missing_docs)] // the names are google.rpc.Code's own and are documented there
pub enum Code {
    Ok = 0,
    Cancelled = 1,
    Unknown = 2,
    InvalidArgument = 3,
    DeadlineExceeded = 4,
    NotFound = 5,
    AlreadyExists = 6,
    PermissionDenied = 7,
    ResourceExhausted = 8,
    FailedPrecondition = 9,
    Aborted = 10,
    OutOfRange = 11,
    Unimplemented = 12,
    Internal = 13,
    Unavailable = 14,
    DataLoss = 15,
    Unauthenticated = 16,
}

impl Code {
    /// The code a peer sent; a number outside the specification is [`Code::Unknown`].
    pub fn from_wire(value: i64) -> Self {
        match value {
            0 => Self::Ok,
            1 => Self::Cancelled,
            3 => Self::InvalidArgument,
            4 => Self::DeadlineExceeded,
            5 => Self::NotFound,
            6 => Self::AlreadyExists,
            7 => Self::PermissionDenied,
            8 => Self::ResourceExhausted,
            9 => Self::FailedPrecondition,
            10 => Self::Aborted,
            11 => Self::OutOfRange,
            12 => Self::Unimplemented,
            13 => Self::Internal,
            14 => Self::Unavailable,
            15 => Self::DataLoss,
            16 => Self::Unauthenticated,
            _ => Self::Unknown,
        }
    }

    /// The number on the wire.
    pub fn to_wire(self) -> i32 {
        self as i32
    }

    /// The specification's name, `FAILED_PRECONDITION`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "OK",
            Self::Cancelled => "CANCELLED",
            Self::Unknown => "UNKNOWN",
            Self::InvalidArgument => "INVALID_ARGUMENT",
            Self::DeadlineExceeded => "DEADLINE_EXCEEDED",
            Self::NotFound => "NOT_FOUND",
            Self::AlreadyExists => "ALREADY_EXISTS",
            Self::PermissionDenied => "PERMISSION_DENIED",
            Self::ResourceExhausted => "RESOURCE_EXHAUSTED",
            Self::FailedPrecondition => "FAILED_PRECONDITION",
            Self::Aborted => "ABORTED",
            Self::OutOfRange => "OUT_OF_RANGE",
            Self::Unimplemented => "UNIMPLEMENTED",
            Self::Internal => "INTERNAL",
            Self::Unavailable => "UNAVAILABLE",
            Self::DataLoss => "DATA_LOSS",
            Self::Unauthenticated => "UNAUTHENTICATED",
        }
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a call failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message} ({code})")]
pub struct RpcStatus {
    /// What kind of failure it is.
    pub code: Code,
    /// One line for the caller.
    pub message: String,
}

impl RpcStatus {
    /// A status whose message is cut to [`MAX_STATUS_MESSAGE`] bytes.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        let mut message = message.into();
        truncate(&mut message, MAX_STATUS_MESSAGE);
        Self { code, message }
    }

    /// The request itself is wrong.
    pub fn invalid_argument(message: impl Into<String>) -> Self {
        Self::new(Code::InvalidArgument, message)
    }

    /// There is no such service or method.
    pub fn unimplemented(service: &str, method: &str) -> Self {
        Self::new(
            Code::Unimplemented,
            format!("no method {service}/{method} here"),
        )
    }

    /// The request does not fit the state that the callee is in.
    pub fn failed_precondition(message: impl Into<String>) -> Self {
        Self::new(Code::FailedPrecondition, message)
    }

    /// The callee's own fault.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Code::Internal, message)
    }
}

/// Cuts `text` to at most `max` bytes at a character boundary.
pub fn truncate(text: &mut String, max: usize) {
    if text.len() > max {
        let cut = (0..=max)
            .rev()
            .find(|&at| text.is_char_boundary(at))
            .unwrap_or(0);
        text.truncate(cut);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_message_is_cut_between_characters() {
        let status = RpcStatus::internal("é".repeat(MAX_STATUS_MESSAGE));
        assert_eq!(status.message.len(), MAX_STATUS_MESSAGE);
        let odd = RpcStatus::internal(format!("x{}", "é".repeat(MAX_STATUS_MESSAGE)));
        assert_eq!(odd.message.len(), MAX_STATUS_MESSAGE - 1);
    }

    #[test]
    fn every_code_survives_the_wire() {
        for value in 0..=16 {
            assert_eq!(i64::from(Code::from_wire(value).to_wire()), value);
        }
        assert_eq!(Code::from_wire(17), Code::Unknown);
        assert_eq!(Code::from_wire(-1), Code::Unknown);
    }
}
