//! Given a guest that writes anything into its rings at any time: its other rings go on, the
//! process lives, and a reset repairs what was broken.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::path::PathBuf;
use std::time::Duration;

use bulkhead_runtime::driver::{Desc, INDIRECT, NEXT, WRITE};
use support::*;
use vhost::VhostBackend;

const PEER: [u8; 6] = [2, 0, 0, 0, 0, 9];
const PLAIN: [u8; HEADER] = [0; HEADER];

/// A generator whose seed is in the failure's text.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn one_of<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len() as u64) as usize]
    }
}

fn seeds() -> u64 {
    let cases = std::env::var("HOSTILE_SEEDS").ok();
    cases.and_then(|n| n.parse().ok()).unwrap_or(12)
}

fn nonsense(vm: &mut Vm, queue: usize, random: &mut Random) {
    for _ in 0..random.below(40) {
        let desc = Desc {
            addr: random.one_of(&[
                GPA,
                GPA + RAM - 1,
                0,
                u64::MAX - 5,
                buffer(queue, 3),
                buffer(queue, 9),
                buffer(5, 0),
            ]),
            len: random.one_of(&[
                0,
                1,
                11,
                12,
                26,
                60,
                1514,
                65_562,
                70_000,
                1 << 20,
                u32::MAX,
            ]),
            flags: random.one_of(&[0, NEXT, WRITE, NEXT | WRITE, INDIRECT, 7, 0xffff]),
            next: random.below(u64::from(RING_SIZE) + 2) as u16,
        };
        let index = random.below(u64::from(RING_SIZE)) as u16;
        vm.queues[queue].ring.desc(index, desc);
        match random.below(4) {
            0 => vm.queues[queue].ring.offer(index),
            1 => vm.queues[queue]
                .ring
                .offer(random.next() as u16 % (RING_SIZE + 3)),
            2 if random.below(20) == 0 => {
                let idx = random.next() as u16;
                vm.queues[queue].ring.set_avail_idx(idx);
            }
            _ => {}
        }
        // An indirect table, or a command, of random bytes.
        let bytes: Vec<u8> = (0..64).map(|_| (random.next() & 0x83) as u8).collect();
        vm.write_mem(buffer(queue, 3), &bytes);
        if random.below(8) == 0 {
            vm.kick(queue);
        }
    }
    vm.kick(queue);
}

/// A device of two pairs of rings, and its wire's other end.
fn two_pairs(test: &str, engine: &str) -> (Scratch, PathBuf, Net, Wire) {
    let scratch = Scratch::new(&format!("{test}-{engine}"));
    let socket = scratch.path("s");
    let args = ["--io-engine", engine, "--queue-pairs", "2"];
    let net = Net::listen(&socket, "t0", &args);
    (scratch, socket, net, Wire::new("t0", false))
}

#[test]
fn nonsense_in_one_ring_costs_that_ring_until_it_is_reset() {
    for engine in ["io_uring", "plain"] {
        if !isolated() {
            return;
        }
        let (_scratch, socket, mut net, wire) = two_pairs("hostile", engine);
        for seed in 1..=seeds() {
            let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            let mut vm = Vm::connect(&socket, 5);
            vm.start();
            let victim = random.one_of(&[0usize, 1, 2, 3, 4]);
            // The pair that must go on working.
            let healthy = if victim < 2 { 2 } else { 0 };
            assert_eq!(vm.command(4, 4, 0, &2u16.to_le_bytes()), 0);
            for _ in 0..20 {
                nonsense(&mut vm, victim, &mut random);
                wire.send(&ether(MAC_BYTES, PEER, 60 + random.below(1400) as usize, 0));
            }
            let frame = ether(PEER, MAC_BYTES, 300, seed as u8);
            vm.send(healthy + 1, &PLAIN, &frame);
            // What the victim's ring sent by chance comes first.
            while wire.receive() != frame {}
            assert!(net.is_running(), "{engine}, seed {seed}: {}", net.stderr());
            // The guest resets that ring.
            vm.frontend.get_vring_base(victim).unwrap();
            vm.queues[victim].ring.reset();
            vm.start_queue(victim, 0);
            if victim == 4 {
                assert_eq!(vm.command(4, 4, 0, &1u16.to_le_bytes()), 0);
            } else if victim % 2 == 1 {
                let frame = ether(PEER, MAC_BYTES, 301, seed as u8);
                vm.send(victim, &PLAIN, &frame);
                while wire.receive() != frame {}
            }
        }
        assert!(net.is_running());
    }
}

#[test]
fn a_guest_that_keeps_one_ring_full_does_not_stall_the_others() {
    for engine in ["io_uring", "plain"] {
        if !isolated() {
            return;
        }
        let scratch = Scratch::new(&format!("stuff-{engine}"));
        let socket = scratch.path("s");
        let _net = Net::listen(&socket, "t0", &["--io-engine", engine]);
        let wire = Wire::new("t0", false);
        let mut vm = Vm::connect(&socket, 3);
        vm.start();
        vm.offer_buffers(0, 0, 32);
        let junk = ether(PEER, MAC_BYTES, 60, 1);
        for i in 0..RING_SIZE {
            let at = buffer(1, i);
            vm.write_mem(at, &[PLAIN.as_slice(), &junk].concat());
            vm.queues[1].ring.chain(i, &[d(at, 72, 0)]);
        }
        let mut next = 0u16;
        for round in 0..50u8 {
            // All that was taken is offered again at once.
            stuff(&mut vm, 1, &mut next);
            if round % 10 == 0 {
                let frame = ether(MAC_BYTES, PEER, 100, round);
                wire.send(&frame);
                assert_eq!(vm.receive(0)[HEADER..], frame, "{engine}");
                assert_eq!(vm.command(2, 0, 0, &[1]), 0, "{engine}");
            }
        }
    }
}

/// Offers all of a ring's descriptors again that the device has taken.
fn stuff(vm: &mut Vm, queue: usize, next: &mut u16) {
    let taken = vm.queues[queue].ring.used_idx();
    while next.wrapping_sub(taken) < RING_SIZE {
        vm.queues[queue].ring.offer(*next % RING_SIZE);
        *next = next.wrapping_add(1);
    }
    vm.kick(queue);
}

#[test]
fn a_pair_that_is_stuffed_leaves_another_pair_its_frames() {
    for engine in ["io_uring", "plain"] {
        if !isolated() {
            return;
        }
        let (_scratch, socket, _net, wire) = two_pairs("pair", engine);
        let mut vm = Vm::connect(&socket, 5);
        vm.start();
        assert_eq!(vm.command(4, 4, 0, &2u16.to_le_bytes()), 0);
        // The first pair sends all it can and takes nothing.
        let junk = ether(PEER, MAC_BYTES, 60, 1);
        for i in 0..RING_SIZE {
            let at = buffer(1, i);
            vm.write_mem(at, &[PLAIN.as_slice(), &junk].concat());
            vm.queues[1].ring.chain(i, &[d(at, 72, 0)]);
        }
        vm.offer_buffers(2, 0, 32);
        let (mut next, mut got) = (0, 0u16);
        for round in 0..20u8 {
            stuff(&mut vm, 1, &mut next);
            let frame = ether(PEER, MAC_BYTES, 200, round);
            // The wire's own buffer may be full of junk.
            wait_for("a frame of the second pair", || {
                stuff(&mut vm, 1, &mut next);
                vm.send(3, &PLAIN, &frame);
                let mut seen = false;
                while let Some(other) = wire.receive_within(Duration::from_millis(1)) {
                    seen |= other == frame;
                }
                seen
            });
            let mut flows = flows(round).into_iter().cycle();
            wait_for("a frame for the second pair", || {
                stuff(&mut vm, 1, &mut next);
                // One by one: what is for the first pair nobody takes.
                wire.send(&flows.next().unwrap());
                vm.queues[2].ring.used_idx() != got
            });
            while vm.queues[2].ring.used_idx() != got {
                vm.receive(2);
                got = got.wrapping_add(1);
            }
        }
    }
}

#[test]
fn endless_chains_and_a_stuffed_control_queue_cost_no_memory() {
    for engine in ["io_uring", "plain"] {
        if !isolated() {
            return;
        }
        let scratch = Scratch::new(&format!("endless-{engine}"));
        let socket = scratch.path("s");
        let mut net = Net::listen(&socket, "t0", &["--io-engine", engine]);
        let wire = Wire::new("t0", false);
        let mut vm = Vm::connect(&socket, 3);
        vm.start();
        let kilobytes = |net: &Net, field: &str| -> u64 {
            let value = net.status_field(field);
            value.split_whitespace().next().unwrap().parse().unwrap()
        };
        vm.offer_buffers(0, 0, 8);
        vm.send(1, &PLAIN, &ether(PEER, MAC_BYTES, 1000, 1));
        assert_eq!(vm.command(2, 0, 0, &[1]), 0);
        // Of the guest's memory, which is mapped, all may be touched.
        let before = ["VmHWM", "VmPeak"].map(|field| (field, kilobytes(&net, field)));
        // Nobody reads what it says of each ring that it stops.
        for round in 0..40u32 {
            for queue in [0, 1, 2] {
                let writes = if queue == 0 { WRITE } else { 0 };
                let at = buffer(queue, 0);
                // By turns: a chain into itself, one through the whole ring with the longest
                // buffers, a table of tables, and the longest command that there can be.
                for index in 0..RING_SIZE {
                    let next = (index + 1) % RING_SIZE;
                    let desc = match round % 4 {
                        0 => (at, u32::MAX, NEXT | writes, index),
                        1 => (GPA, (RAM / 2) as u32, NEXT | writes, next),
                        2 => (at, 0xffff_fff0, INDIRECT, 0),
                        _ if index % 2 == 0 => (at, 12_300, NEXT | writes, next),
                        _ => (at, 1, WRITE, 0),
                    };
                    let (addr, len, flags, next) = desc;
                    let desc = Desc {
                        addr,
                        len,
                        flags,
                        next,
                    };
                    vm.queues[queue].ring.desc(index, desc);
                }
                // The command: two tables of as many addresses as fit.
                let mut command = vec![1, 0];
                for _ in 0..2 {
                    command.extend(1024u32.to_le_bytes());
                    command.extend([2; 6 * 1024]);
                }
                vm.write_mem(at, &command);
                for index in 0..RING_SIZE {
                    vm.queues[queue].ring.offer(index);
                }
                vm.kick(queue);
            }
            wire.send(&ether(MAC_BYTES, PEER, 1000, round as u8));
            // The guest resets what it broke.
            for queue in [0, 1, 2] {
                vm.frontend.get_vring_base(queue).unwrap();
                vm.queues[queue].ring.reset();
                vm.start_queue(queue, 0);
            }
        }
        for (field, before) in before {
            let after = kilobytes(&net, field);
            let most = before + RAM / 1024 + (8 << 10);
            assert!(after <= most, "{engine}: {field} {before} kB, then {after}");
        }
        vm.offer_buffers(0, 0, 8);
        let frame = ether(PEER, MAC_BYTES, 300, 9);
        vm.send(1, &PLAIN, &frame);
        wait_for("a frame", || {
            wire.receive_within(Duration::from_millis(10)).as_ref() == Some(&frame)
        });
        assert!(net.is_running(), "{}", net.stderr());
    }
}

#[test]
fn a_kick_that_is_no_eventfd_costs_its_ring() {
    for engine in ["io_uring", "plain"] {
        if !isolated() {
            return;
        }
        let scratch = Scratch::new(&format!("kick-{engine}"));
        let socket = scratch.path("s");
        let mut net = Net::listen(&socket, "t0", &["--io-engine", engine]);
        let mut vm = Vm::connect(&socket, 3);
        vm.start();
        vm.frontend.get_vring_base(1).unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        vm.queues[1].kick = {
            use std::os::fd::{FromRawFd, IntoRawFd};
            #[allow(unsafe_code)]
            // SAFETY: the descriptor is fresh and owned by nobody else.
            unsafe {
                vmm_sys_util::eventfd::EventFd::from_raw_fd(file.into_raw_fd())
            }
        };
        vm.start_queue(1, 0);
        wait_for("the error", || vm.err_fired(1));
        assert_eq!(vm.command(2, 0, 0, &[1]), 0, "{engine}");
        assert!(net.is_running());
    }
}
