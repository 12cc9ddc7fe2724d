//! Virtio devices of somebody else's by name (VIRTIO 1.2 section 5), for `--vhost-user
//! kind=NAME` and for the API's list of devices: what a kind's back-end is driven with when
//! the configuration does not say. Read by the command line and the manager thread.

/// A virtio device type.
#[derive(Debug, PartialEq, Eq)]
pub struct ExternalKind {
    /// As `--vhost-user kind=` names it.
    pub name: &'static str,
    /// Virtio device id.
    pub virtio_id: u16,
    /// Queues, where nothing is said: what every back-end of the kind has.
    pub queues: u16,
}

/// Those whose back-ends exist (virtiofsd, vhost-device-*, QEMU's contrib).
static KINDS: [ExternalKind; 14] = [
    kind("net", 1, 2),
    kind("blk", 2, 1),
    kind("console", 3, 2),
    kind("rng", 4, 1),
    kind("scsi", 8, 3),
    kind("gpu", 16, 2),
    kind("input", 18, 2),
    kind("vsock", 19, 3),
    kind("crypto", 20, 2),
    kind("sound", 25, 4),
    kind("fs", 26, 2),
    kind("scmi", 32, 2),
    kind("i2c", 34, 1),
    kind("gpio", 41, 2),
];

const fn kind(name: &'static str, virtio_id: u16, queues: u16) -> ExternalKind {
    ExternalKind {
        name,
        virtio_id,
        queues,
    }
}

/// The kind of this name.
pub fn by_name(name: &str) -> Option<&'static ExternalKind> {
    KINDS.iter().find(|k| k.name == name)
}

/// The kind with this virtio device id.
pub fn by_id(virtio_id: u32) -> Option<&'static ExternalKind> {
    KINDS.iter().find(|k| u32::from(k.virtio_id) == virtio_id)
}

/// All names, for a line.
pub fn names() -> String {
    KINDS.each_ref().map(|k| k.name).join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_are_those_of_the_specification_and_unique() {
        assert_eq!(by_name("fs").map(|k| k.virtio_id), Some(26));
        assert_eq!(by_id(19).map(|k| k.name), Some("vsock"));
        assert_eq!(by_id(63), None);
        for (index, kind) in KINDS.iter().enumerate() {
            assert!((1..=63).contains(&kind.virtio_id) && kind.queues > 0);
            assert!(
                KINDS
                    .iter()
                    .skip(index + 1)
                    .all(|k| k.virtio_id != kind.virtio_id && k.name != kind.name)
            );
        }
    }
}
