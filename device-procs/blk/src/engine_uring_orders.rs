//! The orders that the main thread gives to an engine of [`super`]: a ring begins and ends,
//! its memory or its eventfds change. On the queue's worker thread, between two waits.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use bulkhead_runtime::active::ActiveRing;
use bulkhead_runtime::mailbox::{Answer, Order, RingSetup};
use io_uring::opcode;

use super::{Draining, Engine};
use crate::queue::Queue;
use crate::uring_entries::{CALL, KICK, TAG_CANCEL, TAG_KICK, user_data};

impl Engine {
    pub(super) fn obey(&mut self, order: Order) {
        match order {
            Order::Start(setup) => {
                let answer = match self.start_ring(*setup) {
                    Ok(()) => Answer::Done,
                    Err(why) => Answer::Refused(why),
                };
                self.port.answer(answer);
            }
            // Answered by finish_draining.
            Order::Stop => self.draining = Some(Draining::Stop),
            Order::Memory(memory) => {
                let extends = |queue: &mut Queue| memory.extends(queue.ring().memory());
                let grown = self.queue.as_mut().is_some_and(extends);
                match self.queue.as_mut().filter(|_| grown) {
                    // What is in flight stays where it was: a slow disk holds nothing up.
                    Some(queue) => {
                        let swapped = queue.ring().swap_memory(memory);
                        self.port.answer(swapped.map_or_else(
                            |why| Answer::Refused(why.to_string()),
                            |()| Answer::Done,
                        ));
                    }
                    None => self.draining = Some(Draining::Memory(memory)),
                }
            }
            Order::Call(call) => {
                self.show();
                // What is to be signalled on the old one is, before it goes.
                self.enter(0);
                if let Some(queue) = &mut self.queue {
                    queue.ring().set_call(call);
                    self.register_call();
                }
                self.port.answer(Answer::Done);
            }
            Order::Err(err) => {
                if let Some(queue) = &mut self.queue {
                    queue.ring().set_err(err);
                }
                self.port.answer(Answer::Done);
            }
        }
    }

    fn start_ring(&mut self, setup: RingSetup) -> Result<(), String> {
        let ring = ActiveRing::start(setup, self.port.index(), self.port.status())
            .map_err(|e| e.to_string())?;
        self.uring
            .submitter()
            .register_files_update(KICK.0, &[ring.kick().as_raw_fd()])
            .map_err(|e| format!("cannot register the kick eventfd: {e}"))?;
        let status = Arc::clone(self.port.status());
        self.queue = Some(Queue::new(ring, status, Arc::clone(&self.disk)));
        self.register_call();
        self.generation = self.generation.wrapping_add(1);
        self.arm_kick = true;
        self.portion = self.first_portion();
        Ok(())
    }

    /// Lets the ring signal the call eventfd, if it can.
    fn register_call(&mut self) {
        let call = self.queue.as_mut().and_then(|q| q.ring().call().cloned());
        let fd = call.as_ref().map_or(-1, |c| c.as_raw_fd());
        let registered = self
            .uring
            .submitter()
            .register_files_update(CALL.0, &[fd])
            .is_ok();
        self.signal_by_ring = registered && self.quiet && call.is_some();
    }

    /// Answers the order that waits for I/O to end, once it has ended. True if it did: then
    /// the ring must be looked at again before the thread sleeps.
    pub(super) fn finish_draining(&mut self) -> bool {
        if self.draining.is_none() || self.queue.as_ref().is_some_and(|q| !q.is_idle()) {
            return false;
        }
        let answer = match (self.draining.take(), &mut self.queue) {
            (Some(Draining::Memory(memory)), Some(queue)) => {
                match queue.ring().swap_memory(memory) {
                    Ok(()) => Answer::Done,
                    Err(why) => Answer::Refused(why.to_string()),
                }
            }
            (Some(Draining::Stop), queue) => {
                let queue = queue.take();
                if queue.is_some() {
                    self.drop_eventfds();
                }
                Answer::Stopped {
                    next_avail: queue.map(Queue::stop),
                }
            }
            _ => Answer::Done,
        };
        self.port.answer(answer);
        true
    }

    /// Stops watching the kick and lets the eventfds go.
    fn drop_eventfds(&mut self) {
        let poll = user_data(TAG_KICK, self.generation);
        self.generation = self.generation.wrapping_add(1);
        self.arm_kick = false;
        self.push(
            &opcode::AsyncCancel::new(poll)
                .build()
                .user_data(user_data(TAG_CANCEL, 0)),
        );
        self.enter(0);
        self.signal_by_ring = false;
        let update = self
            .uring
            .submitter()
            .register_files_update(KICK.0, &[-1, -1]);
        if let Err(e) = update {
            log::warn!("cannot release the eventfds of a ring: {e}");
        }
    }
}
