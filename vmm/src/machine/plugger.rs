//! The thread that plugs and unplugs memory: tells KVM and every device process, and gives pages
//! back to the host. It may wait for device processes, within their deadlines; the manager, which
//! hands it one job after another, does not.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::hotplug::{News, Post};
use super::plugging::Job;
use crate::kvm::KvmVm;
use crate::memory::{Pluggable, RamRegion};
use crate::threads::{self, ThreadHook};
use crate::virtio::VirtioPciFunction;

/// How long a process that was lost may take to end, with all of its I/O, before the guest is put
/// off.
const QUIET_LIMIT: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(5);

/// Where memory becomes the guest's and ceases to be.
pub trait Slots: Send + Sync {
    /// Has the guest reach a region, or not.
    ///
    /// # Errors
    /// What the hypervisor says: nothing has changed.
    fn set_region(&self, region: &RamRegion, present: bool) -> Result<(), String>;
}

impl Slots for KvmVm {
    fn set_region(&self, region: &RamRegion, present: bool) -> Result<(), String> {
        Self::set_region(self, region, present).map_err(|e| e.to_string())
    }
}

/// A device, whose process maps memory.
pub trait Mapper: Send + Sync {
    /// Tells the process of all that has come and gone; a process that does not acknowledge
    /// what is gone is lost.
    ///
    /// # Errors
    /// It serves on without what has come.
    fn sync_memory(&self) -> Result<(), String>;

    /// Nothing is left of a process that was lost.
    fn is_quiet(&self) -> bool;
}

impl Mapper for VirtioPciFunction {
    fn sync_memory(&self) -> Result<(), String> {
        Self::sync_memory(self).map_err(|e| e.to_string())
    }

    fn is_quiet(&self) -> bool {
        Self::is_quiet(self)
    }
}

/// A device by its id.
pub type Listener = (String, Arc<dyn Mapper>);

/// A device of the machine as a listener.
pub fn listener(id: &str, function: &Arc<VirtioPciFunction>) -> Listener {
    let function = Arc::clone(function);
    (id.to_owned(), function)
}

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
        kvm: Arc<dyn Slots>,
        post: Post,
        hook: ThreadHook,
    ) -> io::Result<Self> {
        let (orders, inbox) = channel();
        let worker = Worker {
            area,
            kvm,
            post,
            patience: QUIET_LIMIT,
        };
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
    kvm: Arc<dyn Slots>,
    post: Post,
    patience: Duration,
}

impl Worker {
    fn run(&self, inbox: &Receiver<Order>) {
        while let Ok(order) = inbox.recv() {
            let result = self.carry_out(&order);
            self.post.send(News::Plugged(result));
        }
    }

    /// All of it or nothing.
    fn carry_out(&self, order: &Order) -> Result<(), String> {
        let Order { job, listeners } = order;
        if let Err(why) = self.add(&job.add, listeners) {
            self.take_back(&job.add, listeners);
            return Err(why);
        }
        let gone = self.remove(&job.remove, listeners);
        // Nobody maps any more what is given back as a whole.
        gone.and_then(|()| self.punch(&job.punch))
            .inspect_err(|_| self.put_back(&job.remove, listeners))
    }

    /// The guest keeps these. Everybody is told, whoever has no place for them any more: that costs
    /// that device its requests there, and no other.
    fn put_back(&self, numbers: &[usize], listeners: &[Listener]) {
        for number in numbers {
            self.area.set_present(*number, true);
            if let Err(error) = self.tell_kvm(*number, true) {
                log::error!("memory that the guest keeps: {error}");
            }
        }
        for (id, device) in listeners {
            if let Err(error) = device.sync_memory() {
                log::error!("memory that the guest keeps: device {id}: {error}");
            }
        }
    }

    fn punch(&self, punched: &[Range<u64>]) -> Result<(), String> {
        punched.iter().try_for_each(|blocks| {
            let given = self.area.punch(blocks.clone());
            given.map_err(|e| format!("giving pages back to the host: {e}"))
        })
    }

    /// KVM first: what the guest asks a device to reach, it may reach itself.
    fn add(&self, numbers: &[usize], listeners: &[Listener]) -> Result<(), String> {
        if numbers.is_empty() {
            return Ok(());
        }
        for number in numbers {
            self.area.set_present(*number, true);
        }
        for number in numbers {
            self.tell_kvm(*number, true)?;
        }
        for (id, device) in listeners {
            let told = device.sync_memory();
            told.map_err(|e| format!("device {id} cannot be told of more memory: {e}"))?;
        }
        self.wait_for_quiet(listeners)
    }

    /// The guest was never told of these: whoever still maps them reaches nothing of its, and what
    /// it has put there by itself goes.
    fn take_back(&self, numbers: &[usize], listeners: &[Listener]) {
        for number in numbers {
            self.area.set_present(*number, false);
            if let Err(error) = self.tell_kvm(*number, false) {
                log::error!("memory that was not plugged: {error}");
            }
        }
        tell_all(listeners);
        for (number, blocks) in self.area.blocks_of_regions().enumerate() {
            if numbers.contains(&number)
                && let Err(error) = self.area.punch(blocks)
            {
                log::warn!("memory that was not plugged: {error}");
            }
        }
    }

    /// Devices first: what they map then, the guest does not have.
    fn remove(&self, numbers: &[usize], listeners: &[Listener]) -> Result<(), String> {
        if numbers.is_empty() {
            return Ok(());
        }
        for number in numbers {
            self.area.set_present(*number, false);
        }
        tell_all(listeners);
        self.wait_for_quiet(listeners)?;
        numbers.iter().try_for_each(|n| self.tell_kvm(*n, false))
    }

    fn tell_kvm(&self, number: usize, present: bool) -> Result<(), String> {
        let Some(region) = self.area.region(number) else {
            return Ok(());
        };
        self.kvm.set_region(region, present)
    }

    /// Waits until nothing is left of processes that were lost: such a one has acknowledged
    /// nothing, and might fail requests for lack of what is new, or write to what is gone.
    fn wait_for_quiet(&self, listeners: &[Listener]) -> Result<(), String> {
        let limit = Instant::now().checked_add(self.patience);
        for (id, device) in listeners {
            while !device.is_quiet() {
                if limit.is_none_or(|limit| Instant::now() >= limit) {
                    return Err(format!(
                        "device {id}: a process of it that was lost, or its I/O, does not end: is the host's storage stuck?"
                    ));
                }
                sleep(LOOK);
            }
        }
        Ok(())
    }
}

/// Tells all of them what is gone.
fn tell_all(listeners: &[Listener]) {
    for (id, device) in listeners {
        if let Err(error) = device.sync_memory() {
            // What is gone it has let go of, or it is lost; something else is new to it.
            log::warn!("device {id}: {error}");
        }
    }
}

#[cfg(test)]
#[path = "plugger_tests.rs"]
mod tests;
