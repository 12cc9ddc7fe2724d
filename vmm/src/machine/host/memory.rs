//! Memory that comes and goes, on the manager thread.
//!
//! ```text
//!   ResizeMemory ──▶ the device process is told ──▶ the guest's configuration space changes
//!
//!   the guest's wish ──▶ bell ──▶ TakeRequest ──▶ judged by the books (`plugging`)
//!        ▲                                           │
//!        └── FinishRequest ◀── books, configuration ◀── KVM and every device (`plugger`)
//! ```
//!
//! Nothing here waits. One wish is carried out at a time; the process that handed it on may be
//! replaced meanwhile, and its successor is told what became of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_proto::RpcStatus;
use bulkhead_proto::device::MemRequest;
use bulkhead_proto::device::finish_request_request::Outcome;
use bulkhead_proto::machine::event::What;
use bulkhead_proto::machine::{MemoryInfo, ResizeMemoryResponse};

use super::Host;
use crate::api::{ApiResponse, ReplyHandle};
use crate::machine::control::Task;
use crate::machine::device::{Device, Special};
use crate::machine::hotplug::News;
use crate::machine::mem::{self, Busy, Memory};
use crate::machine::plugger::{Plugger, listener};
use crate::machine::plugging::{Job, Verdict};
use crate::machine::state::MachineState;
use crate::machine::supervise::CrashReason;

/// How long the device process has to take note of a new size.
const ASK_LIMIT: Duration = Duration::from_secs(30);
/// When a guest whose wish could not be granted is told to ask again: Linux by itself does so
/// after 50 s.
const REMIND: Duration = Duration::from_secs(2);

/// A change that the device process is being told of.
struct Asked {
    blocks: u64,
    timeout: Duration,
    reply: ReplyHandle,
}

/// A change that the guest has been asked for.
struct Pending {
    operation: u64,
    until: Instant,
    timeout: Duration,
}

/// What is under way.
#[derive(Default)]
pub(super) struct Progress {
    plugger: Option<Plugger>,
    asked: Option<Asked>,
    pending: Option<Pending>,
    /// What waits until no device is being made: one would not learn of the memory.
    held: Option<Job>,
    /// Why the guest was refused last.
    refused: Option<String>,
    /// When it is told to ask again.
    remind_at: Option<Instant>,
}

impl Progress {
    /// When the change is to be looked at.
    pub(super) fn timer(&self) -> Option<Instant> {
        let pending = self.pending.as_ref()?.until;
        Some(self.remind_at.map_or(pending, |at| at.min(pending)))
    }
}

fn refused(line: impl Into<String>) -> RpcStatus {
    RpcStatus::failed_precondition(line.into())
}

impl Host {
    /// Starts the thread that plugs, if the machine has a use for it.
    pub(super) fn start_plugger(&mut self) -> Result<(), String> {
        let Some(parts) = self.machine.as_ref().map(|m| &m.parts) else {
            return Ok(());
        };
        if let Some(area) = parts.ram.pluggable() {
            let (area, kvm) = (Arc::clone(area), Arc::clone(&parts.kvm));
            let hook = Arc::clone(&self.hooks.helper);
            let plugger = Plugger::start(area, kvm, self.hotplug.post(), hook);
            self.memory.plugger = Some(plugger.map_err(|e| format!("a thread for memory: {e}"))?);
        }
        Ok(())
    }

    /// The machine has memory that can be plugged.
    pub(super) fn has_memory(&self) -> bool {
        self.memory_place().is_some()
    }

    fn memory_place(&self) -> Option<(usize, &Device, &Memory)> {
        let mut devices = self.machine.as_ref()?.parts.devices.numbered();
        devices.find_map(|(index, device)| match &device.special {
            Special::Memory(memory) => Some((index, device, memory.as_ref())),
            _ => None,
        })
    }

    /// Changes what is known of the memory device.
    fn with_memory<T>(&mut self, change: impl FnOnce(&mut Memory) -> T) -> Option<(usize, T)> {
        let devices = &mut self.machine.as_mut()?.parts.devices;
        devices
            .numbered_mut()
            .find_map(|(index, device)| {
                let Special::Memory(memory) = &mut device.special else {
                    return None;
                };
                Some((index, memory))
            })
            .map(|(index, memory)| (index, change(memory)))
    }

    /// For the API.
    pub(super) fn memory_info(&self) -> Option<MemoryInfo> {
        self.memory_place()
            .map(|(_, _, memory)| memory.books.info())
    }

    /// Asks the guest to have so much memory.
    pub(super) fn resize_memory(&mut self, size: u64, timeout: Duration, reply: ReplyHandle) {
        let task = match self.check_size(size) {
            Ok(blocks) => {
                let limit = Instant::now() + ASK_LIMIT;
                let post = self.hotplug.post();
                let told = ReplyHandle::new(limit, move |outcome| {
                    post.send(News::MemoryAsked(outcome.map(|_| ())));
                });
                self.memory.asked = Some(Asked {
                    blocks,
                    timeout,
                    reply,
                });
                (blocks, told)
            }
            Err(status) => return reply.complete(Err(status)),
        };
        let (blocks, told) = task;
        self.tell_memory(blocks, false, told);
    }

    /// Tells the process what to ask the guest for.
    fn tell_memory(&mut self, blocks: u64, new: bool, told: ReplyHandle) {
        let update = self
            .memory_place()
            .map(|(_, _, memory)| memory.books.update(blocks, new));
        self.ask(mem::ID, told, |_| {
            Ok(Task::UpdateMemory(update.unwrap_or_default()))
        });
    }

    fn check_size(&self, size: u64) -> Result<u64, RpcStatus> {
        let Some(machine) = &self.machine else {
            return Err(refused("no machine yet: create one"));
        };
        let Some((_, _, memory)) = self.memory_place() else {
            return Err(refused(
                "no memory can be plugged into this machine: create it with --memory size=SIZE,max=SIZE",
            ));
        };
        if self.memory.asked.is_some() {
            return Err(refused(
                "another change of the memory is just being asked for: retry",
            ));
        }
        let blocks = memory.books.blocks_of(size);
        let blocks = blocks.map_err(|e| refused(e.to_string()))?;
        if blocks > memory.books.plugged() {
            let ram = &machine.parts.ram;
            let more = ram
                .pluggable()
                .map_or(0, |area| area.blocks_of_regions().count());
            let all = ram.regions().len().saturating_add(more) as u64;
            let mut devices = machine.parts.devices.iter();
            if let Some(device) = devices.find(|d| !d.function.takes_regions(all)) {
                return Err(refused(format!(
                    "device {}: its back-end cannot be told of more memory while it serves (vhost-user's CONFIGURE_MEM_SLOTS, {all} regions): remove it, or use one that can",
                    device.id
                )));
            }
        }
        Ok(blocks)
    }

    /// The process has taken note of a new size, or has not.
    pub(super) fn on_memory_asked(&mut self, told: Result<(), RpcStatus>) {
        let Some(Asked {
            blocks,
            timeout,
            reply,
        }) = self.memory.asked.take()
        else {
            return;
        };
        if let Err(status) = told {
            return reply.complete(Err(status));
        }
        self.with_memory(|memory| memory.books.set_requested(blocks));
        self.show_memory(true);
        let info = self.memory_info().unwrap_or_default();
        let operation = self.hotplug.next_operation();
        if let Some(before) = self.memory.pending.take() {
            self.ended(before.operation, mem::ID, Err("overtaken by another one"));
        }
        let wanted = info.requested_bytes >> 20;
        self.began(operation, mem::ID, &format!("{wanted} MiB of memory"));
        self.memory.refused = None;
        self.memory.pending = Some(Pending {
            operation,
            until: Instant::now() + timeout,
            timeout,
        });
        let mut response = ResizeMemoryResponse::new();
        response.operation = operation;
        response.memory = Some(info).into();
        reply.complete(Ok(ApiResponse::MemoryResized(Box::new(response))));
        self.look_for_the_end();
    }

    /// The configuration space follows the books, and so will the next process.
    fn show_memory(&mut self, notify: bool) {
        let Some((index, _)) = self.with_memory(|_| ()) else {
            return;
        };
        let Some(device) = self.device(index) else {
            return;
        };
        let Special::Memory(memory) = &device.special else {
            return;
        };
        device.function.set_config(memory.books.config(), notify);
        let update = memory.books.update(memory.books.requested(), true);
        if let Some(process) = &mut device.process {
            process.changes.memory(update);
        }
    }

    /// Another process serves the memory: it is told how that is by now, and asked what it wants.
    pub(super) fn renew_memory(&mut self, index: usize) {
        let Some((place, _, memory)) = self.memory_place() else {
            return;
        };
        if place != index {
            return;
        }
        let requested = memory.books.requested();
        let told = ReplyHandle::new(Instant::now() + ASK_LIMIT, |_| ());
        self.tell_memory(requested, true, told);
        self.ask_memory(index);
    }

    /// The memory device has rung its bell.
    pub(super) fn on_bell(&mut self, index: usize) {
        let now = Instant::now();
        let Some((_, fair)) = self.with_memory(|memory| memory.rang(now)) else {
            return;
        };
        if !fair {
            let what = "a flood of requests for memory".to_owned();
            return self.lose_process(index, Some(CrashReason::Protocol(what)));
        }
        self.ask_memory(index);
    }

    /// Asks it what it wants, unless something is being done already.
    pub(super) fn ask_memory(&mut self, index: usize) {
        let busy = self.with_memory(|memory| memory.busy.is_some());
        if busy == Some((index, false)) {
            self.with_control(index, |control, _| control.take_request());
        }
    }

    /// What the memory device wants.
    pub(super) fn on_memory_wish(&mut self, index: usize, id: u64, wish: &MemRequest) {
        let incarnation = self.process(index).map_or(0, |p| p.incarnation);
        let judged = self.with_memory(|memory| {
            let (process, last) = memory.answered;
            let old = process == incarnation && id <= last;
            // While something is done, it will be asked again.
            let judge = !old && memory.busy.is_none();
            judge.then(|| memory.books.judge(wish, incarnation))
        });
        let Some((place, judged)) = judged else {
            let what = "it wants memory and is another device".to_owned();
            return self.lose_process(index, Some(CrashReason::Protocol(what)));
        };
        if place != index {
            return;
        }
        match judged {
            None => {}
            Some(Verdict::Lie) => {
                let what = "it wants memory that there is not".to_owned();
                self.lose_process(index, Some(CrashReason::Protocol(what)));
            }
            Some(Verdict::Answer(outcome)) => self.finish_memory(index, id, outcome),
            Some(Verdict::Do(job)) => {
                let busy = Busy {
                    id,
                    incarnation,
                    wish: wish.clone(),
                };
                self.with_memory(|memory| memory.busy = Some(busy));
                self.begin_job(job);
            }
        }
    }

    /// Memory is about to come or go, or does.
    pub(super) fn is_plugging_memory(&self) -> bool {
        let place = self.memory_place();
        place.is_some_and(|(_, _, memory)| memory.busy.is_some())
    }

    /// No device is being made any more, perhaps.
    pub(super) fn begin_held_memory(&mut self) {
        if !self.hotplug.is_adding()
            && let Some(job) = self.memory.held.take()
        {
            self.begin_job(job);
        }
    }

    fn begin_job(&mut self, mut job: Job) {
        // A region that a back-end cannot let go of while it serves stays where it is, empty.
        let deaf = self.is_any_deaf();
        self.with_memory(|memory| {
            let kept = &mut memory.kept;
            kept.retain(|number| !job.add.contains(number));
            if deaf {
                kept.append(&mut job.remove);
            } else if job.add.is_empty() {
                // What could not go before does now.
                job.remove.append(kept);
            }
        });
        if job == Job::default() {
            return self.on_plugged(Ok(()));
        }
        if self.hotplug.is_adding() {
            self.memory.held = Some(job);
            return;
        }
        let Some(parts) = self.machine.as_ref().map(|m| &m.parts) else {
            return;
        };
        let devices = parts.devices.iter();
        let listeners = devices.map(|d| listener(&d.id, &d.function));
        let listeners = listeners.chain(self.functions_that_leave());
        if let (Some(plugger), Some(area)) = (&self.memory.plugger, parts.ram.pluggable()) {
            plugger.begin(area, job, listeners.collect());
        }
    }

    /// Some back-end is told of memory when it starts, and never again.
    fn is_any_deaf(&self) -> bool {
        let mut devices = self.machine.iter().flat_map(|m| m.parts.devices.iter());
        devices.any(|device| !device.function.takes_regions(1))
    }

    /// What was wanted has been done, or could not be.
    pub(super) fn on_plugged(&mut self, result: Result<(), String>) {
        let Some((index, Some(busy))) = self.with_memory(|memory| memory.busy.take()) else {
            return;
        };
        let outcome = match result {
            Ok(()) => {
                self.with_memory(|memory| memory.books.commit(&busy.wish, busy.incarnation));
                // Before the guest learns of it: it looks at what is plugged.
                self.show_memory(false);
                Outcome::ACK
            }
            Err(why) => {
                log::warn!("memory: {why}");
                let what = self.memory_info().map(What::Memory);
                self.log
                    .publish_typed("memory.refused", mem::ID, &why, what);
                self.memory.refused = Some(why);
                self.memory.remind_at = Instant::now().checked_add(REMIND);
                // Not NACK: Linux asks again at once, and for ever.
                Outcome::BUSY
            }
        };
        if self
            .process(index)
            .is_some_and(|p| p.incarnation == busy.incarnation)
        {
            self.finish_memory(index, busy.id, outcome);
        } else {
            self.ask_memory(index);
        }
        self.look_for_the_end();
    }

    fn finish_memory(&mut self, index: usize, id: u64, outcome: Outcome) {
        let incarnation = self.process(index).map_or(0, |p| p.incarnation);
        self.with_memory(|memory| memory.answered = (incarnation, id));
        self.with_control(index, |control, _| control.finish_request(id, outcome));
    }

    /// Says so when the guest has what it was asked to have.
    fn look_for_the_end(&mut self) {
        let Some((_, _, memory)) = self.memory_place() else {
            return;
        };
        if memory.books.plugged() != memory.books.requested() {
            return;
        }
        let info = memory.books.info();
        let detail = format!("{} MiB", info.present_bytes >> 20);
        self.log
            .publish_typed("memory.resized", mem::ID, &detail, Some(What::Memory(info)));
        if let Some(pending) = self.memory.pending.take() {
            self.ended(pending.operation, mem::ID, Ok(&detail));
        }
    }

    /// Looks whether the guest has had its time. True: nothing is due.
    pub(super) fn look_at_memory(&mut self, now: Instant) -> bool {
        if self.memory.pending.is_some() && self.memory.remind_at.take_if(|at| *at <= now).is_some()
        {
            let place = self.memory_place();
            place.inspect(|(_, device, _)| device.function.remind());
        }
        let Some(pending) = self.memory.pending.take_if(|p| p.until <= now) else {
            return true;
        };
        let (Some(info), Some(why)) = (self.memory_info(), self.why_short()) else {
            return true;
        };
        let (present, wanted) = (info.present_bytes >> 20, info.requested_bytes >> 20);
        let limit = pending.timeout.as_millis();
        let detail = format!("{present} MiB, not {wanted}, after {limit} ms: {why}");
        let what = Some(What::Memory(info));
        self.log
            .publish_typed("memory.short", mem::ID, &detail, what);
        self.ended(pending.operation, mem::ID, Err(&detail));
        false
    }

    /// Why the guest may not have what it was asked to have.
    fn why_short(&self) -> Option<String> {
        let (_, device, memory) = self.memory_place()?;
        let state = self.machine.as_ref()?.state;
        let status = device.function.status();
        let fixed = |line: &str| Some(line.to_owned());
        match &self.memory.refused {
            _ if state == MachineState::Created => fixed("the machine has not begun: boot it"),
            _ if state == MachineState::Paused => fixed("the machine is paused: resume it"),
            _ if !status.active => fixed(
                "the guest has no driver that uses the device: it has not come so far in its boot, or lacks one (Linux: CONFIG_VIRTIO_MEM)",
            ),
            Some(why) => Some(why.clone()),
            None if memory.books.plugged() > memory.books.requested() => fixed(
                "the guest keeps memory that it cannot free now, and goes on trying (Linux: memhp_default_state=online_movable helps)",
            ),
            None => fixed("the guest has not taken it yet"),
        }
    }
}
