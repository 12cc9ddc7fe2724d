//! PcieTopologyConfig as root ports at places of their own, and the devices behind them.

use std::collections::BTreeSet;

use bulkhead_proto::RpcStatus;
use bulkhead_proto::machine::{MachineConfig, RootPort};
use bulkhead_proto::vmservice::{
    PcieAttachment, PcieDeviceKind, PciePort, PcieRootComplex, PcieTopologyConfig,
    pcie_attachment::Kind,
};

use super::device::{self, Part};
use super::{not_offered, port_name, wrong};
use crate::arch::x86_64::layout;

/// Most root ports on bus 0: one for each device number but the host bridge's.
const MAX_PORTS: usize = 31;
/// Functions that a device may have; its place is device × 8 + function.
const FUNCTIONS: u32 = 8;

/// Adds ports and devices to a configuration for `cpus` vCPUs.
pub(super) fn ports(
    from: PcieTopologyConfig,
    cpus: u32,
    config: &mut MachineConfig,
) -> Result<(), RpcStatus> {
    if !from.generic_initiators.is_empty() {
        let field = "config.pcie.generic_initiators";
        return Err(not_offered(field, "leave it out: memory is one node"));
    }
    let mut complexes = from.root_complexes.into_iter();
    let Some(complex) = complexes.next() else {
        return Ok(());
    };
    if complexes.next().is_some() {
        let field = "config.pcie.root_complexes[1]";
        return Err(not_offered(field, "put every root port on the first one"));
    }
    let field = "config.pcie.root_complexes[0]";
    check(field, &complex)?;
    let pinned = pinned(field, &complex.root_ports)?;
    let mut names = BTreeSet::new();
    let mut free = (1..=31_u32).filter(|device| !pinned.contains(device));
    for (index, port) in complex.root_ports.into_iter().enumerate() {
        let field = format!("{field}.root_ports[{index}]");
        let device = match port.devfn {
            Some(devfn) => devfn / FUNCTIONS,
            None => free
                .next()
                .ok_or_else(|| wrong(format!("{field}: there is no place left for it")))?,
        };
        let mut made = RootPort::new();
        made.name = port_name(&format!("{field}.name"), port.name)?;
        (made.device, made.hotplug) = (device, port.hotplug);
        if !names.insert(made.name.clone()) {
            return Err(wrong(format!(
                "{field}.name: {} is another port's: name each differently",
                made.name
            )));
        }
        if let Some(kind) = attached(&field, port.attached.into_option())? {
            let field = format!("{field}.attached.device");
            made.behind.clone_from(&made.name);
            match device::part(&field, &made.name, kind, cpus)? {
                Part::Disk(disk) => config.disks.push(disk),
                Part::Net(net) => config.nets.push(net),
                Part::VhostUser(device) => config.vhost_users.push(device),
                Part::Rng(rng) => config.rngs.push(rng),
                Part::Vsock(_) if config.vsock.is_some() => {
                    let field = format!("{field}.virtio.vsock: a second one");
                    return Err(not_offered(&field, "a guest has one address: leave it out"));
                }
                Part::Vsock(vsock) => config.vsock = Some(vsock).into(),
                Part::Console(console) => config.consoles.push(console),
            }
        }
        config.ports.push(made);
    }
    Ok(())
}

fn check(field: &str, complex: &PcieRootComplex) -> Result<(), RpcStatus> {
    let fixed = "leave it out: bulkhead places the windows itself";
    for (set, name, remedy) in [
        (complex.segment != 0, "segment", "give 0"),
        (complex.start_bus != 0, "start_bus", "give 0"),
        (complex.low_mmio_base.is_some(), "low_mmio_base", fixed),
        (complex.high_mmio_base.is_some(), "high_mmio_base", fixed),
        (
            complex.preserve_bars,
            "preserve_bars",
            "leave it out: Linux places BARs itself",
        ),
        (
            complex.node.is_some(),
            "node",
            "leave it out: memory is one node",
        ),
    ] {
        if set {
            return Err(not_offered(&format!("{field}.{name}"), remedy));
        }
    }
    for (name, wanted, has) in [
        ("low_mmio", complex.low_mmio, layout::PCI_MEM32_SIZE),
        ("high_mmio", complex.high_mmio, layout::PCI_MEM64_SIZE),
    ] {
        if wanted > has {
            let remedy = format!("the window has {has} bytes: ask for as much or less");
            return Err(not_offered(&format!("{field}.{name} of {wanted}"), &remedy));
        }
    }
    let ports = complex.root_ports.len();
    if ports > MAX_PORTS {
        return Err(wrong(format!(
            "{field}.root_ports has {ports} entries: at most {MAX_PORTS} fit on the bus"
        )));
    }
    // A bus behind each, beside the root bus.
    if u32::try_from(ports).unwrap_or(u32::MAX) > complex.end_bus || complex.end_bus > 255 {
        return Err(wrong(format!(
            "{field}.end_bus is {}: give {ports} to 255, a bus for each root port",
            complex.end_bus
        )));
    }
    Ok(())
}

/// Device numbers that ports ask for.
fn pinned(field: &str, ports: &[PciePort]) -> Result<BTreeSet<u32>, RpcStatus> {
    let mut pinned = BTreeSet::new();
    for (index, port) in ports.iter().enumerate() {
        let field = format!("{field}.root_ports[{index}]");
        if port.acs_capabilities_supported.is_some_and(|acs| acs != 0) {
            let field = format!("{field}.acs_capabilities_supported");
            return Err(not_offered(&field, "leave it out, or give 0"));
        }
        let Some(devfn) = port.devfn else { continue };
        let device = devfn / FUNCTIONS;
        if !(1..=31).contains(&device) {
            return Err(wrong(format!(
                "{field}.devfn is {devfn}: give 8 to 248, a device number from 1 to 31 times 8"
            )));
        }
        if devfn % FUNCTIONS != 0 {
            let field = format!("{field}.devfn: function {}", devfn % FUNCTIONS);
            return Err(not_offered(
                &field,
                "give a multiple of 8, which is function 0",
            ));
        }
        if !pinned.insert(device) {
            return Err(wrong(format!(
                "{field}.devfn: device {device} is another port's: give each its own"
            )));
        }
    }
    Ok(pinned)
}

fn attached(
    field: &str,
    attached: Option<PcieAttachment>,
) -> Result<Option<PcieDeviceKind>, RpcStatus> {
    match attached.map(|attached| attached.kind) {
        None => Ok(None),
        Some(Some(Kind::Device(device))) => Ok(Some(device)),
        Some(Some(Kind::Switch(_))) => Err(not_offered(
            &format!("{field}.attached.switch"),
            "put each device behind a root port of its own",
        )),
        Some(_) => Err(wrong(format!(
            "{field}.attached is empty: give device, or leave it out"
        ))),
    }
}
