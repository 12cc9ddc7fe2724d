//! The header before every packet (VIRTIO 1.2 section 5.10.6), read from the guest's bytes and
//! written for it.

/// Bytes of `struct virtio_vsock_hdr`.
pub const HEADER: usize = 44;
/// The host's address.
pub const HOST_CID: u64 = 2;
/// VIRTIO_VSOCK_TYPE_STREAM.
pub const STREAM: u16 = 1;
/// VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE: whoever says so receives no more.
pub const NO_RECEIVE: u32 = 1;
/// VIRTIO_VSOCK_SHUTDOWN_F_SEND: and sends no more.
pub const NO_SEND: u32 = 2;

/// VIRTIO_VSOCK_OP_*.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Asks for a connection.
    Request,
    /// Grants it.
    Response,
    /// Ends it, or there is none.
    Reset,
    /// Sends or receives no more.
    Shutdown,
    /// Data.
    Data,
    /// How much room there is.
    CreditUpdate,
    /// Asks for that.
    CreditRequest,
    /// Of no known kind.
    Unknown(u16),
}

impl Op {
    fn number(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Reset => 3,
            Self::Shutdown => 4,
            Self::Data => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
            Self::Unknown(number) => number,
        }
    }

    fn of(number: u16) -> Self {
        match number {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => Self::Unknown(number),
        }
    }
}

/// A header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Whose packet.
    pub src_cid: u64,
    /// For whom.
    pub dst_cid: u64,
    /// The sender's port.
    pub src_port: u32,
    /// The receiver's port.
    pub dst_port: u32,
    /// Bytes of data behind it.
    pub len: u32,
    /// Stream or not.
    pub kind: u16,
    /// What it says.
    pub op: Op,
    /// Of [`Op::Shutdown`].
    pub flags: u32,
    /// Bytes that the sender has room for, in all.
    pub buf_alloc: u32,
    /// Bytes that have left that room since the beginning, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads one.
    pub fn parse(bytes: &[u8; HEADER]) -> Self {
        let mut rest = bytes.as_slice();
        let mut next = |len: usize| {
            let mut word = [0; 8];
            if let Some((field, behind)) = rest.split_at_checked(len)
                && let Some(place) = word.get_mut(..len)
            {
                place.copy_from_slice(field);
                rest = behind;
            }
            u64::from_le_bytes(word)
        };
        // Of the width that is asked for.
        Self {
            src_cid: next(8),
            dst_cid: next(8),
            src_port: next(4) as u32,
            dst_port: next(4) as u32,
            len: next(4) as u32,
            kind: next(2) as u16,
            op: Op::of(next(2) as u16),
            flags: next(4) as u32,
            buf_alloc: next(4) as u32,
            fwd_cnt: next(4) as u32,
        }
    }

    /// As bytes.
    pub fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        let mut rest = bytes.as_mut_slice();
        let mut put = |field: &[u8]| {
            let (place, behind) = std::mem::take(&mut rest)
                .split_at_mut_checked(field.len())
                .unwrap_or_default();
            place.copy_from_slice(field.get(..place.len()).unwrap_or_default());
            rest = behind;
        };
        put(&self.src_cid.to_le_bytes());
        put(&self.dst_cid.to_le_bytes());
        put(&self.src_port.to_le_bytes());
        put(&self.dst_port.to_le_bytes());
        put(&self.len.to_le_bytes());
        put(&self.kind.to_le_bytes());
        put(&self.op.number().to_le_bytes());
        put(&self.flags.to_le_bytes());
        put(&self.buf_alloc.to_le_bytes());
        put(&self.fwd_cnt.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_fields_lie_where_the_specification_has_them() {
        let bytes: [u8; HEADER] = std::array::from_fn(|i| i as u8);
        let header = Header::parse(&bytes);
        assert_eq!(header.src_cid, 0x0706_0504_0302_0100);
        assert_eq!(header.dst_port, 0x1716_1514);
        assert_eq!(header.len, 0x1b1a_1918);
        assert_eq!(header.kind, 0x1d1c);
        assert_eq!(header.op, Op::Unknown(0x1f1e));
        assert_eq!(header.fwd_cnt, 0x2b2a_2928);
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(low in any::<[u8; 32]>(), high in any::<[u8; 12]>()) {
            let mut bytes = [0; HEADER];
            bytes[..32].copy_from_slice(&low);
            bytes[32..].copy_from_slice(&high);
            prop_assert_eq!(Header::parse(&bytes).encode(), bytes);
        }
    }
}
