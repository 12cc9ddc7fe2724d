//! The signal that takes a vCPU thread out of KVM_RUN, and the thread's placement.
#![allow(unsafe_code)] // sigaction, pthread_kill and sched_setaffinity have no safe wrapper.

use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::sync::OnceLock;
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::unblock_signal;

use crate::kvm::ImmediateExit;

/// The byte that makes a KVM_RUN of `vcpu` return, for `Control`.
pub(super) fn immediate_exit_of(vcpu: &mut VcpuFd) -> ImmediateExit {
    // SAFETY: `Control` uses it only while the vCPU's thread is in phase Running, and the
    // owner of the vCPU, `VcpuThread`, makes `Control` forget it before dropping the vCPU.
    unsafe { ImmediateExit::of(vcpu) }
}

/// The first real-time signal that glibc leaves free.
fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

extern "C" fn on_kick(_: libc::c_int) {}

/// Installs the handler, which does nothing: it is the interruption that counts. With
/// SA_RESTART, so that a kick never shortens a device's system call on a vCPU thread;
/// KVM_RUN returns EINTR all the same.
pub(super) fn install_kick_handler() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| {
            // SAFETY: sigaction is plain data, for which all zeroes is a value.
            let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
            action.sa_sigaction = on_kick as extern "C" fn(libc::c_int) as usize;
            action.sa_flags = libc::SA_RESTART;
            // SAFETY: the handler touches nothing, so it is async-signal-safe; the old action
            // is not asked for.
            let done = unsafe { libc::sigaction(kick_signal(), &action, std::ptr::null_mut()) };
            match done {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()
                    .raw_os_error()
                    .unwrap_or(libc::EINVAL)),
            }
        })
        .map_err(io::Error::from_raw_os_error)
}

/// Lets this thread be kicked.
pub(super) fn accept_kicks() -> io::Result<()> {
    unblock_signal(kick_signal()).map_err(|error| io::Error::other(error.to_string()))
}

/// Interrupts `thread`.
pub(super) fn kick(thread: &JoinHandle<()>) {
    // SAFETY: the handle has not been joined, so the pthread_t is valid; glibc answers ESRCH
    // for a thread that has ended.
    unsafe {
        libc::pthread_kill(thread.as_pthread_t(), kick_signal());
    }
}

/// CPU time of `thread` so far; `None` when it has ended.
pub(super) fn runtime(thread: &JoinHandle<()>) -> Option<Duration> {
    let mut clock: libc::clockid_t = 0;
    // SAFETY: the handle has not been joined, so the pthread_t is valid; glibc answers ESRCH
    // for a thread that has ended. `clock` is live and writable.
    if unsafe { libc::pthread_getcpuclockid(thread.as_pthread_t(), &raw mut clock) } != 0 {
        return None;
    }
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is live and writable; a clock of a thread that has ended is an error.
    if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return None;
    }
    let seconds = u64::try_from(time.tv_sec).ok()?;
    Some(Duration::new(seconds, u32::try_from(time.tv_nsec).ok()?))
}

/// Pins the calling thread to one host CPU.
pub(super) fn pin_to(cpu: usize) -> io::Result<()> {
    // SAFETY: cpu_set_t is plain data, for which all zeroes is the empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    if cpu >= libc::CPU_SETSIZE as usize {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: `cpu` is below CPU_SETSIZE.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: pid 0 is this thread; the pointer and the size are those of `set`.
    match unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
