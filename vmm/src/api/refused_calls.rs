//! The log's lines about calls of `vmservice.VM` that were refused: its client, a container
//! runtime, often shows no more of a refusal than its code. Used on the `api` thread.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::time::Instant;

use bulkhead_proto::RpcStatus;

use super::access::TOLD_FOR;
use super::request::short;

/// Lines in [`TOLD_FOR`]: a client that is refused again and again does not fill the log.
const MOST_TOLD: usize = 16;

/// When it was told of calls that were refused, and how many it was not told of.
#[derive(Debug, Default)]
pub(super) struct RefusedCalls(RefCell<Told>);

#[derive(Debug, Default)]
struct Told {
    at: VecDeque<Instant>,
    untold: u64,
}

impl RefusedCalls {
    /// Tells of a call, unless that would be too many lines.
    pub(super) fn tell(&self, method: &str, status: &RpcStatus, now: Instant) {
        if let Some(line) = self.line(method, status, now) {
            log::warn!("{line}");
        }
    }

    fn line(&self, method: &str, status: &RpcStatus, now: Instant) -> Option<String> {
        // Never borrowed across a call.
        let mut told = self.0.try_borrow_mut().ok()?;
        let lately = |at: &Instant| now.saturating_duration_since(*at) < TOLD_FOR;
        while told.at.front().is_some_and(|at| !lately(at)) {
            told.at.pop_front();
        }
        if told.at.len() >= MOST_TOLD {
            told.untold = told.untold.saturating_add(1);
            return None;
        }
        told.at.push_back(now);
        let more = match std::mem::take(&mut told.untold) {
            0 => String::new(),
            untold => format!(" ({untold} more calls before it were)"),
        };
        Some(format!(
            "vmservice.VM: {} was refused{more}: {}",
            short(method),
            status.message
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_refusal_is_told_and_thousands_do_not_fill_the_log() {
        let (calls, now) = (RefusedCalls::default(), Instant::now());
        let status = RpcStatus::invalid_argument("config is missing: describe the machine");
        let told: Vec<_> = (0..5000)
            .filter_map(|_| calls.line("Create\nVM", &status, now))
            .collect();
        assert_eq!(told.len(), MOST_TOLD);
        let line = "vmservice.VM: CreateVM was refused: config is missing: describe the machine";
        assert!(told.iter().all(|told| told == line), "{told:?}");
        let later = now.checked_add(TOLD_FOR).unwrap();
        let next = calls.line("Quit", &status, later).unwrap();
        let start = "vmservice.VM: Quit was refused (4984 more calls before it were): config";
        assert!(next.starts_with(start), "{next}");
        assert!(!calls.line("Quit", &status, later).unwrap().contains("more"));
    }
}
