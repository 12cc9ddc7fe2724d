//! vCPUs with payloads of a few instructions, on whatever KVM this machine has. (Whether a
//! KVM can run Linux is another matter, which the nested host answers.)

use super::*;
use crate::arch::x86_64::boot::EntryMode;
use crate::arch::x86_64::layout;
use crate::bus::BusDevice;
use crate::events::{EventReceiver, MachineEvent, event_channel};
use crate::memory::{GuestRam, MIN_MEMORY};
use crate::threads::no_hook;
use std::sync::Mutex;
use vm_memory::{Bytes, GuestAddress};

const LONG: Duration = Duration::from_secs(60);
const CODE: u64 = 0x20_0000;

/// Keeps what is written to it; reads as 0x5a.
#[derive(Default)]
struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);

impl BusDevice for Recorder {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0x5a);
    }
    fn write(&self, offset: u64, data: &[u8]) {
        self.0.lock().unwrap().push((offset, data.to_vec()));
    }
}

struct Machine {
    vcpus: VcpuManager,
    events: EventReceiver,
    recorder: Arc<Recorder>,
}

/// A machine whose first vCPU runs `code` in 32-bit mode; ports 0x10.. and 16 bytes of MMIO
/// are recorded. `None` without /dev/kvm.
fn machine(code: &[u8], cpus: u32) -> Option<Machine> {
    let Ok(dev_kvm) = crate::kvm::open_dev_kvm() else {
        eprintln!("skipped: /dev/kvm cannot be opened");
        return None;
    };
    let vm = Arc::new(KvmVm::create(dev_kvm).unwrap());
    let ram = GuestRam::new(MIN_MEMORY).unwrap();
    vm.map_ram(&ram).unwrap();
    ram.memory().write_slice(code, GuestAddress(CODE)).unwrap();
    for (address, entry) in (layout::GDT_START..)
        .step_by(8)
        .zip(state::gdt(EntryMode::Protected))
    {
        ram.memory()
            .write_obj(entry, GuestAddress(address))
            .unwrap();
    }
    let recorder = Arc::new(Recorder::default());
    let (mmio, pio) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
    mmio.insert(layout::PCI_MEM32_START, 16, recorder.clone())
        .unwrap();
    pio.insert(0x10, 16, recorder.clone()).unwrap();
    let (sender, events) = event_channel().unwrap();
    crate::power::attach(&pio, &sender).unwrap();
    let config = VcpuConfig {
        count: cpus,
        boot: cpus,
        pins: Vec::new(),
    };
    let entry = BootEntry::at(EntryMode::Protected, CODE);
    let vcpus = VcpuManager::new(&vm, &config, &mmio, &pio, &entry, &sender, &no_hook()).unwrap();
    Some(Machine {
        vcpus,
        events,
        recorder,
    })
}

impl Machine {
    fn wait_for_event(&self) -> MachineEvent {
        loop {
            if let Some(event) = self.events.try_recv() {
                return event;
            }
            std::thread::yield_now();
        }
    }
}

#[test]
fn port_and_memory_accesses_reach_their_buses() {
    #[rustfmt::skip]
    let code = [
        0xb8, 0x78, 0x56, 0x34, 0x12,             // mov eax, 0x12345678
        0xe7, 0x10,                               // out 0x10, eax
        0xe4, 0x11,                               // in al, 0x11
        0xe6, 0x12,                               // out 0x12, al
        0xa3, 0x04, 0x00, 0x00, 0xc0,             // mov [0xc0000004], eax
        0xba, 0x04, 0x06, 0x00, 0x00,             // mov edx, RESET_PORT
        0xb0, 0x01,                               // mov al, 1
        0xee,                                     // out dx, al
        0xeb, 0xfe,                               // jmp $
    ];
    let Some(mut machine) = machine(&code, 1) else {
        return;
    };
    assert!(
        machine.events.try_recv().is_none(),
        "nothing runs before start"
    );
    assert_eq!(machine.vcpus.counters(), [VcpuCounters::default()]);
    machine.vcpus.start();
    assert!(matches!(machine.wait_for_event(), MachineEvent::Reset));
    machine.vcpus.stop(LONG).unwrap();
    let seen = machine.recorder.0.lock().unwrap();
    assert_eq!(
        *seen,
        [
            (0, vec![0x78, 0x56, 0x34, 0x12]),
            (2, vec![0x5a]),
            (4, vec![0x5a, 0x56, 0x34, 0x12]),
        ]
    );
    let counters = machine.vcpus.counters();
    assert_eq!((counters[0].pio, counters[0].mmio), (4, 1));
}

#[test]
fn vcpus_that_loop_and_vcpus_that_wait_can_be_paused_and_stopped() {
    // jmp $ on the first; the second waits in KVM for its start-up interrupt.
    let Some(mut machine) = machine(&[0xeb, 0xfe], 2) else {
        return;
    };
    machine.vcpus.pause(LONG).unwrap();
    for _ in 0..20 {
        machine.vcpus.start();
        machine.vcpus.pause(LONG).unwrap();
        machine.vcpus.pause(LONG).unwrap();
    }
    machine.vcpus.resume();
    machine.vcpus.stop(LONG).unwrap();
    machine.vcpus.stop(LONG).unwrap();
    assert!(machine.events.try_recv().is_none());
}

#[test]
fn dropping_a_running_machine_ends_its_threads() {
    let Some(machine) = machine(&[0xeb, 0xfe], 2) else {
        return;
    };
    machine.vcpus.start();
    let control = Arc::clone(&machine.vcpus.control);
    drop(machine);
    control
        .wait_while(Duration::ZERO, |phase| phase != Phase::Gone)
        .unwrap();
}

#[test]
fn a_vcpu_that_cannot_go_on_is_reported_and_stays_parked() {
    // int3 without an interrupt table: a triple fault, or an emulator that gives up.
    let Some(mut machine) = machine(&[0xcc], 1) else {
        return;
    };
    machine.vcpus.start();
    match machine.wait_for_event() {
        MachineEvent::TripleFault { vcpu: 0 } => {}
        MachineEvent::VcpuFailed { vcpu: 0, fault } => {
            let text = fault.to_string();
            assert!(text.contains("host") && !text.contains('\n'), "{text}");
        }
        other => panic!("{other:?}"),
    }
    machine.vcpus.pause(LONG).unwrap();
    machine.vcpus.resume();
    machine.vcpus.stop(LONG).unwrap();
    assert!(machine.events.try_recv().is_none(), "it did not run again");
}

#[test]
fn wrong_counts_pins_and_hooks_are_errors() {
    let Ok(dev_kvm) = crate::kvm::open_dev_kvm() else {
        return;
    };
    let vm = Arc::new(KvmVm::create(dev_kvm).unwrap());
    let bus = Arc::new(Bus::new());
    let (sender, _events) = event_channel().unwrap();
    let entry = BootEntry::at(EntryMode::Protected, CODE);
    let make = |count, pins: &[usize], hook: &ThreadHook| {
        let config = VcpuConfig {
            count,
            boot: count,
            pins: pins.to_vec(),
        };
        let error = VcpuManager::new(&vm, &config, &bus, &bus, &entry, &sender, hook).err();
        error.unwrap().to_string()
    };
    assert!(make(0, &[], &no_hook()).contains("give 1 to"));
    assert!(make(100_000, &[], &no_hook()).contains("give 1 to"));
    assert!(make(2, &[0], &no_hook()).contains("one for each"));
    let refuse: ThreadHook = Arc::new(|| Err(std::io::ErrorKind::PermissionDenied.into()));
    assert!(make(1, &[], &refuse).contains("vp-0"));
}

#[test]
fn a_host_cpu_that_does_not_exist_is_an_error() {
    let Ok(dev_kvm) = crate::kvm::open_dev_kvm() else {
        return;
    };
    let vm = Arc::new(KvmVm::create(dev_kvm).unwrap());
    let bus = Arc::new(Bus::new());
    let (sender, _events) = event_channel().unwrap();
    let entry = BootEntry::at(EntryMode::Protected, CODE);
    let config = VcpuConfig {
        count: 1,
        boot: 1,
        pins: vec![100_000],
    };
    let error = VcpuManager::new(&vm, &config, &bus, &bus, &entry, &sender, &no_hook());
    assert!(error.err().unwrap().to_string().contains("pin="));
}
