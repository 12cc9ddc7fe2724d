//! ttrpc's envelopes: the `Request` and `Response` messages that the frames of types 1 and
//! 2 carry.
//!
//! Read in place rather than through generated code: a generated decoder turns 256 KiB of
//! empty metadata entries into tens of megabytes, and the payload would be copied once
//! more. Nothing here allocates while reading. Wire format: protobuf's encoding
//! specification; field numbers: ttrpc's request.proto.
//!
//! ```text
//! Request  { 1 service, 2 method: string, 3 payload: bytes, 4 timeout_nano: int64,
//!            5 metadata: repeated KeyValue }
//! Response { 1 status: Status { 1 code: enum, 2 message: string }, 2 payload: bytes }
//! ```

use crate::status::{Code, RpcStatus};

/// Fields that an envelope may have in all, metadata and unknown ones included.
pub const MAX_FIELDS: usize = 128;

/// What is wrong with an envelope.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EnvelopeError {
    /// A field runs past the end, or a number is longer than 64 bits.
    #[error("the envelope is cut short")]
    Truncated,
    /// A field has a type that it must not have, or number 0.
    #[error("a field of the envelope has a wrong type")]
    WrongType,
    /// A name is not UTF-8.
    #[error("a name in the envelope is not UTF-8")]
    NotUtf8,
    /// More than [`MAX_FIELDS`].
    #[error("the envelope has more than {MAX_FIELDS} fields")]
    TooManyFields,
}

/// A `Request`, borrowed from its frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestView<'a> {
    /// Full name of the service.
    pub service: &'a str,
    /// Name of the method.
    pub method: &'a str,
    /// The method's request message.
    pub payload: &'a [u8],
    /// How long the client waits; 0: for ever.
    pub timeout_nano: i64,
}

/// A `Response`, borrowed from its frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ResponseView<'a> {
    /// The method's response message.
    Ok(&'a [u8]),
    /// The call failed.
    Failed(RpcStatus),
}

/// A field's value.
pub(crate) enum Value<'a> {
    Varint(u64),
    Bytes(&'a [u8]),
    Fixed,
    /// The beginning or the end of a group, which is not proto3.
    Group(Edge),
}

/// Where a group begins or ends.
pub(crate) enum Edge {
    Begin,
    End,
}

/// The fields of one message, in the order of the wire.
pub(crate) struct Fields<'a> {
    rest: &'a [u8],
    /// Fields that there may still be.
    left: usize,
}

impl<'a> Fields<'a> {
    fn new(message: &'a [u8]) -> Self {
        Self::of(message, MAX_FIELDS)
    }

    /// At most `most` of them.
    pub(crate) fn of(message: &'a [u8], most: usize) -> Self {
        Self {
            rest: message,
            left: most,
        }
    }

    /// How many more there may be.
    pub(crate) fn left(&self) -> usize {
        self.left
    }

    /// So many, when others have had some.
    pub(crate) fn leave(&mut self, left: usize) {
        self.left = left.min(self.left);
    }

    fn next(&mut self) -> Result<Option<(u64, Value<'a>)>, EnvelopeError> {
        match self.next_of_any() {
            Ok(Some((_, Value::Group(_)))) => Err(EnvelopeError::WrongType),
            other => other,
        }
    }

    /// The next one, groups included.
    pub(crate) fn next_of_any(&mut self) -> Result<Option<(u64, Value<'a>)>, EnvelopeError> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        self.left = self
            .left
            .checked_sub(1)
            .ok_or(EnvelopeError::TooManyFields)?;
        let tag = self.varint()?;
        let number = tag >> 3;
        if number == 0 {
            return Err(EnvelopeError::WrongType);
        }
        let value = match tag & 7 {
            0 => Value::Varint(self.varint()?),
            1 => self.take(8).map(|_| Value::Fixed)?,
            2 => {
                let length = self.varint()?;
                Value::Bytes(self.take(length)?)
            }
            5 => self.take(4).map(|_| Value::Fixed)?,
            3 => Value::Group(Edge::Begin),
            4 => Value::Group(Edge::End),
            // There are no others.
            _ => return Err(EnvelopeError::WrongType),
        };
        Ok(Some((number, value)))
    }

    fn take(&mut self, length: u64) -> Result<&'a [u8], EnvelopeError> {
        let length = usize::try_from(length).map_err(|_| EnvelopeError::Truncated)?;
        let (part, rest) = self
            .rest
            .split_at_checked(length)
            .ok_or(EnvelopeError::Truncated)?;
        self.rest = rest;
        Ok(part)
    }

    fn varint(&mut self) -> Result<u64, EnvelopeError> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.rest.split_first().ok_or(EnvelopeError::Truncated)?;
            self.rest = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(EnvelopeError::Truncated)
    }
}

fn text<'a>(value: &Value<'a>) -> Result<&'a str, EnvelopeError> {
    std::str::from_utf8(bytes(value)?).map_err(|_| EnvelopeError::NotUtf8)
}

fn bytes<'a>(value: &Value<'a>) -> Result<&'a [u8], EnvelopeError> {
    match value {
        Value::Bytes(bytes) => Ok(bytes),
        _ => Err(EnvelopeError::WrongType),
    }
}

fn number(value: &Value<'_>) -> Result<i64, EnvelopeError> {
    match value {
        // int64 and enums are two's complement in 64 bits.
        Value::Varint(value) => Ok(value.cast_signed()),
        _ => Err(EnvelopeError::WrongType),
    }
}

/// Reads a `Request`.
///
/// # Errors
///
/// [`EnvelopeError`] for anything that a protobuf decoder would refuse, and for more than
/// [`MAX_FIELDS`] fields.
pub fn parse_request(body: &[u8]) -> Result<RequestView<'_>, EnvelopeError> {
    let mut request = RequestView::default();
    let mut fields = Fields::new(body);
    while let Some((field, value)) = fields.next()? {
        match field {
            1 => request.service = text(&value)?,
            2 => request.method = text(&value)?,
            3 => request.payload = bytes(&value)?,
            4 => request.timeout_nano = number(&value)?,
            5 => {
                bytes(&value)?;
            }
            _ => {}
        }
    }
    Ok(request)
}

/// Reads a `Response`.
///
/// # Errors
///
/// As for [`parse_request`].
pub fn parse_response(body: &[u8]) -> Result<ResponseView<'_>, EnvelopeError> {
    let (mut code, mut message, mut payload) = (0i64, "", &[][..]);
    let mut fields = Fields::new(body);
    while let Some((field, value)) = fields.next()? {
        match field {
            1 => {
                let mut status = Fields::new(bytes(&value)?);
                while let Some((field, value)) = status.next()? {
                    match field {
                        1 => code = number(&value)?,
                        2 => message = text(&value)?,
                        _ => {}
                    }
                }
            }
            2 => payload = bytes(&value)?,
            _ => {}
        }
    }
    Ok(match Code::from_wire(code) {
        Code::Ok => ResponseView::Ok(payload),
        code => ResponseView::Failed(RpcStatus::new(code, message)),
    })
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn put_bytes(out: &mut Vec<u8>, field: u64, value: &[u8]) {
    if !value.is_empty() {
        put_varint(out, field << 3 | 2);
        put_varint(out, value.len() as u64);
        out.extend_from_slice(value);
    }
}

fn put_number(out: &mut Vec<u8>, field: u64, value: i64) {
    if value != 0 {
        put_varint(out, field << 3);
        put_varint(out, value.cast_unsigned());
    }
}

/// Appends a `Request` without metadata.
pub fn encode_request(out: &mut Vec<u8>, request: &RequestView<'_>) {
    put_bytes(out, 1, request.service.as_bytes());
    put_bytes(out, 2, request.method.as_bytes());
    put_bytes(out, 3, request.payload);
    put_number(out, 4, request.timeout_nano);
}

/// Appends a `Response`: the payload of a call that succeeded, or why it did not.
pub fn encode_response(out: &mut Vec<u8>, result: Result<&[u8], &RpcStatus>) {
    match result {
        Ok(payload) => put_bytes(out, 2, payload),
        Err(status) => {
            // Code 0 would be read as success.
            let code = match status.code {
                Code::Ok => Code::Unknown,
                code => code,
            };
            let mut inner = Vec::with_capacity(status.message.len().saturating_add(8));
            put_number(&mut inner, 1, i64::from(code.to_wire()));
            put_bytes(&mut inner, 2, status.message.as_bytes());
            put_bytes(out, 1, &inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use protobuf::Message;

    proptest! {
        #[test]
        fn the_reference_decoder_reads_our_requests(
            service in ".*", method in ".*",
            payload in prop::collection::vec(any::<u8>(), 0..300),
            timeout_nano in any::<i64>(),
        ) {
            let ours = RequestView { service: &service, method: &method, payload: &payload, timeout_nano };
            let mut wire = Vec::new();
            encode_request(&mut wire, &ours);
            let theirs = ttrpc::Request::parse_from_bytes(&wire).unwrap_or_default();
            prop_assert_eq!(&theirs.service, &service);
            prop_assert_eq!(&theirs.method, &method);
            prop_assert_eq!(&theirs.payload, &payload);
            prop_assert_eq!(theirs.timeout_nano, timeout_nano);
            prop_assert_eq!(parse_request(&wire), Ok(ours));
        }

        #[test]
        fn we_read_the_reference_encoder(
            service in ".*", payload in prop::collection::vec(any::<u8>(), 0..300),
            timeout_nano in any::<i64>(), metadata in 0usize..MAX_FIELDS - 4,
        ) {
            let mut theirs = ttrpc::Request::new();
            theirs.service = service.clone();
            theirs.payload = payload.clone();
            theirs.timeout_nano = timeout_nano;
            for n in 0..metadata {
                let mut entry = ttrpc::proto::KeyValue::new();
                entry.key = n.to_string();
                theirs.metadata.push(entry);
            }
            let wire = theirs.write_to_bytes().unwrap_or_default();
            let ours = RequestView { service: &service, method: "", payload: &payload, timeout_nano };
            prop_assert_eq!(parse_request(&wire), Ok(ours));
        }

        #[test]
        fn garbage_never_panics(body in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse_request(&body);
            let _ = parse_response(&body);
        }

        #[test]
        fn whatever_both_decoders_accept_they_read_alike(
            body in prop::collection::vec(0u8..0x30, 0..40),
        ) {
            let ours = parse_request(&body);
            let theirs = ttrpc::Request::parse_from_bytes(&body);
            if let (Ok(ours), Ok(theirs)) = (ours, theirs) {
                prop_assert_eq!(ours.service, theirs.service);
                prop_assert_eq!(ours.method, theirs.method);
                prop_assert_eq!(ours.payload, theirs.payload);
                prop_assert_eq!(ours.timeout_nano, theirs.timeout_nano);
            }
        }
    }

    #[test]
    fn responses_interoperate_with_the_reference_encoder() {
        let status = RpcStatus::new(Code::FailedPrecondition, "the machine is not paused");
        let mut wire = Vec::new();
        encode_response(&mut wire, Err(&status));
        let theirs = ttrpc::Response::parse_from_bytes(&wire).unwrap_or_default();
        assert_eq!(theirs.status().code(), ttrpc::Code::FAILED_PRECONDITION);
        assert_eq!(theirs.status().message(), status.message);
        assert_eq!(parse_response(&wire), Ok(ResponseView::Failed(status)));

        let mut theirs = ttrpc::Response::new();
        theirs.payload = vec![1, 2, 3];
        theirs.set_status(ttrpc::get_status(ttrpc::Code::OK, ""));
        let wire = theirs.write_to_bytes().unwrap_or_default();
        assert_eq!(parse_response(&wire), Ok(ResponseView::Ok(&[1, 2, 3])));
        assert_eq!(parse_response(&[]), Ok(ResponseView::Ok(&[])));
    }

    #[test]
    fn a_flood_of_empty_metadata_entries_is_refused_unread() {
        let bomb = [0x2a, 0x00].repeat(128 * 1024);
        assert_eq!(parse_request(&bomb), Err(EnvelopeError::TooManyFields));
    }

    #[test]
    fn lengths_beyond_the_end_are_refused() {
        assert_eq!(
            parse_request(&[0x0a, 5, b'x']),
            Err(EnvelopeError::Truncated)
        );
        let huge = [
            0x1a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1,
        ];
        assert_eq!(parse_request(&huge), Err(EnvelopeError::Truncated));
        assert_eq!(parse_request(&[0x80; 12]), Err(EnvelopeError::Truncated));
        assert_eq!(parse_request(&[0x0b]), Err(EnvelopeError::WrongType));
        assert_eq!(parse_request(&[0x08, 1]), Err(EnvelopeError::WrongType));
        assert_eq!(parse_request(&[0x0a, 1, 0xff]), Err(EnvelopeError::NotUtf8));
    }
}
