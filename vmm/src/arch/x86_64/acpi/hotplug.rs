//! AML of hot-plug (ACPI 6.5, 5.6.6, 6.3 and 8.4): a slot below each root port, and vCPUs that
//! come and go. The generic event device's `_EVT` calls the two scans here, which read the
//! registers of `crate::hotplug` and notify what they name.

use acpi_tables::Aml;
use acpi_tables::aml::{
    And, Arg, BufferData, Device, Else, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule,
    FieldUpdateRule, If, Local, Method, MethodCall, Name, Notify, OpRegion, OpRegionSpace, Return,
    Scope, Store, ZERO,
};

use super::{Raw, bytes_of, name};
use crate::arch::x86_64::layout;
use crate::hotplug::{
    CPU_ANSWERED, CPU_EJECT, CPU_INSERTED, CPU_PRESENT, CPU_REMOVING, CPUS, SLOTS_INSERTED,
};

/// Notification values (ACPI 6.5, 5.6.6).
const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;
/// Source of an eject that the guest began itself.
const OSPM_EJECT: u16 = 0x103;
/// `_OST` of an eject request: it is being carried out (ACPI 6.5, table 6.30).
const EJECT_IN_PROGRESS: u8 = 0x84;
/// `_STA`: present, enabled, shown, working.
const STATUS_THERE: u8 = 0xf;
/// The scan of the slots.
pub(super) const SLOT_SCAN: &str = "\\_SB_.PCI0.SCAN";
/// The scan of the vCPUs.
pub(super) const CPU_SCAN: &str = "\\_SB_.CSCN";

fn port_name(device: u8) -> String {
    format!("P{device:03}")
}

/// What belongs inside `\_SB.PCI0`: the registers, a slot below each of the root ports with
/// these device numbers, and the scan.
pub(super) fn slots(ports: &[u8]) -> Vec<u8> {
    if ports.is_empty() {
        return Vec::new();
    }
    let mut aml = bytes_of(&OpRegion::new(
        name("SLTR"),
        OpRegionSpace::SystemMemory,
        &(layout::HOTPLUG_START as u32 + SLOTS_INSERTED as u32),
        &12u8,
    ));
    aml.extend(bytes_of(&Field::new(
        name("SLTR"),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        ["SINS", "SREM", "SEJT"]
            .map(|field| named(field, 32))
            .into(),
    )));
    let mut notify = Vec::new();
    for device in ports {
        let bit = 1u32.checked_shl((*device).into()).unwrap_or(0);
        let register = name("\\_SB_.PCI0.SEJT");
        let eject = Store::new(&register, &bit);
        let eject = Method::new(name("_EJ0"), 1, true, vec![&eject]);
        let address = Name::new(name("_ADR"), &ZERO);
        let number = Name::new(name("_SUN"), device);
        let slot = Device::new(name("SLOT"), vec![&address, &number, &eject]);
        let address = Name::new(name("_ADR"), &(u32::from(*device) << 16));
        let port = port_name(*device);
        aml.extend(bytes_of(&Device::new(name(&port), vec![&address, &slot])));
        let slot = name(&format!("\\_SB_.PCI0.{port}.SLOT"));
        // The port is to be looked at, not its slot: Linux looks at a slot for what is new only,
        // and at a port for what is gone, too.
        let port = name(&format!("\\_SB_.PCI0.{port}"));
        for (local, object, value) in [(0, &port, DEVICE_CHECK), (1, &slot, EJECT_REQUEST)] {
            notify.extend(bytes_of(&If::new(
                &And::new(&ZERO, &Local(local), &bit),
                vec![&Notify::new(object, &value)],
            )));
        }
    }
    aml.extend(bytes_of(&Method::new(
        name("SCAN"),
        0,
        true,
        vec![
            &Store::new(&Local(0), &name("SINS")),
            &Store::new(&Local(1), &name("SREM")),
            &Raw(&notify),
        ],
    )));
    aml
}

fn named(field: &str, bits: usize) -> FieldEntry {
    let mut name = *b"____";
    for (to, from) in name.iter_mut().zip(field.bytes()) {
        *to = from;
    }
    FieldEntry::Named(name, bits)
}

fn cpu_name(index: u32) -> String {
    format!("C{:03X}", index & 0xfff)
}

/// vCPUs: `boot` of them are there at first. Where there may be no more, they are there for
/// good and have neither a status nor a scan.
pub(super) fn cpus(boot: u32, max: u32) -> Vec<u8> {
    let mut aml = Vec::new();
    if max > boot {
        aml.extend(cpu_registers(max));
    }
    for index in 0..max {
        let hid = Name::new(name("_HID"), &"ACPI0007");
        let uid = Name::new(name("_UID"), &index);
        let hotplug = if max > boot {
            cpu_methods(index)
        } else {
            Vec::new()
        };
        aml.extend(bytes_of(&Device::new(
            name(&cpu_name(index)),
            vec![&hid, &uid, &Raw(&hotplug)],
        )));
    }
    if max > boot {
        aml.extend(cpu_scan(max));
    }
    bytes_of(&Scope::new(name("\\_SB_"), vec![&Raw(&aml)]))
}

fn cpu_field(index: u32) -> String {
    format!("K{:03X}", index & 0xfff)
}

fn cpu_registers(max: u32) -> Vec<u8> {
    let mut aml = bytes_of(&OpRegion::new(
        name("CPUR"),
        OpRegionSpace::SystemMemory,
        &(layout::HOTPLUG_START as u32 + CPUS as u32),
        &max,
    ));
    aml.extend(bytes_of(&Field::new(
        name("CPUR"),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        (0..max).map(|index| named(&cpu_field(index), 8)).collect(),
    )));
    aml
}

fn cpu_methods(index: u32) -> Vec<u8> {
    let register = name(&cpu_field(index));
    let id = u8::try_from(index).unwrap_or(u8::MAX);
    let mut methods = bytes_of(&Method::new(
        name("_STA"),
        0,
        false,
        vec![
            &If::new(
                &And::new(&ZERO, &register, &CPU_PRESENT),
                vec![&Return::new(&STATUS_THERE)],
            ),
            &Else::new(vec![&Return::new(&ZERO)]),
        ],
    ));
    // The MADT's entry of this processor, enabled (ACPI 6.5, 5.2.12.2).
    let entry = BufferData::new(vec![0, 8, id, id, 1, 0, 0, 0]);
    methods.extend(bytes_of(&Name::new(name("_MAT"), &entry)));
    // The boot processor cannot leave.
    if index > 0 {
        methods.extend(bytes_of(&Method::new(
            name("_EJ0"),
            1,
            true,
            vec![&Store::new(&register, &CPU_EJECT)],
        )));
        // What became of an eject (ACPI 6.5, 6.3.5); one that is under way is not over.
        let answered = Store::new(&register, &CPU_ANSWERED);
        let (source, status) = (Arg(0), Arg(1));
        let under_way = Equal::new(&status, &EJECT_IN_PROGRESS);
        let unless = Else::new(vec![&answered]);
        let nothing = If::new(&under_way, Vec::new());
        let asked = Equal::new(&source, &EJECT_REQUEST);
        let own = Equal::new(&source, &OSPM_EJECT);
        methods.extend(bytes_of(&Method::new(
            name("_OST"),
            3,
            true,
            vec![
                &If::new(&asked, vec![&nothing, &unless]),
                &If::new(&own, vec![&nothing, &unless]),
            ],
        )));
    }
    methods
}

fn cpu_scan(max: u32) -> Vec<u8> {
    let mut body = Vec::new();
    for index in 1..max {
        let register = name(&cpu_field(index));
        let cpu = name(&cpu_name(index));
        body.extend(bytes_of(&Store::new(&Local(0), &register)));
        for (bit, value) in [(CPU_INSERTED, DEVICE_CHECK), (CPU_REMOVING, EJECT_REQUEST)] {
            body.extend(bytes_of(&If::new(
                &And::new(&ZERO, &Local(0), &bit),
                vec![&Store::new(&register, &bit), &Notify::new(&cpu, &value)],
            )));
        }
    }
    bytes_of(&Method::new(name("CSCN"), 0, true, vec![&Raw(&body)]))
}

/// Calls a scan when its bit is among the events in Local0.
pub(super) fn on_event(bit: u32, scan: &str) -> Vec<u8> {
    bytes_of(&If::new(
        &And::new(&ZERO, &Local(0), &bit),
        vec![&MethodCall::new(name(scan), Vec::new()) as &dyn Aml],
    ))
}
