//! One vCPU thread: KVM_RUN, and what each exit asks for.
//!
//! Everything here runs on thread `vp-N`. A thread that is parked waits on the set's
//! condition variable; one that runs leaves KVM_RUN when the manager sets
//! `kvm_run.immediate_exit` and sends the kick signal, in that order, so that neither a
//! signal before KVM_RUN nor one inside it is lost.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kvm_bindings::{KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::control::{Control, Next};
use crate::arch::x86_64::boot::BootEntry;
use crate::arch::x86_64::snapshot::Snapshot;
use crate::bus::Bus;
use crate::events::{EventSender, MachineEvent};
use crate::kvm::{failure_code, port_exit};

/// KVM gave up on a vCPU: no fault of the guest.
#[derive(Debug, thiserror::Error)]
pub enum VcpuFault {
    /// KVM_EXIT_INTERNAL_ERROR.
    #[error(
        "the host's KVM cannot run this guest (internal error {suberror}{}): use a host whose /dev/kvm runs Linux guests",
        if *.suberror == 1 { ", an instruction it cannot emulate" } else { "" }
    )]
    InternalError {
        /// `kvm_run.internal.suberror`; 1 is a failed emulation.
        suberror: u64,
    },
    /// KVM_EXIT_FAIL_ENTRY.
    #[error(
        "the host's CPU refused to enter the guest (reason {reason:#x}): check that nested virtualisation or the host's KVM is set up"
    )]
    FailEntry {
        /// The hardware's reason.
        reason: u64,
    },
    /// KVM_RUN itself failed.
    #[error("KVM_RUN failed: {0}: check that the host has memory left and its KVM works")]
    Run(io::Error),
    /// An exit that this machine never asks for.
    #[error(
        "KVM left the guest for a reason that this machine does not know ({0}): use another host kernel"
    )]
    Unexpected(String),
}

/// How often a vCPU left the guest for user space.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) exits: AtomicU64,
    pub(super) pio: AtomicU64,
    pub(super) mmio: AtomicU64,
}

/// What a vCPU thread owns.
pub(super) struct VcpuThread {
    pub(super) index: u32,
    pub(super) vcpu: VcpuFd,
    /// What a reset goes back to; `None`: it cannot be reset.
    pub(super) first: Option<Snapshot>,
    pub(super) run_size: usize,
    pub(super) mmio: Arc<Bus>,
    pub(super) pio: Arc<Bus>,
    pub(super) events: EventSender,
    pub(super) control: Arc<Control>,
    pub(super) counters: Arc<Counters>,
}

/// Why KVM_RUN came back.
enum Outcome {
    /// Handled: run on.
    Again,
    /// Interrupted: see what the manager wants.
    Kicked,
    /// This vCPU will not run again.
    Ended(MachineEvent),
}

impl VcpuThread {
    /// The thread's body.
    pub(super) fn main(mut self) {
        loop {
            match self.control.next(self.index) {
                Next::Run => {}
                Next::Reset(entry) => {
                    let result = self.reset(&entry);
                    self.control.was_reset(self.index, result);
                    continue;
                }
                Next::End => return,
            }
            loop {
                match self.run_once() {
                    Outcome::Again => {}
                    Outcome::Kicked => break,
                    Outcome::Ended(event) => {
                        self.events.send(event);
                        self.control.ended(self.index);
                        break;
                    }
                }
            }
            if self.control.is_pausing() {
                // Tells the guest's soft-lockup watchdog that the gap is not its fault; a
                // guest without kvmclock makes this EINVAL.
                let _ = self.vcpu.kvmclock_ctrl();
            }
        }
    }

    /// Makes the vCPU what it was at first; the boot processor is pointed at the kernel.
    fn reset(&self, entry: &BootEntry) -> Result<(), String> {
        let first = self.first.as_ref().ok_or("its first state is not known")?;
        let boot = (self.index == 0).then_some(entry);
        first.put_back(&self.vcpu, boot).map_err(|e| e.to_string())
    }

    fn run_once(&mut self) -> Outcome {
        let exit = match self.vcpu.run() {
            Ok(exit) => exit,
            Err(error) => {
                return match error.errno() {
                    libc::EINTR => Outcome::Kicked,
                    libc::EAGAIN => Outcome::Again,
                    errno => self.failed(VcpuFault::Run(io::Error::from_raw_os_error(errno))),
                };
            }
        };
        self.counters.exits.fetch_add(1, Ordering::Relaxed);
        match exit {
            VcpuExit::MmioRead(address, data) => {
                self.counters.mmio.fetch_add(1, Ordering::Relaxed);
                self.mmio.read(address, data);
                Outcome::Again
            }
            VcpuExit::MmioWrite(address, data) => {
                self.counters.mmio.fetch_add(1, Ordering::Relaxed);
                self.mmio.write(address, data);
                Outcome::Again
            }
            VcpuExit::IoIn(..) | VcpuExit::IoOut(..) => self.port_access(),
            VcpuExit::Intr | VcpuExit::IrqWindowOpen => Outcome::Again,
            VcpuExit::Shutdown => Outcome::Ended(MachineEvent::TripleFault { vcpu: self.index }),
            VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _) => {
                Outcome::Ended(MachineEvent::PowerOff)
            }
            VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => Outcome::Ended(MachineEvent::Reset),
            VcpuExit::InternalError => {
                let suberror = failure_code(&mut self.vcpu);
                self.failed(VcpuFault::InternalError { suberror })
            }
            VcpuExit::FailEntry(reason, _) => self.failed(VcpuFault::FailEntry { reason }),
            other => {
                let name = format!("{other:?}");
                self.failed(VcpuFault::Unexpected(name))
            }
        }
    }

    /// `in` and `out`, string forms included: one bus access per element.
    fn port_access(&mut self) -> Outcome {
        self.counters.pio.fetch_add(1, Ordering::Relaxed);
        let Some(access) = port_exit(&mut self.vcpu, self.run_size) else {
            return self.failed(VcpuFault::Unexpected("a malformed port access".into()));
        };
        let port = u64::from(access.port);
        for element in access.data.chunks_exact_mut(access.width) {
            if access.is_in {
                self.pio.read(port, element);
            } else {
                self.pio.write(port, element);
            }
        }
        Outcome::Again
    }

    fn failed(&self, fault: VcpuFault) -> Outcome {
        Outcome::Ended(MachineEvent::VcpuFailed {
            vcpu: self.index,
            fault,
        })
    }
}

impl Drop for VcpuThread {
    /// Before the run page is unmapped with `vcpu`, its address is forgotten.
    fn drop(&mut self) {
        self.control.forget(self.index);
    }
}
