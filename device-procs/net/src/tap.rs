//! The tap interface: attached by name or inherited, judged and prepared before confinement;
//! later only its offloads, its queues and its carrier are changed.
//!
//! One descriptor per queue pair. Settings of the whole interface go through the first one.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::Instant;

use bulkhead_runtime::sys;
use bulkhead_taps::Links;

use crate::tap_ioctl::{self as call, Ifreq};

/// Bytes of struct virtio_net_hdr_v1, which precedes each frame.
pub const HEADER: usize = 12;
/// Longest frame with its header: 64 KiB of segments to cut up, and an Ethernet header.
pub const MAX_FRAME: usize = 65550 + HEADER;

/// TUN_F_USO4 and TUN_F_USO6 (Linux 6.2).
const USO: u32 = libc::TUN_F_USO4 | libc::TUN_F_USO6;
const TSO: u32 = libc::TUN_F_TSO4 | libc::TUN_F_TSO6;

/// Why a tap cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// /dev/net/tun is not there.
    #[error("/dev/net/tun: {0}; load the module tun, and run as a user that may open it")]
    Open(io::Error),
    /// The interface refuses to be attached.
    #[error("tap {name}: {why}")]
    Attach {
        /// Its name.
        name: String,
        /// What is wrong, and the remedy.
        why: String,
    },
    /// An inherited descriptor is none, or no tap.
    #[error("fd {fd}: is not an attached tap: {source}")]
    Inherited {
        /// Its number.
        fd: RawFd,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The interface of an inherited descriptor is gone.
    #[error(
        "fd {fd}: the interface of its tap was removed from the host; make the tap anew, and take the device out and in again"
    )]
    Deleted {
        /// Its number.
        fd: RawFd,
    },
    /// A tap of the wrong mode.
    #[error("tap {name}: {why}")]
    Mode {
        /// Its name.
        name: String,
        /// What is missing.
        why: &'static str,
    },
    /// A setting that every kernel of this century has.
    #[error("tap {name}: {what}: {source}")]
    Setting {
        /// Its name.
        name: String,
        /// Which one.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// What is known of a queue; at the start nothing is, since a process before this one may have
/// detached it, or one beside it.
const UNKNOWN: u8 = 0;
const ATTACHED: u8 = 1;
const DETACHED: u8 = 2;

/// One queue of the tap.
#[derive(Debug)]
pub struct TapQueue {
    file: File,
    attached: AtomicU8,
}

impl TapQueue {
    /// Its descriptor.
    pub fn file(&self) -> &File {
        &self.file
    }
}

/// The interface and its queues, the first of which is never detached.
#[derive(Debug)]
pub struct Tap {
    name: String,
    queues: Vec<TapQueue>,
    /// What TUNSETOFFLOAD takes here.
    supported: u32,
    /// That the interface was deleted is told, or will be: once is enough.
    known_gone: AtomicBool,
}

fn not_attached(fd: RawFd, source: io::Error) -> TapError {
    match source.raw_os_error() {
        Some(libc::EBADFD) => TapError::Deleted { fd },
        _ => TapError::Inherited { fd, source },
    }
}

/// A name for an interface, as the kernel wants it.
pub fn interface_name(name: &str) -> Option<[u8; libc::IFNAMSIZ]> {
    let mut padded = [0; libc::IFNAMSIZ];
    let good = !name.is_empty()
        && name.len() < libc::IFNAMSIZ
        && !matches!(name, "." | "..")
        && name
            .bytes()
            .all(|b| b.is_ascii_graphic() && b != b'/' && b != b':' && b != b'%');
    for (to, from) in padded.iter_mut().zip(name.bytes()) {
        *to = from;
    }
    good.then_some(padded)
}

fn readable_name(ifreq: &Ifreq) -> String {
    let bytes: Vec<u8> = ifreq.name.iter().copied().take_while(|b| *b != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

impl Tap {
    /// Attaches to the interface of this name in this network namespace, or creates it, with
    /// one descriptor per queue pair. Somebody who is just ending is waited for. With `mtu`, the
    /// guest is to be told that: a tap that is made here gets it, another must have as much,
    /// since what is longer would be lost on the way to the guest.
    pub fn attach(name: &str, pairs: u16, mtu: Option<u16>) -> Result<Self, TapError> {
        let padded = interface_name(name).ok_or_else(|| TapError::Attach {
            name: name.into(),
            why: "no name of an interface: 1 to 15 visible characters without / : %".into(),
        })?;
        let failed = |why| TapError::Attach {
            name: name.into(),
            why,
        };
        let links = Links::open().map_err(|e| failed(format!("rtnetlink: {e}")))?;
        let until = Instant::now() + bulkhead_taps::PATIENCE;
        let made = matches!(links.look(name), Err(e) if e.raw_os_error() == Some(libc::ENODEV));
        let files = loop {
            match attach_alone(&links, name, padded, pairs) {
                Err(Refusal::Tap(e))
                    if matches!(e.raw_os_error(), Some(libc::EBUSY | libc::EBADF))
                        && Instant::now() < until =>
                {
                    std::thread::sleep(bulkhead_taps::PAUSE);
                }
                Err(Refusal::Tap(e)) => {
                    return Err(failed(attach_error(&links, name, &e, pairs)));
                }
                Err(Refusal::Driver(e)) => return Err(TapError::Open(e)),
                Ok(files) => break files,
            }
        };
        if let Some(mtu) = mtu {
            let setting = |source| TapError::Setting {
                name: name.into(),
                what: "SIOCSIFMTU",
                source,
            };
            if made {
                call::set_mtu(&links, padded, mtu).map_err(setting)?;
            }
            let has = links.look(name).map_err(setting)?.map_or(0, |tun| tun.mtu);
            if u32::from(mtu) > has {
                return Err(failed(format!(
                    "its MTU is {has}, {mtu} is asked for; run `ip link set {name} mtu {mtu}` first"
                )));
            }
        }
        Self::prepare(files)
    }

    /// Takes descriptors that the launcher has attached already. Once per number.
    pub fn inherit(fds: &[RawFd]) -> Result<Self, TapError> {
        let mut files = Vec::new();
        for fd in fds {
            let failed = |source| not_attached(*fd, source);
            let file = File::from(sys::take_inherited(*fd).map_err(failed)?);
            call::interface(&file).map_err(failed)?;
            files.push(file);
        }
        Self::prepare(files)
    }

    fn prepare(files: Vec<File>) -> Result<Self, TapError> {
        let (mut name, several) = (String::new(), files.len() > 1);
        for file in &files {
            let fd = file.as_raw_fd();
            let failed = |source| not_attached(fd, source);
            let ifreq = call::interface(file).map_err(failed)?;
            let flags = libc::c_int::from(ifreq.flags);
            let this = readable_name(&ifreq);
            let mode = |why| TapError::Mode {
                name: this.clone(),
                why,
            };
            if !name.is_empty() && name != this {
                return Err(mode("its queues belong to different interfaces"));
            }
            if flags & libc::IFF_TAP == 0 {
                return Err(mode("is a tun, not a tap; make it with mode tap"));
            }
            if flags & libc::IFF_NO_PI == 0 || flags & libc::IFF_VNET_HDR == 0 {
                return Err(mode("was opened without IFF_NO_PI and IFF_VNET_HDR"));
            }
            if several && flags & libc::IFF_MULTI_QUEUE == 0 {
                return Err(mode("has one queue; make it with multi_queue"));
            }
            name = this;
            let setting = |what| {
                let name = name.clone();
                move |source| TapError::Setting { name, what, source }
            };
            sys::set_nonblocking(std::os::fd::AsFd::as_fd(file)).map_err(setting("O_NONBLOCK"))?;
            let size = libc::c_int::try_from(HEADER).unwrap_or(0);
            call::set_header_size(file, size).map_err(setting("TUNSETVNETHDRSZ"))?;
            // Only needed where the host is big-endian; old kernels lack it.
            if let Err(e) = call::set_little_endian(file)
                && cfg!(target_endian = "big")
            {
                return Err(setting("TUNSETVNETLE")(e));
            }
        }
        let supported = files.first().map_or(0, probe);
        let queues = files.into_iter().map(|file| TapQueue {
            file,
            attached: AtomicU8::new(UNKNOWN),
        });
        let tap = Self {
            name,
            queues: queues.collect(),
            supported,
            known_gone: AtomicBool::new(false),
        };
        tap.set_offload(0);
        Ok(tap)
    }

    /// No tap at all.
    #[cfg(test)]
    pub(crate) fn none() -> Self {
        Self {
            name: String::new(),
            queues: Vec::new(),
            supported: libc::TUN_F_CSUM | TSO,
            known_gone: AtomicBool::new(false),
        }
    }

    /// Name of the interface.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The queue of a pair.
    pub fn queue(&self, pair: usize) -> Option<&TapQueue> {
        self.queues.get(pair)
    }

    /// Number of queues.
    pub fn queues(&self) -> usize {
        self.queues.len()
    }

    /// The TUN_F_ bits that this kernel takes.
    pub fn supported(&self) -> u32 {
        self.supported
    }

    /// Allows the kernel to hand over frames with these TUN_F_ bits unfinished; false if it
    /// does not take them.
    pub fn set_offload(&self, flags: u32) -> bool {
        let Some(first) = self.queues.first() else {
            return false;
        };
        match call::set_offload(&first.file, flags) {
            Ok(()) => true,
            // Told when a driver begins, before it misses a frame.
            Err(e) if e.raw_os_error() == Some(libc::EBADFD) => {
                if !self.known_gone.swap(true, Ordering::Relaxed) {
                    log::warn!(
                        "tap {}: its interface was removed from the host: the guest has no link; make it anew, and take the device out and in again, or start the machine anew",
                        self.name
                    );
                }
                false
            }
            Err(e) => {
                log::warn!("tap {}: TUNSETOFFLOAD {flags:#x}: {e}", self.name);
                false
            }
        }
    }

    /// Attaches or detaches the queue of a pair: what is detached gets no frames. The first
    /// pair's stays, and so does a tap's only one.
    pub fn set_attached(&self, pair: usize, attached: bool) {
        let Some(queue) = self.queues.get(pair).filter(|_| pair > 0) else {
            return;
        };
        let wanted = if attached { ATTACHED } else { DETACHED };
        if queue.attached.swap(wanted, Ordering::AcqRel) == wanted {
            return;
        }
        match call::set_queue(&queue.file, attached) {
            // It was so already: by a process before this one.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {}
            Err(_) if self.known_gone.load(Ordering::Relaxed) => {}
            Err(e) => {
                let what = if attached { "attach" } else { "detach" };
                log::warn!("tap {}: cannot {what} queue {pair}: {e}", self.name);
                queue.attached.store(UNKNOWN, Ordering::Release);
            }
            Ok(()) => {}
        }
    }

    /// Whether the interface was deleted. Asked by a write that is too short to hold a frame: it
    /// takes no lock of the host's, and needs no call that a worker does without.
    pub fn is_gone(&self) -> bool {
        let first = self.queues.first();
        let gone = first.is_some_and(|queue| call::write(&queue.file, &[0]) == -libc::EBADFD);
        // Who asks tells of it.
        if gone {
            self.known_gone.store(true, Ordering::Relaxed);
        }
        gone
    }

    /// Shows the host that the cable is in, or out. Where the kernel cannot (before 5.0),
    /// the host sees no difference.
    pub fn set_carrier(&self, on: bool) {
        if let Some(first) = self.queues.first()
            && let Err(e) = call::set_carrier(&first.file, on)
        {
            log::debug!("tap {}: TUNSETCARRIER: {e}", self.name);
        }
    }
}

/// What TUNSETOFFLOAD takes on this kernel, tried from much to little.
fn probe(file: &File) -> u32 {
    let mut known = 0;
    for flags in [
        libc::TUN_F_CSUM,
        TSO,
        libc::TUN_F_TSO_ECN,
        libc::TUN_F_UFO,
        USO,
    ] {
        if call::set_offload(file, known | flags).is_ok() {
            known |= flags;
        }
    }
    known
}

/// Why an attempt to attach failed.
enum Refusal {
    /// There is no tap driver.
    Driver(io::Error),
    /// This tap refuses; EBUSY: it is somebody else's.
    Tap(io::Error),
}

/// One attempt. Where the tap has several queues, `bulkhead_taps` says why it asks twice.
fn attach_alone(
    links: &Links,
    name: &str,
    padded: [u8; libc::IFNAMSIZ],
    pairs: u16,
) -> Result<Vec<File>, Refusal> {
    let known = || links.look(name).ok().flatten().and_then(|tun| tun.queues);
    let alone = |ours: u16| {
        if known().unwrap_or(0) > u32::from(ours) {
            return Err(Refusal::Tap(io::Error::from_raw_os_error(libc::EBUSY)));
        }
        Ok(())
    };
    alone(0)?;
    let mut files = Vec::new();
    for _ in 0..pairs {
        let file = call::open(c"/dev/net/tun").map_err(Refusal::Driver)?;
        let base = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        let several = base | libc::IFF_MULTI_QUEUE;
        let first = if pairs > 1 { several } else { base };
        let mut answer = call::set_interface(&file, &mut Ifreq::new(padded, first));
        // A tap that was made for several queues takes one, too, when asked in its words.
        if pairs == 1 && is(&answer, libc::EINVAL) {
            answer = call::set_interface(&file, &mut Ifreq::new(padded, several));
        }
        answer.map_err(Refusal::Tap)?;
        files.push(file);
    }
    alone(pairs)?;
    Ok(files)
}

fn is(answer: &io::Result<()>, errno: i32) -> bool {
    matches!(answer, Err(e) if e.raw_os_error() == Some(errno))
}

fn attach_error(links: &Links, name: &str, e: &io::Error, pairs: u16) -> String {
    let several = if pairs > 1 { " multi_queue" } else { "" };
    match e.raw_os_error() {
        Some(libc::EBUSY) => "is in use by another process; stop it, or choose another tap".into(),
        Some(libc::EPERM) => {
            format!(
                "may not be used by this user; make it with `ip tuntap add {name} mode tap{several} user USER`"
            )
        }
        Some(libc::EINVAL) => match links.look(name).ok().flatten() {
            Some(tun) if tun.tap && pairs > 1 => {
                format!("has one queue; make it with `ip tuntap add {name} mode tap multi_queue`")
            }
            _ => format!(
                "exists and is no tap; name one made with `ip tuntap add NAME mode tap{several}`, or a name that is free"
            ),
        },
        Some(libc::E2BIG) => {
            format!("has fewer than {pairs} queues free; ask for fewer, or stop who holds them")
        }
        _ => e.to_string(),
    }
}
