//! KVM's interrupt routing table (KVM_SET_GSI_ROUTING, which replaces it as a whole): the
//! IOAPIC's pins keep their numbers, everything above is handed out for MSI-X vectors.
//!
//! Held under `KvmVm`'s lock; changed by the manager and by vCPU threads that write MSI-X
//! tables.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KvmIrqRouting,
    kvm_irq_routing_entry, kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};

use crate::arch::x86_64::layout::FIRST_MSI_GSI;
use crate::hypervisor::{Gsi, MsiMessage};

/// GSIs that may be handed out: KVM_MAX_IRQ_ROUTES is 4096 in all.
const MSI_GSIS: u32 = 4096 - FIRST_MSI_GSI;

/// The routes as they stand.
#[derive(Debug, Default)]
pub(super) struct RouteTable {
    /// Handed out; `Some` once the guest has programmed a message.
    used: BTreeMap<u32, Option<MsiMessage>>,
    /// Given back, to be handed out again before a new one.
    free: BTreeSet<u32>,
}

impl RouteTable {
    pub(super) fn new() -> Self {
        Self::default()
    }

    pub(super) fn alloc(&mut self) -> Option<Gsi> {
        let gsi = match self.free.pop_first() {
            Some(gsi) => gsi,
            None => {
                let next = u32::try_from(self.used.len()).ok()?;
                (next < MSI_GSIS).then(|| FIRST_MSI_GSI.saturating_add(next))?
            }
        };
        self.used.insert(gsi, None);
        Some(Gsi(gsi))
    }

    /// How many are handed out.
    pub(super) fn used(&self) -> usize {
        self.used.len()
    }

    /// True when the table that KVM holds has to change.
    pub(super) fn free(&mut self, gsi: Gsi) -> bool {
        match self.used.remove(&gsi.0) {
            Some(message) => {
                self.free.insert(gsi.0);
                message.is_some()
            }
            None => false,
        }
    }

    /// True when the table that KVM holds has to change.
    pub(super) fn set(&mut self, gsi: Gsi, message: MsiMessage) -> io::Result<bool> {
        let slot = self.used.get_mut(&gsi.0).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::NotFound,
                format!("GSI {} was not handed out", gsi.0),
            )
        })?;
        Ok(slot.replace(message) != Some(message))
    }

    pub(super) fn to_kvm(&self) -> io::Result<KvmIrqRouting> {
        let pins = (0..FIRST_MSI_GSI).map(|pin| {
            let mut entry = kvm_irq_routing_entry {
                gsi: pin,
                type_: KVM_IRQ_ROUTING_IRQCHIP,
                ..Default::default()
            };
            entry.u.irqchip = kvm_irq_routing_irqchip {
                irqchip: KVM_IRQCHIP_IOAPIC,
                pin,
            };
            entry
        });
        let messages = self.used.iter().filter_map(|(gsi, message)| {
            let message = (*message)?;
            let mut entry = kvm_irq_routing_entry {
                gsi: *gsi,
                type_: KVM_IRQ_ROUTING_MSI,
                ..Default::default()
            };
            entry.u.msi = kvm_irq_routing_msi {
                address_lo: message.address as u32,
                address_hi: (message.address >> 32) as u32,
                data: message.data,
                ..Default::default()
            };
            Some(entry)
        });
        let entries: Vec<_> = pins.chain(messages).collect();
        KvmIrqRouting::from_entries(&entries)
            .map_err(|_| io::Error::other("KVM's interrupt routing table is full"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_table_has_an_end() {
        let mut table = RouteTable::new();
        let all: BTreeSet<_> = std::iter::from_fn(|| table.alloc()).collect();
        assert_eq!(all.len(), MSI_GSIS as usize);
        assert!(all.iter().all(|gsi| (FIRST_MSI_GSI..4096).contains(&gsi.0)));
        for gsi in &all {
            table.set(*gsi, MsiMessage::default()).unwrap();
        }
        assert_eq!(table.to_kvm().unwrap().as_slice().len(), 4096);
    }

    proptest! {
        #[test]
        fn a_gsi_is_never_held_twice(steps in proptest::collection::vec(any::<Option<u8>>(), 0..200)) {
            let mut table = RouteTable::new();
            let mut held: Vec<Gsi> = Vec::new();
            for step in steps {
                match step {
                    None => {
                        let gsi = table.alloc().unwrap();
                        prop_assert!(!held.contains(&gsi));
                        held.push(gsi);
                    }
                    Some(pick) if !held.is_empty() => {
                        let gsi = held.swap_remove(usize::from(pick) % held.len());
                        table.set(gsi, MsiMessage { address: 1, data: 2 }).unwrap();
                        prop_assert!(table.free(gsi));
                        prop_assert!(!table.free(gsi));
                    }
                    Some(_) => {}
                }
            }
        }
    }
}
