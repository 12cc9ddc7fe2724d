//! A memory fault in a running process: what a bug would do. A signal sent by kill(2) would not do:
//! a device process is the first of its pid namespace, which ignores those that it has no handler for.

use std::fs;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use crate::vmm::patience;

/// `xor eax, eax; mov eax, [rax]`.
const READ_OF_NULL: [u8; 4] = [0x31, 0xc0, 0x8b, 0x00];

/// Makes the main thread of a process read address zero when it returns from the system call that
/// it waits in.
///
/// # Errors
/// It is gone, waits in no call, or its memory cannot be written.
pub fn fault(pid: i64) -> Result<(), String> {
    let end = Instant::now() + patience(Duration::from_secs(60));
    let place = loop {
        let file = format!("/proc/{pid}/syscall");
        let text = fs::read_to_string(&file).map_err(|e| format!("{file}: {e}"))?;
        // The call's number, six arguments, the stack pointer and where it returns to; or "running".
        let words: Vec<&str> = text.split_whitespace().collect();
        if let [_, _, _, _, _, _, _, _, place] = words.as_slice() {
            let place = u64::from_str_radix(place.trim_start_matches("0x"), 16);
            break place.map_err(|e| format!("{text}: {e}"))?;
        }
        if Instant::now() > end {
            return Err(format!("{pid} waits in no call: {text}"));
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let file = format!("/proc/{pid}/mem");
    let memory = fs::OpenOptions::new().write(true).open(&file);
    memory
        .and_then(|memory| memory.write_all_at(&READ_OF_NULL, place))
        .map_err(|e| format!("{file}: {e}"))
}
