//! What a guest wants, from the bytes of its request (VIRTIO 1.2 section 5.15.6). Runs on the
//! queue's worker; every byte is the guest's.

use bulkhead_runtime::chain::Chain;
use bulkhead_runtime::memory::Memory;

/// Bytes of `struct virtio_mem_req`.
pub const REQUEST: usize = 24;
/// Bytes of `struct virtio_mem_resp`.
pub const RESPONSE: usize = 10;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

/// VIRTIO_MEM_RESP_*: the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Response {
    /// Done.
    Ack,
    /// Not now.
    Nack,
    /// Busy: try again.
    Busy,
    /// Nonsense.
    Error,
}

impl Response {
    fn code(self) -> u16 {
        match self {
            Self::Ack => 0,
            Self::Nack => 1,
            Self::Busy => 2,
            Self::Error => 3,
        }
    }

    /// As bytes, with what a STATE request is told beside it.
    pub fn encode(self, state: u16) -> [u8; RESPONSE] {
        let [a, b] = self.code().to_le_bytes();
        let [c, d] = state.to_le_bytes();
        [a, b, 0, 0, 0, 0, 0, 0, c, d]
    }
}

/// What is to be done to blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// Plug so many from this address on.
    Plug(u64, u16),
    /// Unplug them.
    Unplug(u64, u16),
    /// Unplug all.
    UnplugAll,
}

/// A request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// A change.
    Change(Wish),
    /// Are so many blocks from this address on plugged?
    State(u64, u16),
    /// Of no known type.
    Unknown,
}

/// Reads a request.
pub fn parse(bytes: &[u8; REQUEST]) -> Request {
    let [
        t0,
        t1,
        _,
        _,
        _,
        _,
        _,
        _,
        address @ ..,
        n0,
        n1,
        _,
        _,
        _,
        _,
        _,
        _,
    ] = *bytes;
    let (address, count) = (u64::from_le_bytes(address), u16::from_le_bytes([n0, n1]));
    match u16::from_le_bytes([t0, t1]) {
        PLUG => Request::Change(Wish::Plug(address, count)),
        UNPLUG => Request::Change(Wish::Unplug(address, count)),
        UNPLUG_ALL => Request::Change(Wish::UnplugAll),
        STATE => Request::State(address, count),
        _ => Request::Unknown,
    }
}

/// Reads the request of a chain; `None`: it is no request of this device.
pub fn read(chain: &Chain, memory: &Memory) -> Option<Request> {
    let fits = |len: u32, least: usize| usize::try_from(len).is_ok_and(|len| len >= least);
    if !fits(chain.readable_len(), REQUEST) || !fits(chain.writable_len(), RESPONSE) {
        return None;
    }
    let mut bytes = [0; REQUEST];
    let mut rest = bytes.as_mut_slice();
    for buffer in chain.readable() {
        let len = usize::try_from(buffer.len).ok()?.min(rest.len());
        let (part, behind) = rest.split_at_mut_checked(len)?;
        if !memory.read(buffer.addr, part) {
            return None;
        }
        rest = behind;
    }
    Some(parse(&bytes))
}

/// Writes the answer into a chain that [`read`] has accepted; false: its buffers have left the
/// guest's memory.
pub fn answer(chain: &Chain, memory: &Memory, bytes: &[u8; RESPONSE]) -> bool {
    chain.write(memory, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes(kind: u16, address: u64, count: u16) -> [u8; REQUEST] {
        let mut bytes = [0xee; REQUEST];
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[8..16].copy_from_slice(&address.to_le_bytes());
        bytes[16..18].copy_from_slice(&count.to_le_bytes());
        bytes
    }

    #[test]
    fn the_fields_lie_where_the_specification_has_them() {
        let of = |kind| parse(&bytes(kind, 0x1_2345_6789, 7));
        assert_eq!(of(0), Request::Change(Wish::Plug(0x1_2345_6789, 7)));
        assert_eq!(of(1), Request::Change(Wish::Unplug(0x1_2345_6789, 7)));
        assert_eq!(of(2), Request::Change(Wish::UnplugAll));
        assert_eq!(of(3), Request::State(0x1_2345_6789, 7));
        assert_eq!(of(4), Request::Unknown);
        assert_eq!(Response::Ack.encode(2), [0, 0, 0, 0, 0, 0, 0, 0, 2, 0]);
        assert_eq!(Response::Error.encode(0)[0], 3);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_request(raw in any::<[u8; REQUEST]>()) {
            let kind = u16::from_le_bytes([raw[0], raw[1]]);
            prop_assert_eq!(parse(&raw) == Request::Unknown, kind > 3);
        }
    }
}
