//! Taps (Linux's Documentation/networking/tuntap.rst): attaching to one by its name, looking
//! at one that was inherited, and the descriptors of vhost-net that go with it. Every refusal
//! is one line that names the tap and the remedy.
//!
//! By name, a tap is opened in the caller's network namespace, in one of two places. For a
//! machine that the command line describes, the VMM opens it before it confines itself
//! (`bulkhead run`, with the caller's own rights: root, or whoever has CAP_NET_ADMIN, gets a
//! tap made, which ends with the machine). For a machine that comes by the API, the launcher
//! opens it: it has no capability over the host's network, so that the tap must exist, and
//! belong to bulkhead's user (to nobody does on some kernels). With `--ttrpc` in a namespace that
//! was made for the machine, the VMM attaches to the taps there before it confines itself.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::Instant;

pub use super::tap_sys::Interfaces;
use super::tap_sys::{self, flag};
use super::{printable, sys};

/// Of a tap that is somebody else's.
const BUSY: &str = "busy: another program is attached to it: stop that, or choose another tap";

/// Of a tap that is on its way out.
const LEAVING: &str = "it is being removed: try again";

/// Where taps are made.
const TUN: &str = "/dev/net/tun";
/// Where the kernel's own back-end is had.
pub const VHOST_NET: &str = "/dev/vhost-net";

/// A tap, one descriptor for each queue pair, non-blocking.
#[derive(Debug)]
pub struct Tap {
    /// Name of the interface.
    pub name: String,
    /// Its queues.
    pub queues: Vec<OwnedFd>,
    /// Its MTU, as the host's side has it.
    pub mtu: u32,
}

/// What std prints for an error, without the "(os error N)".
fn reason(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error")
        .next()
        .unwrap_or(&text)
        .to_lowercase()
}

/// [`open`], but waits for somebody who is just ending.
///
/// # Errors
/// One line.
pub fn open_patiently(name: &str, queues: u32, mtu: u32) -> Result<Tap, String> {
    let interfaces = Interfaces::open()
        .map_err(|e| format!("tap {}: a socket: {}", printable(name), reason(&e)))?;
    let until = Instant::now() + bulkhead_taps::PATIENCE;
    loop {
        match open(&interfaces, name, queues, mtu) {
            Err(why) if passing(&why) && Instant::now() < until => {
                std::thread::sleep(bulkhead_taps::PAUSE);
            }
            other => return other,
        }
    }
}

/// Whether a refusal of [`open`] may be gone when it is asked again.
pub fn passing(why: &str) -> bool {
    why.ends_with(BUSY) || why.ends_with(LEAVING)
}

/// Attaches to the tap `name` by `queues` queues. A tap that does not exist is made where
/// that is permitted, brought up, and given `mtu` (0: leave it); it ends when the last
/// descriptor of it is closed.
///
/// # Errors
/// One line.
pub fn open(interfaces: &Interfaces, name: &str, queues: u32, mtu: u32) -> Result<Tap, String> {
    let say = |why: String| format!("tap {}: {why}", printable(name));
    let explain = |queues, existed, e: &io::Error| explain(interfaces, name, queues, existed, e);
    let existed = match interfaces.mtu(name) {
        Ok(_) => true,
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => false,
        Err(error) => return Err(say(reason(&error))),
    };
    // See `bulkhead_taps`: before, so as not to take frames of another's for a moment; after,
    // because only that is sure.
    let attached = || interfaces.tun(name).and_then(|tun| tun.queues).unwrap_or(0);
    if existed && attached() > 0 {
        return Err(say(BUSY.to_owned()));
    }
    let first = attach_first(name, queues, &|e| explain(queues, existed, e));
    let mut fds = vec![first.map_err(say)?];
    for have in 1..queues {
        let fd = attach(name, flag::MULTI_QUEUE).map_err(|e| {
            say(match e.raw_os_error() {
                Some(libc::E2BIG) => {
                    format!("the kernel gives it {have} queues and no more: ask for {have}")
                }
                _ => format!("queue {have}: {}", explain(queues, existed, &e)),
            })
        })?;
        fds.push(fd);
    }
    if attached() > queues.max(1) {
        return Err(say(BUSY.to_owned()));
    }
    if !existed {
        if mtu != 0 {
            interfaces
                .set_mtu(name, mtu)
                .map_err(|e| say(format!("setting its MTU to {mtu}: {}", reason(&e))))?;
        }
        interfaces
            .bring_up(name)
            .map_err(|e| say(format!("bringing it up: {}", reason(&e))))?;
    }
    let has = interfaces.mtu(name).map_err(|e| say(reason(&e)))?;
    Ok(Tap {
        name: name.to_owned(),
        queues: fds,
        mtu: has,
    })
}

/// Attaches to one queue of a tap that is there.
///
/// # Errors
/// One line; also of an interface of another kind.
pub fn open_existing(name: &str) -> Result<Tap, String> {
    let there = Interfaces::open().and_then(|interfaces| interfaces.mtu(name));
    match there {
        Ok(_) => open_patiently(name, 1, 0),
        Err(error) => Err(format!("tap {}: {}", printable(name), reason(&error))),
    }
}

fn open_tun() -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(TUN)
}

fn attach(name: &str, extra: i16) -> io::Result<OwnedFd> {
    let tun = open_tun()?;
    let flags = flag::TAP | flag::NO_PI | flag::VNET_HDR | extra;
    tap_sys::attach(tun.as_fd(), name, flags)?;
    Ok(tun.into())
}

/// The first queue. One queue of a tap with several is as good as a tap with one.
fn attach_first(
    name: &str,
    queues: u32,
    explain: &dyn Fn(&io::Error) -> String,
) -> Result<OwnedFd, String> {
    open_tun().map_err(|error| match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
            format!("{TUN}: {}; load the kernel module tun", reason(&error))
        }
        _ => format!(
            "{TUN}: {}; give bulkhead's user access to it",
            reason(&error)
        ),
    })?;
    let attached = match attach(name, if queues > 1 { flag::MULTI_QUEUE } else { 0 }) {
        Err(error) if queues <= 1 && error.raw_os_error() == Some(libc::EINVAL) => {
            attach(name, flag::MULTI_QUEUE)
        }
        other => other,
    };
    attached.map_err(|error| explain(&error))
}

/// What is wrong with a tap that cannot be attached to, and what to do.
fn explain(
    interfaces: &Interfaces,
    name: &str,
    queues: u32,
    existed: bool,
    error: &io::Error,
) -> String {
    let several = if queues > 1 { " multi_queue" } else { "" };
    // Named for root, too: some kernels let nobody but CAP_NET_ADMIN at a tap without owner.
    let (uid, _) = super::isolate::effective_ids();
    let make = |name: &str| format!("`ip tuntap add {name} mode tap{several} user {uid}`");
    let add = make(name);
    let other = make("NAME");
    match (error.raw_os_error(), existed) {
        (Some(libc::EPERM), false) => format!(
            "there is no such interface, and to make one takes CAP_NET_ADMIN: run {add} first"
        ),
        (Some(libc::EPERM), true) => {
            let owner = match interfaces.tun(name).map(|tun| tun.owner) {
                Some(None) => "to nobody".to_owned(),
                Some(Some(owner)) => format!("to user {owner}"),
                None => "to another user".to_owned(),
            };
            format!("belongs {owner}: make it with {add}, or run bulkhead as its owner")
        }
        (Some(libc::EBUSY), _) => BUSY.into(),
        (Some(libc::E2BIG), _) => {
            "busy: all its queues are taken: stop who holds them, or choose another tap".into()
        }
        (Some(libc::EINVAL), true) => match interfaces.tun(name) {
            None => format!("is an interface of another kind, no tap: name one made with {other}"),
            Some(tun) if !tun.tap => {
                format!("is a tun (layer 3), not a tap: name one made with {other}")
            }
            Some(tun) if queues > 1 && tun.queues.is_none() => format!(
                "has one queue, {queues} are asked for: make it with {add}, or ask for queues=1"
            ),
            Some(_) => format!("{}; make it anew with {add}", reason(error)),
        },
        (Some(libc::EBADF | libc::ENODEV), _) => format!("{}; {LEAVING}", reason(error)),
        _ => format!(
            "{}; see whether `ip link show {name}` knows it",
            reason(error)
        ),
    }
}

/// A queue of a tap or tun that this process inherited, and what the kernel says of it: a
/// confined process may not ask.
#[derive(Debug)]
pub struct Inherited {
    fd: OwnedFd,
    name: String,
    address: Option<[u8; 6]>,
    flags: i16,
    mtu: u32,
}

impl Inherited {
    /// A queue by its descriptor, made non-blocking. What is no such thing comes back.
    fn new(fd: OwnedFd) -> Result<Self, OwnedFd> {
        match Self::look(&fd) {
            Some((name, flags, mtu)) => Ok(Self {
                address: tap_sys::hardware_address(fd.as_fd()),
                fd,
                name,
                flags,
                mtu,
            }),
            None => Err(fd),
        }
    }

    fn look(fd: &OwnedFd) -> Option<(String, i16, u32)> {
        let (name, flags) = tap_sys::describe(fd.as_fd())?;
        let flags = tap_sys::exact_flags(fd.as_fd(), flags);
        sys::set_nonblocking(fd.as_fd()).ok()?;
        // The interface may lie in another network namespace than ours, by which it is not known.
        let mtu = Interfaces::open()
            .and_then(|interfaces| interfaces.mtu(&name))
            .unwrap_or(0);
        Some((name, flags, mtu))
    }

    /// Name of its interface.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What tells its interface from others, also of that name in other network namespaces.
    pub fn interface(&self) -> (String, Option<[u8; 6]>) {
        (self.name.clone(), self.address)
    }
}

/// Takes every queue of a tap or tun among this process's descriptors, by their numbers, and closes
/// all else that it inherited beyond the standard streams: whoever started it may have left
/// something open by mistake, which nothing here is to hold. To be called before the process has
/// opened any of its own, and by no other.
pub fn inherited() -> BTreeMap<i32, Inherited> {
    let Ok(entries) = fs::read_dir("/proc/self/fd") else {
        return BTreeMap::new();
    };
    // All names first: the directory itself is among them, and closed again below.
    let numbers: Vec<i32> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|number| *number > 2)
        .collect();
    let mut taps = BTreeMap::new();
    for number in numbers {
        let Ok(fd) = sys::take_inherited(number) else {
            continue;
        };
        match Inherited::new(fd) {
            Ok(queue) => {
                taps.insert(number, queue);
            }
            Err(fd) => {
                log::debug!("descriptor {number} was inherited, and is of no use here: closed");
                drop(fd);
            }
        }
    }
    taps
}

/// Takes inherited queues for those of one tap.
///
/// # Errors
/// One line that names the descriptor by the number under which it was inherited.
pub fn adopt(queues: Vec<(i32, Inherited)>) -> Result<Tap, String> {
    let several = queues.len() > 1;
    let mut tap = Tap {
        name: String::new(),
        queues: Vec::new(),
        mtu: 0,
    };
    for (number, queue) in queues {
        let say = |why: &str| Err(format!("fd {number}: {why}"));
        let Inherited {
            fd,
            name,
            flags,
            mtu,
            ..
        } = queue;
        let shown = printable(&name);
        if flags & flag::TAP == 0 {
            return say(&format!(
                "{shown} is a tun (layer 3), not a tap: open it with IFF_TAP"
            ));
        }
        if flags & flag::VNET_HDR == 0 || flags & flag::NO_PI == 0 {
            return say(&format!(
                "tap {shown} has no virtio header alone before its frames: open it with IFF_VNET_HDR | IFF_NO_PI"
            ));
        }
        if several && flags & flag::MULTI_QUEUE == 0 {
            return say(&format!(
                "tap {shown} has one queue: open it with IFF_MULTI_QUEUE, or give one descriptor"
            ));
        }
        if !tap.name.is_empty() && tap.name != name {
            return say(&format!(
                "is a queue of {shown}, the one before it of {}: give queues of one tap",
                printable(&tap.name)
            ));
        }
        tap.name = name;
        tap.mtu = mtu;
        tap.queues.push(fd);
    }
    Ok(tap)
}

/// A descriptor of vhost-net for each of `queues` queue pairs.
///
/// # Errors
/// One line.
pub fn open_vhost_net(queues: usize) -> Result<Vec<OwnedFd>, String> {
    (0..queues)
        .map(|_| {
            File::options()
                .read(true)
                .write(true)
                .open(VHOST_NET)
                .map(OwnedFd::from)
                .map_err(|error| {
                    let remedy = match error.raw_os_error() {
                        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
                            "load the kernel module vhost_net, or choose backend=user"
                        }
                        _ => "give bulkhead's user access to it, or choose backend=user",
                    };
                    format!("{VHOST_NET}: {}; {remedy}", reason(&error))
                })
        })
        .collect()
}

#[cfg(test)]
mod tests;
