//! A ring together with what is signalled for it: the part of a worker that does not
//! depend on the device kind or on how the worker sleeps.
//!
//! Owned by the queue's worker thread.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::chain::Chain;
use crate::mailbox::RingSetup;
use crate::memory::Memory;
use crate::ring::{Ring, RingError};
use crate::status::QueueStatus;
use crate::sys;

/// A ring that is being served.
#[derive(Debug)]
pub struct ActiveRing {
    ring: Ring,
    kick: Arc<File>,
    call: Option<Arc<File>>,
    err: Option<Arc<File>>,
    status: Arc<QueueStatus>,
    features: u64,
    broken: bool,
    queue: u16,
}

fn open(setup: &mut RingSetup) -> Result<(Ring, bool), RingError> {
    let memory = Arc::clone(&setup.memory);
    let mut ring = Ring::new(memory, setup.layout, setup.ring_features, setup.base)?;
    let recovered = match setup.inflight.take() {
        Some(region) => ring.keep_log(region)?,
        None => false,
    };
    Ok((ring, recovered))
}

impl ActiveRing {
    /// Takes a ring into service, or says why it cannot be: then it counts as broken, and
    /// its error eventfd has been signalled. If a process before this one left requests in
    /// flight in the ring's log, those come out of [`Self::pop`] first.
    pub fn start(
        mut setup: RingSetup,
        queue: u16,
        status: &Arc<QueueStatus>,
    ) -> Result<Self, RingError> {
        status.broken.store(false, Ordering::Relaxed);
        status.in_flight.set(0);
        let err = setup.err.take();
        match open(&mut setup) {
            Ok((ring, recovered)) => {
                if recovered {
                    if ring.to_resubmit() > 0 {
                        log::info!(
                            "queue {queue}: {} requests of a process before this one are submitted again",
                            ring.to_resubmit()
                        );
                    }
                    // It may have ended between showing a completion and signalling it.
                    if let Some(call) = &setup.call {
                        sys::signal(call);
                        status.interrupts.add(1);
                    }
                }
                status.in_flight.set(u64::from(ring.to_resubmit()));
                status.started.store(true, Ordering::Release);
                Ok(Self {
                    ring,
                    kick: setup.kick,
                    call: setup.call,
                    err,
                    status: Arc::clone(status),
                    features: setup.features,
                    broken: false,
                    queue,
                })
            }
            Err(e) => {
                status.broken.store(true, Ordering::Relaxed);
                if let Some(err) = &err {
                    sys::signal(err);
                }
                Err(e)
            }
        }
    }

    /// The next request, if there is one and the ring is sound. The head names the request
    /// until it is completed. While the worker is paused there is none, but for those that
    /// were in flight already when this process took over.
    #[inline]
    pub fn pop(&mut self, chain: &mut Chain) -> Option<u16> {
        if self.broken || (self.status.pause.look() && self.ring.to_resubmit() == 0) {
            return None;
        }
        match self.ring.pop(chain) {
            Ok(head) => {
                if head.is_some() {
                    self.count();
                }
                head
            }
            Err(e) => {
                self.break_with(&e);
                None
            }
        }
    }

    /// Tells the outside how much is in flight.
    #[inline]
    fn count(&self) {
        let popped = u64::from(self.ring.in_flight());
        let waiting = u64::from(self.ring.to_resubmit());
        self.status.in_flight.set(popped.saturating_add(waiting));
    }

    /// Puts back the request that was popped last: the next [`Self::pop`] finds it again.
    /// Several are put back in the reverse of the order in which they were popped, with
    /// nothing completed in between.
    pub fn unpop(&mut self, head: u16) {
        if let Err(e) = self.ring.unpop(head) {
            self.break_with(&e);
        }
        self.count();
    }

    /// Puts a completion into the used ring, unseen by the driver until [`Self::flush`].
    #[inline]
    pub fn complete(&mut self, head: u16, written: u32) {
        if let Err(e) = self.ring.complete(head, written) {
            self.break_with(&e);
        }
        self.count();
    }

    /// Shows the driver all completions since the last call, with at most one interrupt.
    pub fn flush(&mut self) {
        if self.publish()
            && let Some(call) = &self.call
        {
            sys::signal(call);
            self.status.syscalls.add(1);
        }
    }

    /// Shows the driver all completions since the last call; true if the caller must signal
    /// [`Self::call`] for them. [`Self::flush`] does both.
    #[inline]
    pub fn publish(&mut self) -> bool {
        match self.ring.publish() {
            Ok(wanted) => {
                let signal = wanted && self.call.is_some();
                if signal {
                    self.status.interrupts.add(1);
                }
                signal
            }
            Err(e) => {
                self.break_with(&e);
                false
            }
        }
    }

    /// The eventfd to be signalled for completions, if the front-end gave one.
    pub fn call(&self) -> Option<&Arc<File>> {
        self.call.as_ref()
    }

    /// How many requests wait to be popped, as far as the driver has told by now. Unlike
    /// [`Self::enable_kicks`], asks for no kick.
    #[inline]
    pub fn available(&mut self) -> u16 {
        if self.broken || self.status.pause.look() {
            return 0;
        }
        self.ring.available().unwrap_or_else(|e| {
            self.break_with(&e);
            0
        })
    }

    /// Wants kicks again; true if the caller must look for requests before it sleeps. A
    /// paused worker is woken when it goes on.
    pub fn enable_kicks(&mut self) -> bool {
        if self.broken {
            return false;
        }
        if self.ring.to_resubmit() > 0 {
            return true;
        }
        let more = self.ring.enable_kicks().unwrap_or_else(|e| {
            self.break_with(&e);
            false
        });
        more && !self.status.pause.look()
    }

    /// Needs no kicks for now.
    pub fn disable_kicks(&mut self) {
        if self.broken {
            return;
        }
        if let Err(e) = self.ring.disable_kicks() {
            self.break_with(&e);
        }
    }

    /// Stops the ring because the chain at `head` is no request of this device kind at all;
    /// it is not completed.
    pub fn reject(&mut self, head: u16, why: &dyn std::fmt::Display) {
        self.ring.forget(head);
        self.count();
        self.break_because(why);
    }

    /// Stops the ring for good, because what was found in it breaks the rules: no more
    /// requests are taken until it is set up anew; those in flight still complete.
    pub fn break_because(&mut self, why: &dyn std::fmt::Display) {
        if self.broken {
            return;
        }
        self.broken = true;
        self.status.broken.store(true, Ordering::Relaxed);
        log::warn!(
            "queue {}: malformed ring, stopped until the guest resets the device: {why}",
            self.queue
        );
        if let Some(err) = &self.err {
            sys::signal(err);
        }
    }

    fn break_with(&mut self, why: &RingError) {
        self.break_because(why);
    }

    /// Whether the ring was found malformed.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Requests popped and not completed.
    #[inline]
    pub fn in_flight(&self) -> u16 {
        self.ring.in_flight()
    }

    /// Ring size.
    pub fn size(&self) -> u16 {
        self.ring.size()
    }

    /// The memory that the ring's buffers live in. It stays mapped at least until
    /// [`Self::swap_memory`] or the end of this ring, both of which need nothing in flight.
    #[inline]
    pub fn memory(&self) -> &Arc<Memory> {
        self.ring.memory()
    }

    /// Features that the driver accepted.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// The kick eventfd.
    pub fn kick(&self) -> &Arc<File> {
        &self.kick
    }

    /// Replaces the call eventfd. Completions that were signalled on the old one may have
    /// been lost on the way, so the new one is signalled once.
    pub fn set_call(&mut self, call: Option<Arc<File>>) {
        if let Some(call) = &call {
            sys::signal(call);
        }
        self.call = call;
    }

    /// Replaces the error eventfd.
    pub fn set_err(&mut self, err: Option<Arc<File>>) {
        if self.broken
            && let Some(err) = &err
        {
            sys::signal(err);
        }
        self.err = err;
    }

    /// Goes on in another snapshot. Must not be called with requests in flight, which would
    /// point into the old one, unless the new one [extends](Memory::extends) that.
    pub fn swap_memory(&mut self, memory: Arc<Memory>) -> Result<(), RingError> {
        debug_assert!(self.ring.in_flight() == 0 || memory.extends(self.memory()));
        self.flush();
        match self.ring.relocate(memory) {
            Ok(()) => Ok(()),
            Err(e) => {
                self.break_with(&e);
                Err(e)
            }
        }
    }

    /// Ends service; the available index at which a successor goes on. The log stays, for
    /// the successor: nothing is in flight in it, or what was to be submitted again and was
    /// not reached. Only the log of a malformed ring ends here, as its requests do.
    pub fn stop(mut self) -> u16 {
        self.flush();
        if self.broken {
            self.ring.discard_log();
        }
        self.status.in_flight.set(0);
        self.status.started.store(false, Ordering::Relaxed);
        self.ring.next_avail()
    }
}
