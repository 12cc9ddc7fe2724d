//! What programs need of an event, from what the manager knows. Called on the manager thread.

use bulkhead_proto::machine::device_crashed::Why;
use bulkhead_proto::machine::event::What;
use bulkhead_proto::machine::machine_stopped::Cause;
use bulkhead_proto::machine::{
    DeviceCrashed, DeviceExited, DeviceQuarantined, DeviceReady, DeviceRestarted, DeviceSpawned,
    DeviceUpdated, MachineReset, MachineStopped, machine_reset,
};

use super::reset;
use super::stop::StopReason;
use super::supervise::CrashReason;
use crate::launcher::{ExitOutcome, printable};

/// Longest text of a device's in an event, characters.
const MAX_TEXT: usize = 256;

fn text(what: &str) -> String {
    printable(what).chars().take(MAX_TEXT).collect()
}

/// A process has been started.
pub fn spawned(pid: i32, incarnation: u64) -> What {
    let mut event = DeviceSpawned::new();
    (event.pid, event.incarnation) = (pid, incarnation);
    What::Spawned(event)
}

/// A device's first process can serve.
pub fn ready(pid: i32, incarnation: u64, ready_us: u64) -> What {
    let mut event = DeviceReady::new();
    (event.pid, event.incarnation, event.ready_us) = (pid, incarnation, ready_us);
    What::Ready(event)
}

/// A process of another binary serves.
pub fn updated(pid: i32, incarnation: u64, stall_us: u64, version: &str, queues: u16) -> What {
    let mut event = DeviceUpdated::new();
    (event.pid, event.incarnation) = (pid, incarnation);
    (event.stall_us, event.queues) = (stall_us, queues.into());
    event.version = text(version);
    What::Updated(event)
}

/// A process has ended.
pub fn exited(incarnation: u64, outcome: &ExitOutcome) -> What {
    let mut event = DeviceExited::new();
    event.incarnation = incarnation;
    match outcome {
        ExitOutcome::Status(status) => event.status = *status,
        ExitOutcome::Signal(signal) => event.signal = *signal,
        ExitOutcome::Violation(call) => {
            event.signal = libc::SIGSYS;
            event.violation = text(&call.name());
        }
    }
    What::Exited(event)
}

/// A process must be replaced.
pub fn crashed(incarnation: u64, reason: &CrashReason) -> What {
    let mut event = DeviceCrashed::new();
    event.incarnation = incarnation;
    let why = match reason {
        CrashReason::Exit(status) => {
            event.status = *status;
            Why::EXIT
        }
        CrashReason::Signal(signal) => {
            event.signal = *signal;
            Why::SIGNAL
        }
        CrashReason::Violation(call) => {
            event.what = text(call);
            Why::SECCOMP
        }
        CrashReason::Protocol(what) => {
            event.what = text(what);
            Why::PROTOCOL
        }
        CrashReason::Deadline(what) => {
            event.what = text(what);
            Why::DEADLINE
        }
        CrashReason::Hung { queue } => {
            event.queue = u32::from(*queue);
            Why::HUNG
        }
        CrashReason::Start(what) => {
            event.what = text(what);
            Why::START
        }
    };
    event.why = why.into();
    What::Crashed(event)
}

/// Another process serves.
pub fn restarted(
    (pid, incarnation): (i32, u64),
    stall_us: u64,
    (queues, resubmitted): (u16, u64),
    restarts: u64,
) -> What {
    let mut event = DeviceRestarted::new();
    (event.pid, event.incarnation) = (pid, incarnation);
    (event.stall_us, event.restarts) = (stall_us, restarts);
    (event.queues, event.resubmitted) = (queues.into(), resubmitted);
    What::Restarted(event)
}

/// A device is left without a process.
pub fn quarantined(why: &str, restarts: u64) -> What {
    let mut event = DeviceQuarantined::new();
    (event.why, event.restarts) = (text(why), restarts);
    What::Quarantined(event)
}

/// The machine has been reset.
pub fn reset(cause: reset::Cause, count: u64) -> What {
    let mut event = MachineReset::new();
    event.count = count;
    event.cause = match cause {
        reset::Cause::Client => machine_reset::Cause::CLIENT,
        reset::Cause::Guest => machine_reset::Cause::GUEST,
        reset::Cause::TripleFault => machine_reset::Cause::TRIPLE_FAULT,
        reset::Cause::Reboot { .. } => machine_reset::Cause::REBOOT,
    }
    .into();
    What::Reset(event)
}

/// The machine has ended.
pub fn stopped(reason: &StopReason) -> What {
    let mut event = MachineStopped::new();
    event.exit_code = reason.exit_code().into();
    event.cause = match reason {
        StopReason::PowerOff => Cause::POWER_OFF,
        StopReason::Reset => Cause::GUEST_RESET,
        StopReason::TripleFault => Cause::TRIPLE_FAULT,
        StopReason::Forced => Cause::FORCED,
        StopReason::LauncherDied(_) => Cause::LAUNCHER_DIED,
        StopReason::Signal(_) => Cause::SIGNAL,
        StopReason::HostError(_) => Cause::HOST_ERROR,
    }
    .into();
    What::Stopped(event)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_is_told_by_class_and_number() {
        let of = |reason: CrashReason| match crashed(7, &reason) {
            What::Crashed(event) => event,
            _ => panic!("no crash"),
        };
        let exit = of(CrashReason::Exit(3));
        assert_eq!((exit.why, exit.status), (Why::EXIT.into(), 3));
        assert_eq!(exit.incarnation, 7);
        let hung = of(CrashReason::Hung { queue: 2 });
        assert_eq!((hung.why, hung.queue), (Why::HUNG.into(), 2));
        let long = of(CrashReason::Protocol("\u{1b}".repeat(1000)));
        assert_eq!(long.why, Why::PROTOCOL.into());
        assert!(long.what.chars().count() <= MAX_TEXT && !long.what.contains('\u{1b}'));
    }
}
