//! What programs need of an event, as `bulkhead ctl events --json` shows it.

use bulkhead_proto::machine::Event;
use bulkhead_proto::machine::event::What;
use serde_json::{Value, json};

use super::ctl_hotplug::memory_json;

/// The event's own part; null for events that have none.
pub fn what(event: &Event) -> Value {
    match &event.what {
        Some(What::Spawned(e)) => json!({ "pid": e.pid, "incarnation": e.incarnation }),
        Some(What::Ready(e)) => {
            json!({ "pid": e.pid, "incarnation": e.incarnation, "ready_us": e.ready_us })
        }
        Some(What::Exited(e)) => json!({
            "pid": e.pid, "incarnation": e.incarnation, "status": e.status, "signal": e.signal,
            "violation": e.violation,
        }),
        Some(What::Crashed(e)) => json!({
            "pid": e.pid, "incarnation": e.incarnation, "why": word(&format!("{:?}", e.why)),
            "status": e.status, "signal": e.signal, "queue": e.queue, "what": e.what,
        }),
        Some(What::Restarted(e)) => json!({
            "pid": e.pid, "incarnation": e.incarnation, "stall_us": e.stall_us,
            "resubmitted": e.resubmitted, "queues": e.queues, "restarts": e.restarts,
        }),
        Some(What::Updated(e)) => json!({
            "pid": e.pid, "incarnation": e.incarnation, "stall_us": e.stall_us,
            "version": e.version, "queues": e.queues,
        }),
        Some(What::Quarantined(e)) => json!({ "why": e.why, "restarts": e.restarts }),
        Some(What::Stopped(e)) => json!({
            "cause": word(&format!("{:?}", e.cause)), "exit_code": e.exit_code,
        }),
        Some(What::Reset(e)) => {
            json!({ "cause": word(&format!("{:?}", e.cause)), "count": e.count })
        }
        Some(What::Gap(e)) => json!({ "first": e.first, "last": e.last }),
        Some(What::IoError(e)) => {
            json!({ "count": e.count, "errno": e.errno, "sector": e.sector })
        }
        Some(What::Memory(memory)) => memory_json(memory),
        _ => Value::Null,
    }
}

/// The name of an enumeration's value, as events have it in JSON: in small letters.
fn word(name: &str) -> String {
    name.to_lowercase().replace('_', "-")
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_proto::machine::DeviceCrashed;
    use bulkhead_proto::machine::device_crashed::Why;

    #[test]
    fn a_crash_is_told_by_its_class() {
        let mut crashed = DeviceCrashed::new();
        (crashed.why, crashed.signal) = (Why::SIGNAL.into(), 9);
        let mut event = Event::new();
        event.set_crashed(crashed);
        let value = what(&event);
        assert_eq!(
            (value["why"].as_str(), value["signal"].as_i64()),
            (Some("signal"), Some(9))
        );
        assert!(what(&Event::new()).is_null());
    }
}
