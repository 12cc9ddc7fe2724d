//! MAC addresses of network devices (IEEE 802; VIRTIO 1.2 section 5.1.4): how they are
//! written, which may be given to a device, and which one a device gets that names none.
//! Used by the command line, the API's checks and the manager thread.
//!
//! An address that is not given is made from the device's id, what it is attached to (the
//! name of its tap, the path of its socket) and the host (/etc/machine-id), so that it is the
//! same at every start, differs between two machines on one bridge (whose taps are not in
//! namespaces of their own, with the same name), and is unlikely to be met on another host. It is a locally administered unicast address: bit 1 of the first byte is
//! set, bit 0 is clear; the other 46 bits are a hash.

use std::fmt;
use std::str::FromStr;

/// The address of one network device: unicast and not zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MacAddress([u8; 6]);

/// Why bytes or text are not the address of one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MacError {
    /// It is not six bytes.
    #[error("is no MAC address: give six bytes in hexadecimal, such as 52:54:00:12:34:56")]
    Malformed,
    /// The group bit is set.
    #[error("is a multicast address: give one whose first byte is even")]
    Multicast,
    /// Nobody's address.
    #[error("is the zero address: leave it out to have one made, or give another")]
    Zero,
}

impl MacAddress {
    /// Six bytes as an address.
    ///
    /// # Errors
    /// When they cannot be the address of one device.
    pub fn new(bytes: &[u8]) -> Result<Self, MacError> {
        let bytes: [u8; 6] = bytes.try_into().map_err(|_| MacError::Malformed)?;
        match bytes {
            [0, 0, 0, 0, 0, 0] => Err(MacError::Zero),
            [first, ..] if first & 1 != 0 => Err(MacError::Multicast),
            _ => Ok(Self(bytes)),
        }
    }

    /// As they stand in a configuration space.
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }

    /// An address of its own for each sequence of words.
    pub fn derived(words: &[&str]) -> Self {
        // FNV-1a over the words, each ended by a byte that UTF-8 does not have, then
        // splitmix64's finish, since FNV alone leaves similar words similar.
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        for byte in words.iter().flat_map(|w| w.bytes().chain([0xff])) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
        hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let [a, b, c, d, e, f, ..] = (hash ^ (hash >> 31)).to_be_bytes();
        Self([(a & 0xfc) | 2, b, c, d, e, f])
    }
}

impl FromStr for MacAddress {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let bytes = text
            .split(':')
            .map(|pair| {
                let plain = pair.len() == 2 && pair.bytes().all(|b| b.is_ascii_hexdigit());
                plain.then(|| u8::from_str_radix(pair, 16).ok()).flatten()
            })
            .collect::<Option<Vec<u8>>>()
            .ok_or(MacError::Malformed)?;
        Self::new(&bytes)
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&format(&self.0))
    }
}

/// Any address as people write it; what is not six bytes is shown as it is.
pub fn format(bytes: &[u8]) -> String {
    let pairs: Vec<String> = bytes.iter().take(32).map(|b| format!("{b:02x}")).collect();
    pairs.join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_address_round_trip() {
        let mac: MacAddress = "52:54:00:aB:cd:0f".parse().unwrap();
        assert_eq!(mac.bytes(), [0x52, 0x54, 0, 0xab, 0xcd, 0x0f]);
        assert_eq!(mac.to_string(), "52:54:00:ab:cd:0f");
        for bad in [
            "",
            "52",
            "52:54:00:ab:cd",
            "52:54:00:ab:cd:0f:01",
            "5254:00:ab:cd:0f",
            "52-54-00-ab-cd-0f",
            "+2:54:00:ab:cd:0f",
            "52:54:00:ab:cd:0g",
        ] {
            assert_eq!(bad.parse::<MacAddress>(), Err(MacError::Malformed), "{bad}");
        }
        assert_eq!(
            "00:00:00:00:00:00".parse::<MacAddress>(),
            Err(MacError::Zero)
        );
        for group in ["01:00:5e:00:00:fb", "ff:ff:ff:ff:ff:ff"] {
            assert_eq!(group.parse::<MacAddress>(), Err(MacError::Multicast));
        }
        assert_eq!(MacAddress::new(&[]), Err(MacError::Malformed));
    }

    #[test]
    fn derived_addresses_are_local_stable_and_different() {
        let mut seen = std::collections::BTreeSet::new();
        for id in ["net0", "net1", "lan", "a", ""] {
            for place in ["tap0", "tap1", "/run/s"] {
                let mac = MacAddress::derived(&["host", place, id]);
                assert_eq!(mac, MacAddress::derived(&["host", place, id]));
                assert_eq!(MacAddress::new(&mac.bytes()), Ok(mac));
                assert_eq!(mac.bytes()[0] & 3, 2);
                assert!(seen.insert(mac.bytes()), "{id} {place}");
            }
        }
        // The border between two words counts.
        assert_ne!(
            MacAddress::derived(&["ab", "c"]),
            MacAddress::derived(&["a", "bc"])
        );
        // Never again another: guests and leases know it.
        assert_eq!(
            MacAddress::derived(&["", "tap0", "net0"]).to_string(),
            "aa:b0:a1:7f:19:f3"
        );
    }
}
