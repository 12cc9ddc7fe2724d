//! Given a disk and its options: the driver is told what it is, cache modes are what they say,
//! the file is locked against others, it can be made larger while it is in use, and what the
//! host fails is told to guest and operator.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![allow(unsafe_code)] // a sealed file, and a file system that is soon full

mod support;

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use bulkhead_proto::device::BlkUpdate;
use support::*;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;

const DATA: u64 = GPA + 0x1_0000;
const AT_WRITEBACK: u32 = 32;

fn open(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

fn start(file: File, options: &str, engine: &str) -> (Blk, Control, Vm) {
    let (blk, control, vhost) = Blk::inherit(file, options, &["--io-engine", engine]);
    let mut vm = Vm::over(vhost, 1);
    vm.start();
    (blk, Control::new(control), vm)
}

fn engines(test: impl Fn(&str)) {
    for engine in ["io_uring", "preadv2"] {
        test(engine);
    }
}

fn sectors(vm: &mut Vm) -> u64 {
    u64::from_le_bytes(vm.config(0, 8).try_into().unwrap())
}

#[test]
fn the_driver_chooses_the_cache_mode_where_the_operator_leaves_it_a_choice() {
    engines(|engine| {
        let scratch = Scratch::new(&format!("cache-{engine}"));
        let disk = scratch.disk(64);
        for (cache, choice) in [
            ("none", true),
            ("writeback", true),
            ("writethrough", false),
            ("unsafe", true),
        ] {
            let options = format!(",cache={cache}");
            let (_blk, _control, mut vm) = start(open(&disk), &options, engine);
            let offered = vm.features & (F_FLUSH | F_CONFIG_WCE);
            let expected = if choice { F_FLUSH | F_CONFIG_WCE } else { 0 };
            assert_eq!(offered, expected, "{cache}");
            assert_eq!(vm.config(AT_WRITEBACK, 1), [u8::from(choice)], "{cache}");
            let write = |vm: &mut Vm, at: u32, value: &[u8]| {
                let flags = VhostUserConfigFlags::WRITABLE;
                vm.frontend.set_config(at, flags, value).unwrap();
            };
            write(&mut vm, AT_WRITEBACK, &[0]);
            assert_eq!(vm.config(AT_WRITEBACK, 1), [0], "{cache}");
            vm.write_mem(DATA, &[0xc5; 1024]);
            assert_eq!(vm.request(T_OUT, 3, DATA, 1024).0, 0, "{cache}");
            assert_eq!(vm.request(T_FLUSH, 0, 0, 0).0, 0, "{cache}");
            assert_eq!(on_disk(&disk, 3, 1024), [0xc5; 1024], "{cache}");
            // Nothing else can be written, and no other value.
            let before = vm.config(0, 60);
            write(&mut vm, AT_WRITEBACK, &[2]);
            write(&mut vm, 0, &[1]);
            write(&mut vm, AT_WRITEBACK, &[1, 1]);
            assert_eq!(vm.config(0, 60), before, "{cache}");
            // A reset takes the choice back.
            vm.frontend.reset_device().unwrap();
            assert_eq!(vm.config(AT_WRITEBACK, 1), [u8::from(choice)], "{cache}");
        }
    });
}

#[test]
fn requests_that_come_together_take_one_kick_and_one_interrupt() {
    const TOGETHER: u16 = 16;
    engines(|engine| {
        let scratch = Scratch::new(&format!("together-{engine}"));
        let disk = scratch.disk(64);
        let (_blk, mut control, mut vm) = start(open(&disk), "", engine);
        assert_ne!(vm.features & F_EVENT_IDX, 0);
        assert_eq!(vm.request(T_IN, 0, DATA, 512).0, 0, "{engine}");
        let mut counts = || {
            let stats = control.stats();
            (stats.queues[0].kicks, stats.queues[0].interrupts)
        };
        let before = counts();
        let _ = vm.queues[0].call.read();
        for i in 0..u64::from(TOGETHER) {
            vm.header(GPA + 0x1000 + 16 * i, T_IN, i);
        }
        let ring = &mut vm.queues[0].ring;
        let used = ring.used_idx();
        // An interrupt when the last of them is done.
        ring.set_used_event(used + TOGETHER - 1);
        for i in 0..TOGETHER {
            let at = u64::from(i);
            let data = d(DATA + 0x400 * at, 513, WRITE);
            ring.chain(2 * i, &[d(GPA + 0x1000 + 16 * at, 16, 0), data]);
            ring.offer(2 * i);
        }
        vm.kick(0);
        wait_for("all of them", || {
            vm.queues[0].ring.used_idx() == used + TOGETHER
        });
        wait_for("the interrupt", || counts().1 > before.1);
        assert_eq!(counts(), (before.0 + 1, before.1 + 1), "{engine}");
        assert_eq!(vm.queues[0].call.read().unwrap(), 1, "{engine}");
    });
}

#[test]
fn limits_of_the_host_are_in_the_configuration() {
    let scratch = Scratch::new("topology");
    let disk = scratch.disk(4096);
    let (_blk, _control, mut vm) = start(open(&disk), "", "io_uring");
    // The kind's own bits, and VERSION_1 and ACCESS_PLATFORM.
    for bit in [1, 2, 6, 9, 10, 11, 13, 14, 28, 29, 32, 33] {
        assert_ne!(vm.features & 1 << bit, 0, "feature {bit}");
    }
    let config = vm.config(0, 60);
    let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    let (size_max, seg_max) = (word(8), word(12));
    assert!(u64::from(size_max) * u64::from(seg_max) < 1 << 32);
    assert_eq!(word(20), 512);
    // A file system's blocks are larger than a sector, and reads begin where blocks do.
    let block = 512u32 << config[24];
    let stat = std::os::unix::fs::MetadataExt::blksize(&std::fs::metadata(&disk).unwrap());
    assert_eq!(u64::from(block), stat);
    assert_eq!(config[25], 0);
    let min_io = u16::from_le_bytes(config[26..28].try_into().unwrap());
    assert_eq!(u64::from(min_io) * 512, stat);
    assert_eq!(word(44) * 512, block, "discards should be whole blocks");
}

#[test]
fn two_processes_cannot_write_one_file() {
    let scratch = Scratch::new("locks");
    let disk = scratch.disk(64);
    let spec = |more: &str| format!("path={}{more}", disk.display());
    let fails = |more: &str| {
        let mut second = Blk(Process::spawn(
            Blk::command()
                .args(["--socket", scratch.path("b").to_str().unwrap()])
                .args(["--disk", &spec(more)]),
        ));
        assert_eq!(second.wait_exit().code(), Some(1), "{more}");
        let said = second.stderr();
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(said.contains("in use") && said.contains("disk"), "{said}");
    };
    let writer = Blk::listen(&scratch.path("a"), &spec(""), &[]);
    fails("");
    fails(",readonly=on");
    // Who says so may do it all the same.
    drop(Blk::listen(&scratch.path("b"), &spec(",lock=off"), &[]));
    drop(writer);
    // Readers share it, and keep writers out.
    let _one = Blk::listen(&scratch.path("a"), &spec(",readonly=on"), &[]);
    let _two = Blk::listen(&scratch.path("c"), &spec(",readonly=on"), &[]);
    fails("");
}

#[test]
fn a_disk_grows_while_it_is_in_use() {
    engines(|engine| {
        let scratch = Scratch::new(&format!("grow-{engine}"));
        let disk = scratch.disk(64);
        let file = open(&disk);
        let (mut blk, mut control, mut vm) =
            start(file.try_clone().unwrap(), ",max-size=1M", engine);
        assert_eq!(sectors(&mut vm), 64);
        assert_eq!(vm.request(T_IN, 64, DATA, 512).0, 1, "{engine}");
        // The file comes first.
        let why = control.resize(128 * 512).unwrap_err();
        assert!(why.contains("size_bytes") && why.contains("grow"), "{why}");
        assert_eq!(sectors(&mut vm), 64);
        file.set_len(128 * 512 + 100).unwrap();
        control.resize(128 * 512 + 100).unwrap();
        assert_eq!(sectors(&mut vm), 128, "whole sectors");
        vm.write_mem(DATA, &[0x9e; 512]);
        assert_eq!(vm.request(T_OUT, 127, DATA, 512).0, 0, "{engine}");
        assert_eq!(on_disk(&disk, 127, 512), [0x9e; 512]);
        assert_eq!(vm.request(T_IN, 128, DATA, 512).0, 1, "{engine}");
        // Not smaller, not beyond what was granted; the same size is no change.
        let why = control.resize(64 * 512).unwrap_err();
        assert!(why.contains("shrink"), "{why}");
        file.set_len(3 << 20).unwrap();
        let why = control.resize(2 << 20).unwrap_err();
        assert!(why.contains("max-size"), "{why}");
        control.resize(128 * 512).unwrap();
        control.update(BlkUpdate::new()).unwrap();
        assert_eq!(sectors(&mut vm), 128);
        assert!(blk.is_running());
    });
}

#[test]
fn the_driver_is_told_that_the_disk_has_grown() {
    let scratch = Scratch::new("told");
    let disk = scratch.disk(64);
    let file = open(&disk);
    let (_blk, control, vhost) = Blk::inherit(file.try_clone().unwrap(), "", &[]);
    let mut control = Control::new(control);
    let mut vm = Vm::over(vhost, 1);
    vm.start();
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    VhostUserFrontend::set_backend_request_fd(&mut vm.frontend, &theirs).unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    file.set_len(256 * 512).unwrap();
    control.resize(256 * 512).unwrap();
    // VHOST_USER_BACKEND_CONFIG_CHANGE_MSG
    let mut header = [0; 12];
    std::io::Read::read_exact(&mut &ours, &mut header).unwrap();
    assert_eq!(header[..4], 2u32.to_le_bytes());
    assert_eq!(sectors(&mut vm), 256);
}

/// A file in memory of which the kernel refuses every write.
fn sealed(disk: &Path) -> File {
    let content = std::fs::read(disk).unwrap();
    // SAFETY: the name is a live C string; the answer is a descriptor of nobody else's.
    let file = unsafe {
        let fd = libc::memfd_create(
            c"disk".as_ptr(),
            libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING,
        );
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    file.write_all_at(&content, 0).unwrap();
    // SAFETY: F_ADD_SEALS takes an integer.
    let r = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_WRITE) };
    assert_eq!(r, 0);
    file
}

#[test]
fn what_the_host_fails_is_an_io_error_that_the_operator_sees() {
    engines(|engine| {
        let scratch = Scratch::new(&format!("fails-{engine}"));
        let disk = scratch.disk(64);
        let (mut blk, mut control, mut vm) = start(sealed(&disk), "", engine);
        assert_eq!(vm.request(T_OUT, 17, DATA, 1024).0, 1, "{engine}");
        let rings = control.health().rings;
        assert_eq!(
            (
                rings[0].host_errors,
                rings[0].last_errno,
                rings[0].last_sector
            ),
            (1, libc::EPERM, 17),
            "{engine}"
        );
        // So is write-zeroes, however it is tried. Discard the host has refused when it was
        // asked, and it is not offered.
        assert_eq!(vm.features & F_DISCARD, 0, "{engine}");
        vm.write_mem(DATA, &[9, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(vm.request(T_DISCARD, 0, DATA, 16).0, 2, "{engine}");
        assert_eq!(vm.request(T_WRITE_ZEROES, 0, DATA, 16).0, 1, "{engine}");
        assert_eq!(vm.request(T_IN, 17, DATA, 512).0, 0, "{engine}");
        assert_eq!(vm.read_mem(DATA, 512), sector(17), "{engine}");
        let rings = control.health().rings;
        assert_eq!(
            (rings[0].host_errors, rings[0].last_sector),
            (2, 9),
            "{engine}"
        );
        assert_eq!(control.stats().queues[0].errors, 3);
        assert!(!rings[0].broken && blk.is_running());
    });
}

#[test]
fn a_limit_on_the_file_fails_the_request_and_not_the_process() {
    engines(|engine| {
        let scratch = Scratch::new(&format!("fsize-{engine}"));
        let disk = scratch.disk(64);
        let file = open(&disk);
        let options = format!(",max-size={}", 64 * 512);
        let (mut blk, mut control, mut vm) = start(file.try_clone().unwrap(), &options, engine);
        // Somebody made the file smaller: what the guest writes beyond makes it larger again,
        // up to the disk's size and no further.
        file.set_len(0).unwrap();
        vm.write_mem(DATA, &[1; 512]);
        assert_eq!(vm.request(T_OUT, 63, DATA, 512).0, 0, "{engine}");
        assert_eq!(file.metadata().unwrap().len(), 64 * 512);
        assert_eq!(vm.request(T_OUT, 64, DATA, 512).0, 1, "{engine}");
        assert_eq!(control.health().rings[0].host_errors, 0);
        assert!(blk.is_running());
    });
}

/// A file system that is full, where this process may make one.
struct Full(Scratch);

impl Full {
    fn new(name: &str) -> Option<Self> {
        let scratch = Scratch::new(name);
        let place = std::ffi::CString::new(scratch.path("").to_str().unwrap()).unwrap();
        // SAFETY: all four are live C strings.
        let r = unsafe {
            libc::mount(
                c"full".as_ptr(),
                place.as_ptr(),
                c"tmpfs".as_ptr(),
                0,
                c"size=64k".as_ptr().cast(),
            )
        };
        (r == 0).then_some(Self(scratch))
    }
}

impl Drop for Full {
    fn drop(&mut self) {
        let place = std::ffi::CString::new(self.0.path("").to_str().unwrap()).unwrap();
        // SAFETY: a live C string.
        unsafe { libc::umount2(place.as_ptr(), libc::MNT_DETACH) };
    }
}

#[test]
fn a_full_host_is_an_io_error_until_there_is_room() {
    engines(|engine| {
        let Some(full) = Full::new(&format!("full-{engine}")) else {
            eprintln!("skipped: only root can make a file system");
            return;
        };
        let path = full.0.path("disk");
        std::fs::write(&path, []).unwrap();
        let file = open(&path);
        file.set_len(256 * 512).unwrap();
        let (_blk, mut control, mut vm) = start(file, "", engine);
        let mut status = 0;
        let mut at = 0;
        while status == 0 {
            assert!(at < 256, "{engine}: it never was full");
            vm.write_mem(DATA, &[at as u8 | 1; 4096]);
            status = vm.request(T_OUT, at, DATA, 4096).0;
            at += 8;
        }
        assert_eq!(status, 1, "{engine}");
        assert_eq!(control.health().rings[0].last_errno, libc::ENOSPC);
        assert_eq!(control.health().rings[0].last_sector, at - 8);
        // The guest gives some back, and can go on.
        vm.write_mem(DATA, &[0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(vm.request(T_DISCARD, 0, DATA, 16).0, 0, "{engine}");
        vm.write_mem(DATA, &[0x77; 4096]);
        assert_eq!(vm.request(T_OUT, at - 8, DATA, 4096).0, 0, "{engine}");
    });
}
