//! The question and the answer as bytes: netlink(7), rtnetlink(7).

use std::io;

/// struct nlmsghdr and struct ifinfomsg.
const HEADER: usize = 16;
const LINK: usize = 16;
/// struct rtattr.
const ATTRIBUTE: usize = 4;

/// IFLA_IFNAME, IFLA_MTU, IFLA_LINKINFO; IFLA_INFO_KIND, IFLA_INFO_DATA; IFLA_TUN_OWNER, IFLA_TUN_TYPE,
/// IFLA_TUN_NUM_QUEUES, IFLA_TUN_NUM_DISABLED_QUEUES.
const NAME: u16 = 3;
const MTU: u16 = 4;
const LINK_INFO: u16 = 18;
const INFO_KIND: u16 = 1;
const INFO_DATA: u16 = 2;
const OWNER: u16 = 1;
const MODE: u16 = 3;
const NUM_QUEUES: u16 = 8;
const NUM_DISABLED_QUEUES: u16 = 9;
/// NLA_TYPE_MASK
const TYPE: u16 = 0x3fff;

/// A tun or tap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tun {
    /// Ethernet frames, not packets of layer 3.
    pub tap: bool,
    /// Who may attach to it besides the privileged.
    pub owner: Option<u32>,
    /// How many queues are attached somewhere, those that are switched off included. `None`: it
    /// is made for one queue, and the kernel lets nobody attach while somebody is.
    pub queues: Option<u32>,
    /// Its MTU, as the host's side has it.
    pub mtu: u32,
}

/// RTM_GETLINK by an interface's name; `None` where it can be none.
pub fn question(name: &str, number: u32) -> Option<Vec<u8>> {
    if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.contains('\0') {
        return None;
    }
    let mut attribute = Vec::new();
    let len = ATTRIBUTE.checked_add(name.len())?.checked_add(1)?;
    attribute.extend_from_slice(&u16::try_from(len).ok()?.to_ne_bytes());
    attribute.extend_from_slice(&NAME.to_ne_bytes());
    attribute.extend_from_slice(name.as_bytes());
    attribute.resize(len.next_multiple_of(4), 0);
    let whole = HEADER.checked_add(LINK)?.checked_add(attribute.len())?;
    let mut bytes = u32::try_from(whole).ok()?.to_ne_bytes().to_vec();
    bytes.extend_from_slice(&libc::RTM_GETLINK.to_ne_bytes());
    let flags = u16::try_from(libc::NLM_F_REQUEST).ok()?;
    bytes.extend_from_slice(&flags.to_ne_bytes());
    bytes.extend_from_slice(&number.to_ne_bytes());
    bytes.resize(HEADER.checked_add(LINK)?, 0);
    bytes.append(&mut attribute);
    Some(bytes)
}

/// What the kernel answers to this question; `None` if the bytes are no answer to it.
pub fn answer(bytes: &[u8], number: u32) -> Option<io::Result<Option<Tun>>> {
    let (header, rest) = bytes.split_at_checked(HEADER)?;
    let length = usize::try_from(u32::from_ne_bytes(*header.first_chunk()?)).ok()?;
    let kind = u16::from_ne_bytes(*header.get(4..)?.first_chunk()?);
    if u32::from_ne_bytes(*header.get(8..)?.first_chunk()?) != number {
        return None;
    }
    if i32::from(kind) == libc::NLMSG_ERROR {
        let errno = i32::from_ne_bytes(*rest.first_chunk()?);
        return Some(Err(io::Error::from_raw_os_error(errno.wrapping_neg())));
    }
    if kind != libc::RTM_NEWLINK {
        return None;
    }
    let attributes = bytes.get(HEADER.checked_add(LINK)?..length.min(bytes.len()))?;
    Some(Ok(tun(attributes)))
}

fn tun(attributes: &[u8]) -> Option<Tun> {
    let info = find(attributes, LINK_INFO)?;
    if find(info, INFO_KIND)?.strip_suffix(b"\0") != Some(b"tun") {
        return None;
    }
    let data = find(info, INFO_DATA)?;
    let read = |all, kind| Some(u32::from_ne_bytes(*find(all, kind)?.first_chunk()?));
    let number = |kind| read(data, kind);
    let disabled = number(NUM_DISABLED_QUEUES).unwrap_or(0);
    Some(Tun {
        tap: i32::from(*find(data, MODE)?.first()?) == libc::IFF_TAP,
        owner: number(OWNER),
        queues: number(NUM_QUEUES).map(|queues| queues.saturating_add(disabled)),
        mtu: read(attributes, MTU)?,
    })
}

/// The value of the first attribute of this type.
fn find(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let header = attributes.first_chunk::<ATTRIBUTE>()?;
        let [a, b, c, d] = *header;
        let length = usize::from(u16::from_ne_bytes([a, b]));
        let value = attributes.get(ATTRIBUTE..length)?;
        if u16::from_ne_bytes([c, d]) & TYPE == wanted {
            return Some(value);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a test says so by panicking
mod tests {
    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let length = u16::try_from(ATTRIBUTE + value.len()).unwrap();
        let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend_from_slice(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn link(kind: &[u8], data: &[u8]) -> Vec<u8> {
        let info = [attribute(INFO_KIND, kind), attribute(INFO_DATA, data)].concat();
        let body = [
            attribute(NAME, b"t0\0"),
            attribute(MTU, &1400u32.to_ne_bytes()),
            attribute(LINK_INFO, &info),
        ]
        .concat();
        let length = u32::try_from(HEADER + LINK + body.len()).unwrap();
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend_from_slice(&libc::RTM_NEWLINK.to_ne_bytes());
        bytes.extend_from_slice(&[0; 2]);
        bytes.extend_from_slice(&7u32.to_ne_bytes());
        bytes.resize(HEADER + LINK, 0);
        bytes.extend_from_slice(&body);
        bytes
    }

    #[test]
    fn queues_that_are_on_and_off_are_counted() {
        let several = [
            attribute(OWNER, &1000u32.to_ne_bytes()),
            attribute(MODE, &[2]),
            attribute(NUM_QUEUES, &2u32.to_ne_bytes()),
            attribute(NUM_DISABLED_QUEUES, &3u32.to_ne_bytes()),
        ]
        .concat();
        let wanted = Tun {
            tap: true,
            owner: Some(1000),
            queues: Some(5),
            mtu: 1400,
        };
        let whole = link(b"tun\0", &several);
        assert_eq!(answer(&whole, 7).unwrap().unwrap(), Some(wanted));
        assert_eq!(
            answer(&link(b"veth\0", &several), 7).unwrap().unwrap(),
            None
        );
        let one = Tun {
            tap: false,
            owner: None,
            queues: None,
            mtu: 1400,
        };
        let found = answer(&link(b"tun\0", &attribute(MODE, &[1])), 7);
        assert_eq!(found.unwrap().unwrap(), Some(one));
        assert!(answer(&whole, 8).is_none(), "of another question");
        // Cut anywhere, it is no number and no panic.
        for len in 0..whole.len() {
            let part = answer(&whole[..len], 7);
            assert!(
                !matches!(part, Some(Ok(Some(found))) if found != wanted),
                "{len}"
            );
        }
    }

    #[test]
    fn an_attribute_without_length_does_not_hold_up() {
        assert_eq!(find(&[0, 0, 9, 0, 0, 0, 9, 0], 5), None);
        assert_eq!(find(&[255, 255, 9, 0], 9), None);
    }
}
