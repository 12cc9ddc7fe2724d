//! `bulkhead ctl operations` and `ctl operation N`: what became of what was asked for.

use std::io::{self, Write};
use std::time::Duration;

use bulkhead_proto::machine::{
    OperationInfo, OperationRequest, OperationsRequest, OperationsResponse, operation_info::State,
};
use serde_json::{Value, json};

use super::ctl::{CALL, Failure, Output, Session};

/// Options of `ctl operations`.
#[derive(clap::Args, Debug, Clone)]
pub(super) struct OperationsArgs {
    /// Only those about this: a device's id, `vcpus` or `memory`
    #[arg(long, value_name = "ID")]
    subject: Option<String>,
    /// Only those that have not ended
    #[arg(long)]
    running: bool,
}

/// Options of `ctl operation`.
#[derive(clap::Args, Debug, Clone)]
pub(super) struct OperationArgs {
    /// Its number, as events and answers have it
    #[arg(value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    number: u64,
    /// Wait until it has ended, so many seconds at most
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=600))]
    wait: Option<u32>,
}

impl OperationsArgs {
    pub(super) fn run(
        &self,
        session: &mut Session<'_>,
        out: &mut Output<'_>,
    ) -> Result<(), Failure> {
        let mut request = OperationsRequest::new();
        request.subject = self.subject.clone().unwrap_or_default();
        request.running = self.running;
        let all: OperationsResponse = session.call("Operations", &request, CALL)?;
        if out.json {
            let all: Vec<Value> = all.operations.iter().map(to_json).collect();
            return out.json_value(&json!({ "operations": all }));
        }
        out.text(|to| all.operations.iter().try_for_each(|one| to_text(to, one)))
    }
}

impl OperationArgs {
    /// One that has failed, or has not ended in the time, is a failure.
    pub(super) fn run(
        &self,
        session: &mut Session<'_>,
        out: &mut Output<'_>,
    ) -> Result<(), Failure> {
        let mut request = OperationRequest::new();
        request.operation = self.number;
        let seconds = self.wait.unwrap_or(0);
        request.wait_ms = seconds.saturating_mul(1000);
        let patience = CALL.saturating_add(Duration::from_secs(seconds.into()));
        let one: OperationInfo = session.call("Operation", &request, patience)?;
        if out.json {
            out.json_value(&to_json(&one))?;
        } else {
            out.text(|to| to_text(to, &one))?;
        }
        match (one.state.enum_value_or_default(), self.wait) {
            (State::FAILED, _) => Err(Failure::new(format!(
                "operation {} failed: {}",
                one.operation, one.detail
            ))),
            (State::RUNNING, Some(wait)) => Err(Failure::new(format!(
                "operation {} has not ended within {wait} s: ask again",
                one.operation
            ))),
            _ => Ok(()),
        }
    }
}

fn state(one: &OperationInfo) -> &'static str {
    match one.state.enum_value() {
        Ok(State::RUNNING) => "running",
        Ok(State::DONE) => "done",
        Ok(State::FAILED) => "failed",
        _ => "unknown",
    }
}

fn to_json(one: &OperationInfo) -> Value {
    json!({
        "operation": one.operation,
        "subject": one.subject,
        "what": one.what,
        "state": state(one),
        "detail": one.detail,
        "began_ns": one.began_ns,
        "ended_ns": one.ended_ns,
    })
}

fn to_text(to: &mut dyn Write, one: &OperationInfo) -> io::Result<()> {
    let (number, subject, what) = (one.operation, &one.subject, &one.what);
    let detail = match one.detail.as_str() {
        "" => String::new(),
        detail => format!(": {detail}"),
    };
    writeln!(to, "{number:>5}  {subject}  {what}: {}{detail}", state(one))
}
