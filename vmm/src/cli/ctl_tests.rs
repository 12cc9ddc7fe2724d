//! `bulkhead ctl` against a real API server whose machine is played here.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use bulkhead_proto::RpcStatus;
use bulkhead_proto::machine::{
    DeviceInfo, DeviceStatsResponse, MachineConfig, State, UpdateDiskRequest, UpdateDiskResponse,
    UpdateNetRequest, update_net_request::Link,
};
use clap::Parser;

use super::*;
use crate::api::{
    ApiRequest, ApiResponse, ApiServer, Callers, Door, EventLog, MachineService, ReplyHandle, Role,
};

#[derive(Parser, Debug)]
struct Line {
    #[command(flatten)]
    ctl: CtlArgs,
}

/// Remembers what it was asked; knows a machine once one was created.
#[derive(Default)]
struct Machine {
    config: Mutex<Option<MachineConfig>>,
    asked: Mutex<Vec<ApiRequest>>,
}

impl MachineService for Machine {
    fn submit(&self, request: ApiRequest, reply: ReplyHandle) {
        self.asked.lock().unwrap().push(request.clone());
        let mut config = self.config.lock().unwrap();
        reply.complete(match request {
            ApiRequest::Create(wanted) => {
                *config = Some(*wanted);
                Ok(ApiResponse::Done)
            }
            ApiRequest::Info => {
                let mut info = InfoResponse::new();
                info.version = "1.2.3".into();
                info.state = match &*config {
                    Some(_) => State::STATE_CREATED.into(),
                    None => State::STATE_NONE.into(),
                };
                info.config = config.clone().into();
                info.counters.mut_or_insert_default().vcpu_exits = 77;
                Ok(ApiResponse::Info(Box::new(info)))
            }
            ApiRequest::Devices => {
                let mut device = DeviceInfo::new();
                device.id = "root".into();
                device.kind = "blk".into();
                device.state = "running".into();
                device.pid = 42;
                device.spawn_us = 1500;
                let mut devices = DevicesResponse::new();
                devices.devices.push(device);
                Ok(ApiResponse::Devices(Box::new(devices)))
            }
            ApiRequest::UpdateDisk(update) => {
                let mut disk = UpdateDiskResponse::new();
                disk.size_bytes = update.size_bytes.max(512);
                Ok(ApiResponse::DiskUpdated(disk))
            }
            ApiRequest::DeviceStats { id } => {
                let mut stats = DeviceStatsResponse::new();
                stats.id = id;
                stats.kind = "blk".into();
                let mut queue = bulkhead_proto::common::QueueStats::new();
                queue.requests = 12;
                queue.latency_us_log2 = vec![0, 0, 12, 0];
                stats.queues.push(queue);
                Ok(ApiResponse::DeviceStats(Box::new(stats)))
            }
            _ if config.is_none() => Err(RpcStatus::failed_precondition(
                "there is no machine: create it first",
            )),
            _ => Ok(ApiResponse::Done),
        });
    }
}

struct Fixture {
    path: String,
    machine: Arc<Machine>,
    events: Arc<EventLog>,
    _server: crate::api::ApiServerHandle,
}

impl Fixture {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir()
            .join(format!("bulkhead-ctl-{}-{number}.sock", std::process::id()))
            .into_os_string()
            .into_string()
            .unwrap();
        let machine = Arc::new(Machine::default());
        let events = Arc::new(EventLog::new());
        let listener = UnixListener::bind(&path).unwrap();
        let own = bulkhead_proto::sys::effective_uid();
        let server = ApiServer::start(
            vec![Door::new(listener, Role::Operator, Callers::default(), own)],
            machine.clone(),
            events.clone(),
            crate::api::Services::Machine,
            crate::threads::no_hook(),
        )
        .unwrap();
        Self {
            path,
            machine,
            events,
            _server: server,
        }
    }

    fn ctl(&self, words: &[&str]) -> Result<String, Failure> {
        ctl(&[&["--socket", &self.path], words].concat())
    }

    fn asked(&self) -> Vec<ApiRequest> {
        std::mem::take(&mut self.machine.asked.lock().unwrap())
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn ctl(words: &[&str]) -> Result<String, Failure> {
    let line = Line::try_parse_from([&["ctl"], words].concat()).map_err(|error| Failure {
        code: EXIT_USAGE,
        line: error.to_string(),
    })?;
    let mut out = Vec::new();
    execute(&line.ctl, &mut out).map(|()| String::from_utf8(out).unwrap())
}

#[test]
fn the_life_of_a_machine() {
    let fixture = Fixture::new();
    let early = fixture.ctl(&["boot"]).unwrap_err();
    assert_eq!(
        (early.code, early.line.as_str()),
        (1, "there is no machine: create it first")
    );
    assert!(
        fixture
            .ctl(&["info"])
            .unwrap()
            .starts_with("state        none\n")
    );
    let created = fixture.ctl(&[
        "create",
        "--kernel",
        "/boot/vmlinuz",
        "--memory",
        "1G",
        "--cpus",
        "2",
        "--disk",
        "path=/disk,readonly=on,id=root",
    ]);
    assert_eq!(created.unwrap(), "created\n");
    assert_eq!(fixture.ctl(&["boot"]).unwrap(), "running\n");
    assert_eq!(fixture.ctl(&["pause"]).unwrap(), "paused\n");
    assert_eq!(
        fixture.ctl(&["resume", "--json"]).unwrap(),
        "{\"state\":\"running\"}\n"
    );
    assert_eq!(
        fixture.ctl(&["shutdown", "--timeout", "5"]).unwrap(),
        "stopped\n"
    );
    assert_eq!(fixture.ctl(&["shutdown", "--force"]).unwrap(), "stopped\n");
    let asked = fixture.asked();
    assert!(matches!(&asked[2], ApiRequest::Create(config) if config.memory_bytes == 1 << 30));
    assert_eq!(
        asked[3..],
        [
            ApiRequest::Boot,
            ApiRequest::Pause,
            ApiRequest::Resume,
            ApiRequest::Shutdown {
                force: false,
                timeout: Duration::from_secs(5)
            },
            ApiRequest::Shutdown {
                force: true,
                timeout: Duration::from_secs(30)
            },
        ]
    );
}

#[test]
fn info_and_devices_are_tables_or_json() {
    let fixture = Fixture::new();
    fixture
        .ctl(&["create", "--kernel", "/k", "--disk", "path=/d,id=root"])
        .unwrap();
    let text = fixture.ctl(&["info"]).unwrap();
    for line in [
        "state        created",
        "memory       512 MiB",
        "disk         root: /d",
    ] {
        assert!(text.lines().any(|l| l == line), "{line}: {text}");
    }
    let json: serde_json::Value =
        serde_json::from_str(&fixture.ctl(&["--json", "info"]).unwrap()).unwrap();
    assert_eq!(json["state"], "created");
    assert_eq!(json["counters"]["vcpu_exits"], 77);
    assert_eq!(json["config"]["disks"][0]["path"], "/d");
    let table = fixture.ctl(&["devices"]).unwrap();
    let row = table.lines().nth(1).unwrap();
    assert_eq!(
        row.split_whitespace().take(4).collect::<Vec<_>>(),
        ["root", "blk", "running", "42"]
    );
    assert!(row.contains("1.5 ms"));
    let json: serde_json::Value =
        serde_json::from_str(&fixture.ctl(&["devices", "--json"]).unwrap()).unwrap();
    assert_eq!(json[0]["pid"], 42);
}

#[test]
fn a_disk_is_grown_and_limited_and_what_is_not_given_stays() {
    let fixture = Fixture::new();
    let create = [
        "create",
        "--kernel",
        "/k",
        "--disk",
        "path=/d,id=root,bps=1M,iops=100:10",
    ];
    fixture.ctl(&create).unwrap();
    fixture.asked();
    let disk = |asked: Vec<ApiRequest>| -> UpdateDiskRequest {
        match asked.last() {
            Some(ApiRequest::UpdateDisk(request)) => (**request).clone(),
            other => panic!("{other:?}"),
        }
    };
    let said = fixture
        .ctl(&["update-disk", "root", "--size", "1G"])
        .unwrap();
    assert_eq!(said, "updated, 1 GiB\n");
    let request = disk(fixture.asked());
    assert_eq!((request.id.as_str(), request.size_bytes), ("root", 1 << 30));
    assert!(request.limits.is_none());

    let said = fixture
        .ctl(&["update-disk", "root", "--iops", "0", "--json"])
        .unwrap();
    let json: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert_eq!(json["size_bytes"], 512);
    let request = disk(fixture.asked());
    assert_eq!(request.limits.bytes.per_second, 1 << 20);
    assert_eq!(request.limits.operations.per_second, 0);
    assert_eq!(request.limits.operations.burst, 0);

    fixture
        .ctl(&["update-disk", "root", "--bps", "5M:1M", "--iops", "7"])
        .unwrap();
    let asked = fixture.asked();
    assert_eq!(asked.len(), 1, "nothing need be looked up");
    let request = disk(asked);
    assert_eq!(request.limits.bytes.burst, 1 << 20);
    assert_eq!(request.limits.operations.per_second, 7);
}

#[test]
fn a_network_device_is_changed() {
    let fixture = Fixture::new();
    fixture.ctl(&["create", "--kernel", "/k"]).unwrap();
    fixture.asked();
    let said = fixture
        .ctl(&["update-net", "n0", "--link", "down", "--tx-bps", "1M"])
        .unwrap();
    assert_eq!(said, "updated\n");
    let asked = fixture.asked();
    let request: &UpdateNetRequest = match asked.last() {
        Some(ApiRequest::UpdateNet(request)) => request,
        other => panic!("{other:?}"),
    };
    assert_eq!(request.link, Link::DOWN.into());
    assert!(request.to_guest.is_none());
    assert_eq!(request.from_guest.bytes.per_second, 1 << 20);
}

#[test]
fn a_device_is_counted_drained_and_resumed() {
    let fixture = Fixture::new();
    fixture.ctl(&["create", "--kernel", "/k"]).unwrap();
    fixture.asked();
    let table = fixture.ctl(&["stats", "root"]).unwrap();
    assert!(table.lines().next().unwrap().starts_with("QUEUE  REQUESTS"));
    assert!(table.contains("p99 <4 us"), "{table}");
    let json: serde_json::Value =
        serde_json::from_str(&fixture.ctl(&["stats", "root", "--json"]).unwrap()).unwrap();
    assert_eq!(json["queues"][0]["latency_us"]["p50"], 4);
    let drained = fixture.ctl(&["drain", "root", "--timeout", "7"]).unwrap();
    assert_eq!(drained, "drained\n");
    let resumed = fixture.ctl(&["resume-device", "root", "--json"]).unwrap();
    assert_eq!(resumed, "{\"done\":\"resumed\",\"id\":\"root\"}\n");
    let id = || "root".to_owned();
    assert_eq!(
        fixture.asked()[2..4],
        [
            ApiRequest::DrainDevice {
                id: id(),
                timeout: Duration::from_secs(7)
            },
            ApiRequest::ResumeDevice { id: id() },
        ]
    );
}

#[test]
fn a_wrong_change_is_an_error_of_usage_before_anybody_is_asked() {
    for (words, named) in [
        (&["update-disk", "root"][..], "nothing to change"),
        (&["update-disk", "root", "--size", "much"], "--size much"),
        (&["update-disk", "root", "--bps", "1M:"], "--bps=1M:"),
        (&["update-net", "n0"], "nothing to change"),
        (&["update-net", "n0", "--rx-pps", "x"], "--rx-pps=x"),
    ] {
        let failure = ctl(&[&["--socket", "/nonexistent"], words].concat()).unwrap_err();
        assert_eq!(failure.code, EXIT_USAGE, "{words:?}");
        assert!(failure.line.contains(named), "{words:?}: {}", failure.line);
    }
}

#[test]
fn events_end_with_the_newest_unless_followed() {
    let fixture = Fixture::new();
    assert_eq!(fixture.ctl(&["events"]).unwrap(), "");
    for kind in ["machine.created", "machine.running", "machine.paused"] {
        fixture.events.publish(kind, "", "");
    }
    let all = fixture.ctl(&["events"]).unwrap();
    assert_eq!(all.lines().count(), 3);
    let late = fixture.ctl(&["events", "--from", "2", "--json"]).unwrap();
    let numbers: Vec<u64> = late
        .lines()
        .map(|line| {
            serde_json::from_str::<serde_json::Value>(line).unwrap()["sequence"]
                .as_u64()
                .unwrap()
        })
        .collect();
    assert_eq!(numbers, [2, 3]);
    assert!(
        fixture.ctl(&["events", "--from", "0"]).is_err(),
        "numbers start at 1"
    );
}

/// Counts lines, and closes after some.
struct Head(usize);

impl Write for Head {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0 == 0 {
            return Err(ErrorKind::BrokenPipe.into());
        }
        self.0 -= bytes
            .iter()
            .filter(|byte| **byte == b'\n')
            .count()
            .min(self.0);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_followed_stream_ends_without_error_when_its_reader_does() {
    let fixture = Fixture::new();
    for _ in 0..5 {
        fixture.events.publish("k", "", "");
    }
    let line =
        Line::try_parse_from(["ctl", "--socket", &fixture.path, "events", "--follow"]).unwrap();
    assert!(execute(&line.ctl, &mut Head(3)).is_ok());
}

#[test]
fn errors_name_the_socket_and_the_remedy() {
    let refused = |words: &[&str]| {
        let failure = ctl(words).unwrap_err();
        assert!(!failure.line.contains('\n'), "{}", failure.line);
        (failure.code, failure.line)
    };
    let (code, line) = refused(&["info"]);
    assert_eq!(code, EXIT_USAGE);
    assert!(line.starts_with("--socket PATH is missing"), "{line}");

    let (code, line) = refused(&["info", "--socket", "/nonexistent/x.sock"]);
    assert_eq!(code, 1);
    assert!(
        line.starts_with("/nonexistent/x.sock: no such socket"),
        "{line}"
    );

    let (_, line) = refused(&["info", "--socket", &format!("/{}", "x".repeat(200))]);
    assert!(line.contains("too long"), "{line}");

    let stale = std::env::temp_dir().join(format!("bulkhead-stale-{}.sock", std::process::id()));
    drop(UnixListener::bind(&stale).unwrap());
    let (_, line) = refused(&["info", "--socket", stale.to_str().unwrap()]);
    std::fs::remove_file(&stale).unwrap();
    assert!(line.contains("nobody listens there"), "{line}");

    for no_socket in ["/", "/proc/self/exe"] {
        let (_, line) = refused(&["info", "--socket", no_socket]);
        assert!(
            line.starts_with(&format!("{no_socket}: no socket: name that of")),
            "{line}"
        );
    }

    let closing = std::env::temp_dir().join(format!("bulkhead-shut-{}.sock", std::process::id()));
    let listener = UnixListener::bind(&closing).unwrap();
    let door = std::thread::spawn(move || drop(listener.accept()));
    let (_, line) = refused(&["info", "--socket", closing.to_str().unwrap()]);
    door.join().unwrap();
    std::fs::remove_file(&closing).unwrap();
    assert!(
        line.contains("closed the connection without an answer"),
        "{line}"
    );

    let wrong = [
        "--socket",
        "/nonexistent",
        "create",
        "--kernel",
        "/k",
        "--memory",
        "lots",
    ];
    let (code, line) = refused(&wrong);
    assert_eq!(code, EXIT_USAGE);
    assert!(line.starts_with("--memory lots"), "{line}");
}
