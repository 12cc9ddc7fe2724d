//! The control queue (virtio 1.2, 5.1.6.5): what the driver wants of the device.
//!
//! Owned by the thread that serves its ring: the last one, or, for a driver that did not
//! take VIRTIO_NET_F_MQ, ring 2. A command has a bounded size and is answered at once; what
//! is unknown, was not negotiated, or makes no sense is answered VIRTIO_NET_ERR; a chain that
//! can hold no command stops the ring.

use std::sync::Arc;

use bulkhead_runtime::active::ActiveRing;
use bulkhead_runtime::chain::{Buffer, Chain};
use bulkhead_runtime::memory::Memory;
use bulkhead_runtime::status::QueueStatus;

use crate::features as f;
use crate::filter::{Mac, Table, is_multicast};
use crate::state::State;

/// Commands taken before the thread looks at its other rings.
const BATCH: usize = 16;
/// Longest command: two tables of 1,024 addresses each, and their counts.
const MAX_COMMAND: usize = 2 + 2 * (4 + 1024 * 6);

const CLASS_RX: u8 = 0;
const CLASS_MAC: u8 = 1;
const CLASS_VLAN: u8 = 2;
const CLASS_ANNOUNCE: u8 = 3;
const CLASS_MQ: u8 = 4;
const CLASS_GUEST_OFFLOADS: u8 = 5;

const RX_PROMISC: u8 = 0;
const RX_ALLMULTI: u8 = 1;
const MAC_TABLE_SET: u8 = 0;
const MAC_ADDR_SET: u8 = 1;
const VLAN_ADD: u8 = 0;
const VLAN_DEL: u8 = 1;
const ANNOUNCE_ACK: u8 = 0;
const MQ_VQ_PAIRS_SET: u8 = 0;
const GUEST_OFFLOADS_SET: u8 = 0;

/// VIRTIO_NET_OK
const OK: u8 = 0;
/// VIRTIO_NET_ERR
const ERR: u8 = 1;

/// A chain that can hold no command: the ring is malformed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
enum Malformed {
    #[error("control command of {0} bytes")]
    Length(u32),
    #[error("control command without room for its answer")]
    NoAck,
}

/// The control queue.
pub struct Control {
    ring: ActiveRing,
    status: Arc<QueueStatus>,
    state: Arc<State>,
    chain: Chain,
    command: Vec<u8>,
}

impl Control {
    /// Serves this ring.
    pub fn new(ring: ActiveRing, status: Arc<QueueStatus>, state: Arc<State>) -> Self {
        Self {
            ring,
            status,
            state,
            chain: Chain::new(),
            command: Vec::new(),
        }
    }

    /// The ring.
    pub fn ring(&mut self) -> &mut ActiveRing {
        &mut self.ring
    }

    /// Obeys the commands that are there, up to a batch; true if there may be more.
    pub fn serve(&mut self) -> bool {
        for _ in 0..BATCH {
            let Some(head) = self.ring.pop(&mut self.chain) else {
                self.ring.flush();
                return false;
            };
            if let Err(why) = self.obey(head) {
                self.ring.reject(head, &why);
            }
        }
        self.ring.flush();
        true
    }

    fn obey(&mut self, head: u16) -> Result<(), Malformed> {
        let len = self.chain.readable_len();
        let first = self.chain.writable().iter().find(|b| b.len > 0);
        let ack = first.ok_or(Malformed::NoAck)?.addr;
        if len < 2 || len as usize > MAX_COMMAND {
            return Err(Malformed::Length(len));
        }
        self.command.clear();
        self.command.resize(len as usize, 0);
        collect(self.ring.memory(), self.chain.readable(), &mut self.command);
        let done = execute(&self.state, &self.command);
        let answer = if done.is_some() { OK } else { ERR };
        self.ring.memory().write(ack, &[answer]);
        self.status.requests.add(1);
        if done.is_none() {
            self.status.errors.add(1);
        }
        self.ring.complete(head, 1);
        Ok(())
    }

    /// Ends service; the available index at which a successor goes on.
    pub fn stop(self) -> u16 {
        self.ring.stop()
    }
}

/// Copies the buffers, one after another, once.
fn collect(memory: &Memory, buffers: &[Buffer], into: &mut [u8]) {
    let mut rest = into;
    for buffer in buffers {
        let (now, later) = rest.split_at_mut(rest.len().min(buffer.len as usize));
        memory.read(buffer.addr, now);
        rest = later;
    }
}

/// Carries out a command; None if it is not to be.
fn execute(state: &State, command: &[u8]) -> Option<()> {
    let (&[class, kind], data) = command.split_first_chunk::<2>()?;
    let accepted = |feature: u64| (state.features() & feature != 0).then_some(());
    match (class, kind) {
        (CLASS_RX, RX_PROMISC) => {
            accepted(f::F_CTRL_RX)?;
            let on = switch(data)?;
            state.change_filter(|filter| filter.promiscuous = on);
        }
        (CLASS_RX, RX_ALLMULTI) => {
            accepted(f::F_CTRL_RX)?;
            let on = switch(data)?;
            state.change_filter(|filter| filter.all_multicast = on);
        }
        (CLASS_MAC, MAC_TABLE_SET) => {
            accepted(f::F_CTRL_RX)?;
            let (unicast, rest) = table(data)?;
            let (multicast, rest) = table(rest)?;
            if !rest.is_empty() {
                return None;
            }
            let (unicast, multicast) = (Table::new(unicast), Table::new(multicast));
            state.change_filter(|filter| {
                filter.unicast = unicast;
                filter.multicast = multicast;
            });
        }
        (CLASS_MAC, MAC_ADDR_SET) => {
            accepted(f::F_CTRL_MAC_ADDR)?;
            let mac: Mac = data.try_into().ok()?;
            if is_multicast(&mac) {
                return None;
            }
            state.change_filter(|filter| filter.mac = mac);
        }
        (CLASS_VLAN, VLAN_ADD | VLAN_DEL) => {
            accepted(f::F_CTRL_VLAN)?;
            let id = u16::from_le_bytes(data.try_into().ok()?);
            let known = state.change_filter(|filter| filter.set_vlan(id, kind == VLAN_ADD));
            if !known {
                return None;
            }
        }
        (CLASS_ANNOUNCE, ANNOUNCE_ACK) if data.is_empty() => {
            accepted(f::F_GUEST_ANNOUNCE)?;
            state.announced();
        }
        (CLASS_MQ, MQ_VQ_PAIRS_SET) => {
            accepted(f::F_MQ)?;
            let pairs = u16::from_le_bytes(data.try_into().ok()?);
            if pairs == 0 || pairs > state.traits().pairs {
                return None;
            }
            if !state.set_pairs(pairs) {
                return None;
            }
        }
        (CLASS_GUEST_OFFLOADS, GUEST_OFFLOADS_SET) => {
            accepted(f::F_CTRL_GUEST_OFFLOADS)?;
            let offloads = u64::from_le_bytes(data.try_into().ok()?);
            if !state.choose_offloads(offloads) {
                return None;
            }
        }
        _ => return None,
    }
    Some(())
}

fn switch(data: &[u8]) -> Option<bool> {
    match data {
        [0] => Some(false),
        [1] => Some(true),
        _ => None,
    }
}

/// struct virtio_net_ctrl_mac: a count, and so many addresses.
fn table(data: &[u8]) -> Option<(impl Iterator<Item = Mac>, &[u8])> {
    let (count, rest) = data.split_first_chunk::<4>()?;
    let bytes = usize::try_from(u32::from_le_bytes(*count))
        .ok()?
        .checked_mul(6)?;
    let (macs, rest) = rest.split_at_checked(bytes)?;
    let macs = macs.chunks_exact(6).filter_map(|m| Mac::try_from(m).ok());
    Some((macs, rest))
}
