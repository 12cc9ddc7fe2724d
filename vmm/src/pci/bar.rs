//! Which BAR answers at which guest-physical address. A guest may place its BARs
//! anywhere (PCI Local Bus 3.0 section 6.2.5); only those inside the PCI windows, aligned
//! and not over another device are put on the bus, all others simply do not answer.
//!
//! A BAR that lost to an overlap is tried again whenever another one moves away, so that
//! the order in which a guest rearranges BARs does not matter. vCPU threads call this
//! under their function's lock; the decoder's own lock is held over bus changes and
//! [`BarListener`] calls only.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::bus::{Bus, BusDevice};

/// A range of guest-physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressRange {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub size: u64,
}

impl AddressRange {
    /// Whether `base..base + size` lies inside.
    pub fn contains(&self, base: u64, size: u64) -> bool {
        base.checked_sub(self.start)
            .and_then(|offset| offset.checked_add(size))
            .is_some_and(|end| end <= self.size)
    }
}

/// The two windows through which the host bridge forwards memory accesses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Windows {
    /// Below 4 GiB.
    pub mem32: AddressRange,
    /// Above RAM.
    pub mem64: AddressRange,
}

/// Learns when a BAR starts and stops to answer, to move doorbells along. Called under
/// the decoder's lock: it must not call back into the decoder or take a lock that is
/// held around calls to it.
pub trait BarListener: Send + Sync {
    /// The BAR answers at `base` from now on.
    fn mapped(&self, base: u64);
    /// The BAR no longer answers at `base`.
    fn unmapped(&self, base: u64);
}

struct Claim {
    size: u64,
    wanted: Option<u64>,
    mapped: Option<u64>,
    device: Arc<dyn BusDevice>,
    listener: Arc<dyn BarListener>,
}

#[derive(Default)]
struct Claims {
    next: u64,
    by_key: BTreeMap<u64, Claim>,
}

/// All BARs of the machine.
pub struct BarDecoder {
    mmio: Arc<Bus>,
    windows: Windows,
    claims: Mutex<Claims>,
}

impl BarDecoder {
    /// The bus that BARs are mapped on.
    pub fn bus(&self) -> &Bus {
        &self.mmio
    }

    /// A decoder that maps BARs on `mmio` inside `windows`.
    pub fn new(mmio: Arc<Bus>, windows: Windows) -> Arc<Self> {
        Arc::new(Self {
            mmio,
            windows,
            claims: Mutex::default(),
        })
    }

    /// Registers a BAR of `size` bytes, which answers nowhere yet.
    pub fn claim(
        self: &Arc<Self>,
        size: u64,
        device: Arc<dyn BusDevice>,
        listener: Arc<dyn BarListener>,
    ) -> BarClaim {
        let mut claims = self.lock();
        let key = claims.next;
        claims.next = claims.next.wrapping_add(1);
        let claim = Claim {
            size,
            wanted: None,
            mapped: None,
            device,
            listener,
        };
        claims.by_key.insert(key, claim);
        BarClaim {
            decoder: Arc::clone(self),
            key,
        }
    }

    /// How many BARs answer now.
    pub fn mapped_count(&self) -> usize {
        self.lock()
            .by_key
            .values()
            .filter(|claim| claim.mapped.is_some())
            .count()
    }

    fn lock(&self) -> MutexGuard<'_, Claims> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn decode(&self, key: u64, wanted: Option<u64>) {
        let mut claims = self.lock();
        let Some(claim) = claims.by_key.get_mut(&key) else {
            return;
        };
        if claim.wanted == wanted {
            return;
        }
        claim.wanted = wanted;
        self.unmap(claim);
        self.map_what_fits(&mut claims);
    }

    fn release(&self, key: u64) {
        let mut claims = self.lock();
        if let Some(mut claim) = claims.by_key.remove(&key) {
            self.unmap(&mut claim);
        }
        self.map_what_fits(&mut claims);
    }

    fn unmap(&self, claim: &mut Claim) {
        if let Some(base) = claim.mapped.take() {
            claim.listener.unmapped(base);
            self.mmio.remove(base);
        }
    }

    fn map_what_fits(&self, claims: &mut Claims) {
        for claim in claims.by_key.values_mut() {
            let (Some(base), None) = (claim.wanted, claim.mapped) else {
                continue;
            };
            if !self.may_answer(base, claim.size) {
                continue;
            }
            if self
                .mmio
                .insert(base, claim.size, Arc::clone(&claim.device))
                .is_ok()
            {
                claim.mapped = Some(base);
                claim.listener.mapped(base);
            }
        }
    }

    fn may_answer(&self, base: u64, size: u64) -> bool {
        size.is_power_of_two()
            && base.is_multiple_of(size)
            && [self.windows.mem32, self.windows.mem64]
                .iter()
                .any(|w| w.contains(base, size))
    }
}

/// One BAR's place in the decoder; it stops answering when this is dropped.
pub struct BarClaim {
    decoder: Arc<BarDecoder>,
    key: u64,
}

impl BarClaim {
    /// The guest wants the BAR at this address, or decoding off.
    pub fn decode(&self, wanted: Option<u64>) {
        self.decoder.decode(self.key, wanted);
    }

    /// Where the BAR answers.
    pub fn mapped_at(&self) -> Option<u64> {
        self.decoder
            .lock()
            .by_key
            .get(&self.key)
            .and_then(|claim| claim.mapped)
    }
}

impl Drop for BarClaim {
    fn drop(&mut self) {
        self.decoder.release(self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    struct Nothing;
    impl BusDevice for Nothing {
        fn read(&self, _: u64, _: &mut [u8]) {}
        fn write(&self, _: u64, _: &[u8]) {}
    }

    #[derive(Default)]
    struct Where(Mutex<Option<u64>>);
    impl BarListener for Where {
        fn mapped(&self, base: u64) {
            assert_eq!(self.0.lock().unwrap().replace(base), None);
        }
        fn unmapped(&self, base: u64) {
            assert_eq!(self.0.lock().unwrap().take(), Some(base));
        }
    }

    const WINDOWS: Windows = Windows {
        mem32: AddressRange {
            start: 0xc000_0000,
            size: 0x10_0000,
        },
        mem64: AddressRange {
            start: 0x1_0000_0000,
            size: 0x10_0000,
        },
    };

    #[test]
    fn a_bar_outside_the_windows_or_over_another_does_not_answer() {
        let bus = Arc::new(Bus::new());
        let decoder = BarDecoder::new(Arc::clone(&bus), WINDOWS);
        let (a, b) = (Arc::new(Where::default()), Arc::new(Where::default()));
        let first = decoder.claim(0x1000, Arc::new(Nothing), a.clone());
        let second = decoder.claim(0x1000, Arc::new(Nothing), b.clone());
        for outside in [
            0,
            0x1000,
            0xbfff_f000,
            0xc010_0000,
            0xc000_0010,
            u64::MAX - 0xfff,
        ] {
            first.decode(Some(outside));
            assert_eq!(first.mapped_at(), None);
        }
        first.decode(Some(0xc000_0000));
        second.decode(Some(0xc000_0000));
        assert_eq!(
            (first.mapped_at(), second.mapped_at()),
            (Some(0xc000_0000), None)
        );
        first.decode(Some(0x1_0000_0000));
        assert_eq!(*a.0.lock().unwrap(), Some(0x1_0000_0000));
        assert_eq!(
            *b.0.lock().unwrap(),
            Some(0xc000_0000),
            "the loser moves in"
        );
        drop(second);
        assert!(!bus.read(0xc000_0000, &mut [0]));
        first.decode(None);
        assert_eq!(decoder.mapped_count(), 0);
    }

    proptest! {
        #[test]
        fn nothing_maps_outside_and_listeners_agree_with_the_bus(
            moves in proptest::collection::vec((0_usize..4, any::<bool>(), prop_oneof![
                any::<u64>(),
                (0_u64..0x120).prop_map(|page| 0xbfff_0000 + page * 0x1000),
                (0_u64..0x120).prop_map(|page| 0xffff_0000 + page * 0x1000),
            ]), 0..60)
        ) {
            let bus = Arc::new(Bus::new());
            let decoder = BarDecoder::new(Arc::clone(&bus), WINDOWS);
            let sizes = [0x1000, 0x1000, 0x4000, 0x10000];
            let listeners: Vec<_> = sizes.iter().map(|_| Arc::new(Where::default())).collect();
            let claims: Vec<_> = sizes.iter().zip(&listeners)
                .map(|(size, l)| decoder.claim(*size, Arc::new(Nothing), l.clone()))
                .collect();
            for (which, on, base) in moves {
                claims[which].decode(on.then_some(base));
                let mut spans = Vec::new();
                for ((claim, listener), size) in claims.iter().zip(&listeners).zip(sizes) {
                    prop_assert_eq!(claim.mapped_at(), *listener.0.lock().unwrap());
                    if let Some(base) = claim.mapped_at() {
                        let inside = WINDOWS.mem32.contains(base, size)
                            || WINDOWS.mem64.contains(base, size);
                        prop_assert!(inside);
                        prop_assert!(bus.read(base, &mut [0]));
                        spans.push((base, base + size));
                    }
                }
                spans.sort_unstable();
                prop_assert!(spans.windows(2).all(|pair| pair[0].1 <= pair[1].0));
            }
        }
    }
}
