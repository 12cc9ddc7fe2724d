//! The life of a device process: confine, make the workers, seal, serve, drain, end.
//!
//! [`serve`] runs on the main thread and returns when the process should exit.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bulkhead_proto::common::ProcessLimits;
use bulkhead_seccomp::confine::{ConfineError, Confinement};
use bulkhead_seccomp::notify;
use bulkhead_seccomp::policy::Policy;
use bulkhead_seccomp::privileges::Rlimits;
use bulkhead_seccomp::uring::UringError;

use crate::backend::{Backend, Meanwhile};
use crate::channels::Channels;
use crate::clock;
use crate::control::{ConfinementReport, Control};
use crate::device::{Device, Preparation, Prepared};
use crate::inflight::{Capacity, InflightFile};
use crate::link::{Link, LinkError};
use crate::mailbox::{WorkerHandle, fenced_mailbox};
use crate::sys::{self, PollFd};
use crate::waiter;

/// Stack of a worker thread: its frames are small and it never recurses.
const WORKER_STACK: usize = 128 * 1024;
/// Time for a worker to make its ring.
const PREPARE_DEADLINE: Duration = Duration::from_secs(10);

/// Why a device process ends with a failure.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The process could not give up what it must not have.
    #[error(transparent)]
    Confine(#[from] ConfineError),
    /// A thread or eventfd could not be made.
    #[error("cannot start the worker of queue {queue}: {source}")]
    Worker {
        /// Its queue.
        queue: u16,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// No memory for the in-flight region.
    #[error("cannot make the in-flight region: {0}")]
    Inflight(std::io::Error),
    /// A worker's own preparations failed.
    #[error("queue {queue}: {why}")]
    Prepare {
        /// Its queue.
        queue: u16,
        /// What it said.
        why: String,
    },
    /// The VMM broke the vhost-user protocol, or its socket failed.
    #[error("vhost-user channel: {0}")]
    Channel(String),
    /// Requests wait for the host and did not end.
    #[error("requests still wait for the host; see the kernel's log for the disk's errors")]
    Stuck,
    /// The device refuses what it found after confinement.
    #[error("{0}")]
    Device(String),
    /// The main thread has no way to wait.
    #[error(transparent)]
    Uring(#[from] UringError),
    /// Waiting failed.
    #[error("poll: {0}")]
    Poll(#[from] std::io::Error),
}

/// How to serve.
pub struct ServeOptions {
    /// Where the front-end and the VMM are.
    pub channels: Channels,
    /// The system calls that stay allowed.
    pub policy: &'static Policy,
    /// Limits to set on this process.
    pub rlimits: Rlimits,
}

/// Serves `device` until its channels close, then returns; the process should exit then.
/// Nothing is read from any channel before the process is confined.
pub fn serve(device: Arc<dyn Device>, options: ServeOptions) -> Result<(), ServeError> {
    #[cfg(feature = "hostile")]
    crate::hostile::choose();
    // Before the limit on file sizes, which is the disk's and not this file's.
    let inflight = InflightFile::new(Capacity {
        queues: device.queues(),
        kept: device.kept_bytes(),
    })
    .map_err(ServeError::Inflight)?;
    let limits = told(&options.rlimits);
    let locked = Confinement::new(options.rlimits).lock_down()?;
    // Which has allowed a few arenas; here one must do, or threads would need mprotect.
    sys::one_arena();
    let (control, vhost, listener, fence) = match options.channels {
        Channels::Inherited {
            control,
            vhost,
            fence,
        } => (Some(control), Some(vhost), None, fence),
        Channels::Listener(listener) => (None, None, Some(listener), None),
    };
    let workers = start_workers(&device, fence.as_ref())?;
    // From here on only the workers hold it, or their rings.
    drop(fence);
    clock::start();
    if !allows(options.policy, "ppoll") {
        waiter::install()?;
    }
    sys::forget_start();
    let landlock_abi = locked.landlock().abi;
    let confined = if notify::is_watched() {
        locked.seal_watched(options.policy)?
    } else {
        locked.seal(options.policy)?
    };
    log::debug!("{}", confined.report());
    device.confined().map_err(ServeError::Device)?;

    let report = ConfinementReport {
        landlock_abi,
        policy: options.policy.name.into(),
        limits,
    };
    let queues = workers.iter().map(WorkerHandle::signals).collect();
    let control = Control::new(control, Arc::clone(&device), queues, report);
    let backend = Backend::new(device, workers, control, inflight);
    let backend = Arc::new(Mutex::new(backend));
    let link = vhost.map(|socket| Link::new(socket, Arc::clone(&backend)));
    let ended = run(&backend, link, listener.as_ref());
    let mut backend = backend.lock().unwrap_or_else(PoisonError::into_inner);
    match ended {
        Ok(()) if backend.disconnect() => Ok(()),
        Ok(()) => Err(ServeError::Stuck),
        Err(e) => Err(e),
    }
}

/// Its limits, as it says them of itself.
fn told(rlimits: &Rlimits) -> ProcessLimits {
    let all = rlimits.each();
    let of = |number| all.iter().find(|(_, of, _)| *of == number)?.2;
    let mut limits = ProcessLimits::new();
    limits.descriptors = of(libc::RLIMIT_NOFILE);
    limits.file_bytes = of(libc::RLIMIT_FSIZE);
    limits.threads = of(libc::RLIMIT_NPROC);
    limits
}

/// Whether a policy lets a call through.
fn allows(policy: &Policy, call: &str) -> bool {
    let mut rules = policy.rules.iter();
    rules.any(|rule| rule.syscall == call && rule.errno.is_none())
}

fn start_workers(
    device: &Arc<dyn Device>,
    fence: Option<&OwnedFd>,
) -> Result<Vec<WorkerHandle>, ServeError> {
    let mut handles = Vec::new();
    let mut prepared = Vec::new();
    let queues = device.queues();
    let mut next = 0;
    while next < queues {
        let queue = next;
        next = queue
            .saturating_add(device.sharing(queue).max(1))
            .min(queues);
        let fail = |source| ServeError::Worker { queue, source };
        let mut ports = Vec::new();
        for index in queue..next {
            let copy = fence.map(OwnedFd::try_clone).transpose().map_err(fail)?;
            let (handle, port) = fenced_mailbox(index, copy).map_err(fail)?;
            handles.push(handle);
            ports.push(port);
        }
        let worker = match (ports.pop(), ports.is_empty()) {
            (Some(port), true) => device.worker(port),
            (Some(port), false) => {
                ports.push(port);
                device.shared_worker(ports)
            }
            (None, _) => break,
        }
        .map_err(fail)?;
        let preparation = Arc::new(Preparation::default());
        let theirs = Prepared(Arc::clone(&preparation));
        std::thread::Builder::new()
            .name(format!("queue-{queue}"))
            .stack_size(WORKER_STACK)
            .spawn(move || worker(theirs))
            .map_err(fail)?;
        prepared.push((queue, preparation));
    }
    for (queue, preparation) in prepared {
        let word = preparation.wait(PREPARE_DEADLINE);
        word.map_err(|why| ServeError::Prepare { queue, why })?;
    }
    Ok(handles)
}

type Shared = Arc<Mutex<Backend<Control>>>;

fn run(
    backend: &Shared,
    mut link: Option<Link<Backend<Control>>>,
    listener: Option<&UnixListener>,
) -> Result<(), ServeError> {
    let lock = || backend.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        let (channel, timeout) = match (&link, listener) {
            (Some(link), _) => (link.poll_fd(), link.timeout_ms()),
            (None, Some(listener)) => (PollFd::new(listener.as_fd(), libc::POLLIN), -1),
            // The VMM has closed the vhost-user channel.
            (None, None) => return Ok(()),
        };
        let mut fds = [lock().meanwhile().poll_fd(), channel];
        sys::poll(&mut fds, timeout)?;
        let [control, channel] = fds;

        if control.revents() != 0 {
            lock().serve_control();
        }
        if lock().meanwhile().wants_exit() {
            return Ok(());
        }
        if channel.revents() == 0 && timeout < 0 {
            continue;
        }
        let Some(open) = &mut link else {
            link = listener
                .and_then(accept)
                .map(|socket| Link::new(socket, Arc::clone(backend)));
            #[cfg(feature = "hostile")]
            lock().meanwhile().strike();
            continue;
        };
        // The handler locks the back-end itself.
        let Err(why) = open.serve() else {
            continue;
        };
        link = None;
        let mut backend = lock();
        let stopped = backend.disconnect();
        if backend.gave_up() || !stopped {
            return Err(ServeError::Stuck);
        }
        match (why, listener) {
            (LinkError::Closed, _) => log::debug!("vhost-user connection closed"),
            (why, Some(_)) => log::warn!("vhost-user connection dropped: {why}"),
            (why, None) => return Err(ServeError::Channel(why.to_string())),
        }
    }
}

fn accept(listener: &UnixListener) -> Option<std::os::unix::net::UnixStream> {
    match listener.accept() {
        Ok((socket, _)) => Some(socket),
        Err(e) => {
            // Gone again, or this process is short of descriptors: the next one may do.
            log::debug!("accept: {e}");
            None
        }
    }
}

#[cfg(test)]
#[path = "serve_tests.rs"]
mod tests;
