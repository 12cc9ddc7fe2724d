//! MSI-X against a hypervisor that treats eventfds as KVM does.

use super::*;
use crate::pci::mock_hypervisor::MockHypervisor;
use proptest::prelude::*;

const ENABLE: u16 = CONTROL_ENABLE;
const ADDRESS: u64 = 0xfee0_1000;

fn made(vectors: u16) -> (Msix, Arc<MockHypervisor>) {
    let hypervisor = Arc::new(MockHypervisor::default());
    (Msix::new(vectors, hypervisor.clone()).unwrap(), hypervisor)
}

/// Programs and unmasks a vector as Linux does: address, data, then the mask bit.
fn unmask(msix: &Msix, vector: u16, data: u32) {
    let entry = u64::from(vector) * VECTOR_ENTRY_SIZE;
    msix.write_table(entry, &(ADDRESS as u32).to_le_bytes());
    msix.write_table(entry + 4, &0_u32.to_le_bytes());
    msix.write_table(entry + 8, &data.to_le_bytes());
    msix.write_table(entry + 12, &0_u32.to_le_bytes());
}

fn mask(msix: &Msix, vector: u16) {
    let entry = u64::from(vector) * VECTOR_ENTRY_SIZE;
    msix.write_table(entry + 12, &1_u32.to_le_bytes());
}

fn signal(event: BorrowedFd<'_>) {
    rustix::io::write(event, &1_u64.to_ne_bytes()).unwrap();
}

fn pending(msix: &Msix) -> u64 {
    let mut bits = [0; 8];
    msix.read_pba(0, &mut bits);
    u64::from_le_bytes(bits)
}

fn message(data: u32) -> MsiMessage {
    MsiMessage {
        address: ADDRESS,
        data,
    }
}

#[test]
fn an_unmasked_vector_delivers_without_us() {
    let (msix, hypervisor) = made(3);
    msix.set_control(ENABLE);
    unmask(&msix, 1, 0x41);
    signal(msix.event(1).unwrap());
    assert_eq!(hypervisor.injected(), [message(0x41)]);
    assert_eq!(pending(&msix), 0);
    assert_eq!((hypervisor.gsis(), hypervisor.irqfds()), (1, 1));
    drop(msix);
    assert_eq!((hypervisor.gsis(), hypervisor.irqfds()), (0, 0));
}

#[test]
fn a_masked_vector_pends_and_is_delivered_when_unmasked() {
    let (msix, hypervisor) = made(3);
    msix.set_control(ENABLE);
    unmask(&msix, 2, 7);
    mask(&msix, 2);
    signal(msix.event(2).unwrap());
    assert!(hypervisor.injected().is_empty());
    assert_eq!(pending(&msix), 1 << 2);
    unmask(&msix, 2, 8);
    assert_eq!(hypervisor.injected(), [message(8)]);
    assert_eq!(pending(&msix), 0);
}

#[test]
fn function_mask_and_enable_act_on_all_vectors() {
    let (msix, hypervisor) = made(2);
    unmask(&msix, 0, 1);
    unmask(&msix, 1, 2);
    assert_eq!(hypervisor.irqfds(), 0, "not enabled");
    msix.set_control(ENABLE | CONTROL_FUNCTION_MASK);
    assert_eq!(hypervisor.irqfds(), 0, "masked as a whole");
    signal(msix.event(0).unwrap());
    signal(msix.event(1).unwrap());
    assert_eq!(pending(&msix), 0b11);
    msix.set_control(ENABLE);
    assert_eq!(hypervisor.injected(), [message(1), message(2)]);
    msix.set_control(0);
    signal(msix.event(1).unwrap());
    assert_eq!(pending(&msix), 0b10);
    assert!(hypervisor.injected().is_empty());
}

#[test]
fn a_message_rewritten_while_unmasked_takes_effect() {
    let (msix, hypervisor) = made(1);
    msix.set_control(ENABLE);
    unmask(&msix, 0, 1);
    msix.write_table(8, &9_u32.to_le_bytes());
    signal(msix.event(0).unwrap());
    assert_eq!(hypervisor.injected(), [message(9)]);
}

#[test]
fn our_own_interrupt_follows_its_vector_and_its_mask() {
    let (msix, hypervisor) = made(2);
    msix.set_control(ENABLE);
    assert!(msix.set_own_vector(Some(0)));
    msix.signal_own();
    assert_eq!(pending(&msix), 1);
    unmask(&msix, 0, 5);
    assert_eq!(hypervisor.injected(), [message(5)]);
    assert_eq!(hypervisor.irqfds(), 2);
    unmask(&msix, 1, 6);
    assert!(msix.set_own_vector(Some(1)), "shared with a queue's vector");
    msix.signal_own();
    msix.signal_own();
    assert_eq!(hypervisor.injected(), [message(6)]);
    assert!(!msix.set_own_vector(Some(2)), "no such vector");
    msix.signal_own();
    assert!(hypervisor.injected().is_empty());
}

#[test]
fn a_full_eventfd_blocks_neither_the_table_nor_our_own_signal() {
    let (msix, hypervisor) = made(1);
    msix.set_control(ENABLE);
    msix.set_own_vector(Some(0));
    // What a hostile device process can do: fill it and make it blocking.
    let shared = msix.event(0).unwrap();
    rustix::io::write(shared, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    rustix::io::ioctl_fionbio(shared, false).unwrap();
    rustix::io::write(&msix.own_event, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    msix.signal_own();
    assert_eq!(pending(&msix), 1);
    unmask(&msix, 0, 3);
    assert_eq!(hypervisor.injected().len(), 2);
}

#[test]
fn without_a_gsi_a_vector_stays_silent_and_recovers() {
    let (msix, hypervisor) = made(2);
    hypervisor.limit_gsis(1);
    msix.set_control(ENABLE);
    unmask(&msix, 0, 1);
    unmask(&msix, 1, 2);
    signal(msix.event(1).unwrap());
    assert_eq!(pending(&msix), 0b10);
    hypervisor.limit_gsis(2);
    mask(&msix, 1);
    unmask(&msix, 1, 2);
    assert_eq!(hypervisor.injected(), [message(2)]);
}

#[test]
fn vector_counts_are_bounded() {
    for vectors in [0, MAX_VECTORS + 1, u16::MAX] {
        let refused = Msix::new(vectors, Arc::new(MockHypervisor::default()));
        assert_eq!(refused.err(), Some(PciError::BadVectorCount(vectors)));
    }
}

#[derive(Clone, Debug)]
enum Access {
    Write(u64, Vec<u8>),
    Read(u64, usize),
    Control(u16),
    Own(Option<u16>),
    Signal(u16),
    SignalOwn,
    Reset,
}

fn access() -> impl Strategy<Value = Access> {
    let offset = prop_oneof![0_u64..80, any::<u64>()];
    let bytes = proptest::collection::vec(prop_oneof![Just(0_u8), any::<u8>()], 1..9);
    prop_oneof![
        4 => (offset.clone(), bytes).prop_map(|(at, bytes)| Access::Write(at, bytes)),
        1 => (offset, 1_usize..9).prop_map(|(at, len)| Access::Read(at, len)),
        2 => any::<u16>().prop_map(Access::Control),
        1 => proptest::option::of(0_u16..6).prop_map(Access::Own),
        2 => (0_u16..4).prop_map(Access::Signal),
        1 => Just(Access::SignalOwn),
        1 => Just(Access::Reset),
    ]
}

proptest! {
    /// The mock panics on double wiring, on letting go of what is not wired, on an
    /// interrupt without a route and on a freed GSI in use.
    #[test]
    fn any_accesses_leave_wiring_consistent_and_lose_no_interrupt(
        accesses in proptest::collection::vec(access(), 0..80)
    ) {
        let (msix, hypervisor) = made(4);
        let mut signalled = 0_u64;
        for access in accesses {
            match access {
                Access::Write(at, bytes) => msix.write_table(at, &bytes),
                Access::Read(at, len) => {
                    msix.read_table(at, &mut vec![0; len]);
                    msix.read_pba(at, &mut vec![0; len]);
                }
                Access::Control(control) => msix.set_control(control),
                Access::Own(vector) => prop_assert_eq!(
                    msix.set_own_vector(vector), vector.is_none_or(|vector| vector < 4)
                ),
                Access::Signal(vector) => {
                    signal(msix.event(vector).unwrap());
                    signalled |= 1 << vector;
                }
                Access::SignalOwn => msix.signal_own(),
                Access::Reset => msix.reset(),
            }
        }
        hypervisor.injected();
        // What is still pending is there when everything is unmasked.
        msix.set_own_vector(None);
        let left = pending(&msix) & signalled;
        for vector in 0..4 {
            mask(&msix, vector);
        }
        msix.set_control(ENABLE);
        for vector in 0..4_u16 {
            unmask(&msix, vector, u32::from(vector));
        }
        let seen = hypervisor.injected();
        for vector in 0..4_u32 {
            prop_assert!(left & 1 << vector == 0 || seen.contains(&message(vector)));
        }
        prop_assert_eq!(pending(&msix), 0);
        drop(msix);
        prop_assert_eq!((hypervisor.gsis(), hypervisor.irqfds()), (0, 0));
    }
}
