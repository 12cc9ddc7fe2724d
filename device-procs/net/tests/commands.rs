//! Given the process as the launcher starts it: the driver's commands and the VMM's calls
//! change what they say and nothing else.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use bulkhead_net::features as f;
use bulkhead_net::tap::Tap;
use bulkhead_proto::DEVICE_SERVICE;
use bulkhead_proto::device::net_update::Link;
use bulkhead_proto::device::{
    HealthRequest, HealthResponse, HelloRequest, HelloResponse, ShutdownRequest, ShutdownResponse,
};
use support::bed::*;
use support::*;

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
        assert_eq!(bed.vm.link_status(), 3, "again, once it has seen the link");
        bed.health();
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
        assert_eq!(bed.command(3, 0, &[]), OK);
        assert_eq!(bed.vm.link_status(), 1);
        bed.link(Link::UP);
        assert_eq!(bed.vm.link_status(), 3);
        assert_eq!(bed.command(3, 0, &[]), OK);
        assert_eq!(bed.vm.link_status(), 1, "once, where the link was there");
    });
}

#[test]
fn a_driver_cannot_keep_the_hosts_network_lock_busy() {
    if !isolated() {
        return;
    }
    let mut bed = Bed::new("io_uring", 2, &[], |o| o);
    let start = std::time::Instant::now();
    let (mut done, mut pairs) = (0.0, 1u16);
    for n in 0..2000u32 {
        let answer = if n % 2 == 0 {
            let wanted = 3 - pairs;
            let answer = bed.command(4, 0, &wanted.to_le_bytes());
            if answer == OK {
                pairs = wanted;
            }
            answer
        } else {
            let offloads = if n % 4 == 1 { f::F_GUEST_CSUM } else { 0 };
            bed.command(5, 0, &offloads.to_le_bytes())
        };
        done += f64::from(u8::from(answer == OK));
        // What changes nothing asks nothing of the host.
        assert_eq!(bed.command(4, 0, &pairs.to_le_bytes()), OK);
    }
    let allowed = 65.0 + 16.0 * (start.elapsed().as_secs_f64() + 1.0);
    // A quarter of the offloads are what they were.
    assert!(done <= allowed + 500.0, "{done} changes, {allowed} allowed");
    assert_eq!(bed.state().queue_pairs, u32::from(pairs));
    // It may again, a while later.
    wait_for("a change", || {
        let wanted = 3 - pairs;
        bed.command(4, 0, &wanted.to_le_bytes()) == OK
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
