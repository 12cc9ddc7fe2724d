//! What a configuration file may hold: the one description of `bulkhead.v1.MachineConfig` by which
//! [`read`](super::read) reads it and [`write`](super::write) prints it. The keys are the names of
//! the message's fields, but that a list of tables has the name of one of them (`[[disk]]`), and
//! that `memory_bytes` and `memory_max_bytes` are `size` and `max` of `[memory]`.

use bulkhead_proto::common::{DiskLimits, IoLimits, NetLimits, Resources, TokenBucket};
use bulkhead_proto::machine::{
    ConsoleConfig, ConsolePort, CpuConfig, DiskConfig, FsConfig, MachineConfig, NetConfig,
    RngConfig, RootPort, SerialConfig, TapBackend, UserBackend, VhostUserBackend, VhostUserConfig,
    VsockConfig,
    disk_config::{Cache, Format},
    fs_config::Cache as FsCache,
    machine_config::OnReset,
    net_config::Backend,
    serial_config::Mode,
    tap_backend::Datapath,
    user_backend::{Forward, forward::Protocol},
};
use bulkhead_proto::protobuf::{Enum, EnumOrUnknown, MessageField};

/// What is wrong with a file.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Fault {
    /// From 1 on; 0: of no line.
    pub(super) line: usize,
    /// The key, and what to do.
    pub(super) text: String,
}

pub(super) type Step = Result<(), Fault>;

/// One table, to read into a message or to print it from. A key that is absent leaves its field as
/// it is; a field that has no value is not printed.
pub(super) trait Fields: Sized {
    /// Print the next one whatever it is.
    fn always(&mut self) -> &mut Self;
    /// The table itself is wrong.
    fn fault(&self, what: &str) -> Fault;
    fn text(&mut self, key: &'static str, value: &mut String) -> Step;
    fn texts(&mut self, key: &'static str, values: &mut Vec<String>) -> Step;
    fn flag(&mut self, key: &'static str, value: &mut bool) -> Step;
    fn number(&mut self, key: &'static str, value: &mut u32) -> Step;
    fn numbers<N: Number>(&mut self, key: &'static str, values: &mut Vec<N>) -> Step;
    fn count(&mut self, key: &'static str, value: &mut u64) -> Step;
    /// Bytes: a number, or a text such as "512M".
    fn size(&mut self, key: &'static str, value: &mut u64) -> Step;
    /// A text of hexadecimal digits; printed with the separator between two bytes.
    fn hex(&mut self, key: &'static str, value: &mut Vec<u8>, separator: &str) -> Step;
    fn choice<E: Enum>(
        &mut self,
        key: &'static str,
        value: &mut EnumOrUnknown<E>,
        names: &[(&'static str, E)],
    ) -> Step;
    /// A table that there always is.
    fn section<M>(
        &mut self,
        key: &'static str,
        value: &mut M,
        of: fn(&mut Self, &mut M) -> Step,
    ) -> Step;
    fn table<M: Default>(
        &mut self,
        key: &'static str,
        value: &mut MessageField<M>,
        of: fn(&mut Self, &mut M) -> Step,
    ) -> Step;
    fn tables<M: Default>(
        &mut self,
        key: &'static str,
        values: &mut Vec<M>,
        of: fn(&mut Self, &mut M) -> Step,
    ) -> Step;
}

/// Whole numbers of a list.
pub(super) trait Number: Copy + std::fmt::Display {
    const RANGE: &'static str;
    fn from_wide(wide: i128) -> Option<Self>;
}

impl Number for u32 {
    const RANGE: &'static str = "0 to 4294967295";
    fn from_wide(wide: i128) -> Option<Self> {
        wide.try_into().ok()
    }
}

impl Number for i32 {
    const RANGE: &'static str = "0 to 2147483647";
    fn from_wide(wide: i128) -> Option<Self> {
        wide.try_into().ok().filter(|number| *number >= 0)
    }
}

pub(in crate::cli) const ON_RESET: [(&str, OnReset); 2] =
    [("end", OnReset::END), ("restart", OnReset::RESTART)];
const FORMATS: [(&str, Format); 2] = [("raw", Format::RAW), ("qcow2", Format::QCOW2)];
const CACHES: [(&str, Cache); 4] = [
    ("none", Cache::CACHE_NONE),
    ("writeback", Cache::WRITEBACK),
    ("writethrough", Cache::WRITETHROUGH),
    ("unsafe", Cache::UNSAFE),
];
const FS_CACHES: [(&str, FsCache); 4] = [
    ("auto", FsCache::CACHE_AUTO),
    ("always", FsCache::CACHE_ALWAYS),
    ("metadata", FsCache::CACHE_METADATA),
    ("never", FsCache::CACHE_NEVER),
];
const DATAPATHS: [(&str, Datapath); 3] = [
    ("auto", Datapath::AUTO),
    ("user", Datapath::USER),
    ("vhost_net", Datapath::VHOST_NET),
];
const PROTOCOLS: [(&str, Protocol); 2] = [("tcp", Protocol::TCP), ("udp", Protocol::UDP)];
const MODES: [(&str, Mode); 4] = [
    ("none", Mode::NONE),
    ("stdio", Mode::STDIO),
    ("file", Mode::FILE),
    ("socket", Mode::SOCKET),
];

pub(super) fn machine<F: Fields>(f: &mut F, machine: &mut MachineConfig) -> Step {
    f.text("kernel", &mut machine.kernel)?;
    f.text("initrd", &mut machine.initrd)?;
    f.always().text("cmdline", &mut machine.cmdline)?;
    f.choice("on_reset", &mut machine.on_reset, &ON_RESET)?;
    f.texts("hotplug_ports", &mut machine.hotplug_ports)?;
    f.section("memory", machine, memory)?;
    f.section("cpus", machine.cpus.mut_or_insert_default(), cpus)?;
    f.section("serial", machine.serial.mut_or_insert_default(), serial)?;
    f.tables("disk", &mut machine.disks, disk)?;
    f.tables("net", &mut machine.nets, net)?;
    f.tables("vhost_user", &mut machine.vhost_users, vhost_user)?;
    f.tables("rng", &mut machine.rngs, rng)?;
    f.table("vsock", &mut machine.vsock, vsock)?;
    f.tables("console", &mut machine.consoles, console)?;
    f.tables("fs", &mut machine.fs, fs)?;
    f.tables("port", &mut machine.ports, root_port)
}

fn memory<F: Fields>(f: &mut F, machine: &mut MachineConfig) -> Step {
    f.always().size("size", &mut machine.memory_bytes)?;
    f.size("max", &mut machine.memory_max_bytes)
}

fn cpus<F: Fields>(f: &mut F, cpus: &mut CpuConfig) -> Step {
    f.always().number("boot", &mut cpus.boot)?;
    f.number("max", &mut cpus.max)?;
    f.numbers("pin", &mut cpus.pin)
}

fn serial<F: Fields>(f: &mut F, serial: &mut SerialConfig) -> Step {
    f.always().choice("mode", &mut serial.mode, &MODES)?;
    f.text("path", &mut serial.path)
}

fn disk<F: Fields>(f: &mut F, disk: &mut DiskConfig) -> Step {
    f.text("id", &mut disk.id)?;
    f.text("path", &mut disk.path)?;
    f.flag("readonly", &mut disk.readonly)?;
    f.text("serial", &mut disk.serial)?;
    f.number("queues", &mut disk.queues)?;
    f.choice("format", &mut disk.format, &FORMATS)?;
    f.choice("cache", &mut disk.cache, &CACHES)?;
    f.flag("unlocked", &mut disk.unlocked)?;
    f.texts("backing_paths", &mut disk.backing_paths)?;
    f.size("max_size", &mut disk.max_size)?;
    f.table("limits", &mut disk.limits, disk_limits)?;
    f.table("resources", &mut disk.resources, resources)
}

fn disk_limits<F: Fields>(f: &mut F, limits: &mut DiskLimits) -> Step {
    f.table("bytes", &mut limits.bytes, bucket_of_bytes)?;
    f.table("operations", &mut limits.operations, bucket)
}

fn net_limits<F: Fields>(f: &mut F, limits: &mut NetLimits) -> Step {
    f.table("bytes", &mut limits.bytes, bucket_of_bytes)?;
    f.table("packets", &mut limits.packets, bucket)
}

fn bucket<F: Fields>(f: &mut F, bucket: &mut TokenBucket) -> Step {
    f.count("per_second", &mut bucket.per_second)?;
    f.count("burst", &mut bucket.burst)
}

fn bucket_of_bytes<F: Fields>(f: &mut F, bucket: &mut TokenBucket) -> Step {
    f.size("per_second", &mut bucket.per_second)?;
    f.size("burst", &mut bucket.burst)
}

fn resources<F: Fields>(f: &mut F, resources: &mut Resources) -> Step {
    f.number("cpu_percent", &mut resources.cpu_percent)?;
    f.size("memory_bytes", &mut resources.memory_bytes)?;
    f.number("pids", &mut resources.pids)?;
    f.table("io", &mut resources.io, io)
}

fn io<F: Fields>(f: &mut F, io: &mut IoLimits) -> Step {
    f.size("read_bps", &mut io.read_bps)?;
    f.size("write_bps", &mut io.write_bps)?;
    f.count("read_iops", &mut io.read_iops)?;
    f.count("write_iops", &mut io.write_iops)
}

fn net<F: Fields>(f: &mut F, net: &mut NetConfig) -> Step {
    f.text("id", &mut net.id)?;
    f.hex("mac", &mut net.mac, ":")?;
    f.number("queues", &mut net.queues)?;
    f.number("mtu", &mut net.mtu)?;
    f.flag("optional", &mut net.optional)?;
    let (mut tap, mut switch, mut user) = Default::default();
    match net.backend.take() {
        Some(Backend::Tap(it)) => tap = MessageField::some(it),
        Some(Backend::VhostUser(it)) => switch = MessageField::some(it),
        Some(Backend::User(it)) => user = MessageField::some(it),
        // One that is not known here is not validated either.
        _ => {}
    }
    f.table("tap", &mut tap, tap_backend)?;
    f.table("vhost_user", &mut switch, vhost_user_backend)?;
    f.table("user", &mut user, user_backend)?;
    let mut given = [
        tap.take().map(Backend::Tap),
        switch.take().map(Backend::VhostUser),
        user.take().map(Backend::User),
    ]
    .into_iter()
    .flatten();
    net.backend = given.next();
    if given.next().is_some() {
        return Err(f.fault("has more than one of tap, vhost_user and user: give one of them"));
    }
    f.table("to_guest", &mut net.to_guest, net_limits)?;
    f.table("from_guest", &mut net.from_guest, net_limits)?;
    f.table("resources", &mut net.resources, resources)
}

fn tap_backend<F: Fields>(f: &mut F, tap: &mut TapBackend) -> Step {
    f.text("name", &mut tap.name)?;
    f.numbers("fds", &mut tap.fds)?;
    f.choice("datapath", &mut tap.datapath, &DATAPATHS)
}

fn vhost_user_backend<F: Fields>(f: &mut F, switch: &mut VhostUserBackend) -> Step {
    f.text("socket", &mut switch.socket)?;
    f.flag("server", &mut switch.server)
}

fn user_backend<F: Fields>(f: &mut F, user: &mut UserBackend) -> Step {
    f.tables("forward", &mut user.forwards, forward)
}

fn forward<F: Fields>(f: &mut F, forward: &mut Forward) -> Step {
    f.choice("protocol", &mut forward.protocol, &PROTOCOLS)?;
    f.text("address", &mut forward.address)?;
    f.number("host_port", &mut forward.host_port)?;
    f.number("guest_port", &mut forward.guest_port)
}

fn vhost_user<F: Fields>(f: &mut F, device: &mut VhostUserConfig) -> Step {
    f.text("id", &mut device.id)?;
    f.text("socket", &mut device.socket)?;
    f.flag("server", &mut device.server)?;
    f.number("device_id", &mut device.device_id)?;
    f.number("queues", &mut device.queues)?;
    f.number("queue_size", &mut device.queue_size)?;
    f.hex("config", &mut device.config, "")?;
    f.flag("optional", &mut device.optional)
}

fn rng<F: Fields>(f: &mut F, rng: &mut RngConfig) -> Step {
    f.text("id", &mut rng.id)?;
    f.table("bytes", &mut rng.bytes, bucket_of_bytes)?;
    f.table("resources", &mut rng.resources, resources)
}

fn vsock<F: Fields>(f: &mut F, vsock: &mut VsockConfig) -> Step {
    f.text("id", &mut vsock.id)?;
    f.text("socket", &mut vsock.socket)?;
    f.number("cid", &mut vsock.cid)?;
    f.table("resources", &mut vsock.resources, resources)
}

fn console<F: Fields>(f: &mut F, console: &mut ConsoleConfig) -> Step {
    f.text("id", &mut console.id)?;
    f.tables("port", &mut console.ports, console_port)?;
    f.table("resources", &mut console.resources, resources)
}

fn console_port<F: Fields>(f: &mut F, port: &mut ConsolePort) -> Step {
    f.text("socket", &mut port.socket)?;
    f.text("name", &mut port.name)?;
    f.number("cols", &mut port.cols)?;
    f.number("rows", &mut port.rows)
}

fn fs<F: Fields>(f: &mut F, fs: &mut FsConfig) -> Step {
    f.text("id", &mut fs.id)?;
    f.text("tag", &mut fs.tag)?;
    f.text("source", &mut fs.source)?;
    f.flag("readonly", &mut fs.readonly)?;
    f.choice("cache", &mut fs.cache, &FS_CACHES)?;
    f.flag("xattr", &mut fs.xattr)?;
    f.table("resources", &mut fs.resources, resources)
}

fn root_port<F: Fields>(f: &mut F, port: &mut RootPort) -> Step {
    f.text("name", &mut port.name)?;
    f.number("device", &mut port.device)?;
    f.flag("hotplug", &mut port.hotplug)?;
    f.text("behind", &mut port.behind)
}
