//! The register file under a well-behaved driver and under any other.

use proptest::prelude::*;

use super::*;

const OFFERED: u64 = F_VERSION_1 | 1 << 28 | 0x46;

fn registers() -> CommonConfig {
    CommonConfig::new(OFFERED, 2, 256, 3)
}

fn read(common: &CommonConfig, offset: u64, len: usize) -> u64 {
    let mut data = [0; 8];
    common.read(offset, &mut data[..len], false, 0);
    u64::from_le_bytes(data)
}

fn accept(common: &mut CommonConfig, features: u64) {
    for (which, half) in [(0_u32, features as u32), (1, (features >> 32) as u32)] {
        common.write(reg::DRIVER_FEATURE_SELECT, &which.to_le_bytes());
        common.write(reg::DRIVER_FEATURE, &half.to_le_bytes());
    }
}

#[test]
fn a_driver_negotiates_and_sets_up_a_queue() {
    let mut common = registers();
    assert_eq!(common.write(reg::DEVICE_STATUS, &[1]), Effect::None);
    common.write(reg::DEVICE_STATUS, &[3]);
    assert_eq!(read(&common, reg::DEVICE_FEATURE, 4), OFFERED & 0xffff_ffff);
    common.write(reg::DEVICE_FEATURE_SELECT, &1_u32.to_le_bytes());
    assert_eq!(read(&common, reg::DEVICE_FEATURE, 4), OFFERED >> 32);
    common.write(reg::DEVICE_FEATURE_SELECT, &2_u32.to_le_bytes());
    assert_eq!(read(&common, reg::DEVICE_FEATURE, 4), 0);
    accept(&mut common, F_VERSION_1 | 2);
    common.write(reg::DEVICE_STATUS, &[11]);
    assert_eq!(read(&common, reg::DEVICE_STATUS, 1), 11);
    assert_eq!(read(&common, reg::NUM_QUEUES, 2), 2);
    common.write(reg::QUEUE_SELECT, &1_u16.to_le_bytes());
    assert_eq!(read(&common, reg::QUEUE_SIZE, 2), 256);
    assert_eq!(read(&common, reg::QUEUE_NOTIFY_OFF, 2), 1);
    common.write(reg::QUEUE_SIZE, &128_u16.to_le_bytes());
    common.write(reg::QUEUE_DESC, &0x1000_u32.to_le_bytes());
    common.write(reg::QUEUE_DESC + 4, &1_u32.to_le_bytes());
    common.write(reg::QUEUE_DRIVER, &0x1_0000_2000_u64.to_le_bytes());
    common.write(reg::QUEUE_DEVICE, &0x3000_u32.to_le_bytes());
    let vector = common.write(reg::QUEUE_VECTOR, &2_u16.to_le_bytes());
    let expected = Effect::QueueVector {
        queue: 1,
        vector: 2,
    };
    assert_eq!(vector, expected);
    common.write(reg::QUEUE_ENABLE, &1_u16.to_le_bytes());
    assert_eq!(common.write(reg::DEVICE_STATUS, &[15]), Effect::Activate);
    assert_eq!(
        common.write(reg::DEVICE_STATUS, &[15]),
        Effect::None,
        "once"
    );
    let queues: Vec<_> = common.queues().map(|(_, queue)| *queue).collect();
    assert!(!queues[0].enabled);
    let expected = Queue {
        size: 128,
        vector: 2,
        enabled: true,
        descriptor: 0x1_0000_1000,
        driver: 0x1_0000_2000,
        device: 0x3000,
    };
    assert_eq!(queues[1], expected);
    assert_eq!(common.write(reg::DEVICE_STATUS, &[0]), Effect::Reset);
    common.reset();
    assert_eq!(read(&common, reg::DEVICE_STATUS, 1), 0);
    assert_eq!(common.accepted(), 0);
}

#[test]
fn features_that_were_not_offered_and_legacy_drivers_are_refused() {
    for features in [F_VERSION_1 | 1 << 34, F_VERSION_1 | 1, 2] {
        let mut common = registers();
        accept(&mut common, features);
        common.write(reg::DEVICE_STATUS, &[11]);
        assert_eq!(common.status(), 3);
        assert_eq!(common.write(reg::DEVICE_STATUS, &[15]), Effect::None);
        assert_eq!(common.status(), 3, "no DRIVER_OK without FEATURES_OK");
    }
    let mut common = registers();
    common.set_usable(false);
    accept(&mut common, F_VERSION_1);
    common.write(reg::DEVICE_STATUS, &[11]);
    assert_eq!(common.status(), 3, "no device behind it");
    common.set_usable(true);
    common.write(reg::DEVICE_STATUS, &[11]);
    accept(&mut common, F_VERSION_1 | 4);
    assert_eq!(common.accepted(), F_VERSION_1, "settled by FEATURES_OK");
}

#[test]
fn sizes_vectors_and_queues_are_bounded() {
    let mut common = registers();
    for bad in [0_u16, 3, 255, 512, u16::MAX] {
        common.write(reg::QUEUE_SIZE, &bad.to_le_bytes());
        assert_eq!(read(&common, reg::QUEUE_SIZE, 2), 256);
    }
    common.write(reg::CONFIG_VECTOR, &3_u16.to_le_bytes());
    assert_eq!(read(&common, reg::CONFIG_VECTOR, 2), u64::from(NO_VECTOR));
    common.write(reg::QUEUE_ENABLE, &1_u16.to_le_bytes());
    common.write(reg::QUEUE_DESC, &0x1000_u32.to_le_bytes());
    common.write(reg::QUEUE_ENABLE, &0_u16.to_le_bytes());
    assert_eq!(read(&common, reg::QUEUE_ENABLE, 2), 1);
    assert_eq!(
        read(&common, reg::QUEUE_DESC, 8),
        0,
        "enabled queues are fixed"
    );
    common.write(reg::QUEUE_SELECT, &2_u16.to_le_bytes());
    assert_eq!(read(&common, reg::QUEUE_SIZE, 2), 0, "no such queue");
    common.write(reg::QUEUE_ENABLE, &1_u16.to_le_bytes());
    assert_eq!(read(&common, reg::QUEUE_ENABLE, 2), 0);
}

#[test]
fn needs_reset_is_shown_only_to_a_driver_that_is_there() {
    let mut common = registers();
    let mut data = [0; 2];
    common.read(reg::DEVICE_STATUS, &mut data, true, 7);
    assert_eq!(data, [0, 7]);
    common.write(reg::DEVICE_STATUS, &[1]);
    common.read(reg::DEVICE_STATUS, &mut data, true, 7);
    assert_eq!(data, [1 | status::NEEDS_RESET, 7]);
    common.write(reg::DEVICE_STATUS, &[1 | status::NEEDS_RESET]);
    assert_eq!(common.status(), 1, "the driver cannot set it");
}

proptest! {
    #[test]
    fn no_sequence_of_writes_breaks_the_rules(
        writes in proptest::collection::vec(
            (
                prop_oneof![0_u64..64, any::<u64>()],
                prop_oneof![
                    Just(1_usize), Just(2), Just(4), Just(8), 1_usize..9
                ],
                prop_oneof![any::<u64>(), 0_u64..16, Just(OFFERED), Just(OFFERED >> 32)],
            ),
            0..200,
        )
    ) {
        let mut common = registers();
        for (offset, len, value) in writes {
            let before: Vec<_> = common.queues().map(|(_, queue)| *queue).collect();
            let effect = common.write(offset, &value.to_le_bytes()[..len]);
            if effect == Effect::Activate {
                prop_assert!(common.driver_ok());
                prop_assert_eq!(common.accepted() & !OFFERED, 0);
                prop_assert_ne!(common.accepted() & F_VERSION_1, 0);
            }
            for ((_, queue), before) in common.queues().zip(before) {
                prop_assert!(queue.size.is_power_of_two() && queue.size <= 256);
                prop_assert!(queue.vector < 3 || queue.vector == NO_VECTOR);
                if before.enabled {
                    prop_assert_eq!(Queue { vector: before.vector, ..*queue }, before);
                }
            }
            prop_assert_eq!(common.status() & status::NEEDS_RESET, 0);
            if effect == Effect::Reset {
                common.reset();
            }
            let mut data = [0; 8];
            common.read(offset, &mut data[..len], true, 0);
        }
    }
}
