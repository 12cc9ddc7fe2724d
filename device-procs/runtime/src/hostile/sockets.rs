//! Sockets of each family, and another VM's.

use super::told::Told;
use super::{Attempt, call, kept, zeroes};

/// Families that Linux has had by now, and some that it has not.
const FAMILIES: std::ops::Range<libc::c_long> = 0..64;

pub(super) fn attempts(told: &Told) -> Vec<Attempt> {
    // struct sockaddr_un with an abstract name.
    let hidden = kept(b"\x01\0\0bulkhead\0".to_vec());
    let (address, len) = told.address();
    let families = [
        ("unix", libc::AF_UNIX, libc::SOCK_STREAM),
        ("inet", libc::AF_INET, libc::SOCK_STREAM),
        ("inet6", libc::AF_INET6, libc::SOCK_DGRAM),
        ("netlink", libc::AF_NETLINK, libc::SOCK_RAW),
        ("packet", libc::AF_PACKET, libc::SOCK_RAW),
        ("vsock", libc::AF_VSOCK, libc::SOCK_STREAM),
        ("alg", libc::AF_ALG, libc::SOCK_SEQPACKET),
        ("xdp", libc::AF_XDP, libc::SOCK_RAW),
        ("key", libc::AF_KEY, libc::SOCK_RAW),
    ];
    let mut all: Vec<_> = families
        .into_iter()
        .map(|(name, family, kind)| {
            let args = [family.into(), kind.into(), 0, 0, 0, 0];
            call(format!("socket {name}"), "socket", libc::SYS_socket, args)
        })
        .collect();
    all.extend([
        call(
            "socketpair",
            "socketpair",
            libc::SYS_socketpair,
            [1, 1, 0, zeroes(), 0, 0],
        ),
        call(
            "connect to another VM's API",
            "connect",
            libc::SYS_connect,
            [3, address, len, 0, 0, 0],
        ),
        call(
            "connect to an abstract socket",
            "connect",
            libc::SYS_connect,
            [4, hidden, 11, 0, 0, 0],
        ),
        call("bind", "bind", libc::SYS_bind, [3, hidden, 11, 0, 0, 0]),
        call("listen", "listen", libc::SYS_listen, [3, 1, 0, 0, 0, 0]),
        call("accept4", "accept4", libc::SYS_accept4, [3, 0, 0, 0, 0, 0]),
        call(
            "sendto an address",
            "sendto",
            libc::SYS_sendto,
            [3, zeroes(), 1, 0, address, len],
        ),
    ]);
    all
}

/// By their numbers, whatever the kernel calls them.
pub(super) fn families() -> Vec<Attempt> {
    let attempt = |family| {
        let args = [family, libc::SOCK_DGRAM.into(), 0, 0, 0, 0];
        let name = format!("a socket of family {family}");
        call(name, "socket", libc::SYS_socket, args)
    };
    FAMILIES.map(attempt).collect()
}
