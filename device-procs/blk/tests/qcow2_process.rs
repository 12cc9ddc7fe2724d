//! The real process, sealed, serving qcow2 images: what a guest writes, `qemu-img` finds; a
//! chain is what was granted; a process killed under load is replaced and nothing that
//! completed is lost, flushed or not. BULKHEAD_TAKEOVERS makes it longer.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/qemu_img.rs"]
mod qemu_img;
mod support;

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use bulkhead_runtime::driver::WRITE;
use qemu_img::*;
use support::*;
use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserInflight};
use vhost::vhost_user::{Frontend, VhostUserFrontend};

const MIB: u64 = 1 << 20;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;
const DATA: u64 = GPA + 0x1_0000;
/// Largest request: data end below the rings.
const MOST: u64 = 0x18_0000;

/// 0: clean, 3: leaks.
fn check(path: &Path, allowed: &[i32]) {
    let out = run_qemu_img(&["check", "-f", "qcow2", path.to_str().unwrap()]);
    let code = out.status.code().unwrap_or(-1);
    assert!(allowed.contains(&code), "{out:?}");
}

struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }

    /// Sectors: where, and how many.
    fn range(&mut self, size: u64) -> (u64, u64) {
        let most = if self.roll(8) == 0 { MOST / 512 } else { 40 };
        let at = self.roll(size / 512);
        (at, (1 + self.roll(most)).min(size / 512 - at))
    }
}

fn range_request(vm: &mut Vm, kind: u32, sector: u64, count: u64, unmap: bool) -> u8 {
    let (head, segment, status) = (GPA + 0x100, GPA + 0x120, GPA + 0x200);
    vm.header(head, kind, 0);
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend((count as u32).to_le_bytes());
    bytes.extend(u32::from(unmap).to_le_bytes());
    vm.write_mem(segment, &bytes);
    vm.write_mem(status, &[0xff]);
    vm.chain_on(0, &[d(head, 16, 0), d(segment, 16, 0), d(status, 1, WRITE)]);
    vm.read_mem(status, 1)[0]
}

fn read(vm: &mut Vm, sector: u64, count: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    let (mut at, end) = (sector, sector + count);
    while at < end {
        let now = (end - at).min(MOST / 512);
        let (status, _) = vm.request(T_IN, at, DATA, (now * 512) as u32);
        assert_eq!(status, 0, "read {at}+{now}");
        bytes.extend(vm.read_mem(DATA, (now * 512) as usize));
        at += now;
    }
    bytes
}

/// Random requests against the model.
fn play(vm: &mut Vm, model: &mut [u8], dice: &mut Dice, rounds: u64) {
    let size = model.len() as u64;
    for _ in 0..rounds {
        let (at, count) = dice.range(size);
        let place = (at * 512) as usize..((at + count) * 512) as usize;
        match dice.roll(10) {
            0..5 => {
                let seed = dice.roll(255) as u8 + 1;
                let bytes: Vec<u8> = (0..place.len()).map(|i| seed ^ (i >> 9) as u8).collect();
                vm.write_mem(DATA, &bytes);
                let (status, _) = vm.request(T_OUT, at, DATA, bytes.len() as u32);
                assert_eq!(status, 0, "write {at}+{count}");
                model[place].copy_from_slice(&bytes);
            }
            5..7 => assert!(read(vm, at, count) == model[place], "sector {at}+{count}"),
            7 => {
                assert_eq!(
                    range_request(vm, T_WRITE_ZEROES, at, count, dice.roll(2) == 0),
                    0
                );
                model[place].fill(0);
            }
            8 => {
                assert_eq!(range_request(vm, T_DISCARD, at, count, false), 0);
                let now = read(vm, at, count);
                for (now, old) in now.chunks(512).zip(model[place].chunks_mut(512)) {
                    assert!(now == old || now.iter().all(|&b| b == 0));
                    old.copy_from_slice(now);
                }
            }
            _ => assert_eq!(vm.request(T_FLUSH, 0, 0, 0).0, 0),
        }
    }
}

fn end(mut blk: Blk, vm: Vm) {
    drop(vm);
    // Stand-alone it waits for the next front-end: everything is written by then.
    let text = blk.status_field("State");
    assert!(!text.starts_with('Z'));
    blk.child.kill().unwrap();
    blk.child.wait().unwrap();
}

/// A front-end that comes again when the last one has been dealt with.
fn settle(socket: &Path) {
    let vm = Vm::connect(socket, 1);
    drop(vm);
}

#[test]
fn what_a_guest_writes_qemu_img_finds() {
    let scratch = Scratch::new("qcow2-model");
    let base = scratch.path("base.raw");
    std::fs::write(&base, vec![7u8; 3 * MIB as usize + 512]).unwrap();
    let mid = scratch.path("mid.qcow2");
    create(&mid, 6 * MIB, &["-b", base.to_str().unwrap(), "-F", "raw"]);
    let on_mid = ["-b", mid.to_str().unwrap(), "-F", "qcow2"];
    let cases: [(&str, &[&str], bool); 5] = [
        ("", &[], false),
        (",cache=writeback", &["-o", "cluster_size=4k"], false),
        (",cache=writethrough", &["-o", "compat=0.10"], false),
        (",cache=unsafe", &on_mid, true),
        (",direct=on", &["-o", "cluster_size=2M"], false),
    ];
    for (i, (options, made, chained)) in cases.into_iter().enumerate() {
        let path = scratch.path(&format!("{i}.qcow2"));
        create(&path, 8 * MIB, made);
        let mut model = vec![0; 8 * MIB as usize];
        let mut spec = format!("path={},format=qcow2{options}", path.display());
        if chained {
            spec += &format!(",backing={}:{}", mid.display(), base.display());
            model[..3 * MIB as usize + 512].fill(7);
        }
        let socket = scratch.path(&format!("s{i}"));
        let blk = Blk::listen(&socket, &spec, &[]);
        wait_for("the filter", || blk.status_field("Seccomp") == "2");
        assert_eq!(blk.status_field("Threads"), "2");
        let mut vm = Vm::connect(&socket, 1);
        assert_eq!(
            vm.features & (F_DISCARD | F_WRITE_ZEROES),
            F_DISCARD | F_WRITE_ZEROES
        );
        assert_eq!(vm.config(0, 8), (8 * MIB / 512).to_le_bytes());
        vm.start();
        play(&mut vm, &mut model, &mut Dice(41 + i as u64), 150);
        // A second life on the same process.
        drop(vm);
        let mut vm = Vm::connect(&socket, 1);
        vm.start();
        play(&mut vm, &mut model, &mut Dice(77 + i as u64), 60);
        assert_eq!(vm.request(T_FLUSH, 0, 0, 0).0, 0);
        drop(vm);
        settle(&socket);
        end(blk, Vm::connect(&socket, 1));
        check(&path, &[0]);
        assert_qemu_sees(&path, &model);
    }
}

#[test]
fn what_is_not_granted_or_not_served_is_refused_in_one_line() {
    let scratch = Scratch::new("qcow2-refused");
    let (base, top) = (scratch.path("base.qcow2"), scratch.path("top.qcow2"));
    create(&base, MIB, &[]);
    create(&top, MIB, &["-b", base.to_str().unwrap(), "-F", "qcow2"]);
    let unformatted = scratch.path("unformatted.qcow2");
    create(
        &unformatted,
        MIB,
        &["-b", base.to_str().unwrap(), "-F", "qcow2"],
    );
    qemu_img(&[
        "rebase",
        "-u",
        "-b",
        base.to_str().unwrap(),
        "-F",
        "qcow2",
        unformatted.to_str().unwrap(),
    ]);
    // The format's name, taken out of the header.
    let bytes = std::fs::read(&unformatted).unwrap();
    let at = bytes
        .windows(4)
        .position(|w| w == [0xe2, 0x79, 0x2a, 0xca])
        .unwrap();
    let file = OpenOptions::new().write(true).open(&unformatted).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[0x11; 4], at as u64).unwrap();
    let snapshot = scratch.path("snapshot.qcow2");
    create(&snapshot, MIB, &[]);
    qemu_img(&["snapshot", "-c", "one", snapshot.to_str().unwrap()]);
    let raw = scratch.disk(64);
    let with_base = format!(",backing={}", base.display());
    let twice = format!(",backing={0}:{0}", base.display());
    for (path, more, word) in [
        (
            &top,
            "",
            "base.qcow2, which was not granted: give backing=PATH",
        ),
        (&top, &twice[..], "names no backing file, but 1 more"),
        (&base, &with_base, "names no backing file, but 1 more"),
        (&unformatted, &with_base, "qemu-img rebase -u"),
        (&snapshot, "", "1 internal snapshots"),
        (&raw, "", "give format=raw"),
    ] {
        let spec = format!("path={},format=qcow2,lock=off{more}", path.display());
        let socket = scratch.path("s");
        let mut command = Blk::command();
        command.arg("--socket").arg(&socket).args(["--disk", &spec]);
        let mut blk = Blk(Process::spawn(&mut command));
        assert_eq!(blk.wait_exit().code(), Some(1), "{spec}");
        let text = blk.stderr();
        assert!(text.contains(word), "{spec}: {text}");
        assert_eq!(text.lines().count(), 1, "{text}");
    }
    // Read-only, snapshots do no harm; and raw is raw, whatever is inside.
    for spec in [
        format!("path={},format=qcow2,readonly=on", snapshot.display()),
        format!("path={}", base.display()),
    ] {
        let socket = scratch.path("s2");
        let mut blk = Blk::listen(&socket, &spec, &[]);
        let mut vm = Vm::connect(&socket, 1);
        vm.start();
        let first = read(&mut vm, 0, 1);
        assert_eq!(first.starts_with(b"QFI"), !spec.contains("qcow2,"));
        assert!(blk.is_running());
        let _ = std::fs::remove_file(&socket);
    }
}

#[test]
fn a_file_that_cannot_grow_costs_an_error_and_no_more() {
    let scratch = Scratch::new("qcow2-full");
    let path = scratch.path("full.qcow2");
    create(&path, 8 * MIB, &["-o", "cluster_size=4k"]);
    let socket = scratch.path("s");
    let spec = format!("path={},format=qcow2,max-size=1M", path.display());
    let mut blk = Blk::listen(&socket, &spec, &[]);
    let mut vm = Vm::connect(&socket, 1);
    vm.start();
    let mut model = vec![0u8; 8 * MIB as usize];
    let (mut written, mut refused) = (0, 0);
    for at in (0..8 * MIB / 512).step_by(64) {
        let bytes = vec![(at / 64) as u8 | 1; 32 * 1024];
        vm.write_mem(DATA, &bytes);
        let place = at as usize * 512..at as usize * 512 + bytes.len();
        match vm.request(T_OUT, at, DATA, bytes.len() as u32).0 {
            0 => {
                model[place].copy_from_slice(&bytes);
                written += 1;
            }
            _ => {
                refused += 1;
                // What was there is there, or part of what was to be.
                let now = read(&mut vm, at, 64);
                let whole = now.chunks(512).all(|s| s == &bytes[..512] || s == [0; 512]);
                assert!(whole, "sector {at}");
                model[place].copy_from_slice(&now);
            }
        }
    }
    assert!(
        written > 10 && refused > 10,
        "{written} written, {refused} refused"
    );
    // Space that a discard frees is used again.
    assert_eq!(range_request(&mut vm, T_DISCARD, 0, 64, false), 0);
    model[..32 * 1024].fill(0);
    let last = 8 * MIB / 512 - 8;
    vm.write_mem(DATA, &[77; 4096]);
    assert_eq!(vm.request(T_OUT, last, DATA, 4096).0, 0);
    model[last as usize * 512..].fill(77);
    assert_eq!(vm.request(T_FLUSH, 0, 0, 0).0, 0);
    assert!(read(&mut vm, 0, 8 * MIB / 512) == model);
    assert!(blk.is_running());
    drop(vm);
    settle(&socket);
    kill(blk);
    check(&path, &[0, 3]);
    assert_qemu_sees(&path, &model);
    assert!(std::fs::metadata(&path).unwrap().len() <= MIB);
}

#[test]
fn descriptors_of_a_chain_are_inherited() {
    let scratch = Scratch::new("qcow2-fds");
    let (base, top) = (scratch.path("base.raw"), scratch.path("top.qcow2"));
    std::fs::write(&base, vec![3u8; MIB as usize]).unwrap();
    create(&top, MIB, &["-b", base.to_str().unwrap(), "-F", "raw"]);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&top)
        .unwrap();
    let below = File::open(&base).unwrap();
    // The helper hands over one descriptor; this one is inherited by a number of its own.
    let number = inheritable(below.as_raw_fd());
    let spec = format!(",format=qcow2,backing-fds={number}");
    let (mut blk, _control, vhost) = Blk::inherit(file, &spec, &[]);
    let mut vm = Vm::over(vhost, 1);
    vm.start();
    assert!(read(&mut vm, 0, 8) == vec![3; 4096]);
    vm.write_mem(DATA, &[9; 512]);
    assert_eq!(vm.request(T_OUT, 3, DATA, 512).0, 0);
    assert!(read(&mut vm, 2, 3)[512..1024] == [9; 512]);
    drop(vm);
    assert_eq!(blk.wait_exit().code(), Some(0), "{}", blk.stderr());
    check(&top, &[0]);
}

#[allow(unsafe_code)]
fn inheritable(fd: i32) -> i32 {
    // SAFETY: F_DUPFD takes an integer; the descriptor is open.
    let high = unsafe { libc::fcntl(fd, libc::F_DUPFD, 200) };
    assert!(high >= 200);
    high
}

/// A guest that outlives its block processes.
struct Guest {
    vm: Vm,
    region: Option<(VhostUserInflight, File)>,
}

impl Guest {
    fn new(socket: &Path) -> Self {
        let mut vm = Vm::connect(socket, 1);
        vm.queues[0].ring.reset();
        let mut guest = Self { vm, region: None };
        guest.set_up();
        guest
    }

    /// The front-end meets a new process.
    fn meet(&mut self, socket: &Path) {
        let stream = UnixStream::connect(socket).unwrap();
        let mut f = Frontend::from_stream(stream, 1);
        f.set_owner().unwrap();
        let features = f.get_features().unwrap();
        f.set_features(features).unwrap();
        let protocol = f.get_protocol_features().unwrap();
        f.set_protocol_features(protocol).unwrap();
        f.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        self.vm.frontend = f;
        self.set_up();
    }

    fn set_up(&mut self) {
        let memory = self.vm.region();
        let f = &mut self.vm.frontend;
        let (region, file) = self.region.get_or_insert_with(|| {
            f.get_inflight_fd(&VhostUserInflight::new(0, 0, 1, RING_SIZE))
                .unwrap()
        });
        f.set_inflight_fd(region, file.as_raw_fd()).unwrap();
        f.set_mem_table(&[memory]).unwrap();
        let base = self.vm.queues[0].ring.used_idx();
        self.vm.start_queue(0, base);
    }
}

fn takeovers(default: u64) -> u64 {
    let number = std::env::var("BULKHEAD_TAKEOVERS").ok();
    number.and_then(|v| v.parse().ok()).unwrap_or(default)
}

fn kill(mut blk: Blk) {
    blk.child.kill().unwrap();
    blk.child.wait().unwrap();
}

#[test]
fn a_killed_process_loses_nothing_that_completed() {
    let scratch = Scratch::new("qcow2-takeover");
    let base = scratch.path("base.raw");
    std::fs::write(&base, vec![6u8; 5 * MIB as usize]).unwrap();
    let on_base: Vec<&str> = vec!["-b", base.to_str().unwrap(), "-F", "raw"];
    for (i, made) in [vec!["-o", "cluster_size=4k"], on_base]
        .into_iter()
        .enumerate()
    {
        let path: PathBuf = scratch.path(&format!("{i}.qcow2"));
        let size = 16 * MIB;
        create(&path, size, &made);
        let mut spec = format!("path={},format=qcow2", path.display());
        let mut model = vec![0u8; size as usize];
        if i == 1 {
            spec += &format!(",backing={}", base.display());
            model[..5 * MIB as usize].fill(6);
        }
        let socket = scratch.path("s");
        let mut dice = Dice(0xabcd + i as u64);
        let mut blk = Blk::listen(&socket, &spec, &[]);
        let mut guest = Guest::new(&socket);
        for round in 0..takeovers(12) {
            let rounds = 1 + dice.roll(25);
            play(&mut guest.vm, &mut model, &mut dice, rounds);
            // One more write, and the end comes while it is under way, or before, or after.
            let (at, count) = dice.range(size);
            let seed = dice.roll(255) as u8 + 1;
            let bytes: Vec<u8> = (0..count * 512).map(|n| seed ^ (n >> 9) as u8).collect();
            let (head, status) = (GPA + 0x100, GPA + 0x200);
            guest.vm.write_mem(DATA, &bytes);
            guest.vm.header(head, T_OUT, at);
            guest.vm.write_mem(status, &[0xff]);
            let chain = [
                d(head, 16, 0),
                d(DATA, bytes.len() as u32, 0),
                d(status, 1, WRITE),
            ];
            let ring = &mut guest.vm.queues[0].ring;
            ring.chain(0, &chain);
            ring.offer(0);
            guest.vm.kick(0);
            std::thread::sleep(std::time::Duration::from_micros(dice.roll(600)));
            kill(blk);
            check(&path, &[0, 3]);
            blk = Blk::listen(&socket, &spec, &[]);
            guest.meet(&socket);
            guest.vm.completion(0);
            assert_eq!(guest.vm.read_mem(status, 1), [0]);
            model[(at * 512) as usize..((at + count) * 512) as usize].copy_from_slice(&bytes);
            if round % 3 == 0 {
                let now = read(&mut guest.vm, 0, size / 512);
                assert!(now == model, "after takeover {round}");
            }
        }
        assert!(read(&mut guest.vm, 0, size / 512) == model);
        drop(guest);
        settle(&socket);
        kill(blk);
        // What was under way when a process died may have left a cluster that nobody uses.
        check(&path, &[0, 3]);
        assert_qemu_sees(&path, &model);
        let _ = std::fs::remove_file(&socket);
    }
}
