//! Tests of the runtime as a whole, but for confinement: the poll loop, the control channel,
//! the vhost-user back-end and workers of a device kind made for the purpose, driven by
//! front-ends good and bad.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bulkhead_proto::device::{
    ResumeRequest, ResumeResponse, StatsRequest, StatsResponse, UpdateRequest, UpdateResponse,
};
use bulkhead_proto::{ClientError, Code};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{
    FrontendReq, VhostUserInflight, VhostUserProtocolFeatures as Protocol,
};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::ServeError;
use crate::driver::USER_BASE;
use crate::sys;

#[path = "testbed.rs"]
mod testbed;
use testbed::{
    FEATURES, GPA, Guest, Knobs, PATIENCE, RAM, Runtime, SIZE, fired, front_end, reset, start_ring,
    started, wait_for,
};

/// A front-end message by message, in whatever order.
struct Raw(UnixStream);

impl Raw {
    fn send(&self, request: FrontendReq, flags: u32, body: &[u8], fds: &[RawFd]) {
        let size = u32::try_from(body.len()).unwrap();
        let words = [request as u32, 1 | flags, size];
        let mut bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        bytes.extend(body);
        assert_eq!(
            self.0.send_with_fds(&[bytes.as_slice()], fds).unwrap(),
            bytes.len()
        );
    }

    fn say(&self, request: FrontendReq, body: &[u8], fds: &[RawFd]) {
        self.send(request, 0, body, fds);
    }

    fn reply(&mut self, request: FrontendReq) -> u64 {
        self.0.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut reply = [0; 20];
        self.0.read_exact(&mut reply).unwrap();
        assert_eq!(reply[..4], (request as u32).to_le_bytes());
        assert_eq!(reply[4..12], [5, 0, 0, 0, 8, 0, 0, 0], "a reply of 8 bytes");
        u64::from_le_bytes(*reply.last_chunk().unwrap())
    }

    fn ask(&mut self, request: FrontendReq) -> u64 {
        self.say(request, &[], &[]);
        self.reply(request)
    }

    fn acknowledged(&mut self, request: FrontendReq, body: &[u8]) -> u64 {
        self.send(request, 8, body, &[]);
        self.reply(request)
    }

    /// The setup of one queue, as QEMU does it when the driver is ready.
    fn start_queue(&self, guest: &Guest, index: u32) {
        let i = index as usize;
        let l = guest.rings[i].layout();
        self.say(
            FrontendReq::SET_VRING_NUM,
            &state(index, u32::from(SIZE)),
            &[],
        );
        self.say(FrontendReq::SET_VRING_BASE, &state(index, 0), &[]);
        let mut addr = state(index, 0);
        for a in [l.desc, l.used, l.avail, 0] {
            addr.extend(a.to_le_bytes());
        }
        self.say(FrontendReq::SET_VRING_ADDR, &addr, &[]);
        let number = u64::from(index).to_le_bytes();
        self.say(
            FrontendReq::SET_VRING_KICK,
            &number,
            &[guest.kicks[i].as_raw_fd()],
        );
        self.say(
            FrontendReq::SET_VRING_CALL,
            &number,
            &[guest.calls[i].as_raw_fd()],
        );
    }
}

fn state(index: u32, num: u32) -> Vec<u8> {
    [index, num].iter().flat_map(|w| w.to_le_bytes()).collect()
}

#[test]
fn qemu_s_network_front_end_is_served_in_its_own_order() {
    let (runtime, socket) = Runtime::start(4);
    let mut guest = Guest::new(4);
    let mut qemu = Raw(socket);
    use FrontendReq as Q;
    // When the chardev connects, once for each pair of queues.
    for pair in 0..2u32 {
        assert_eq!(qemu.ask(Q::GET_FEATURES) & FEATURES, FEATURES);
        if pair == 0 {
            let protocol = qemu.ask(Q::GET_PROTOCOL_FEATURES);
            let wanted = Protocol::MQ | Protocol::REPLY_ACK | Protocol::BACKEND_REQ;
            assert_eq!(protocol & wanted.bits(), wanted.bits());
            qemu.say(Q::SET_PROTOCOL_FEATURES, &wanted.bits().to_le_bytes(), &[]);
            assert_eq!(qemu.ask(Q::GET_QUEUE_NUM), 4);
            let (_ours, theirs) = UnixStream::pair().unwrap();
            qemu.send(Q::SET_BACKEND_REQ_FD, 8, &[], &[theirs.as_raw_fd()]);
            assert_eq!(qemu.reply(Q::SET_BACKEND_REQ_FD), 0);
        }
        qemu.say(Q::SET_OWNER, &[], &[]);
        qemu.ask(Q::GET_FEATURES);
        for queue in 2 * pair..2 * pair + 2 {
            let number = u64::from(queue).to_le_bytes();
            let call = guest.calls[queue as usize].as_raw_fd();
            qemu.say(Q::SET_VRING_CALL, &number, &[call]);
        }
        // Before any SET_FEATURES.
        for queue in 2 * pair..2 * pair + 2 {
            qemu.say(
                Q::SET_VRING_ENABLE,
                &state(queue, u32::from(pair == 0)),
                &[],
            );
        }
    }
    assert_eq!(qemu.acknowledged(Q::SET_VRING_ENABLE, &state(2, 1)), 0);
    assert_eq!(qemu.acknowledged(Q::SET_VRING_ENABLE, &state(3, 1)), 0);
    // When the driver is ready, again for each pair, while the pair before it runs.
    for pair in 0..2u32 {
        for queue in 2 * pair..2 * pair + 2 {
            qemu.say(Q::SET_VRING_ENABLE, &state(queue, 1), &[]);
        }
        qemu.say(Q::SET_FEATURES, &FEATURES.to_le_bytes(), &[]);
        let mut table: Vec<u8> = state(1, 0);
        for word in [GPA, RAM, USER_BASE + GPA, 0] {
            table.extend(word.to_le_bytes());
        }
        qemu.say(Q::SET_MEM_TABLE, &table, &[guest.file.as_raw_fd()]);
        for queue in 2 * pair..2 * pair + 2 {
            qemu.start_queue(&guest, queue);
            guest.offer(queue as usize, 3);
            assert_eq!(guest.completed(queue as usize), 3);
        }
        guest.offer(0, 1 + pair as u16);
        assert_eq!(guest.completed(0), 1 + pair);
    }
    assert_eq!(*runtime.knobs.accepted.lock().unwrap(), [FEATURES]);
    // The guest is done.
    qemu.say(Q::SET_VRING_ENABLE, &state(0, 0), &[]);
    qemu.say(Q::GET_VRING_BASE, &state(0, 0), &[]);
    assert_eq!(qemu.reply(Q::GET_VRING_BASE), 3 << 32);
    drop(qemu);
    let knobs = Arc::clone(&runtime.knobs);
    runtime.end().unwrap();
    assert_eq!(*knobs.accepted.lock().unwrap(), [FEATURES, 0]);
    drop(guest.memory);
}

#[test]
fn messages_that_are_handled_here_are_checked() {
    use FrontendReq as Q;
    let eventfd = sys::eventfd().unwrap();
    let fd = eventfd.as_raw_fd();
    let (one, _other) = UnixStream::pair().unwrap();
    let socket = one.as_raw_fd();
    let protocol = Protocol::BACKEND_REQ | Protocol::INFLIGHT_SHMFD;
    let protocol = protocol.bits().to_le_bytes();
    type Bad<'a> = (&'a str, Q, u32, Vec<u8>, Vec<RawFd>);
    let wanted = |queues: u16, queue_size: u16, padding: usize| {
        let mut body = vec![0; 16];
        body.extend(queues.to_le_bytes());
        body.extend(queue_size.to_le_bytes());
        body.resize(20 + padding, 0);
        body
    };
    let bad: [Bad<'_>; 15] = [
        (
            "neither on nor off",
            Q::SET_VRING_ENABLE,
            0,
            state(0, 2),
            vec![],
        ),
        ("no such ring", Q::SET_VRING_ENABLE, 0, state(1, 1), vec![]),
        ("a short body", Q::SET_VRING_ENABLE, 0, vec![0; 4], vec![]),
        ("a long body", Q::SET_VRING_ENABLE, 0, vec![0; 4000], vec![]),
        (
            "a stray descriptor",
            Q::SET_VRING_ENABLE,
            0,
            state(0, 1),
            vec![fd],
        ),
        ("a reply", Q::SET_VRING_ENABLE, 4, state(0, 1), vec![]),
        (
            "another version",
            Q::SET_VRING_ENABLE,
            2,
            state(0, 1),
            vec![],
        ),
        ("no socket", Q::SET_BACKEND_REQ_FD, 0, vec![], vec![]),
        (
            "two sockets",
            Q::SET_BACKEND_REQ_FD,
            0,
            vec![],
            vec![socket; 2],
        ),
        ("no queues", Q::GET_INFLIGHT_FD, 0, wanted(0, 8, 4), vec![]),
        (
            "too many queues",
            Q::GET_INFLIGHT_FD,
            0,
            wanted(2, 8, 4),
            vec![],
        ),
        (
            "no descriptors",
            Q::GET_INFLIGHT_FD,
            0,
            wanted(1, 0, 4),
            vec![],
        ),
        (
            "too many descriptors",
            Q::GET_INFLIGHT_FD,
            0,
            wanted(1, 1025, 4),
            vec![],
        ),
        (
            "an odd body",
            Q::GET_INFLIGHT_FD,
            0,
            wanted(1, 8, 5),
            vec![],
        ),
        ("half a body", Q::GET_INFLIGHT_FD, 0, vec![0; 19], vec![]),
    ];
    for (what, request, flags, body, fds) in bad {
        let (runtime, socket) = Runtime::start(1);
        let raw = Raw(socket);
        raw.say(Q::SET_PROTOCOL_FEATURES, &protocol, &[]);
        raw.send(request, flags, &body, &fds);
        assert!(
            matches!(runtime.end(), Err(ServeError::Channel(_))),
            "{what}"
        );
    }
    // Not negotiated.
    for (request, body, fds) in [
        (Q::SET_BACKEND_REQ_FD, vec![], vec![socket]),
        (Q::GET_INFLIGHT_FD, wanted(1, 8, 4), vec![]),
    ] {
        let (runtime, stream) = Runtime::start(1);
        Raw(stream).say(request, &body, &fds);
        assert!(matches!(runtime.end(), Err(ServeError::Channel(_))));
    }
}

#[test]
fn an_update_is_served_while_an_order_is_outstanding() {
    let (mut runtime, socket) = Runtime::start(2);
    let mut f = front_end(socket, 2);
    let mut guest = started(&mut f, 2);
    runtime.knobs.completes.store(false, Ordering::Relaxed);
    guest.offer(0, 4);
    wait_for("the request to be in flight", || {
        runtime.health().rings[0].in_flight == 1
    });
    // The front-end stops the ring; the worker cannot answer yet.
    let stopping = std::thread::spawn(move || (f.get_vring_base(0).unwrap(), f));
    let seen = runtime.knobs.refreshed.load(Ordering::Relaxed);
    for size in 1..=20u64 {
        runtime.resize(size);
        let knobs = Arc::clone(&runtime.knobs);
        wait_for("both workers to look again", || {
            knobs.refreshed.load(Ordering::Relaxed) >= seen + 2
        });
    }
    assert_eq!(runtime.knobs.size.load(Ordering::Relaxed), 20);
    let refused = runtime.try_call::<_, UpdateResponse>("Update", &UpdateRequest::new());
    match refused {
        Err(ClientError::Status(s)) => assert_eq!(s.code, Code::InvalidArgument),
        other => panic!("{other:?}"),
    }
    assert!(!stopping.is_finished());
    runtime.knobs.completes.store(true, Ordering::Relaxed);
    let (base, mut f) = stopping.join().unwrap();
    assert_eq!((base, guest.completed(0)), (1, 4));
    start_ring(&mut f, &guest, 0, 1);
    guest.offer(0, 2);
    assert_eq!(guest.completed(0), 2);
    runtime.shut_down();
}

#[test]
fn a_drained_device_takes_nothing_until_it_is_resumed() {
    let (mut runtime, socket) = Runtime::start(2);
    assert!(runtime.drain(), "no ring is served yet");
    let _: ResumeResponse = runtime.call("Resume", &ResumeRequest::new());
    let mut f = front_end(socket, 2);
    let mut guest = started(&mut f, 2);
    runtime.knobs.completes.store(false, Ordering::Relaxed);
    guest.offer(1, 4);
    wait_for("the request to be in flight", || {
        runtime.health().rings[1].in_flight == 1
    });
    for _ in 0..5 {
        assert!(!runtime.drain(), "one is in flight");
    }
    runtime.knobs.completes.store(true, Ordering::Relaxed);
    wait_for("the drain", || runtime.drain());
    assert_eq!(guest.completed(1), 4);
    guest.offer(0, 1);
    guest.offer(1, 5);
    // A ring that starts meanwhile is paused as well.
    assert_eq!(f.get_vring_base(0).unwrap(), 0);
    start_ring(&mut f, &guest, 0, 0);
    for _ in 0..5 {
        assert!(runtime.drain());
        std::thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(guest.rings[0].take_used(), None);
    assert_eq!(guest.rings[1].take_used(), None);
    let _: ResumeResponse = runtime.call("Resume", &ResumeRequest::new());
    // Without another kick.
    assert_eq!((guest.completed(0), guest.completed(1)), (1, 5));
    wait_for("the counters", || {
        let stats: StatsResponse = runtime.call("Stats", &StatsRequest::new());
        stats.queues[1].requests == 2 && stats.queues[1].latency_us_log2[3] == 2
    });
    runtime.shut_down();
}

#[test]
fn a_changed_configuration_is_told_once_a_ring_runs() {
    let (mut runtime, socket) = Runtime::start(1);
    let mut f = front_end(socket, 1);
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    f.set_backend_request_fd(&theirs).unwrap();
    drop(theirs);
    runtime.resize(1000);
    // The device is suspended: nothing is said (but the order of messages is certain only
    // after one more on the other channel).
    runtime.health();
    ours.set_nonblocking(true).unwrap();
    assert!(ours.read(&mut [0; 12]).is_err());
    ours.set_nonblocking(false).unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    let _guest = started(&mut f, 1);
    let mut message = [0; 12];
    let expected = [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
    ours.read_exact(&mut message).unwrap();
    assert_eq!(message, expected);
    runtime.resize(2000);
    ours.read_exact(&mut message).unwrap();
    assert_eq!(message, expected);
    runtime.resize(2000);
    runtime.health();
    ours.set_nonblocking(true).unwrap();
    assert!(ours.read(&mut message).is_err(), "it did not change");
    runtime.shut_down();
}

#[test]
fn features_are_told_to_the_device_when_no_ring_runs() {
    let (runtime, socket) = Runtime::start(1);
    let mut f = front_end(socket, 1);
    let mut guest = started(&mut f, 1);
    f.set_features(FEATURES).unwrap();
    guest.offer(0, 1);
    assert_eq!(guest.completed(0), 1);
    // Others, while a ring runs: it stops and goes on.
    f.set_features(FEATURES | 1).unwrap();
    guest.offer(0, 2);
    assert_eq!(guest.completed(0), 2);
    f.reset_device().unwrap();
    let seen = runtime.knobs.accepted.lock().unwrap().clone();
    assert_eq!(seen, [FEATURES, FEATURES | 1, 0]);
    runtime.shut_down();
}

#[test]
fn requests_in_flight_are_taken_over_from_the_region() {
    let mut guest = Guest::new(2);
    let description = VhostUserInflight::new(0, 0, 2, SIZE);
    // A process that takes requests and does none of them.
    let (mut dead, socket) = Runtime::start(2);
    dead.knobs.completes.store(false, Ordering::Relaxed);
    let mut f = front_end(socket, 2);
    let (region, file) = f.get_inflight_fd(&description).unwrap();
    assert_eq!((region.mmap_offset, region.mmap_size), (0, 2 * 192));
    f.set_inflight_fd(&region, file.as_raw_fd()).unwrap();
    f.set_mem_table(&[guest.region()]).unwrap();
    for queue in 0..2 {
        start_ring(&mut f, &guest, queue, 0);
        for head in [6, 1, 4] {
            guest.offer(queue, head);
        }
    }
    wait_for("the requests to be in flight", || {
        dead.health().rings.iter().all(|r| r.in_flight == 3)
    });
    dead.knobs.killed.store(true, Ordering::Relaxed);
    wait_for("its end", || dead.knobs.dead.load(Ordering::Relaxed) == 2);
    // While rings run there is no other region. (Tried elsewhere: the connection ends.)
    let (runtime, socket) = Runtime::start(2);
    let mut refused = front_end(socket, 2);
    let _running = started(&mut refused, 2);
    assert!(refused.get_inflight_fd(&description).is_err());
    assert!(matches!(runtime.end(), Err(ServeError::Channel(_))));

    let (mut next, socket) = Runtime::start(2);
    assert!(next.drain());
    let mut f = front_end(socket, 2);
    f.set_inflight_fd(&region, file.as_raw_fd()).unwrap();
    f.set_mem_table(&[guest.region()]).unwrap();
    guest.offer(0, 2);
    fired(&guest.calls[0]);
    // The base does not matter.
    start_ring(&mut f, &guest, 0, 77);
    // Although it is paused: they were in flight before.
    for head in [6, 1, 4] {
        assert_eq!(guest.completed(0), head);
    }
    assert!(fired(&guest.calls[0]));
    wait_for("the drain", || next.drain());
    assert_eq!(guest.rings[0].take_used(), None);
    let _: ResumeResponse = next.call("Resume", &ResumeRequest::new());
    assert_eq!(guest.completed(0), 2);
    // A region that was tampered with: that ring is broken, and says so; not the other one.
    file.write_all_at(&[9], 192 + 10).unwrap();
    f.set_vring_num(1, SIZE).unwrap();
    start_ring(&mut f, &guest, 1, 0);
    assert!(fired(&guest.errs[1]));
    let rings = next.health().rings;
    assert!(rings[1].broken && !rings[0].broken);
    assert_eq!(guest.rings[1].take_used(), None, "not obeyed");
    guest.offer(0, 3);
    assert_eq!(guest.completed(0), 3);
    // The driver resets it, and the front-end gives it a new region.
    assert_eq!(f.get_vring_base(0).unwrap(), 5);
    f.get_vring_base(1).unwrap();
    let (region, file) = f.get_inflight_fd(&description).unwrap();
    f.set_inflight_fd(&region, file.as_raw_fd()).unwrap();
    reset(&mut guest.rings[1]);
    start_ring(&mut f, &guest, 1, 0);
    guest.offer(1, 7);
    assert_eq!(guest.completed(1), 7);
    next.shut_down();
}

#[test]
fn the_fence_falls_with_the_last_worker_that_holds_it() {
    let (mut reader, writer) = std::io::pipe().unwrap();
    assert!(sys::is_pipe_writer(writer.as_fd()));
    assert!(!sys::is_pipe_writer(reader.as_fd()));
    let knobs = Knobs {
        takes_fence: true,
        ..Knobs::default()
    };
    let (runtime, _socket) = Runtime::start_with(3, knobs, Some(writer.into()));
    let held = std::mem::take(&mut *runtime.knobs.fences.lock().unwrap());
    assert_eq!(held.len(), 3);
    for fence in held {
        assert!(!sys::wait_readable(&reader, 0).unwrap());
        drop(fence);
    }
    assert!(sys::wait_readable(&reader, 0).unwrap());
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    runtime.shut_down();
}

#[test]
fn a_ring_in_io_uring_holds_the_fence_on_its_own() {
    use bulkhead_seccomp::uring::{self, RingSpec};
    let (reader, writer) = std::io::pipe().unwrap();
    let ring = uring::restricted(&RingSpec {
        entries: 1,
        opcodes: &[],
        files: &[writer.as_raw_fd()],
        spare_files: 0,
    });
    let Ok(ring) = ring else {
        // This host has none: then no worker has one either.
        return;
    };
    drop(writer);
    assert!(!sys::wait_readable(&reader, 50).unwrap());
    drop(ring);
    // The kernel takes rings down in its own time.
    let patience = i32::try_from(PATIENCE.as_millis()).unwrap();
    assert!(sys::wait_readable(&reader, patience).unwrap());
}
