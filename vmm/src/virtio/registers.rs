//! Numbers of VIRTIO 1.2: feature bits (section 6), device status (2.1), the common
//! configuration structure (4.1.4.3) and our layout of BAR 0.
//!
//! BAR 0 is 32-bit and not prefetchable: reading the ISR status has a side effect, so the
//! registers must not be prefetched, and a bridge forwards what is not prefetchable only
//! through its 32-bit window. Every structure has pages of its own.

/// VIRTIO_F_VERSION_1.
pub const F_VERSION_1: u64 = 1 << 32;
const F_INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO_F_EVENT_IDX.
pub const F_EVENT_IDX: u64 = 1 << 29;
const F_IN_ORDER: u64 = 1 << 35;
const F_ORDER_PLATFORM: u64 = 1 << 36;
const DEVICE_TYPE_FEATURES: u64 = 0x00ff_ffff | !((1 << 50) - 1);

/// The features that may be passed on from a device process to the driver: those of the
/// device type, and those of rings and transport that need nothing of this function.
/// Not: packed rings, platform access (an IOMMU), ring reset, notification data, and the
/// bits that vhost-user has for itself.
pub const PASSED_ON: u64 = DEVICE_TYPE_FEATURES
    | F_VERSION_1
    | F_INDIRECT_DESC
    | F_EVENT_IDX
    | F_IN_ORDER
    | F_ORDER_PLATFORM;

/// Feature bits of a network device (section 5.1.3).
pub mod net {
    /// The device has a maximum MTU to tell.
    pub const F_MTU: u64 = 1 << 3;
    /// The device has an address.
    pub const F_MAC: u64 = 1 << 5;
    /// The driver can merge receive buffers.
    pub const F_MRG_RXBUF: u64 = 1 << 15;
    /// The configuration space has a status.
    pub const F_STATUS: u64 = 1 << 16;
    /// There is a control queue.
    pub const F_CTRL_VQ: u64 = 1 << 17;
    /// The driver can announce itself.
    pub const F_GUEST_ANNOUNCE: u64 = 1 << 21;
    /// Several queue pairs, chosen by a control command.
    pub const F_MQ: u64 = 1 << 22;
    /// VIRTIO_NET_F_SPEED_DUPLEX, HASH_REPORT, RSS and STANDBY need a larger configuration
    /// space or a partner.
    pub const WITHHELD: u64 = 1 << 63 | 1 << 62 | 1 << 60 | 1 << 57;
    /// What is carried out by control commands: CTRL_GUEST_OFFLOADS, CTRL_VQ, CTRL_RX,
    /// CTRL_VLAN, CTRL_RX_EXTRA, GUEST_ANNOUNCE, CTRL_MAC_ADDR, and those from 50 on
    /// (DEVICE_STATS, VQ_NOTF_COAL, NOTF_COAL, GUEST_HDRLEN aside, RSC_EXT).
    pub const CONTROLLED: u64 =
        1 << 2 | 1 << 17 | 1 << 18 | 1 << 19 | 1 << 20 | 1 << 21 | 1 << 23 | 0b111 << 50 | 1 << 53;
}

/// Device status bits.
pub mod status {
    /// The guest has a driver for the device.
    pub const DRIVER: u8 = 2;
    /// The driver is ready to drive the device.
    pub const DRIVER_OK: u8 = 4;
    /// Feature negotiation is complete.
    pub const FEATURES_OK: u8 = 8;
    /// The device has failed and needs a reset.
    pub const NEEDS_RESET: u8 = 64;
    /// The guest has given the device up.
    pub const FAILED: u8 = 128;
}

/// Offsets in the common configuration structure.
pub mod common {
    /// device_feature_select
    pub const DEVICE_FEATURE_SELECT: u64 = 0;
    /// device_feature
    pub const DEVICE_FEATURE: u64 = 4;
    /// driver_feature_select
    pub const DRIVER_FEATURE_SELECT: u64 = 8;
    /// driver_feature
    pub const DRIVER_FEATURE: u64 = 12;
    /// config_msix_vector
    pub const CONFIG_VECTOR: u64 = 16;
    /// num_queues
    pub const NUM_QUEUES: u64 = 18;
    /// device_status
    pub const DEVICE_STATUS: u64 = 20;
    /// queue_select
    pub const QUEUE_SELECT: u64 = 22;
    /// queue_size
    pub const QUEUE_SIZE: u64 = 24;
    /// queue_msix_vector
    pub const QUEUE_VECTOR: u64 = 26;
    /// queue_enable
    pub const QUEUE_ENABLE: u64 = 28;
    /// queue_notify_off
    pub const QUEUE_NOTIFY_OFF: u64 = 30;
    /// queue_desc
    pub const QUEUE_DESC: u64 = 32;
    /// queue_driver
    pub const QUEUE_DRIVER: u64 = 40;
    /// queue_device
    pub const QUEUE_DEVICE: u64 = 48;
    /// Length without queue_notify_data and queue_reset, which are not offered.
    pub const LENGTH: u64 = 56;
}

/// ISR status bit: the configuration changed.
pub const ISR_CONFIG: u8 = 2;

/// Distance of two queues' doorbells.
pub const NOTIFY_MULTIPLIER: u32 = 4;

/// Where each structure lies in BAR 0.
pub mod bar {
    /// Size of BAR 0.
    pub const SIZE: u64 = 0x8000;
    /// Common configuration.
    pub const COMMON: u64 = 0x0000;
    /// ISR status.
    pub const ISR: u64 = 0x1000;
    /// Device-specific configuration; bytes past the device's own read as zero.
    pub const DEVICE: u64 = 0x2000;
    /// MSI-X table: room for 256 vectors.
    pub const MSIX_TABLE: u64 = 0x3000;
    /// MSI-X pending bits.
    pub const MSIX_PBA: u64 = 0x4000;
    /// Doorbells.
    pub const NOTIFY: u64 = 0x5000;
    /// Pages per structure.
    pub const STEP: u64 = 0x1000;
}
