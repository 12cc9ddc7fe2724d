//! The part of a reset of the machine that may wait for device processes and files: on a thread of
//! its own, so that the manager need not. vCPUs are parked meanwhile.
//!
//! ```text
//!   go ──▶ the files to boot looked at ──▶ Checked
//!   go ──▶ every function and port reset, its process holds no ring ──▶ Stopped
//!   go ──▶ interrupt controllers, memory cleared, kernel loaded ──▶ Loaded
//! ```
//!
//! Up to `Checked` nothing has changed: the guest can go on. Between the other two the manager waits
//! until nothing of any process can still write to memory.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use super::boot_files::BootFiles;
use super::hotplug::{News, Post};
use crate::arch::x86_64::boot::BootEntry;
use crate::kvm::KvmVm;
use crate::memory::GuestRam;
use crate::pci::RootComplex;
use crate::threads::{self, ThreadHook};

/// What asked for a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// A client's Reset.
    Client,
    /// The guest.
    Guest,
    /// A vCPU triple-faulted.
    TripleFault,
    /// A client's Reboot.
    Reboot {
        /// The guest did not switch itself off.
        forced: bool,
    },
}

impl std::fmt::Display for Cause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Client => "a client asked for it",
            Self::Guest => "the guest asked for it",
            Self::TripleFault => "the guest triple-faulted",
            Self::Reboot { forced: false } => "a reboot: the guest has switched itself off",
            Self::Reboot { forced: true } => {
                "a reboot: the guest did not switch itself off in time"
            }
        })
    }
}

/// How far a reset is.
pub enum Progress {
    /// There is something to boot; or there is not, and why.
    Checked(Result<(), String>),
    /// No process holds a ring.
    Stopped,
    /// The next guest's first instruction is where this says; or the machine cannot go on.
    Loaded(Result<BootEntry, String>),
}

/// What is reset.
pub struct Job {
    /// What to boot.
    pub boot: Arc<BootFiles>,
    /// Guest memory.
    pub ram: GuestRam,
    /// PCIe, with every function.
    pub pci: Arc<RootComplex>,
    /// The interrupt controllers.
    pub kvm: Arc<KvmVm>,
    /// What was booted last: about the same memory is used again.
    pub last: Arc<BootEntry>,
    /// vCPUs, and how many there may be.
    pub cpus: (u32, u32),
}

/// Starts the thread, which waits for a go before each of its steps, and ends without one.
///
/// # Errors
/// When there is none to be had.
pub fn start(job: Job, post: Post, hook: ThreadHook) -> io::Result<Sender<()>> {
    let (go, goes) = channel();
    let body = move || run(&job, &post, &goes);
    threads::spawn("reset".to_owned(), hook, || Ok(()), body)?;
    Ok(go)
}

fn run(job: &Job, post: &Post, goes: &Receiver<()>) {
    if goes.recv().is_err() {
        return;
    }
    let checked = job.boot.check(&job.ram);
    let usable = checked.is_ok();
    post.send(News::Reset(Progress::Checked(checked)));
    if !usable || goes.recv().is_err() {
        return;
    }
    job.pci.reset();
    post.send(News::Reset(Progress::Stopped));
    if goes.recv().is_ok() {
        post.send(News::Reset(Progress::Loaded(job.load())));
    }
}

impl Job {
    fn load(&self) -> Result<BootEntry, String> {
        self.kvm.reset_chips().map_err(|e| e.to_string())?;
        self.ram
            .clear(self.last.touched())
            .map_err(|e| format!("guest memory cannot be cleared: {e}: free some of the host's"))?;
        self.boot.load_again(&self.ram, &self.pci, self.cpus)
    }
}
