//! What a device process answers: every answer is looked at before it is believed.

use std::time::Duration;

use bulkhead_proto::device::{DrainResponse, HealthResponse, StatsResponse, TakeRequestResponse};
use bulkhead_proto::machine::UpdateDiskResponse;
use bulkhead_proto::{Code, Completion, RpcStatus};

use super::{
    Breach, ControlChannel, DRAIN_PAUSE_FIRST, DRAIN_PAUSE_MAX, FINISH, HEALTH, Notice, Phase,
    REPLACE_PAUSE_MAX, TAKE, Task, Turn, parse,
};
use crate::api::ApiResponse;
use crate::machine::device_stats;

impl ControlChannel {
    pub(super) fn take(
        &mut self,
        answers: Vec<Completion>,
        turn: &mut Turn<'_>,
    ) -> Result<(), Breach> {
        for (token, result) in answers {
            if token == HEALTH {
                // A process that cannot say how it is has failed at what it is for.
                let health = result.map_err(|status| {
                    let message = crate::launcher::printable(&status.message);
                    Breach::Protocol(format!("does not tell its health: {message}"))
                })?;
                turn.notices.extend(self.on_health(&health)?);
            } else if token == TAKE {
                let wants = self.on_taken(result)?;
                turn.notices.extend(wants);
            } else if token == FINISH {
                result.map_err(|status| {
                    let message = crate::launcher::printable(&status.message);
                    Breach::Protocol(format!("does not take what it asked for: {message}"))
                })?;
            } else {
                self.on_answer(token, result, turn)?;
                self.advance(turn)?;
            }
        }
        Ok(())
    }

    fn on_taken(&mut self, result: Result<Vec<u8>, RpcStatus>) -> Result<Option<Notice>, Breach> {
        let (_, again) = std::mem::take(&mut self.taking);
        let payload = result.map_err(|status| {
            let message = crate::launcher::printable(&status.message);
            Breach::Protocol(format!("does not say what it wants: {message}"))
        })?;
        let mut taken: TakeRequestResponse = parse(&payload)?;
        if taken.id == 0 {
            if again {
                self.take_request()?;
            }
            return Ok(None);
        }
        if !taken.has_mem() {
            return Err(Breach::Protocol("wants what there is not".to_owned()));
        }
        let (id, request) = (taken.id, taken.take_mem());
        Ok(Some(Notice::Wants { id, request }))
    }

    fn on_health(&mut self, payload: &[u8]) -> Result<Vec<Notice>, Breach> {
        let health: HealthResponse = parse(payload)?;
        if health.rings.len() > self.about.queues {
            return Err(Breach::Protocol(format!(
                "tells of {} rings and has {}",
                health.rings.len(),
                self.about.queues
            )));
        }
        if health.host_gone && self.about.tap.is_empty() {
            return Err(Breach::Protocol(
                "says that its tap is gone, and has none".to_owned(),
            ));
        }
        let (mut count, mut last) = (0u64, (0, 0));
        for (ring, known) in health.rings.iter().zip(&mut self.host_errors) {
            let more = ring.host_errors.saturating_sub(*known);
            *known = ring.host_errors;
            if more > 0 {
                count = count.saturating_add(more);
                last = (ring.last_errno, ring.last_sector);
            }
        }
        let (errno, sector) = last;
        let mut notices = Vec::new();
        if count > 0 {
            notices.push(Notice::HostErrors {
                count,
                errno,
                sector,
            });
        }
        if health.host_gone && !std::mem::replace(&mut self.host_gone, true) {
            notices.push(Notice::HostGone);
        }
        if health.asks {
            notices.push(Notice::Asks);
        }
        let excused = health.rings.iter();
        let excused = excused.map(|ring| ring.waits_for_host || ring.held || ring.broken);
        notices.push(Notice::Health {
            excused: excused.collect(),
        });
        Ok(notices)
    }

    fn on_answer(
        &mut self,
        token: u64,
        result: Result<Vec<u8>, RpcStatus>,
        turn: &mut Turn<'_>,
    ) -> Result<(), Breach> {
        let Some(current) = &mut self.current else {
            return Ok(());
        };
        if !matches!(current.phase, Phase::Called { token: due } if due == token) {
            return Ok(());
        }
        if let Some(status) = current.undoing.take() {
            // A device that cannot be resumed stays stopped: nothing but its end helps.
            result.map_err(|status| {
                let message = crate::launcher::printable(&status.message);
                Breach::Protocol(format!("cannot resume after a drain: {message}"))
            })?;
            if matches!(current.task, Task::Drain { .. }) {
                turn.notices.push(Notice::DrainFailed);
            }
            self.finish(Err(status));
            return Ok(());
        }
        let payload = match result {
            Ok(payload) => payload,
            Err(status) => {
                let mut status = self.refusal(&status);
                if let Some(Task::UpdateDisk {
                    grow_to: Some(size),
                    ..
                }) = self.current.as_ref().map(|c| &c.task)
                {
                    status.message.push_str(&format!(
                        "; its file has {size} bytes already: repeat the request"
                    ));
                }
                self.finish(Err(status));
                return Ok(());
            }
        };
        match &current.task {
            Task::Stats => {
                let stats: StatsResponse = parse(&payload)?;
                let response =
                    device_stats::response(&self.about, &stats).map_err(Breach::Protocol)?;
                self.finish(Ok(ApiResponse::DeviceStats(Box::new(response))));
            }
            Task::UpdateDisk { update, size, .. } => {
                let size = match update.size_bytes {
                    0 => *size,
                    changed => changed,
                };
                let mut response = UpdateDiskResponse::new();
                response.size_bytes = size;
                let update = update.clone();
                turn.notices.push(Notice::DiskUpdated { update, size });
                self.finish(Ok(ApiResponse::DiskUpdated(response)));
            }
            Task::UpdateNet(update) => {
                turn.notices.push(Notice::NetUpdated(update.clone()));
                self.finish(Ok(ApiResponse::Done));
            }
            Task::UpdateConsole(update) => {
                turn.notices.push(Notice::ConsoleUpdated(update.clone()));
                self.finish(Ok(ApiResponse::Done));
            }
            Task::UpdateMemory(_) => self.finish(Ok(ApiResponse::Done)),
            Task::Resume => {
                turn.notices.push(Notice::Resumed);
                self.finish(Ok(ApiResponse::Done));
            }
            Task::Drain { limit } | Task::Replace { limit, .. } => {
                let limit = *limit;
                let drain: DrainResponse = parse(&payload)?;
                self.on_drain(drain.drained, limit, turn)?;
            }
        }
        Ok(())
    }

    fn on_drain(
        &mut self,
        drained: bool,
        limit: Duration,
        turn: &mut Turn<'_>,
    ) -> Result<(), Breach> {
        let now = turn.now;
        let id = self.about.id.clone();
        let Some(current) = &mut self.current else {
            return Ok(());
        };
        let (deadline, pause) = current.drain.unwrap_or((now, DRAIN_PAUSE_FIRST));
        let replacing = matches!(current.task, Task::Replace { .. });
        let longest = if replacing {
            REPLACE_PAUSE_MAX
        } else {
            DRAIN_PAUSE_MAX
        };
        let why = if drained && replacing {
            current.phase = Phase::Replacing;
            turn.notices.push(Notice::Quiet);
            return Ok(());
        } else if current.reply.is_abandoned() && !replacing {
            // Nobody would know that it must be resumed.
            "nobody waits for the drain any more".to_owned()
        } else if drained {
            turn.notices.push(Notice::Drained);
            self.finish(Ok(ApiResponse::Done));
            return Ok(());
        } else if now >= deadline {
            format!(
                "device {id}: not drained within {} ms: it takes requests again; give it more time, or see whether its host storage is stuck",
                limit.as_millis()
            )
        } else {
            let until = now.checked_add(pause).unwrap_or(now).min(deadline);
            current.phase = Phase::Pausing { until };
            current.drain = Some((deadline, pause.saturating_mul(2).min(longest)));
            return Ok(());
        };
        if replacing {
            turn.notices.push(Notice::NotQuiet(why));
            return Ok(());
        }
        current.undoing = Some(RpcStatus::new(Code::DeadlineExceeded, why));
        self.call_current()
    }

    /// The device's own refusal, with its name: one line, without control characters.
    fn refusal(&self, status: &RpcStatus) -> RpcStatus {
        let message = crate::launcher::printable(&status.message);
        RpcStatus::new(status.code, self.line(&message))
    }
}
