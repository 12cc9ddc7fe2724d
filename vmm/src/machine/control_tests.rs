//! A device's control channel against a process that is played here: honest, slow, wrong.
//! Time is made up and handed in; nothing waits.

use std::cell::RefCell;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use bulkhead_proto::ControlServer;
use bulkhead_proto::device::{
    BlkUpdate, DrainResponse, HealthResponse, MemRequest, RingHealth, TakeRequestResponse,
};
use bulkhead_proto::server::{CONTROL_MAX_FRAME, Closed};

use super::*;

const LONG: Duration = Duration::from_secs(3600);

/// Remembers what it is to grow.
#[derive(Default)]
struct Launcher {
    asked: RefCell<Vec<(String, u32, u64)>>,
    refuse: bool,
}

impl Grower for Launcher {
    fn begin_grow(&self, device: &str, index: u32, size: u64) -> Result<u64, String> {
        if self.refuse {
            return Err("the launcher is busy".into());
        }
        let mut asked = self.asked.borrow_mut();
        asked.push((device.to_owned(), index, size));
        Ok(asked.len() as u64)
    }
}

type Answer = Result<Vec<u8>, RpcStatus>;
type Told = Result<ApiResponse, RpcStatus>;

struct Bed {
    control: ControlChannel,
    device: ControlServer,
    launcher: Launcher,
    now: Instant,
    notices: Vec<Notice>,
    outcomes: Arc<Mutex<Vec<(u32, Told)>>>,
    asked: u32,
    /// What the device was asked for.
    calls: Vec<String>,
}

fn bed() -> Bed {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let about = About {
        id: "root".into(),
        kind: "blk".into(),
        queues: 2,
        mtu: 0,
        tap: String::new(),
        usage: None,
    };
    let client = BlockingClient::new(ours, CONTROL_MAX_FRAME);
    Bed {
        control: ControlChannel::new(client, about).unwrap(),
        device: ControlServer::new(theirs, CONTROL_MAX_FRAME),
        launcher: Launcher::default(),
        now: Instant::now(),
        notices: Vec::new(),
        outcomes: Arc::default(),
        asked: 0,
        calls: Vec::new(),
    }
}

impl Bed {
    fn turn<T>(&mut self, step: impl FnOnce(&mut ControlChannel, &mut Turn<'_>) -> T) -> T {
        let mut turn = Turn {
            grower: &self.launcher,
            now: self.now,
            notices: &mut self.notices,
        };
        step(&mut self.control, &mut turn)
    }

    fn reply(&mut self) -> ReplyHandle {
        self.asked += 1;
        let (number, outcomes) = (self.asked, Arc::clone(&self.outcomes));
        ReplyHandle::new(self.now + LONG, move |outcome| {
            outcomes.lock().unwrap().push((number, outcome));
        })
    }

    fn ask(&mut self, task: Task) -> Result<(), Breach> {
        let reply = self.reply();
        self.turn(|control, turn| control.submit(task, reply, turn))
    }

    /// The device answers what it was asked, each call by `answer`.
    fn device_answers(&mut self, mut answer: impl FnMut(&str, &[u8]) -> Answer) {
        let calls = &mut self.calls;
        let result = self.device.on_readable(&mut |_, method, payload| {
            calls.push(method.to_owned());
            answer(method, payload)
        });
        assert!(!matches!(result, Err(Closed::Protocol(_))), "{result:?}");
    }

    fn readable(&mut self) -> Result<bool, Breach> {
        self.turn(|control, turn| control.on_readable(turn))
    }

    fn timer(&mut self) -> Result<(), Breach> {
        self.turn(|control, turn| control.on_timer(turn))
    }

    /// Asks the device and lets it answer until nothing happens any more.
    fn settle(&mut self, mut answer: impl FnMut(&str, &[u8]) -> Answer) {
        loop {
            let before = self.calls.len();
            self.device_answers(&mut answer);
            self.readable().unwrap();
            if self.calls.len() == before {
                break;
            }
        }
    }

    fn outcomes(&mut self) -> Vec<(u32, Told)> {
        std::mem::take(&mut self.outcomes.lock().unwrap())
    }

    fn calls(&mut self) -> Vec<String> {
        std::mem::take(&mut self.calls)
    }
}

fn empty(_: &str, _: &[u8]) -> Answer {
    Ok(Vec::new())
}

fn drained(yes: bool) -> Vec<u8> {
    let mut response = DrainResponse::new();
    response.drained = yes;
    response.write_to_bytes().unwrap()
}

fn grow(to: Option<u64>, size: u64) -> Task {
    let mut update = BlkUpdate::new();
    update.size_bytes = size;
    Task::UpdateDisk {
        grow_to: to,
        size: 512,
        update,
    }
}

const DRAIN: Task = Task::Drain {
    limit: Duration::from_secs(30),
};

#[test]
fn requests_of_one_device_take_turns() {
    let mut bed = bed();
    for task in [Task::Stats, Task::Resume, Task::Stats] {
        bed.ask(task).unwrap();
    }
    bed.device_answers(empty);
    assert_eq!(bed.calls(), ["Stats"], "the second waits for the first");
    bed.readable().unwrap();
    bed.settle(empty);
    assert_eq!(bed.calls(), ["Resume", "Stats"]);
    let outcomes = bed.outcomes();
    let numbers: Vec<u32> = outcomes.iter().map(|(n, _)| *n).collect();
    assert_eq!(numbers, [1, 2, 3]);
    assert!(matches!(&outcomes[0].1, Ok(ApiResponse::DeviceStats(s)) if s.id == "root"));
    assert_eq!(bed.notices, [Notice::Resumed]);
}

#[test]
fn only_so_many_requests_wait() {
    let mut bed = bed();
    for _ in 0..MAX_WAITING + 2 {
        bed.ask(Task::Stats).unwrap();
    }
    let outcomes = bed.outcomes();
    assert_eq!(outcomes.len(), 1);
    let (number, Err(status)) = &outcomes[0] else {
        panic!("{outcomes:?}")
    };
    assert_eq!(*number as usize, MAX_WAITING + 2);
    assert_eq!(status.code, Code::ResourceExhausted);
}

#[test]
fn a_disk_grows_first_and_is_told_then() {
    let mut bed = bed();
    bed.ask(grow(Some(4096), 4096)).unwrap();
    assert_eq!(*bed.launcher.asked.borrow(), [("root".into(), 0, 4096)]);
    bed.device_answers(empty);
    assert!(bed.calls().is_empty(), "not before the file has grown");
    // Somebody else's ticket changes nothing.
    bed.turn(|c, turn| c.on_grown(7, Ok(4096), turn)).unwrap();
    bed.turn(|c, turn| c.on_grown(1, Ok(4096), turn)).unwrap();
    let mut told = 0;
    bed.settle(|_, payload| {
        told = UpdateRequest::parse_from_bytes(payload)
            .unwrap()
            .blk()
            .size_bytes;
        Ok(Vec::new())
    });
    assert_eq!((told, bed.calls()), (4096, vec!["Update".to_owned()]));
    assert!(
        matches!(&bed.outcomes()[..], [(1, Ok(ApiResponse::DiskUpdated(d)))] if d.size_bytes == 4096)
    );
    assert!(matches!(
        &bed.notices[..],
        [Notice::DiskUpdated { size: 4096, .. }]
    ));
}

#[test]
fn a_disk_that_cannot_grow_stays_as_it_is() {
    let refused = |prepare: &dyn Fn(&mut Bed)| {
        let mut bed = bed();
        prepare(&mut bed);
        bed.device_answers(empty);
        assert!(bed.calls().is_empty(), "the device was told");
        assert!(bed.notices.is_empty());
        match &bed.outcomes()[..] {
            [(1, Err(status))] => status.message.clone(),
            other => panic!("{other:?}"),
        }
    };
    let full = refused(&|bed| {
        bed.ask(grow(Some(4096), 4096)).unwrap();
        let error = Err("device root: no space".into());
        bed.turn(|c, turn| c.on_grown(1, error, turn)).unwrap();
    });
    assert_eq!(full, "device root: no space");
    let small = refused(&|bed| {
        bed.ask(grow(Some(4096), 4096)).unwrap();
        bed.turn(|c, turn| c.on_grown(1, Ok(1024), turn)).unwrap();
    });
    assert!(
        small.contains("has 1024 bytes and 4096 are wanted"),
        "{small}"
    );
    let busy = refused(&|bed| {
        bed.launcher.refuse = true;
        bed.ask(grow(Some(4096), 4096)).unwrap();
    });
    assert!(busy.contains("busy"), "{busy}");
    let stuck = refused(&|bed| {
        bed.ask(grow(Some(4096), 4096)).unwrap();
        bed.now += GROW_LIMIT;
        assert!(bed.control.next_timer().unwrap() <= bed.now);
        bed.timer().unwrap();
    });
    assert!(stuck.contains("in time"), "{stuck}");
}

#[test]
fn a_refusal_by_the_device_names_it_and_what_is_done_already() {
    let mut bed = bed();
    bed.ask(grow(Some(4096), 4096)).unwrap();
    bed.turn(|c, turn| c.on_grown(1, Ok(4096), turn)).unwrap();
    bed.settle(|_, _| Err(RpcStatus::failed_precondition("no\x1b[2J")));
    let outcomes = bed.outcomes();
    let [(1, Err(status))] = &outcomes[..] else {
        panic!("{outcomes:?}")
    };
    assert_eq!(status.code, Code::FailedPrecondition);
    assert!(status.message.starts_with("device root: no"), "{status:?}");
    assert!(status.message.contains("4096 bytes already"), "{status:?}");
    assert!(!status.message.contains('\x1b'));
    // And the next request is served.
    bed.ask(Task::Stats).unwrap();
    bed.settle(empty);
    assert!(matches!(&bed.outcomes()[..], [(2, Ok(_))]));
}

#[test]
fn limits_alone_grow_nothing() {
    let mut bed = bed();
    bed.ask(grow(None, 0)).unwrap();
    bed.settle(empty);
    assert!(bed.launcher.asked.borrow().is_empty());
    assert!(
        matches!(&bed.outcomes()[..], [(1, Ok(ApiResponse::DiskUpdated(d)))] if d.size_bytes == 512)
    );
}

#[test]
fn a_drain_asks_again_until_it_is_done() {
    let mut bed = bed();
    bed.ask(DRAIN).unwrap();
    let mut left = 5;
    loop {
        bed.settle(|_, _| {
            left -= 1;
            Ok(drained(left == 0))
        });
        if left == 0 {
            break;
        }
        let at = bed.control.next_timer().unwrap();
        assert!(at > bed.now, "it would spin");
        assert!(at <= bed.now + DRAIN_PAUSE_MAX);
        bed.timer().unwrap();
        bed.device_answers(|_, _| panic!("asked before the pause was over"));
        bed.now = at;
        bed.timer().unwrap();
    }
    assert_eq!(bed.calls(), ["Drain"; 5]);
    assert!(matches!(&bed.outcomes()[..], [(1, Ok(ApiResponse::Done))]));
    assert_eq!(bed.notices, [Notice::Drained]);
    assert_eq!(bed.control.next_timer(), None);
}

#[test]
fn a_drain_that_takes_too_long_is_taken_back() {
    let mut bed = bed();
    bed.ask(DRAIN).unwrap();
    let end = bed.now + Duration::from_secs(30);
    for _ in 0..10_000 {
        bed.settle(|_, _| Ok(drained(false)));
        let Some(at) = bed.control.next_timer() else {
            break;
        };
        assert!(at <= end);
        bed.now = at;
        bed.timer().unwrap();
    }
    assert_eq!(bed.now, end);
    assert_eq!(bed.calls().last().unwrap(), "Resume");
    let outcomes = bed.outcomes();
    let [(1, Err(status))] = &outcomes[..] else {
        panic!("{outcomes:?}")
    };
    assert_eq!(status.code, Code::DeadlineExceeded);
    assert!(
        status
            .message
            .starts_with("device root: not drained within 30000 ms")
    );
    assert_eq!(bed.notices, [Notice::DrainFailed]);
}

#[test]
fn a_device_that_cannot_resume_is_given_up() {
    let mut bed = bed();
    bed.ask(Task::Drain {
        limit: Duration::ZERO,
    })
    .unwrap();
    bed.device_answers(|_, _| Ok(drained(false)));
    bed.readable().unwrap();
    bed.device_answers(|method, _| {
        assert_eq!(method, "Resume");
        Err(RpcStatus::internal("stuck"))
    });
    let breach = bed.readable().unwrap_err().to_string();
    assert!(breach.starts_with("its process cannot resume"), "{breach}");
}

fn health(errors: [u64; 2], errno: i32, sector: u64) -> Vec<u8> {
    let mut response = HealthResponse::new();
    for count in errors {
        let mut ring = RingHealth::new();
        ring.host_errors = count;
        (ring.last_errno, ring.last_sector) = (errno, sector);
        response.rings.push(ring);
    }
    response.write_to_bytes().unwrap()
}

#[test]
fn errors_of_the_host_are_told_once() {
    let mut bed = bed();
    let look = |bed: &mut Bed, errors, errno, sector| {
        bed.control.ask_health().unwrap();
        bed.device_answers(|_, _| Ok(health(errors, errno, sector)));
        assert!(bed.readable().unwrap(), "nothing but the heartbeat");
        let mut notices = std::mem::take(&mut bed.notices);
        let well = Notice::Health {
            excused: vec![false; 2],
        };
        assert_eq!(notices.pop(), Some(well));
        notices
    };
    assert_eq!(look(&mut bed, [0, 0], 0, 0), []);
    let expected = Notice::HostErrors {
        count: 3,
        errno: libc::EIO,
        sector: 99,
    };
    assert_eq!(look(&mut bed, [0, 3], libc::EIO, 99), [expected]);
    assert_eq!(look(&mut bed, [0, 3], libc::EIO, 99), []);
    let expected = Notice::HostErrors {
        count: 2,
        errno: libc::ENOSPC,
        sector: 5,
    };
    assert_eq!(look(&mut bed, [1, 4], libc::ENOSPC, 5), [expected]);
    // A count that runs backwards is nothing new.
    assert_eq!(look(&mut bed, [0, 4], libc::ENOSPC, 5), []);
}

#[test]
fn health_is_not_asked_of_one_that_is_busy_but_before_its_next_request() {
    let answers = |method: &str, _: &[u8]| match method {
        "Health" => Ok(health([0, 0], 0, 0)),
        _ => Ok(Vec::new()),
    };
    let mut bed = bed();
    for _ in 0..3 {
        bed.ask(Task::Stats).unwrap();
    }
    bed.control.ask_health().unwrap();
    bed.settle(answers);
    assert_eq!(bed.calls(), ["Stats", "Health", "Stats", "Stats"]);
    bed.control.ask_health().unwrap();
    bed.control.ask_health().unwrap();
    bed.settle(|_, _| Ok(health([0, 0], 0, 0)));
    assert_eq!(bed.calls(), ["Health"], "one at a time");
}

#[test]
fn a_request_beside_a_heartbeat_is_no_heartbeat() {
    let mut bed = bed();
    bed.control.ask_health().unwrap();
    bed.ask(Task::Stats).unwrap();
    bed.device_answers(|method, _| match method {
        "Health" => Ok(health([0, 0], 0, 0)),
        _ => Ok(Vec::new()),
    });
    assert_eq!(bed.readable(), Ok(false));
}

#[test]
fn who_waits_is_told_why_the_device_is_given_up() {
    let mut bed = bed();
    bed.ask(Task::Stats).unwrap();
    bed.ask(DRAIN).unwrap();
    bed.control.give_up("its process ended (exit status 3)");
    bed.ask(Task::Resume).unwrap();
    let outcomes = bed.outcomes();
    assert_eq!(outcomes.len(), 3);
    for (_, outcome) in outcomes {
        let status = outcome.unwrap_err();
        assert_eq!(status.code, Code::Unavailable);
        assert_eq!(
            status.message,
            "device root: its process ended (exit status 3)"
        );
    }
    assert_eq!(bed.control.next_timer(), None);
    bed.control.ask_health().unwrap();
    bed.device_answers(empty);
    assert_eq!(bed.calls(), ["Stats"], "nothing more is asked of it");
}

#[test]
fn silence_is_a_breach_and_names_the_process() {
    let mut bed = bed();
    bed.control.ask_health().unwrap();
    bed.now = bed.control.next_timer().unwrap();
    assert_eq!(
        bed.timer().unwrap_err().to_string(),
        "its process gave no answer within 5 s"
    );
    // An update may take longer, and a manager that was held up gives the time back.
    let mut bed = self::bed();
    bed.ask(grow(None, 0)).unwrap();
    bed.now += CALL_LIMIT * 2;
    bed.timer().unwrap();
    bed.control.extend_deadlines(LONG);
    bed.now += UPDATE_LIMIT;
    bed.timer().unwrap();
    bed.now += LONG;
    assert!(bed.timer().is_err());
}

#[test]
fn what_cannot_be_true_is_a_breach() {
    let breach = |task: Option<Task>, answer: Answer| {
        let mut bed = bed();
        match task {
            Some(task) => bed.ask(task).unwrap(),
            None => bed.control.ask_health().unwrap(),
        }
        bed.device_answers(|_, _| answer.clone());
        let breach = bed.readable().unwrap_err().to_string();
        assert!(breach.starts_with("its process"), "{breach}");
        assert!(!breach.contains('\n'));
    };
    breach(None, Ok(vec![0xff]));
    breach(None, Err(RpcStatus::internal("x")));
    let mut rings = HealthResponse::new();
    rings.rings = vec![RingHealth::new(); 3];
    breach(None, Ok(rings.write_to_bytes().unwrap()));
    breach(Some(Task::Stats), Ok(vec![0xff]));
    breach(Some(DRAIN), Ok(vec![0xff]));
    breach(Some(Task::Stats), Ok(vec![0x0a; 3]));
}

#[test]
fn a_process_that_hangs_up_is_given_up() {
    let mut bed = bed();
    bed.ask(Task::Stats).unwrap();
    let (_, other) = UnixStream::pair().unwrap();
    bed.device = ControlServer::new(other, CONTROL_MAX_FRAME);
    assert_eq!(bed.readable().unwrap_err(), Breach::HungUp);
}

#[test]
fn what_a_device_wants_is_asked_beside_everything_else() {
    use bulkhead_proto::device::mem_request::Kind;
    let wants = |id: u64| -> Answer {
        let mut response = TakeRequestResponse::new();
        response.id = id;
        if id != 0 {
            let mut request = MemRequest::new();
            (request.kind, request.first, request.count) = (Kind::PLUG.into(), 3, 4);
            response.set_mem(request);
        }
        Ok(response.write_to_bytes().unwrap())
    };
    let mut bed = bed();
    // Not behind a drain that waits for it.
    bed.ask(Task::Drain { limit: LONG }).unwrap();
    bed.turn(|control, _| control.take_request()).unwrap();
    bed.turn(|control, _| control.take_request()).unwrap();
    bed.settle(|method, _| match method {
        "TakeRequest" => wants(7),
        _ => Ok(drained(false)),
    });
    assert_eq!(bed.calls(), ["Drain", "TakeRequest"]);
    assert!(
        matches!(&bed.notices[..], [Notice::Wants { id: 7, request }] if request.count == 4),
        "{:?}",
        bed.notices
    );
    bed.turn(|control, _| control.finish_request(7, Outcome::NACK))
        .unwrap();
    let mut finished = FinishRequestRequest::new();
    bed.settle(|_, payload| {
        finished = FinishRequestRequest::parse_from_bytes(payload).unwrap();
        Ok(Vec::new())
    });
    assert_eq!((finished.id, finished.outcome), (7, Outcome::NACK.into()));
    // It wanted nothing; asked twice, it is looked at twice.
    bed.notices.clear();
    bed.calls();
    bed.turn(|control, _| control.take_request()).unwrap();
    bed.turn(|control, _| control.take_request()).unwrap();
    bed.settle(|_, _| wants(0));
    assert_eq!(bed.calls(), ["TakeRequest", "TakeRequest"]);
    assert!(bed.notices.is_empty());
}

#[test]
fn a_device_that_wants_nonsense_or_takes_no_answer_is_given_up() {
    let mut nothing = TakeRequestResponse::new();
    nothing.id = 1;
    for answer in [
        Ok(nothing.write_to_bytes().unwrap()),
        Ok(vec![0xff]),
        Err(RpcStatus::internal("no")),
    ] {
        let mut bed = bed();
        bed.turn(|control, _| control.take_request()).unwrap();
        bed.device_answers(|_, _| answer.clone());
        assert!(matches!(bed.readable(), Err(Breach::Protocol(_))));
    }
    let mut bed = bed();
    bed.turn(|control, _| control.finish_request(1, Outcome::ACK))
        .unwrap();
    bed.device_answers(|_, _| Err(RpcStatus::invalid_argument("id")));
    assert!(matches!(bed.readable(), Err(Breach::Protocol(_))));
    let mut asks = HealthResponse::new();
    asks.asks = true;
    let mut bed = self::bed();
    bed.turn(|control, _| control.ask_health()).unwrap();
    bed.settle(|_, _| Ok(asks.write_to_bytes().unwrap()));
    assert!(bed.notices.contains(&Notice::Asks));
}

#[path = "control_gone_tests.rs"]
mod gone;
