//! What the process holds, used as it should not be.

use std::os::fd::RawFd;

use super::told::Told;
use super::{Attempt, Outcome, call, now, raw, zeroes};

pub(super) fn attempts(told: &Told) -> Vec<Attempt> {
    const FIONREAD: libc::c_long = 0x541b;
    const TIOCSTI: libc::c_long = 0x5412;
    const FIBMAP: libc::c_long = 1;
    const BLKDISCARD: libc::c_long = 0x1277;
    const TUNSETIFF: libc::c_long = 0x4004_54ca;
    const VHOST_SET_OWNER: libc::c_long = 0xaf01;
    const KVM_CREATE_VM: libc::c_long = 0xae01;
    let (address, len) = told.address();
    let mut all = Vec::new();
    // Its disk, its tap, its log, its channels; behind them memory, kicks and calls.
    for fd in 0..20 {
        let name = format!("ioctl on descriptor {fd}");
        all.push(call(
            name,
            "ioctl",
            libc::SYS_ioctl,
            [fd, FIONREAD, zeroes(), 0, 0, 0],
        ));
    }
    // Its files, its tap or its listeners; behind them what the kernel serves its rings by.
    for fd in 5..12 {
        for (name, command) in [
            ("TUNSETIFF", TUNSETIFF),
            ("VHOST_SET_OWNER", VHOST_SET_OWNER),
        ] {
            let name = format!("ioctl {name} on descriptor {fd}");
            all.push(call(
                name,
                "ioctl",
                libc::SYS_ioctl,
                [fd, command, zeroes(), 0, 0, 0],
            ));
        }
    }
    for (name, command) in [
        ("TIOCSTI", TIOCSTI),
        ("FIBMAP", FIBMAP),
        ("BLKDISCARD", BLKDISCARD),
        ("KVM_CREATE_VM", KVM_CREATE_VM),
    ] {
        let name = format!("ioctl {name} on its own descriptor");
        all.push(call(
            name,
            "ioctl",
            libc::SYS_ioctl,
            [5, command, zeroes(), 0, 0, 0],
        ));
    }
    all.extend([
        call(
            "fcntl F_SETFL",
            "fcntl",
            libc::SYS_fcntl,
            [3, 4, 0, 0, 0, 0],
        ),
        call(
            "fcntl F_DUPFD",
            "fcntl",
            libc::SYS_fcntl,
            [3, 0, 0, 0, 0, 0],
        ),
        call("dup", "dup", libc::SYS_dup, [3, 0, 0, 0, 0, 0]),
        call("splice", "splice", libc::SYS_splice, [3, 0, 4, 0, 1, 0]),
        call(
            "fchmod of its own file",
            "fchmod",
            libc::SYS_fchmod,
            [5, 0o777, 0, 0, 0, 0],
        ),
        call(
            "setsockopt",
            "setsockopt",
            libc::SYS_setsockopt,
            [3, 1, 16, zeroes(), 4, 0],
        ),
    ]);
    for fd in [3, 4] {
        all.push(Attempt {
            name: format!("flood of descriptors over channel {fd}"),
            call: "sendmsg",
            worker: false,
            run: now(move || Outcome::Sent(flood(fd, &[0xff]))),
        });
        all.push(Attempt {
            name: format!("another VM's API by the address of a message over channel {fd}"),
            call: "sendmsg",
            worker: false,
            run: now(move || Outcome::Answer(addressed(fd, address, len))),
        });
    }
    all
}

/// Sends a byte to an address, by a channel that is joined to the VMM.
fn addressed(channel: RawFd, address: libc::c_long, len: libc::c_long) -> libc::c_long {
    let mut byte = [0_u8];
    let mut vector = libc::iovec {
        iov_base: byte.as_mut_ptr().cast(),
        iov_len: 1,
    };
    // SAFETY: msghdr is plain data, for which all zeroes is a value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_name = address as *mut libc::c_void;
    message.msg_namelen = libc::socklen_t::try_from(len).unwrap_or_default();
    message.msg_iov = &raw mut vector;
    message.msg_iovlen = 1;
    let flags = libc::c_long::from(libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT);
    let message = (&raw const message) as libc::c_long;
    // It describes `byte`, which lives across the call, and an address that lives forever.
    raw(libc::SYS_sendmsg, [channel.into(), message, flags, 0, 0, 0])
}

/// Sends what it holds beside these bytes, many times; how often that went.
pub(super) fn flood(channel: RawFd, bytes: &[u8]) -> usize {
    #[repr(C)]
    struct Control {
        header: libc::cmsghdr,
        fds: [RawFd; 8],
    }
    let mut vector = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    let mut control = Control {
        header: libc::cmsghdr {
            cmsg_len: size_of::<Control>(),
            cmsg_level: libc::SOL_SOCKET,
            cmsg_type: libc::SCM_RIGHTS,
        },
        fds: [3, 4, 5, 3, 4, 5, 3, 4],
    };
    let mut sent = 0;
    for _ in 0..1000 {
        // SAFETY: msghdr is plain data, for which all zeroes is a value.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = &raw mut vector;
        message.msg_iovlen = 1;
        message.msg_control = (&raw mut control).cast();
        message.msg_controllen = size_of::<Control>();
        let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
        // SAFETY: the message describes `bytes` and `control`, which live across the call.
        if unsafe { libc::sendmsg(channel, &raw const message, flags) } >= 0 {
            sent += 1;
        }
    }
    sent
}
