//! Devices as the manager sees them while the machine runs: events of their channels, what
//! clients ask of them, a look at their health once a second, and their end.

use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use bulkhead_proto::machine::event::What;
use bulkhead_proto::machine::{DeviceIoError, net_config};
use vmm_sys_util::epoll::{ControlOperation, EpollEvent, EventSet};

use requests::net_detail;

use super::{Host, RING_ERROR_INTERVAL, Source, supervision};
use crate::api::EventLog;
use crate::launcher::Launcher;
use crate::machine::console;
use crate::machine::control::{Breach, ControlChannel, Grower, Notice, Turn};
use crate::machine::device::{Device, Special};
use crate::machine::state::MachineState;
use crate::machine::supervise::CrashReason;
use crate::machine::told;
use crate::machine::trial::Ended;
use crate::virtio::{EventSource, FailReason, Outcome, Reconnected};

/// How often devices of a running machine are asked for their health.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// Most alarms about malformed rings in a window: a guest can cause some by its resets.
const MOST_ALARMS: u32 = 5000;
const ALARM_WINDOW: Duration = Duration::from_secs(1);
/// A manager that woke so much later than it wanted was itself held up (the host suspended
/// it, a debugger stopped it): devices get the time back.
const HELD_UP: Duration = Duration::from_millis(500);

impl Grower for Launcher {
    fn begin_grow(&self, device: &str, index: u32, size: u64) -> Result<u64, String> {
        Launcher::begin_grow(self, device, index, size).map_err(|e| e.to_string())
    }
}

impl Host {
    pub(super) fn device(&mut self, index: usize) -> Option<&mut Device> {
        self.machine.as_mut()?.parts.devices.get_mut(index)
    }

    pub(super) fn devices_count(&self) -> usize {
        self.machine.as_ref().map_or(0, |m| m.parts.devices.slots())
    }

    /// Watches a device's channels.
    pub(super) fn watch_device(&mut self, index: usize) -> Result<(), String> {
        let Some(device) = self
            .machine
            .as_mut()
            .and_then(|m| m.parts.devices.get_mut(index))
        else {
            return Ok(());
        };
        let index = u16::try_from(index).map_err(|_| "too many devices")?;
        let mut wanted = Vec::new();
        for poll in device.function.poll_fds() {
            let source = poll.source;
            let events = EventSet::from_bits_truncate(poll.events);
            wanted.push((
                poll.fd.as_raw_fd(),
                Source::Device { index, source },
                events,
            ));
        }
        if let Some(process) = &mut device.process {
            process.interest = interest(&process.control);
            let fd = process.control.as_fd().as_raw_fd();
            wanted.push((fd, Source::Control { index }, process.interest));
            if let Some(fence) = &process.fence {
                // Only its end is of interest, which is always told.
                let fd = fence.as_raw_fd();
                wanted.push((fd, Source::Fence { index }, EventSet::empty()));
            }
        }
        if let Special::Memory(memory) = &device.special {
            // Shared with the process, so never read: each ring is an edge.
            let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
            wanted.push((memory.bell.as_raw_fd(), Source::Bell { index }, events));
        }
        for (fd, source, events) in wanted {
            self.watch(fd, source, events)?;
        }
        self.watch_listener(usize::from(index))
    }

    /// Stops watching a device's channels; those that have left already do not matter.
    fn unwatch_device(&mut self, index: usize) {
        let Some(device) = self
            .machine
            .as_ref()
            .and_then(|m| m.parts.devices.get(index))
        else {
            return;
        };
        for poll in device.function.poll_fds() {
            let gone = EpollEvent::default();
            let fd = poll.fd.as_raw_fd();
            let _ = self.epoll.ctl(ControlOperation::Delete, fd, gone);
        }
    }

    /// An event of a device's vhost-user channel or rings.
    pub(super) fn on_device(&mut self, index: u16, source: EventSource) {
        let index = usize::from(index);
        let Some(device) = self.device(index) else {
            return;
        };
        match device.function.on_event(source) {
            Outcome::Handled => {
                if let EventSource::RingError(queue) = source {
                    self.on_ring_error(index, queue);
                }
            }
            Outcome::Failed(why) | Outcome::Suspended(why) if self.is_supervised(index) => {
                self.on_function_lost(index, &why);
            }
            Outcome::Failed(why) => self.give_up_device(index, why),
            Outcome::Suspended(why) => self.on_suspended(index, &why),
            Outcome::Reconnected(done) => self.on_reconnected(index, &done),
            Outcome::NotReconnected(error) if self.is_supervised(index) => {
                self.on_not_taken_over(index, &error);
            }
            Outcome::NotReconnected(error) => self.foreign_failed(index, &error),
        }
    }

    /// A device's back-end is gone and another one is expected.
    fn on_suspended(&mut self, index: usize, why: &FailReason) {
        let Some(device) = self.device(index) else {
            return;
        };
        let fds: Vec<_> = device.function.link_fds();
        for poll in fds {
            let gone = EpollEvent::default();
            let _ = self
                .epoll
                .ctl(ControlOperation::Delete, poll.fd.as_raw_fd(), gone);
        }
        let lost = self.foreign_lost(index, why);
        let (kind, news) = lost.unwrap_or(("device.lost", true));
        self.tell_logged(index, kind, &why.to_string(), None, news);
    }

    /// Another back-end serves a device.
    fn on_reconnected(&mut self, index: usize, done: &Reconnected) {
        let Some(device) = self.device(index) else {
            return;
        };
        let number = u16::try_from(index).unwrap_or(u16::MAX);
        for poll in device.function.link_fds() {
            let source = Source::Device {
                index: number,
                source: poll.source,
            };
            let events = EventSet::from_bits_truncate(poll.events);
            if let Err(why) = self.watch(poll.fd.as_raw_fd(), source, events) {
                log::warn!("{why}");
            }
        }
        if self.is_supervised(index) {
            return self.on_taken_over(index, done);
        }
        let queues = done.queues;
        let reset = if done.needs_reset {
            "; it waits for a reset by the guest"
        } else {
            ""
        };
        let came = self.foreign_came(index);
        let (by, news) = came.unwrap_or_else(|| ("another back-end".to_owned(), true));
        let detail = match queues {
            // The driver is yet to come.
            0 => format!("{by} is there{reset}"),
            _ => format!("{by} serves {queues} queues{reset}"),
        };
        self.tell_logged(index, "device.reconnected", &detail, None, news);
    }

    fn on_ring_error(&mut self, index: usize, queue: u16) {
        let now = Instant::now();
        let Some(device) = self.device(index) else {
            return;
        };
        let (since, alarms) = &mut device.ring_alarms;
        if since.is_none_or(|since| now.saturating_duration_since(since) >= ALARM_WINDOW) {
            (*since, *alarms) = (Some(now), 0);
        }
        *alarms = alarms.saturating_add(1);
        if *alarms > MOST_ALARMS {
            // A ring is stopped when it is found malformed: an honest process says so once.
            *alarms = 0;
            let what = "a flood of alarms about its rings".to_owned();
            if self.is_supervised(index) {
                return self.lose_process(index, Some(CrashReason::Protocol(what)));
            }
            return self.give_up_device(index, FailReason::Stopped(what));
        }
        let (last, quiet) = &mut device.ring_errors;
        if last.is_some_and(|at| at.elapsed() < RING_ERROR_INTERVAL) {
            *quiet = quiet.saturating_add(1);
            return;
        }
        *last = Some(Instant::now());
        let more = match std::mem::take(quiet) {
            0 => String::new(),
            n => format!(" ({n} more were not reported)"),
        };
        let detail = format!("queue {queue} is malformed; it waits for a reset by the guest{more}");
        self.tell(index, "device.ring-error", &detail);
    }

    /// Publishes an event of a device that its operator should know of.
    pub(super) fn tell(&mut self, index: usize, kind: &str, detail: &str) {
        self.tell_typed(index, kind, detail, None);
    }

    /// The same with what programs need of it.
    pub(super) fn tell_typed(
        &mut self,
        index: usize,
        kind: &str,
        detail: &str,
        what: Option<What>,
    ) {
        self.tell_logged(index, kind, detail, what, true);
    }

    /// The same, and whether it is a line of the log, too.
    fn tell_logged(
        &mut self,
        index: usize,
        kind: &str,
        detail: &str,
        what: Option<What>,
        logged: bool,
    ) {
        let Some(device) = self
            .machine
            .as_ref()
            .and_then(|m| m.parts.devices.get(index))
        else {
            return;
        };
        self.log.publish_typed(kind, &device.id, detail, what);
        if logged {
            let what = kind.strip_prefix("device.").unwrap_or(kind);
            log::warn!("device {}: {what}: {detail}", device.id);
        }
    }

    /// A back-end of somebody else's is given up for good.
    fn give_up_device(&mut self, index: usize, why: FailReason) {
        let Some(device) = self.device(index) else {
            return;
        };
        device.function.fail(why.clone());
        let why = why.to_string();
        let first = device.failed.is_none();
        if first {
            device.failed = Some(why.clone());
        }
        self.unwatch_device(index);
        if first {
            self.tell(index, "device.failed", &why);
        }
    }

    /// A device's process has ended.
    pub(super) fn on_exited(&mut self, id: &str, ended: Ended) {
        let Ended {
            incarnation,
            ref outcome,
            ref last_line,
        } = ended;
        self.remnants.note_end(id, incarnation);
        if self.machine.is_none() {
            return self.tell_exited(id, &ended);
        }
        if self.hotplug_exited(id, &ended)
            || self.foreign_exited(id, incarnation, outcome, last_line)
        {
            return;
        }
        if self.is_replaced(id, incarnation) {
            return self.tell_exited(id, &ended);
        }
        self.on_process_exited(id, ended);
    }

    /// Tells that a process of a device has ended, and that it had begun, if it was of a device
    /// that did not come to be.
    pub(super) fn tell_exited(&self, id: &str, ended: &Ended) {
        if let Some(pid) = self.launcher.take_untold(id, ended.incarnation) {
            tell_spawned(&self.log, id, (pid, ended.incarnation));
        }
        let detail = ended.outcome.with_last_line("", &ended.last_line);
        let what = told::exited(ended.incarnation, &ended.outcome);
        self.log
            .publish_typed("device.exited", id, &detail, Some(what));
    }

    /// Something with a device's control channel, and what comes of it.
    pub(super) fn with_control<T>(
        &mut self,
        index: usize,
        step: impl FnOnce(&mut ControlChannel, &mut Turn<'_>) -> Result<T, Breach>,
    ) -> Option<T> {
        let mut notices = Vec::new();
        let Self {
            machine, launcher, ..
        } = self;
        let devices = &mut machine.as_mut()?.parts.devices;
        let process = devices.get_mut(index)?.process.as_mut()?;
        let mut turn = Turn {
            grower: &**launcher,
            now: Instant::now(),
            notices: &mut notices,
        };
        let result = step(&mut process.control, &mut turn);
        for notice in notices {
            self.on_notice(index, notice);
        }
        match result {
            Ok(value) => {
                self.update_interest(index);
                Some(value)
            }
            Err(breach) => {
                self.lose_process(index, supervision::reason(&breach));
                None
            }
        }
    }

    /// Tells epoll whether a control channel waits for room.
    fn update_interest(&mut self, index: usize) {
        let Ok(number) = u16::try_from(index) else {
            return;
        };
        let token = Source::Control { index: number }.token();
        let Self { machine, epoll, .. } = self;
        let devices = machine.as_mut().map(|m| &mut m.parts.devices);
        let Some(process) = devices
            .and_then(|d| d.get_mut(index))
            .and_then(|d| d.process.as_mut())
        else {
            return;
        };
        let wanted = interest(&process.control);
        // Nothing is of interest once it is given up and no longer watched.
        let watched = process.interest != EventSet::empty();
        if watched && wanted != process.interest && !process.control.has_ended() {
            let fd = process.control.as_fd().as_raw_fd();
            let event = EpollEvent::new(wanted, token);
            match epoll.ctl(ControlOperation::Modify, fd, event) {
                Ok(()) => process.interest = wanted,
                // Its deadline will tell.
                Err(error) => log::warn!("epoll: {error}"),
            }
        }
    }

    /// A device's control channel is ready. True: it was nothing but its heartbeat.
    pub(super) fn on_control(&mut self, index: u16) -> bool {
        let index = usize::from(index);
        if self.process(index).is_some_and(|p| p.newcomer.is_some()) {
            self.on_newcomer(index);
            return false;
        }
        self.with_control(index, |control, turn| {
            control.on_writable(turn.now)?;
            control.on_readable(turn)
        })
        .unwrap_or(false)
    }

    /// The launcher's answer to a growth: whose it is, the ticket says.
    pub(super) fn on_grown(&mut self, ticket: u64, result: &Result<u64, String>) {
        for index in 0..self.devices_count() {
            self.with_control(index, |control, turn| {
                control.on_grown(ticket, result.clone(), turn)
            });
        }
    }

    fn on_notice(&mut self, index: usize, notice: Notice) {
        let Some(machine) = &mut self.machine else {
            return;
        };
        let Some(device) = machine.parts.devices.get_mut(index) else {
            return;
        };
        let id = device.id.clone();
        let (kind, detail) = match notice {
            Notice::Asks => return self.ask_memory(index),
            Notice::Wants { id, request } => return self.on_memory_wish(index, id, &request),
            Notice::Replace { binary } => return self.begin_trial(index, &binary),
            Notice::Quiet => return self.on_quiet(index),
            Notice::NotQuiet(why) => return self.end_trial(index, &why),
            Notice::Health { excused } => return self.look_for_hangs(index, &excused),
            Notice::HostErrors {
                count,
                errno,
                sector,
            } => {
                let place = match device.special {
                    Special::Disk(_) => format!(" at sector {sector}"),
                    _ => String::new(),
                };
                let detail = format!(
                    "the host failed {count} requests, the last{place}: {}",
                    errno_text(errno)
                );
                let mut what = DeviceIoError::new();
                (what.count, what.errno, what.sector) = (count, errno, sector);
                let what = What::IoError(what);
                return self.tell_typed(index, "device.io-error", &detail, Some(what));
            }
            Notice::HostGone => {
                let about = device.process.as_ref().map(|p| p.control.about());
                let tap = about.map(|a| crate::launcher::printable(&a.tap));
                let tap = tap.unwrap_or_default();
                let net = machine.config.nets.iter().find(|net| net.id == id);
                // A descriptor that was handed in is of the tap that was.
                let by = match net.and_then(|net| net.backend.as_ref()) {
                    Some(net_config::Backend::Tap(tap)) if !tap.fds.is_empty() => " by its name",
                    _ => "",
                };
                let detail = format!(
                    "tap {tap} was deleted on the host, and its link is down: make the tap again, then remove-device and add-net{by} bring it back"
                );
                return self.tell(index, "device.disconnected", &detail);
            }
            Notice::DiskUpdated { update, size } => {
                if let Special::Disk(disk) = &mut device.special {
                    disk.size = size;
                }
                let mut done = Vec::new();
                if update.size_bytes != 0 {
                    done.push(format!("grown to {size} bytes"));
                }
                if update.pulled {
                    done.push("fails every request: it is pulled out".to_owned());
                }
                if let Some(process) = &mut device.process {
                    process.changes.disk(&update);
                }
                if let Some(limits) = update.limits.into_option() {
                    done.push("new limits".to_owned());
                    let config = machine.config.disks.iter_mut().find(|d| d.id == id);
                    if let Some(config) = config {
                        config.limits = Some(limits).into();
                    }
                }
                ("device.changed", done.join(", "))
            }
            Notice::NetUpdated(update) => {
                let detail = net_detail(&update);
                if let Some(process) = &mut device.process {
                    process.changes.net(&update);
                }
                let config = machine.config.nets.iter_mut().find(|n| n.id == id);
                if let Some(config) = config {
                    if update.to_guest.is_some() {
                        config.to_guest = update.to_guest;
                    }
                    if update.from_guest.is_some() {
                        config.from_guest = update.from_guest;
                    }
                }
                ("device.changed", detail)
            }
            Notice::ConsoleUpdated(update) => {
                if let Some(process) = &mut device.process {
                    process.changes.console(&update);
                }
                let config = machine.config.consoles.iter_mut().find(|c| c.id == id);
                if let Some(config) = config {
                    console::resized(config, &update);
                }
                ("device.changed", "new size".to_owned())
            }
            Notice::Drained => {
                device.drained = true;
                ("device.drained", String::new())
            }
            Notice::Resumed => {
                device.drained = false;
                ("device.resumed", String::new())
            }
            Notice::DrainFailed => {
                device.drained = false;
                let detail = "it did not drain in time and takes requests again";
                return self.tell(index, "device.resumed", detail);
            }
        };
        self.log.publish(kind, &id, &detail);
    }

    /// When a device or the heartbeat is next due.
    pub(super) fn device_timer(&self) -> Option<Instant> {
        let machine = self.machine.as_ref()?;
        let devices = machine.parts.devices.iter();
        devices
            .filter_map(|d| d.process.as_ref()?.control.next_timer())
            .chain(self.heartbeat)
            .chain(self.life_timer())
            .min()
    }

    /// Looks at the devices' deadlines, and once a second at their health. True: nothing but
    /// the heartbeat was due.
    pub(super) fn on_device_timers(&mut self, now: Instant) -> bool {
        let mut only_heartbeat = true;
        for index in 0..self.devices_count() {
            let due = self.device(index).and_then(|d| {
                let control = &d.process.as_ref()?.control;
                let due = control.next_timer().is_some_and(|at| at <= now);
                due.then(|| control.only_heartbeat())
            });
            if let Some(heartbeat) = due {
                only_heartbeat &= heartbeat;
                self.with_control(index, |control, turn| control.on_timer(turn));
            }
        }
        only_heartbeat &= self.on_life_timers(now);
        let watched = self.machine.as_ref().is_some_and(|machine| {
            let mut devices = machine.parts.devices.iter();
            let lives = |d: &Device| d.process.is_some() && d.failed.is_none();
            machine.state == MachineState::Running && (self.unseen.is_some() || devices.any(lives))
        });
        match self.heartbeat {
            _ if !watched => self.heartbeat = None,
            Some(at) if at > now => {}
            Some(_) => {
                self.heartbeat = now.checked_add(HEARTBEAT);
                self.check_boot();
                self.look_for_resets();
                self.settle_trials();
                for index in 0..self.devices_count() {
                    self.with_control(index, |control, _| control.ask_health());
                }
            }
            None => self.heartbeat = now.checked_add(HEARTBEAT),
        }
        only_heartbeat
    }

    /// Gives devices the time in which the manager itself did not run.
    pub(super) fn forgive(&mut self, late: Duration) {
        if late < HELD_UP {
            return;
        }
        self.forgive_newcomers(late);
        self.forgive_hotplug(late);
        self.forgive_trials(late);
        let Some(machine) = &mut self.machine else {
            return;
        };
        for device in machine.parts.devices.iter_mut() {
            if let Some(process) = &mut device.process {
                process.control.extend_deadlines(late);
            }
        }
    }
}

fn interest(control: &ControlChannel) -> EventSet {
    let mut interest = EventSet::IN;
    if control.wants_write() {
        interest |= EventSet::OUT;
    }
    interest
}

/// What the kernel calls an error.
fn errno_text(errno: i32) -> String {
    let text = std::io::Error::from_raw_os_error(errno).to_string();
    text.split(" (os error").next().unwrap_or(&text).to_owned()
}

mod requests;

/// Tells that a device's process was started.
pub(super) fn tell_spawned(log: &EventLog, id: &str, (pid, incarnation): (i32, u64)) {
    let what = told::spawned(pid, incarnation);
    log.publish_typed("device.spawned", id, "", Some(what));
}
