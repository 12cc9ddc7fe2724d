//! Taps of this machine, where it lets us make them; and descriptors that are none, anywhere.

use super::*;

/// As the launcher does it.
fn open(name: &str, queues: u32, mtu: u32) -> Result<Tap, String> {
    super::open(&Interfaces::open().unwrap(), name, queues, mtu)
}

fn ip(args: &[&str]) {
    let done = std::process::Command::new("ip").args(args).output();
    let done = done.unwrap();
    assert!(done.status.success(), "{args:?}: {done:?}");
}

/// A name nobody else uses. `None`, with a note, where taps cannot be made: not root.
fn fresh(letter: char) -> Option<String> {
    let name = format!("bt{:x}{letter}", std::process::id());
    match open(&name, 1, 0) {
        Ok(_) => Some(name),
        Err(why) => {
            eprintln!("not tested here: {why}");
            // Only for want of rights or of the driver, never for another reason.
            assert!(why.contains("CAP_NET_ADMIN") || why.contains(TUN), "{why}");
            None
        }
    }
}

/// As if they had been inherited, under numbers from `first` on.
fn numbered(first: i32, fds: Vec<OwnedFd>) -> Vec<(i32, Inherited)> {
    let queue = |fd: OwnedFd| Inherited::new(fd).unwrap();
    (first..).zip(fds.into_iter().map(queue)).collect()
}

#[test]
fn queues_of_one_tap_are_known_as_such() {
    let (Some(one), Some(other)) = (fresh('i'), fresh('j')) else {
        return;
    };
    let one = numbered(5, open(&one, 2, 0).unwrap().queues);
    let other = numbered(7, open(&other, 1, 0).unwrap().queues);
    let interface = |queue: &(i32, Inherited)| queue.1.interface();
    assert!(interface(&one[0]).1.is_some());
    assert_eq!(interface(&one[0]), interface(&one[1]));
    let (one, other) = (interface(&one[0]), interface(&other[0]));
    assert!(one.0 != other.0 && one.1 != other.1);
}

fn line(result: Result<Tap, String>) -> String {
    let line = result.map(|tap| tap.name).unwrap_err();
    assert!(!line.contains('\n'), "{line}");
    line
}

#[test]
fn a_tap_is_made_with_its_queues_and_mtu_and_ends_with_its_descriptors() {
    let Some(name) = fresh('a') else { return };
    let tap = open(&name, 3, 9000).unwrap();
    assert_eq!((tap.queues.len(), tap.mtu), (3, 9000));
    let (seen, flags) = tap_sys::describe(tap.queues[2].as_fd()).unwrap();
    assert_eq!(seen, name);
    let wanted = flag::TAP | flag::NO_PI | flag::VNET_HDR | flag::MULTI_QUEUE;
    assert_eq!(flags & wanted, wanted);
    let up = fs::read_to_string(format!("/sys/class/net/{name}/flags")).unwrap();
    let up = i32::from_str_radix(up.trim().trim_start_matches("0x"), 16).unwrap();
    assert_eq!(up & libc::IFF_UP, libc::IFF_UP);
    // The kernel would let a second user have what is left of its queues.
    let busy = line(open(&name, 1, 0));
    assert!(busy.contains("busy"), "{busy}");
    drop(tap);
    assert!(!fs::exists(format!("/sys/class/net/{name}")).unwrap());
}

#[test]
fn a_tap_of_several_queues_that_is_down_or_unplugged_or_switched_off_is_busy_all_the_same() {
    let Some(name) = fresh('e') else { return };
    let held = open(&name, 2, 0).unwrap();
    let refused = |how: &str| {
        for queues in [1, 2] {
            let busy = line(open(&name, queues, 0));
            assert!(passing(&busy), "{how}: {busy}");
        }
        let count = Interfaces::open().unwrap().tun(&name).unwrap().queues;
        assert_eq!(count, Some(2), "{how}: nothing of it stays");
    };
    refused("up");
    ip(&["link", "set", &name, "down"]);
    refused("down");
    ip(&["link", "set", &name, "up"]);
    // TUNSETCARRIER, as bulkhead-net sets a link down.
    let off: libc::c_int = 0;
    #[allow(unsafe_code)] // an ioctl of a test
    // SAFETY: TUNSETCARRIER reads one int, which lives through the call.
    let set = unsafe {
        use std::os::fd::AsRawFd;
        libc::ioctl(held.queues[0].as_raw_fd(), 0x4004_54e2, &raw const off)
    };
    assert_eq!(set, 0);
    refused("its link is down");
    // Only one queue is left on: the guest uses one pair.
    #[allow(unsafe_code)] // an ioctl of a test
    // SAFETY: all zeroes is an ifreq; TUNSETQUEUE reads one, with IFF_DETACH_QUEUE.
    let set = unsafe {
        use std::os::fd::AsRawFd;
        let mut request: libc::ifreq = std::mem::zeroed();
        request.ifr_ifru.ifru_flags = 0x0400;
        libc::ioctl(held.queues[1].as_raw_fd(), 0x4004_54d9, &raw mut request)
    };
    assert_eq!(set, 0);
    refused("one queue is switched off");
    drop(held);
    open(&name, 2, 0).unwrap();
}

#[test]
fn who_is_just_ending_is_waited_for_and_nobody_else() {
    let Some(name) = fresh('f') else { return };
    let held = open(&name, 2, 0).unwrap();
    let leaver = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(100));
        drop(held);
    });
    let second = open_patiently(&name, 2, 0).unwrap();
    leaver.join().unwrap();
    let start = Instant::now();
    assert!(passing(&line(open_patiently(&name, 1, 0))));
    assert!(start.elapsed() >= bulkhead_taps::PATIENCE);
    drop(second);
}

#[test]
fn of_two_that_attach_at_the_same_time_never_both_have_it() {
    let Some(name) = fresh('g') else { return };
    // It is to outlive its queues.
    ip(&["tuntap", "add", &name, "mode", "tap", "multi_queue"]);
    let both = std::sync::Barrier::new(2);
    for _ in 0..100 {
        let attempt = || {
            both.wait();
            let tap = open(&name, 2, 0);
            both.wait();
            tap.is_ok()
        };
        let had = std::thread::scope(|scope| {
            let other = scope.spawn(attempt);
            (attempt(), other.join().unwrap())
        });
        assert_ne!(had, (true, true));
    }
    ip(&["link", "del", &name]);
}

#[test]
fn a_tap_that_is_busy_or_of_another_kind_is_refused_by_name() {
    let Some(name) = fresh('b') else { return };
    let held = open(&name, 1, 0).unwrap();
    let busy = line(open(&name, 1, 0));
    assert!(busy.starts_with(&format!("tap {name}: busy")), "{busy}");
    let single = line(open(&name, 2, 0));
    assert!(
        single.contains("has one queue, 2 are asked for"),
        "{single}"
    );
    assert!(single.contains("multi_queue"), "{single}");
    drop(held);
    let lo = line(open("lo", 1, 0));
    assert!(lo.starts_with("tap lo: ") && lo.contains("no tap"), "{lo}");
    // The remedy is not to make a tap by the name of what is there.
    assert!(!lo.contains("add lo"), "{lo}");

    let tun = open_tun().unwrap();
    tap_sys::attach(tun.as_fd(), &name, flag::TUN | flag::NO_PI).unwrap();
    let wrong = line(open(&name, 1, 0));
    assert!(wrong.contains("is a tun (layer 3)"), "{wrong}");
    let adopted = line(adopt(numbered(9, vec![tun.into()])));
    assert!(
        adopted.starts_with("fd 9: ") && adopted.contains("is a tun"),
        "{adopted}"
    );
}

#[test]
fn inherited_queues_are_of_one_tap_and_of_the_right_form() {
    let Some(name) = fresh('c') else { return };
    let tap = open(&name, 2, 0).unwrap();
    let tap = adopt(numbered(7, tap.queues)).unwrap();
    assert_eq!(
        (tap.name.as_str(), tap.queues.len(), tap.mtu),
        (name.as_str(), 2, 1500)
    );
    drop(tap);

    let bare = open_tun().unwrap();
    tap_sys::attach(bare.as_fd(), &name, flag::TAP | flag::NO_PI).unwrap();
    let no_header = line(adopt(numbered(5, vec![bare.into()])));
    assert!(no_header.contains("IFF_VNET_HDR"), "{no_header}");
    // The kernel says by the same bit that a tap has no filter.
    let flags = flag::TAP | flag::VNET_HDR;
    let with_information = File::options().read(true).write(true).open(TUN).unwrap();
    tap_sys::attach(with_information.as_fd(), &fresh('p').unwrap(), flags).unwrap();
    let informed = line(adopt(numbered(6, vec![with_information.into()])));
    assert!(informed.contains("IFF_NO_PI"), "{informed}");

    let one = open(&name, 1, 0).unwrap();
    let mut fds = one.queues;
    fds.push(fds[0].try_clone().unwrap());
    let single = line(adopt(numbered(7, fds)));
    assert!(single.contains("IFF_MULTI_QUEUE"), "{single}");

    let Some(other) = fresh('d') else { return };
    let mut queues = open(&name, 2, 0).unwrap().queues;
    queues.truncate(1);
    let mut others = open(&other, 2, 0).unwrap().queues;
    others.truncate(1);
    queues.append(&mut others);
    let mixed = line(adopt(numbered(7, queues)));
    assert!(mixed.contains("queues of one tap"), "{mixed}");
}

#[test]
fn what_is_no_tap_is_not_taken_for_one() {
    let (read, _write) = sys::pipe().unwrap();
    assert!(Inherited::look(&read).is_none());
    for bad in ["", "sixteen-letters!"] {
        assert!(line(open(bad, 1, 0)).starts_with("tap "));
    }
}
