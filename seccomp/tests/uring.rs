//! Restricted rings, tried from inside: every operation that the kernel knows, descriptors that
//! are not registered, registrations that are not allowed.
//!
//! On a host without io_uring there is nothing to try: the tests say so and pass, and
//! `unavailability_is_told` is the one that looks at the fallback.
#![allow(unsafe_code)] // Entries are submitted bare.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // A test says so by panicking.

use bulkhead_seccomp::uring::{self, RestrictedRing, RingSpec};
use io_uring::{opcode, squeue, types};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

const OPCODES: &[u8] = &[
    opcode::Read::CODE,
    opcode::Write::CODE,
    opcode::Fsync::CODE,
    opcode::PollAdd::CODE,
];

/// Highest opcode tried: an entry has a byte for it.
const LAST_TRIED: u8 = u8::MAX;

fn file(text: &str) -> File {
    // SAFETY: the name is a string that lives forever; the answer is a new descriptor or -1.
    let fd = unsafe { libc::memfd_create(c"disk".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0);
    // SAFETY: it was just made, and nobody else has it.
    let mut file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.write_all(text.as_bytes()).unwrap();
    file
}

fn ring(files: &[&File], spare_files: u32) -> Option<RestrictedRing> {
    if let Err(e) = uring::available() {
        assert!(e.is_unavailable(), "{e}");
        eprintln!("skipped: {e}");
        return None;
    }
    let files: Vec<_> = files.iter().map(|f| f.as_raw_fd()).collect();
    let ring = uring::restricted(&RingSpec {
        entries: 8,
        opcodes: OPCODES,
        files: &files,
        spare_files,
    });
    Some(ring.unwrap())
}

/// Submits one entry and waits for its result.
fn submit(ring: &mut RestrictedRing, entry: &squeue::Entry) -> i32 {
    // SAFETY: buffers of entries in this file live until the result is there.
    unsafe { ring.ring.submission().push(entry) }.unwrap();
    ring.ring.submit_and_wait(1).unwrap();
    ring.ring.completion().next().unwrap().result()
}

fn fixed(entry: squeue::Entry) -> squeue::Entry {
    entry.flags(squeue::Flags::FIXED_FILE)
}

/// An entry of any opcode: `struct io_uring_sqe` with the first byte set. All else is zero:
/// no buffer, no length, file 0.
fn bare(code: u8, flags: u8) -> squeue::Entry {
    let mut bytes = [0_u8; 64];
    bytes[0] = code;
    bytes[1] = flags;
    // SAFETY: an entry is 64 bytes of integers, any of which may have any value.
    unsafe { std::mem::transmute(bytes) }
}

#[test]
fn listed_operations_on_registered_files_work() {
    let disk = file("sector");
    let Some(mut ring) = ring(&[&disk], 0) else {
        return;
    };
    let mut buffer = [0_u8; 16];
    let read = opcode::Read::new(types::Fixed(0), buffer.as_mut_ptr(), 16).build();
    assert_eq!(submit(&mut ring, &fixed(read)), 6);
    assert_eq!(&buffer[..6], b"sector");
    let write = opcode::Write::new(types::Fixed(0), b"SECT".as_ptr(), 4).build();
    assert_eq!(submit(&mut ring, &fixed(write)), 4);
    let fsync = opcode::Fsync::new(types::Fixed(0)).build();
    assert_eq!(submit(&mut ring, &fixed(fsync)), 0);
}

#[test]
fn every_other_operation_is_refused() {
    let disk = file("sector");
    let Some(mut ring) = ring(&[&disk], 0) else {
        return;
    };
    for code in (0..=LAST_TRIED).filter(|c| !OPCODES.contains(c)) {
        let result = submit(&mut ring, &bare(code, squeue::Flags::FIXED_FILE.bits()));
        // Codes that this kernel lacks are refused as such.
        assert!(
            result == -libc::EACCES || result == -libc::EINVAL,
            "opcode {code}: {result}"
        );
        if code <= opcode::UnlinkAt::CODE {
            assert_eq!(result, -libc::EACCES, "opcode {code}");
        }
    }
}

#[test]
fn a_descriptor_that_is_not_registered_is_refused() {
    let disk = file("sector");
    let Some(mut ring) = ring(&[&disk], 0) else {
        return;
    };
    let mut buffer = [0_u8; 16];
    let plain = types::Fd(disk.as_raw_fd());
    let read = opcode::Read::new(plain, buffer.as_mut_ptr(), 16).build();
    assert_eq!(submit(&mut ring, &read), -libc::EACCES);
    assert_eq!(
        submit(&mut ring, &bare(opcode::Fsync::CODE, 0)),
        -libc::EACCES
    );
    // And one beyond the table is no file.
    let beyond = opcode::Read::new(types::Fixed(1), buffer.as_mut_ptr(), 16).build();
    assert_eq!(submit(&mut ring, &fixed(beyond)), -libc::EBADF);
}

#[test]
fn no_other_flag_is_accepted() {
    let disk = file("sector");
    let Some(mut ring) = ring(&[&disk], 0) else {
        return;
    };
    let fixed = squeue::Flags::FIXED_FILE;
    for flag in [
        squeue::Flags::ASYNC,
        squeue::Flags::IO_DRAIN,
        squeue::Flags::IO_LINK,
        squeue::Flags::BUFFER_SELECT,
    ] {
        let entry = bare(opcode::Read::CODE, (fixed | flag).bits());
        assert_eq!(submit(&mut ring, &entry), -libc::EACCES, "{flag:?}");
    }
}

#[test]
fn a_file_that_comes_later_enters_the_table() {
    let disk = file("sector");
    let late = file("kick");
    let Some(mut ring) = ring(&[&disk], 2) else {
        return;
    };
    assert_eq!(ring.files, 3);
    let mut buffer = [0_u8; 16];
    let read = fixed(opcode::Read::new(types::Fixed(2), buffer.as_mut_ptr(), 16).build());
    assert_eq!(submit(&mut ring, &read), -libc::EBADF, "an empty place");
    let update = |ring: &RestrictedRing, fd| {
        let submitter = ring.ring.submitter();
        submitter.register_files_update(2, &[fd])
    };
    assert_eq!(update(&ring, late.as_raw_fd()).unwrap(), 1);
    assert_eq!(submit(&mut ring, &read), 4);
    assert_eq!(&buffer[..4], b"kick");
    assert_eq!(update(&ring, -1).unwrap(), 1);
    assert_eq!(submit(&mut ring, &read), -libc::EBADF, "empty again");
}

#[test]
fn other_registrations_are_refused() {
    let disk = file("sector");
    let Some(ring) = ring(&[&disk], 0) else {
        return;
    };
    let submitter = ring.ring.submitter();
    let buffer = [0_u8; 4096];
    let vector = libc::iovec {
        iov_base: buffer.as_ptr().cast_mut().cast(),
        iov_len: buffer.len(),
    };
    let refused = |what: &str, answer: std::io::Result<()>| {
        assert_eq!(
            answer.unwrap_err().raw_os_error(),
            Some(libc::EACCES),
            "{what}"
        );
    };
    // SAFETY: the vector describes `buffer`, which outlives the ring's refusal.
    refused("buffers", unsafe { submitter.register_buffers(&[vector]) });
    refused("unregister files", submitter.unregister_files());
    refused("eventfd", submitter.register_eventfd(disk.as_raw_fd()));
    refused("personality", submitter.register_personality().map(drop));
    let mut probe = io_uring::Probe::new();
    refused("probe", submitter.register_probe(&mut probe));
    // What is listed cannot be listed anew.
    let mut more = [io_uring::register::Restriction::sqe_op(
        opcode::OpenAt::CODE,
    )];
    assert!(submitter.register_restrictions(&mut more).is_err());
}

/// io_uring_register(2), bare; minus the errno.
fn register(ring: &io_uring::IoUring, code: u32) -> i32 {
    let zeroes = [0_u64; 64];
    // SAFETY: an operation that is carried out reads the structure it asks for, all of whose bytes
    // are zero, from `zeroes`, which is larger than any of them and outlives the call.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_io_uring_register,
            ring.as_raw_fd(),
            code,
            zeroes.as_ptr(),
            1,
        )
    };
    if answer < 0 {
        -std::io::Error::last_os_error().raw_os_error().unwrap()
    } else {
        0
    }
}

#[test]
fn every_registration_but_that_of_files_is_refused() {
    const FILES_UPDATE: u32 = 6;
    const USE_REGISTERED_RING: u32 = 1 << 31;
    let disk = file("sector");
    let Some(ring) = ring(&[&disk], 1) else {
        return;
    };
    for code in (0..256).filter(|code| *code != FILES_UPDATE) {
        let answer = register(&ring.ring, code);
        // Codes that this kernel lacks are refused as such; some are for no ring in particular.
        let refused = [-libc::EACCES, -libc::EINVAL, -libc::EBADFD];
        assert!(refused.contains(&answer), "{code}: {answer}");
        if code <= 12 {
            assert_eq!(answer, -libc::EACCES, "{code}");
        }
        assert!(
            register(&ring.ring, code | USE_REGISTERED_RING) < 0,
            "{code}"
        );
    }
}

/// The ring by which a main thread waits: it can wait and nothing else.
#[test]
fn a_ring_for_waiting_does_nothing_else() {
    if uring::available().is_err() {
        return;
    }
    let mut ring = uring::polling(8).unwrap();
    let waits = [opcode::PollAdd::CODE, opcode::PollRemove::CODE];
    for code in (0..=LAST_TRIED).filter(|code| !waits.contains(code)) {
        // SAFETY: the entry names no buffer.
        unsafe { ring.submission().push(&bare(code, 0)) }.unwrap();
        ring.submit_and_wait(1).unwrap();
        let result = ring.completion().next().unwrap().result();
        let refused = [-libc::EACCES, -libc::EINVAL];
        assert!(refused.contains(&result), "opcode {code}: {result}");
    }
    for code in 0..=12 {
        assert_eq!(register(&ring, code), -libc::EACCES, "registration {code}");
    }
}

#[test]
fn a_poll_of_a_registered_eventfd_completes() {
    let disk = file("sector");
    let Some(mut ring) = ring(&[&disk], 1) else {
        return;
    };
    // SAFETY: it takes integers; the answer is a new descriptor or -1.
    let fd = unsafe { libc::eventfd(1, libc::EFD_CLOEXEC) };
    assert!(fd >= 0);
    // SAFETY: it was just made, and nobody else has it.
    let kick = unsafe { OwnedFd::from_raw_fd(fd) };
    let submitter = ring.ring.submitter();
    submitter
        .register_files_update(1, &[kick.as_fd().as_raw_fd()])
        .unwrap();
    let poll = opcode::PollAdd::new(types::Fixed(1), libc::POLLIN as u32).build();
    let result = submit(&mut ring, &fixed(poll));
    assert_eq!(result & i32::from(libc::POLLIN), i32::from(libc::POLLIN));
}

#[test]
fn the_ring_belongs_to_the_thread_that_enabled_it() {
    let disk = file("sector");
    let Some(mut ring) = ring(&[&disk], 0) else {
        return;
    };
    if !ring.deferred {
        return;
    }
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let entry = bare(opcode::Fsync::CODE, squeue::Flags::FIXED_FILE.bits());
            // SAFETY: the entry has no buffer.
            unsafe { ring.ring.submission().push(&entry) }.unwrap();
            let refused = ring.ring.submit().unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(libc::EEXIST));
        });
    });
}

#[test]
fn unavailability_is_told() {
    let none = uring::restricted(&RingSpec {
        entries: 0,
        opcodes: OPCODES,
        files: &[],
        spare_files: 0,
    });
    let Err(error) = none else {
        panic!("a ring of no entries");
    };
    assert!(error.is_unavailable());
    assert!(error.to_string().starts_with("io_uring: creating a ring"));
}
