//! Kata's own CreateVM becomes the machine it means; everything that is not offered is
//! refused by its name.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use bulkhead_proto::machine::{MachineConfig, disk_config::Cache, serial_config::Mode};
use bulkhead_proto::protobuf::{EnumOrUnknown, Message, MessageField};
use bulkhead_proto::vmservice::*;

use super::*;

mod requests;

const RC: &str = "config.pcie.root_complexes[0]";

fn endpoint(kind: virtio_device::Kind) -> PcieDeviceKind {
    let mut virtio = VirtioDevice::new();
    virtio.kind = Some(kind);
    let mut endpoint = PcieDeviceKind::new();
    endpoint.kind = Some(pcie_device_kind::Kind::Virtio(virtio));
    endpoint
}

fn port(name: &str, device: u32, hotplug: bool, kind: Option<virtio_device::Kind>) -> PciePort {
    let mut port = PciePort::new();
    (port.name, port.hotplug) = (name.into(), hotplug);
    port.devfn = Some(device * 8);
    if let Some(kind) = kind {
        port.attached
            .mut_or_insert_default()
            .set_device(endpoint(kind));
    }
    port
}

fn blk(path: &str, read_only: bool, direct: bool) -> virtio_device::Kind {
    let mut blk = VirtioBlk::new();
    blk.read_only = read_only;
    let backend = blk.backend.mut_or_insert_default();
    (backend.mut_file().path, backend.mut_file().direct) = (path.into(), direct);
    virtio_device::Kind::Blk(blk)
}

fn net(tap: &str, mac: &str) -> virtio_device::Kind {
    let mut net = VirtioNet::new();
    net.mac_address = mac.into();
    let backend = net.backend.mut_or_insert_default();
    backend.mut_tap().set_name(tap.into());
    virtio_device::Kind::Net(net)
}

fn fs(tag: &str) -> virtio_device::Kind {
    let mut device = VhostUser::new();
    device.socket_path = "/run/fs.sock".into();
    device.device.mut_or_insert_default().mut_fs().tag = tag.into();
    virtio_device::Kind::VhostUser(device)
}

fn console(path: &str, connect: bool) -> virtio_device::Kind {
    let mut console = VirtioConsole::new();
    let backend = console.backend.mut_or_insert_default();
    (backend.mut_relay().socket_path, backend.mut_relay().connect) = (path.into(), connect);
    virtio_device::Kind::Console(console)
}

fn vsock(path: &str) -> virtio_device::Kind {
    let mut vsock = VirtioVsock::new();
    vsock.socket_path = path.into();
    virtio_device::Kind::Vsock(vsock)
}

/// What Kata sends.
fn kata() -> CreateVMRequest {
    let mut request = CreateVMRequest::new();
    request.log_id = "sandbox".into();
    let config = request.config.mut_or_insert_default();
    config.memory_config.mut_or_insert_default().memory_mb = 2048;
    config
        .processor_config
        .mut_or_insert_default()
        .processor_count = 2;
    let boot = config.mut_direct_boot();
    boot.kernel_path = "/opt/vmlinux".into();
    boot.kernel_cmdline = "console=ttyS0".into();
    let mut serial = serial_config::Config::new();
    serial.socket_path = "/run/serial.sock".into();
    config
        .serial_config
        .mut_or_insert_default()
        .ports
        .push(serial);
    let mut complex = PcieRootComplex::new();
    (complex.name, complex.end_bus) = ("rc0".into(), 127);
    (complex.low_mmio, complex.high_mmio) = (0x1000_0000, 0x4_0000_0000);
    complex.root_ports.push(port(
        "rootfs",
        1,
        false,
        Some(blk("/opt/image", true, false)),
    ));
    complex
        .root_ports
        .push(port("sharefs", 2, false, Some(fs("kataShared"))));
    complex
        .root_ports
        .push(port("vsock", 3, false, Some(vsock("/run/vm.vsock"))));
    complex.root_ports.push(port(
        "net0",
        4,
        false,
        Some(net("tap0_kata", "02-AB-00-00-00-01")),
    ));
    for index in 0..24 {
        complex
            .root_ports
            .push(port(&format!("hp{index}"), 8 + index, true, None));
    }
    config
        .pcie
        .mut_or_insert_default()
        .root_complexes
        .push(complex);
    request
}

fn create(request: &CreateVMRequest) -> Result<MachineConfig, RpcStatus> {
    match parse("CreateVM", &request.write_to_bytes().unwrap())? {
        ApiRequest::CreateVm(config) => Ok(*config),
        other => panic!("{other:?}"),
    }
}

fn config(request: &mut CreateVMRequest) -> &mut VMConfig {
    request.config.mut_or_insert_default()
}

fn complex(request: &mut CreateVMRequest) -> &mut PcieRootComplex {
    let pcie = config(request).pcie.mut_or_insert_default();
    pcie.root_complexes.first_mut().unwrap()
}

#[test]
fn a_console_is_one_port_on_its_socket() {
    let mut request = kata();
    attach(&mut request, console("/run/hvc", false));
    let made = create(&request).unwrap();
    let [hvc] = made.consoles.as_slice() else {
        panic!("{:?}", made.consoles)
    };
    let behind = made.ports.iter().find(|port| port.behind == hvc.id);
    assert_eq!(behind.map(|port| port.name.as_str()), Some(hvc.id.as_str()));
    let ports: Vec<_> = hvc
        .ports
        .iter()
        .map(|p| (p.socket.as_str(), p.name.as_str()))
        .collect();
    assert_eq!(ports, [("/run/hvc", "")]);
}

#[test]
fn katas_machine_is_the_one_it_means() {
    let made = create(&kata()).unwrap();
    assert_eq!(
        (made.kernel.as_str(), made.initrd.as_str()),
        ("/opt/vmlinux", "")
    );
    assert_eq!((made.memory_bytes, made.memory_max_bytes), (2048 << 20, 0));
    assert_eq!(made.cpus.boot, 2);
    let (mode, path) = (Mode::SOCKET.into(), "/run/serial.sock");
    assert_eq!((made.serial.mode, made.serial.path.as_str()), (mode, path));
    let (id, path) = ("vsock", "/run/vm.vsock");
    assert_eq!(
        (made.vsock.id.as_str(), made.vsock.socket.as_str()),
        (id, path)
    );
    let behind = made.ports.iter().find(|port| port.behind == "vsock");
    assert_eq!(behind.map(|port| port.device), Some(3));
    let disk = &made.disks[0];
    assert_eq!(
        (disk.id.as_str(), disk.path.as_str()),
        ("rootfs", "/opt/image")
    );
    assert!(disk.readonly && disk.cache == Cache::WRITEBACK.into());
    let net = &made.nets[0];
    assert_eq!(
        (net.id.as_str(), net.tap().name.as_str()),
        ("net0", "tap0_kata")
    );
    assert_eq!(net.mac, [2, 0xab, 0, 0, 0, 1]);
    let fs = &made.vhost_users[0];
    assert_eq!((fs.device_id, fs.queues, fs.config.len()), (26, 2, 40));
    assert_eq!(&fs.config[..11], b"kataShared\0");
    assert_eq!(fs.config[36..], [1, 0, 0, 0]);
    assert_eq!(made.ports.len(), 28);
    let hp3 = made.ports.iter().find(|port| port.name == "hp3").unwrap();
    assert_eq!(
        (hp3.device, hp3.hotplug, hp3.behind.as_str()),
        (11, true, "")
    );
    let rootfs = &made.ports[0];
    assert_eq!(
        (rootfs.device, rootfs.hotplug, rootfs.behind.as_str()),
        (1, false, "rootfs")
    );
}

#[test]
fn ports_without_a_place_take_what_is_free() {
    let mut request = kata();
    let ports = &mut complex(&mut request).root_ports;
    ports.truncate(4);
    ports[0].devfn = None;
    ports[1].devfn = Some(8);
    ports[3].devfn = None;
    let made = create(&request).unwrap();
    let places: Vec<u32> = made.ports.iter().map(|port| port.device).collect();
    assert_eq!(places, [2, 1, 3, 4]);
}

/// A change of Kata's request, and how its refusal begins.
type Case = (fn(&mut CreateVMRequest), &'static str);

fn refused(cases: &[Case], code: Code) {
    for (change, start) in cases {
        let mut request = kata();
        change(&mut request);
        let status = create(&request).expect_err(start);
        let field = start.replace("RC", RC);
        assert!(status.message.starts_with(&field), "{field}: {status}");
        assert_eq!(status.code, code, "{status}");
        assert!(status.message.contains(": "), "no remedy: {status}");
    }
}

fn attach(request: &mut CreateVMRequest, kind: virtio_device::Kind) {
    let port = complex(request).root_ports.last_mut().unwrap();
    port.attached
        .mut_or_insert_default()
        .set_device(endpoint(kind));
}

#[test]
fn what_is_not_offered_is_refused_by_its_name() {
    let cases: &[Case] = &[
        (|r| config(r).set_uefi(UEFI::new()), "config.uefi"),
        (
            |r| config(r).devices_config = some(),
            "config.devices_config",
        ),
        (
            |r| config(r).windows_options = some(),
            "config.windows_options",
        ),
        (
            |r| config(r).hvsocket_config = some(),
            "config.hvsocket_config",
        ),
        (|r| config(r).numa_config = some(), "config.numa_config"),
        (
            |r| config(r).memory_config.as_mut().unwrap().hot_hint = true,
            "config.memory_config.hot_hint",
        ),
        (
            |r| config(r).memory_config.as_mut().unwrap().cold_hint = true,
            "config.memory_config.cold_hint",
        ),
        (
            |r| config(r).memory_config.as_mut().unwrap().cold_discard_hint = true,
            "config.memory_config.cold_discard_hint",
        ),
        (
            |r| config(r).memory_config.as_mut().unwrap().low_mmio_gap_in_mb = 1,
            "config.memory_config.low_mmio_gap_in_mb",
        ),
        (
            |r| {
                config(r)
                    .memory_config
                    .as_mut()
                    .unwrap()
                    .high_mmio_base_in_mb = 1
            },
            "config.memory_config.high_mmio_base_in_mb",
        ),
        (
            |r| {
                config(r)
                    .memory_config
                    .as_mut()
                    .unwrap()
                    .high_mmio_gap_in_mb = 1
            },
            "config.memory_config.high_mmio_gap_in_mb",
        ),
        (
            |r| {
                config(r)
                    .processor_config
                    .as_mut()
                    .unwrap()
                    .processor_weight = 1
            },
            "config.processor_config.processor_weight",
        ),
        (
            |r| config(r).processor_config.as_mut().unwrap().processor_limit = 1,
            "config.processor_config.processor_limit",
        ),
        (
            |r| config(r).serial_config.as_mut().unwrap().ports[0].port = 1,
            "config.serial_config.ports[0]: serial port 1",
        ),
        (
            |r| config(r).serial_config.as_mut().unwrap().ports[0].connect = true,
            "config.serial_config.ports[0].connect",
        ),
        (
            |r| {
                config(r).guest_power_actions.mut_or_insert_default().crash =
                    GuestPowerAction::RESTART.into()
            },
            "config.guest_power_actions.crash: RESTART",
        ),
        (
            |r| {
                config(r)
                    .pcie
                    .as_mut()
                    .unwrap()
                    .generic_initiators
                    .push(GenericInitiator::new())
            },
            "config.pcie.generic_initiators",
        ),
        (
            |r| {
                config(r)
                    .pcie
                    .as_mut()
                    .unwrap()
                    .root_complexes
                    .push(PcieRootComplex::new())
            },
            "config.pcie.root_complexes[1]",
        ),
        (|r| complex(r).segment = 1, "RC.segment"),
        (|r| complex(r).start_bus = 1, "RC.start_bus"),
        (|r| complex(r).low_mmio_base = Some(0), "RC.low_mmio_base"),
        (|r| complex(r).high_mmio_base = Some(0), "RC.high_mmio_base"),
        (|r| complex(r).preserve_bars = true, "RC.preserve_bars"),
        (|r| complex(r).node = Some(0), "RC.node"),
        (|r| complex(r).low_mmio = 1 << 40, "RC.low_mmio of"),
        (|r| complex(r).high_mmio = 1 << 60, "RC.high_mmio of"),
        (
            |r| complex(r).root_ports[0].acs_capabilities_supported = Some(1),
            "RC.root_ports[0].acs",
        ),
        (
            |r| complex(r).root_ports[0].devfn = Some(9),
            "RC.root_ports[0].devfn: function 1",
        ),
        (
            |r| {
                complex(r).root_ports[0]
                    .attached
                    .as_mut()
                    .unwrap()
                    .set_switch(PcieSwitch::new())
            },
            "RC.root_ports[0].attached.switch",
        ),
        (
            |r| {
                complex(r).root_ports[0]
                    .attached
                    .as_mut()
                    .unwrap()
                    .mut_device()
                    .set_nvme(NvmeConfig::new())
            },
            "RC.root_ports[0].attached.device.nvme",
        ),
        (
            |r| {
                complex(r).root_ports[0]
                    .attached
                    .as_mut()
                    .unwrap()
                    .mut_device()
                    .set_vfio(VfioDevice::new())
            },
            "RC.root_ports[0].attached.device.vfio",
        ),
        (
            |r| attach(r, vsock("/run/another.sock")),
            "RC.root_ports[27].attached.device.virtio.vsock: a second one",
        ),
        (
            |r| attach(r, console("/run/c", true)),
            "RC.root_ports[27].attached.device.virtio.console.backend.relay.connect",
        ),
        (
            |r| attach(r, nic(|b| b.set_dio(DioBackend::new()))),
            "RC.root_ports[27].attached.device.virtio.net.backend.dio",
        ),
        (
            |r| attach(r, nic(|b| b.set_consomme(ConsommeBackend::new()))),
            "RC.root_ports[27].attached.device.virtio.net.backend.consomme",
        ),
        (
            |r| attach(r, nic(|b| b.mut_tap().set_fd_name("x".into()))),
            "RC.root_ports[27].attached.device.virtio.net.backend.tap.fd_name",
        ),
        (
            |r| attach(r, other(&[64, 128])),
            "RC.root_ports[27].attached.device.virtio.vhost_user.device.other.queue_sizes",
        ),
        // Fields of a later version, at any depth.
        (|r| future(&mut r.special_fields), "field 99 of Create"),
        (|r| future(&mut config(r).special_fields), "field 99 of c"),
        (
            |r| future(&mut complex(r).root_ports[2].special_fields),
            "field 99 of config.pcie.root_complexes[0].root_ports[2]",
        ),
    ];
    refused(cases, Code::Unimplemented);
}

#[test]
fn what_is_wrong_is_refused_by_its_name() {
    let cases: &[Case] = &[
        (|r| r.config = MessageField::none(), "config is missing"),
        (
            |r| config(r).boot_config = None,
            "config.direct_boot is missing",
        ),
        (
            |r| config(r).mut_direct_boot().kernel_path = "vmlinux".into(),
            "config.direct_boot.kernel_path",
        ),
        (
            |r| config(r).mut_direct_boot().initrd_path = "x".into(),
            "config.direct_boot.initrd_path",
        ),
        (
            |r| config(r).mut_direct_boot().kernel_cmdline = "x".repeat(9000),
            "config.direct_boot.kernel_cmdline has 9000",
        ),
        (
            |r| config(r).memory_config = MessageField::none(),
            "config.memory_config is missing",
        ),
        (
            |r| config(r).memory_config.as_mut().unwrap().memory_mb = 0,
            "config.memory_config.memory_mb",
        ),
        (
            |r| config(r).memory_config.as_mut().unwrap().memory_mb = u64::MAX,
            "config.memory_config.memory_mb",
        ),
        (
            |r| config(r).processor_config = MessageField::none(),
            "config.processor_config is missing",
        ),
        (
            |r| config(r).processor_config.as_mut().unwrap().processor_count = 0,
            "config.processor_config.processor_count",
        ),
        (
            |r| config(r).processor_config.as_mut().unwrap().processor_count = u32::MAX,
            "config.processor_config.processor_count",
        ),
        (
            |r| config(r).serial_config.as_mut().unwrap().ports[0].socket_path = "s".into(),
            "config.serial_config.ports[0].socket_path",
        ),
        (
            |r| attach(r, virtio_device::Kind::Console(VirtioConsole::new())),
            "RC.root_ports[27].attached.device.virtio.console.backend is empty",
        ),
        (
            |r| attach(r, console("c", false)),
            "RC.root_ports[27].attached.device.virtio.console.backend.relay.socket_path",
        ),
        (
            |r| {
                let ports = &mut config(r).serial_config.as_mut().unwrap().ports;
                ports.push(ports[0].clone());
            },
            "config.serial_config.ports[1]: port 0",
        ),
        (
            |r| {
                config(r).guest_power_actions.mut_or_insert_default().crash =
                    EnumOrUnknown::from_i32(9)
            },
            "config.guest_power_actions.crash is 9",
        ),
        (|r| complex(r).end_bus = 26, "RC.end_bus is 26"),
        (|r| complex(r).end_bus = 256, "RC.end_bus is 256"),
        (
            |r| complex(r).root_ports.extend(vec![PciePort::new(); 5]),
            "RC.root_ports has 33",
        ),
        (
            |r| complex(r).root_ports[1].devfn = Some(8),
            "RC.root_ports[1].devfn: device 1",
        ),
        (
            |r| complex(r).root_ports[1].devfn = Some(0),
            "RC.root_ports[1].devfn is 0",
        ),
        (
            |r| complex(r).root_ports[1].devfn = Some(256),
            "RC.root_ports[1].devfn is 256",
        ),
        (
            |r| complex(r).root_ports[1].name = "rootfs".into(),
            "RC.root_ports[1].name: rootfs",
        ),
        (
            |r| complex(r).root_ports[1].name.clear(),
            "RC.root_ports[1].name",
        ),
        (
            |r| complex(r).root_ports[0].attached.as_mut().unwrap().kind = None,
            "RC.root_ports[0].attached is empty",
        ),
        (
            |r| attach(r, virtio_device::Kind::Blk(VirtioBlk::new())),
            "RC.root_ports[27].attached.device.virtio.blk.backend",
        ),
        (
            |r| attach(r, blk("disk", false, true)),
            "RC.root_ports[27].attached.device.virtio.blk.backend.file.path",
        ),
        (
            |r| attach(r, net("a/b", "")),
            "RC.root_ports[27].attached.device.virtio.net.backend.tap.name",
        ),
        (
            |r| attach(r, net("tap1", "02:00:00:00:00:01")),
            "RC.root_ports[27].attached.device.virtio.net.mac_address",
        ),
        (
            |r| attach(r, net("tap1", "03-00-00-00-00-01")),
            "RC.root_ports[27].attached.device.virtio.net.mac_address",
        ),
        (
            |r| attach(r, net("tap1", "2-00-00-00-00-0-1")),
            "RC.root_ports[27].attached.device.virtio.net.mac_address",
        ),
        (
            |r| attach(r, fs("")),
            "RC.root_ports[27].attached.device.virtio.vhost_user.device.fs.tag",
        ),
        (
            |r| attach(r, fs(&"x".repeat(37))),
            "RC.root_ports[27].attached.device.virtio.vhost_user.device.fs.tag",
        ),
        (
            |r| attach(r, other(&[])),
            "RC.root_ports[27].attached.device.virtio.vhost_user.device.other.queue_sizes",
        ),
        (
            |r| attach(r, other(&[100])),
            "RC.root_ports[27].attached.device.virtio.vhost_user.device.other: queue size 100",
        ),
        (
            |r| attach(r, virtio_device::Kind::VhostUser(VhostUser::new())),
            "RC.root_ports[27].attached.device.virtio.vhost_user.socket_path",
        ),
    ];
    refused(cases, Code::InvalidArgument);
}

fn some<M: Default>() -> MessageField<M> {
    MessageField::some(M::default())
}

fn future(fields: &mut bulkhead_proto::protobuf::SpecialFields) {
    fields.mut_unknown_fields().add_varint(99, 1);
}

fn nic(change: impl FnOnce(&mut NicBackend)) -> virtio_device::Kind {
    let mut net = VirtioNet::new();
    change(net.backend.mut_or_insert_default());
    virtio_device::Kind::Net(net)
}

fn other(sizes: &[u32]) -> virtio_device::Kind {
    let mut device = VhostUser::new();
    device.socket_path = "/run/x.sock".into();
    let other = device.device.mut_or_insert_default().mut_other();
    (other.device_id, other.queue_sizes) = (19, sizes.to_vec());
    virtio_device::Kind::VhostUser(device)
}
