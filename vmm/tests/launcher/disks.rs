//! Disks as a launcher opens them: one VM's alone, and kept so that they can grow, whether or
//! not their process lives, and so that another process can take its place.

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use bulkhead_vmm::launcher::{Access, Launcher, LauncherEvent, Linked};
use rustix::event::{PollFd, PollFlags, Timespec};

use crate::bed::{Bed, alive, soon, spec};
use crate::next_exit;

/// The launcher's answer to a growth.
fn grow(launcher: &Launcher, id: &str, index: u32, size: u64) -> Result<u64, String> {
    let ticket = launcher.begin_grow(id, index, size).unwrap();
    let mut events = Vec::new();
    soon("an answer", || {
        events.extend(launcher.poll_events().unwrap());
        !events.is_empty()
    });
    match events.remove(0) {
        LauncherEvent::Grown { ticket: of, result } if of == ticket => result,
        other => panic!("{other:?}"),
    }
}

#[test]
fn given_a_disk_then_it_is_one_vms_alone_and_grows_while_its_process_lives_or_not() {
    let bed = Bed::new("disk");
    let (launcher, other) = (bed.launcher(), bed.launcher());
    let path = bed.path("disk");
    std::fs::write(&path, [0; 4096]).unwrap();
    let open = |launcher: &Launcher, access| launcher.open_disk(&path, access, false, true);
    let (disk, info) = open(&launcher, Access::ReadWrite).unwrap();
    assert_eq!(info.size, 4096);
    let mut probe = spec("disk0", &["wait"]);
    probe.fds.push(disk.into());
    let device = launcher.spawn(probe).unwrap();

    // Another VM, and a second opening of this one.
    for launcher in [&other, &launcher] {
        for access in [Access::ReadWrite, Access::Read] {
            let refused = open(launcher, access).unwrap_err().to_string();
            assert_eq!(
                refused,
                format!(
                    "disk {}: is in use by another process, or by another disk of this machine (locked): end that, or open it read-only in both",
                    path.display()
                )
            );
        }
    }
    assert!(other.open_disk(&path, Access::Read, false, false).is_ok());

    let size = || std::fs::metadata(&path).unwrap().len();
    assert_eq!(grow(&launcher, "disk0", 0, 8192), Ok(8192));
    assert_eq!(size(), 8192);
    assert_eq!(
        grow(&launcher, "disk0", 0, 512),
        Ok(8192),
        "it is never shrunk"
    );
    for (id, index, to) in [
        ("disk0", 1, 1 << 20),
        ("disk1", 0, 1 << 20),
        ("disk0", 0, u64::MAX),
    ] {
        let refused = grow(&launcher, id, index, to).unwrap_err();
        assert!(refused.starts_with(&format!("device {id}: ")), "{refused}");
        assert_eq!(refused.lines().count(), 1, "{refused}");
    }
    assert_eq!(size(), 8192);

    // Its process dies: the lock stays, and the file can grow for its successor.
    launcher.kill("disk0", 0).unwrap();
    assert_eq!(next_exit(&launcher).0, "disk0");
    drop(device);
    assert!(open(&other, Access::ReadWrite).is_err());
    assert_eq!(grow(&launcher, "disk0", 0, 16384), Ok(16384));

    launcher.kill_and_forget("disk0", 0).unwrap();
    assert!(open(&other, Access::ReadWrite).is_ok());
    assert!(grow(&launcher, "disk0", 0, 1 << 20).is_err());
    assert_eq!(size(), 16384);
}

#[test]
fn given_a_vm_that_just_ended_then_its_disk_is_free_for_the_next() {
    let bed = Bed::new("handover");
    let path = bed.path("disk");
    std::fs::write(&path, [0; 4096]).unwrap();
    for _ in 0..5 {
        let launcher = bed.launcher();
        let (disk, _) = launcher
            .open_disk(&path, Access::ReadWrite, false, true)
            .unwrap();
        let mut probe = spec("disk0", &["wait"]);
        probe.fds.push(disk.into());
        let device = launcher.spawn(probe).unwrap();
        // Nothing waits for the process's end.
        drop(device);
        launcher.shutdown();
    }
}

/// The launcher's answer to a start in the place of another.
fn respawn(launcher: &Launcher, incarnation: u64) -> Result<Linked, String> {
    let (ticket, control, vhost) = launcher.begin_respawn("disk0", incarnation).unwrap();
    let mut events = Vec::new();
    soon("an answer", || {
        events.extend(launcher.poll_events().unwrap());
        !events.is_empty()
    });
    // The process ends by itself otherwise; this one does not care.
    drop((control, vhost));
    match events.remove(0) {
        LauncherEvent::Linked { ticket: of, result } if of == ticket => {
            result.map(|()| launcher.take_linked(ticket).unwrap())
        }
        other => panic!("{other:?}"),
    }
}

/// Whether nothing holds the other end of a fence.
fn fallen(fence: &impl AsFd) -> bool {
    let mut entry = [PollFd::new(fence, PollFlags::empty())];
    rustix::event::poll(&mut entry, Some(&Timespec::default())).unwrap();
    entry[0].revents().contains(PollFlags::HUP)
}

#[test]
fn given_a_process_that_died_then_another_takes_its_place_with_the_same_descriptors() {
    let bed = Bed::new("respawn");
    let launcher = bed.launcher();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let mut probe = spec("disk0", &["report"]);
    probe.fence = true;
    probe.fds.push(theirs.into());
    let first = launcher.spawn(probe).unwrap();
    let mut word = [0; 5];
    ours.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"fd 5\n");
    let fence = first.fence.unwrap();
    // It reports and waits, or has ended: then there is nothing to refuse.
    if alive(first.pid) {
        let refused = respawn(&launcher, 1).unwrap_err();
        assert_eq!(refused, "device disk0: its last process has not ended");
        assert!(!fallen(&fence), "it fell while the process lived");
    }
    launcher.begin_kill("disk0", 0).unwrap();
    assert_eq!(next_exit(&launcher).0, "disk0");
    soon("the fence falls", || fallen(&fence));

    for incarnation in 1..4 {
        let next = respawn(&launcher, incarnation).unwrap();
        ours.read_exact(&mut word).unwrap();
        assert_eq!(&word, b"fd 5\n", "it has the descriptor of the first");
        let fence = next.second.unwrap();
        launcher.begin_kill("disk0", incarnation).unwrap();
        let (id, of, _) = next_exit(&launcher);
        assert_eq!((id.as_str(), of), ("disk0", incarnation));
        soon("the fence falls", || fallen(&fence));
    }
    launcher.kill_and_forget("disk0", 3).unwrap();
    let refused = respawn(&launcher, 4).unwrap_err();
    assert!(
        refused.contains("no process was started for it"),
        "{refused}"
    );
}
