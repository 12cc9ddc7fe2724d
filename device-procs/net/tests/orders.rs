//! Given the process as the launcher starts it: limits and orders of the VMM's, a tap that
//! goes away, and a successor.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::time::Duration;

use bulkhead_net::tap::Tap;
use bulkhead_proto::common::{NetLimits, TokenBucket};
use bulkhead_proto::device::net_update::Link;
use bulkhead_proto::device::{
    DrainRequest, DrainResponse, HealthRequest, HealthResponse, NetUpdate, ResumeRequest,
    ResumeResponse,
};
use bulkhead_proto::protobuf::MessageField;
use bulkhead_proto::server::CONTROL_MAX_FRAME;
use bulkhead_proto::{BlockingClient, DEVICE_SERVICE};
use bulkhead_runtime::driver::WRITE;
use support::bed::*;
use support::*;
use vhost::VhostBackend;

fn bytes(per_second: u64, burst: u64) -> MessageField<NetLimits> {
    let mut bucket = TokenBucket::new();
    (bucket.per_second, bucket.burst) = (per_second, burst);
    let mut limits = NetLimits::new();
    limits.bytes = MessageField::some(bucket);
    MessageField::some(limits)
}

#[test]
fn limits_hold_frames_back_until_they_are_lifted() {
    engines(|engine| {
        // A byte per second: what the burst lets pass is all for this test's purposes.
        let mut bed = Bed::new(engine, 1, &["--tx-bps", "1:1000"], |o| o);
        let mut update = NetUpdate::new();
        update.to_guest = bytes(1, 1000);
        bed.update(update).unwrap();
        let wire = Wire::new("t0", false);
        bed.vm.offer_buffers(0, 0, 32);
        for i in 0..20u16 {
            let at = buffer(1, i);
            bed.vm.write_mem(at, &PLAIN);
            bed.vm
                .write_mem(at + 12, &ether(PEER, MAC_BYTES, 100, i as u8));
            bed.vm.queues[1].ring.chain(i, &[d(at, 112, 0)]);
            bed.vm.queues[1].ring.offer(i);
            wire.send(&ether(MAC_BYTES, PEER, 100, i as u8));
        }
        bed.vm.kick(1);
        for i in 0..10 {
            assert_eq!(wire.receive(), ether(PEER, MAC_BYTES, 100, i));
            assert_eq!(bed.vm.receive(0)[HEADER..], ether(MAC_BYTES, PEER, 100, i));
        }
        wait_for("both directions to be held", || {
            let stats = bed.stats();
            stats.queues[0].throttled > 0 && stats.queues[1].throttled > 0
        });
        // They do not hang.
        wait_for("sleep", || {
            bed.health().iter().take(2).all(|ring| ring.held)
        });
        let state = bed.state();
        let (to, from) = (&state.to_guest.bytes, &state.from_guest.bytes);
        assert_eq!((to.per_second, to.burst), (1, 1000));
        assert_eq!((from.per_second, from.burst), (1, 1000));
        assert!(state.to_guest.packets.is_none());
        let passed = bed.stats().queues[1].requests;
        assert!((10..=12).contains(&passed), "{engine}: {passed}");
        let mut update = NetUpdate::new();
        update.to_guest = MessageField::some(NetLimits::new());
        update.from_guest = MessageField::some(NetLimits::new());
        bed.update(update).unwrap();
        for i in 10..20 {
            assert_eq!(wire.receive(), ether(PEER, MAC_BYTES, 100, i));
            assert_eq!(bed.vm.receive(0)[HEADER..], ether(MAC_BYTES, PEER, 100, i));
        }
        let state = bed.state();
        assert!(state.to_guest.bytes.is_none() && state.from_guest.bytes.is_none());
        let mut update = NetUpdate::new();
        update.from_guest = bytes(0, 5);
        assert!(bed.update(update).unwrap_err().contains("from_guest.bytes"));
    });
}

#[test]
fn a_drained_device_takes_nothing_until_it_is_resumed() {
    engines(|engine| {
        let mut bed = Bed::new(engine, 1, &[], |o| o);
        let wire = Wire::new("t0", false);
        bed.vm.offer_buffers(0, 0, 8);
        let client = &mut bed.client;
        wait_for("the drain", || {
            let reply: DrainResponse = client
                .call(DEVICE_SERVICE, "Drain", &DrainRequest::new(), PATIENCE)
                .unwrap();
            reply.drained
        });
        let out = ether(PEER, MAC_BYTES, 100, 1);
        let at = buffer(1, 0);
        bed.vm.write_mem(at, &[PLAIN.as_slice(), &out].concat());
        bed.vm.queues[1].ring.chain(0, &[d(at, 112, 0)]);
        bed.vm.queues[1].ring.offer(0);
        bed.vm.kick(1);
        let back = ether(MAC_BYTES, PEER, 100, 1);
        wire.send(&back);
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(bed.vm.take_used(0), None);
        assert_eq!(bed.vm.take_used(1), None);
        let _: ResumeResponse = bed
            .client
            .call(DEVICE_SERVICE, "Resume", &ResumeRequest::new(), PATIENCE)
            .unwrap();
        assert_eq!(wire.receive(), out);
        assert_eq!(bed.vm.receive(0)[HEADER..], back);
    });
}

#[test]
fn rings_stop_and_go_on_where_they_were() {
    engines(|engine| {
        let mut bed = Bed::new(engine, 1, &[], |o| o);
        let wire = Wire::new("t0", false);
        bed.vm.offer_buffers(0, 0, 8);
        for round in 0..3u8 {
            bed.vm.send(1, &PLAIN, &ether(PEER, MAC_BYTES, 100, round));
            wire.receive();
            wire.send(&ether(MAC_BYTES, PEER, 100, round));
            bed.vm.receive(0);
            for queue in 0..3 {
                let base = bed.vm.frontend.get_vring_base(queue).unwrap();
                let used = bed.vm.queues[queue].ring.used_idx();
                assert_eq!(base, u32::from(used), "{engine}: nothing is in flight");
                bed.vm.start_queue(queue, used);
            }
        }
        // Another process takes over: buffers that were offered to the first one are used.
        drop(bed.net);
        let (_net, _control, vhost) = Net::inherit(&bed.tap, &["--io-engine", engine]);
        let mut vm = Vm::over(vhost, 3, |o| o);
        vm.file = bed.vm.file;
        vm.memory = bed.vm.memory;
        vm.queues = bed.vm.queues;
        vm.frontend.set_mem_table(&[vm.region()]).unwrap();
        for queue in 0..3 {
            let used = vm.queues[queue].ring.used_idx();
            vm.start_queue(queue, used);
        }
        let frame = ether(MAC_BYTES, PEER, 100, 77);
        wire.send(&frame);
        assert_eq!(vm.receive(0)[HEADER..], frame);
        vm.send(1, &PLAIN, &ether(PEER, MAC_BYTES, 100, 78));
        assert_eq!(wire.receive(), ether(PEER, MAC_BYTES, 100, 78));
    });
}

#[test]
fn a_tap_that_goes_down_or_away_loses_frames_and_no_more() {
    engines(|engine| {
        let mut bed = Bed::new(engine, 1, &[], |o| o);
        bed.vm.offer_buffers(0, 0, 8);
        ip(&["link", "set", "t0", "down"]);
        let health: HealthResponse = bed
            .client
            .call(DEVICE_SERVICE, "Health", &HealthRequest::new(), PATIENCE)
            .unwrap();
        assert!(!health.host_gone && bed.state().link_up, "{engine}");
        let frame = ether(PEER, MAC_BYTES, 100, 1);
        for _ in 0..3 {
            bed.vm.send(1, &PLAIN, &frame);
        }
        let stats = bed.stats();
        assert_eq!((stats.queues[1].dropped, stats.queues[1].errors), (3, 3));
        up("t0");
        let wire = Wire::new("t0", false);
        bed.vm.send(1, &PLAIN, &frame);
        assert_eq!(wire.receive(), frame);
        ip(&["link", "del", "t0"]);
        bed.vm.send(1, &PLAIN, &frame);
        assert_eq!(bed.stats().queues[1].dropped, 4);
        let before = bed.stats().queues[0].syscalls;
        std::thread::sleep(Duration::from_millis(100));
        let spent = bed.stats().queues[0].syscalls - before;
        assert!(
            spent < 50,
            "{engine}: {spent} system calls without a tap: it spins"
        );
        assert!(bed.net.is_running());
        // What the VMM tells the operator, and the driver its guest.
        let health: HealthResponse = bed
            .client
            .call(DEVICE_SERVICE, "Health", &HealthRequest::new(), PATIENCE)
            .unwrap();
        assert!(health.host_gone && !bed.state().link_up, "{engine}");
        let mut update = NetUpdate::new();
        update.link = Link::UP.into();
        let refused = bed.update(update).unwrap_err();
        assert!(refused.contains("tap t0 was deleted"), "{refused}");
        let ring = &mut bed.vm.queues[0].ring;
        ring.chain(20, &[d(buffer(0, 20), 2048, WRITE)]);
        ring.offer(20);
        bed.vm.kick(0);
        bed.vm.send(1, &PLAIN, &frame);
    });
}

#[test]
fn a_tap_that_was_removed_before_the_driver_begins_is_told_by_its_name() {
    engines(|engine| {
        let tap = Tap::attach("t0", 1, None).unwrap();
        let (mut net, control, vhost) = Net::inherit(&tap, &["--io-engine", engine]);
        // It has taken the tap when it answers.
        let mut client = BlockingClient::new(control, CONTROL_MAX_FRAME);
        let _: HealthResponse = client
            .call(DEVICE_SERVICE, "Health", &HealthRequest::new(), PATIENCE)
            .unwrap();
        ip(&["link", "del", "t0"]);
        // When it ends in the middle of this, that is well, too.
        let begun = std::panic::AssertUnwindSafe(|| Vm::over(vhost, 3, |offered| offered).start());
        let _ = std::panic::catch_unwind(begun);
        net.wait_exit();
        let said = net.stderr();
        assert!(
            said.contains("tap t0: its interface was removed from the host"),
            "{engine}: {said}"
        );
    });
}

#[test]
fn a_process_that_begins_with_a_deleted_tap_says_so_and_what_helps() {
    engines(|engine| {
        let tap = Tap::attach("t0", 1, None).unwrap();
        ip(&["link", "del", "t0"]);
        let (mut net, _control, _vhost) = Net::inherit(&tap, &["--io-engine", engine]);
        assert_eq!(net.wait_exit().code(), Some(1));
        let said = net.stderr();
        assert!(
            said.contains("the interface of its tap was removed") && said.lines().count() == 1,
            "{engine}: {said}"
        );
    });
}

#[test]
fn a_successor_goes_on_with_what_the_driver_has_set() {
    use vhost::vhost_user::VhostUserFrontend;
    use vhost::vhost_user::message::VhostUserInflight;
    engines(|engine| {
        let mut bed = Bed::new(engine, 2, &[], |o| o);
        let request = VhostUserInflight {
            mmap_size: 0,
            mmap_offset: 0,
            num_queues: 5,
            queue_size: RING_SIZE,
        };
        let begin_anew = |bed: &mut Bed| {
            for queue in 0..5 {
                bed.vm.frontend.get_vring_base(queue).unwrap();
                bed.vm.queues[queue].ring.reset();
            }
            let (region, file) = bed.vm.frontend.get_inflight_fd(&request).unwrap();
            let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
            bed.vm.frontend.set_inflight_fd(&region, fd).unwrap();
            (region, file)
        };
        let (region, file) = begin_anew(&mut bed);
        let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
        for queue in 0..5 {
            bed.vm.start_queue(queue, 0);
        }
        let group = [1, 0, 0x5e, 0, 0, 5];
        assert_eq!(bed.command(0, 0, &[0]), OK);
        assert_eq!(bed.command(1, 0, &[macs(&[]), macs(&[group])].concat()), OK);
        assert_eq!(bed.command(2, 0, &7u16.to_le_bytes()), OK);
        assert_eq!(bed.command(1, 1, &[2, 0, 0, 0, 0, 0x42]), OK);
        assert_eq!(bed.command(4, 0, &2u16.to_le_bytes()), OK);
        let mut before = bed.state();
        assert_eq!(before.queue_pairs, 2);

        let take_over = |bed: Bed| {
            drop(bed.net);
            let args = ["--io-engine", engine];
            let (net, control, vhost) = Net::inherit(&bed.tap, &args);
            let mut vm = Vm::over(vhost, 5, |o| o);
            (vm.file, vm.memory, vm.queues) = (bed.vm.file, bed.vm.memory, bed.vm.queues);
            vm.frontend.set_inflight_fd(&region, fd).unwrap();
            vm.frontend.set_mem_table(&[vm.region()]).unwrap();
            for queue in 0..5 {
                let used = vm.queues[queue].ring.used_idx();
                vm.start_queue(queue, used);
            }
            Bed {
                net,
                client: BlockingClient::new(control, CONTROL_MAX_FRAME),
                vm,
                ..bed
            }
        };
        bed = take_over(bed);
        assert_eq!(bed.state(), before);
        assert_eq!(bed.vm.config(0, 6), [2, 0, 0, 0, 0, 0x42]);
        assert_eq!(bed.vm.link_status(), 3, "the driver is to announce itself");
        // And the successor's own is kept, too.
        assert_eq!(bed.command(2, 1, &7u16.to_le_bytes()), OK);
        before.vlan_filter.clear();
        bed = take_over(bed);
        assert_eq!(bed.state(), before);

        // A driver that begins anew finds nothing of it.
        let _newer = begin_anew(&mut bed);
        let state = bed.state();
        assert!(state.promiscuous && state.multicast_filter.is_empty());
        assert_eq!(
            (state.queue_pairs, state.mac.as_slice()),
            (1, &MAC_BYTES[..])
        );
        assert_eq!(bed.vm.link_status(), 1);
    });
}
