//! What one worker thread serves: the two rings of a queue pair, or the control queue, and
//! the orders of the main thread about them. Independent of how the thread sleeps.
//!
//! Which ring is what (virtio 1.2, 5.1.2): rx0, tx0, rx1, tx1 …, and last the control queue;
//! but the control queue is ring 2 for a driver that did not take VIRTIO_NET_F_MQ.

use std::sync::Arc;

use bulkhead_runtime::active::ActiveRing;
use bulkhead_runtime::device::F_VERSION_1;
use bulkhead_runtime::mailbox::{Answer, Order, RingSetup, WorkerPort};
use bulkhead_runtime::memory::Memory;
use bulkhead_runtime::status::Sleep;

use crate::control::Control;
use crate::features::{F_CTRL_VQ, F_MQ};
use crate::kernel::Kernel;
use crate::receive::Receive;
use crate::state::State;
use crate::transmit::Transmit;

/// What a ring is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Frames to the guest.
    Receive,
    /// Frames from the guest.
    Transmit,
    /// Commands.
    Control,
}

/// What ring `index` of a device with `pairs` queue pairs is for, given the accepted features.
pub fn role(index: u16, pairs: u16, features: u64) -> Option<Role> {
    let used = if features & F_MQ != 0 { pairs } else { 1 };
    let control = used.saturating_mul(2);
    if index < control {
        Some(if index.is_multiple_of(2) {
            Role::Receive
        } else {
            Role::Transmit
        })
    } else if index == control && features & F_CTRL_VQ != 0 {
        Some(Role::Control)
    } else {
        None
    }
}

/// A ring that is being served.
pub enum Serving {
    /// Frames to the guest.
    Receive(Box<Receive>),
    /// Frames from the guest.
    Transmit(Transmit),
    /// Commands.
    Control(Control),
    /// Frames either way, moved by the kernel: its ring of that number.
    Kernel(usize),
}

impl Serving {
    /// The ring, if this thread serves it.
    pub fn ring(&mut self) -> Option<&mut ActiveRing> {
        match self {
            Self::Receive(half) => Some(half.ring()),
            Self::Transmit(half) => Some(half.ring()),
            Self::Control(control) => Some(control.ring()),
            Self::Kernel(_) => None,
        }
    }
}

/// Rings that one thread serves, at most.
pub const PLACES: usize = 2;

/// One of the thread's rings.
pub struct Place {
    /// Its mailbox.
    pub port: WorkerPort,
    /// The ring, while it is served.
    pub serving: Option<Serving>,
}

/// The rings of one thread.
pub struct Pair {
    /// Number of the pair; the control queue's thread has the number after the last pair's.
    pub number: usize,
    /// Its rings: two, or the control queue's one.
    pub places: Vec<Place>,
    /// What all threads share.
    pub state: Arc<State>,
    /// The kernel's end, if the kernel moves the frames.
    pub kernel: Option<Kernel>,
}

/// What an order changed, for the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Nothing that it need know.
    None,
    /// There is a new kick eventfd.
    Started,
    /// The kick eventfd is gone.
    Stopped,
    /// There is a new call eventfd, or none.
    Call,
}

impl Pair {
    /// The thread of these mailboxes.
    pub fn new(number: usize, ports: Vec<WorkerPort>, state: Arc<State>) -> Self {
        let places = ports.into_iter().map(|port| Place {
            port,
            serving: None,
        });
        Self {
            number,
            places: places.collect(),
            state,
            kernel: None,
        }
    }

    /// The same, with the kernel to move the frames.
    #[must_use]
    pub fn with_kernel(mut self, kernel: Option<Kernel>) -> Self {
        self.kernel = kernel;
        self
    }

    /// The receiving half.
    pub fn receive(&mut self) -> Option<&mut Receive> {
        self.places.iter_mut().find_map(|p| match &mut p.serving {
            Some(Serving::Receive(half)) => Some(half.as_mut()),
            _ => None,
        })
    }

    /// The transmitting half.
    pub fn transmit(&mut self) -> Option<&mut Transmit> {
        self.places.iter_mut().find_map(|p| match &mut p.serving {
            Some(Serving::Transmit(half)) => Some(half),
            _ => None,
        })
    }

    /// The control queue, where this thread has it.
    pub fn control(&mut self) -> Option<&mut Control> {
        self.places.iter_mut().find_map(|p| match &mut p.serving {
            Some(Serving::Control(control)) => Some(control),
            _ => None,
        })
    }

    /// Whether frames are to be read from the tap now: the ring is there, sound and not
    /// paused, and the driver uses this pair.
    pub fn is_receiving(&mut self) -> bool {
        let used = self.state.is_used(self.number) && !self.state.is_tap_gone();
        let paused = self.places.first().is_none_or(|p| p.port.paused());
        used && !paused && self.receive().is_some_and(|half| !half.ring().is_broken())
    }

    /// The ring of a place, if this thread serves it.
    pub fn ring(&mut self, place: usize) -> Option<&mut ActiveRing> {
        self.places.get_mut(place)?.serving.as_mut()?.ring()
    }

    /// The kernel failed at a ring: it is malformed, unless a frame found no tap (sendmsg's
    /// EBADFD, which loses that frame alone).
    pub fn kernel_found_an_error(&mut self, ring: usize) {
        let gone = self.state.look_at_tap();
        if let Some(kernel) = &mut self.kernel {
            kernel.found_an_error(ring, gone);
        }
    }

    /// Lets the kernel move frames, or not, as everybody now wants it.
    pub fn settle_kernel(&mut self) {
        let Some(kernel) = &mut self.kernel else {
            return;
        };
        // Noted by the mailbox, too, as the answer to a pause.
        let paused = self.places.iter().filter(|p| p.port.paused()).count() > 0;
        let wanted = !paused && self.state.is_link_up() && self.state.is_used(self.number);
        kernel.set_attached(self.state.tap(), self.number, wanted);
    }

    /// Takes and carries out the order in the mailbox of a place. No I/O of this thread is
    /// under way.
    pub fn obey(&mut self, place: usize) -> Change {
        let Some(port) = self.places.get(place).map(|p| &p.port) else {
            return Change::None;
        };
        let order = port.take();
        // What may have changed is looked at with every batch.
        port.take_refresh();
        let Some(order) = order else {
            return Change::None;
        };
        let (answer, change) = self.carry_out(place, order);
        if let Some(place) = self.places.get(place) {
            place.port.answer(answer);
        }
        change
    }

    fn carry_out(&mut self, place: usize, order: Order) -> (Answer, Change) {
        match order {
            Order::Start(setup) => match self.start(place, *setup) {
                Ok(()) => (Answer::Done, Change::Started),
                Err(why) => (Answer::Refused(why), Change::None),
            },
            Order::Stop => {
                let serving = self.places.get_mut(place).and_then(|p| p.serving.take());
                let change = match serving {
                    Some(_) => Change::Stopped,
                    None => Change::None,
                };
                let next_avail = serving.and_then(|serving| self.stop(place, serving));
                (Answer::Stopped { next_avail }, change)
            }
            Order::Memory(memory) => (self.set_memory(place, memory), Change::None),
            Order::Call(call) => {
                if let (Some(Serving::Kernel(n)), Some(kernel)) = self.serving(place) {
                    kernel.set_call(*n, call);
                } else if let Some(ring) = self.ring(place) {
                    ring.set_call(call);
                }
                (Answer::Done, Change::Call)
            }
            Order::Err(err) => {
                if let (Some(Serving::Kernel(n)), Some(kernel)) = self.serving(place) {
                    kernel.set_err(*n, err);
                } else if let Some(ring) = self.ring(place) {
                    ring.set_err(err);
                }
                (Answer::Done, Change::None)
            }
        }
    }

    fn serving(&mut self, place: usize) -> (Option<&mut Serving>, Option<&mut Kernel>) {
        let serving = self.places.get_mut(place).and_then(|p| p.serving.as_mut());
        (serving, self.kernel.as_mut())
    }

    fn stop(&mut self, place: usize, serving: Serving) -> Option<u16> {
        match serving {
            Serving::Receive(half) => {
                self.state.set_receiving(self.number, false);
                Some(half.stop())
            }
            Serving::Transmit(half) => Some(half.stop()),
            Serving::Control(control) => Some(control.stop()),
            Serving::Kernel(ring) => {
                if place == 0 {
                    self.state.set_receiving(self.number, false);
                }
                self.kernel.as_mut().and_then(|k| k.stop(ring))
            }
        }
    }

    fn set_memory(&mut self, place: usize, memory: Arc<Memory>) -> Answer {
        if let Some(transmit) = self.transmit() {
            transmit.abandon();
        }
        let (number, state) = (self.number, Arc::clone(&self.state));
        let done = if let (Some(Serving::Kernel(_)), Some(kernel)) = self.serving(place) {
            kernel.set_memory(memory, state.tap(), number)
        } else if let Some(ring) = self.ring(place) {
            ring.swap_memory(memory).map_err(|e| e.to_string())
        } else {
            Ok(())
        };
        done.map_or_else(Answer::Refused, |()| Answer::Done)
    }

    fn start(&mut self, place: usize, setup: RingSetup) -> Result<(), String> {
        let number = self.number;
        let Some(place) = self.places.get_mut(place) else {
            return Err("no such ring".into());
        };
        let (index, features) = (place.port.index(), setup.features);
        if features & F_VERSION_1 == 0 {
            return Err("the driver did not accept VIRTIO_F_VERSION_1".into());
        }
        let Some(role) = role(index, self.state.traits().pairs, features) else {
            return Err("the driver's features leave this ring without a use".into());
        };
        let status = Arc::clone(place.port.status());
        if let (Some(kernel), true) = (&mut self.kernel, role != Role::Control) {
            let ring = usize::from(role == Role::Transmit);
            kernel.start(ring, setup, &status)?;
            place.serving = Some(Serving::Kernel(ring));
            if role == Role::Receive {
                self.state.set_receiving(number, true);
            }
            return Ok(());
        }
        let ring = ActiveRing::start(setup, index, &status).map_err(|e| e.to_string())?;
        let state = Arc::clone(&self.state);
        place.serving = Some(match role {
            Role::Receive => Serving::Receive(Box::new(Receive::new(ring, status, state))),
            Role::Transmit => Serving::Transmit(Transmit::new(ring, status, state)),
            Role::Control => Serving::Control(Control::new(ring, status, state)),
        });
        if role == Role::Receive {
            self.state.set_receiving(number, true);
        }
        Ok(())
    }

    /// Counts a system call of this thread, on the ring of a place.
    pub fn count_syscalls(&self, place: usize, n: u64) {
        if let Some(place) = self.places.get(place) {
            place.port.status().syscalls.add(n);
        }
    }

    /// The kick of a place fired.
    pub fn count_kick(&self, place: usize) {
        if let Some(place) = self.places.get(place) {
            place.port.status().kicks.add(1);
        }
    }

    /// Says to the outside, before this thread sleeps, what the rings wait for: the tap, or a
    /// limit (`held`). A ring for received frames always waits for those.
    pub fn falls_asleep(&mut self) {
        for place in &mut self.places {
            place.port.status().sleeps(match &place.serving {
                Some(Serving::Transmit(half)) if half.held().is_some() => Sleep::ByOrder,
                Some(Serving::Transmit(half)) if half.is_blocked() => Sleep::ForHost,
                Some(Serving::Receive(_) | Serving::Kernel(_)) => Sleep::ByOrder,
                Some(Serving::Transmit(_) | Serving::Control(_)) | None => Sleep::Idle,
            });
        }
    }

    /// This thread is awake again: frames that it does not send from now on wait for it.
    pub fn wakes(&mut self) {
        for place in &mut self.places {
            if let Some(Serving::Transmit(_)) = &place.serving {
                place.port.status().sleeps(Sleep::Idle);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_control_queue_is_the_last_ring_or_ring_two() {
        let all = F_MQ | F_CTRL_VQ;
        assert_eq!(role(0, 4, all), Some(Role::Receive));
        assert_eq!(role(7, 4, all), Some(Role::Transmit));
        assert_eq!(role(8, 4, all), Some(Role::Control));
        assert_eq!(role(9, 4, all), None);
        // Without MQ there is one pair, however many the device has.
        assert_eq!(role(1, 4, F_CTRL_VQ), Some(Role::Transmit));
        assert_eq!(role(2, 4, F_CTRL_VQ), Some(Role::Control));
        assert_eq!(role(3, 4, F_CTRL_VQ), None);
        assert_eq!(role(8, 4, F_CTRL_VQ), None);
        assert_eq!(role(2, 1, F_CTRL_VQ), Some(Role::Control));
        assert_eq!(role(2, 4, F_MQ), Some(Role::Receive));
        assert_eq!(role(8, 4, F_MQ), None);
        assert_eq!(role(2, 4, 0), None);
    }
}
