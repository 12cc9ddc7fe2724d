//! The root complex as a guest's enumeration meets it.

use std::sync::Mutex;

use super::*;
use crate::pci::BarKind;

const WINDOWS: Windows = Windows {
    mem32: AddressRange {
        start: layout::PCI_MEM32_START,
        size: layout::PCI_MEM32_SIZE,
    },
    mem64: AddressRange {
        start: 0x2_0000_0000,
        size: layout::PCI_MEM64_SIZE,
    },
};

struct Plain {
    id: &'static str,
    space: Mutex<ConfigSpace>,
    placed: Mutex<Vec<Option<u64>>>,
    resets: Mutex<u32>,
    unplugged: Mutex<bool>,
    /// Where its driver lets go of it.
    held: Mutex<Option<u64>>,
}

fn plain(id: &'static str) -> Arc<Plain> {
    let identity = Identity {
        vendor: 0x1af4,
        device: 0x1042,
        revision: 1,
        class: 0x01_8000,
        header_type: 0,
    };
    Arc::new(Plain {
        id,
        space: Mutex::new(ConfigSpace::new(identity, 6)),
        placed: Mutex::default(),
        resets: Mutex::default(),
        unplugged: Mutex::default(),
        held: Mutex::default(),
    })
}

impl PciFunction for Plain {
    fn id(&self) -> &str {
        self.id
    }
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.space.lock().unwrap().read(offset, data);
    }
    fn config_write(&self, offset: u16, data: &[u8]) {
        self.space.lock().unwrap().write(offset, data);
    }
    fn place_bars(&self, place: &mut dyn FnMut(BarKind, u64) -> Option<u64>) {
        let wanted = [
            (BarKind::Memory32, 0x8000),
            (BarKind::Memory32, 0x10_0000),
            (BarKind::Memory32, 0x40_0000),
            (BarKind::Prefetchable64, 0x10_0000),
        ];
        *self.placed.lock().unwrap() = wanted.map(|(kind, size)| place(kind, size)).to_vec();
    }
    fn bus_reset(&self) {
        *self.resets.lock().unwrap() += 1;
    }
    fn unplug(&self) {
        *self.unplugged.lock().unwrap() = true;
    }
    fn release_register(&self) -> Option<u64> {
        *self.held.lock().unwrap()
    }
}

fn port(name: &str, device: u8) -> PortConfig {
    PortConfig {
        name: name.to_owned(),
        device,
        slot: u16::from(device),
        hotplug: true,
    }
}

struct Guest {
    mmio: Arc<Bus>,
    pio: Bus,
    complex: Arc<RootComplex>,
}

fn guest(ports: &[PortConfig]) -> Guest {
    let (mmio, pio) = (Arc::new(Bus::new()), Bus::new());
    let complex = RootComplex::new(Arc::clone(&mmio), WINDOWS, ports).unwrap();
    complex.attach_to_buses(&mmio, &pio).unwrap();
    Guest { mmio, pio, complex }
}

impl Guest {
    fn ecam(bus: u8, device: u8, register: u64) -> u64 {
        layout::ECAM_START | u64::from(bus) << 20 | u64::from(device) << 15 | register
    }
    fn read32(&self, bus: u8, device: u8, register: u64) -> u32 {
        let mut data = [0; 4];
        assert!(self.mmio.read(Self::ecam(bus, device, register), &mut data));
        u32::from_le_bytes(data)
    }
    fn write(&self, bus: u8, device: u8, register: u64, data: &[u8]) {
        assert!(self.mmio.write(Self::ecam(bus, device, register), data));
    }
}

#[test]
fn enumeration_finds_bridge_ports_and_functions_and_nothing_else() {
    let guest = guest(&[port("hp1", 1), port("hp5", 5)]);
    guest.complex.attach("hp5", plain("disk0")).unwrap();
    let mut found = Vec::new();
    for bus in 0..=255_u8 {
        for device in 0..32_u8 {
            for function in 0..8_u64 {
                let identity = guest.read32(bus, device, function << 12);
                if identity != u32::MAX {
                    found.push((bus, device, function, identity));
                }
            }
        }
    }
    let expected = [
        (0, 0, 0, 0x0008_1b36),
        (0, 1, 0, 0x000c_1b36),
        (0, 5, 0, 0x000c_1b36),
        (2, 0, 0, 0x1042_1af4),
    ];
    assert_eq!(found, expected);
    assert_eq!(guest.complex.last_bus(), 2);
    let devices = guest.complex.devices();
    assert_eq!(devices.len(), 1);
    assert_eq!(devices[0].address.to_string(), "0000:02:00.0");
    assert_eq!(
        (devices[0].id.as_str(), devices[0].port.as_str()),
        ("disk0", "hp5")
    );
    assert_eq!(devices[0].class, 0x01_8000);
}

#[test]
fn ports_are_bridges_with_programmed_numbers_windows_and_a_slot() {
    let guest = guest(&[port("a", 1), port("b", 2)]);
    assert_eq!(guest.read32(0, 2, 0x08) >> 8, 0x06_0400);
    assert_eq!(guest.read32(0, 2, 0x0c) >> 16 & 0xff, 1, "header type");
    assert_eq!(guest.read32(0, 2, 0x18), 0x0002_0200);
    let base = (layout::PCI_MEM32_START + (2 << 20)) as u32;
    let memory = guest.read32(0, 2, 0x20);
    assert_eq!(memory << 16, base);
    assert_eq!(memory & 0xfff0_0000, base + (1 << 20), "the last MiB");
    let prefetchable = guest.read32(0, 2, 0x24);
    assert_eq!(prefetchable & 0x000f_000f, 0x0001_0001, "64-bit");
    assert_eq!(guest.read32(0, 2, 0x28), 2);
    // No I/O window: writes do not stick.
    guest.write(0, 2, 0x1c, &[0xf0, 0xf0]);
    assert_eq!(guest.read32(0, 2, 0x1c) & 0xffff, 0);
    // The PCI Express capability: root port, slot implemented, its number.
    let capability = u64::from(guest.read32(0, 2, 0x34) & 0xff);
    let header = guest.read32(0, 2, capability);
    assert_eq!((header & 0xff, header >> 16), (0x10, 0x0142));
    let slot = guest.read32(0, 2, capability + 0x14);
    assert_eq!(slot >> 19, 2);
    assert_eq!(slot & 1 << 6, 0, "hot-plug is ACPI's");
    guest.complex.attach("b", plain("x")).unwrap();
    assert_ne!(
        guest.read32(0, 2, capability + 0x18) & 1 << 22,
        0,
        "presence"
    );
    assert_ne!(guest.read32(0, 2, capability + 0x10) & 1 << 29, 0, "link");
}

#[test]
fn routing_follows_renumbered_buses() {
    let guest = guest(&[port("a", 1), port("b", 2)]);
    guest.complex.attach("a", plain("one")).unwrap();
    // Linux with pci=assign-busses: numbers cleared, then given anew.
    guest.write(0, 1, 0x18, &[0, 0, 0, 0]);
    assert_eq!(guest.read32(1, 0, 0), u32::MAX);
    guest.write(0, 1, 0x19, &[0x42]);
    guest.write(0, 1, 0x1a, &[0x42]);
    assert_eq!(guest.read32(0x42, 0, 0), 0x1042_1af4);
    assert_eq!(guest.complex.devices()[0].address.bus, 0x42);
    // Two ports with the same number: one answers, nothing breaks.
    guest.write(0, 2, 0x19, &[0x42]);
    assert_eq!(guest.read32(0x42, 0, 0), 0x1042_1af4);
}

#[test]
fn cf8_reaches_the_same_registers_and_needs_its_enable_bit() {
    let guest = guest(&[port("a", 3)]);
    let select = |value: u32| assert!(guest.pio.write(0xcf8, &value.to_le_bytes()));
    let mut data = [0; 4];
    guest.pio.read(0xcfc, &mut data);
    assert_eq!(data, [0xff; 4], "nothing selected");
    select(1 << 31 | 3 << 11);
    guest.pio.read(0xcfc, &mut data);
    assert_eq!(u32::from_le_bytes(data), 0x000c_1b36);
    let mut half = [0; 2];
    guest.pio.read(0xcfe, &mut half);
    assert_eq!(u16::from_le_bytes(half), 0x000c);
    guest.pio.read(0xcff, &mut half);
    assert_eq!(half, [0xff; 2], "crosses the data register");
    select(1 << 31 | 3 << 11 | 0x3c);
    guest.pio.write(0xcfc, &[0x5a]);
    assert_eq!(guest.read32(0, 3, 0x3c) & 0xff, 0x5a);
    guest.pio.read(0xcf8, &mut data);
    assert_eq!(u32::from_le_bytes(data), 1 << 31 | 3 << 11 | 0x3c);
    guest.pio.write(0xcf9, &[6]);
    guest.pio.read(0xcf8, &mut data);
    assert_eq!(
        u32::from_le_bytes(data),
        1 << 31 | 3 << 11 | 0x3c,
        "CF9 is not ours"
    );
}

#[test]
fn odd_accesses_to_ecam_are_cut_into_bytes() {
    let guest = guest(&[port("a", 1)]);
    let mut data = [0; 4];
    guest.mmio.read(Guest::ecam(0, 1, 1), &mut data);
    assert_eq!(data, [0x1b, 0x0c, 0x00, 0x06]);
    guest.mmio.read(Guest::ecam(0, 1, 0xffe), &mut data);
    assert_eq!(data, [0, 0, 0xff, 0xff], "the next function is absent");
    let mut eight = [0; 8];
    guest.mmio.read(Guest::ecam(0, 1, 0), &mut eight);
    assert_eq!(eight[..4], [0x36, 0x1b, 0x0c, 0x00]);
}

#[test]
fn functions_come_and_go_behind_named_ports() {
    let guest = guest(&[port("a", 1)]);
    let function = plain("disk");
    let missing = PciError::NoSuchPort("z".to_owned());
    assert_eq!(guest.complex.attach("z", function.clone()), Err(missing));
    guest.complex.attach("a", function.clone()).unwrap();
    let placed = function.placed.lock().unwrap().clone();
    let start = layout::PCI_MEM32_START;
    assert_eq!(placed[0], Some(start));
    assert_eq!(placed[1], Some(start + 0x10_0000), "aligned to its size");
    assert_eq!(placed[2], None, "no room");
    assert_eq!(placed[3], Some(WINDOWS.mem64.start));
    let occupied = PciError::Occupied("a".to_owned());
    assert_eq!(guest.complex.attach("a", plain("other")), Err(occupied));
    assert!(guest.complex.ports()[0].occupied);
    guest.write(0, 1, 0x3e, &[0x40, 0]);
    guest.write(0, 1, 0x3e, &[0x40, 0]);
    guest.write(0, 1, 0x3e, &[0, 0]);
    assert_eq!(*function.resets.lock().unwrap(), 1, "once per rising edge");
    let empty = Some(PciError::Empty("a".to_owned()));
    let other = guest.complex.detach("a", &plain("other"));
    assert_eq!(other.err(), empty, "another one stays");
    let removed = guest.complex.detach("a", &function).unwrap();
    assert_eq!(removed.id(), "disk");
    assert!(*function.unplugged.lock().unwrap());
    assert_eq!(guest.read32(1, 0, 0), u32::MAX);
    assert_eq!(guest.complex.detach("a", &function).err(), empty);
    guest.complex.attach("a", function).unwrap();
}

#[test]
fn nothing_follows_what_was_pulled_out_until_the_guest_has_let_go() {
    let guest = guest(&[port("a", 1)]);
    let register = layout::PCI_MEM32_START + 20;
    let vacating = |yes: bool| {
        assert_eq!(guest.complex.ports()[0].vacating, yes);
        let found = guest.complex.attach("a", plain("next"));
        match found {
            Err(why) => assert!(yes && why == PciError::Vacating("a".to_owned()), "{why}"),
            Ok(_) => assert!(!yes),
        }
    };
    // Its driver holds it: that it looks whether something is there does not matter.
    let held = plain("held");
    *held.held.lock().unwrap() = Some(register);
    guest.complex.attach("a", held.clone()).unwrap();
    guest.complex.detach_by_surprise("a", &held).unwrap();
    assert_eq!(guest.read32(1, 0, 0), u32::MAX);
    vacating(true);
    for (at, value) in [(register, 1), (register + 1, 0)] {
        assert!(guest.mmio.write(at, &[value]));
    }
    vacating(true);
    assert!(guest.mmio.write(register, &[0]));
    let mut status = [0xff];
    assert!(guest.mmio.read(register, &mut status));
    assert_eq!(status, [0], "the driver waits for this");
    vacating(false);
    // Nobody holds the next: the guest only has to find that it is gone.
    let next = guest.complex.ports.first().and_then(RootPort::function);
    let next = next.unwrap();
    guest.complex.detach_by_surprise("a", &next).unwrap();
    vacating(true);
    assert_eq!(guest.read32(1, 0, 8), u32::MAX, "another register");
    vacating(true);
    assert_eq!(guest.read32(1, 0, 0), u32::MAX);
    vacating(false);
    // One that is pulled before it was ever looked at, and detached in order.
    let last = guest.complex.ports.first().and_then(RootPort::function);
    guest.complex.detach("a", &last.unwrap()).unwrap();
    assert!(!guest.complex.ports()[0].vacating);
}

#[test]
fn after_a_reset_all_is_as_before_the_guest_with_what_is_plugged_in_now() {
    let guest = guest(&[port("a", 1), port("b", 2)]);
    let (first, second) = (plain("first"), plain("second"));
    guest.complex.attach("a", first.clone()).unwrap();
    let registers =
        |device: u8| -> Vec<u32> { (0..64).map(|n| guest.read32(0, device, n * 4)).collect() };
    let (with, without) = (registers(1), registers(2));
    let placed = first.placed.lock().unwrap().clone();
    // A guest with ideas of its own, and devices that came and went.
    for device in [1, 2] {
        guest.write(0, device, 0x04, &[0; 2]);
        guest.write(0, device, 0x18, &[0, device + 7, device + 7]);
        guest.write(0, device, 0x20, &0x0000_fff0_u32.to_le_bytes());
        guest.write(0, device, 0x24, &0x0000_fff0_u32.to_le_bytes());
    }
    guest
        .pio
        .write(layout::PCI_CF8_PORT, &(1_u32 << 31 | 1 << 11).to_le_bytes());
    *first.held.lock().unwrap() = Some(layout::PCI_MEM32_START);
    guest.complex.detach_by_surprise("a", &first).unwrap();
    guest.complex.attach("b", second.clone()).unwrap();
    assert!(guest.complex.ports()[0].vacating);
    assert_eq!(*second.placed.lock().unwrap(), [None; 4]);
    guest.complex.reset();
    assert_eq!(*second.resets.lock().unwrap(), 1);
    assert!(!guest.complex.ports()[0].vacating);
    let shift = |address: u64, by: u64| Some(address + by);
    let share = (WINDOWS.mem64.size / PORT_SHARES) & !(WINDOW_GRANULE - 1);
    let expected: Vec<Option<u64>> = placed
        .iter()
        .zip([PORT_MEMORY, PORT_MEMORY, PORT_MEMORY, share])
        .map(|(place, by)| place.and_then(|place| shift(place, by)))
        .collect();
    assert_eq!(*second.placed.lock().unwrap(), expected);
    let mut address = [0xff; 4];
    guest.pio.read(layout::PCI_CF8_PORT, &mut address);
    assert_eq!(address, [0; 4]);
    // The same again the other way round, which is how it began.
    guest.complex.detach("b", &second).unwrap();
    guest.complex.attach("a", plain("third")).unwrap();
    assert_eq!((registers(1), registers(2)), (with, without));
}

#[test]
fn a_full_bus_of_31_ports_fits_and_bad_ports_are_refused() {
    let all: Vec<_> = (1..=31)
        .map(|device| port(&format!("p{device}"), device))
        .collect();
    let full = guest(&all);
    assert_eq!(full.complex.ports().len(), 31);
    assert_eq!(full.complex.last_bus(), 31);
    for bad in [
        vec![port("a", 0)],
        vec![port("a", 32)],
        vec![port("a", 1), port("a", 2)],
        vec![port("a", 1), port("b", 1)],
        vec![port("", 1)],
        vec![PortConfig {
            slot: 0x2000,
            ..port("a", 1)
        }],
        vec![
            port("a", 1),
            PortConfig {
                slot: 1,
                ..port("b", 2)
            },
        ],
    ] {
        let refused = RootComplex::new(Arc::new(Bus::new()), WINDOWS, &bad);
        assert!(matches!(refused, Err(PciError::BadPort { .. })), "{bad:?}");
    }
    let narrow = Windows {
        mem32: AddressRange {
            start: 0xc000_0000,
            size: 4 << 20,
        },
        ..WINDOWS
    };
    let refused = RootComplex::new(Arc::new(Bus::new()), narrow, &all[..3]);
    assert_eq!(refused.err(), Some(PciError::WindowsTooSmall { ports: 3 }));
}
