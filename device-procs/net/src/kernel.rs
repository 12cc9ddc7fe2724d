//! The in-kernel back-end (vhost-net): this process tells the kernel where the rings of a pair
//! and the guest's memory are, and hands it tap, kick and call; the kernel moves the frames.
//! The control queue stays here.
//!
//! Owned by the worker thread of its pair, which sleeps meanwhile. A ring that the driver does
//! not use, a cable that is out and a paused device are all the same to the kernel: a ring
//! without a back-end.
//!
//! Everything that the kernel was told ends with the descriptor and with this process, not
//! one of them alone: nobody else may keep the descriptor open.

use std::fs::File;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bulkhead_runtime::mailbox::RingSetup;
use bulkhead_runtime::memory::Memory;
use bulkhead_runtime::ring::{MAX_RING_SIZE, RingLayout};
use bulkhead_runtime::status::QueueStatus;
use bulkhead_runtime::sys;

use crate::features;
use crate::tap::Tap;
use crate::vhost_ioctl::{KernelRegion, RingAddresses, VhostNet};

/// Features that the kernel must be told of, if the driver accepted them.
const TOLD: u64 = bulkhead_runtime::device::F_VERSION_1
    | bulkhead_runtime::device::F_EVENT_IDX
    | bulkhead_runtime::device::F_INDIRECT_DESC
    | features::F_MRG_RXBUF;

/// Rings of a pair.
const RINGS: usize = 2;

#[derive(Debug)]
struct KernelRing {
    layout: RingLayout,
    status: Arc<QueueStatus>,
    err: Option<Arc<File>>,
    attached: bool,
    /// The ring's kick and call; the kernel has references of its own.
    _kick: Arc<File>,
    call: Option<Arc<File>>,
}

/// The kernel's end of one pair.
#[derive(Debug)]
pub struct Kernel {
    vhost: VhostNet,
    /// Of each ring: fires when the kernel finds it malformed.
    errors: [File; RINGS],
    rings: [Option<KernelRing>; RINGS],
    /// What the kernel was told about.
    memory: Arc<Memory>,
    features: Option<u64>,
}

/// Takes an inherited descriptor of /dev/vhost-net; the number once.
///
/// # Errors
/// In one line: it is something else, or somebody's already.
pub fn inherit(fd: RawFd) -> Result<VhostNet, String> {
    let failed = |what: &str, e: &std::io::Error| format!("fd {fd}: /dev/vhost-net: {what}: {e}");
    let file = File::from(sys::take_inherited(fd).map_err(|e| failed("not open", &e))?);
    let vhost = VhostNet::new(file);
    let known = vhost
        .features()
        .map_err(|e| failed("VHOST_GET_FEATURES", &e))?;
    if known & TOLD != TOLD {
        return Err(format!(
            "fd {fd}: /dev/vhost-net: this kernel lacks features (it has {known:#x}); use backend=user"
        ));
    }
    vhost
        .set_owner()
        .map_err(|e| failed("VHOST_SET_OWNER", &e))?;
    Ok(vhost)
}

impl Kernel {
    /// The end of one pair. Before confinement.
    ///
    /// # Errors
    /// No eventfds.
    pub fn new(vhost: VhostNet) -> std::io::Result<Self> {
        Ok(Self {
            vhost,
            errors: [sys::eventfd()?, sys::eventfd()?],
            rings: [None, None],
            memory: Arc::default(),
            features: None,
        })
    }

    /// Fires when the kernel finds a ring malformed.
    pub fn error(&self, ring: usize) -> Option<&File> {
        self.errors.get(ring)
    }

    /// The kernel's error descriptor has fired: without an excuse the ring is malformed.
    pub fn found_an_error(&mut self, ring: usize, excused: bool) {
        if let Some(error) = self.errors.get(ring) {
            sys::drain(error);
        }
        if let Some(Some(ring)) = self.rings.get(ring)
            && !excused
            && !ring.status.broken.swap(true, Ordering::Relaxed)
        {
            log::warn!("malformed ring, stopped by the kernel until the guest resets the device");
            if let Some(err) = &ring.err {
                sys::signal(err);
            }
        }
    }

    /// Takes a ring into service, without a back-end yet.
    ///
    /// # Errors
    /// In one line why not; the ring counts as broken then.
    pub fn start(
        &mut self,
        ring: usize,
        setup: RingSetup,
        status: &Arc<QueueStatus>,
    ) -> Result<(), String> {
        status.broken.store(false, Ordering::Relaxed);
        let err = setup.err.clone();
        let told = self.tell(ring, setup, status);
        if told.is_err() {
            status.broken.store(true, Ordering::Relaxed);
            if let Some(err) = &err {
                sys::signal(err);
            }
        }
        told
    }

    fn tell(
        &mut self,
        ring: usize,
        setup: RingSetup,
        status: &Arc<QueueStatus>,
    ) -> Result<(), String> {
        let place = self.rings.get_mut(ring).ok_or("no such ring")?;
        let index = index(ring);
        let size = setup.layout.size;
        if !size.is_power_of_two() || size > u32::from(MAX_RING_SIZE) {
            return Err(format!(
                "ring size {size} is not a power of two up to {MAX_RING_SIZE}"
            ));
        }
        let addresses = addresses(&setup.memory, &setup.layout)
            .ok_or("the ring lies outside guest memory or is misaligned")?;
        let failed =
            |what: &'static str| move |e: std::io::Error| format!("vhost-net: {what}: {e}");
        *place = None;
        let features = setup.features & TOLD;
        if self.features != Some(features) {
            self.vhost
                .set_features(features)
                .map_err(failed("VHOST_SET_FEATURES"))?;
            self.features = Some(features);
        }
        if !Arc::ptr_eq(&self.memory, &setup.memory) {
            self.vhost
                .set_memory(regions(&setup.memory))
                .map_err(failed("VHOST_SET_MEM_TABLE"))?;
            self.memory = setup.memory;
        }
        let vhost = &self.vhost;
        vhost
            .set_size(index, size)
            .map_err(failed("VHOST_SET_VRING_NUM"))?;
        vhost
            .set_base(index, setup.base)
            .map_err(failed("VHOST_SET_VRING_BASE"))?;
        vhost
            .set_addresses(index, addresses)
            .map_err(failed("VHOST_SET_VRING_ADDR"))?;
        vhost
            .set_kick(index, Some(&setup.kick))
            .map_err(failed("VHOST_SET_VRING_KICK"))?;
        vhost
            .set_call(index, setup.call.as_deref())
            .map_err(failed("VHOST_SET_VRING_CALL"))?;
        vhost
            .set_err(index, self.errors.get(ring))
            .map_err(failed("VHOST_SET_VRING_ERR"))?;
        status.started.store(true, Ordering::Release);
        if let Some(place) = self.rings.get_mut(ring) {
            *place = Some(KernelRing {
                layout: setup.layout,
                status: Arc::clone(status),
                err: setup.err,
                attached: false,
                _kick: setup.kick,
                call: setup.call,
            });
        }
        Ok(())
    }

    /// Gives the rings their back-end, or takes it away. A ring that is malformed already is
    /// left alone.
    pub fn set_attached(&mut self, tap: &Tap, pair: usize, wanted: bool) {
        let Some(queue) = tap.queue(pair) else {
            return;
        };
        for (number, ring) in self.rings.iter_mut().enumerate() {
            let Some(ring) = ring.as_mut().filter(|ring| ring.attached != wanted) else {
                continue;
            };
            let file = wanted.then(|| queue.file());
            match self.vhost.set_backend(index(number), file) {
                Ok(()) => ring.attached = wanted,
                Err(e) => {
                    log::warn!("vhost-net: VHOST_NET_SET_BACKEND: {e}");
                    // Wanted or not, it is not tried again with every wake-up.
                    ring.attached = wanted;
                    ring.status.broken.store(true, Ordering::Relaxed);
                    if let Some(err) = &ring.err {
                        sys::signal(err);
                    }
                }
            }
        }
    }

    /// Ends service of a ring; the available index at which a successor goes on.
    pub fn stop(&mut self, ring: usize) -> Option<u16> {
        let stopped = self.rings.get_mut(ring)?.take()?;
        let index = index(ring);
        if let Err(e) = self.vhost.set_backend(index, None) {
            log::warn!("vhost-net: VHOST_NET_SET_BACKEND: {e}");
        }
        stopped.status.started.store(false, Ordering::Relaxed);
        // The front-end's descriptors are let go.
        for cleared in [
            self.vhost.set_kick(index, None),
            self.vhost.set_call(index, None),
        ] {
            if let Err(e) = cleared {
                log::debug!("vhost-net: cannot let a descriptor go: {e}");
            }
        }
        match self.vhost.base(index) {
            Ok(base) => Some(base),
            Err(e) => {
                log::warn!("vhost-net: VHOST_GET_VRING_BASE: {e}");
                None
            }
        }
    }

    /// Goes on in another snapshot of memory. The rings have no back-end meanwhile; the caller
    /// gives it back.
    ///
    /// # Errors
    /// A ring is not in it.
    pub fn set_memory(
        &mut self,
        memory: Arc<Memory>,
        tap: &Tap,
        pair: usize,
    ) -> Result<(), String> {
        if Arc::ptr_eq(&self.memory, &memory) {
            return Ok(());
        }
        self.set_attached(tap, pair, false);
        self.vhost
            .set_memory(regions(&memory))
            .map_err(|e| format!("vhost-net: VHOST_SET_MEM_TABLE: {e}"))?;
        for (number, ring) in self.rings.iter().enumerate() {
            let Some(ring) = ring else {
                continue;
            };
            let addresses = addresses(&memory, &ring.layout)
                .ok_or("the ring lies outside guest memory or is misaligned")?;
            self.vhost
                .set_addresses(index(number), addresses)
                .map_err(|e| format!("vhost-net: VHOST_SET_VRING_ADDR: {e}"))?;
        }
        // Only now may the old snapshot's mappings go.
        self.memory = memory;
        Ok(())
    }

    /// Signals completions here from now on, and once for those that may have been lost.
    pub fn set_call(&mut self, ring: usize, call: Option<Arc<File>>) {
        if let Err(e) = self.vhost.set_call(index(ring), call.as_deref()) {
            log::warn!("vhost-net: VHOST_SET_VRING_CALL: {e}");
        }
        if let Some(call) = &call {
            sys::signal(call);
        }
        if let Some(Some(ring)) = self.rings.get_mut(ring) {
            ring.call = call;
        }
    }

    /// Signals a malformed ring here from now on.
    pub fn set_err(&mut self, ring: usize, err: Option<Arc<File>>) {
        if let Some(Some(ring)) = self.rings.get_mut(ring) {
            if ring.status.broken.load(Ordering::Relaxed)
                && let Some(err) = &err
            {
                sys::signal(err);
            }
            ring.err = err;
        }
    }
}

fn index(ring: usize) -> u32 {
    u32::try_from(ring).unwrap_or(u32::MAX)
}

fn regions(memory: &Memory) -> impl Iterator<Item = KernelRegion> + '_ {
    memory.regions().map(|(guest, slice)| {
        let address = slice.ptr_guard().as_ptr() as u64;
        KernelRegion::new(guest, slice.len() as u64, address)
    })
}

/// Where the parts of a ring are mapped, if they are in guest memory.
fn addresses(memory: &Memory, layout: &RingLayout) -> Option<RingAddresses> {
    let n = usize::try_from(layout.size).ok()?;
    let at = |user: u64, len: usize, align: usize| {
        let area = memory.area_at_user_addr(user, len)?;
        let slice = area.slice().filter(|_| area.is_aligned(align))?;
        Some(slice.ptr_guard().as_ptr() as u64)
    };
    Some(RingAddresses {
        desc: at(layout.desc, n.checked_mul(16)?, 16)?,
        avail: at(layout.avail, n.checked_mul(2)?.checked_add(6)?, 2)?,
        used: at(layout.used, n.checked_mul(8)?.checked_add(6)?, 4)?,
    })
}
