//! A trace instance of its own under tracefs (Documentation/trace/ftrace.rst): the events of one
//! process and of all that descend from it, and nothing of any other tracer's.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

const TRACING: &str = "/sys/kernel/tracing";
/// Each CPU's buffer. What does not fit is lost, and told.
const BUFFER_KIB: u32 = 64 * 1024;

/// Programs that run beside ours and make many calls.
const LOUD: [&str; 5] = ["qemu*", "rustc*", "cargo*", "busybox*", "ld*"];

/// Where a field lies in an event.
#[derive(Clone, Copy)]
pub struct Field(pub usize);

/// An event's number and its fields' places.
pub struct Event {
    /// What stands at the beginning of each record.
    pub id: u16,
    format: String,
}

impl Event {
    /// The place of a field.
    pub fn field(&self, name: &str) -> io::Result<Field> {
        let named = |line: &&str| {
            let declared = line.split(';').next().unwrap_or_default();
            declared
                .rsplit(' ')
                .next()
                .is_some_and(|last| last.split('[').next() == Some(name))
        };
        self.format
            .lines()
            .find(named)
            .and_then(|line| {
                line.split("offset:")
                    .nth(1)?
                    .split(';')
                    .next()?
                    .parse()
                    .ok()
            })
            .map(Field)
            .ok_or_else(|| io::Error::other(format!("no field {name} in an event")))
    }
}

/// The instance. It goes with this value.
pub struct Instance {
    path: PathBuf,
}

impl Instance {
    /// Makes it, with its events on for nobody yet.
    pub fn new() -> io::Result<Self> {
        if !Path::new(TRACING).join("instances").is_dir() {
            return Err(io::Error::other(format!(
                "no {TRACING}: mount -t tracefs tracefs {TRACING}"
            )));
        }
        let path = Path::new(TRACING).join(format!("instances/bulkhead-{}", std::process::id()));
        fs::create_dir(&path)?;
        let instance = Self { path };
        instance.set("trace_clock", "mono")?;
        instance.set("buffer_size_kb", &BUFFER_KIB.to_string())?;
        instance.set("options/event-fork", "1")?;
        let quiet: Vec<String> = LOUD.iter().map(|n| format!("!(comm ~ \"{n}\")")).collect();
        let quiet = quiet.join(" && ");
        for event in ["raw_syscalls/sys_enter", "raw_syscalls/sys_exit"] {
            instance.set(&format!("events/{event}/filter"), &quiet)?;
            instance.set(&format!("events/{event}/enable"), "1")?;
        }
        instance.set("events/task/task_newtask/enable", "1")?;
        instance.set(
            "events/signal/signal_generate/filter",
            "sig == 31 || sig == 9",
        )?;
        instance.set("events/signal/signal_generate/enable", "1")?;
        Ok(instance)
    }

    fn set(&self, file: &str, value: &str) -> io::Result<()> {
        let path = self.path.join(file);
        fs::write(&path, value)
            .map_err(|e| io::Error::other(format!("{value} > {}: {e}", path.display())))
    }

    /// The process whose events are taken, and those of all that it makes from now on.
    pub fn follow(&self, pid: u32) -> io::Result<()> {
        self.set("set_event_pid", &pid.to_string())
    }

    /// No more events.
    pub fn stop(&self) -> io::Result<()> {
        self.set("tracing_on", "0")
    }

    /// An event by the name of its directory.
    pub fn event(&self, name: &str) -> io::Result<Event> {
        let format = fs::read_to_string(self.path.join(format!("events/{name}/format")))?;
        let id = format
            .lines()
            .find_map(|line| line.strip_prefix("ID: ")?.parse().ok())
            .ok_or_else(|| io::Error::other(format!("events/{name}/format has no ID")))?;
        Ok(Event { id, format })
    }

    /// The buffer of each CPU.
    pub fn buffers(&self) -> io::Result<Vec<fs::File>> {
        use std::os::unix::fs::OpenOptionsExt;
        let mut files = Vec::new();
        for cpu in fs::read_dir(self.path.join("per_cpu"))? {
            let path = cpu?.path().join("trace_pipe_raw");
            let mut options = fs::OpenOptions::new();
            files.push(
                options
                    .read(true)
                    .custom_flags(libc::O_NONBLOCK)
                    .open(path)?,
            );
        }
        Ok(files)
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        // The buffers' files are closed before; who still reads them keeps the instance.
        let _ = self.stop();
        let _ = fs::remove_dir(&self.path);
    }
}

/// Waits until some instance follows this process.
pub fn wait_to_be_followed() -> io::Result<()> {
    let own = std::process::id().to_string();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while std::time::Instant::now() < deadline {
        for instance in fs::read_dir(Path::new(TRACING).join("instances"))? {
            let pids = fs::read_to_string(instance?.path().join("set_event_pid"));
            if pids.is_ok_and(|pids| pids.lines().any(|pid| pid == own)) {
                return Ok(());
            }
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    Err(io::Error::other("nobody traces this process"))
}
