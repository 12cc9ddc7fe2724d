//! The options that describe a machine, shared by `bulkhead run` and `bulkhead ctl create`:
//! text in, [`MachineConfig`] out. Nothing is opened here.

use std::collections::BTreeSet;
use std::num::{IntErrorKind, ParseIntError};
use std::path::PathBuf;

use bulkhead_proto::machine::{CpuConfig, MachineConfig, SerialConfig, serial_config};

use super::config_file::ON_RESET;
use super::fs_args::{self, Fs};
use super::machine_base::Base;
use super::{console_args, disk_args, net_args, rng_args, vsock_args};

/// Most root ports on the bus.
const MAX_PORTS: usize = 31;
/// Most vCPUs a machine may have.
pub const MAX_CPUS: u32 = 64;

/// Options that describe a machine.
#[derive(clap::Args, Debug, Clone)]
pub struct MachineArgs {
    /// A TOML file that describes the machine, as `run --print-config` prints it; options
    /// add to its lists and replace its single values
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Kernel: an ELF vmlinux with a PVH note, or a bzImage
    #[arg(long, value_name = "FILE", required_unless_present = "config")]
    pub kernel: Option<String>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<String>,
    /// Kernel command line [default: console=ttyS0]
    #[arg(long, value_name = "TEXT")]
    pub cmdline: Option<String>,
    /// Guest memory, and as much as there may be later: numbers with K, M, G or T (powers of 1024)
    /// [default: 512M]
    #[arg(long, value_name = "[size=]SIZE[,max=SIZE]")]
    pub memory: Option<String>,
    /// vCPUs, as many as there may be later, and the host CPU of each in order:
    /// N[,max=M][,pin=A:B:…] [default: 1]
    #[arg(long, value_name = "N[,max=M][,pin=A:B]")]
    pub cpus: Option<String>,
    /// A disk, served by a confined process of its own: path=FILE[,KEY=VALUE]…; may be repeated
    ///
    ///   path=FILE              a file or a block device
    ///   readonly=on            the guest cannot write to it
    ///   id=NAME                its name in the API [default: disk0, disk1, …]
    ///   serial=TEXT            up to 20 bytes that the guest can ask for [default: the id]
    ///   queues=N               virtqueues [default: one for each vCPU]
    ///   format=raw|qcow2       never guessed [default: raw]
    ///   cache=none             past the host's page cache; flushes reach the disk [default]
    ///   cache=writeback        through the page cache; flushes reach the disk
    ///   cache=writethrough     every write is on the disk when it completes
    ///   cache=unsafe           flushes are ignored: a crash of the host loses data
    ///   backing=PATH[:PATH]…   qcow2: the files beneath it, top first, opened read-only
    ///   max-size=SIZE          it can never be grown beyond
    ///   bps=SIZE[:BURST]       bytes per second, and how many may be saved up
    ///   iops=N[:BURST]         operations per second, and how many may be saved up
    ///   cpu=PERCENT            its process: of one CPU's time; 150: one and a half CPUs
    ///   memory=SIZE            its process: memory, with guest memory that it touches first
    ///   pids=N                 its process: threads
    ///   io=rbps=SIZE:wbps=SIZE:riops=N:wiops=N   of the block device that the file lies on
    ///   lock=off               do not lock the file: who else writes it corrupts it
    /// A comma in a path is written twice.
    #[arg(long = "disk", value_name = "DISK", verbatim_doc_comment)]
    pub disks: Vec<String>,
    /// A network device: tap=NAME, fd=N, vhost-user=SOCKET or user[,KEY=VALUE]…; may be repeated
    ///
    ///   tap=NAME               on a tap interface of the host
    ///   fd=N[:N]…              on inherited tap descriptors, one for each queue pair
    ///   vhost-user=SOCKET      on a switch that listens there; with server=on, that connects
    ///   user                   on the host's own sockets, by passt
    ///   forward=[tcp:|udp:][ADDR:]HOST:GUEST   user: a port of the host; may be repeated
    ///   mac=MAC                [default: made from the host, the tap and the id]
    ///   queues=N               queue pairs [default: 1]
    ///   mtu=N                  [default: what the back-end has]
    ///   id=NAME                its name in the API [default: net0, net1, …]
    ///   backend=auto|user|vhost-net   who moves a tap's frames: bulkhead-net or the kernel
    ///   required=off           boot without it when its back-end cannot be had
    ///   rx-bps=, rx-pps=       SIZE[:BURST] and N[:BURST]: limits on what the guest receives
    ///   tx-bps=, tx-pps=       and on what it sends
    ///   cpu=PERCENT, memory=SIZE, pids=N   its process, as with --disk
    /// Here, too, two commas stand for one in a value: tap=a,,b is the tap "a,b".
    #[arg(long = "net", value_name = "NET", verbatim_doc_comment)]
    pub nets: Vec<String>,
    /// A device of somebody else's: socket=PATH,kind=NAME[,KEY=VALUE]…; may be repeated
    ///
    ///   socket=PATH            its vhost-user back-end; with server=on, bulkhead listens there
    ///   kind=fs|gpu|…          what it is; or device-id=N, its virtio device id
    ///   queues=N               [default: what every back-end of the kind has]
    ///   queue-size=N           [default: 256]
    ///   config=HEX             its configuration space, where the back-end serves none
    ///   tag=NAME               the same of kind=fs: what the guest mounts
    ///   required=off           boot without it when its back-end cannot be had
    ///   id=NAME                its name in the API
    /// A comma in a path is written twice.
    #[arg(long = "vhost-user", value_name = "DEVICE", verbatim_doc_comment)]
    pub vhost_users: Vec<String>,
    /// An entropy device: random bytes of the host's; may be repeated
    ///
    ///   id=NAME                its name in the API [default: rng0, rng1, …]
    ///   bps=SIZE[:BURST]       bytes per second, and how many may be saved up
    ///   cpu=PERCENT, memory=SIZE, pids=N   its process, as with --disk
    #[arg(
        long = "rng",
        value_name = "RNG",
        num_args = 0..=1,
        default_missing_value = "",
        verbatim_doc_comment
    )]
    pub rngs: Vec<String>,
    /// Sockets between host and guest: socket=PATH[,KEY=VALUE]…
    ///
    ///   socket=PATH            clients connect there, write "CONNECT port" and are joined to that
    ///                          port of the guest's
    ///   cid=N                  the guest's address [default: 3]
    ///   id=NAME                its name in the API [default: vsock]
    ///   cpu=PERCENT, memory=SIZE, pids=N   its process, as with --disk
    /// A comma in a path is written twice.
    #[arg(long, value_name = "VSOCK", verbatim_doc_comment)]
    pub vsock: Option<String>,
    /// Consoles and named channels of the guest's on unix sockets: socket=PATH[,KEY=VALUE]…; may be
    /// repeated
    ///
    ///   socket=PATH            one port, for one client at a time: a console (hvc0, …); may be
    ///                          repeated, each with what follows it
    ///   name=NAME              it is no console but the guest's /dev/virtio-ports/NAME
    ///   size=COLSxROWS         how large the console is
    ///   id=NAME                the device's name in the API [default: console0, console1, …]
    ///   cpu=PERCENT, memory=SIZE, pids=N   its process, as with --disk
    /// A comma in a path is written twice.
    #[arg(long = "console", value_name = "CONSOLE", verbatim_doc_comment)]
    pub consoles: Vec<String>,
    /// A directory of the host's: tag=NAME,source=DIR[,KEY=VALUE]…; may be repeated
    ///
    ///   tag=NAME               what the guest mounts: mount -t virtiofs NAME /mnt
    ///   source=DIR             the directory, by a virtiofsd that the launcher starts and confines
    ///   readonly=on            the guest changes nothing
    ///   cache=auto|always|metadata|never   what the guest keeps [default: auto]
    ///   xattr=on               with extended attributes
    ///   id=NAME                its name in the API [default: fs0, fs1, …]
    ///   cpu=PERCENT, memory=SIZE, pids=N   its process, as with --disk
    ///   socket=PATH            in the place of source=: --vhost-user kind=fs,socket=PATH for short
    /// A comma in a path is written twice.
    #[arg(long = "fs", value_name = "FS", verbatim_doc_comment)]
    pub fs: Vec<String>,
    /// Root ports that are empty at first, to add devices to a machine that runs: how many
    /// (hp1, hp2, …), or their names
    #[arg(long, value_name = "N|NAME[:NAME]…")]
    pub hotplug_ports: Option<String>,
    /// Where the guest's first serial port goes [default: stdio]
    #[arg(long, value_name = "stdio|none|file=PATH|socket=PATH")]
    pub serial: Option<String>,
    /// When the guest resets itself, or triple-faults: end the machine, or begin anew in place
    /// [default: end]
    #[arg(long, value_name = "end|restart")]
    pub on_reset: Option<String>,
}

impl MachineArgs {
    /// The configuration that these options describe, over that of `--config`.
    ///
    /// Relative paths of the command line are made absolute against the working directory, since
    /// whoever opens them may have another.
    ///
    /// # Errors
    /// One line that names the option, or the file and the key, and what it takes.
    pub fn to_config(&self) -> Result<MachineConfig, String> {
        let (mut config, base) = Base::read(self.config.as_deref())?;
        if let Some(kernel) = &self.kernel {
            config.kernel = absolute("--kernel", kernel)?;
        }
        if let Some(initrd) = &self.initrd {
            config.initrd = absolute("--initrd", initrd)?;
        }
        if let Some(cmdline) = &self.cmdline {
            config.cmdline.clone_from(cmdline);
        }
        if let Some(word) = &self.on_reset {
            let known = ON_RESET.iter().find(|(name, _)| name == word);
            let (_, on_reset) = known.ok_or_else(|| {
                format!(
                    "--on-reset {word}: give end (the machine ends) or restart (it begins anew)"
                )
            })?;
            config.on_reset = (*on_reset).into();
        }
        if let Some(memory) = &self.memory {
            (config.memory_bytes, config.memory_max_bytes) = parse_memory(memory)?;
        }
        if let Some(cpus) = &self.cpus {
            config.cpus = Some(parse_cpus(cpus)?).into();
        }
        if let Some(text) = &self.hotplug_ports {
            let devices = config.ports.iter().map(|port| port.name.clone());
            let taken: Vec<String> = devices.chain(config.hotplug_ports.clone()).collect();
            let more = parse_ports(text, &taken)?;
            config.hotplug_ports.extend(more);
        }
        let mut ids = base.ids.clone();
        for text in &self.disks {
            let disk = disk_args::parse_disk(text, config.disks.len())?;
            take_id(&mut ids, &format!("--disk {text}"), &disk.id)?;
            config.disks.push(disk);
        }
        for text in &self.nets {
            let net = net_args::parse_net(text, config.nets.len())?;
            take_id(&mut ids, &format!("--net {text}"), &net.id)?;
            config.nets.push(net);
        }
        for text in &self.vhost_users {
            let device = net_args::parse_vhost_user(text, config.vhost_users.len())?;
            take_id(&mut ids, &format!("--vhost-user {text}"), &device.id)?;
            config.vhost_users.push(device);
        }
        for text in &self.rngs {
            let rng = rng_args::parse_rng(text, config.rngs.len())?;
            take_id(&mut ids, &format!("--rng {text}"), &rng.id)?;
            config.rngs.push(rng);
        }
        if let Some(text) = &self.vsock {
            let vsock = vsock_args::parse_vsock(text)?;
            if let Some(replaced) = config.vsock.take() {
                ids.remove(&replaced.id);
            }
            take_id(&mut ids, &format!("--vsock {text}"), &vsock.id)?;
            config.vsock = Some(vsock).into();
        }
        for text in &self.consoles {
            let console = console_args::parse_console(text, config.consoles.len())?;
            take_id(&mut ids, &format!("--console {text}"), &console.id)?;
            config.consoles.push(console);
        }
        for text in &self.fs {
            let index = config.fs.len().saturating_add(config.vhost_users.len());
            let fs = fs_args::parse_fs(text, index)?;
            take_id(&mut ids, &format!("--fs {text}"), fs.id())?;
            match fs {
                Fs::Directory(fs) => config.fs.push(fs),
                Fs::Socket(device) => config.vhost_users.push(device),
            }
        }
        if let Some(serial) = &self.serial {
            config.serial = Some(parse_serial(serial)?).into();
        }
        // What no option shows by itself: queues and vCPUs, two devices on one tap.
        let checked = match config.kernel.as_str() {
            "" => Err("config.kernel is missing: give the path of a kernel".to_owned()),
            _ => crate::api::config::validate(&config),
        };
        checked.map_err(|why| base.refusal(self, &why))?;
        Ok(config)
    }
}

/// Names of root ports, or how many; then they have the first names that are free.
fn parse_ports(text: &str, taken: &[String]) -> Result<Vec<String>, String> {
    let wanted = || {
        format!(
            "--hotplug-ports {text}: give a number up to {MAX_PORTS}, or names with ':' between them: of up to 32 letters, digits, '-', '_' and '.'"
        )
    };
    if let Ok(count) = text.parse::<usize>() {
        return match count {
            0..=MAX_PORTS => {
                let names = (1_usize..).map(|n| format!("hp{n}"));
                Ok(names.filter(|n| !taken.contains(n)).take(count).collect())
            }
            _ => Err(wanted()),
        };
    }
    let names: Vec<String> = text.split(':').map(str::to_owned).collect();
    match names.iter().all(|name| check_id(name).is_ok()) {
        true if names.len() <= MAX_PORTS => Ok(names),
        _ => Err(wanted()),
    }
}

/// Each device has an id of its own.
fn take_id(ids: &mut BTreeSet<String>, option: &str, id: &str) -> Result<(), String> {
    if ids.insert(id.to_owned()) {
        return Ok(());
    }
    Err(format!(
        "{option}: the id {id} is taken by another device: give each its own id=NAME"
    ))
}

/// A path of the command line, made absolute.
///
/// # Errors
/// One line that names the option.
pub(super) fn absolute(option: &str, path: &str) -> Result<String, String> {
    if path.is_empty() {
        return Err(format!("{option}: the path is empty: name a file"));
    }
    let path = std::path::absolute(path).map_err(|e| format!("{option} {path}: {e}"))?;
    path.into_os_string()
        .into_string()
        .map_err(|p| format!("{option} {}: the path is not UTF-8: rename it", p.display()))
}

/// A byte count with an optional binary suffix.
///
/// # Errors
/// One line that says what is wanted.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let wanted = "give a number with K, M, G or T, such as 512M";
    let huge = || "that is too much: give less than 16777216T".to_string();
    let (digits, shift) = match text.char_indices().last() {
        Some((i, 'K' | 'k')) => (&text[..i], 10),
        Some((i, 'M' | 'm')) => (&text[..i], 20),
        Some((i, 'G' | 'g')) => (&text[..i], 30),
        Some((i, 'T' | 't')) => (&text[..i], 40),
        Some(_) => (text, 0),
        None => return Err(wanted.to_string()),
    };
    let number: u64 = digits.parse().map_err(|e: ParseIntError| match e.kind() {
        IntErrorKind::PosOverflow => huge(),
        _ => wanted.to_string(),
    })?;
    if number == 0 {
        return Err(wanted.to_string());
    }
    number.checked_mul(1 << shift).ok_or_else(huge)
}

/// Splits an option at its commas; two commas stand for one that belongs to a value.
pub(super) fn split_option(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' && chars.next_if_eq(&',').is_none() {
            parts.push(String::new());
        } else if let Some(last) = parts.last_mut() {
            last.push(c);
        }
    }
    parts
}

/// What there is from the start, and what there may be; 0: no more.
fn parse_memory(text: &str) -> Result<(u64, u64), String> {
    let bad = |why: String| format!("--memory {text}: {why}");
    let mut parts = text.split(',');
    let first = parts.next().unwrap_or_default();
    let first = first.strip_prefix("size=").unwrap_or(first);
    let size = parse_size(first).map_err(bad)?;
    let mut max = 0;
    let mut keys = Keys::default();
    for part in parts {
        let Some(value) = part.strip_prefix("max=") else {
            return Err(bad(format!(
                "{part:?} is unknown: only max=SIZE may follow the size"
            )));
        };
        keys.once(&format!("--memory {text}"), "max")?;
        max = parse_size(value).map_err(bad)?;
        if max <= size {
            return Err(bad("give a max= that is more than the size".to_owned()));
        }
    }
    Ok((size, max))
}

fn parse_cpus(text: &str) -> Result<CpuConfig, String> {
    let mut cpus = CpuConfig::new();
    let mut parts = text.split(',');
    let count = parts.next().unwrap_or_default();
    let count = count.strip_prefix("boot=").unwrap_or(count);
    cpus.boot = count
        .parse()
        .ok()
        .filter(|n| (1..=MAX_CPUS).contains(n))
        .ok_or_else(|| format!("--cpus {text}: give a number from 1 to {MAX_CPUS}"))?;
    let mut keys = Keys::default();
    for part in parts {
        if let Some(max) = part.strip_prefix("max=") {
            keys.once(&format!("--cpus {text}"), "max")?;
            cpus.max = max
                .parse()
                .ok()
                .filter(|max| (cpus.boot..=MAX_CPUS).contains(max))
                .ok_or_else(|| {
                    format!("--cpus {text}: max={max}: give {} to {MAX_CPUS}", cpus.boot)
                })?;
            continue;
        }
        let Some(list) = part.strip_prefix("pin=") else {
            return Err(format!(
                "--cpus {text}: {part:?} is unknown: only max=M and pin=A:B:… may follow the number"
            ));
        };
        keys.once(&format!("--cpus {text}"), "pin")?;
        for cpu in list.split(':') {
            cpus.pin.push(cpu.parse().map_err(|_| {
                format!("--cpus {text}: {cpu:?} is no host CPU number: give pin=A:B, one per vCPU")
            })?);
        }
    }
    let all = cpus.max.max(cpus.boot);
    if !cpus.pin.is_empty() && cpus.pin.len() != all as usize {
        return Err(format!(
            "--cpus {text}: {all} vCPUs but {} host CPUs in pin=: give one per vCPU",
            cpus.pin.len()
        ));
    }
    Ok(cpus)
}

/// The keys of one option's list, each of which may stand there once.
#[derive(Default)]
pub(super) struct Keys<'a>(Vec<&'a str>);

impl<'a> Keys<'a> {
    /// Notes a key.
    pub(super) fn once(&mut self, option: &str, key: &'a str) -> Result<(), String> {
        if self.0.contains(&key) {
            return Err(format!("{option}: {key}= is given twice: give it once"));
        }
        self.0.push(key);
        Ok(())
    }
}

/// Reads `on` or `off`.
pub(super) fn parse_switch(option: &str, key: &str, value: &str) -> Result<bool, String> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("{option}: {key}={value}: give on or off")),
    }
}

/// What a device id may look like: it appears in log lines, host names and paths.
///
/// # Errors
/// One line that says what is allowed.
pub fn check_id(id: &str) -> Result<(), String> {
    let fits = !id.is_empty()
        && id.len() <= 32
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
        && !id.starts_with(['-', '.']);
    if fits {
        Ok(())
    } else {
        Err(
            "use 1 to 32 letters, digits, '-', '_' and '.', starting with none of the last but '_'"
                .to_string(),
        )
    }
}

fn parse_serial(text: &str) -> Result<SerialConfig, String> {
    use serial_config::Mode;
    let mut serial = SerialConfig::new();
    let (mode, path) = match text.split_once('=') {
        None if text == "stdio" => (Mode::STDIO, None),
        None if text == "none" => (Mode::NONE, None),
        Some(("file", path)) => (Mode::FILE, Some(path)),
        Some(("socket", path)) => (Mode::SOCKET, Some(path)),
        _ => {
            return Err(format!(
                "--serial {text}: give stdio, none, file=PATH or socket=PATH"
            ));
        }
    };
    serial.mode = mode.into();
    if let Some(path) = path {
        serial.path = absolute(&format!("--serial {text}"), path)?;
    }
    Ok(serial)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_binary_suffixes_and_bounds() {
        assert_eq!(parse_size("512M"), Ok(512 << 20));
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("2g"), Ok(2 << 30));
        for bad in ["", "M", "0", "-1", "1.5G", "99999999T", "12Q", "é"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn memory_may_have_a_maximum() {
        let gib = 1 << 30;
        assert_eq!(parse_memory("512M"), Ok((gib / 2, 0)));
        assert_eq!(parse_memory("size=512M,max=4G"), Ok((gib / 2, 4 * gib)));
        assert_eq!(parse_memory("1G,max=2G"), Ok((gib, 2 * gib)));
        for bad in [
            "",
            "max=1G",
            "1G,max=1G",
            "1G,max=x",
            "1G,min=2G",
            "1G,max=2G,max=3G",
        ] {
            let line = parse_memory(bad).unwrap_err();
            assert!(line.starts_with("--memory"), "{line}");
        }
    }

    #[test]
    fn cpus_take_a_pin_each() {
        assert_eq!(parse_cpus("2,pin=0:1").unwrap().pin, [0, 1]);
        assert_eq!(parse_cpus("boot=3").unwrap().boot, 3);
        assert_eq!(parse_cpus("1,max=2").unwrap().max, 2);
        assert_eq!(parse_cpus("boot=1,pin=0:1,max=2").unwrap().pin, [0, 1]);
        for bad in [
            "0",
            "65",
            "two",
            "2,pin=0",
            "1,pin=x",
            "2,max=1",
            "1,max=65",
            "1,max=",
            "1,max=2,pin=0",
            "1,max=2,max=3",
            "",
        ] {
            assert!(parse_cpus(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_no_option_shows_by_itself_is_refused_by_the_options_name() {
        let refused = |nets: &[&str]| {
            let args = MachineArgs {
                config: None,
                kernel: Some("/k".into()),
                initrd: None,
                cmdline: None,
                memory: Some("128M".into()),
                cpus: Some("2".into()),
                disks: Vec::new(),
                nets: nets.iter().map(|net| (*net).to_owned()).collect(),
                vhost_users: Vec::new(),
                rngs: Vec::new(),
                fs: Vec::new(),
                vsock: None,
                consoles: Vec::new(),
                hotplug_ports: None,
                serial: None,
                on_reset: None,
            };
            args.to_config().unwrap_err()
        };
        let line = refused(&["user", "tap=a,queues=3"]);
        assert!(
            line.starts_with("--net tap=a,queues=3: queues is 3: give at most 2"),
            "{line}"
        );
        let line = refused(&["tap=a", "tap=a,id=b"]);
        assert!(
            line.starts_with("--net tap=a,id=b: tap.name: a is another device's tap"),
            "{line}"
        );
        let line = refused(&["fd=5", "fd=5"]);
        assert!(line.starts_with("--net fd=5: "), "{line}");
        assert!(!line.contains("config"), "{line}");
    }

    #[test]
    fn ports_are_counted_or_named() {
        let parse_ports = |text| parse_ports(text, &["hp2".to_owned()]);
        assert_eq!(parse_ports("2").unwrap(), ["hp1", "hp3"]);
        assert_eq!(parse_ports("a:b").unwrap(), ["a", "b"]);
        for bad in ["32", "a::b", "../x", ""] {
            assert!(parse_ports(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn serial_goes_to_one_of_four_places() {
        for good in ["stdio", "none", "file=/x", "socket=/x"] {
            assert!(parse_serial(good).is_ok(), "{good}");
        }
        for bad in ["", "tty", "file", "file=", "pty=/x"] {
            assert!(parse_serial(bad).is_err(), "{bad}");
        }
    }
}
