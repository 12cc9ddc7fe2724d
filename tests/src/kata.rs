//! A client of vmservice.VM as Kata's runtime is one: how it starts the VMM, what its
//! CreateVM holds, one connection, 30 s for each call.

use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_proto::client::ClientError;
use bulkhead_proto::protobuf::well_known_types::empty::Empty;
use bulkhead_proto::protobuf::{Message, MessageField};
use bulkhead_proto::vmservice::{
    AddPcieDeviceRequest, CreateVMRequest, PcieDeviceKind, PciePort, PcieRootComplex,
    PropertiesType, PropertiesVMRequest, PropertiesVMResponse, RemovePcieDeviceRequest, VhostUser,
    VirtioBlk, VirtioConsole, VirtioNet, VirtioRng, VirtioVsock, serial_config,
    virtio_device::Kind,
};
use bulkhead_proto::{BlockingClient, Code, VM_SERVICE};

use crate::vmm::{Vmm, bin, bulkhead_processes};

/// How long Kata waits for an answer, and for the socket.
const CALL: Duration = Duration::from_secs(30);
const READY: Duration = Duration::from_secs(20);
/// How long it waits for the process to end after Quit.
pub const QUIT: Duration = Duration::from_secs(5);

/// Starts `bulkhead --ttrpc` with standard input closed, by a command in front.
///
/// # Errors
/// Why it did not start.
pub fn start(by: &[&str], socket: &str) -> Result<Vmm, String> {
    let mut words: Vec<&str> = by.to_vec();
    words.extend(["bash", "-c", r#"exec "$0" --ttrpc "$1" <&-"#]);
    let (first, rest) = words.split_first().ok_or("no command")?;
    let mut command = Command::new(first);
    command.args(rest).arg(bin("bulkhead")).arg(socket);
    Vmm::spawn(command)
}

/// A connection.
pub struct Client(BlockingClient);

impl Client {
    /// Connects, as soon as the VMM listens.
    ///
    /// # Errors
    /// When it does not in time.
    pub fn connect(socket: &str) -> Result<Self, String> {
        let end = Instant::now() + READY;
        loop {
            match UnixStream::connect(socket) {
                Ok(stream) => return Ok(Self(BlockingClient::new(stream, 1 << 20))),
                Err(error) if Instant::now() > end => return Err(format!("{socket}: {error}")),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    /// Calls a method; its answer.
    ///
    /// # Errors
    /// The code and what else was said.
    pub fn call<Req: Message, Resp: Message>(
        &mut self,
        method: &str,
        request: &Req,
    ) -> Result<Resp, (Code, String)> {
        match self.0.call(VM_SERVICE, method, request, CALL) {
            Ok(response) => Ok(response),
            Err(ClientError::Status(status)) => Err((status.code, status.message)),
            Err(error) => Err((Code::Unknown, format!("{method}: {error}"))),
        }
    }

    /// Calls a method that takes and gives nothing.
    ///
    /// # Errors
    /// As [`call`](Self::call), in one line.
    pub fn plain(&mut self, method: &str) -> Result<(), String> {
        let answer = self.call::<_, Empty>(method, &Empty::new());
        answer
            .map(drop)
            .map_err(|(code, line)| format!("{method}: {line} ({code})"))
    }

    /// A method that takes a message and gives nothing.
    ///
    /// # Errors
    /// As [`call`](Self::call), in one line.
    pub fn tell<Req: Message>(&mut self, method: &str, request: &Req) -> Result<(), String> {
        let answer = self.call::<_, Empty>(method, request);
        answer
            .map(drop)
            .map_err(|(code, line)| format!("{method}: {line} ({code})"))
    }

    /// Fails unless the call is refused with this code and these words.
    ///
    /// # Errors
    /// What happened instead.
    pub fn refused<Req: Message>(
        &mut self,
        method: &str,
        request: &Req,
        code: Code,
        words: &str,
    ) -> Result<(), String> {
        match self.call::<_, Empty>(method, request) {
            Err((got, line)) if got == code && line.contains(words) => Ok(()),
            other => Err(format!("{method}: {other:?}, not {code} with {words:?}")),
        }
    }

    /// AddPcieDevice.
    ///
    /// # Errors
    /// As [`call`](Self::call), in one line.
    pub fn add(&mut self, port: &str, kind: Kind) -> Result<(), String> {
        self.tell("AddPcieDevice", &addition(port, kind))
    }

    /// RemovePcieDevice.
    ///
    /// # Errors
    /// As [`call`](Self::call), in one line.
    pub fn remove(&mut self, port: &str) -> Result<(), String> {
        self.tell("RemovePcieDevice", &removal(port))
    }

    /// PropertiesVM, with everything.
    ///
    /// # Errors
    /// As [`call`](Self::call), in one line.
    pub fn properties(&mut self) -> Result<PropertiesVMResponse, String> {
        let mut request = PropertiesVMRequest::new();
        request.types = vec![
            PropertiesType::MEMORY.into(),
            PropertiesType::PROCESSOR.into(),
        ];
        self.call("PropertiesVM", &request)
            .map_err(|(code, line)| format!("PropertiesVM: {line} ({code})"))
    }
}

/// A request to add a device.
pub fn addition(port: &str, kind: Kind) -> AddPcieDeviceRequest {
    let mut request = AddPcieDeviceRequest::new();
    request.port_name = port.into();
    request.device = MessageField::some(endpoint(kind));
    request
}

/// A request to remove one.
pub fn removal(port: &str) -> RemovePcieDeviceRequest {
    let mut request = RemovePcieDeviceRequest::new();
    request.port_name = port.into();
    request
}

fn endpoint(kind: Kind) -> PcieDeviceKind {
    let mut endpoint = PcieDeviceKind::new();
    endpoint.mut_virtio().kind = Some(kind);
    endpoint
}

/// A disk.
pub fn disk(path: &str, read_only: bool) -> Kind {
    let mut disk = VirtioBlk::new();
    disk.read_only = read_only;
    let backend = disk.backend.mut_or_insert_default();
    backend.mut_file().path = path.into();
    Kind::Blk(disk)
}

/// A network device on a tap.
pub fn net(tap: &str, mac: &str) -> Kind {
    let mut net = VirtioNet::new();
    net.mac_address = mac.into();
    let backend = net.backend.mut_or_insert_default();
    backend.mut_tap().set_name(tap.into());
    Kind::Net(net)
}

/// A file system of an external virtiofsd.
pub fn file_system(socket: &str, tag: &str) -> Kind {
    let mut device = VhostUser::new();
    device.socket_path = socket.into();
    device.device.mut_or_insert_default().mut_fs().tag = tag.into();
    Kind::VhostUser(device)
}

/// A disk of a back-end that listens at this socket.
pub fn vhost_user_disk(socket: &str, queues: Option<u32>, queue_size: Option<u32>) -> Kind {
    let mut device = VhostUser::new();
    device.socket_path = socket.into();
    let disk = device.device.mut_or_insert_default().mut_blk();
    (disk.num_queues, disk.queue_size) = (queues, queue_size);
    Kind::VhostUser(device)
}

/// A socket device.
pub fn vsock(path: &str) -> Kind {
    let mut vsock = VirtioVsock::new();
    vsock.socket_path = path.into();
    Kind::Vsock(vsock)
}

/// A console on a socket.
pub fn console(path: &str) -> Kind {
    let mut console = VirtioConsole::new();
    let backend = console.backend.mut_or_insert_default();
    backend.mut_relay().socket_path = path.into();
    Kind::Console(console)
}

/// An entropy device.
pub fn rng() -> Kind {
    Kind::Rng(VirtioRng::new())
}

/// CreateVM as Kata sends it: these devices at their places, and hp0 to hp23, at 8 to 31.
pub fn create(
    (kernel, initrd, cmdline): (&str, &str, &str),
    (memory_mb, cpus): (u64, u32),
    serial: &str,
    devices: Vec<(&str, u32, Kind)>,
) -> CreateVMRequest {
    let mut request = CreateVMRequest::new();
    request.log_id = "test".into();
    let config = request.config.mut_or_insert_default();
    config.memory_config.mut_or_insert_default().memory_mb = memory_mb;
    config
        .processor_config
        .mut_or_insert_default()
        .processor_count = cpus;
    let boot = config.mut_direct_boot();
    boot.kernel_path = kernel.into();
    boot.initrd_path = initrd.into();
    boot.kernel_cmdline = cmdline.into();
    let mut port = serial_config::Config::new();
    port.socket_path = serial.into();
    config
        .serial_config
        .mut_or_insert_default()
        .ports
        .push(port);
    let mut complex = PcieRootComplex::new();
    complex.name = "rc0".into();
    complex.end_bus = 127;
    complex.low_mmio = 256 << 20;
    complex.high_mmio = 16 << 30;
    let place = |name: &str, device: u32, hotplug: bool| {
        let mut port = PciePort::new();
        (port.name, port.hotplug) = (name.into(), hotplug);
        port.devfn = Some(device << 3);
        port
    };
    for (name, device, kind) in devices {
        let mut port = place(name, device, false);
        let attached = port.attached.mut_or_insert_default();
        attached.set_device(endpoint(kind));
        complex.root_ports.push(port);
    }
    for index in 0..24 {
        let port = place(&format!("hp{index}"), 8 + index, true);
        complex.root_ports.push(port);
    }
    let pcie = config.pcie.mut_or_insert_default();
    pcie.root_complexes.push(complex);
    request
}

/// Fails if more of a VM is left than its own process, be it an entry in the process table.
///
/// # Errors
/// What is left.
pub fn alone(pid: u32) -> Result<(), String> {
    let others = || {
        let mut left = bulkhead_processes();
        left.retain(|(other, _)| i32::try_from(pid) != Ok(*other));
        left
    };
    // A pidfd tells of the end a moment before the entry goes.
    let mut left = others();
    for _ in 0..20 {
        if left.is_empty() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
        left = others();
    }
    if left.is_empty() {
        return Ok(());
    }
    Err(format!("after TeardownVM: {left:?}"))
}

/// Names of the threads of a process that begin with Kata's prefix for vCPUs.
pub fn vcpu_threads(pid: u32) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task"));
    let tasks = tasks.into_iter().flatten().flatten();
    let mut names: Vec<String> = tasks
        .filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok())
        .map(|name| name.trim().to_owned())
        .filter(|name| name.starts_with("vp-"))
        .collect();
    names.sort();
    names
}
