//! Given the process as the launcher starts it: the driver's commands and the VMM's calls
//! change what they say and nothing else.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::time::Duration;

use bulkhead_net::features as f;
use bulkhead_net::tap::Tap;
use bulkhead_proto::common::{NetLimits, TokenBucket};
use bulkhead_proto::device::net_update::Link;
use bulkhead_proto::device::{
    DrainRequest, DrainResponse, HealthRequest, HealthResponse, HelloRequest, HelloResponse,
    NetState, NetUpdate, ResumeRequest, ResumeResponse, RingHealth, ShutdownRequest,
    ShutdownResponse, StatsRequest, StatsResponse, UpdateRequest, UpdateResponse, update_request,
};
use bulkhead_proto::protobuf::MessageField;
use bulkhead_proto::server::CONTROL_MAX_FRAME;
use bulkhead_proto::{BlockingClient, DEVICE_SERVICE};
use bulkhead_runtime::driver::WRITE;
use support::*;
use vhost::VhostBackend;

const PEER: [u8; 6] = [2, 0, 0, 0, 0, 9];
const PLAIN: [u8; HEADER] = [0; HEADER];
const OK: u8 = 0;
const ERR: u8 = 1;

struct Bed {
    net: Net,
    client: BlockingClient,
    vm: Vm,
    tap: Tap,
    pairs: usize,
}

impl Bed {
    fn new(engine: &str, pairs: u16, more: &[&str], choose: impl Fn(u64) -> u64) -> Self {
        let tap = Tap::attach("t0", pairs, None).unwrap();
        up("t0");
        let args = [&["--io-engine", engine], more].concat();
        let (net, control, vhost) = Net::inherit(&tap, &args);
        let client = BlockingClient::new(control, CONTROL_MAX_FRAME);
        let mut vm = Vm::over(vhost, 2 * pairs + 1, choose);
        vm.start();
        Self {
            net,
            client,
            vm,
            tap,
            pairs: usize::from(pairs),
        }
    }

    fn command(&mut self, class: u8, command: u8, data: &[u8]) -> u8 {
        self.vm.command(2 * self.pairs, class, command, data)
    }

    fn stats(&mut self) -> StatsResponse {
        self.client
            .call(DEVICE_SERVICE, "Stats", &StatsRequest::new(), PATIENCE)
            .unwrap()
    }

    fn health(&mut self) -> Vec<RingHealth> {
        let reply: HealthResponse = self
            .client
            .call(DEVICE_SERVICE, "Health", &HealthRequest::new(), PATIENCE)
            .unwrap();
        reply.rings
    }

    fn state(&mut self) -> NetState {
        self.stats().net.unwrap()
    }

    fn update(&mut self, update: NetUpdate) -> Result<UpdateResponse, String> {
        let mut request = UpdateRequest::new();
        request.kind = Some(update_request::Kind::Net(update));
        self.client
            .call(DEVICE_SERVICE, "Update", &request, PATIENCE)
            .map_err(|e| e.to_string())
    }

    fn link(&mut self, link: Link) {
        let mut update = NetUpdate::new();
        update.link = link.into();
        self.update(update).unwrap();
    }

    /// Which of these frames the guest gets, when they are sent one after another.
    fn passing(&mut self, wire: &Wire, frames: &[Vec<u8>]) -> Vec<bool> {
        let last = ether(MAC_BYTES, PEER, 60, 0xee);
        let mut passing = Vec::new();
        for frame in frames {
            wire.send(frame);
            wire.send(&last);
            let mut got = self.vm.receive(0);
            passing.push(got[HEADER..] == *frame);
            if got[HEADER..] == *frame {
                got = self.vm.receive(0);
            }
            assert_eq!(got[HEADER..], last);
        }
        passing
    }
}

fn engines(test: impl Fn(&str)) {
    for engine in ["io_uring", "plain"] {
        if !isolated() {
            return;
        }
        test(engine);
    }
}

#[test]
fn the_vmm_is_answered_by_a_confined_process() {
    engines(|engine| {
        let mut bed = Bed::new(engine, 2, &["--mtu", "1400"], |o| o);
        let mut hello = HelloRequest::new();
        hello.incarnation = 7;
        let reply: HelloResponse = bed
            .client
            .call(DEVICE_SERVICE, "Hello", &hello, PATIENCE)
            .unwrap();
        assert_eq!((reply.kind.as_str(), reply.incarnation), ("net", 7));
        assert!(reply.confinement.policy.starts_with("bulkhead-net"));
        assert_eq!(bed.net.status_field("Seccomp"), "2");
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(bed.net.status_field(set), "0000000000000000");
        }
        assert_eq!(
            bed.net.status_field("Threads"),
            "4",
            "main, two pairs, commands"
        );

        let config = bed.vm.config(0, 16);
        assert_eq!(config[..6], MAC_BYTES);
        assert_eq!(
            config[6..12],
            [1, 0, 2, 0, 0x78, 5],
            "up, two pairs, MTU 1400"
        );
        assert_eq!(config[12..], [0; 4]);
        let health: HealthResponse = bed
            .client
            .call(DEVICE_SERVICE, "Health", &HealthRequest::new(), PATIENCE)
            .unwrap();
        assert_eq!(health.rings.len(), 5);
        assert!(health.rings.iter().all(|r| r.started && !r.broken));

        let wire = Wire::new("t0", false);
        bed.vm.offer_buffers(0, 0, 8);
        bed.vm.send(1, &PLAIN, &ether(PEER, MAC_BYTES, 100, 1));
        wire.receive();
        wire.send(&ether(MAC_BYTES, PEER, 200, 1));
        bed.vm.receive(0);
        let stats = bed.stats();
        assert_eq!(
            (stats.queues[0].requests, stats.queues[0].read_bytes),
            (1, 200)
        );
        assert_eq!(
            (stats.queues[1].requests, stats.queues[1].written_bytes),
            (1, 100)
        );
        assert!(stats.queues[1].kicks > 0 && stats.queues[1].interrupts > 0);
        assert!(stats.queues[0].syscalls > 0);
        let state = stats.net.unwrap();
        assert_eq!((state.link_up, state.queue_pairs), (true, 1));
        assert_eq!(state.datapath, "tap");

        let _: ShutdownResponse = bed
            .client
            .call(
                DEVICE_SERVICE,
                "Shutdown",
                &ShutdownRequest::new(),
                PATIENCE,
            )
            .unwrap();
        assert_eq!(bed.net.wait_exit().code(), Some(0), "{}", bed.net.stderr());
    });
}

fn macs(list: &[[u8; 6]]) -> Vec<u8> {
    let mut table = (list.len() as u32).to_le_bytes().to_vec();
    table.extend(list.concat());
    table
}

#[test]
fn the_driver_chooses_which_frames_it_gets() {
    engines(|engine| {
        let mut bed = Bed::new(engine, 1, &[], |o| o);
        let wire = Wire::new("t0", false);
        bed.vm.offer_buffers(0, 0, 16);
        let other = [2, 0, 0, 0, 0, 2];
        let group = [1, 0, 0x5e, 0, 0, 5];
        let mut tagged = ether(MAC_BYTES, PEER, 80, 5);
        tagged[12..18].copy_from_slice(&[0x81, 0, 0x20, 5, 8, 0]);
        let frames = [
            ether(MAC_BYTES, PEER, 60, 1),
            ether(other, PEER, 60, 2),
            ether(group, PEER, 60, 3),
            ether([0xff; 6], PEER, 60, 4),
            tagged,
        ];
        assert_eq!(
            bed.passing(&wire, &frames),
            [true; 5],
            "until the driver speaks"
        );
        assert_eq!(bed.command(0, 0, &[0]), OK);
        assert_eq!(
            bed.passing(&wire, &frames),
            [true, false, false, true, false]
        );
        assert_eq!(bed.command(0, 1, &[1]), OK);
        assert_eq!(
            bed.passing(&wire, &frames),
            [true, false, true, true, false]
        );
        assert_eq!(bed.command(0, 1, &[0]), OK);
        let tables = [macs(&[other]), macs(&[group])].concat();
        assert_eq!(bed.command(1, 0, &tables), OK);
        assert_eq!(bed.command(2, 0, &5u16.to_le_bytes()), OK);
        assert_eq!(bed.passing(&wire, &frames), [true; 5]);

        let state = bed.state();
        assert!(!state.promiscuous && !state.all_multicast);
        assert_eq!(state.unicast_filter, [other.to_vec()]);
        assert_eq!(state.multicast_filter, [group.to_vec()]);
        assert_eq!(state.vlan_filter, [5]);

        assert_eq!(bed.command(2, 1, &5u16.to_le_bytes()), OK);
        assert_eq!(bed.command(1, 0, &[macs(&[]), macs(&[])].concat()), OK);
        assert_eq!(
            bed.passing(&wire, &frames),
            [true, false, false, true, false]
        );
        // More than there is room for: all of that kind.
        let many: Vec<[u8; 6]> = (0..200).map(|i| [2, 1, 1, 1, 1, i]).collect();
        assert_eq!(bed.command(1, 0, &[macs(&many), macs(&[])].concat()), OK);
        assert_eq!(
            bed.passing(&wire, &frames),
            [true, true, false, true, false]
        );
        assert!(bed.state().promiscuous);
        assert_eq!(bed.state().unicast_filter.len(), 64);

        assert_eq!(bed.command(1, 0, &[macs(&[]), macs(&[])].concat()), OK);
        assert_eq!(bed.command(1, 1, &other), OK);
        assert_eq!(bed.vm.config(0, 6), other);
        assert_eq!(bed.state().mac, other);
        wire.send(&frames[0]);
        wire.send(&frames[1]);
        assert_eq!(bed.vm.receive(0)[HEADER..], frames[1]);
    });
}

#[test]
fn commands_that_make_no_sense_are_refused_and_change_nothing() {
    if !isolated() {
        return;
    }
    let mut bed = Bed::new("io_uring", 2, &[], |o| o & !f::F_GUEST_UFO);
    let before = bed.state();
    let u16s = |n: u16| n.to_le_bytes().to_vec();
    for (class, command, data) in [
        (0, 0, vec![2]),
        (0, 0, vec![]),
        (0, 0, vec![1, 1]),
        (0, 9, vec![1]),
        (1, 0, vec![]),
        (1, 0, vec![1, 0, 0, 0]),
        (1, 0, vec![0xff; 8]),
        (1, 0, vec![0, 0, 0, 0, 0, 0, 0, 0, 1]),
        (1, 1, vec![1, 0, 0, 0, 0, 1]),
        (1, 1, vec![2, 0, 0, 0, 1]),
        (2, 0, u16s(4096)),
        (2, 2, u16s(1)),
        (3, 0, vec![1]),
        (4, 0, u16s(0)),
        (4, 0, u16s(3)),
        (4, 1, u16s(1)),
        (5, 0, f::F_GUEST_UFO.to_le_bytes().to_vec()),
        (5, 0, (1u64 << 63).to_le_bytes().to_vec()),
        (6, 0, vec![0; 12]),
        (0xff, 0xff, vec![]),
    ] {
        assert_eq!(
            bed.command(class, command, &data),
            ERR,
            "{class} {command} {data:?}"
        );
    }
    assert_eq!(bed.state(), before);
    let stats = bed.stats();
    assert_eq!((stats.queues[4].requests, stats.queues[4].errors), (20, 20));
    assert_eq!(bed.command(5, 0, &f::F_GUEST_CSUM.to_le_bytes()), OK);
}

#[test]
fn what_was_not_negotiated_is_refused() {
    if !isolated() {
        return;
    }
    let keep = f::F_CTRL_VQ | (1 << 32) | (1 << 30);
    let tap = Tap::attach("t0", 2, None).unwrap();
    up("t0");
    let (_net, _control, vhost) = Net::inherit(&tap, &[]);
    // Without MQ the control queue is ring 2, though the device has two pairs.
    let mut vm = Vm::over(vhost, 3, |_| keep);
    vm.start();
    for (class, command, data) in [
        (0, 0, vec![0]),
        (1, 0, vec![0; 8]),
        (1, 1, MAC_BYTES.to_vec()),
        (2, 0, vec![1, 0]),
        (3, 0, vec![]),
        (4, 0, vec![1, 0]),
        (5, 0, vec![0; 8]),
    ] {
        assert_eq!(
            vm.command(2, class, command, &data),
            ERR,
            "{class} {command}"
        );
    }
}

#[test]
fn a_cable_that_is_pulled_stops_frames_both_ways_and_the_host_sees_it() {
    engines(|engine| {
        let mut bed = Bed::new(engine, 1, &["--link", "down"], |o| o);
        let wire = Wire::new("t0", false);
        bed.vm.offer_buffers(0, 0, 8);
        assert_eq!(bed.vm.link_status(), 0);
        assert!(!has_carrier("t0"));
        // What the guest sends is taken and thrown away.
        let frame = ether(PEER, MAC_BYTES, 60, 1);
        bed.vm.send(1, &PLAIN, &frame);
        assert_eq!(bed.stats().queues[1].dropped, 1);

        bed.link(Link::UP);
        assert_eq!(bed.vm.link_status(), 3, "up, announce");
        assert!(has_carrier("t0"));
        assert_eq!(bed.command(3, 0, &[]), OK);
        assert_eq!(bed.vm.link_status(), 1);
        bed.vm.send(1, &PLAIN, &frame);
        assert_eq!(wire.receive(), frame);

        bed.link(Link::DOWN);
        assert_eq!(bed.vm.link_status(), 0);
        assert!(!has_carrier("t0"));
        bed.vm.send(1, &PLAIN, &frame);
        assert_eq!(bed.stats().queues[1].dropped, 2);
        bed.link(Link::UP);
        assert_eq!(bed.vm.link_status(), 3);
        // The frame that was dropped did not go out late.
        let second = ether(PEER, MAC_BYTES, 60, 2);
        bed.vm.send(1, &PLAIN, &second);
        assert_eq!(wire.receive(), second);
        // "Up" while it is up: the driver is asked to announce itself, as after a restart.
        assert_eq!(bed.command(3, 0, &[]), OK);
        bed.link(Link::UP);
        assert_eq!(bed.vm.link_status(), 3);
    });
}

#[test]
fn pairs_come_and_go_with_the_drivers_command() {
    engines(|engine| {
        let mut bed = Bed::new(engine, 2, &[], |o| o);
        let wire = Wire::new("t0", false);
        for queue in [0, 2] {
            bed.vm.offer_buffers(queue, 0, 60);
        }
        // With one pair, whatever comes goes to it.
        let flows = |seed: u8| -> Vec<Vec<u8>> {
            (0..40u8)
                .map(|i| {
                    let mut f = ether(MAC_BYTES, [2, 0, 0, 0, seed, i], 80, i);
                    f[12..14].copy_from_slice(&[8, 0]);
                    f[14..34].copy_from_slice(&[
                        0x45, 0, 0, 66, 0, 1, 0x40, 0, 64, 17, 0, 0, 10, 0, seed, i, 10, 0, 0, 2,
                    ]);
                    f[34..42].copy_from_slice(&[0x10, i, 0x20, seed, 0, 46, 0, 0]);
                    f
                })
                .collect()
        };
        for frame in flows(1) {
            wire.send(&frame);
            assert_eq!(bed.vm.receive(0)[HEADER..], frame);
        }
        assert_eq!(bed.command(4, 0, &2u16.to_le_bytes()), OK);
        assert_eq!(bed.state().queue_pairs, 2);
        let frames = flows(2);
        for frame in &frames {
            wire.send(frame);
        }
        let mut got = [0; 2];
        let start = std::time::Instant::now();
        while got[0] + got[1] < frames.len() {
            assert!(
                start.elapsed() < PATIENCE,
                "{engine}: {got:?} of {}",
                frames.len()
            );
            for (n, queue) in [0, 2].into_iter().enumerate() {
                if bed.vm.queues[queue].ring.used_idx() as usize
                    != got[n] + if n == 0 { 40 } else { 0 }
                {
                    let frame = bed.vm.receive(queue);
                    assert!(frames.contains(&frame[HEADER..].to_vec()));
                    got[n] += 1;
                }
            }
        }
        assert!(
            got[0] > 0 && got[1] > 0,
            "{engine}: both pairs are used: {got:?}"
        );
        let out = ether(PEER, MAC_BYTES, 70, 9);
        bed.vm.send(3, &PLAIN, &out);
        assert_eq!(wire.receive(), out, "the second pair sends, too");

        assert_eq!(bed.command(4, 0, &1u16.to_le_bytes()), OK);
        for frame in flows(3) {
            wire.send(&frame);
            assert_eq!(bed.vm.receive(0)[HEADER..], frame);
        }
        assert_eq!(bed.tap.queues(), 2);
    });
}

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
        let (mut net, _control, vhost) = Net::inherit(&tap, &["--io-engine", engine]);
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
        for queue in 0..5 {
            bed.vm.frontend.get_vring_base(queue).unwrap();
            bed.vm.queues[queue].ring.reset();
        }
        let (region, file) = bed.vm.frontend.get_inflight_fd(&request).unwrap();
        let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
        bed.vm.frontend.set_inflight_fd(&region, fd).unwrap();
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
        for queue in 0..5 {
            bed.vm.frontend.get_vring_base(queue).unwrap();
            bed.vm.queues[queue].ring.reset();
        }
        let (region, file) = bed.vm.frontend.get_inflight_fd(&request).unwrap();
        let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
        bed.vm.frontend.set_inflight_fd(&region, fd).unwrap();
        let state = bed.state();
        assert!(state.promiscuous && state.multicast_filter.is_empty());
        assert_eq!(
            (state.queue_pairs, state.mac.as_slice()),
            (1, &MAC_BYTES[..])
        );
        assert_eq!(bed.vm.link_status(), 1);
    });
}
