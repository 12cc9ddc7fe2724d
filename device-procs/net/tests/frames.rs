//! Given a guest's driver on one side and the wire on the other: every frame arrives as it was
//! sent, whatever the buffers look like.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use bulkhead_net::features as f;
use bulkhead_runtime::driver::WRITE;
use support::*;

const PEER: [u8; 6] = [2, 0, 0, 0, 0, 9];
const PLAIN: [u8; HEADER] = [0; HEADER];

fn engines(test: impl Fn(&str, &[&str])) {
    if !isolated() {
        return;
    }
    for engine in ["io_uring", "plain"] {
        test(engine, &["--io-engine", engine]);
    }
}

#[test]
fn frames_go_both_ways_unchanged() {
    engines(|engine, args| {
        let scratch = Scratch::new(&format!("both-{engine}"));
        let socket = scratch.path("s");
        let tap = format!("t-{engine}");
        let mut net = Net::listen(&socket, &tap, args);
        let mut vm = Vm::connect(&socket, 3);
        vm.start();
        let wire = Wire::new(&tap, false);
        vm.offer_buffers(0, 0, 32);
        for (seed, len) in (0u8..).zip([60, 64, 1499, 1514]) {
            let out = ether(PEER, MAC_BYTES, len, seed);
            vm.send(1, &PLAIN, &out);
            assert_eq!(wire.receive(), out, "{engine}: {len} bytes out");
            let back = ether(MAC_BYTES, PEER, len, seed + 100);
            wire.send(&back);
            let got = vm.receive(0);
            assert_eq!(got[10..12], [1, 0], "one buffer");
            assert_eq!(got[HEADER..], back, "{engine}: {len} bytes in");
        }
        assert!(net.is_running());
    });
}

#[test]
fn a_frame_may_lie_in_many_pieces() {
    engines(|engine, args| {
        let scratch = Scratch::new(&format!("pieces-{engine}"));
        let socket = scratch.path("s");
        let tap = format!("t-{engine}");
        let _net = Net::listen(&socket, &tap, args);
        let mut vm = Vm::connect(&socket, 3);
        vm.start();
        let wire = Wire::new(&tap, false);
        let frame = ether(PEER, MAC_BYTES, 1200, 7);
        let whole = [PLAIN.as_slice(), &frame].concat();
        for sizes in [
            vec![12, 1200],
            vec![1; 20],
            vec![0, 5, 0, 7, 600],
            vec![13, 13],
        ] {
            let mut chain = Vec::new();
            let (mut at, mut rest) = (buffer(1, 0), whole.as_slice());
            for size in sizes.into_iter().chain([whole.len()]) {
                let (now, later) = rest.split_at(rest.len().min(size));
                vm.write_mem(at, now);
                chain.push(d(at, now.len() as u32, 0));
                at += 0x1000;
                rest = later;
            }
            vm.chain_on(1, &chain);
            assert_eq!(wire.receive(), frame);
        }
    });
}

#[test]
fn a_long_frame_is_merged_from_many_buffers_and_waits_for_them() {
    engines(|engine, args| {
        let scratch = Scratch::new(&format!("merge-{engine}"));
        let socket = scratch.path("s");
        let tap = format!("t-{engine}");
        let _net = Net::listen(&socket, &tap, args);
        ip(&["link", "set", &tap, "mtu", "9000"]);
        let mut vm = Vm::connect(&socket, 3);
        vm.start();
        let wire = Wire::new(&tap, false);
        let frame = ether(MAC_BYTES, PEER, 9014, 3);
        wire.send(&frame);
        // Five buffers are needed. Too few: nothing is used, and nothing spins or is lost.
        vm.offer_buffers(0, 0, 2);
        vm.offer_buffers(0, 2, 2);
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert_eq!(vm.take_used(0), None);
        vm.offer_buffers(0, 4, 1);
        let got = vm.receive(0);
        assert_eq!(got[10..12], [5, 0]);
        assert_eq!(got[HEADER..], frame);
        // The five are there again; in order, and each as full as it can be.
        wire.send(&frame);
        for head in 0..5 {
            let (used, len) = vm.completion(0);
            assert_eq!(used, head);
            assert_eq!(len, if head < 4 { BUFFER } else { 9026 - 4 * BUFFER });
        }
    });
}

#[test]
fn without_merging_a_frame_has_one_chain_or_is_dropped() {
    engines(|engine, args| {
        let scratch = Scratch::new(&format!("single-{engine}"));
        let socket = scratch.path("s");
        let tap = format!("t-{engine}");
        let _net = Net::listen(&socket, &tap, args);
        let stream = std::os::unix::net::UnixStream::connect(&socket).unwrap();
        let mut vm = Vm::over(stream, 3, |offered| offered & !f::F_MRG_RXBUF);
        vm.start();
        let wire = Wire::new(&tap, false);
        // A chain of two buffers, the first for the header alone; then a short one.
        let (a, b) = (buffer(0, 0), buffer(0, 1));
        let ring = &mut vm.queues[0].ring;
        ring.chain(0, &[d(a, 12, WRITE), d(b, 1600, WRITE)]);
        ring.chain(4, &[d(buffer(0, 4), 1000, WRITE)]);
        ring.offer(0);
        ring.offer(4);
        vm.kick(0);
        let long = ether(MAC_BYTES, PEER, 1400, 1);
        wire.send(&long);
        assert_eq!(vm.completion(0), (0, 1412));
        assert_eq!(vm.read_mem(a, 12)[10..], [1, 0]);
        assert_eq!(vm.read_mem(b, 1400), long);
        wire.send(&long);
        let short = ether(MAC_BYTES, PEER, 900, 2);
        wire.send(&short);
        assert_eq!(vm.completion(0), (4, 912), "the long one was dropped");
        assert_eq!(vm.read_mem(buffer(0, 4) + 12, 900), short);
    });
}

/// Ethernet, IPv4 and TCP with so many bytes of data, checksum left to do.
fn tcp(to: [u8; 6], from: [u8; 6], data: usize) -> Vec<u8> {
    let mut frame = [to, from].concat();
    frame.extend([8, 0]);
    let mut ip = vec![0x45, 0];
    ip.extend((40 + data as u16).to_be_bytes());
    ip.extend([0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    let sum: u32 = ip
        .chunks(2)
        .map(|w| u32::from(u16::from_be_bytes([w[0], w[1]])))
        .sum();
    let folded = !(((sum & 0xffff) + (sum >> 16)) as u16);
    ip[10..12].copy_from_slice(&folded.to_be_bytes());
    frame.extend(ip);
    frame.extend([
        0x12, 0x34, 0x56, 0x78, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 1, 0,
    ]);
    // The sum of the pseudo header, as who leaves a checksum to do has it there.
    let pseudo: u32 = 0x0a00 * 2 + 1 + 2 + 6 + 20 + data as u32;
    let pseudo = ((pseudo & 0xffff) + (pseudo >> 16)) as u16;
    frame.extend(pseudo.to_be_bytes());
    frame.extend([0, 0]);
    frame.extend((0..data).map(|i| (i * 7) as u8));
    frame
}

/// The header of such a frame: checksum to do, segments of 1448 bytes to cut.
const SEGMENTS: [u8; 10] = [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0];

#[test]
fn sixty_four_kilobytes_of_segments_go_both_ways_in_one_piece() {
    engines(|engine, args| {
        let scratch = Scratch::new(&format!("tso-{engine}"));
        let socket = scratch.path("s");
        let tap = format!("t-{engine}");
        let _net = Net::listen(&socket, &tap, args);
        let mut vm = Vm::connect(&socket, 3);
        let needed = f::F_HOST_TSO4 | f::F_GUEST_TSO4 | f::F_CSUM | f::F_GUEST_CSUM;
        assert_eq!(vm.features & needed, needed, "this kernel has them all");
        vm.start();
        let wire = Wire::new(&tap, true);
        let data = 65_000;

        let out = tcp(PEER, MAC_BYTES, data);
        let mut header = PLAIN;
        header[..10].copy_from_slice(&SEGMENTS);
        vm.send(1, &header, &out);
        let got = wire.receive();
        assert_eq!(got[10..], out, "{engine}: out in one piece");
        assert_eq!(got[1], 1, "TCPv4 segments");
        assert_eq!(got[4..6], SEGMENTS[4..6], "of this size");

        vm.offer_buffers(0, 0, 63);
        let back = tcp(MAC_BYTES, PEER, data);
        wire.send(&[SEGMENTS.as_slice(), &back].concat());
        let got = vm.receive(0);
        assert_eq!(got[HEADER..], back, "{engine}: in, in one piece");
        assert_eq!(got[..2], [1, 1], "checksum to do, TCPv4 segments");
        assert_eq!(got[4..6], SEGMENTS[4..6]);
    });
}

/// Ethernet, IPv4 and UDP with so many bytes of data, checksum left to do.
fn udp(to: [u8; 6], from: [u8; 6], data: usize) -> Vec<u8> {
    let mut frame = tcp(to, from, data);
    let whole = (28 + data as u16).to_be_bytes();
    frame[16..18].copy_from_slice(&whole);
    frame[23] = 17;
    frame[24..26].copy_from_slice(&[0, 0]);
    let sum: u32 = frame[14..34]
        .chunks(2)
        .map(|w| u32::from(u16::from_be_bytes([w[0], w[1]])))
        .sum();
    let folded = !(((sum & 0xffff) + (sum >> 16)) as u16);
    frame[24..26].copy_from_slice(&folded.to_be_bytes());
    let length = (8 + data as u16).to_be_bytes();
    let pseudo: u32 = 0x0a00 * 2 + 1 + 2 + 17 + 8 + data as u32;
    let pseudo = ((pseudo & 0xffff) + (pseudo >> 16)) as u16;
    let mut header = vec![0x12, 0x34, 0x56, 0x78, length[0], length[1]];
    header.extend(pseudo.to_be_bytes());
    frame.splice(34..54, header);
    frame
}

/// The header of such a frame: checksum to do, datagrams of 1000 bytes to cut.
const DATAGRAMS: [u8; 10] = [1, 5, 42, 0, 0xe8, 3, 34, 0, 6, 0];

#[test]
fn datagrams_go_both_ways_in_one_piece_where_that_was_negotiated() {
    engines(|engine, args| {
        let scratch = Scratch::new(&format!("uso-{engine}"));
        let socket = scratch.path("s");
        let tap = format!("t-{engine}");
        let _net = Net::listen(&socket, &tap, args);
        let mut vm = Vm::connect(&socket, 3);
        let needed = f::F_HOST_USO | f::F_GUEST_USO4 | f::F_GUEST_USO6;
        if vm.features & needed != needed {
            eprintln!("not tested here: this kernel has no datagram offload (Linux 6.2)");
            return;
        }
        vm.start();
        let wire = Wire::new(&tap, true);
        let out = udp(PEER, MAC_BYTES, 5000);
        let mut header = PLAIN;
        header[..10].copy_from_slice(&DATAGRAMS);
        vm.send(1, &header, &out);
        let got = wire.receive();
        assert_eq!(got[10..], out, "{engine}: out in one piece");
        assert_eq!((got[1], &got[4..6]), (5, &DATAGRAMS[4..6]));

        vm.offer_buffers(0, 0, 63);
        let back = udp(MAC_BYTES, PEER, 5000);
        wire.send(&[DATAGRAMS.as_slice(), &back].concat());
        let got = vm.receive(0);
        assert_eq!(got[HEADER..], back, "{engine}: in, in one piece");
        assert_eq!((got[1], &got[4..6]), (5, &DATAGRAMS[4..6]));

        // A driver that did not accept it gets datagrams, each by itself and finished.
        drop(vm);
        let stream = std::os::unix::net::UnixStream::connect(&socket).unwrap();
        let mut vm = Vm::over(stream, 3, |offered| {
            offered & !(f::F_GUEST_USO4 | f::F_GUEST_USO6 | f::F_GUEST_CSUM)
        });
        vm.start();
        vm.offer_buffers(0, 0, 63);
        wire.send(&[DATAGRAMS.as_slice(), &back].concat());
        for number in 0..5 {
            let got = vm.receive(0);
            assert_eq!(got.len(), HEADER + 42 + 1000, "{engine}: {number}");
            assert_eq!(got[..2], [0, 0], "nothing left to do");
        }
    });
}

#[test]
fn a_datagram_that_is_to_be_cut_into_fragments_leaves_where_that_was_negotiated() {
    engines(|engine, args| {
        let scratch = Scratch::new(&format!("ufo-{engine}"));
        let socket = scratch.path("s");
        let tap = format!("t-{engine}");
        let _net = Net::listen(&socket, &tap, args);
        let needed = f::F_CSUM | f::F_HOST_UFO;
        let mut vm = Vm::connect(&socket, 3);
        assert_eq!(vm.features & needed, needed, "every kernel's tap has it");
        vm.start();
        // With a header of its own, a packet socket tells of no such frame.
        let wire = Wire::new(&tap, false);
        let out = udp(PEER, MAC_BYTES, 4000);
        let mut header = PLAIN;
        header[..10].copy_from_slice(&DATAGRAMS);
        header[1] = 3;
        vm.send(1, &header, &out);
        assert_eq!(wire.receive(), out, "{engine}: out in one piece");
    });
}

#[test]
fn a_frame_with_work_left_that_was_never_negotiated_is_dropped_and_counted_and_others_pass() {
    engines(|engine, args| {
        let scratch = Scratch::new(&format!("gso-{engine}"));
        let socket = scratch.path("s");
        let tap = format!("t-{engine}");
        let _net = Net::listen(&socket, &tap, args);
        let host = f::F_HOST_TSO4 | f::F_HOST_TSO6 | f::F_HOST_ECN | f::F_HOST_UFO | f::F_HOST_USO;
        let plain = ether(PEER, MAC_BYTES, 100, 3);
        let wire = |vm: &mut Vm, wire: &Wire, header: [u8; 10], frame: &[u8]| {
            let mut whole = PLAIN;
            whole[..10].copy_from_slice(&header);
            vm.send(1, &whole, frame);
            // What comes next tells whether that came.
            vm.send(1, &PLAIN, &plain);
            let got = wire.receive();
            let passed = got[10..] != plain;
            if passed {
                assert_eq!(wire.receive()[10..], plain);
            }
            passed
        };
        let tap_wire = Wire::new(&tap, true);
        for (accepted, tso, uso, sum) in [
            (0, false, false, false),
            (f::F_CSUM, false, false, true),
            (f::F_CSUM | f::F_HOST_TSO4, true, false, true),
            (f::F_CSUM | f::F_HOST_USO, false, true, true),
            (f::F_HOST_TSO4 | f::F_HOST_USO, false, false, false),
        ] {
            let stream = std::os::unix::net::UnixStream::connect(&socket).unwrap();
            let mut vm = Vm::over(stream, 3, |offered| {
                offered & !(host | f::F_CSUM) | offered & accepted
            });
            if vm.features & accepted != accepted {
                eprintln!("not tested here: this kernel lacks {accepted:#x}");
                continue;
            }
            vm.start();
            let (segments, datagrams) = (tcp(PEER, MAC_BYTES, 4000), udp(PEER, MAC_BYTES, 4000));
            let short = tcp(PEER, MAC_BYTES, 400);
            let only_sum = [1, 0, 0, 0, 0, 0, 34, 0, 16, 0];
            let name = format!("{engine} {accepted:#x}");
            assert_eq!(wire(&mut vm, &tap_wire, SEGMENTS, &segments), tso, "{name}");
            assert_eq!(
                wire(&mut vm, &tap_wire, DATAGRAMS, &datagrams),
                uso,
                "{name}"
            );
            assert_eq!(wire(&mut vm, &tap_wire, only_sum, &short), sum, "{name}");
            // Of no kind that there is, congestion marks without having said so, UFO.
            for gso in [2, 6, 0x81, 3] {
                let mut header = SEGMENTS;
                header[1] = gso;
                assert!(!wire(&mut vm, &tap_wire, header, &segments), "{name} {gso}");
            }
        }
    });
}

#[test]
fn a_guest_that_takes_no_offloads_gets_finished_frames() {
    engines(|engine, args| {
        let scratch = Scratch::new(&format!("noffload-{engine}"));
        let socket = scratch.path("s");
        let tap = format!("t-{engine}");
        let _net = Net::listen(&socket, &tap, args);
        let stream = std::os::unix::net::UnixStream::connect(&socket).unwrap();
        let mut vm = Vm::over(stream, 3, |offered| offered & !f::GUEST_OFFLOADS);
        vm.start();
        let wire = Wire::new(&tap, true);
        vm.offer_buffers(0, 0, 63);
        wire.send(&[SEGMENTS.as_slice(), &tcp(MAC_BYTES, PEER, 3 * 1448)].concat());
        for _ in 0..3 {
            let got = vm.receive(0);
            assert_eq!(got.len(), HEADER + 54 + 1448);
            assert_eq!(got[..2], [0, 0], "nothing left to do");
        }
    });
}

#[test]
fn a_batch_keeps_its_order_and_costs_one_interrupt_at_most() {
    engines(|engine, args| {
        let scratch = Scratch::new(&format!("batch-{engine}"));
        let socket = scratch.path("s");
        let tap = format!("t-{engine}");
        let _net = Net::listen(&socket, &tap, args);
        let mut vm = Vm::connect(&socket, 3);
        vm.start();
        let wire = Wire::new(&tap, false);
        for round in 0..4u8 {
            for i in 0..32u16 {
                let at = buffer(1, i);
                vm.write_mem(at, &PLAIN);
                vm.write_mem(at + 12, &ether(PEER, MAC_BYTES, 100, round * 32 + i as u8));
                vm.queues[1].ring.chain(i, &[d(at, 112, 0)]);
                vm.queues[1].ring.offer(i);
            }
            vm.kick(1);
            for i in 0..32u16 {
                assert_eq!(vm.completion(1).0, u32::from(i));
                let expected = ether(PEER, MAC_BYTES, 100, round * 32 + i as u8);
                assert_eq!(wire.receive(), expected);
            }
        }
    });
}
