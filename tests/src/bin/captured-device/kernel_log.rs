//! At which call the kernel killed a process by its filter, as its log says (audit records of type
//! 1326). Programs are told apart by their paths, so that each process of interest has one of its own.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use bulkhead_seccomp::policy::syscall_name;

/// Of what the log says of x86-64's calls.
const NATIVE: &str = "c000003e";
/// Writes of records are held back in a burst, unless this is 0.
const RATE: &str = "/proc/sys/kernel/printk_ratelimit";
const LOGGED: &str = "/proc/sys/kernel/seccomp/actions_logged";
/// The kernel's thread that writes records may be late.
const LATE: Duration = Duration::from_secs(10);

/// The log from now on.
pub struct KernelLog {
    inner: Mutex<Inner>,
    rate: String,
}

struct Inner {
    log: File,
    /// Calls by the path of the program.
    calls: BTreeMap<String, String>,
}

impl KernelLog {
    /// The log of this host.
    ///
    /// # Errors
    /// Why it does not name calls.
    pub fn open() -> Result<Self, String> {
        let read = |path: &str| std::fs::read_to_string(path).map_err(|e| format!("{path}: {e}"));
        if !read(LOGGED)?.contains("kill_process") {
            return Err(format!("{LOGGED} lacks kill_process"));
        }
        if auditor() {
            return Err("auditd takes the records".into());
        }
        let mut options = File::options();
        options.read(true).custom_flags(libc::O_NONBLOCK);
        let path = "/dev/kmsg";
        let mut log = options.open(path).map_err(|e| format!("{path}: {e}"))?;
        log.seek(SeekFrom::End(0))
            .map_err(|e| format!("{path}: {e}"))?;
        let rate = read(RATE)?.trim().to_owned();
        std::fs::write(RATE, "0").map_err(|e| format!("{RATE}: {e}"))?;
        let calls = BTreeMap::new();
        Ok(Self {
            inner: Mutex::new(Inner { log, calls }),
            rate,
        })
    }

    /// The call at which a process of that program was killed, once the log says so.
    pub fn call(&self, program: &str) -> Option<String> {
        let end = Instant::now() + LATE;
        loop {
            if let Ok(mut inner) = self.inner.lock() {
                inner.take_in();
                if let Some(call) = inner.calls.get(program) {
                    return Some(call.clone());
                }
            }
            if Instant::now() > end {
                return None;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for KernelLog {
    fn drop(&mut self) {
        let _ = std::fs::write(RATE, &self.rate);
    }
}

impl Inner {
    fn take_in(&mut self) {
        let mut record = vec![0; 8192];
        loop {
            match self.log.read(&mut record) {
                Ok(len) => {
                    let text = String::from_utf8_lossy(record.get(..len).unwrap_or_default());
                    self.calls.extend(killed(&text));
                }
                // Records were overwritten before they were read: the next read goes on behind them.
                Err(e) if e.kind() == ErrorKind::BrokenPipe => {}
                Err(_) => return,
            }
        }
    }
}

/// The program and its call, if the record is of a process that a filter killed.
fn killed(record: &str) -> Option<(String, String)> {
    let (_, fields) = record.split_once("type=1326 ")?;
    let line = fields.lines().next()?;
    let field = |name: &str| {
        let mut all = line.split(' ');
        all.find_map(|field| field.strip_prefix(name)?.strip_prefix('='))
    };
    if field("sig") != Some("31") {
        return None;
    }
    let program = field("exe")?.trim_matches('"').to_owned();
    let (arch, number) = (field("arch")?, field("syscall")?);
    let name = match number.parse() {
        Ok(number) if arch == NATIVE => syscall_name(number),
        _ => None,
    };
    let call = name.map_or_else(
        || format!("{number} of architecture 0x{arch}"),
        str::to_owned,
    );
    Some((program, call))
}

/// Whether a process here has the kernel send it the records.
fn auditor() -> bool {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut names = processes.map(|process| process.path().join("comm"));
    names.any(|path| std::fs::read_to_string(path).is_ok_and(|name| name.trim() == "auditd"))
}

#[cfg(test)]
mod tests {
    use super::killed;

    #[test]
    fn a_record_names_program_and_call() {
        let record = |sig: u32, arch: &str, syscall: u32| {
            format!(
                "5,1,2,-;audit: type=1326 audit(1.2:3): auid=0 uid=0 gid=0 ses=1 subj=unconfined pid=7 \
                 comm=\"queue-0\" exe=\"/tmp/a/b\" sig={sig} arch={arch} syscall={syscall} compat=0 \
                 ip=0x1 code=0x80000000\n SUBSYSTEM=x\n"
            )
        };
        let told = |call: &str| Some(("/tmp/a/b".to_owned(), call.to_owned()));
        assert_eq!(killed(&record(31, "c000003e", 41)), told("socket"));
        assert_eq!(
            killed(&record(31, "40000003", 20)),
            told("20 of architecture 0x40000003")
        );
        assert_eq!(
            killed(&record(31, "c000003e", 0x4000_0000)),
            told("1073741824 of architecture 0xc000003e")
        );
        assert_eq!(killed(&record(0, "c000003e", 41)), None);
        assert_eq!(killed("6,1,2,-;eth0: link up\n"), None);
    }
}
