//! Given the process as the launcher starts it, and front-ends good and bad: it is confined,
//! it answers, it survives, and it ends when it should.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use bulkhead_proto::device::{
    HealthRequest, HealthResponse, HelloRequest, HelloResponse, ShutdownRequest, ShutdownResponse,
    StatsRequest, StatsResponse,
};
use bulkhead_proto::server::CONTROL_MAX_FRAME;
use bulkhead_proto::{BlockingClient, DEVICE_SERVICE};
use bulkhead_runtime::driver::{NEXT, WRITE};
use support::*;
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};

const DATA: u64 = GPA + 0x1_0000;

fn open(path: &std::path::Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

fn health(client: &mut BlockingClient) -> HealthResponse {
    client
        .call(DEVICE_SERVICE, "Health", &HealthRequest::new(), PATIENCE)
        .unwrap()
}

#[test]
fn the_vmm_is_answered_by_a_confined_process() {
    for engine in ["io_uring", "preadv2"] {
        let scratch = Scratch::new(&format!("vmm-{engine}"));
        let disk = scratch.disk(64);
        let args = ["--queues", "2", "--io-engine", engine];
        let (mut blk, control, vhost) = Blk::inherit(open(&disk), "", &args);
        let mut client = BlockingClient::new(control, CONTROL_MAX_FRAME);
        let mut hello = HelloRequest::new();
        hello.device_id = "disk0".into();
        hello.incarnation = 7;
        let reply: HelloResponse = client
            .call(DEVICE_SERVICE, "Hello", &hello, PATIENCE)
            .unwrap();
        assert_eq!((reply.kind.as_str(), reply.protocol), ("blk", 1));
        assert_eq!(reply.incarnation, 7);
        assert_eq!(reply.confinement.io_engine, engine);
        assert!(reply.confinement.policy.starts_with("bulkhead-blk"));
        // It answers only once it is confined, so this is what it is from now on.
        assert_eq!(blk.status_field("Seccomp"), "2");
        assert_eq!(blk.status_field("NoNewPrivs"), "1");
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(blk.status_field(set), "0000000000000000");
        }

        let mut vm = Vm::over(vhost, 2);
        vm.start();
        assert_eq!(vm.request_on(1, T_IN, 3, DATA, 512).0, 0);
        // Every kind of request under the policy of this engine, on queue 0; without FLUSH
        // a write is durable by itself.
        for features in [vm.features, vm.features & !F_FLUSH] {
            vm.frontend.get_vring_base(0).unwrap();
            vm.frontend.set_features(features).unwrap();
            vm.queues[0].ring.reset();
            vm.start_queue(0, 0);
            for (kind, len) in [(T_IN, 512), (T_OUT, 512), (T_FLUSH, 0), (T_GET_ID, 20)] {
                assert_eq!(vm.request(kind, 5, DATA + 1, len).0, 0, "{engine}: {kind}");
            }
            assert_eq!(vm.request(T_OUT, 6, DATA, 1024).0, 0, "{engine}");
        }
        let rings = health(&mut client).rings;
        assert_eq!(rings.len(), 2);
        assert!(rings.iter().all(|r| r.started && !r.broken));
        let stats: StatsResponse = client
            .call(DEVICE_SERVICE, "Stats", &StatsRequest::new(), PATIENCE)
            .unwrap();
        assert_eq!(stats.queues[0].requests, 10);
        assert_eq!(stats.queues[0].flushes, 2);
        assert_eq!(stats.queues[0].written_bytes, 3072);
        assert_eq!(stats.queues[0].errors, 0);
        assert_eq!(stats.queues[1].requests, 1);
        assert_eq!(stats.queues[1].read_bytes, 512);
        assert_eq!(stats.queues[1].interrupts, 1);

        let _: ShutdownResponse = client
            .call(
                DEVICE_SERVICE,
                "Shutdown",
                &ShutdownRequest::new(),
                PATIENCE,
            )
            .unwrap();
        assert_eq!(blk.wait_exit().code(), Some(0), "{}", blk.stderr());
    }
}

#[test]
fn it_ends_when_either_channel_ends() {
    let scratch = Scratch::new("ends");
    let disk = scratch.disk(64);
    let (mut blk, control, _vhost) = Blk::inherit(open(&disk), "", &[]);
    drop(control);
    assert_eq!(blk.wait_exit().code(), Some(0));
    let (mut blk, _control, vhost) = Blk::inherit(open(&disk), "", &[]);
    drop(vhost);
    assert_eq!(blk.wait_exit().code(), Some(0));
}

#[test]
fn a_malformed_ring_costs_that_ring_until_it_is_set_up_anew() {
    for engine in ["io_uring", "preadv2"] {
        let scratch = Scratch::new(&format!("malformed-{engine}"));
        let disk = scratch.disk(64);
        let args = ["--queues", "2", "--io-engine", engine];
        let (mut blk, control, vhost) = Blk::inherit(open(&disk), "", &args);
        let mut client = BlockingClient::new(control, CONTROL_MAX_FRAME);
        let mut vm = Vm::over(vhost, 2);
        vm.start();
        let looped = bulkhead_runtime::driver::Desc {
            addr: GPA,
            len: 1,
            flags: NEXT,
            next: 0,
        };
        type Spoil<'a> = (&'a str, &'a dyn Fn(&mut Vm));
        let bad: [Spoil<'_>; 6] = [
            ("a loop", &|vm| {
                vm.queues[0].ring.desc(0, looped);
                vm.queues[0].ring.offer(0);
            }),
            ("a bad head", &|vm| vm.queues[0].ring.offer(RING_SIZE)),
            ("a jumping index", &|vm| {
                vm.queues[0].ring.set_avail_idx(5000);
            }),
            ("data outside memory", &|vm| {
                vm.header(GPA, T_IN, 0);
                let chain = [d(GPA, 16, 0), d(GPA + RAM - 1, 512, WRITE)];
                vm.queues[0].ring.chain(0, &chain);
                vm.queues[0].ring.offer(0);
            }),
            ("no header", &|vm| {
                vm.queues[0]
                    .ring
                    .chain(0, &[d(GPA, 15, 0), d(GPA, 1, WRITE)]);
                vm.queues[0].ring.offer(0);
            }),
            ("no status", &|vm| {
                vm.queues[0].ring.chain(0, &[d(GPA, 16, 0)]);
                vm.queues[0].ring.offer(0);
            }),
        ];
        for (what, spoil) in bad {
            spoil(&mut vm);
            vm.kick(0);
            wait_for("the error eventfd", || vm.err_fired(0));
            let rings = health(&mut client).rings;
            assert!(rings[0].broken && !rings[1].broken, "{engine}: {what}");
            assert_eq!(rings[0].in_flight, 0, "{engine}: {what}");
            assert_eq!(vm.queues[0].ring.take_used(), None);
            // The other queue works on; this one is deaf.
            assert_eq!(vm.request_on(1, T_IN, 1, DATA, 512).0, 0);
            vm.kick(0);
            // The guest resets the device.
            vm.frontend.get_vring_base(0).unwrap();
            vm.queues[0].ring.reset();
            vm.start_queue(0, 0);
            assert!(!health(&mut client).rings[0].broken, "{engine}: {what}");
            assert_eq!(vm.request(T_IN, 2, DATA, 512).0, 0, "{engine}: {what}");
            assert_eq!(vm.read_mem(DATA, 512), sector(2));
        }
        assert!(blk.is_running());
    }
}

#[test]
fn a_ring_that_lies_outside_memory_is_broken_and_not_the_connection() {
    let scratch = Scratch::new("outside");
    let disk = scratch.disk(64);
    let (_blk, control, vhost) = Blk::inherit(open(&disk), "", &[]);
    let mut client = BlockingClient::new(control, CONTROL_MAX_FRAME);
    let mut vm = Vm::over(vhost, 1);
    // No memory table yet: no address is inside it.
    vm.queues[0].ring.reset();
    vm.start_queue(0, 0);
    assert!(vm.err_fired(0));
    assert!(health(&mut client).rings[0].broken);
    vm.frontend.get_vring_base(0).unwrap();
    vm.start();
    assert_eq!(vm.request(T_IN, 2, DATA, 512).0, 0);
}

#[test]
fn a_stopped_ring_has_finished_what_it_took_and_goes_on_where_it_was() {
    for engine in ["io_uring", "preadv2"] {
        let scratch = Scratch::new(&format!("stop-{engine}"));
        let disk = scratch.disk(4096);
        let socket = scratch.path("s");
        let spec = format!("path={}", disk.display());
        let _blk = Blk::listen(&socket, &spec, &["--io-engine", engine]);
        let mut vm = Vm::connect(&socket, 1);
        vm.start();
        let mut base = 0u16;
        for round in 0..30u16 {
            let count = RING_SIZE / 2;
            for i in 0..count {
                let (head, data) = (
                    GPA + 0x1000 + 16 * u64::from(i),
                    DATA + 0x400 * u64::from(i),
                );
                vm.header(head, T_IN, u64::from(i));
                vm.write_mem(data, &[0xff; 513]);
                let ring = &mut vm.queues[0].ring;
                ring.chain(2 * i, &[d(head, 16, 0), d(data, 513, WRITE)]);
                ring.offer(2 * i);
            }
            vm.kick(0);
            let stopped = vm.frontend.get_vring_base(0).unwrap() as u16;
            // Everything taken is completed, nothing else is touched afterwards.
            assert_eq!(stopped, vm.queues[0].ring.used_idx(), "{engine}");
            let taken = stopped.wrapping_sub(base);
            assert!(taken <= count);
            vm.start_queue(0, stopped);
            for _ in 0..count {
                let (head, len) = vm.completion(0);
                assert_eq!(len, 513, "{engine}, round {round}");
                let got = vm.read_mem(DATA + 0x400 * u64::from(head / 2), 513);
                assert_eq!(got, [sector(u64::from(head / 2)), vec![0]].concat());
            }
            base = base.wrapping_add(count);
        }
    }
}

#[test]
fn memory_may_change_while_rings_run() {
    for engine in ["io_uring", "preadv2"] {
        let scratch = Scratch::new(&format!("memory-{engine}"));
        let disk = scratch.disk(64);
        let (mut blk, _control, vhost) = Blk::inherit(open(&disk), "", &["--io-engine", engine]);
        let mut vm = Vm::over(vhost, 1);
        vm.start();
        assert_eq!(vm.request(T_IN, 1, DATA, 512).0, 0);
        // A second region beside the first.
        let (more_file, more) = bulkhead_runtime::driver::guest(GPA + RAM, 0x1_0000).unwrap();
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: GPA + RAM,
            memory_size: 0x1_0000,
            userspace_addr: 0x1000_0000,
            mmap_offset: 0,
            mmap_handle: std::os::fd::AsRawFd::as_raw_fd(&more_file),
        };
        assert_eq!(vm.frontend.get_max_mem_slots().unwrap(), 32);
        vm.frontend.add_mem_region(&region).unwrap();
        // A buffer across both.
        let (head, status) = (GPA + 0x100, GPA + 0x200);
        vm.header(head, T_IN, 5);
        let chain = [
            d(head, 16, 0),
            d(GPA + RAM - 256, 512, WRITE),
            d(status, 1, WRITE),
        ];
        assert_eq!(vm.chain_on(0, &chain), 513);
        let mut second = [0; 256];
        assert!(more.read(GPA + RAM, &mut second));
        assert_eq!(second, sector(5)[256..]);
        vm.frontend.remove_mem_region(&region).unwrap();
        assert_eq!(vm.request(T_IN, 1, DATA, 512).0, 0);
        // The same table again, with the ring running.
        for _ in 0..10 {
            vm.frontend.set_mem_table(&[vm.region()]).unwrap();
            assert_eq!(vm.request(T_IN, 6, DATA, 512).0, 0);
            assert_eq!(vm.read_mem(DATA, 512), sector(6));
        }
        // Now the region is gone for good, and the buffer with it.
        vm.header(head, T_IN, 5);
        vm.queues[0].ring.chain(0, &chain);
        vm.queues[0].ring.offer(0);
        vm.kick(0);
        wait_for("the error eventfd", || vm.err_fired(0));
        assert!(blk.is_running());
    }
}

#[test]
fn a_device_reset_returns_to_the_beginning() {
    let scratch = Scratch::new("reset");
    let disk = scratch.disk(64);
    let (_blk, _control, vhost) = Blk::inherit(open(&disk), "", &[]);
    let mut vm = Vm::over(vhost, 1);
    for _ in 0..3 {
        let features = vm.features;
        vm.frontend.set_features(features).unwrap();
        vm.start();
        assert_eq!(vm.request(T_IN, 1, DATA, 512).0, 0);
        vm.frontend.reset_device().unwrap();
    }
}

#[test]
fn one_front_end_after_another_is_served() {
    let scratch = Scratch::new("after");
    let disk = scratch.disk(64);
    let socket = scratch.path("s");
    let mut blk = Blk::listen(&socket, &format!("path={}", disk.display()), &[]);
    for i in 0..5u8 {
        let mut vm = Vm::connect(&socket, 1);
        if i == 2 {
            continue; // a probe
        }
        vm.start();
        vm.write_mem(DATA, &[i; 512]);
        assert_eq!(vm.request(T_OUT, u64::from(i), DATA, 512).0, 0);
    }
    assert_eq!(on_disk(&disk, 4, 512), [4; 512]);
    assert!(blk.is_running());
}

#[test]
fn a_front_end_that_misbehaves_is_dropped_and_the_next_one_served() {
    let scratch = Scratch::new("misbehaves");
    let disk = scratch.disk(64);
    let socket = scratch.path("s");
    let mut blk = Blk::listen(&socket, &format!("path={}", disk.display()), &[]);
    let garbage: [&[u8]; 5] = [
        &[0xff; 64],
        // GET_FEATURES with a body of 4 GiB.
        &[1, 0, 0, 0, 1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff],
        // SET_MEM_TABLE with 32 regions and no descriptors.
        &[5, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 32, 0, 0, 0, 0, 0, 0, 0],
        // SET_VRING_NUM of queue 1000.
        &[
            8, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 0xe8, 3, 0, 0, 8, 0, 0, 0,
        ],
        // Half a header, then the end.
        &[1, 0, 0],
    ];
    for bytes in garbage {
        let mut s = UnixStream::connect(&socket).unwrap();
        s.write_all(bytes).unwrap();
        if bytes.len() < 12 {
            continue;
        }
        s.set_read_timeout(Some(PATIENCE)).unwrap();
        let n = std::io::Read::read(&mut s, &mut [0; 16]);
        assert!(matches!(n, Ok(0) | Err(_)), "dropped: {bytes:?}");
    }
    // A region larger than its file would be a SIGBUS later.
    let vm = Vm::connect(&socket, 1);
    let mut region = vm.region();
    region.memory_size += 0x1000;
    assert!(vm.frontend.set_mem_table(&[region]).is_err());
    drop(vm);

    let mut vm = Vm::connect(&socket, 1);
    vm.start();
    assert_eq!(vm.request(T_IN, 1, DATA, 512).0, 0);
    assert!(blk.is_running());
}

#[test]
fn half_a_message_does_not_keep_the_vmm_from_an_answer() {
    let scratch = Scratch::new("half");
    let disk = scratch.disk(64);
    let (mut blk, control, mut vhost) = Blk::inherit(open(&disk), "", &[]);
    let mut client = BlockingClient::new(control, CONTROL_MAX_FRAME);
    vhost.write_all(&[1, 0, 0, 0, 1]).unwrap();
    for _ in 0..5 {
        health(&mut client);
        std::thread::sleep(Duration::from_millis(10));
    }
    // And it is a breach of the protocol in the end.
    assert_eq!(blk.wait_exit().code(), Some(1));
    let said = blk.stderr();
    assert!(said.contains("vhost-user channel"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
}
