//! What the driver is told about the device: feature bits (virtio 1.2, 5.1.3), struct
//! virtio_net_config (5.1.4), and how accepted bits become TUNSETOFFLOAD's flags.

use crate::filter::Mac;

/// VIRTIO_NET_F_CSUM
pub const F_CSUM: u64 = 1;
/// VIRTIO_NET_F_GUEST_CSUM
pub const F_GUEST_CSUM: u64 = 1 << 1;
/// VIRTIO_NET_F_CTRL_GUEST_OFFLOADS
pub const F_CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
/// VIRTIO_NET_F_MTU
pub const F_MTU: u64 = 1 << 3;
/// VIRTIO_NET_F_MAC
pub const F_MAC: u64 = 1 << 5;
/// VIRTIO_NET_F_GUEST_TSO4
pub const F_GUEST_TSO4: u64 = 1 << 7;
/// VIRTIO_NET_F_GUEST_TSO6
pub const F_GUEST_TSO6: u64 = 1 << 8;
/// VIRTIO_NET_F_GUEST_ECN
pub const F_GUEST_ECN: u64 = 1 << 9;
/// VIRTIO_NET_F_GUEST_UFO
pub const F_GUEST_UFO: u64 = 1 << 10;
/// VIRTIO_NET_F_HOST_TSO4
pub const F_HOST_TSO4: u64 = 1 << 11;
/// VIRTIO_NET_F_HOST_TSO6
pub const F_HOST_TSO6: u64 = 1 << 12;
/// VIRTIO_NET_F_HOST_ECN
pub const F_HOST_ECN: u64 = 1 << 13;
/// VIRTIO_NET_F_HOST_UFO
pub const F_HOST_UFO: u64 = 1 << 14;
/// VIRTIO_NET_F_MRG_RXBUF
pub const F_MRG_RXBUF: u64 = 1 << 15;
/// VIRTIO_NET_F_STATUS
pub const F_STATUS: u64 = 1 << 16;
/// VIRTIO_NET_F_CTRL_VQ
pub const F_CTRL_VQ: u64 = 1 << 17;
/// VIRTIO_NET_F_CTRL_RX
pub const F_CTRL_RX: u64 = 1 << 18;
/// VIRTIO_NET_F_CTRL_VLAN
pub const F_CTRL_VLAN: u64 = 1 << 19;
/// VIRTIO_NET_F_GUEST_ANNOUNCE
pub const F_GUEST_ANNOUNCE: u64 = 1 << 21;
/// VIRTIO_NET_F_MQ
pub const F_MQ: u64 = 1 << 22;
/// VIRTIO_NET_F_CTRL_MAC_ADDR
pub const F_CTRL_MAC_ADDR: u64 = 1 << 23;
/// VIRTIO_NET_F_GUEST_USO4
pub const F_GUEST_USO4: u64 = 1 << 54;
/// VIRTIO_NET_F_GUEST_USO6
pub const F_GUEST_USO6: u64 = 1 << 55;
/// VIRTIO_NET_F_HOST_USO
pub const F_HOST_USO: u64 = 1 << 56;

/// VIRTIO_NET_S_LINK_UP
pub const S_LINK_UP: u16 = 1;
/// VIRTIO_NET_S_ANNOUNCE
pub const S_ANNOUNCE: u16 = 2;

/// What a driver may switch by CTRL_GUEST_OFFLOADS; the bits are those of the features.
pub const GUEST_OFFLOADS: u64 = F_GUEST_CSUM
    | F_GUEST_TSO4
    | F_GUEST_TSO6
    | F_GUEST_ECN
    | F_GUEST_UFO
    | F_GUEST_USO4
    | F_GUEST_USO6;

/// Each offload bit that a guest takes, with TUNSETOFFLOAD's flag for it and the feature by
/// which a guest hands the same kind of frame to the host.
const OFFLOADS: [(u64, u32, u64); 7] = [
    (F_GUEST_CSUM, libc::TUN_F_CSUM, F_CSUM),
    (F_GUEST_TSO4, libc::TUN_F_TSO4, F_HOST_TSO4),
    (F_GUEST_TSO6, libc::TUN_F_TSO6, F_HOST_TSO6),
    (F_GUEST_ECN, libc::TUN_F_TSO_ECN, F_HOST_ECN),
    (F_GUEST_UFO, libc::TUN_F_UFO, F_HOST_UFO),
    (F_GUEST_USO4, libc::TUN_F_USO4, F_HOST_USO),
    (F_GUEST_USO6, libc::TUN_F_USO6, F_HOST_USO),
];

/// TUNSETOFFLOAD's flags for the offloads that the guest takes.
pub fn tap_flags(offloads: u64) -> u32 {
    let mut flags = 0;
    for (guest, tap, _) in OFFLOADS {
        if offloads & guest != 0 {
            flags |= tap;
        }
    }
    // The kernel knows the datagram offload of both address families only together.
    const USO: u32 = libc::TUN_F_USO4 | libc::TUN_F_USO6;
    if flags & USO != USO {
        flags &= !USO;
    }
    // Congestion marks concern segments only.
    if flags & (libc::TUN_F_TSO4 | libc::TUN_F_TSO6) == 0 {
        flags &= !libc::TUN_F_TSO_ECN;
    }
    // Nothing is cut up for a guest that cannot finish checksums.
    if flags & libc::TUN_F_CSUM == 0 {
        flags = 0;
    }
    flags
}

/// Whether a driver that accepted these features may hand over a frame with these `flags` and
/// this `gso_type` in its header (virtio 1.2, 5.1.6.2.1).
pub fn permits(accepted: u64, flags: u8, gso_type: u8) -> bool {
    const NEEDS_CSUM: u8 = 1;
    const ECN: u8 = 0x80;
    let kind = match gso_type & !ECN {
        0 => 0,
        1 => F_HOST_TSO4,
        3 => F_HOST_UFO,
        4 => F_HOST_TSO6,
        5 => F_HOST_USO,
        _ => return false,
    };
    let marks = if gso_type & ECN == 0 { 0 } else { F_HOST_ECN };
    let sum = if flags & NEEDS_CSUM == 0 { 0 } else { F_CSUM };
    let needed = kind | marks | sum;
    accepted & needed == needed
}

/// What the device is, as far as features and configuration tell.
#[derive(Clone, Copy, Debug)]
pub struct Traits {
    /// Queue pairs.
    pub pairs: u16,
    /// MTU to tell the driver.
    pub mtu: Option<u16>,
    /// TUN_F_ bits that the tap takes.
    pub offloads: u32,
    /// The kernel moves the frames, and filters none.
    pub kernel: bool,
}

/// The kind's feature bits.
pub fn offered(traits: &Traits) -> u64 {
    let mut bits = F_MAC
        | F_STATUS
        | F_MRG_RXBUF
        | F_CTRL_VQ
        | F_CTRL_RX
        | F_CTRL_VLAN
        | F_CTRL_MAC_ADDR
        | F_GUEST_ANNOUNCE;
    if traits.kernel {
        bits &= !(F_CTRL_RX | F_CTRL_VLAN);
    }
    if traits.mtu.is_some() {
        bits |= F_MTU;
    }
    if traits.pairs > 1 {
        bits |= F_MQ;
    }
    for (guest, tap, host) in OFFLOADS {
        if traits.offloads & tap != 0 {
            bits |= guest | host | F_CTRL_GUEST_OFFLOADS;
        }
    }
    bits
}

/// The configuration space, up to and with mtu; little-endian.
pub fn space(traits: &Traits, mac: &Mac, status: u16) -> Vec<u8> {
    let mut space = Vec::with_capacity(12);
    space.extend(mac);
    space.extend(status.to_le_bytes());
    space.extend(traits.pairs.to_le_bytes());
    space.extend(traits.mtu.unwrap_or(0).to_le_bytes());
    space
}

/// Offset of the MAC address in the configuration space, and its end.
pub const MAC_FIELD: std::ops::Range<usize> = 0..6;

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u32 = 0x7f;

    #[test]
    fn a_tap_without_offloads_offers_none() {
        let traits = Traits {
            pairs: 1,
            mtu: None,
            offloads: 0,
            kernel: true,
        };
        let bits = offered(&traits);
        assert_eq!(
            bits & (GUEST_OFFLOADS | F_CSUM | F_HOST_TSO4 | F_HOST_USO),
            0
        );
        assert_eq!(bits & (F_MTU | F_MQ | F_CTRL_GUEST_OFFLOADS), 0);
        assert_eq!(bits & (F_CTRL_RX | F_CTRL_VLAN), 0, "vhost-net cannot");
        assert_ne!(bits & F_MRG_RXBUF, 0);
    }

    #[test]
    fn every_offload_of_the_tap_is_offered_both_ways() {
        let traits = Traits {
            pairs: 4,
            mtu: Some(9000),
            offloads: ALL,
            kernel: false,
        };
        let bits = offered(&traits);
        assert_eq!(bits & GUEST_OFFLOADS, GUEST_OFFLOADS);
        let host = F_CSUM | F_HOST_TSO4 | F_HOST_TSO6 | F_HOST_ECN | F_HOST_UFO | F_HOST_USO;
        assert_eq!(bits & host, host);
        let more = F_MTU | F_MQ | F_CTRL_RX | F_CTRL_VLAN;
        assert_eq!(bits & more, more);
        assert_eq!(
            space(&traits, &[1, 2, 3, 4, 5, 6], S_LINK_UP),
            [1, 2, 3, 4, 5, 6, 1, 0, 4, 0, 0x28, 0x23]
        );
    }

    #[test]
    fn flags_for_the_tap_follow_what_the_guest_takes() {
        assert_eq!(tap_flags(GUEST_OFFLOADS), ALL);
        assert_eq!(tap_flags(0), 0);
        assert_eq!(tap_flags(F_GUEST_TSO4), 0, "not without checksums");
        assert_eq!(tap_flags(F_GUEST_CSUM | F_GUEST_TSO4), 3);
        assert_eq!(tap_flags(F_GUEST_CSUM | F_GUEST_USO4), 1, "both or none");
    }

    #[test]
    fn each_kind_of_unfinished_frame_has_its_feature() {
        let kinds = [
            (0, 1, F_HOST_TSO4),
            (0, 3, F_HOST_UFO),
            (0, 4, F_HOST_TSO6),
            (0, 5, F_HOST_USO),
            (1, 0, F_CSUM),
            (1, 5, F_HOST_USO | F_CSUM),
            (1, 0x81, F_HOST_TSO4 | F_HOST_ECN | F_CSUM),
        ];
        for (flags, gso, needed) in kinds {
            assert!(permits(needed, flags, gso) && permits(!0, flags, gso));
            assert!(!permits(0, flags, gso), "{flags} {gso}");
            assert!(!permits(!(1 << needed.trailing_zeros()), flags, gso));
        }
        assert!(permits(0, 0, 0) && permits(0, 2, 0));
        for unknown in [2, 6, 0x7f] {
            assert!(!permits(!0, 0, unknown));
        }
    }
}
