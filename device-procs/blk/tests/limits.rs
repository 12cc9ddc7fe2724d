//! Given a disk that is limited or drained: what may not pass waits, in the ring and not in
//! the process, so that orders are obeyed at once; and a change is felt at once. No test
//! waits for a rate: those in force are so low that nothing more passes while it runs.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::time::Duration;

use support::*;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};

const DATA: u64 = GPA + 0x1_0000;
const REQUESTS: u16 = 10;

/// Offers reads of one sector each, two descriptors long, and kicks.
fn offer(vm: &mut Vm, queue: usize, count: u16) {
    for i in 0..u64::from(count) {
        let head = GPA + 0x1000 + 0x1000 * queue as u64 + 16 * i;
        let data = DATA + 0x8_0000 * queue as u64 + 0x400 * i;
        vm.header(head, T_IN, i);
        let ring = &mut vm.queues[queue].ring;
        let first = 2 * i as u16;
        ring.chain(first, &[d(head, 16, 0), d(data, 513, WRITE)]);
        ring.offer(first);
    }
    vm.kick(queue);
}

fn start(name: &str, engine: &str, options: &str, queues: u16) -> (Scratch, Blk, Control, Vm) {
    let scratch = Scratch::new(&format!("limits-{name}-{engine}"));
    let disk = scratch.disk(64);
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(disk)
        .unwrap();
    let args = ["--io-engine", engine, "--queues", &queues.to_string()];
    let (blk, control, vhost) = Blk::inherit(file, options, &args);
    let mut vm = Vm::over(vhost, queues);
    vm.start();
    (scratch, blk, Control::new(control), vm)
}

fn engines(test: impl Fn(&str)) {
    for engine in ["io_uring", "preadv2"] {
        test(engine);
    }
}

fn throttled(control: &mut Control) -> u64 {
    control.stats().queues.iter().map(|q| q.throttled).sum()
}

/// Completions that come without anybody's doing: after they have come to rest.
fn completed(vm: &mut Vm, queue: usize) -> u16 {
    let mut count = 0;
    while vm.queues[queue].ring.take_used().is_some() {
        count += 1;
    }
    count
}

#[test]
fn what_is_beyond_a_limit_waits_until_the_limit_is_lifted() {
    engines(|engine| {
        // One byte a second: the first request takes more, and is paid for in minutes.
        for options in [",bps=1:1", ",iops=1:1"] {
            let (_scratch, _blk, mut control, mut vm) = start("lift", engine, options, 1);
            offer(&mut vm, 0, REQUESTS);
            wait_for("the limit", || throttled(&mut control) > 0);
            let stats = control.stats();
            let queue = &stats.queues[0];
            assert!(queue.requests < u64::from(REQUESTS), "{engine}{options}");
            // What waits is not in flight: it was not taken.
            assert_eq!(control.health().rings[0].in_flight, 0, "{engine}");
            // It says that it does not hang, and not for ever.
            wait_for("sleep", || control.health().rings[0].held);
            assert!(!control.health().rings[0].waits_for_host);
            control.limit((0, 0), (0, 0)).unwrap();
            wait_for("work", || !control.health().rings[0].held);
            for i in 0..REQUESTS {
                let (head, len) = vm.completion(0);
                assert_eq!((head, len), (u32::from(2 * i), 513), "{engine}{options}");
            }
            assert_eq!(control.stats().queues[0].requests, u64::from(REQUESTS));
        }
    });
}

#[test]
fn a_burst_passes_at_once_and_a_large_request_is_not_starved() {
    engines(|engine| {
        let (_scratch, _blk, mut control, mut vm) = start("burst", engine, ",bps=1:4096", 1);
        // Eight sectors, and one more request, into debt, however large.
        offer(&mut vm, 0, 16);
        wait_for("the limit", || throttled(&mut control) > 0);
        // A second's worth is a byte: nine when it took less than one.
        let passed = control.stats().queues[0].requests;
        assert!((8..12).contains(&passed), "{engine}: {passed}");
        control.limit((1, 1 << 30), (0, 0)).unwrap();
        wait_for("a larger burst to be refused", || {
            throttled(&mut control) > 1
        });
        control.limit((0, 0), (0, 0)).unwrap();
        wait_for("all", || control.stats().queues[0].requests == 16);
    });
}

#[test]
fn the_limit_is_on_all_queues_together() {
    engines(|engine| {
        let (_scratch, _blk, mut control, mut vm) = start("queues", engine, ",iops=1:20", 2);
        offer(&mut vm, 0, 16);
        offer(&mut vm, 1, 16);
        wait_for("the limit", || throttled(&mut control) >= 1);
        let stats = control.stats();
        let passed: u64 = stats.queues.iter().map(|q| q.requests).sum();
        assert!(passed < 32, "{engine}: {passed}");
        control.limit((0, 0), (0, 0)).unwrap();
        for queue in 0..2 {
            for _ in 0..16 {
                vm.completion(queue);
            }
        }
    });
}

#[test]
fn a_throttled_queue_obeys_orders_at_once() {
    engines(|engine| {
        let (_scratch, mut blk, mut control, mut vm) = start("orders", engine, ",iops=1:1", 1);
        offer(&mut vm, 0, REQUESTS);
        wait_for("the limit", || throttled(&mut control) > 0);
        // New memory, a new call eventfd, a stop: each would otherwise wait for seconds.
        let (_more, _) = bulkhead_runtime::driver::guest(GPA + RAM, 0x1_0000).unwrap();
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: GPA + RAM,
            memory_size: 0x1_0000,
            userspace_addr: 0x1000_0000,
            mmap_offset: 0,
            mmap_handle: std::os::fd::AsRawFd::as_raw_fd(&_more),
        };
        vhost::vhost_user::VhostUserFrontend::add_mem_region(&mut vm.frontend, &region).unwrap();
        vm.frontend.set_vring_call(0, &vm.queues[0].call).unwrap();
        let next = vm.frontend.get_vring_base(0).unwrap() as u16;
        assert!(next < REQUESTS, "{engine}: {next}");
        assert_eq!(next, vm.queues[0].ring.used_idx(), "{engine}");
        let done = completed(&mut vm, 0);
        // It goes on where it was, without the limit.
        control.limit((0, 0), (0, 0)).unwrap();
        vm.start_queue(0, next);
        for _ in done..REQUESTS {
            vm.completion(0);
        }
        assert!(blk.is_running());
    });
}

#[test]
fn requests_of_a_disk_that_is_pulled_out_fail_those_beyond_a_limit_too() {
    engines(|engine| {
        let (_scratch, mut blk, mut control, mut vm) = start("pulled", engine, ",iops=1:1", 1);
        offer(&mut vm, 0, REQUESTS);
        wait_for("the limit", || throttled(&mut control) > 0);
        let good = control.stats().queues[0].requests;
        control.pull().unwrap();
        for done in 0..u64::from(REQUESTS) {
            let (head, len) = vm.completion(0);
            let failed = done >= good;
            assert_eq!(len, if failed { 1 } else { 513 }, "{engine}");
            let data = DATA + 0x400 * u64::from(head / 2);
            assert_eq!(vm.read_mem(data + 512, 1), [u8::from(failed)], "{engine}");
        }
        // Those that come are no better off.
        offer(&mut vm, 0, 1);
        assert_eq!(vm.completion(0).1, 1, "{engine}");
        assert_eq!(
            control.stats().queues[0].errors,
            u64::from(REQUESTS) - good + 1
        );
        assert!(blk.is_running());
    });
}

#[test]
fn limits_that_make_no_sense_are_refused_and_change_nothing() {
    engines(|engine| {
        let (_scratch, _blk, mut control, mut vm) = start("nonsense", engine, "", 1);
        let why = control.limit((0, 5), (0, 0)).unwrap_err();
        assert!(why.contains("limits.bytes"), "{why}");
        let why = control.limit((1, 1), (0, 5)).unwrap_err();
        assert!(why.contains("limits.operations"), "{why}");
        // Neither half was taken.
        offer(&mut vm, 0, REQUESTS);
        for _ in 0..REQUESTS {
            vm.completion(0);
        }
        assert_eq!(throttled(&mut control), 0, "{engine}");
    });
}

#[test]
fn a_wait_ends_by_itself() {
    engines(|engine| {
        // A request in five milliseconds: short enough to be waited for.
        let (_scratch, _blk, mut control, mut vm) = start("wait", engine, ",iops=200:1", 1);
        let begin = std::time::Instant::now();
        offer(&mut vm, 0, REQUESTS);
        for _ in 0..REQUESTS {
            vm.completion(0);
        }
        // The first passes at once; no clock makes the others faster.
        assert!(begin.elapsed() >= Duration::from_millis(5) * u32::from(REQUESTS - 2));
        assert!(throttled(&mut control) > 0, "{engine}");
        // What did not wait for long is in the latency histogram, all of it.
        let stats = control.stats();
        let counted: u64 = stats.queues[0].latency_us_log2.iter().sum();
        assert_eq!(counted, u64::from(REQUESTS), "{engine}");
    });
}

#[test]
fn a_drained_disk_takes_nothing_until_it_is_told_to_go_on() {
    engines(|engine| {
        for options in ["", ",iops=1:4"] {
            let (_scratch, mut blk, mut control, mut vm) = start("drain", engine, options, 2);
            offer(&mut vm, 0, REQUESTS);
            wait_for("the drain", || control.drain());
            let before = control.stats().queues[0].requests;
            offer(&mut vm, 1, REQUESTS);
            vm.kick(0);
            assert!(control.drain(), "{engine}: it stays drained");
            let stats = control.stats();
            assert_eq!(stats.queues[0].requests, before, "{engine}");
            assert_eq!(stats.queues[1].requests, 0, "{engine}");
            // Orders are obeyed meanwhile, and so are changes.
            let next = vm.frontend.get_vring_base(1).unwrap() as u16;
            assert_eq!(next, 0, "{engine}");
            vm.start_queue(1, 0);
            control.limit((0, 0), (0, 0)).unwrap();
            assert_eq!(control.stats().queues[1].requests, 0, "{engine}");
            control.resume();
            control.resume();
            for queue in 0..2 {
                for _ in 0..REQUESTS {
                    vm.completion(queue);
                }
            }
            assert!(blk.is_running());
        }
    });
}
