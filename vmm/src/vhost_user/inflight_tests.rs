//! Answers about the log of requests in flight, from back-ends that are honest and others.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use proptest::prelude::*;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::*;
use crate::vhost_user::test_backend::{TestBackend, sealed_memfd};
use crate::vhost_user::transport::send_some;
use crate::vhost_user::wire::{HEADER_SIZE, Header};

const PATIENT: Duration = Duration::from_secs(30);
const ASKED: Geometry = Geometry {
    queues: 2,
    queue_size: 64,
};
const SIZE: u64 = 2 * (16 + 16 * 64);

fn soon() -> Deadline {
    Deadline::after(PATIENT)
}

fn reply(size: u64, offset: u64) -> Vec<u8> {
    InflightRegion::description(size, offset, ASKED)
}

fn unsealed(size: u64) -> OwnedFd {
    let file = memfd_create(c"inflight", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, size).unwrap();
    file
}

#[test]
fn a_region_is_made_by_one_back_end_and_handed_to_the_next() {
    let (_first, socket) = TestBackend::start(&[]);
    let mut frontend = Frontend::connect(socket, PATIENT).unwrap();
    assert!(frontend.has_inflight());
    let region = frontend.get_inflight_fd(ASKED, false, soon()).unwrap();
    assert_eq!(region.geometry(), ASKED);
    let (second, socket) = TestBackend::start(&[]);
    let mut frontend = Frontend::connect(socket, PATIENT).unwrap();
    frontend.set_inflight_fd(&region, soon()).unwrap();
    let recorder = second.lock();
    let (said, file) = recorder.inflight.as_ref().unwrap();
    let said = (said.num_queues, said.queue_size, said.mmap_size);
    assert_eq!(said, (2, 64, region.size));
    use std::os::unix::fs::MetadataExt;
    let inode = |file: &File| file.metadata().unwrap().ino();
    assert_eq!(inode(file), inode(&region.file));
}

#[test]
fn requests_in_flight_are_counted_whatever_stands_there() {
    let file = sealed_memfd(SIZE + 64);
    let at =
        |queue: u64, entry: u64| queue * (16 + 16 * 64u64).next_multiple_of(64) + 16 + 16 * entry;
    for (queue, entry) in [(0, 0), (0, 63), (1, 7)] {
        file.write_all_at(&[1], at(queue, entry)).unwrap();
    }
    // Neither 0 nor 1: no request of ours.
    file.write_all_at(&[0xff], at(1, 8)).unwrap();
    let region = |size, offset| InflightRegion {
        file: file.try_clone().unwrap(),
        size,
        offset,
        geometry: ASKED,
    };
    assert_eq!(region(SIZE, 0).in_flight(), 3);
    assert_eq!(region(SIZE, u64::MAX - 8).in_flight(), 0, "out of its file");
}

#[test]
fn only_a_sealed_memfd_that_is_large_enough_is_kept() {
    let check = |reply: &[u8], fd, unsealed| {
        InflightRegion::check(reply, fd, ASKED, unsealed).map_err(|violation| match violation {
            Violation::BadValue(what) => what,
            other => panic!("{other:?}"),
        })
    };
    let memfd = |size| Some(OwnedFd::from(sealed_memfd(size)));
    assert!(check(&reply(SIZE, 0), memfd(SIZE), false).is_ok());
    assert!(check(&reply(SIZE, PAGE), memfd(SIZE + PAGE), false).is_ok());
    assert!(check(&reply(SIZE, 0), Some(unsealed(SIZE)), true).is_ok());
    let why = check(&reply(SIZE, 0), Some(unsealed(SIZE)), false).unwrap_err();
    assert!(why.contains("sealed"), "{why}");
    let why = check(&reply(SIZE, 0), memfd(SIZE - 1), false).unwrap_err();
    assert!(why.contains("larger than its file"), "{why}");
    let why = check(&reply(SIZE, PAGE), memfd(SIZE), false).unwrap_err();
    assert!(why.contains("larger than its file"), "{why}");
    let why = check(&reply(SIZE, 8), memfd(1 << 20), false).unwrap_err();
    assert!(why.contains("offset"), "{why}");
    let why = check(&reply(SIZE, 0), None, false).unwrap_err();
    assert!(why.contains("no descriptor"), "{why}");
    for size in [1, SIZE - 1, 32 << 20, u64::MAX] {
        let why = check(&reply(size, 0), memfd(64 << 20), false).unwrap_err();
        assert!(
            why.contains("size of the in-flight region"),
            "{size}: {why}"
        );
    }
    let mut other = reply(SIZE, 0);
    other[16] = 3;
    let why = check(&other, memfd(SIZE), false).unwrap_err();
    assert!(why.contains("number or size"), "{why}");

    let (pipe, _writer) = std::io::pipe().unwrap();
    let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    let device = File::open("/dev/null").unwrap();
    for fd in [pipe.into(), event, device.into()] {
        let why = check(&reply(SIZE, 0), Some(fd), true).unwrap_err();
        assert!(why.contains("no memfd"), "{why}");
    }
    // The largest machine there is.
    let most = Geometry {
        queues: 255,
        queue_size: 1024,
    };
    let size = 255 * (16 + 16 * 1024);
    let reply = InflightRegion::description(size, 0, most);
    assert!(InflightRegion::check(&reply, memfd(size), most, false).is_ok());
}

/// A front-end whose back-end answers GET_INFLIGHT_FD with `body` and so many descriptors.
fn answered(body: &'static [u8], fds: usize) -> VhostUserError {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || {
        let answer = |theirs: &mut UnixStream, request: u32, value: u64| {
            let mut message = Header::reply(request, 8).encode().to_vec();
            message.extend(value.to_ne_bytes());
            theirs.write_all(&message).unwrap();
        };
        // SET_OWNER, GET_FEATURES, GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES.
        theirs.read_exact(&mut [0; 2 * HEADER_SIZE]).unwrap();
        answer(&mut theirs, 1, 1 << 32 | 1 << 30);
        theirs.read_exact(&mut [0; HEADER_SIZE]).unwrap();
        answer(&mut theirs, 15, 1 << 12);
        theirs.read_exact(&mut [0; HEADER_SIZE + 8]).unwrap();
        theirs.read_exact(&mut [0; HEADER_SIZE + 24]).unwrap();
        let size = u32::try_from(body.len()).unwrap();
        let mut message = Header::reply(31, size).encode().to_vec();
        message.extend(body);
        let file = sealed_memfd(1 << 20);
        send_some(&theirs, &message, &vec![file.as_fd(); fds]).unwrap();
        while theirs.read(&mut [0; 64]).is_ok_and(|count| count > 0) {}
    });
    let mut frontend = Frontend::connect(ours, PATIENT).unwrap();
    let error = frontend.get_inflight_fd(ASKED, false, soon()).unwrap_err();
    drop(frontend);
    thread.join().unwrap();
    error
}

#[test]
fn answers_of_another_size_and_surplus_descriptors_are_violations() {
    for (body, fds) in [(&[0; 23][..], 1), (&[], 1), (&[], 0), (&[0; 20], 0)] {
        let error = answered(body, fds);
        assert!(
            matches!(error, VhostUserError::Violation(Violation::WrongSize(..))),
            "{body:?} {fds}: {error}"
        );
    }
    let error = answered(&[0; 25], 1);
    let oversize = matches!(
        error,
        VhostUserError::Violation(Violation::Oversize(25, 24))
    );
    assert!(oversize, "{error}");
    for fds in [2, 3, 20] {
        let error = answered(&[0; 24], fds);
        let surplus = matches!(error, VhostUserError::Violation(Violation::SurplusFds));
        assert!(surplus, "{fds}: {error}");
    }
    let error = answered(&[0; 24], 0);
    assert!(
        matches!(error, VhostUserError::Refused("GET_INFLIGHT_FD")),
        "it could not make one: {error}"
    );
    let error = answered(&[0; 24], 1);
    assert!(error.is_fatal(), "{error}");
}

proptest! {
    /// What is kept can be mapped: inside its file, a page boundary, a bounded size.
    #[test]
    fn what_is_kept_can_be_mapped(
        words in any::<[u64; 3]>(),
        size in prop_oneof![Just(None), (0_u64..20_000).prop_map(Some)],
        offset in prop_oneof![Just(None), (0_u64..4).prop_map(|page| Some(page * PAGE))],
        honest in any::<bool>(),
        length in 0_u64..40_000,
    ) {
        let mut reply = words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<_>>();
        if let Some(size) = size {
            reply[..8].copy_from_slice(&size.to_ne_bytes());
        }
        if let Some(offset) = offset {
            reply[8..16].copy_from_slice(&offset.to_ne_bytes());
        }
        if honest {
            reply[16..18].copy_from_slice(&ASKED.queues.to_ne_bytes());
            reply[18..20].copy_from_slice(&ASKED.queue_size.to_ne_bytes());
        }
        let fd = Some(sealed_memfd(length).into());
        if let Ok(region) = InflightRegion::check(&reply, fd, ASKED, false) {
            prop_assert!(honest);
            prop_assert!(region.offset % PAGE == 0 && region.size >= SIZE);
            prop_assert!(region.offset + region.size <= length);
        }
    }
}
