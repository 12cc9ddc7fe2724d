//! The API server when the process runs out of file descriptors. In a process of its own,
//! because it takes them all.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::File;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use bulkhead_proto::machine::{BootRequest, BootResponse};
use bulkhead_proto::{BlockingClient, MACHINE_SERVICE};
use bulkhead_vmm::api::{
    ApiRequest, ApiResponse, ApiServer, Callers, Door, EventLog, MachineService, ReplyHandle, Role,
};

const LONG: Duration = Duration::from_secs(60);

struct Prompt;

impl MachineService for Prompt {
    fn submit(&self, _request: ApiRequest, reply: ReplyHandle) {
        reply.complete(Ok(ApiResponse::Done));
    }
}

/// Tells when the server says that it cannot accept.
struct Watch(Mutex<bool>, Condvar);

impl log::Log for Watch {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }
    fn log(&self, record: &log::Record<'_>) {
        if record.args().to_string().contains("cannot accept") {
            *self.0.lock().unwrap() = true;
            self.1.notify_all();
        }
    }
    fn flush(&self) {}
}

static WATCH: Watch = Watch(Mutex::new(false), Condvar::new());

#[test]
fn a_client_that_comes_while_no_descriptor_is_left_is_served_later() {
    log::set_logger(&WATCH).unwrap();
    log::set_max_level(log::LevelFilter::Warn);
    let path = std::env::temp_dir().join(format!("bulkhead-emfile-{}.sock", std::process::id()));
    let listener = UnixListener::bind(&path).unwrap();
    let own = bulkhead_proto::sys::effective_uid();
    let server = ApiServer::start(
        vec![Door::new(listener, Role::Operator, Callers::default(), own)],
        Arc::new(Prompt),
        Arc::new(EventLog::new()),
        bulkhead_vmm::api::Services::Machine,
        bulkhead_vmm::threads::no_hook(),
    )
    .unwrap();

    let null = File::open("/dev/null").unwrap();
    let mut taken = Vec::new();
    while let Ok(copy) = null.try_clone() {
        taken.push(copy);
    }
    taken.pop();
    // Takes the only descriptor there is.
    let mut client = BlockingClient::new(UnixStream::connect(&path).unwrap(), 4096);
    let seen = WATCH
        .1
        .wait_timeout_while(WATCH.0.lock().unwrap(), LONG, |seen| !*seen)
        .unwrap();
    assert!(*seen.0, "the server ran out of descriptors");
    drop(seen);
    drop(taken);
    client
        .call::<_, BootResponse>(MACHINE_SERVICE, "Boot", &BootRequest::new(), LONG)
        .unwrap();

    server.stop(LONG);
    let _ = std::fs::remove_file(&path);
}
