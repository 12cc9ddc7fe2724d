//! Given a front-end and a guest's driver: every request does what virtio says, with both
//! engines, and what the disk then holds is what the guest wrote.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use bulkhead_runtime::driver::{Desc, INDIRECT, NEXT, WRITE};
use support::*;

const DATA: u64 = GPA + 0x1_0000;

/// Every engine, with and without O_DIRECT.
fn engines(test: impl Fn(&str, &[&str], &str)) {
    for engine in ["io_uring", "preadv2"] {
        for (name, direct) in [("direct", ""), ("buffered", ",direct=off")] {
            let name = format!("{engine}-{name}");
            test(&name, &["--io-engine", engine], direct);
        }
    }
}

#[test]
fn data_written_by_the_guest_are_on_the_disk_and_come_back() {
    engines(|name, args, direct| {
        let scratch = Scratch::new(&format!("roundtrip-{name}"));
        let disk = scratch.disk(256);
        let socket = scratch.path("s");
        let spec = format!("path={},serial=hello{direct}", disk.display());
        let mut blk = Blk::listen(&socket, &spec, args);
        let mut vm = Vm::connect(&socket, 1);
        vm.start();

        let (status, used) = vm.request(T_IN, 7, DATA, 1024);
        assert_eq!((status, used), (0, 1025), "{name}");
        assert_eq!(vm.read_mem(DATA, 1024), [sector(7), sector(8)].concat());

        vm.write_mem(DATA, &[0xa5; 4096]);
        assert_eq!(vm.request(T_OUT, 100, DATA, 4096), (0, 1));
        assert_eq!(vm.request(T_FLUSH, 0, 0, 0), (0, 1));
        assert_eq!(on_disk(&disk, 100, 4096), [0xa5; 4096]);
        assert_eq!(on_disk(&disk, 99, 512), sector(99));
        assert_eq!(on_disk(&disk, 108, 512), sector(108));

        assert_eq!(vm.request(T_GET_ID, 0, DATA, 20), (0, 21));
        assert_eq!(&vm.read_mem(DATA, 20)[..6], b"hello\0");
        assert!(blk.is_running());
    });
}

#[test]
fn buffers_that_o_direct_would_refuse_are_bounced() {
    engines(|name, args, direct| {
        let scratch = Scratch::new(&format!("bounce-{name}"));
        let disk = scratch.disk(1024);
        let socket = scratch.path("s");
        let spec = format!("path={}{direct}", disk.display());
        let _blk = Blk::listen(&socket, &spec, args);
        let mut vm = Vm::connect(&socket, 1);
        vm.start();
        // 200 KiB at an odd address, in odd pieces, longer than one bounce buffer.
        let (head, status) = (GPA + 0x100, GPA + 0x200);
        let total = 400u32 * 512;
        let (a, b) = (DATA + 3, DATA + 0x8_0001);
        vm.header(head, T_IN, 5);
        let used = vm.chain_on(
            0,
            &[
                d(head, 16, 0),
                d(a, 1001, WRITE),
                d(b, total - 1001, WRITE),
                d(status, 1, WRITE),
            ],
        );
        assert_eq!(used, total + 1);
        let expected: Vec<u8> = (5..405).flat_map(sector).collect();
        let mut got = vm.read_mem(a, 1001);
        got.extend(vm.read_mem(b, total as usize - 1001));
        assert!(got == expected, "{name}");

        vm.header(head, T_OUT, 600);
        let used = vm.chain_on(
            0,
            &[
                d(head, 16, 0),
                d(a, 1001, 0),
                d(b, total - 1001, 0),
                d(status, 1, WRITE),
            ],
        );
        assert_eq!(used, 1);
        assert_eq!(vm.read_mem(status, 1), [0]);
        assert!(on_disk(&disk, 600, total as usize) == expected, "{name}");
        assert_eq!(on_disk(&disk, 1000, 512), sector(1000));
    });
}

#[test]
fn header_data_and_status_may_be_split_anywhere() {
    let scratch = Scratch::new("split");
    let disk = scratch.disk(64);
    let socket = scratch.path("s");
    let _blk = Blk::listen(&socket, &format!("path={}", disk.display()), &[]);
    let mut vm = Vm::connect(&socket, 1);
    vm.start();
    let head = GPA + 0x100;
    // Header in three pieces, the last with the first data; status behind the last data.
    vm.header(head, T_OUT, 3);
    vm.write_mem(head + 16, &[1; 512]);
    let status = GPA + 0x900;
    vm.chain_on(
        0,
        &[
            d(head, 1, 0),
            d(head + 1, 8, 0),
            d(head + 9, 7 + 512, 0),
            d(status, 1, WRITE),
        ],
    );
    assert_eq!(on_disk(&disk, 3, 512), [1; 512]);

    vm.header(head, T_IN, 4);
    let used = vm.chain_on(
        0,
        &[
            d(head, 16, 0),
            d(DATA, 100, WRITE),
            d(DATA + 100, 0, WRITE),
            d(DATA + 100, 413, WRITE),
        ],
    );
    assert_eq!(used, 513);
    assert_eq!(vm.read_mem(DATA, 512), sector(4));
    assert_eq!(vm.read_mem(DATA + 512, 1), [0]);
}

#[test]
fn an_indirect_table_serves_as_a_chain() {
    let scratch = Scratch::new("indirect");
    let disk = scratch.disk(64);
    let socket = scratch.path("s");
    let _blk = Blk::listen(&socket, &format!("path={}", disk.display()), &[]);
    let mut vm = Vm::connect(&socket, 1);
    vm.start();
    assert_ne!(vm.features & F_INDIRECT, 0);
    let (head, status, table) = (GPA + 0x100, GPA + 0x200, GPA + 0x1000);
    vm.header(head, T_IN, 9);
    for (i, desc) in [
        d(head, 16, NEXT),
        d(DATA, 512, NEXT | WRITE),
        d(status, 1, WRITE),
    ]
    .into_iter()
    .enumerate()
    {
        let desc = Desc {
            next: i as u16 + 1,
            ..desc
        };
        vm.write_mem(table + 16 * i as u64, &desc.bytes());
    }
    assert_eq!(vm.chain_on(0, &[d(table, 48, INDIRECT)]), 513);
    assert_eq!(vm.read_mem(DATA, 512), sector(9));
}

#[test]
fn requests_that_cannot_be_answer_with_a_status() {
    engines(|name, args, direct| {
        let scratch = Scratch::new(&format!("status-{name}"));
        let disk = scratch.disk(64);
        let socket = scratch.path("s");
        let spec = format!("path={}{direct}", disk.display());
        let _blk = Blk::listen(&socket, &spec, args);
        let mut vm = Vm::connect(&socket, 1);
        vm.start();
        for (what, kind, sector, len, expected) in [
            ("unknown type", 99, 0, 512, 2),
            ("secure erase, not offered", 14, 0, 16, 2),
            ("read across the end", T_IN, 63, 1024, 1),
            ("read far beyond", T_IN, u64::MAX, 512, 1),
            ("read at an overflow", T_IN, u64::MAX / 512, 512, 1),
            ("write across the end", T_OUT, 63, 1024, 1),
            ("part of a sector", T_IN, 0, 100, 1),
            ("the last sector", T_IN, 63, 512, 0),
            ("nothing", T_IN, 0, 0, 0),
        ] {
            let (status, _) = vm.request(kind, sector, DATA, len);
            assert_eq!(status, expected, "{name}: {what}");
        }
        assert!(!vm.err_fired(0));
        assert_eq!(std::fs::metadata(&disk).unwrap().len(), 64 * 512);
    });
}

#[test]
fn a_read_only_disk_takes_no_writes() {
    let scratch = Scratch::new("readonly");
    let disk = scratch.disk(64);
    let socket = scratch.path("s");
    let spec = format!("path={},readonly=on", disk.display());
    let _blk = Blk::listen(&socket, &spec, &[]);
    let mut vm = Vm::connect(&socket, 1);
    vm.start();
    assert_ne!(vm.features & F_RO, 0);
    vm.write_mem(DATA, &[1; 512]);
    assert_eq!(vm.request(T_OUT, 0, DATA, 512).0, 1);
    assert_eq!(on_disk(&disk, 0, 512), sector(0));
    assert_eq!(vm.request(T_IN, 1, DATA, 512).0, 0);
}

#[test]
fn a_file_truncated_underneath_is_an_io_error() {
    engines(|name, args, direct| {
        let scratch = Scratch::new(&format!("truncated-{name}"));
        let disk = scratch.disk(64);
        let socket = scratch.path("s");
        let spec = format!("path={}{direct}", disk.display());
        let mut blk = Blk::listen(&socket, &spec, args);
        let mut vm = Vm::connect(&socket, 1);
        vm.start();
        let file = std::fs::File::options().write(true).open(&disk).unwrap();
        file.set_len(32 * 512).unwrap();
        assert_eq!(vm.request(T_IN, 40, DATA, 512).0, 1, "{name}");
        assert_eq!(vm.request(T_IN, 31, DATA, 1024).0, 1, "{name}");
        assert_eq!(vm.request(T_IN, 31, DATA, 512).0, 0, "{name}");
        assert!(blk.is_running());
    });
}

#[test]
fn the_configuration_space_describes_the_disk() {
    let scratch = Scratch::new("config");
    let disk = scratch.disk(100);
    std::fs::File::options()
        .append(true)
        .open(&disk)
        .and_then(|mut f| std::io::Write::write_all(&mut f, b"half a sector"))
        .unwrap();
    let socket = scratch.path("s");
    let spec = format!("path={},direct=off", disk.display());
    let _blk = Blk::listen(&socket, &spec, &["--queues", "3"]);
    let mut vm = Vm::connect(&socket, 3);
    let config = vm.config(0, 60);
    assert_eq!(config[..8], 100u64.to_le_bytes());
    assert_eq!(config[12..16], 254u32.to_le_bytes());
    assert_eq!(config[20..24], 512u32.to_le_bytes());
    assert_eq!(config[34..36], 3u16.to_le_bytes());
    // Beyond what the device has: zeros.
    assert_eq!(vm.config(200, 56), [0; 56]);
}

#[test]
fn many_requests_at_once_on_every_queue_all_complete() {
    for engine in ["io_uring", "preadv2"] {
        let scratch = Scratch::new(&format!("many-{engine}"));
        let disk = scratch.disk(4096);
        let socket = scratch.path("s");
        let spec = format!("path={}", disk.display());
        let _blk = Blk::listen(&socket, &spec, &["--queues", "2", "--io-engine", engine]);
        let mut vm = Vm::connect(&socket, 2);
        vm.start();
        let per_queue = u64::from(RING_SIZE / 2);
        for round in 0..20u64 {
            for queue in 0..2u64 {
                // Two descriptors each: header, then data with the status behind them.
                for i in 0..per_queue {
                    let slot = queue * per_queue + i;
                    let (head, data) = (GPA + 0x1000 + 16 * slot, DATA + 0x400 * slot);
                    vm.header(head, T_IN, (round * 131 + slot * 7) % 4096);
                    let first = 2 * i as u16;
                    let ring = &mut vm.queues[queue as usize].ring;
                    ring.chain(first, &[d(head, 16, 0), d(data, 513, WRITE)]);
                    ring.offer(first);
                }
                vm.kick(queue as usize);
            }
            for queue in 0..2u64 {
                for _ in 0..per_queue {
                    let (head, len) = vm.completion(queue as usize);
                    assert_eq!(len, 513);
                    let slot = queue * per_queue + u64::from(head) / 2;
                    let got = vm.read_mem(DATA + 0x400 * slot, 513);
                    assert_eq!(got[..512], sector((round * 131 + slot * 7) % 4096));
                    assert_eq!(got[512], 0);
                }
            }
        }
    }
}
