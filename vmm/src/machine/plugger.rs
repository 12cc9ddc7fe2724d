//! The thread that plugs and unplugs memory: tells KVM and every device process, and gives pages
//! back to the host. It may wait for device processes, within their deadlines; the manager, which
//! hands it one job after another, does not.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use super::hotplug::{News, Post};
use super::plugging::Job;
use crate::kvm::KvmVm;
use crate::memory::Pluggable;
use crate::threads::{self, ThreadHook};
use crate::virtio::VirtioPciFunction;

/// What the thread is told of a device.
pub type Listener = (String, Arc<VirtioPciFunction>);

/// A job, and who must hear of it.
struct Order {
    job: Job,
    listeners: Vec<Listener>,
}

/// The manager's side of the thread, which ends with it.
pub struct Plugger {
    orders: Sender<Order>,
}

impl Plugger {
    /// Starts the thread.
    ///
    /// # Errors
    /// When there is none to be had.
    pub fn start(
        area: Arc<Pluggable>,
        kvm: Arc<KvmVm>,
        post: Post,
        hook: ThreadHook,
    ) -> io::Result<Self> {
        let (orders, inbox) = channel();
        let worker = Worker { area, kvm, post };
        threads::spawn(
            "memory".to_owned(),
            hook,
            || Ok(()),
            move || worker.run(&inbox),
        )?;
        Ok(Self { orders })
    }

    /// Begins a job; its end is told by [`News::Plugged`]. The regions to add are present for
    /// functions that start from now on, those to remove are not.
    pub fn begin(&self, area: &Pluggable, job: Job, listeners: Vec<Listener>) {
        for number in &job.add {
            area.set_present(*number, true);
        }
        for number in &job.remove {
            area.set_present(*number, false);
        }
        // The thread lives as long as this.
        let _ = self.orders.send(Order { job, listeners });
    }
}

struct Worker {
    area: Arc<Pluggable>,
    kvm: Arc<KvmVm>,
    post: Post,
}

impl Worker {
    fn run(&self, inbox: &Receiver<Order>) {
        while let Ok(order) = inbox.recv() {
            let result = self.carry_out(&order);
            self.post.send(News::Plugged(result));
        }
    }

    fn carry_out(&self, order: &Order) -> Result<(), String> {
        let Order { job, listeners } = order;
        self.add(&job.add, listeners)?;
        // Nobody maps any more what is given back as a whole.
        self.remove(&job.remove, listeners);
        for blocks in &job.punch {
            self.area
                .punch(blocks.clone())
                .map_err(|e| format!("giving pages back to the host: {e}"))?;
        }
        Ok(())
    }

    /// All of them or none.
    fn add(&self, numbers: &[usize], listeners: &[Listener]) -> Result<(), String> {
        if numbers.is_empty() {
            return Ok(());
        }
        let told = numbers
            .iter()
            .try_for_each(|number| self.tell_kvm(*number, true))
            .and_then(|()| {
                listeners.iter().try_for_each(|(id, function)| {
                    let told = function.sync_memory();
                    told.map_err(|e| format!("device {id} cannot be told of more memory: {e}"))
                })
            });
        if told.is_err() {
            self.remove(numbers, listeners);
        }
        told
    }

    /// Devices first: what they map then, the guest does not have.
    fn remove(&self, numbers: &[usize], listeners: &[Listener]) {
        if numbers.is_empty() {
            return;
        }
        for number in numbers {
            self.area.set_present(*number, false);
        }
        for (id, function) in listeners {
            if let Err(error) = function.sync_memory() {
                // What is gone it has let go of, or it is lost; something else is new to it.
                log::warn!("device {id}: {error}");
            }
        }
        for number in numbers {
            if let Err(error) = self.tell_kvm(*number, false) {
                log::warn!("memory: {error}");
            }
        }
    }

    fn tell_kvm(&self, number: usize, present: bool) -> Result<(), String> {
        let Some(region) = self.area.region(number) else {
            return Ok(());
        };
        let told = self.kvm.set_region(region, present);
        told.map_err(|e| e.to_string())
    }
}
