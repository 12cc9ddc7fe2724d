//! The machine's virtual CPUs: one thread each, named `vp-N`, under the manager's control.
//!
//! The manager thread makes all vCPUs and their threads while the process may still do
//! anything; from then on a vCPU thread needs ioctl(KVM_RUN, KVM_KVMCLOCK_CTRL), futex,
//! write (eventfds) and what the devices on its buses do.

mod control;
mod run;
mod signal;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

use crate::arch::x86_64::boot::BootEntry;
use crate::arch::x86_64::snapshot::Snapshot;
use crate::arch::x86_64::{cpuid, state};
use crate::bus::Bus;
use crate::events::EventSender;
use crate::kvm::{KvmError, KvmVm};
use crate::threads::{self, ThreadHook};
use control::{Control, Phase, Target};
pub use run::VcpuFault;
use run::{Counters, VcpuThread};

/// How many vCPUs, and where they run.
#[derive(Clone, Debug, Default)]
pub struct VcpuConfig {
    /// Number of vCPUs that there may be.
    pub count: u32,
    /// Those that are there at first.
    pub boot: u32,
    /// Host CPU of `vp-N` at index N; empty for no pinning.
    pub pins: Vec<usize>,
}

/// Why vCPUs could not be made or controlled.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// A count out of range.
    #[error("{count} vCPUs cannot be had: give 1 to {max}")]
    Count {
        /// What was asked for.
        count: u32,
        /// What the host's KVM allows.
        max: u32,
    },
    /// Pins and vCPUs differ in number.
    #[error("{pins} host CPUs are given for {count} vCPUs: give one for each")]
    Pins {
        /// Host CPUs given.
        pins: usize,
        /// vCPUs.
        count: u32,
    },
    /// KVM refused.
    #[error("vCPU {vcpu}: {source}")]
    Kvm {
        /// The vCPU's index.
        vcpu: u32,
        /// What KVM said.
        source: KvmError,
    },
    /// The thread could not be started.
    #[error(
        "cannot start thread vp-{vcpu}: {source}: check the limit on threads and that the host CPUs of pin= exist"
    )]
    Thread {
        /// The vCPU's index.
        vcpu: u32,
        /// Why.
        source: std::io::Error,
    },
    /// A vCPU could not be made what it was at first.
    #[error("vCPU {vcpu} cannot be reset: {why}")]
    Reset {
        /// The vCPU's index.
        vcpu: u32,
        /// What KVM said.
        why: String,
    },
    /// A thread did not come out of the guest or of a device in time.
    #[error("vCPU {vcpu} did not stop in {} ms: a device may be stuck", .timeout.as_millis())]
    Timeout {
        /// The vCPU's index.
        vcpu: u32,
        /// How long was waited.
        timeout: Duration,
    },
}

/// Exits of one vCPU to user space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VcpuCounters {
    /// All of them.
    pub exits: u64,
    /// Port accesses among them.
    pub pio: u64,
    /// Memory-mapped accesses among them.
    pub mmio: u64,
}

/// Every vCPU of the machine. Dropping it stops them.
pub struct VcpuManager {
    control: Arc<Control>,
    counters: Vec<Arc<Counters>>,
    threads: Vec<JoinHandle<()>>,
    /// The first state of every vCPU is known.
    resettable: bool,
    /// Whose memory the threads reach.
    vm: Arc<KvmVm>,
}

/// How long `drop` waits for the threads.
const DROP_TIMEOUT: Duration = Duration::from_secs(5);

impl VcpuManager {
    /// Makes the vCPUs, gives the first its boot state and starts their threads, parked. `hook`
    /// runs on each thread as the last thing before it parks.
    pub fn new(
        vm: &Arc<KvmVm>,
        config: &VcpuConfig,
        mmio: &Arc<Bus>,
        pio: &Arc<Bus>,
        boot: &BootEntry,
        events: &EventSender,
        hook: &ThreadHook,
    ) -> Result<Self, VcpuError> {
        let count = config.count;
        let max = vm.max_vcpus();
        if count == 0 || count > max {
            return Err(VcpuError::Count { count, max });
        }
        if !config.pins.is_empty() && config.pins.len() != count as usize {
            return Err(VcpuError::Pins {
                pins: config.pins.len(),
                count,
            });
        }
        signal::install_kick_handler().map_err(|source| VcpuError::Thread { vcpu: 0, source })?;

        let at = |vcpu| move |source| VcpuError::Kvm { vcpu, source };
        let host_cpuid = vm.supported_cpuid().map_err(at(0))?;
        let mut vcpus = Vec::new();
        let mut exits = Vec::new();
        // A host whose KVM does not tell runs guests, and resets none.
        let msrs = vm.msr_indices();
        for index in 0..count {
            let mut vcpu = vm.create_vcpu(index).map_err(at(index))?;
            let features = cpuid::Features {
                tsc_deadline: vm.has_tsc_deadline_timer(),
                tsc_khz: vcpu.get_tsc_khz().ok(),
            };
            let leaves = cpuid::for_vcpu(&host_cpuid, index, count, features).map_err(at(index))?;
            state::prepare(&vcpu, &leaves).map_err(at(index))?;
            if index == 0 {
                state::enter(&vcpu, boot).map_err(at(index))?;
                if vm.has_pre_fault_memory() {
                    for (start, len) in boot.touched() {
                        // Best effort: what is not mapped now is faulted in later.
                        let _ = crate::kvm::pre_fault_memory(&mut vcpu, *start, *len);
                    }
                }
            }
            let first = match &msrs {
                Ok(msrs) => Snapshot::take(&vcpu, msrs).map_err(|e| e.to_string()),
                Err(error) => Err(error.to_string()),
            };
            let first = first
                .inspect_err(|why| log::debug!("vCPU {index} cannot be reset: {why}"))
                .ok();
            exits.push(Some(signal::immediate_exit_of(&mut vcpu)));
            vcpus.push((vcpu, first));
        }

        let control = Arc::new(Control::new(exits, config.boot));
        let mut manager = Self {
            control: Arc::clone(&control),
            counters: Vec::new(),
            threads: Vec::new(),
            resettable: vcpus.iter().all(|(_, first)| first.is_some()),
            vm: Arc::clone(vm),
        };
        for (index, (vcpu, first)) in (0u32..).zip(vcpus) {
            let counters = Arc::new(Counters::default());
            let thread = VcpuThread {
                index,
                vcpu,
                first,
                run_size: vm.run_size(),
                mmio: Arc::clone(mmio),
                pio: Arc::clone(pio),
                events: events.clone(),
                control: Arc::clone(&control),
                counters: Arc::clone(&counters),
            };
            let pin = config.pins.get(index as usize).copied();
            let prepare = move || {
                signal::accept_kicks()?;
                pin.map_or(Ok(()), signal::pin_to)
            };
            let handle = threads::spawn(
                format!("vp-{index}"),
                Arc::clone(hook),
                prepare,
                move || {
                    thread.main();
                },
            )
            .map_err(|source| VcpuError::Thread {
                vcpu: index,
                source,
            });
            match handle {
                Ok(handle) => {
                    manager.threads.push(handle);
                    manager.counters.push(counters);
                }
                Err(error) => {
                    (index..count).for_each(|index| control.forget(index));
                    return Err(error);
                }
            }
        }
        Ok(manager)
    }

    /// Lets the vCPUs run, for the first time or again.
    pub fn start(&self) {
        self.control.ask(Target::Running);
    }

    /// The same as [`start`](Self::start), after a pause.
    pub fn resume(&self) {
        self.start();
    }

    /// Lets a vCPU run that was not plugged in.
    pub fn plug(&self, index: u32) {
        self.control.plug(index, true);
    }

    /// Takes a vCPU that the guest has given up out of it; its thread parks as soon as it can.
    pub fn unplug(&self, index: u32) {
        if self.control.plug(index, false)
            && let Some(thread) = self.threads.get(index as usize)
        {
            signal::kick(thread);
        }
    }

    /// Takes every vCPU out of the guest and parks it between two instructions. On a timeout
    /// the request stands: the vCPU parks as soon as it can.
    pub fn pause(&self, timeout: Duration) -> Result<(), VcpuError> {
        self.kick(Target::Parked);
        self.control
            .wait_while(timeout, |phase| {
                matches!(phase, Phase::Starting | Phase::Running)
            })
            .map_err(|vcpu| VcpuError::Timeout { vcpu, timeout })
    }

    /// Whether [`reset`](Self::reset) can be done.
    pub fn can_reset(&self) -> bool {
        self.resettable
    }

    /// Makes every vCPU what it was before its first instruction, those among them that have ended,
    /// with the boot processor at `entry` and the first `present` plugged in. They are to be parked
    /// ([`pause`](Self::pause)), and stay so until [`start`](Self::start).
    ///
    /// # Errors
    /// One could not: the machine cannot go on.
    pub fn reset(
        &self,
        entry: &Arc<BootEntry>,
        present: u32,
        timeout: Duration,
    ) -> Result<(), VcpuError> {
        self.control.ask_reset(entry, present);
        self.control
            .wait_reset(timeout)
            .map_err(|(vcpu, why)| match why {
                Some(why) => VcpuError::Reset { vcpu, why },
                None => VcpuError::Timeout { vcpu, timeout },
            })
    }

    /// Ends every vCPU thread for good.
    pub fn stop(&mut self, timeout: Duration) -> Result<(), VcpuError> {
        self.kick(Target::Gone);
        self.control
            .wait_while(timeout, |phase| phase != Phase::Gone)
            .map_err(|vcpu| VcpuError::Timeout { vcpu, timeout })?;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        Ok(())
    }

    /// Exits so far, by vCPU.
    pub fn counters(&self) -> Vec<VcpuCounters> {
        self.counters
            .iter()
            .map(|counters| VcpuCounters {
                exits: counters.exits.load(Ordering::Relaxed),
                pio: counters.pio.load(Ordering::Relaxed),
                mmio: counters.mmio.load(Ordering::Relaxed),
            })
            .collect()
    }

    /// CPU time of all vCPUs' threads so far; none when they have ended.
    pub fn runtime(&self) -> Duration {
        let times = self.threads.iter().filter_map(signal::runtime);
        times.fold(Duration::ZERO, Duration::saturating_add)
    }

    fn kick(&self, target: Target) {
        for index in self.control.ask(target) {
            if let Some(thread) = self.threads.get(index) {
                signal::kick(thread);
            }
        }
    }
}

impl Drop for VcpuManager {
    fn drop(&mut self) {
        if self.stop(DROP_TIMEOUT).is_err() {
            // One that has not come out of the guest reaches the guest's memory, which stays.
            std::mem::forget(Arc::clone(&self.vm));
        }
    }
}

#[cfg(test)]
mod tests;
