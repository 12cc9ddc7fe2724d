//! A machine with one virtio function behind a root port, and what a driver does with it.

use std::fs::File;
use std::io::Write;
use std::ops::{Deref, DerefMut};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::memory::MappedMemory;
use vm_memory::{FileOffset, GuestAddress};

use super::super::VirtioPciFunction;
use crate::arch::x86_64::layout;
use crate::bus::Bus;
use crate::hypervisor::MsiMessage;
use crate::pci::mock_hypervisor::{MockHypervisor, consume};
use crate::pci::{AddressRange, PortConfig, RootComplex, Windows};
use crate::vhost_user::test_backend::{Recorder, TestBackend};
use crate::vhost_user::{Frontend, MemoryMap, MemoryRegion};
use crate::virtio::registers::{NOTIFY_MULTIPLIER, bar, common};
use crate::virtio::{ConfigSource, VirtioPciOptions};

pub const PATIENT: Duration = Duration::from_secs(30);
pub const RAM: u64 = 2 << 20;
const BLOCK: u16 = 2;
pub const WINDOWS: Windows = Windows {
    mem32: AddressRange {
        start: layout::PCI_MEM32_START,
        size: layout::PCI_MEM32_SIZE,
    },
    mem64: AddressRange {
        start: 0x1_0000_0000,
        size: layout::PCI_MEM64_SIZE,
    },
};
pub const BAR: u64 = layout::PCI_MEM32_START + 0x10_0000;

/// Guest memory in a file of its own.
#[derive(Clone)]
pub struct Ram {
    pub file: Arc<File>,
    pub memory: MappedMemory,
    /// Regions that come and go, by address.
    pub more: Arc<Mutex<Vec<u64>>>,
}

impl Ram {
    pub fn new() -> Self {
        let name = c"ram";
        let file = rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(file);
        file.set_len(RAM).unwrap();
        let file = Arc::new(file);
        let offset = FileOffset::from_arc(Arc::clone(&file), 0);
        let range = (GuestAddress(0), RAM as usize, Some(offset));
        let memory = MappedMemory::from_ranges_with_files([range]).unwrap();
        let more = Arc::default();
        Self { file, memory, more }
    }
}

impl MemoryMap for Ram {
    fn regions(&self) -> Vec<MemoryRegion> {
        let more = self.more.lock().unwrap();
        let bases = std::iter::once(0).chain(more.iter().copied());
        bases
            .map(|guest_base| MemoryRegion {
                guest_base,
                size: RAM,
                file: Arc::clone(&self.file),
                file_offset: 0,
            })
            .collect()
    }

    fn memory(&self) -> &MappedMemory {
        &self.memory
    }
}

/// A machine with one function behind its only port.
pub struct Machine {
    pub mmio: Arc<Bus>,
    pub complex: Arc<RootComplex>,
    pub hypervisor: Arc<MockHypervisor>,
    pub function: Arc<VirtioPciFunction>,
}

/// A machine whose device is a recording one.
pub struct Guest {
    pub machine: Machine,
    pub backend: TestBackend,
    pub ram: Ram,
}

impl Deref for Guest {
    type Target = Machine;
    fn deref(&self) -> &Machine {
        &self.machine
    }
}

impl DerefMut for Guest {
    fn deref_mut(&mut self) -> &mut Machine {
        &mut self.machine
    }
}

pub fn options() -> VirtioPciOptions {
    VirtioPciOptions {
        config: ConfigSource::Backend(8),
        ..VirtioPciOptions::new("disk0", BLOCK, 2)
    }
}

pub fn guest() -> Guest {
    guest_with(options())
}

pub const CONFIG: [u8; 8] = [1, 2, 3, 4, 5, 6, 7, 8];

pub fn guest_with(options: VirtioPciOptions) -> Guest {
    guest_of(options, &CONFIG, |_| {})
}

/// A guest in front of a back-end that `change` has made another one.
pub fn guest_of(
    options: VirtioPciOptions,
    config: &[u8],
    change: impl FnOnce(&mut Recorder),
) -> Guest {
    let (backend, socket) = TestBackend::start_with(config, change);
    let ram = Ram::new();
    let machine = machine(options, socket, Arc::new(ram.clone()));
    Guest {
        machine,
        backend,
        ram,
    }
}

/// A machine in front of the back-end at the other end of `socket`.
pub fn machine(
    options: VirtioPciOptions,
    socket: UnixStream,
    memory: Arc<dyn MemoryMap>,
) -> Machine {
    let frontend = Frontend::connect(socket, PATIENT).unwrap();
    machine_in_front_of(options, Some(frontend), memory)
}

/// A machine in front of a back-end, or of none.
pub fn machine_in_front_of(
    options: VirtioPciOptions,
    frontend: Option<Frontend>,
    memory: Arc<dyn MemoryMap>,
) -> Machine {
    let (mmio, pio) = (Arc::new(Bus::new()), Bus::new());
    let port = PortConfig {
        name: "hp1".to_owned(),
        device: 1,
        slot: 1,
        hotplug: true,
    };
    let complex = RootComplex::new(Arc::clone(&mmio), WINDOWS, &[port]).unwrap();
    complex.attach_to_buses(&mmio, &pio).unwrap();
    let hypervisor = Arc::new(MockHypervisor::default());
    let decoder = complex.decoder();
    let function =
        VirtioPciFunction::new(options, frontend, memory, hypervisor.clone(), decoder).unwrap();
    complex.attach("hp1", function.clone()).unwrap();
    Machine {
        mmio,
        complex,
        hypervisor,
        function,
    }
}

impl Machine {
    pub fn read(&self, address: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        self.mmio.read(address, &mut data[..len]);
        u64::from_le_bytes(data)
    }

    /// A guest write: KVM looks at its doorbells first.
    pub fn write(&self, address: u64, len: usize, value: u64) {
        if !self.hypervisor.write(address) {
            self.mmio.write(address, &value.to_le_bytes()[..len]);
        }
    }

    pub fn config(register: u64) -> u64 {
        layout::ECAM_START | 1 << 20 | register
    }

    /// Offset of a capability; of kind `kind` when it is virtio's.
    pub fn capability(&self, id: u64, kind: u64) -> u64 {
        let mut at = self.read(Self::config(0x34), 1);
        while at != 0 {
            let found = self.read(Self::config(at), 1);
            if found == id && (id != 9 || self.read(Self::config(at + 3), 1) == kind) {
                return at;
            }
            at = self.read(Self::config(at + 1), 1);
        }
        panic!("no capability {id:#x} {kind}");
    }

    /// Puts BAR 0 at [`BAR`] and enables memory decoding.
    pub fn map(&self) {
        self.write(Self::config(0x10), 4, BAR);
        self.write(Self::config(0x04), 2, 6);
    }

    /// Enables MSI-X and gives each vector the message (0xfee00000, 0x40 + vector).
    pub fn enable_interrupts(&self) {
        let msix = self.capability(0x11, 0);
        self.write(Self::config(msix + 2), 2, 0x8000);
        for vector in 0..3 {
            let entry = BAR + bar::MSIX_TABLE + 16 * vector;
            self.write(entry, 4, 0xfee0_0000);
            self.write(entry + 8, 4, 0x40 + vector);
            self.write(entry + 12, 4, 0);
        }
    }

    pub fn common(&self, register: u64, len: usize) -> u64 {
        self.read(BAR + bar::COMMON + register, len)
    }

    pub fn set_common(&self, register: u64, len: usize, value: u64) {
        self.write(BAR + bar::COMMON + register, len, value);
    }

    pub fn negotiate(&self) -> u64 {
        self.set_common(common::DEVICE_STATUS, 1, 0);
        assert_eq!(self.common(common::DEVICE_STATUS, 1), 0);
        self.set_common(common::DEVICE_STATUS, 1, 3);
        for half in 0..2 {
            self.set_common(common::DEVICE_FEATURE_SELECT, 4, half);
            self.set_common(common::DRIVER_FEATURE_SELECT, 4, half);
            let offered = self.common(common::DEVICE_FEATURE, 4);
            self.set_common(common::DRIVER_FEATURE, 4, offered);
        }
        self.set_common(common::DEVICE_STATUS, 1, 11);
        self.common(common::DEVICE_STATUS, 1)
    }

    pub fn set_up_queue(&self, queue: u64, descriptor: u64) {
        self.set_common(common::QUEUE_SELECT, 2, queue);
        self.set_common(common::QUEUE_DESC, 8, descriptor);
        self.set_common(common::QUEUE_DRIVER, 8, descriptor + 0x1000);
        self.set_common(common::QUEUE_DEVICE, 8, descriptor + 0x2000);
        self.set_common(common::QUEUE_VECTOR, 2, queue + 1);
        self.set_common(common::QUEUE_ENABLE, 2, 1);
    }

    /// All that Linux does until DRIVER_OK, with both queues.
    pub fn bring_up(&self) {
        self.map();
        self.enable_interrupts();
        assert_eq!(self.negotiate(), 11);
        self.set_common(common::CONFIG_VECTOR, 2, 0);
        self.set_up_queue(0, 0x1_0000);
        self.set_up_queue(1, 0x2_0000);
        self.set_common(common::DEVICE_STATUS, 1, 15);
    }

    pub fn device_status(&self) -> u8 {
        self.common(common::DEVICE_STATUS, 1) as u8
    }

    pub fn interrupts(&self) -> Vec<u32> {
        let injected = self.hypervisor.injected();
        injected
            .iter()
            .map(|MsiMessage { data, .. }| *data)
            .collect()
    }
}

impl Guest {
    pub fn kick_arrived(&self, queue: usize) -> bool {
        consume(self.backend.lock().rings[queue].kick.as_ref().unwrap())
    }

    pub fn complete(&self, queue: usize) {
        let recorder = self.backend.lock();
        let call = recorder.rings[queue].call.as_ref();
        call.unwrap().write_all(&1_u64.to_ne_bytes()).unwrap();
    }
}

pub fn doorbell(queue: u64) -> u64 {
    BAR + bar::NOTIFY + queue * u64::from(NOTIFY_MULTIPLIER)
}
