//! The front-end against the `vhost` crate's back-end, and against back-ends that lie,
//! stall and flood.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use super::*;
use crate::vhost_user::test_backend::{FEATURES, Region, TestBackend};
use crate::vhost_user::transport::send_some;

const PATIENT: Duration = Duration::from_secs(30);
const HASTY: Duration = Duration::from_millis(100);

fn soon() -> Deadline {
    Deadline::after(PATIENT)
}

fn event() -> OwnedFd {
    rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap()
}

fn regions(count: u64) -> Vec<MemoryRegion> {
    let file = Arc::new(File::open("/dev/null").unwrap());
    (0..count)
        .map(|index| MemoryRegion {
            guest_base: index << 20,
            size: 1 << 20,
            file: Arc::clone(&file),
            file_offset: 0x1000 * index,
        })
        .collect()
}

#[test]
fn a_device_is_set_up_run_and_stopped() {
    let (backend, socket) = TestBackend::start(&[1, 2, 3, 4]);
    let mut frontend = Frontend::connect(socket, PATIENT).unwrap();
    assert_eq!(frontend.features(), FEATURES);
    assert_eq!(frontend.queue_limit(), Some(2));
    assert!(frontend.take_backend_channel().is_some());
    frontend.set_features(1 << 32, soon()).unwrap();
    frontend.set_mem_table(&regions(2), soon()).unwrap();
    frontend.set_vring_num(1, 128, soon()).unwrap();
    let ring = RingAddresses {
        descriptor: 0x10_0000,
        available: 0x10_2000,
        used: 0x10_4000,
    };
    frontend.set_vring_addr(1, ring, soon()).unwrap();
    frontend.set_vring_base(1, 5, soon()).unwrap();
    let (kick, call, error) = (event(), event(), event());
    frontend.set_vring_err(1, error.as_fd(), soon()).unwrap();
    frontend.set_vring_call(1, call.as_fd(), soon()).unwrap();
    frontend.set_vring_kick(1, kick.as_fd(), soon()).unwrap();
    frontend.set_vring_enable(1, true, soon()).unwrap();
    {
        let recorder = backend.lock();
        assert_eq!(recorder.features, 1 << 32 | 1 << 30);
        let base = 1 << 44;
        let expected = [(0, 0), (1 << 20, 0x1000)].map(|(guest, offset)| Region {
            guest,
            size: 1 << 20,
            user: base + guest,
            offset,
        });
        assert_eq!(recorder.regions, expected);
        let ring = &recorder.rings[1];
        assert_eq!((ring.size, ring.base, ring.enabled), (128, Some(5), true));
        let addresses = [base + 0x10_0000, base + 0x10_4000, base + 0x10_2000];
        assert_eq!(ring.addresses, Some(addresses));
        ring.call
            .as_ref()
            .unwrap()
            .write_all(&1_u64.to_ne_bytes())
            .unwrap();
    }
    let mut count = [0; 8];
    rustix::io::read(&call, &mut count).unwrap();
    assert_eq!(u64::from_ne_bytes(count), 1, "the same eventfd");
    assert_eq!(frontend.get_vring_base(1, soon()).unwrap(), 17);
    assert_eq!(frontend.get_config(4, soon()).unwrap(), [1, 2, 3, 4]);
    frontend.set_config(2, &[9], soon()).unwrap();
    assert_eq!(backend.lock().config, [1, 2, 9, 4]);
}

#[test]
fn a_refusal_is_an_answer_and_the_connection_lives_on() {
    let (backend, socket) = TestBackend::start(&[0; 4]);
    let mut frontend = Frontend::connect(socket, PATIENT).unwrap();
    backend.lock().refuse = Some("SET_VRING_NUM");
    let error = frontend.set_vring_num(0, 1, soon()).unwrap_err();
    assert!(
        matches!(error, VhostUserError::Refused("SET_VRING_NUM")),
        "{error}"
    );
    assert!(!error.is_fatal());
    frontend.set_vring_base(0, 0, soon()).unwrap();
    let error = frontend.get_config(200, soon()).unwrap_err();
    assert!(
        matches!(error, VhostUserError::Refused("GET_CONFIG")),
        "{error}"
    );
    assert_eq!(frontend.get_config(4, soon()).unwrap(), [0; 4]);
}

#[test]
fn what_the_protocol_cannot_say_is_refused_before_sending() {
    let (_backend, socket) = TestBackend::start(&[]);
    let mut frontend = Frontend::connect(socket, PATIENT).unwrap();
    for count in [0, 33] {
        let error = frontend.set_mem_table(&regions(count), soon()).unwrap_err();
        assert!(matches!(error, VhostUserError::Unencodable(_)), "{error}");
    }
    let error = frontend
        .set_vring_kick(256, event().as_fd(), soon())
        .unwrap_err();
    assert!(matches!(error, VhostUserError::Unencodable(_)), "{error}");
    let error = frontend.get_config(257, soon()).unwrap_err();
    assert!(matches!(error, VhostUserError::Unencodable(_)), "{error}");
    frontend.set_mem_table(&regions(32), soon()).unwrap();
}

/// A back-end without protocol features that answers GET_FEATURES, then runs `script`
/// when the next request is there.
fn hostile(script: impl FnOnce(&mut UnixStream) + Send + 'static) -> (Frontend, JoinHandle<()>) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || {
        // SET_OWNER, then GET_FEATURES.
        theirs.read_exact(&mut [0; 2 * HEADER_SIZE]).unwrap();
        theirs
            .write_all(&reply(1, &(1_u64 << 32).to_ne_bytes()))
            .unwrap();
        let mut header = [0; HEADER_SIZE];
        if theirs.read_exact(&mut header).is_ok() {
            let mut body = vec![0; Header::decode(&header).size as usize];
            theirs.read_exact(&mut body).unwrap();
            script(&mut theirs);
        }
    });
    (Frontend::connect(ours, PATIENT).unwrap(), thread)
}

fn reply(request: u32, body: &[u8]) -> Vec<u8> {
    let mut message = Header::reply(request, body.len() as u32).encode().to_vec();
    message.extend_from_slice(body);
    message
}

const GET_VRING_BASE: u32 = 11;

/// Asks for a ring's base, expects a fatal error, and that nothing is sent any more.
fn fails(script: impl FnOnce(&mut UnixStream) + Send + 'static) -> VhostUserError {
    fails_within(PATIENT, script)
}

fn fails_within(
    timeout: Duration,
    script: impl FnOnce(&mut UnixStream) + Send + 'static,
) -> VhostUserError {
    let (mut frontend, thread) = hostile(script);
    frontend.message_timeout = timeout;
    let error = frontend.get_vring_base(3, soon()).unwrap_err();
    assert!(error.is_fatal());
    let after = frontend.get_vring_base(3, soon()).unwrap_err();
    assert!(matches!(after, VhostUserError::Broken), "{after}");
    drop(frontend);
    thread.join().unwrap();
    error
}

/// Reads until the front-end has hung up.
fn linger(socket: &mut UnixStream) {
    while socket.read(&mut [0; 64]).is_ok_and(|count| count > 0) {}
}

#[test]
fn silence_ends_at_the_deadline() {
    let error = fails_within(HASTY, linger);
    assert!(
        matches!(error, VhostUserError::Timeout("GET_VRING_BASE")),
        "{error}"
    );
}

#[test]
fn a_drip_does_not_extend_the_deadline() {
    // A correct answer that takes twenty times a fifth of the deadline.
    let error = fails_within(HASTY, |socket| {
        for byte in reply(GET_VRING_BASE, &[3, 0, 0, 0, 0, 0, 0, 0]) {
            if socket.write_all(&[byte]).is_err() {
                break;
            }
            std::thread::sleep(HASTY / 5);
        }
    });
    assert!(matches!(error, VhostUserError::Timeout(_)), "{error}");
}

#[test]
fn a_back_end_that_does_not_read_ends_at_the_deadline() {
    let (mut frontend, thread) = hostile(|socket| {
        socket
            .write_all(&reply(GET_VRING_BASE, &[3, 0, 0, 0, 0, 0, 0, 0]))
            .unwrap();
        // Keeps the socket open, unread, until the other end is shut down.
        let mut fds = [rustix::event::PollFd::new(
            socket,
            rustix::event::PollFlags::RDHUP,
        )];
        rustix::event::poll(&mut fds, None).unwrap();
    });
    frontend.get_vring_base(3, soon()).unwrap();
    frontend.message_timeout = HASTY;
    let error = loop {
        if let Err(error) = frontend.set_vring_num(0, 1, soon()) {
            break error;
        }
    };
    assert!(
        matches!(error, VhostUserError::Timeout("SET_VRING_NUM")),
        "{error}"
    );
    // Its owner ends the connection.
    frontend.shut_down();
    thread.join().unwrap();
}

#[test]
fn an_oversize_reply_is_not_read() {
    let error = fails(|socket| {
        let header = Header::reply(GET_VRING_BASE, u32::MAX).encode();
        socket.write_all(&header).unwrap();
    });
    let violation = Violation::Oversize(u32::MAX, 8);
    assert!(
        matches!(error, VhostUserError::Violation(v) if v == violation),
        "{error}"
    );
}

#[test]
fn a_short_reply_is_a_violation() {
    let error = fails(|socket| {
        socket
            .write_all(&reply(GET_VRING_BASE, &[3, 0, 0, 0]))
            .unwrap()
    });
    let violation = Violation::WrongSize(4, 8);
    assert!(
        matches!(error, VhostUserError::Violation(v) if v == violation),
        "{error}"
    );
}

#[test]
fn a_reply_to_something_else_is_a_violation() {
    let error = fails(|socket| socket.write_all(&reply(1, &[0; 8])).unwrap());
    let violation = Violation::WrongReply {
        got: 1,
        expected: GET_VRING_BASE,
    };
    assert!(
        matches!(error, VhostUserError::Violation(v) if v == violation),
        "{error}"
    );
    let error = fails(|socket| {
        let message = reply(GET_VRING_BASE, &[4, 0, 0, 0, 0, 0, 0, 0]);
        socket.write_all(&message).unwrap();
    });
    assert!(
        matches!(error, VhostUserError::Violation(Violation::BadValue(_))),
        "another ring: {error}"
    );
    let error = fails(|socket| {
        let message = reply(GET_VRING_BASE, &[3, 0, 0, 0, 0, 0, 1, 0]);
        socket.write_all(&message).unwrap();
    });
    assert!(
        matches!(error, VhostUserError::Violation(Violation::BadValue(_))),
        "a base over 16 bits: {error}"
    );
}

#[test]
fn a_request_where_a_reply_belongs_is_a_violation() {
    let error = fails(|socket| {
        let header = Header::request(GET_VRING_BASE, 8, false).encode();
        socket.write_all(&header).unwrap();
    });
    assert!(
        matches!(error, VhostUserError::Violation(Violation::BadFlags(_))),
        "{error}"
    );
}

#[test]
fn surplus_descriptors_are_closed_and_a_violation() {
    for count in [1, 2, 20] {
        let (read_end, write_end) = std::io::pipe().unwrap();
        let error = fails(move |socket| {
            let message = reply(GET_VRING_BASE, &[3, 0, 0, 0, 0, 0, 0, 0]);
            let fds = vec![write_end.as_fd(); count];
            send_some(socket, &message, &fds).unwrap();
        });
        let surplus = matches!(error, VhostUserError::Violation(Violation::SurplusFds));
        assert!(surplus, "{count}: {error}");
        // Every copy is closed: the pipe has no writer left.
        let mut pipe = read_end;
        assert_eq!(pipe.read(&mut [0; 1]).unwrap(), 0);
    }
}

#[test]
fn a_hang_up_is_noticed_at_once() {
    let error = fails(|socket| socket.shutdown(Shutdown::Both).unwrap());
    assert!(matches!(error, VhostUserError::Closed), "{error}");
    let error = fails(|socket| {
        socket
            .write_all(&Header::reply(GET_VRING_BASE, 8).encode())
            .unwrap();
        socket.shutdown(Shutdown::Write).unwrap();
    });
    assert!(
        matches!(error, VhostUserError::Closed),
        "half a message: {error}"
    );
}

#[test]
fn half_a_socket_that_is_closed_is_as_good_as_a_hang_up() {
    // It reads on, but will never answer.
    let error = fails(|socket| {
        socket.shutdown(Shutdown::Write).unwrap();
        linger(socket);
    });
    assert!(matches!(error, VhostUserError::Closed), "{error}");
    // It answers, but will never hear of anything again.
    let (mut frontend, thread) = hostile(|socket| {
        socket.shutdown(Shutdown::Read).unwrap();
        socket
            .write_all(&reply(GET_VRING_BASE, &[3, 0, 0, 0, 9, 0, 0, 0]))
            .unwrap();
    });
    assert_eq!(frontend.get_vring_base(3, soon()).unwrap(), 9);
    let error = frontend.get_vring_base(3, soon()).unwrap_err();
    assert!(error.is_fatal(), "{error}");
    drop(frontend);
    thread.join().unwrap();
}

#[test]
fn a_silent_back_end_cannot_be_connected() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let error = Frontend::connect(ours, HASTY).err().unwrap();
    assert!(
        matches!(error, VhostUserError::Timeout("GET_FEATURES")),
        "{error}"
    );
}

mod any_reply {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Whatever comes back, the front-end ends with an error or a valid value.
        #[test]
        fn ends_in_a_value_or_an_error(
            flags in prop_oneof![Just(5_u32), any::<u32>()],
            request in prop_oneof![Just(GET_VRING_BASE), any::<u32>()],
            size in prop_oneof![Just(8_u32), 0_u32..32, any::<u32>()],
            body in proptest::collection::vec(any::<u8>(), 0..64),
        ) {
            let (mut frontend, thread) = hostile(move |socket| {
                for word in [request, flags, size] {
                    let _ = socket.write_all(&word.to_ne_bytes());
                }
                let _ = socket.write_all(&body);
            });
            match frontend.get_vring_base(3, soon()) {
                Ok(_) => prop_assert_eq!((request, size), (GET_VRING_BASE, 8)),
                Err(error) => prop_assert!(error.is_fatal()),
            }
            drop(frontend);
            thread.join().unwrap();
        }
    }
}
