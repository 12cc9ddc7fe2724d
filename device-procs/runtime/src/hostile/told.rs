//! What a hostile program is told of the VM that it is to attack, and on which thread: a device
//! process has no environment and no file to read it from, so the test writes it into a copy of the
//! program, behind a mark, before that is started.

use std::ffi::CString;

/// Bytes of it, at most. `tests/src/bin/captured-device/told.rs` knows the number, and the mark.
const ROOM: usize = 1000;

/// The mark, and `NAME=VALUE` lines.
#[repr(C)]
struct Block {
    mark: [u8; 24],
    text: [u8; ROOM],
}

#[used]
static BLOCK: Block = Block {
    mark: *b"BULKHEAD-HOSTILE-IS-TOLD",
    text: [b' '; ROOM],
};

/// What it says.
pub(super) struct Told {
    /// The worker of the first queue makes the attempt, and not the main thread.
    pub(super) worker: bool,
    /// The API socket of another VM.
    pub(super) socket: CString,
    /// The cgroup of its device process.
    pub(super) cgroup: String,
    /// Its VMM's, its launcher's and its device's processes.
    pub(super) pids: [libc::c_long; 3],
    /// The channel for asking the launcher for connections, if this process has one.
    pub(super) dial: Option<i32>,
}

/// Reads it, and what the arguments say beside it.
pub(super) fn read() -> Told {
    // SAFETY: it reads a static of initialised bytes; volatile, since what the compiler saw there
    // is not what the test wrote.
    let bytes = unsafe { std::ptr::read_volatile(&raw const BLOCK.text) };
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let value = |name: &str| {
        text.lines()
            .filter_map(|line| line.split_once('='))
            .find(|(named, _)| *named == name)
            .map(|(_, value)| value.to_owned())
    };
    let socket = value("socket").unwrap_or_else(|| "/run/bulkhead/api.sock".into());
    let pid = |name: &str| value(name).and_then(|pid| pid.parse().ok()).unwrap_or(1);
    Told {
        worker: value("thread").as_deref() == Some("worker"),
        socket: CString::new(socket).unwrap_or_default(),
        cgroup: value("cgroup").unwrap_or_else(|| "/sys/fs/cgroup".into()),
        pids: [pid("vmm"), pid("launcher"), pid("device")],
        dial: dial(),
    }
}

/// `--dial-fd N`
fn dial() -> Option<i32> {
    let mut arguments = std::env::args().skip_while(|argument| argument != "--dial-fd");
    arguments.nth(1)?.parse().ok()
}

impl Told {
    /// A path below the other VM's cgroup, kept for good.
    pub(super) fn in_cgroup(&self, name: &str) -> libc::c_long {
        super::kept(format!("{}/{name}\0", self.cgroup).into_bytes())
    }

    /// `struct sockaddr_un` of the other VM's API socket, kept for good, and its length.
    pub(super) fn address(&self) -> (libc::c_long, libc::c_long) {
        let mut bytes = libc::sa_family_t::try_from(libc::AF_UNIX)
            .unwrap_or_default()
            .to_ne_bytes()
            .to_vec();
        bytes.extend_from_slice(self.socket.as_bytes_with_nul());
        let len = libc::c_long::try_from(bytes.len()).unwrap_or_default();
        (super::kept(bytes), len)
    }
}
