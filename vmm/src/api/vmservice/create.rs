//! CreateVMRequest as a machine's configuration.

use bulkhead_proto::RpcStatus;
use bulkhead_proto::machine::machine_config::OnReset;
use bulkhead_proto::machine::{MachineConfig, SerialConfig, serial_config};
use bulkhead_proto::protobuf::EnumOrUnknown;
use bulkhead_proto::vmservice::{
    self, CreateVMRequest, GuestPowerAction, GuestPowerActions, MemoryConfig, ProcessorConfig,
    VMConfig, vmconfig::Boot_config,
};

use super::{not_offered, topology, wrong};
use crate::api::config::{self, MAX_CMDLINE, path, text};
use crate::cli::machine_args::MAX_CPUS;

/// Bytes in the unit of `memory_mb`.
const MIB: u64 = 1 << 20;
/// The most that `memory_mb` can mean: an x86-64 processor has at most 52 address bits.
const MAX_MEMORY_MB: u64 = (1 << 52) / MIB;

/// Memory in bytes, from its field in MiB; `whose` says what the number is of.
pub(super) fn memory_bytes(field: &str, whose: &str, mib: u64) -> Result<u64, RpcStatus> {
    let fits = (1..=MAX_MEMORY_MB).contains(&mib);
    let bytes = mib.checked_mul(MIB).filter(|_| fits);
    bytes.ok_or_else(|| {
        wrong(format!(
            "{field} is {mib}: give {whose} in MiB, up to what the host has and at most {MAX_MEMORY_MB}"
        ))
    })
}

/// The machine that a request describes.
pub(super) fn machine(request: CreateVMRequest) -> Result<MachineConfig, RpcStatus> {
    let log_id = super::super::request::short(&request.log_id);
    log::info!("CreateVM {log_id}");
    let mut from = request
        .config
        .into_option()
        .ok_or_else(|| wrong("config is missing: describe the machine"))?;
    absent(&from)?;
    let mut config = MachineConfig::new();
    boot(from.boot_config.take(), &mut config)?;
    memory(from.memory_config.as_ref(), &mut config)?;
    let cpus = processors(from.processor_config.as_ref())?;
    config.cpus.mut_or_insert_default().boot = cpus;
    config.serial = Some(serial(from.serial_config.as_ref())?).into();
    config.on_reset = power(from.guest_power_actions.as_ref())?.into();
    if let Some(pcie) = from.pcie.into_option() {
        topology::ports(pcie, cpus, &mut config)?;
    }
    // Lengths and whatever else is true of every configuration.
    config::validate(&config).map_err(wrong)?;
    Ok(config)
}

/// Parts of a machine that there are not.
fn absent(config: &VMConfig) -> Result<(), RpcStatus> {
    let remedy_devices = "put each device behind a root port of config.pcie";
    let linux = "leave it out: guests are Linux, by direct_boot";
    for (present, field, remedy) in [
        (
            config.devices_config.is_some(),
            "devices_config",
            remedy_devices,
        ),
        (config.windows_options.is_some(), "windows_options", linux),
        (
            config.hvsocket_config.is_some(),
            "hvsocket_config",
            "leave it out: there is no VMBus",
        ),
        (
            config.numa_config.is_some(),
            "numa_config",
            "leave it out: memory is one node, memory_config",
        ),
    ] {
        if present {
            return Err(not_offered(&format!("config.{field}"), remedy));
        }
    }
    Ok(())
}

fn boot(from: Option<Boot_config>, config: &mut MachineConfig) -> Result<(), RpcStatus> {
    match from {
        Some(Boot_config::DirectBoot(boot)) => {
            path("config.direct_boot.kernel_path", &boot.kernel_path).map_err(wrong)?;
            if !boot.initrd_path.is_empty() {
                path("config.direct_boot.initrd_path", &boot.initrd_path).map_err(wrong)?;
            }
            let cmdline = &boot.kernel_cmdline;
            text("config.direct_boot.kernel_cmdline", cmdline, MAX_CMDLINE).map_err(wrong)?;
            config.kernel = boot.kernel_path;
            config.initrd = boot.initrd_path;
            config.cmdline = boot.kernel_cmdline;
            Ok(())
        }
        Some(Boot_config::Uefi(_)) => Err(not_offered("config.uefi", "give config.direct_boot")),
        _ => Err(wrong("config.direct_boot is missing: name a kernel")),
    }
}

fn memory(from: Option<&MemoryConfig>, config: &mut MachineConfig) -> Result<(), RpcStatus> {
    let from = from.ok_or_else(|| wrong("config.memory_config is missing: give memory_mb"))?;
    // allow_overcommit and deferred_commit ask for what is always so: the host's memory is
    // taken as the guest touches it.
    for (set, field, remedy) in [
        (from.hot_hint, "hot_hint", "leave it out"),
        (from.cold_hint, "cold_hint", "leave it out"),
        (from.cold_discard_hint, "cold_discard_hint", "leave it out"),
        (
            from.low_mmio_gap_in_mb != 0,
            "low_mmio_gap_in_mb",
            "leave it out: the windows have places of their own",
        ),
        (
            from.high_mmio_base_in_mb != 0,
            "high_mmio_base_in_mb",
            "leave it out: the windows have places of their own",
        ),
        (
            from.high_mmio_gap_in_mb != 0,
            "high_mmio_gap_in_mb",
            "leave it out: the windows have places of their own",
        ),
    ] {
        if set {
            return Err(not_offered(
                &format!("config.memory_config.{field}"),
                remedy,
            ));
        }
    }
    let field = "config.memory_config.memory_mb";
    config.memory_bytes = memory_bytes(field, "the guest's memory", from.memory_mb)?;
    Ok(())
}

fn processors(from: Option<&ProcessorConfig>) -> Result<u32, RpcStatus> {
    let from =
        from.ok_or_else(|| wrong("config.processor_config is missing: give processor_count"))?;
    for (set, field) in [
        (from.processor_weight != 0, "processor_weight"),
        (from.processor_limit != 0, "processor_limit"),
    ] {
        if set {
            let field = format!("config.processor_config.{field}");
            let remedy = "leave it out, and limit the process by its cgroup";
            return Err(not_offered(&field, remedy));
        }
    }
    let count = from.processor_count;
    if count == 0 || count > MAX_CPUS {
        return Err(wrong(format!(
            "config.processor_config.processor_count is {count}: give 1 to {MAX_CPUS}"
        )));
    }
    Ok(count)
}

fn serial(from: Option<&vmservice::SerialConfig>) -> Result<SerialConfig, RpcStatus> {
    let mut serial = SerialConfig::new();
    let ports = from.map(|from| from.ports.as_slice()).unwrap_or_default();
    for (index, port) in ports.iter().enumerate() {
        let field = format!("config.serial_config.ports[{index}]");
        if port.port != 0 {
            let field = format!("{field}: serial port {}", port.port);
            return Err(not_offered(&field, "there is port 0, ttyS0"));
        }
        if port.connect {
            let remedy = "leave it out and connect to the socket, which bulkhead makes";
            return Err(not_offered(&format!("{field}.connect"), remedy));
        }
        if index != 0 {
            return Err(wrong(format!(
                "{field}: port 0 is there twice: give it once"
            )));
        }
        path(&format!("{field}.socket_path"), &port.socket_path).map_err(wrong)?;
        serial.mode = serial_config::Mode::SOCKET.into();
        serial.path.clone_from(&port.socket_path);
    }
    Ok(serial)
}

/// What becomes of a machine whose guest asks for a reset or triple-faults, which is one thing here;
/// one that has halted for another reason has ended.
fn power(from: Option<&GuestPowerActions>) -> Result<OnReset, RpcStatus> {
    let Some(from) = from else {
        return Ok(OnReset::END);
    };
    let known = |name: &str, action: &EnumOrUnknown<GuestPowerAction>| {
        action.enum_value().map_err(|number| {
            wrong(format!(
                "config.guest_power_actions.{name} is {number}: give 0, 1 or 2"
            ))
        })
    };
    let refused = |field: &str, remedy: &str| {
        let field = format!("config.guest_power_actions.{field}");
        Err(not_offered(&field, remedy))
    };
    for (name, action) in [("shutdown", from.shutdown), ("watchdog", from.watchdog)] {
        if known(name, &action)? == GuestPowerAction::RESTART {
            let remedy = "give DEFAULT or HALT, and make a new machine when one has halted";
            return refused(&format!("{name}: RESTART"), remedy);
        }
    }
    match (known("reset", &from.reset)?, known("crash", &from.crash)?) {
        (GuestPowerAction::RESTART, GuestPowerAction::HALT) => refused(
            "crash: HALT beside reset: RESTART",
            "give crash DEFAULT or RESTART: a triple fault is a reset",
        ),
        (GuestPowerAction::RESTART, _) => Ok(OnReset::RESTART),
        (_, GuestPowerAction::RESTART) => refused(
            "crash: RESTART",
            "give reset RESTART, too: a triple fault is a reset",
        ),
        _ => Ok(OnReset::END),
    }
}
