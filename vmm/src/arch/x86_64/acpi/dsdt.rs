//! The DSDT's AML (ACPI 6.5, chapters 6 and 20): CPUs, the PCI root bridge, COM1, the power
//! button and the generic event device that signals it.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal,
    Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local,
    Memory32Fixed, Method, Name, NotEqual, Notify, OpRegion, OpRegionSpace, Or, Package,
    ResourceTemplate, Return, Scope, Store, Uuid, ZERO,
};

use super::{AcpiConfig, Raw, bytes_of, hotplug, name};
use crate::arch::x86_64::layout;
use crate::ged::GedEvents;
use crate::power::S5_SLEEP_TYPE;

/// The bits of _OSC's control field that the firmware grants (PCI Firmware 3.3, table 4-6):
/// only the PCI Express capability structures. Native hot-plug and SHPC are refused because
/// hot-plug is signalled by the generic event device; PME, AER and LTR because no port here
/// raises them.
const OSC_GRANTED: u32 = 1 << 4;
const OSC_UUID: &str = "33DB4D5B-1FF7-401C-9657-7441C03DD766";
const OSC_UNKNOWN_UUID: u8 = 1 << 2;
const OSC_UNKNOWN_REVISION: u8 = 1 << 3;
const OSC_BITS_MASKED: u8 = 1 << 4;

/// Everything behind the DSDT's header.
pub(super) fn body(config: &AcpiConfig<'_>) -> Vec<u8> {
    let mut body = Vec::new();
    for part in [
        hotplug::cpus(config.cpus, config.max_cpus.max(config.cpus)),
        pci_root(config),
        motherboard(),
        com1(),
        power_button(),
        event_device(config),
        bytes_of(&Name::new(
            name("\\_S5_"),
            &Package::new(vec![&S5_SLEEP_TYPE]),
        )),
    ] {
        body.extend(part);
    }
    body
}

fn in_system_bus(device: &dyn Aml) -> Vec<u8> {
    bytes_of(&Scope::new(name("\\_SB_"), vec![device]))
}

fn pci_root(config: &AcpiConfig<'_>) -> Vec<u8> {
    let mem32_last = layout::PCI_MEM32_START + layout::PCI_MEM32_SIZE - 1;
    let buses = AddressSpace::<u16>::new_bus_number(0, u16::from(config.last_bus));
    let cf8 = IO::new(
        layout::PCI_CF8_PORT as u16,
        layout::PCI_CF8_PORT as u16,
        1,
        8,
    );
    let mem32 = AddressSpace::<u32>::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        layout::PCI_MEM32_START as u32,
        mem32_last as u32,
        None,
    );
    let mem64 = AddressSpace::<u64>::new_memory(
        AddressSpaceCacheable::PreFetchable,
        true,
        config.pci_mem64.start,
        config.pci_mem64.end.saturating_sub(1),
        None,
    );
    let mut resources: Vec<&dyn Aml> = vec![&buses, &cf8, &mem32];
    if !config.pci_mem64.is_empty() {
        resources.push(&mem64);
    }
    in_system_bus(&Device::new(
        name("PCI0"),
        vec![
            &Name::new(name("_HID"), &EISAName::new("PNP0A08")),
            &Name::new(name("_CID"), &EISAName::new("PNP0A03")),
            &Name::new(name("_SEG"), &ZERO),
            &Name::new(name("_BBN"), &ZERO),
            &Name::new(name("_UID"), &ZERO),
            &Name::new(name("_CRS"), &ResourceTemplate::new(resources)),
            &Raw(&osc()),
            &Raw(&hotplug::slots(config.ports)),
        ],
    ))
}

/// `_OSC`: Arg0 UUID, Arg1 revision, Arg2 count, Arg3 capabilities buffer.
fn osc() -> Vec<u8> {
    let status = name("CDW1");
    let control = name("CDW3");
    bytes_of(&Method::new(
        name("_OSC"),
        4,
        false,
        vec![
            &CreateDWordField::new(&status, &Arg(3), &ZERO),
            &If::new(
                &Equal::new(&Arg(0), &Uuid::new(OSC_UUID)),
                vec![
                    &CreateDWordField::new(&control, &Arg(3), &8u8),
                    &And::new(&Local(0), &control, &OSC_GRANTED),
                    &If::new(
                        &NotEqual::new(&Arg(1), &1u8),
                        vec![&Or::new(&status, &status, &OSC_UNKNOWN_REVISION)],
                    ),
                    &If::new(
                        &NotEqual::new(&control, &Local(0)),
                        vec![&Or::new(&status, &status, &OSC_BITS_MASKED)],
                    ),
                    &Store::new(&control, &Local(0)),
                ],
            ),
            &Else::new(vec![&Or::new(&status, &status, &OSC_UNKNOWN_UUID)]),
            &Return::new(&Arg(3)),
        ],
    ))
}

/// What belongs to the platform and to no driver: ECAM, the event device's registers, the
/// sleep and reset ports.
fn motherboard() -> Vec<u8> {
    in_system_bus(&Device::new(
        name("MBRD"),
        vec![
            &Name::new(name("_HID"), &EISAName::new("PNP0C02")),
            &Name::new(name("_UID"), &ZERO),
            &Name::new(
                name("_CRS"),
                &ResourceTemplate::new(vec![
                    &Memory32Fixed::new(true, layout::ECAM_START as u32, layout::ECAM_SIZE as u32),
                    &Memory32Fixed::new(true, layout::GED_START as u32, layout::GED_SIZE as u32),
                    &Memory32Fixed::new(
                        true,
                        layout::HOTPLUG_START as u32,
                        layout::HOTPLUG_SIZE as u32,
                    ),
                    &IO::new(
                        layout::SLEEP_CONTROL_PORT as u16,
                        layout::SLEEP_CONTROL_PORT as u16,
                        1,
                        8,
                    ),
                ]),
            ),
        ],
    ))
}

fn com1() -> Vec<u8> {
    let port = layout::COM1_PORT as u16;
    in_system_bus(&Device::new(
        name("COM1"),
        vec![
            &Name::new(name("_HID"), &EISAName::new("PNP0501")),
            &Name::new(name("_UID"), &ZERO),
            &Name::new(name("_DDN"), &"COM1"),
            &Name::new(
                name("_CRS"),
                &ResourceTemplate::new(vec![
                    &IO::new(port, port, 1, 8),
                    // Consumer, edge, active high, exclusive.
                    &Interrupt::new(true, true, false, false, layout::COM1_GSI),
                ]),
            ),
        ],
    ))
}

fn power_button() -> Vec<u8> {
    in_system_bus(&Device::new(
        name("PWRB"),
        vec![
            &Name::new(name("_HID"), &EISAName::new("PNP0C0C")),
            &Name::new(name("_UID"), &ZERO),
        ],
    ))
}

/// The generic event device: reading the word (`ged.rs`) takes the events and releases the
/// line, so it is read once and each bit then notifies its device.
fn event_device(config: &AcpiConfig<'_>) -> Vec<u8> {
    const STATUS_CHANGE: u8 = 0x80;
    let events = name("EVNT");
    let mut scans = Vec::new();
    if !config.ports.is_empty() {
        scans.extend(hotplug::on_event(
            GedEvents::SLOTS.bits(),
            hotplug::SLOT_SCAN,
        ));
    }
    if config.max_cpus > config.cpus {
        scans.extend(hotplug::on_event(GedEvents::CPUS.bits(), hotplug::CPU_SCAN));
    }
    in_system_bus(&Device::new(
        name("GED0"),
        vec![
            &Name::new(name("_HID"), &"ACPI0013"),
            &Name::new(name("_UID"), &ZERO),
            &Name::new(
                name("_CRS"),
                // Consumer, level, active high, exclusive.
                &ResourceTemplate::new(vec![&Interrupt::new(
                    true,
                    false,
                    false,
                    false,
                    layout::GED_GSI,
                )]),
            ),
            &OpRegion::new(
                name("GEDR"),
                OpRegionSpace::SystemMemory,
                &(layout::GED_START as u32),
                &4u8,
            ),
            &Field::new(
                name("GEDR"),
                FieldAccessType::DWord,
                FieldLockRule::NoLock,
                FieldUpdateRule::WriteAsZeroes,
                vec![FieldEntry::Named(*b"EVNT", 32)],
            ),
            &Method::new(
                name("_EVT"),
                1,
                true,
                vec![
                    &Store::new(&Local(0), &events),
                    &If::new(
                        &And::new(&ZERO, &Local(0), &GedEvents::POWER_BUTTON.bits()),
                        vec![&Notify::new(&name("\\_SB_.PWRB"), &STATUS_CHANGE)],
                    ),
                    &Raw(&scans),
                ],
            ),
        ],
    ))
}
