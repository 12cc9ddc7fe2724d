//! The 12-byte header that starts every vhost-user message, and its flags. Numbers are in
//! the machine's own byte order.

use super::error::Violation;

/// Bytes of the header.
pub const HEADER_SIZE: usize = 12;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// A message header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Request number.
    pub request: u32,
    flags: u32,
    /// Bytes that follow.
    pub size: u32,
}

impl Header {
    /// A request of ours.
    pub fn request(request: u32, size: u32, need_reply: bool) -> Self {
        let flags = if need_reply {
            VERSION | NEED_REPLY
        } else {
            VERSION
        };
        Self {
            request,
            flags,
            size,
        }
    }

    /// A reply of ours to `request`.
    pub fn reply(request: u32, size: u32) -> Self {
        Self {
            request,
            flags: VERSION | REPLY,
            size,
        }
    }

    /// As bytes on the wire.
    pub fn encode(self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        let words = [self.request, self.flags, self.size];
        for (to, word) in bytes.chunks_exact_mut(4).zip(words) {
            to.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }

    /// From bytes on the wire, unchecked.
    pub fn decode(bytes: &[u8; HEADER_SIZE]) -> Self {
        let mut words = [0; 3];
        for (word, from) in words.iter_mut().zip(bytes.chunks_exact(4)) {
            *word = from.try_into().map_or(0, u32::from_ne_bytes);
        }
        let [request, flags, size] = words;
        Self {
            request,
            flags,
            size,
        }
    }

    /// Whether the sender waits for an answer.
    pub fn needs_reply(&self) -> bool {
        self.flags & NEED_REPLY != 0
    }

    /// Checks that this is a request of at most `max_size` bytes.
    pub fn check_request(&self, max_size: u32) -> Result<(), Violation> {
        if self.flags & VERSION_MASK != VERSION || self.flags & !(VERSION_MASK | NEED_REPLY) != 0 {
            return Err(Violation::BadFlags(self.flags));
        }
        self.check_size(max_size)
    }

    /// Checks that this is a reply to `request` of at most `max_size` bytes. The need-reply
    /// flag may be left standing: libvhost-user echoes it.
    pub fn check_reply(&self, request: u32, max_size: u32) -> Result<(), Violation> {
        if self.flags & !NEED_REPLY != VERSION | REPLY {
            return Err(Violation::BadFlags(self.flags));
        }
        if self.request != request {
            return Err(Violation::WrongReply {
                got: self.request,
                expected: request,
            });
        }
        self.check_size(max_size)
    }

    fn check_size(&self, max_size: u32) -> Result<(), Violation> {
        if self.size > max_size {
            return Err(Violation::Oversize(self.size, max_size));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn replies_are_matched_and_bounded() {
        let reply = Header::reply(7, 8);
        assert_eq!(reply.check_reply(7, 8), Ok(()));
        assert_eq!(
            reply.check_reply(8, 8),
            Err(Violation::WrongReply {
                got: 7,
                expected: 8
            })
        );
        assert_eq!(reply.check_reply(7, 7), Err(Violation::Oversize(8, 7)));
        let echoed = Header {
            flags: VERSION | REPLY | NEED_REPLY,
            ..reply
        };
        assert_eq!(echoed.check_reply(7, 8), Ok(()));
        assert_eq!(
            reply.check_request(8),
            Err(Violation::BadFlags(VERSION | REPLY))
        );
        assert!(Header::request(1, 0, true).check_reply(1, 0).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_decode_and_encode_back(bytes in any::<[u8; HEADER_SIZE]>()) {
            let header = Header::decode(&bytes);
            prop_assert_eq!(header.encode(), bytes);
            if header.check_request(64).is_ok() || header.check_reply(3, 64).is_ok() {
                prop_assert!(header.size <= 64);
            }
        }
    }
}
