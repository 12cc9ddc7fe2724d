//! ttrpc's frames (PROTOCOL.md of github.com/containerd/ttrpc): a 10-byte header — body
//! length and stream id as big-endian u32, a type byte, a flags byte — and a body.
//!
//! Without I/O of its own: bytes go in, frames come out. The limit is checked on the
//! header, before a byte of the body is kept, and the body's buffer grows only as bytes
//! arrive, so that a header alone costs the reader nothing. Used by whichever thread owns
//! the channel: a device's main thread, the VMM's manager and `api` threads, the CLI.

/// Bytes of a frame's header.
pub const HEADER_LEN: usize = 10;
/// Type of a frame that opens a stream: the body is a `Request`.
pub const TYPE_REQUEST: u8 = 1;
/// Type of a frame that ends a stream: the body is a `Response`.
pub const TYPE_RESPONSE: u8 = 2;
/// Type of a frame inside a stream: the body is a message of the method's own type.
pub const TYPE_DATA: u8 = 3;
/// The sender says no more on this stream.
pub const FLAG_REMOTE_CLOSED: u8 = 1;
/// The sender has more to say on this stream (set on the request of a client stream).
pub const FLAG_REMOTE_OPEN: u8 = 2;
/// The frame carries no message, as opposed to an empty one.
pub const FLAG_NO_DATA: u8 = 4;

/// A frame's first 10 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Length of the body.
    pub length: u32,
    /// Odd, chosen by the client.
    pub stream_id: u32,
    /// One of the `TYPE_` constants, or a number that this version does not know.
    pub kind: u8,
    /// `FLAG_` bits.
    pub flags: u8,
}

impl Header {
    /// The header as it stands on the wire.
    pub fn to_bytes(self) -> [u8; HEADER_LEN] {
        let [l0, l1, l2, l3] = self.length.to_be_bytes();
        let [s0, s1, s2, s3] = self.stream_id.to_be_bytes();
        [l0, l1, l2, l3, s0, s1, s2, s3, self.kind, self.flags]
    }

    /// Reads a header from the wire.
    pub fn from_bytes(bytes: [u8; HEADER_LEN]) -> Self {
        let [l0, l1, l2, l3, s0, s1, s2, s3, kind, flags] = bytes;
        Self {
            length: u32::from_be_bytes([l0, l1, l2, l3]),
            stream_id: u32::from_be_bytes([s0, s1, s2, s3]),
            kind,
            flags,
        }
    }

    /// Is this flag set?
    pub fn has(self, flag: u8) -> bool {
        self.flags & flag == flag
    }
}

/// One whole frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Its header.
    pub header: Header,
    /// Exactly `header.length` bytes.
    pub body: Vec<u8>,
}

/// What is wrong with the bytes that came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// A body longer than the limit was announced. Nothing of it was kept.
    #[error("a frame of {} bytes on stream {}, where {max} are allowed", header.length, header.stream_id)]
    Oversize {
        /// The header in question: its stream id is whom to answer.
        header: Header,
        /// The reader's limit.
        max: u32,
        /// The reader discards the body and goes on; else it is at its end, and every
        /// later [`FrameReader::feed`] fails in the same way.
        skipping: bool,
    },
}

#[derive(Debug)]
enum State {
    Header {
        bytes: [u8; HEADER_LEN],
        have: usize,
    },
    Body {
        header: Header,
        body: Vec<u8>,
    },
    Skip {
        left: u32,
    },
    Dead(FrameError),
}

const START: State = State::Header {
    bytes: [0; HEADER_LEN],
    have: 0,
};

/// Cuts a byte stream into frames of a bounded size.
#[derive(Debug)]
pub struct FrameReader {
    max: u32,
    skip_max: u32,
    state: State,
}

impl FrameReader {
    /// A reader that accepts bodies of at most `max` bytes and ends at the first longer one.
    pub fn new(max: u32) -> Self {
        Self {
            max,
            skip_max: 0,
            state: START,
        }
    }

    /// Discard a body that is too long, if it is announced with at most `skip_max` bytes,
    /// and go on behind it: a client that blocks in the middle of writing such a frame
    /// would never read our answer.
    #[must_use]
    pub fn skipping(mut self, skip_max: u32) -> Self {
        self.skip_max = skip_max;
        self
    }

    /// Nothing of an unfinished frame is held.
    pub fn is_idle(&self) -> bool {
        matches!(self.state, State::Header { have: 0, .. })
    }

    /// Bytes of memory held for an unfinished frame.
    pub fn buffered(&self) -> usize {
        match &self.state {
            State::Body { body, .. } => body.capacity(),
            _ => 0,
        }
    }

    /// Takes bytes from the front of `input` until a frame is whole (`Ok(Some)`), the input
    /// is used up (`Ok(None)`), or a frame is refused. Call again while input is left.
    ///
    /// # Errors
    ///
    /// [`FrameError::Oversize`] as soon as the header of a frame beyond the limit is whole.
    pub fn feed(&mut self, input: &mut &[u8]) -> Result<Option<Frame>, FrameError> {
        loop {
            match &mut self.state {
                State::Header { bytes, have } => {
                    let missing = HEADER_LEN.saturating_sub(*have);
                    let part = take(input, missing);
                    for (to, from) in bytes.iter_mut().skip(*have).zip(part) {
                        *to = *from;
                    }
                    *have = have.saturating_add(part.len());
                    if *have < HEADER_LEN {
                        return Ok(None);
                    }
                    let header = Header::from_bytes(*bytes);
                    if header.length > self.max {
                        let skipping = header.length <= self.skip_max;
                        let error = FrameError::Oversize {
                            header,
                            max: self.max,
                            skipping,
                        };
                        self.state = if skipping {
                            State::Skip {
                                left: header.length,
                            }
                        } else {
                            State::Dead(error)
                        };
                        return Err(error);
                    }
                    self.state = State::Body {
                        header,
                        body: Vec::new(),
                    };
                }
                State::Body { header, body } => {
                    let length = usize::try_from(header.length).unwrap_or(usize::MAX);
                    let part = take(input, length.saturating_sub(body.len()));
                    append_bounded(body, part, length);
                    if body.len() < length {
                        return Ok(None);
                    }
                    let frame = Frame {
                        header: *header,
                        body: std::mem::take(body),
                    };
                    self.state = START;
                    return Ok(Some(frame));
                }
                State::Skip { left } => {
                    let part = take(input, usize::try_from(*left).unwrap_or(usize::MAX));
                    *left = left.saturating_sub(u32::try_from(part.len()).unwrap_or(u32::MAX));
                    if *left > 0 {
                        return Ok(None);
                    }
                    self.state = START;
                }
                State::Dead(error) => return Err(*error),
            }
        }
    }
}

fn take<'a>(input: &mut &'a [u8], at_most: usize) -> &'a [u8] {
    let (part, rest) = input.split_at(at_most.min(input.len()));
    *input = rest;
    part
}

/// Appends with doubling growth that never reserves more than `length` in all.
fn append_bounded(body: &mut Vec<u8>, part: &[u8], length: usize) {
    let need = body.len().saturating_add(part.len());
    if need > body.capacity() {
        let target = need.max(body.capacity().saturating_mul(2)).min(length);
        body.reserve_exact(target.saturating_sub(body.len()));
    }
    body.extend_from_slice(part);
}

/// A body that no frame can carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a message of {0} bytes does not fit into a frame")]
pub struct TooLong(pub usize);

/// Appends a whole frame to `out`.
///
/// # Errors
///
/// [`TooLong`] if the body's length does not fit into the header; `out` is untouched.
pub fn encode(
    out: &mut Vec<u8>,
    kind: u8,
    stream_id: u32,
    flags: u8,
    body: &[u8],
) -> Result<(), TooLong> {
    let length = u32::try_from(body.len()).map_err(|_| TooLong(body.len()))?;
    out.extend_from_slice(
        &Header {
            length,
            stream_id,
            kind,
            flags,
        }
        .to_bytes(),
    );
    out.extend_from_slice(body);
    Ok(())
}

/// Appends the frame that ends a stream of data frames.
pub fn encode_end_of_stream(out: &mut Vec<u8>, stream_id: u32) {
    let header = Header {
        length: 0,
        stream_id,
        kind: TYPE_DATA,
        flags: FLAG_REMOTE_CLOSED | FLAG_NO_DATA,
    };
    out.extend_from_slice(&header.to_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MAX: u32 = 300;

    fn frames() -> impl Strategy<Value = Vec<Frame>> {
        let frame = (
            any::<u32>(),
            any::<u8>(),
            any::<u8>(),
            prop::collection::vec(any::<u8>(), 0..=MAX as usize),
        )
            .prop_map(|(stream_id, kind, flags, body)| Frame {
                header: Header {
                    length: u32::try_from(body.len()).unwrap_or(0),
                    stream_id,
                    kind,
                    flags,
                },
                body,
            });
        prop::collection::vec(frame, 0..8)
    }

    fn wire(frames: &[Frame]) -> Vec<u8> {
        let mut out = Vec::new();
        for frame in frames {
            let header = frame.header;
            encode(
                &mut out,
                header.kind,
                header.stream_id,
                header.flags,
                &frame.body,
            )
            .unwrap_or(());
        }
        out
    }

    /// Feeds `bytes` in pieces whose sizes cycle through `cuts`.
    fn feed_in_pieces(
        reader: &mut FrameReader,
        mut bytes: &[u8],
        cuts: &[usize],
    ) -> (Vec<Frame>, Vec<FrameError>) {
        let (mut frames, mut errors) = (Vec::new(), Vec::new());
        let mut cuts = cuts.iter().copied().cycle();
        while !bytes.is_empty() {
            let size = cuts.next().unwrap_or(1).clamp(1, bytes.len());
            let (mut piece, rest) = bytes.split_at(size);
            bytes = rest;
            loop {
                match reader.feed(&mut piece) {
                    Ok(Some(frame)) => frames.push(frame),
                    Ok(None) => break,
                    Err(error) => {
                        errors.push(error);
                        if !matches!(error, FrameError::Oversize { skipping: true, .. }) {
                            return (frames, errors);
                        }
                    }
                }
                assert!(reader.buffered() <= MAX as usize);
            }
            assert!(reader.buffered() <= MAX as usize);
        }
        (frames, errors)
    }

    proptest! {
        #[test]
        fn any_split_of_the_bytes_gives_the_same_frames(
            sent in frames(),
            cuts in prop::collection::vec(1usize..40, 1..10),
        ) {
            let mut reader = FrameReader::new(MAX);
            let (got, errors) = feed_in_pieces(&mut reader, &wire(&sent), &cuts);
            prop_assert_eq!(got, sent);
            prop_assert!(errors.is_empty());
            prop_assert!(reader.is_idle());
        }

        #[test]
        fn a_truncated_stream_gives_only_the_whole_frames(
            sent in frames(),
            keep in 0.0f64..1.0,
            cuts in prop::collection::vec(1usize..40, 1..10),
        ) {
            let bytes = wire(&sent);
            let keep = (bytes.len() as f64 * keep) as usize;
            let mut reader = FrameReader::new(MAX);
            let (got, errors) = feed_in_pieces(&mut reader, &bytes[..keep], &cuts);
            prop_assert!(errors.is_empty());
            prop_assert!(sent.starts_with(&got));
            prop_assert_eq!(reader.is_idle(), wire(&got).len() == keep);
        }

        #[test]
        fn garbage_neither_panics_nor_allocates_beyond_the_limit(
            bytes in prop::collection::vec(any::<u8>(), 0..2000),
            cuts in prop::collection::vec(1usize..40, 1..10),
            skip in any::<u32>(),
        ) {
            let mut reader = FrameReader::new(MAX).skipping(skip);
            let (got, _) = feed_in_pieces(&mut reader, &bytes, &cuts);
            prop_assert!(got.iter().all(|frame| frame.body.len() <= MAX as usize
                && frame.body.capacity() <= MAX as usize
                && frame.body.len() == frame.header.length as usize));
        }

        #[test]
        fn frames_behind_a_skipped_one_arrive(
            before in frames(),
            after in frames(),
            extra in 1u32..500,
            cuts in prop::collection::vec(1usize..40, 1..10),
        ) {
            let big = Header { length: MAX + extra, stream_id: 77, kind: TYPE_REQUEST, flags: 0 };
            let mut bytes = wire(&before);
            bytes.extend_from_slice(&big.to_bytes());
            bytes.resize(bytes.len() + big.length as usize, 0xaa);
            bytes.extend_from_slice(&wire(&after));
            let mut reader = FrameReader::new(MAX).skipping(MAX + 500);
            let (got, errors) = feed_in_pieces(&mut reader, &bytes, &cuts);
            prop_assert_eq!(errors, vec![FrameError::Oversize { header: big, max: MAX, skipping: true }]);
            prop_assert_eq!(got, [before, after].concat());
        }
    }

    #[test]
    fn an_oversize_header_is_refused_before_its_body_comes() {
        let header = Header {
            length: MAX + 1,
            stream_id: 9,
            kind: TYPE_REQUEST,
            flags: 0,
        };
        let mut reader = FrameReader::new(MAX);
        let error = FrameError::Oversize {
            header,
            max: MAX,
            skipping: false,
        };
        assert_eq!(reader.feed(&mut &header.to_bytes()[..]), Err(error));
        assert_eq!(reader.buffered(), 0);
        assert_eq!(
            reader.feed(&mut &[1, 2, 3][..]),
            Err(error),
            "the reader stays at its end"
        );
    }

    #[test]
    fn a_header_alone_costs_no_memory() {
        let header = Header {
            length: u32::MAX,
            stream_id: 1,
            kind: TYPE_REQUEST,
            flags: 0,
        };
        let mut reader = FrameReader::new(u32::MAX);
        assert_eq!(reader.feed(&mut &header.to_bytes()[..]), Ok(None));
        assert_eq!(reader.buffered(), 0);
        assert_eq!(reader.feed(&mut &[0; 100][..]), Ok(None));
        assert!(reader.buffered() < 1000);
    }

    #[test]
    fn the_header_is_big_endian() {
        let header = Header {
            length: 0x0102_0304,
            stream_id: 0x0506_0708,
            kind: 3,
            flags: 5,
        };
        assert_eq!(header.to_bytes(), [1, 2, 3, 4, 5, 6, 7, 8, 3, 5]);
        assert_eq!(Header::from_bytes(header.to_bytes()), header);
        assert!(header.has(FLAG_NO_DATA) && header.has(FLAG_REMOTE_CLOSED));
        assert!(!header.has(FLAG_REMOTE_OPEN));
    }
}
