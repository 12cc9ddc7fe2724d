//! Given a load and a cache mode: which system calls the process makes and what it gives to
//! its rings, as ptrace sees it. A flush and a write are what the mode says, the steady state
//! makes one kind of call, and a secure erase is that or an error.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![cfg(target_arch = "x86_64")]

mod support;

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use support::loops::Loop;
use support::trace::{self, BLKSECDISCARD, Call, Traced};
use support::*;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;

const DATA: u64 = GPA + 0x1_0000;
const AT_WRITEBACK: u32 = 32;

/// linux/io_uring.h
const OP_READV: u8 = 1;
const OP_WRITEV: u8 = 2;
const OP_FSYNC: u8 = 3;
const OP_FALLOCATE: u8 = 17;
const OP_READ: u8 = 22;
const OP_WRITE: u8 = 23;
const FSYNC_DATASYNC: u32 = 1;

/// Serves `disk` under the eyes of the tracer, without changing an answer.
fn watched(socket: &Path, spec: &str, args: &[&str]) -> Traced {
    traced(socket, spec, args, Box::new(|_| None))
}

fn traced(socket: &Path, spec: &str, args: &[&str], answer: trace::Answer) -> Traced {
    let traced = Traced::start(Blk::listening(socket, spec, args), answer);
    wait_for("the socket", || UnixStream::connect(socket).is_ok());
    traced
}

/// What reached the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Done {
    Read,
    Write,
    /// A write that is on stable storage when it is done.
    DurableWrite,
    /// fdatasync, by whatever name.
    Sync,
    Fallocate,
}

/// Those among the calls and entries that do something with the disk, in their order.
fn done(calls: &[Call]) -> Vec<Done> {
    let write = |flags: u64| match flags {
        0 => Done::Write,
        flags if flags == libc::RWF_DSYNC as u64 => Done::DurableWrite,
        other => panic!("flags {other:#x}"),
    };
    let mut all = Vec::new();
    for call in calls {
        match call.number {
            libc::SYS_preadv2 => all.push(Done::Read),
            // The low and the high half of the offset come before.
            libc::SYS_pwritev2 => all.push(write(call.args[5])),
            libc::SYS_fdatasync => all.push(Done::Sync),
            libc::SYS_fallocate => all.push(Done::Fallocate),
            libc::SYS_fsync | libc::SYS_sync_file_range | libc::SYS_syncfs | libc::SYS_sync => {
                panic!("{call:?}")
            }
            _ => {}
        }
        for entry in &call.entries {
            match entry.opcode {
                OP_READ | OP_READV => all.push(Done::Read),
                // Eight bytes to nowhere in particular: the driver's interrupt.
                OP_WRITE if entry.len == 8 => {}
                OP_WRITE | OP_WRITEV => all.push(write(entry.flags.into())),
                OP_FSYNC => {
                    assert_eq!(entry.flags, FSYNC_DATASYNC);
                    all.push(Done::Sync);
                }
                OP_FALLOCATE => all.push(Done::Fallocate),
                _ => {}
            }
        }
    }
    all
}

#[test]
fn a_flush_and_a_write_are_what_the_cache_mode_says() {
    if !trace::permitted() {
        return;
    }
    use Done::{DurableWrite, Sync, Write};
    for engine in ["io_uring", "preadv2"] {
        let scratch = Scratch::new(&format!("modes-{engine}"));
        let disk = scratch.disk(64);
        // What a write becomes, what a flush does, and whether the page cache is passed by;
        // and the write once the driver has chosen write-through for itself.
        for (cache, written, flushed, direct, through) in [
            ("none", Write, &[Sync][..], true, DurableWrite),
            ("writeback", Write, &[Sync], false, DurableWrite),
            ("writethrough", DurableWrite, &[Sync], false, DurableWrite),
            ("unsafe", Write, &[], false, Write),
        ] {
            let label = format!("{engine}, cache={cache}");
            let socket = scratch.path("s");
            let spec = format!("path={},cache={cache}", disk.display());
            let watched = watched(&socket, &spec, &["--io-engine", engine]);
            let flags = watched.open_flags(&disk);
            assert_eq!(flags & libc::O_DIRECT != 0, direct, "{label}");
            assert_eq!(flags & (libc::O_SYNC | libc::O_DSYNC), 0, "{label}");

            let mut vm = Vm::connect(&socket, 1);
            vm.start();
            let did = |vm: &mut Vm, kind, len| {
                watched.take();
                assert_eq!(vm.request(kind, 8, DATA, len).0, 0, "{label}");
                done(&watched.take())
            };
            assert_eq!(did(&mut vm, T_OUT, 4096), [written], "{label}: write");
            assert_eq!(did(&mut vm, T_FLUSH, 0), flushed, "{label}: flush");
            assert_eq!(did(&mut vm, T_IN, 4096), [Done::Read], "{label}: read");
            // Zeros are written as durably as other data.
            let mut zeros = 8u64.to_le_bytes().to_vec();
            zeros.extend(8u32.to_le_bytes());
            zeros.extend(0u32.to_le_bytes());
            vm.write_mem(DATA, &zeros);
            let zeroed = did(&mut vm, T_WRITE_ZEROES, 16);
            let durable = zeroed.last() == Some(&Sync) || zeroed.last() == Some(&DurableWrite);
            assert_eq!(durable, cache == "writethrough", "{label}: {zeroed:?}");

            // VIRTIO_BLK_F_CONFIG_WCE: there and back.
            for (value, expected) in [(0, through), (1, written)] {
                let flags = VhostUserConfigFlags::WRITABLE;
                vm.frontend
                    .set_config(AT_WRITEBACK, flags, &[value])
                    .unwrap();
                assert_eq!(did(&mut vm, T_OUT, 4096), [expected], "{label}: {value}");
                assert_eq!(did(&mut vm, T_FLUSH, 0), flushed, "{label}: {value}");
            }

            // A driver that knows no flush may rely on every write, unless nobody may.
            vm.frontend.get_vring_base(0).unwrap();
            let features = vm.features & !(F_FLUSH | F_CONFIG_WCE);
            vm.frontend.set_features(features).unwrap();
            vm.queues[0].ring.reset();
            vm.start_queue(0, 0);
            assert_eq!(did(&mut vm, T_OUT, 4096), [through], "{label}: no flush");
            assert_eq!(watched.end(), "", "{label}");
        }
    }
}

/// The node of a block device lies in a file system in memory: it is no such file for that.
#[test]
fn a_block_device_is_served_by_the_ring_and_flushed() {
    if !trace::permitted() {
        return;
    }
    let scratch = Scratch::new("modes-loop");
    let Some(device) = Loop::over(&scratch.disk(64), 512) else {
        return;
    };
    let socket = scratch.path("s");
    for (cache, written, flushed) in [
        ("none", Done::Write, &[Done::Sync][..]),
        ("writeback", Done::Write, &[Done::Sync]),
        ("writethrough", Done::DurableWrite, &[Done::Sync]),
        ("unsafe", Done::Write, &[]),
    ] {
        let spec = format!("path={},cache={cache}", device.path().display());
        let watched = watched(&socket, &spec, &["--io-engine", "io_uring"]);
        let flags = watched.open_flags(device.path());
        assert_eq!(flags & libc::O_DIRECT != 0, cache == "none");
        let mut vm = Vm::connect(&socket, 1);
        vm.start();
        watched.take();
        assert_eq!(vm.request(T_OUT, 8, DATA, 4096).0, 0, "{cache}");
        assert_eq!(vm.request(T_FLUSH, 0, 0, 0).0, 0, "{cache}");
        let calls = watched.take();
        assert_eq!(done(&calls), [&[written], flushed].concat(), "{cache}");
        assert!(calls.iter().all(|c| c.number != libc::SYS_pwritev2));
    }
}

#[test]
fn a_read_only_disk_is_never_written_or_flushed() {
    if !trace::permitted() {
        return;
    }
    for engine in ["io_uring", "preadv2"] {
        let scratch = Scratch::new(&format!("ro-calls-{engine}"));
        let (disk, socket) = (scratch.disk(64), scratch.path("s"));
        let spec = format!("path={},readonly=on", disk.display());
        let watched = watched(&socket, &spec, &["--io-engine", engine]);
        assert_eq!(watched.open_flags(&disk) & libc::O_ACCMODE, libc::O_RDONLY);
        let mut vm = Vm::connect(&socket, 1);
        vm.start();
        watched.take();
        assert_eq!(vm.request(T_OUT, 0, DATA, 512).0, 1, "{engine}");
        assert_eq!(vm.request(T_FLUSH, 0, 0, 0).0, 0, "{engine}");
        assert_eq!(vm.request(T_IN, 0, DATA, 512).0, 0, "{engine}");
        assert_eq!(done(&watched.take()), [Done::Read], "{engine}");
    }
}

/// Offers so many requests at once on a queue, kicks, and waits for them all.
fn burst(vm: &mut Vm, queue: usize, count: u16, round: u64) {
    for i in 0..u64::from(count) {
        let head = GPA + 0x1000 + 0x1000 * queue as u64 + 16 * i;
        let data = DATA + 0x4_0000 * queue as u64 + 0x1000 * i;
        let kind = [T_IN, T_OUT, T_IN, T_FLUSH][(i + round) as usize % 4];
        let sector = 8 * ((round * 31 + i * 7 + queue as u64) % 500);
        vm.header(head, kind, sector);
        let status = GPA + 0x800 + 0x100 * queue as u64 + i;
        let first = 3 * i as u16;
        let ring = &mut vm.queues[queue].ring;
        match kind {
            T_FLUSH => ring.chain(first, &[d(head, 16, 0), d(status, 1, WRITE)]),
            kind => {
                let flags = if kind == T_IN { WRITE } else { 0 };
                let data = d(data, 4096, flags);
                ring.chain(first, &[d(head, 16, 0), data, d(status, 1, WRITE)]);
            }
        }
        ring.offer(first);
    }
    vm.kick(queue);
    for _ in 0..count {
        vm.completion(queue);
    }
}

#[test]
fn in_the_steady_state_there_is_one_kind_of_system_call() {
    if !trace::permitted() {
        return;
    }
    const ROUNDS: u64 = 40;
    let scratch = Scratch::new("steady");
    let (disk, socket) = (scratch.disk(8192), scratch.path("s"));
    let spec = format!("path={}", disk.display());
    let args = ["--queues", "2", "--io-engine", "io_uring"];
    let watched = watched(&socket, &spec, &args);
    let mut vm = Vm::connect(&socket, 2);
    vm.start();
    // The rings have begun: their eventfds are in the tables of files.
    burst(&mut vm, 0, 1, 0);
    burst(&mut vm, 1, 1, 0);
    watched.take();
    let mut requests = 0;
    for round in 0..ROUNDS {
        for (queue, count) in [(0, 1), (1, 16), (0, 16)] {
            burst(&mut vm, queue, count, round);
            requests += usize::from(count);
        }
    }
    let calls = watched.take();
    let enter = libc::SYS_io_uring_enter;
    // Where the clock is none that a process may read by itself, that is a call.
    let mut others: Vec<i64> = calls.iter().map(|c| c.number).collect();
    others.retain(|n| *n != enter && *n != libc::SYS_clock_gettime);
    let count = others.len();
    others.sort_unstable();
    others.dedup();
    assert!(
        others.is_empty(),
        "{count} calls, of the numbers {others:?}"
    );
    // Guest memory is never registered: neither READ_FIXED nor WRITE_FIXED.
    let mut entries = calls.iter().flat_map(|c| &c.entries);
    assert!(entries.all(|e| e.opcode != 4 && e.opcode != 5));
    // They were seen: each request is in one of them.
    let flushes_and_io = done(&calls).len();
    assert_eq!(flushes_and_io, requests);
    println!("{requests} requests: {} calls", calls.len());
    // Requests that come together go together: there is not one call to submit, one to wait
    // and one to signal for each.
    assert!(calls.len() < 3 * requests, "{} calls", calls.len());
    let mut threads: Vec<i32> = calls.iter().map(|c| c.thread).collect();
    threads.sort_unstable();
    threads.dedup();
    assert_eq!(threads.len(), 2, "the queues' threads and no other");
}

fn erases(calls: &[Call]) -> Vec<[u64; 2]> {
    let erase = |c: &&Call| c.number == libc::SYS_ioctl && c.args[1] == BLKSECDISCARD;
    calls.iter().filter(erase).map(|c| c.range).collect()
}

/// Ranges as (sector, sectors), and flags; the request's status.
fn erase(vm: &mut Vm, ranges: &[(u64, u32)], flags: u32) -> u8 {
    let mut bytes = Vec::new();
    for (sector, sectors) in ranges {
        bytes.extend(sector.to_le_bytes());
        bytes.extend(sectors.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
    }
    vm.write_mem(DATA, &bytes);
    vm.request(T_SECURE_ERASE, 0, DATA, bytes.len() as u32).0
}

/// No device here erases securely; so the kernel's answers are changed to those of one that
/// does, on a block device that the call does nothing to.
#[test]
fn a_secure_erase_is_that_or_an_error() {
    if !trace::permitted() {
        return;
    }
    let scratch = Scratch::new("erase");
    let file = scratch.disk(8192);
    for sector in [512, 4096] {
        let Some(device) = Loop::over(&file, sector) else {
            return;
        };
        let socket = scratch.path("s");
        let spec = format!("path={}", device.path().display());
        let verdict = Arc::new(AtomicI64::new(0));
        let says = Arc::clone(&verdict);
        let answer = move |call: &Call| {
            let asked = call.number == libc::SYS_ioctl && call.args[1] == BLKSECDISCARD;
            asked.then(|| match call.range {
                [start, _] if start % 512 != 0 => -i64::from(libc::EINVAL),
                _ => says.load(Ordering::SeqCst),
            })
        };
        let traced = traced(
            &socket,
            &spec,
            &["--io-engine", "io_uring"],
            Box::new(answer),
        );
        let asked = erases(&traced.take());
        assert_eq!(asked, [[1, 0]], "asked once, in a way that erases nothing");

        let mut vm = Vm::connect(&socket, 1);
        assert_ne!(vm.features & F_SECURE_ERASE, 0);
        let config = vm.config(60, 12);
        let field = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
        let (most, segments, alignment) = (field(0), field(4), field(8));
        assert!(most > 0 && segments > 0);
        assert_eq!(alignment * 512, sector.max(512));
        vm.start();
        traced.take();

        assert_eq!(erase(&mut vm, &[(8, 16), (64, 8)], 0), 0);
        let bytes = |sector: u64, sectors: u64| [sector * 512, sectors * 512];
        assert_eq!(erases(&traced.take()), [bytes(8, 16), bytes(64, 8)]);
        // Nothing that must not be reaches the device.
        for (what, ranges, flags, status) in [
            ("beyond the end", vec![(8192, 8)], 0, 1),
            ("across the end", vec![(8184, 16)], 0, 1),
            ("an overflow", vec![(u64::MAX, 8)], 0, 1),
            ("too much", vec![(0, most + 8)], 0, 1),
            ("one bad of two", vec![(0, 8), (8192, 8)], 0, 1),
            ("a flag", vec![(0, 8)], 1, 2),
            ("too many", vec![(0, 8); segments as usize + 1], 0, 1),
        ] {
            assert_eq!(erase(&mut vm, &ranges, flags), status, "{what}");
        }
        if sector == 4096 {
            assert_eq!(erase(&mut vm, &[(9, 8)], 0), 1, "part of a block");
        }
        assert_eq!(done(&traced.take()), []);

        // What the device cannot is not done in another way.
        for (errno, status) in [(libc::EOPNOTSUPP, 2), (libc::EIO, 1)] {
            verdict.store(-i64::from(errno), Ordering::SeqCst);
            assert_eq!(erase(&mut vm, &[(8, 16), (64, 8)], 0), status);
            let calls = traced.take();
            assert_eq!(erases(&calls), [bytes(8, 16)], "the first, and no more");
            assert_eq!(done(&calls), []);
        }
        // An interrupted one is made again.
        verdict.store(-i64::from(libc::EINTR), Ordering::SeqCst);
        assert_eq!(erase(&mut vm, &[(8, 16)], 0), 1);
        let again = erases(&traced.take());
        assert!(again.len() > 1 && again.iter().all(|r| *r == bytes(8, 16)));
        // Other requests are served as ever.
        verdict.store(0, Ordering::SeqCst);
        assert_eq!(vm.request(T_IN, 8, DATA, 4096).0, 0);
        assert_eq!(vm.read_mem(DATA, 512), support::sector(8));
        assert_eq!(on_disk(&file, 64, 512), support::sector(64));

        // Not accepted, not done.
        vm.frontend.get_vring_base(0).unwrap();
        vm.frontend
            .set_features(vm.features & !F_SECURE_ERASE)
            .unwrap();
        vm.queues[0].ring.reset();
        vm.start_queue(0, 0);
        traced.take();
        assert_eq!(erase(&mut vm, &[(8, 16)], 0), 2);
        assert_eq!(erases(&traced.take()), [[0; 2]; 0]);
        drop(traced);
        let _ = std::fs::remove_file(&socket);
    }
}

/// The launcher's own filter for such a process is this one, too.
#[test]
fn the_filter_for_secure_erase_lets_all_other_requests_pass() {
    if !trace::permitted() {
        return;
    }
    let scratch = Scratch::new("erase-filter");
    let file = scratch.disk(8192);
    let Some(device) = Loop::over(&file, 512) else {
        return;
    };
    for cache in ["none", "writethrough"] {
        let mut options = std::fs::File::options();
        let disk = options.read(true).write(true).open(device.path()).unwrap();
        let options = format!(",cache={cache},secure-erase=on");
        let args = ["--io-engine", "io_uring", "--queues", "2"];
        let (command, control, vhost) = Blk::inheriting(disk, &options, &args);
        let can = |call: &Call| {
            let asked = call.number == libc::SYS_ioctl && call.args[1] == BLKSECDISCARD;
            asked.then(|| match call.range {
                [1, 0] => -i64::from(libc::EINVAL),
                _ => 0,
            })
        };
        let traced = Traced::start(command, Box::new(can));
        let mut control = Control::new(control);
        let mut vm = Vm::over(vhost, 2);
        assert_ne!(vm.features & F_SECURE_ERASE, 0);
        vm.start();
        for round in 0..4 {
            burst(&mut vm, 0, 16, round);
            burst(&mut vm, 1, 16, round);
            assert_eq!(erase(&mut vm, &[(8, 16)], 0), 0);
        }
        for kind in [T_DISCARD, T_WRITE_ZEROES] {
            let mut range = 64u64.to_le_bytes().to_vec();
            range.extend(8u64.to_le_bytes());
            vm.write_mem(DATA, &range);
            assert_eq!(vm.request(kind, 0, DATA, 16).0, 0, "{cache}: {kind}");
        }
        control.limit((0, 0), (1000, 10)).unwrap();
        control.resize(8192 * 512).unwrap();
        assert!(control.stats().queues[0].discards >= 5);
        // New memory and a stop, as ever.
        vm.frontend.set_mem_table(&[vm.region()]).unwrap();
        vm.frontend.get_vring_base(0).unwrap();
        vm.start_queue(0, vm.queues[0].ring.used_idx());
        assert_eq!(vm.request(T_IN, 0, DATA, 512).0, 0, "{cache}");
        assert_eq!(control.health().rings[0].host_errors, 0);
        assert_eq!(traced.end(), "");
    }
}

#[test]
fn secure_erase_is_offered_where_the_device_can_and_the_operator_may() {
    if !trace::permitted() {
        return;
    }
    let scratch = Scratch::new("erase-not");
    let file = scratch.disk(64);
    let Some(device) = Loop::over(&file, 512) else {
        return;
    };
    let can = |call: &Call| {
        let asked = call.number == libc::SYS_ioctl && call.args[1] == BLKSECDISCARD;
        asked.then_some(-i64::from(libc::EINVAL))
    };
    let socket = scratch.path("s");
    let path = device.path().display();
    for (what, spec, engine, offered) in [
        (
            "a device that can",
            format!("path={path}"),
            "io_uring",
            true,
        ),
        (
            "read-only",
            format!("path={path},readonly=on"),
            "io_uring",
            false,
        ),
        (
            "not wanted",
            format!("path={path},secure-erase=off"),
            "io_uring",
            false,
        ),
        ("the other engine", format!("path={path}"), "preadv2", false),
        (
            "a file",
            format!("path={}", file.display()),
            "io_uring",
            false,
        ),
    ] {
        let traced = traced(&socket, &spec, &["--io-engine", engine], Box::new(can));
        let vm = Vm::connect(&socket, 1);
        assert_eq!(vm.features & F_SECURE_ERASE != 0, offered, "{what}");
        drop(traced);
    }
    // As it is: a loop device cannot.
    let _blk = Blk::listen(&socket, &format!("path={path}"), &[]);
    assert_eq!(Vm::connect(&socket, 1).features & F_SECURE_ERASE, 0);
}
