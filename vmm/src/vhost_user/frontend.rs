//! The requests that the VMM makes of a device process, typed (vhost-user protocol,
//! "Front-end message types").
//!
//! Called under a function's lock from vCPU threads (activation, reset, configuration)
//! and from the manager thread (connecting). Each call ends by its deadline. The first
//! fatal error shuts the socket down, and every later call fails at once.

use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use vhost::vhost_user::message::{
    FrontendReq, VhostUserProtocolFeatures as Protocol, VhostUserVirtioFeatures,
};

use super::backend_channel::BackendChannel;
use super::error::{VhostUserError, Violation};
use super::transport::{MAX_SENT_FDS, Slot, receive_exact, send_all};
use super::wire::{HEADER_SIZE, Header};
use super::{Deadline, MemoryRegion, user_address};

type Result<T> = std::result::Result<T, VhostUserError>;

/// What we can make use of.
const WANTED: Protocol = Protocol::MQ
    .union(Protocol::REPLY_ACK)
    .union(Protocol::CONFIG)
    .union(Protocol::INFLIGHT_SHMFD)
    .union(Protocol::CONFIGURE_MEM_SLOTS)
    .union(Protocol::BACKEND_REQ);

const U64_SIZE: u32 = 8;
const VRING_STATE_SIZE: u32 = 8;
/// Bytes before the data of GET_CONFIG and SET_CONFIG: offset, size, flags.
const CONFIG_HEADER: u32 = 12;
/// The protocol's limit on a configuration space.
const MAX_CONFIG: usize = 256;

/// Guest-physical addresses of a split ring's three parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingAddresses {
    /// Descriptor table.
    pub descriptor: u64,
    /// Available ring.
    pub available: u64,
    /// Used ring.
    pub used: u64,
}

/// A connection to a back-end.
pub struct Frontend {
    socket: UnixStream,
    broken: bool,
    message_timeout: Duration,
    features: u64,
    protocol: Protocol,
    queue_limit: Option<u16>,
    /// Memory regions that it takes one by one; 0: none.
    pub(super) slots: u64,
    backend_channel: Option<BackendChannel>,
}

impl Frontend {
    /// Takes the connection over: claims ownership and negotiates protocol features. No
    /// message may take longer than `message_timeout`.
    pub fn connect(socket: UnixStream, message_timeout: Duration) -> Result<Self> {
        let mut frontend = Self {
            socket,
            broken: false,
            message_timeout,
            features: 0,
            protocol: Protocol::empty(),
            queue_limit: None,
            slots: 0,
            backend_channel: None,
        };
        frontend.negotiate(Deadline::after(message_timeout.saturating_mul(4)))?;
        Ok(frontend)
    }

    fn negotiate(&mut self, deadline: Deadline) -> Result<()> {
        self.command(FrontendReq::SET_OWNER, "SET_OWNER", &[], &[], deadline)?;
        self.features = self.get_u64(FrontendReq::GET_FEATURES, "GET_FEATURES", deadline)?;
        if self.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            return Ok(());
        }
        let what = "GET_PROTOCOL_FEATURES";
        let offered = self.get_u64(FrontendReq::GET_PROTOCOL_FEATURES, what, deadline)?;
        let protocol = Protocol::from_bits_truncate(offered) & WANTED;
        let bits = protocol.bits().to_ne_bytes();
        let what = "SET_PROTOCOL_FEATURES";
        self.command(
            FrontendReq::SET_PROTOCOL_FEATURES,
            what,
            &bits,
            &[],
            deadline,
        )?;
        self.protocol = protocol;
        if protocol.contains(Protocol::MQ) {
            let limit = self.get_u64(FrontendReq::GET_QUEUE_NUM, "GET_QUEUE_NUM", deadline)?;
            self.queue_limit = Some(u16::try_from(limit).unwrap_or(u16::MAX));
        }
        if protocol.contains(Protocol::CONFIGURE_MEM_SLOTS) {
            let what = "GET_MAX_MEM_SLOTS";
            self.slots = self.get_u64(FrontendReq::GET_MAX_MEM_SLOTS, what, deadline)?;
        }
        if protocol.contains(Protocol::BACKEND_REQ) {
            let (ours, theirs) = UnixStream::pair()?;
            let what = "SET_BACKEND_REQ_FD";
            let fds = [theirs.as_fd()];
            self.command(FrontendReq::SET_BACKEND_REQ_FD, what, &[], &fds, deadline)?;
            let acks = protocol.contains(Protocol::REPLY_ACK);
            self.backend_channel = Some(BackendChannel::new(ours, acks));
        }
        Ok(())
    }

    /// The virtio and transport features that the back-end offers.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// The most queues that the back-end serves, where it says so.
    pub fn queue_limit(&self) -> Option<u16> {
        self.queue_limit
    }

    /// Whether the back-end serves the device's configuration space.
    pub fn has_config(&self) -> bool {
        self.protocol.contains(Protocol::CONFIG)
    }

    /// Whether the back-end keeps a log of the requests that it has in flight.
    pub fn has_inflight(&self) -> bool {
        self.protocol.contains(Protocol::INFLIGHT_SHMFD)
    }

    /// The channel for requests of the back-end's own, once.
    pub fn take_backend_channel(&mut self) -> Option<BackendChannel> {
        self.backend_channel.take()
    }

    /// Another descriptor of the same socket: to watch for a hang-up, and to shut it down
    /// from another thread.
    pub fn clone_socket(&self) -> Result<UnixStream> {
        Ok(self.socket.try_clone()?)
    }

    /// SET_FEATURES: what the driver accepted of what the back-end offers. The VMM may
    /// have offered more that is its own business.
    pub fn set_features(&mut self, driver: u64, deadline: Deadline) -> Result<()> {
        let transport = self.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let bits = (driver & self.features | transport).to_ne_bytes();
        self.command(
            FrontendReq::SET_FEATURES,
            "SET_FEATURES",
            &bits,
            &[],
            deadline,
        )
    }

    /// SET_MEM_TABLE: what the device may map.
    pub fn set_mem_table(&mut self, regions: &[MemoryRegion], deadline: Deadline) -> Result<()> {
        let count = match u32::try_from(regions.len()) {
            Ok(count @ 1..) if regions.len() <= MAX_SENT_FDS => count,
            _ => {
                return Err(VhostUserError::Unencodable(
                    "a table of no or over 32 memory regions",
                ));
            }
        };
        let mut payload = Vec::with_capacity(8 + 32 * regions.len());
        payload.extend_from_slice(&count.to_ne_bytes());
        payload.extend_from_slice(&0_u32.to_ne_bytes());
        for region in regions {
            let user = user_address(region.guest_base)
                .ok_or(VhostUserError::Unencodable("a memory region this high"))?;
            for field in [region.guest_base, region.size, user, region.file_offset] {
                payload.extend_from_slice(&field.to_ne_bytes());
            }
        }
        let fds: Vec<_> = regions.iter().map(|region| region.file.as_fd()).collect();
        self.command(
            FrontendReq::SET_MEM_TABLE,
            "SET_MEM_TABLE",
            &payload,
            &fds,
            deadline,
        )
    }

    /// SET_VRING_NUM: a ring's size.
    pub fn set_vring_num(&mut self, index: u16, size: u16, deadline: Deadline) -> Result<()> {
        let payload = vring_state(index, size.into());
        self.command(
            FrontendReq::SET_VRING_NUM,
            "SET_VRING_NUM",
            &payload,
            &[],
            deadline,
        )
    }

    /// SET_VRING_ADDR: where a ring lies.
    pub fn set_vring_addr(
        &mut self,
        index: u16,
        ring: RingAddresses,
        deadline: Deadline,
    ) -> Result<()> {
        let mut payload = Vec::with_capacity(40);
        payload.extend_from_slice(&u32::from(index).to_ne_bytes());
        payload.extend_from_slice(&0_u32.to_ne_bytes());
        for address in [ring.descriptor, ring.used, ring.available] {
            let user = user_address(address)
                .ok_or(VhostUserError::Unencodable("a ring address this high"))?;
            payload.extend_from_slice(&user.to_ne_bytes());
        }
        payload.extend_from_slice(&0_u64.to_ne_bytes());
        self.command(
            FrontendReq::SET_VRING_ADDR,
            "SET_VRING_ADDR",
            &payload,
            &[],
            deadline,
        )
    }

    /// SET_VRING_BASE: the next available index to look at.
    pub fn set_vring_base(&mut self, index: u16, base: u16, deadline: Deadline) -> Result<()> {
        let payload = vring_state(index, base.into());
        self.command(
            FrontendReq::SET_VRING_BASE,
            "SET_VRING_BASE",
            &payload,
            &[],
            deadline,
        )
    }

    /// GET_VRING_BASE: stops a ring; the back-end answers when it is quiet.
    pub fn get_vring_base(&mut self, index: u16, deadline: Deadline) -> Result<u16> {
        let what = "GET_VRING_BASE";
        let payload = vring_state(index, 0);
        let reply = self.ask(
            FrontendReq::GET_VRING_BASE,
            what,
            &payload,
            VRING_STATE_SIZE,
            deadline,
        )?;
        let wrong = || self_violation(Violation::BadValue("ring index or base"));
        let (Some(got), Some(base)) = (word(&reply, 0), word(&reply, 4)) else {
            return Err(self.breach(wrong()));
        };
        match u16::try_from(base) {
            Ok(base) if got == u32::from(index) => Ok(base),
            _ => Err(self.breach(wrong())),
        }
    }

    /// SET_VRING_KICK: the doorbell.
    pub fn set_vring_kick(
        &mut self,
        index: u16,
        event: BorrowedFd<'_>,
        deadline: Deadline,
    ) -> Result<()> {
        self.vring_fd(
            FrontendReq::SET_VRING_KICK,
            "SET_VRING_KICK",
            index,
            event,
            deadline,
        )
    }

    /// SET_VRING_CALL: the interrupt.
    pub fn set_vring_call(
        &mut self,
        index: u16,
        event: BorrowedFd<'_>,
        deadline: Deadline,
    ) -> Result<()> {
        self.vring_fd(
            FrontendReq::SET_VRING_CALL,
            "SET_VRING_CALL",
            index,
            event,
            deadline,
        )
    }

    /// SET_VRING_ERR: the error signal.
    pub fn set_vring_err(
        &mut self,
        index: u16,
        event: BorrowedFd<'_>,
        deadline: Deadline,
    ) -> Result<()> {
        self.vring_fd(
            FrontendReq::SET_VRING_ERR,
            "SET_VRING_ERR",
            index,
            event,
            deadline,
        )
    }

    /// Whether rings can be disabled: by a back-end with protocol features.
    pub fn can_disable(&self) -> bool {
        self.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0
    }

    /// SET_VRING_ENABLE: whether the back-end works on a ring. Back-ends without protocol
    /// features do not know the message: their rings are always enabled.
    pub fn set_vring_enable(&mut self, index: u16, on: bool, deadline: Deadline) -> Result<()> {
        if !self.can_disable() {
            return Ok(());
        }
        let payload = vring_state(index, on.into());
        self.command(
            FrontendReq::SET_VRING_ENABLE,
            "SET_VRING_ENABLE",
            &payload,
            &[],
            deadline,
        )
    }

    /// GET_CONFIG: the first `size` bytes of the device's configuration space.
    pub fn get_config(&mut self, size: usize, deadline: Deadline) -> Result<Vec<u8>> {
        let what = "GET_CONFIG";
        if !self.has_config() {
            return Err(VhostUserError::Unsupported("a configuration space"));
        }
        let payload = config_payload(0, &vec![0; size])?;
        let limit = u32::try_from(payload.len()).unwrap_or(CONFIG_HEADER);
        let reply = self.ask_up_to(FrontendReq::GET_CONFIG, what, &payload, limit, deadline)?;
        // A back-end that cannot answer sends no data, with or without the header.
        if reply.len() <= CONFIG_HEADER as usize {
            return Err(VhostUserError::Refused(what));
        }
        if reply.len() != payload.len() {
            let (got, wanted) = (u32::try_from(reply.len()).unwrap_or(u32::MAX), limit);
            return Err(self.breach(self_violation(Violation::WrongSize(got, wanted))));
        }
        Ok(reply
            .get(CONFIG_HEADER as usize..)
            .unwrap_or_default()
            .to_vec())
    }

    /// SET_CONFIG: the driver wrote to the device's configuration space.
    pub fn set_config(&mut self, offset: u32, data: &[u8], deadline: Deadline) -> Result<()> {
        if !self.has_config() {
            return Err(VhostUserError::Unsupported("a configuration space"));
        }
        let payload = config_payload(offset, data)?;
        self.command(
            FrontendReq::SET_CONFIG,
            "SET_CONFIG",
            &payload,
            &[],
            deadline,
        )
    }

    /// Returns once the back-end has handled everything sent before. Costs nothing where
    /// every request is acknowledged anyway.
    pub fn barrier(&mut self, deadline: Deadline) -> Result<()> {
        if !self.protocol.contains(Protocol::REPLY_ACK) {
            self.get_u64(FrontendReq::GET_FEATURES, "GET_FEATURES", deadline)?;
        }
        Ok(())
    }

    /// Ends the connection.
    pub fn shut_down(&mut self) {
        self.broken = true;
        // Fails only when the other end is gone already.
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    fn vring_fd(
        &mut self,
        request: FrontendReq,
        what: &'static str,
        index: u16,
        event: BorrowedFd<'_>,
        deadline: Deadline,
    ) -> Result<()> {
        // The message has 8 bits for the index.
        let Ok(index) = u8::try_from(index) else {
            return Err(VhostUserError::Unencodable("a queue index over 255"));
        };
        let payload = u64::from(index).to_ne_bytes();
        self.command(request, what, &payload, &[event], deadline)
    }

    fn get_u64(
        &mut self,
        request: FrontendReq,
        what: &'static str,
        deadline: Deadline,
    ) -> Result<u64> {
        let reply = self.ask(request, what, &[], U64_SIZE, deadline)?;
        Ok(reply.try_into().map_or(0, u64::from_ne_bytes))
    }

    /// A request without an answer of its own: acknowledged where that was negotiated.
    pub(super) fn command(
        &mut self,
        request: FrontendReq,
        what: &'static str,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
        deadline: Deadline,
    ) -> Result<()> {
        let acknowledged = self.protocol.contains(Protocol::REPLY_ACK);
        self.guarded(deadline, |this, deadline| {
            this.send(request, what, payload, fds, acknowledged, deadline)?;
            if !acknowledged {
                return Ok(());
            }
            let reply = this.receive(request, what, U64_SIZE, None, deadline)?;
            exact_size(&reply, U64_SIZE)?;
            if reply.iter().any(|byte| *byte != 0) {
                return Err(VhostUserError::Refused(what));
            }
            Ok(())
        })
    }

    /// A request with an answer of exactly `size` bytes.
    fn ask(
        &mut self,
        request: FrontendReq,
        what: &'static str,
        payload: &[u8],
        size: u32,
        deadline: Deadline,
    ) -> Result<Vec<u8>> {
        let reply = self.ask_up_to(request, what, payload, size, deadline)?;
        exact_size(&reply, size).map_err(|violation| self.breach(violation))?;
        Ok(reply)
    }

    fn ask_up_to(
        &mut self,
        request: FrontendReq,
        what: &'static str,
        payload: &[u8],
        max_size: u32,
        deadline: Deadline,
    ) -> Result<Vec<u8>> {
        self.guarded(deadline, |this, deadline| {
            this.send(request, what, payload, &[], false, deadline)?;
            this.receive(request, what, max_size, None, deadline)
        })
    }

    /// A request with an answer of exactly `size` bytes that one descriptor may come with.
    pub(super) fn ask_for_fd(
        &mut self,
        request: FrontendReq,
        what: &'static str,
        payload: &[u8],
        size: u32,
        deadline: Deadline,
    ) -> Result<(Vec<u8>, Option<OwnedFd>)> {
        self.guarded(deadline, |this, deadline| {
            this.send(request, what, payload, &[], false, deadline)?;
            let mut fd = None;
            let reply = this.receive(request, what, size, Some(&mut fd), deadline)?;
            exact_size(&reply, size)?;
            Ok((reply, fd))
        })
    }

    fn send(
        &self,
        request: FrontendReq,
        what: &'static str,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
        need_reply: bool,
        deadline: Deadline,
    ) -> Result<()> {
        let size = u32::try_from(payload.len())
            .map_err(|_| VhostUserError::Unencodable("so long a message"))?;
        let mut message = Header::request(request.into(), size, need_reply)
            .encode()
            .to_vec();
        message.extend_from_slice(payload);
        send_all(&self.socket, &message, fds, deadline, what)
    }

    fn receive(
        &self,
        request: FrontendReq,
        what: &'static str,
        max_size: u32,
        mut slot: Slot<'_>,
        deadline: Deadline,
    ) -> Result<Vec<u8>> {
        let mut header = [0; HEADER_SIZE];
        let first = slot.as_deref_mut();
        receive_exact(&self.socket, &mut header, first, deadline, what)?;
        let header = Header::decode(&header);
        header.check_reply(request.into(), max_size)?;
        let mut body = vec![0; usize::try_from(header.size).unwrap_or_default()];
        receive_exact(&self.socket, &mut body, slot, deadline, what)?;
        Ok(body)
    }

    /// Runs one exchange; after what is fatal there is none. The connection itself is for its owner
    /// to end, who knows why: an end that is seen before would be taken for the reason.
    fn guarded<T>(
        &mut self,
        deadline: Deadline,
        exchange: impl FnOnce(&mut Self, Deadline) -> Result<T>,
    ) -> Result<T> {
        if self.broken {
            return Err(VhostUserError::Broken);
        }
        let deadline = deadline.min(Deadline::after(self.message_timeout));
        exchange(self, deadline).map_err(|error| self.breach(error))
    }

    pub(super) fn breach(&mut self, error: VhostUserError) -> VhostUserError {
        self.broken |= error.is_fatal();
        error
    }
}

fn self_violation(violation: Violation) -> VhostUserError {
    VhostUserError::Violation(violation)
}

fn exact_size(reply: &[u8], size: u32) -> Result<()> {
    let got = u32::try_from(reply.len()).unwrap_or(u32::MAX);
    if got == size {
        Ok(())
    } else {
        Err(Violation::WrongSize(got, size).into())
    }
}

fn vring_state(index: u16, value: u32) -> [u8; VRING_STATE_SIZE as usize] {
    let mut payload = [0; VRING_STATE_SIZE as usize];
    let (head, tail) = payload.split_at_mut(4);
    head.copy_from_slice(&u32::from(index).to_ne_bytes());
    tail.copy_from_slice(&value.to_ne_bytes());
    payload
}

fn config_payload(offset: u32, data: &[u8]) -> Result<Vec<u8>> {
    let size = match u32::try_from(data.len()) {
        Ok(size @ 1..) if data.len() <= MAX_CONFIG => size,
        _ => {
            return Err(VhostUserError::Unencodable(
                "a configuration access of that size",
            ));
        }
    };
    let mut payload = Vec::with_capacity(CONFIG_HEADER as usize + data.len());
    for field in [offset, size, 0] {
        payload.extend_from_slice(&field.to_ne_bytes());
    }
    payload.extend_from_slice(data);
    Ok(payload)
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes
        .get(at..)?
        .first_chunk()
        .map(|word| u32::from_ne_bytes(*word))
}

#[cfg(test)]
#[path = "frontend_tests.rs"]
mod tests;
