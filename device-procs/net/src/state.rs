//! What all threads of the device share: the driver's wishes (filter, offloads, pairs), the
//! link, the limits.
//!
//! The main thread writes on behalf of the front-end and the VMM, the worker of the control
//! queue on behalf of the driver; the workers of pairs read. They look at atomics only, and
//! take the lock when the filter has changed.

use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use bulkhead_runtime::clock;
use bulkhead_runtime::inflight::KeptMemory;
use bulkhead_runtime::limit::{Limiter, Rate, TokenBucket};
use bulkhead_runtime::mailbox::Signals;

use crate::features::{self, Traits};
use crate::filter::{Filter, Mac};
use crate::kept::{Kept, Wishes};
use crate::tap::Tap;

/// Changes of offloads and pairs that a driver may make: 64 at once, and 16 a second. A driver
/// that wants more is refused (VIRTIO_NET_ERR), which Linux reports to whoever asked.
const CHANGES: Rate = Rate::fixed(CHANGES_PER_SECOND, CHANGES_AT_ONCE);
const CHANGES_PER_SECOND: NonZeroU64 = NonZeroU64::MIN.saturating_add(15);
const CHANGES_AT_ONCE: NonZeroU64 = NonZeroU64::MIN.saturating_add(63);

/// Limits of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes per second.
    pub bytes: Option<Rate>,
    /// Frames per second.
    pub packets: Option<Rate>,
}

/// How the device starts.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// The address that the driver is told.
    pub mac: Mac,
    /// MTU that the driver is told.
    pub mtu: Option<u16>,
    /// The cable is in.
    pub link_up: bool,
    /// Limits on what goes to the guest.
    pub to_guest: Limits,
    /// Limits on what comes from it.
    pub from_guest: Limits,
    /// The kernel moves the frames (vhost-net).
    pub kernel: bool,
}

/// The device's shared state.
#[derive(Debug)]
pub struct State {
    traits: Traits,
    default_mac: Mac,
    tap: Tap,
    features: AtomicU64,
    link_up: AtomicBool,
    /// The tap was deleted: no cable is in, whatever the VMM says.
    tap_gone: AtomicBool,
    /// A VMM asks for the device's health, and tells what it hears.
    watched: AtomicBool,
    announce: AtomicBool,
    /// The driver is to announce itself once more after it has. Linux does it before it looks
    /// whether the link came up with the request, and then to no one.
    announce_twice: AtomicBool,
    /// The configuration space has changed, and the driver has not been told yet.
    changed: AtomicBool,
    /// How often the driver may still change what the host does under its network's one lock.
    changes: Mutex<TokenBucket>,
    /// Offloads that the driver takes now.
    offloads: AtomicU64,
    /// Where a successor finds what the driver has set.
    kept: Mutex<Option<Kept>>,
    /// Pairs in use.
    pairs: AtomicU16,
    /// The rx ring of each pair is being served.
    receiving: Vec<AtomicBool>,
    filter: Mutex<Filter>,
    /// Grows with each change of the filter.
    generation: AtomicU64,
    /// Limits on what goes to the guest.
    pub to_guest: Limiter,
    /// Limits on what comes from it.
    pub from_guest: Limiter,
    /// Wakes the worker of each pair.
    wakeups: OnceLock<Vec<Signals>>,
}

impl State {
    /// The state after start, without a driver.
    pub fn new(tap: Tap, settings: &Settings) -> Self {
        let pairs = u16::try_from(tap.queues()).unwrap_or(u16::MAX).max(1);
        let now = clock::now();
        let state = Self {
            traits: Traits {
                pairs,
                mtu: settings.mtu,
                offloads: tap.supported(),
                kernel: settings.kernel,
            },
            default_mac: settings.mac,
            features: AtomicU64::new(0),
            link_up: AtomicBool::new(settings.link_up),
            tap_gone: AtomicBool::new(false),
            watched: AtomicBool::new(false),
            announce: AtomicBool::new(false),
            announce_twice: AtomicBool::new(false),
            changed: AtomicBool::new(false),
            changes: Mutex::new(TokenBucket::new(CHANGES, now)),
            offloads: AtomicU64::new(0),
            kept: Mutex::default(),
            pairs: AtomicU16::new(1),
            receiving: (0..pairs).map(|_| AtomicBool::new(false)).collect(),
            filter: Mutex::new(Filter::new(settings.mac, false)),
            generation: AtomicU64::new(0),
            to_guest: Limiter::new(settings.to_guest.bytes, settings.to_guest.packets, now),
            from_guest: Limiter::new(settings.from_guest.bytes, settings.from_guest.packets, now),
            wakeups: OnceLock::new(),
            tap,
        };
        state.attach_queues();
        state.tap.set_carrier(settings.link_up);
        state
    }

    /// What the device is.
    pub fn traits(&self) -> &Traits {
        &self.traits
    }

    /// The tap.
    pub fn tap(&self) -> &Tap {
        &self.tap
    }

    /// Says how to wake the worker of each pair. Once, before the first of them runs.
    pub fn set_wakeups(&self, wakeups: Vec<Signals>) {
        let _ = self.wakeups.set(wakeups);
    }

    fn wake_pairs(&self) {
        for wakeup in self.wakeups.get().into_iter().flatten() {
            wakeup.refresh();
        }
    }

    /// The configuration space as it is now.
    pub fn config(&self) -> Vec<u8> {
        let mut status = 0;
        if self.is_link_up() {
            status |= features::S_LINK_UP;
        }
        if self.announce.load(Ordering::Relaxed) {
            status |= features::S_ANNOUNCE;
        }
        features::space(&self.traits, &self.filter().mac, status)
    }

    /// Features that the driver accepted; 0 while there is none.
    pub fn features(&self) -> u64 {
        self.features.load(Ordering::Relaxed)
    }

    /// The driver accepted these features, or there is none any more (0): everything that a
    /// driver sets is as after a reset, or, if this process took the place of another under
    /// the same driver, as that one left it.
    pub fn accept(&self, accepted: u64) {
        self.features.store(accepted, Ordering::Relaxed);
        self.begin();
    }

    /// Memory that outlives this process: takes over what is in it, and keeps what the driver
    /// sets in it from now on.
    pub fn keep(&self, memory: KeptMemory) {
        *self.lock_kept() = Some(Kept::new(memory));
        self.begin();
    }

    /// The front-end goes: what it gave to be kept is its successor's, and not touched again.
    pub fn let_go(&self) {
        *self.lock_kept() = None;
    }

    fn begin(&self) {
        let features = self.features();
        let kept = self
            .lock_kept()
            .as_ref()
            .and_then(|kept| kept.load(features, self.traits.pairs))
            .filter(|_| features != 0);
        // A successor's host may have forgotten where the guest is.
        let announce = kept.is_some() && features & features::F_GUEST_ANNOUNCE != 0;
        let wishes = kept.unwrap_or_else(|| {
            // Who has no control queue here (QEMU keeps it to itself) starts and stops rings.
            let mq = features & features::F_MQ != 0;
            let by_ring = mq && features & features::F_CTRL_VQ == 0;
            Wishes {
                features,
                filter: Filter::new(self.default_mac, features & features::F_CTRL_VLAN != 0),
                offloads: features & features::GUEST_OFFLOADS,
                pairs: if by_ring { self.traits.pairs } else { 1 },
            }
        });
        self.announce.store(announce, Ordering::Relaxed);
        self.announce_twice.store(false, Ordering::Relaxed);
        self.offloads.store(wishes.offloads, Ordering::Relaxed);
        self.tap.set_offload(features::tap_flags(wishes.offloads));
        self.pairs.store(wishes.pairs, Ordering::SeqCst);
        self.attach_queues();
        self.wake_pairs();
        self.change_filter(|filter| *filter = wishes.filter);
    }

    /// Another process may have changed the tap's settings: they are made again.
    pub fn set_tap_again(&self) {
        let offloads = self.offloads.load(Ordering::Relaxed);
        self.tap.set_offload(features::tap_flags(offloads));
        self.tap.set_carrier(self.is_link_up());
    }

    fn lock_kept(&self) -> MutexGuard<'_, Option<Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps what the driver has set, for a successor.
    fn save(&self) {
        let mut kept = self.lock_kept();
        if let Some(kept) = kept.as_mut() {
            kept.save(&Wishes {
                features: self.features(),
                filter: self.filter(),
                offloads: self.offloads.load(Ordering::Relaxed),
                pairs: self.pairs(),
            });
        }
    }

    /// The driver chose these offloads among those that it accepted; false if not.
    pub fn choose_offloads(&self, offloads: u64) -> bool {
        let known = self.features() & features::GUEST_OFFLOADS;
        if offloads & !known != 0 {
            return false;
        }
        if offloads == self.offloads.load(Ordering::Relaxed) {
            return true;
        }
        if !self.may_change() || !self.tap.set_offload(features::tap_flags(offloads)) {
            return false;
        }
        self.offloads.store(offloads, Ordering::Relaxed);
        self.save();
        true
    }

    /// Pairs that the driver uses.
    pub fn pairs(&self) -> u16 {
        self.pairs.load(Ordering::Relaxed)
    }

    /// Whether the driver may change offloads or pairs once more by now. Each change takes the
    /// lock of the host's whole network configuration (RTNL) for a moment.
    fn may_change(&self) -> bool {
        let mut changes = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        changes.take(clock::now(), 1).is_ok()
    }

    /// Uses so many pairs from now on; the caller has bounded the number. False: the driver
    /// has changed too much of late.
    pub fn set_pairs(&self, pairs: u16) -> bool {
        if pairs == self.pairs() {
            return true;
        }
        if !self.may_change() {
            return false;
        }
        self.pairs.store(pairs, Ordering::SeqCst);
        self.attach_queues();
        self.wake_pairs();
        self.save();
        true
    }

    /// The rx ring of a pair is served, or no more.
    pub fn set_receiving(&self, pair: usize, receiving: bool) {
        if let Some(flag) = self.receiving.get(pair) {
            flag.store(receiving, Ordering::SeqCst);
        }
        self.attach_queues();
    }

    /// Whether frames for this pair are to be taken from its queue of the tap.
    #[inline]
    pub fn is_used(&self, pair: usize) -> bool {
        pair < usize::from(self.pairs.load(Ordering::Relaxed))
    }

    /// The kernel spreads frames over attached queues, so one that nobody reads is detached.
    fn attach_queues(&self) {
        for (pair, receiving) in self.receiving.iter().enumerate() {
            let attached = self.is_used(pair) && receiving.load(Ordering::SeqCst);
            self.tap.set_attached(pair, attached);
        }
    }

    /// Whether the cable is in.
    #[inline]
    pub fn is_link_up(&self) -> bool {
        self.link_up.load(Ordering::Relaxed) && !self.is_tap_gone()
    }

    /// Whether the tap is known to be deleted.
    #[inline]
    pub fn is_tap_gone(&self) -> bool {
        self.tap_gone.load(Ordering::Relaxed)
    }

    /// A VMM looks at the device's health. Nothing but a frame would tell that the tap is gone,
    /// and none of the guest's may come.
    pub fn watch(&self) {
        self.watched.store(true, Ordering::Relaxed);
        self.look_at_tap();
    }

    /// Looks whether the tap was deleted, which takes the link down for good.
    pub fn look_at_tap(&self) -> bool {
        if self.is_tap_gone() {
            return true;
        }
        let gone = self.tap.is_gone();
        if gone && !self.tap_gone.swap(true, Ordering::Relaxed) {
            if !self.watched.load(Ordering::Relaxed) {
                log::warn!("tap {}: was deleted; the link is down", self.tap.name());
            }
            self.changed.store(true, Ordering::Release);
            self.wake_pairs();
        }
        gone
    }

    /// Plugs the cable in or out; true if that changes the configuration space. Plugging in
    /// a cable that is in already makes the driver announce itself, where it can: so the VMM
    /// does after it has replaced this process.
    pub fn set_link(&self, up: bool) -> bool {
        let was = self.link_up.swap(up, Ordering::Relaxed);
        if was != up {
            self.tap.set_carrier(up);
            self.wake_pairs();
        }
        let announce = up && self.features() & features::F_GUEST_ANNOUNCE != 0;
        let twice = announce && !was;
        self.announce_twice.store(twice, Ordering::Relaxed);
        let announced = self.announce.swap(announce, Ordering::Relaxed);
        was != up || announce || announced
    }

    /// The driver has announced itself.
    pub fn announced(&self) {
        if self.announce_twice.swap(false, Ordering::Relaxed) {
            self.changed.store(true, Ordering::Release);
        } else {
            self.announce.store(false, Ordering::Relaxed);
        }
    }

    /// Whether the configuration space has changed by what the driver did; once.
    pub fn take_changed(&self) -> bool {
        self.changed.swap(false, Ordering::AcqRel)
    }

    fn lock(&self) -> MutexGuard<'_, Filter> {
        self.filter.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A copy of the filter.
    pub fn filter(&self) -> Filter {
        self.lock().clone()
    }

    /// Changes the filter; workers see it with the next frame.
    pub fn change_filter<T>(&self, change: impl FnOnce(&mut Filter) -> T) -> T {
        let answer = {
            let mut filter = self.lock();
            let answer = change(&mut filter);
            self.generation.fetch_add(1, Ordering::Release);
            answer
        };
        self.save();
        answer
    }

    /// Brings a worker's copy of the filter up to date.
    #[inline]
    pub fn refresh_filter(&self, copy: &mut Filter, generation: &mut u64) {
        let now = self.generation.load(Ordering::Acquire);
        if now != *generation {
            copy.clone_from(&self.lock());
            *generation = now;
        }
    }

    /// Changes limits on one direction.
    pub fn limit(limiter: &Limiter, limits: Limits) {
        limiter.set(limits.bytes, limits.packets, clock::now());
    }
}
