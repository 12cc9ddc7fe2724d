//! Reads a request's message that anybody may have sent. Generated code makes hundreds of bytes of two
//! (an empty message in a list), so what it may come to is bounded before it decodes it.
//!
//! What is counted is the wire: whatever could be a message within the message is taken for one, since
//! a few fields too many, for texts, are far from the bound. That takes no descriptors.

use protobuf::Message;

use crate::envelope::{Edge, EnvelopeError, Fields, Value};
use crate::status::RpcStatus;

/// Fields that a message may have in all, those of messages in it and unknown ones included.
pub const MAX_FIELDS: usize = 16 * 1024;
/// How deep messages may lie in each other for protobuf's decoder.
const MAX_DEPTH: u32 = 100;

/// Reads a message that has no more than [`MAX_FIELDS`].
///
/// # Errors
///
/// INVALID_ARGUMENT: it is malformed, or has more.
pub fn decode<M: Message>(payload: &[u8]) -> Result<M, RpcStatus> {
    beside(payload, None)
}

/// The same of a message whose field of this number holds bytes of any kind, which are not looked at.
///
/// # Errors
///
/// As [`decode`].
pub fn decode_beside<M: Message>(payload: &[u8], bytes: u64) -> Result<M, RpcStatus> {
    beside(payload, Some(bytes))
}

fn beside<M: Message>(payload: &[u8], bytes: Option<u64>) -> Result<M, RpcStatus> {
    let malformed =
        |why: &str| RpcStatus::invalid_argument(format!("malformed {}: {why}", M::NAME));
    left(payload, MAX_FIELDS, MAX_DEPTH, bytes).ok_or_else(|| {
        malformed(&format!(
            "it has more than {MAX_FIELDS} fields: send less at a time"
        ))
    })?;
    M::parse_from_bytes(payload).map_err(|error| malformed(&error.to_string()))
}

/// How many of `most` fields are left when this message has had its own; `None`: it has more. Its field
/// of the number `bytes` is no message.
fn left(message: &[u8], most: usize, depth: u32, bytes: Option<u64>) -> Option<usize> {
    let mut fields = Fields::of(message, most);
    let mut groups = 0_usize;
    loop {
        match fields.next_of_any() {
            Ok(None) => return Some(fields.left()),
            Ok(Some((number, Value::Bytes(inner)))) if depth > 0 && bytes != Some(number) => {
                let rest = left(inner, fields.left(), depth.saturating_sub(1), None)?;
                fields.leave(rest);
            }
            // The decoder passes groups over, and stops where one ends that has not begun.
            Ok(Some((_, Value::Group(Edge::Begin)))) => groups = groups.saturating_add(1),
            Ok(Some((_, Value::Group(Edge::End)))) => match groups.checked_sub(1) {
                Some(open) => groups = open,
                None => return Some(fields.left()),
            },
            Ok(Some(_)) => {}
            Err(EnvelopeError::TooManyFields) => return None,
            // It was a text, or the decoder stops here, too.
            Err(_) => return Some(fields.left()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::{ConsoleInput, CreateRequest, DiskConfig};
    use crate::status::Code;

    fn create(disks: usize) -> Vec<u8> {
        let mut request = CreateRequest::new();
        request
            .config
            .mut_or_insert_default()
            .disks
            .resize(disks, DiskConfig::new());
        request.write_to_bytes().unwrap()
    }

    #[test]
    fn what_comes_to_too_much_is_refused_wherever_it_lies() {
        // One field is `config`.
        let most: CreateRequest = decode(&create(MAX_FIELDS - 1)).unwrap();
        assert_eq!(most.config.disks.len(), MAX_FIELDS - 1);
        let flat = [0x2a, 0].repeat(MAX_FIELDS + 1);
        // A group, which the decoder passes over, and what it stops at behind the others.
        let grouped = [&[0x7b, 0x7c][..], &create(MAX_FIELDS)].concat();
        let mut cut = create(MAX_FIELDS);
        cut.push(0x0a);
        for payload in [create(MAX_FIELDS), flat, grouped, cut] {
            let error = decode::<CreateRequest>(&payload).unwrap_err();
            assert_eq!(error.code, Code::InvalidArgument);
            let said = error.message.contains("more than 16384 fields");
            assert!(said, "{error:?}");
        }
    }

    #[test]
    fn what_is_malformed_is_refused() {
        // Cut short, a group without its beginning, field 0, a varint without an end.
        for payload in [&[0x0a, 2, 0][..], &[0x0c], &[0, 0], &[0x80; 12]] {
            let error = decode::<CreateRequest>(payload).unwrap_err();
            let said = error.message.contains("malformed CreateRequest");
            assert!(said, "{error:?}");
        }
    }

    #[test]
    fn texts_and_bytes_are_what_they_are() {
        let mut request = CreateRequest::new();
        request.config.mut_or_insert_default().cmdline = "s\nx dkc".repeat(500);
        let bytes = request.write_to_bytes().unwrap();
        assert_eq!(decode::<CreateRequest>(&bytes), Ok(request));
        // What might be fields of a message is typed.
        let mut typed = ConsoleInput::new();
        typed.set_typed([0x0a, 0].repeat(MAX_FIELDS + 1));
        let bytes = typed.write_to_bytes().unwrap();
        assert_eq!(decode_beside::<ConsoleInput>(&bytes, 2), Ok(typed));
        // What is beside them is looked at.
        let mut attach = vec![0x0a, 0x84, 0x80, 0x02];
        attach.extend([0x78, 0].repeat(MAX_FIELDS + 2));
        let error = decode_beside::<ConsoleInput>(&attach, 2).unwrap_err();
        assert!(error.message.contains("more than"), "{error:?}");
    }
}
