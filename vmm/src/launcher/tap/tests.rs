//! Taps of this machine, where it lets us make them; and descriptors that are none, anywhere.

use super::*;

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
    let queue = |fd: OwnedFd| {
        let (name, flags, mtu) = Inherited::look(&fd).unwrap();
        Inherited {
            fd,
            name,
            flags,
            mtu,
        }
    };
    (first..).zip(fds.into_iter().map(queue)).collect()
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
    assert_eq!(parse_flags(up.trim()).unwrap() & libc::IFF_UP, libc::IFF_UP);
    // The kernel would let a second user have what is left of its queues.
    let busy = line(open(&name, 1, 0));
    assert!(busy.contains("busy"), "{busy}");
    drop(tap);
    assert!(!fs::exists(format!("/sys/class/net/{name}")).unwrap());
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
