//! Any sequence of guest accesses.

use proptest::prelude::*;

use super::super::{EventSource, Outcome};
use super::guest::*;
use crate::arch::x86_64::layout;
use crate::vhost_user::Frontend;
use crate::vhost_user::test_backend::TestBackend;
use crate::virtio::VirtioPciOptions;
use crate::virtio::registers::bar;

#[derive(Clone, Debug)]
enum Access {
    Config(u64, usize, u64),
    Port(u64, usize, u64),
    Bar(u64, usize, u64),
    Event(u32),
    BringUp,
    Die,
    Succeed,
}

fn access() -> impl Strategy<Value = Access> {
    let len = prop_oneof![Just(1_usize), Just(2), Just(4), Just(8), 1_usize..9];
    let value = prop_oneof![
        any::<u64>(),
        0_u64..16,
        Just(BAR),
        (0_u64..0x4_0000).prop_map(|page| page << 14),
    ];
    let config = prop_oneof![0_u64..0x100, 0_u64..0x1000];
    let bar_offset = prop_oneof![
        0_u64..64,
        (0_u64..6, 0_u64..64).prop_map(|(page, at)| page * bar::STEP + at),
        0_u64..bar::SIZE,
    ];
    prop_oneof![
        3 => (config.clone(), len.clone(), value.clone()).prop_map(|(a, l, v)| Access::Config(a, l, v)),
        1 => (config, len.clone(), value.clone()).prop_map(|(a, l, v)| Access::Port(a, l, v)),
        5 => (bar_offset, len, value).prop_map(|(a, l, v)| Access::Bar(a, l, v)),
        1 => (0_u32..3).prop_map(Access::Event),
        1 => Just(Access::BringUp),
        1 => Just(Access::Die),
        1 => Just(Access::Succeed),
    ]
}

fn succeed(guest: &mut Guest) {
    let (backend, socket) = TestBackend::start(&CONFIG);
    let frontend = Frontend::connect(socket, PATIENT).unwrap();
    guest.function.reconnect(frontend).unwrap();
    guest.backend = backend;
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    /// Nothing a guest writes makes a panic, maps anything outside the windows, or leaves
    /// a doorbell where the BAR is not, whatever becomes of the device process meanwhile; and
    /// the device comes up again after it.
    #[test]
    fn no_guest_access_breaks_the_function(
        accesses in proptest::collection::vec(access(), 0..60)
    ) {
        let options = VirtioPciOptions { successor: true, ..options() };
        let mut guest = guest_with(options);
        for access in accesses {
            match access {
                Access::Config(at, len, value) => {
                    guest.write(Machine::config(at), len, value);
                    guest.read(Machine::config(at), len);
                }
                Access::Port(at, len, value) => {
                    let port = layout::ECAM_START | 1 << 15;
                    guest.write(port | at, len, value);
                    guest.read(port | at, len);
                }
                Access::Bar(at, len, value) => {
                    let base = guest.function.bar_address().unwrap_or(BAR);
                    guest.write(base + at, len, value);
                    guest.read(base + at, len);
                }
                Access::Event(queue) => {
                    let outcome = guest.function.on_event(EventSource::RingError(queue as u16));
                    prop_assert!(matches!(outcome, Outcome::Handled | Outcome::Suspended(_)));
                }
                Access::BringUp => {
                    guest.write(layout::ECAM_START | 1 << 15 | 0x18, 4, 0x0001_0100);
                    guest.bring_up();
                }
                Access::Die => {
                    guest.backend.die();
                    guest.function.on_event(EventSource::Hangup);
                }
                Access::Succeed => succeed(&mut guest),
            }
            let base = guest.function.bar_address();
            if let Some(base) = base {
                let inside = WINDOWS.mem32.contains(base, bar::SIZE)
                    || WINDOWS.mem64.contains(base, bar::SIZE);
                prop_assert!(inside);
            }
            let expected: Vec<_> = base.into_iter()
                .flat_map(|base| [0, 4].map(|queue| base + bar::NOTIFY + queue))
                .collect();
            prop_assert_eq!(guest.hypervisor.doorbells(), expected);
        }
        succeed(&mut guest);
        guest.write(layout::ECAM_START | 1 << 15 | 0x18, 4, 0x0001_0100);
        guest.bring_up();
        prop_assert_eq!(guest.device_status(), 15);
        guest.interrupts();
        guest.complete(1);
        prop_assert_eq!(guest.interrupts(), [0x42]);
    }
}
