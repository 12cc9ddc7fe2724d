//! What a user-mode network must look like in a configuration. Called on the `api` thread for every
//! Create and for every network that is added, and on the manager thread.

use std::net::IpAddr;

use bulkhead_proto::machine::{NetConfig, UserBackend, net_config};

use super::config::known;

/// Most forwarded ports of a user-mode network.
const MAX_FORWARDS: usize = 64;

/// Checks a user-mode network.
///
/// # Errors
///
/// One line that names the field.
pub(super) fn check_user(name: &str, net: &NetConfig, user: &UserBackend) -> Result<(), String> {
    known(&format!("{name}.user"), user)?;
    if net.queues > 1 {
        return Err(format!(
            "{name}.queues is {}: a user-mode network has one pair",
            net.queues
        ));
    }
    if user.forwards.len() > MAX_FORWARDS {
        return Err(format!(
            "{name}.user.forwards has {} entries: at most {MAX_FORWARDS} are allowed",
            user.forwards.len()
        ));
    }
    for (index, forward) in user.forwards.iter().enumerate() {
        let name = format!("{name}.user.forwards[{index}]");
        known(&name, forward)?;
        if let Err(number) = forward.protocol.enum_value() {
            return Err(format!("{name}.protocol is {number}: give 0 to 1"));
        }
        if !forward.address.is_empty() && forward.address.parse::<IpAddr>().is_err() {
            return Err(format!(
                "{name}.address is {:?}: give an IPv4 or IPv6 address",
                forward.address
            ));
        }
        for (field, port) in [
            ("host_port", forward.host_port),
            ("guest_port", forward.guest_port),
        ] {
            if !(1..=65535).contains(&port) {
                return Err(format!("{name}.{field} is {port}: give 1 to 65535"));
            }
        }
    }
    Ok(())
}

/// Where a forwarded port is listened on: protocol, address, port.
pub(super) type Listener = (i32, IpAddr, u32);

/// Checks that no two forwarded ports of the machine would be listened on at one place; `taken`
/// are those so far.
///
/// # Errors
///
/// One line that names the field.
pub(super) fn check_listeners(
    name: &str,
    net: &NetConfig,
    taken: &mut Vec<Listener>,
) -> Result<(), String> {
    let Some(net_config::Backend::User(user)) = &net.backend else {
        return Ok(());
    };
    for (index, forward) in user.forwards.iter().enumerate() {
        let address = match forward.address.as_str() {
            "" => IpAddr::from([127, 0, 0, 1]),
            given => given
                .parse::<IpAddr>()
                .map_err(|e| format!("{name}.user.forwards[{index}].address: {e}"))?
                .to_canonical(),
        };
        let port = forward.host_port;
        let place = (forward.protocol.value(), address, port);
        if let Some((_, other, _)) = taken.iter().find(|other| overlap(other, &place)) {
            return Err(format!(
                "{name}.user.forwards[{index}].host_port {port} at {address} is forwarded already, at {other}: give another port or address"
            ));
        }
        taken.push(place);
    }
    Ok(())
}

/// Whether a socket at one of these takes what is for the other.
fn overlap(one: &Listener, other: &Listener) -> bool {
    let any = one.1.is_unspecified() || other.1.is_unspecified();
    one.0 == other.0
        && one.2 == other.2
        && (one.1 == other.1 || (any && one.1.is_ipv4() == other.1.is_ipv4()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_proto::machine::user_backend::Forward;

    #[test]
    fn two_forwarded_ports_are_never_listened_on_at_one_place() {
        let user = |forwards: &[(&str, u32)]| {
            let mut net = NetConfig::new();
            net.set_user(UserBackend::new());
            for (address, port) in forwards {
                let mut forward = Forward::new();
                forward.address = (*address).to_owned();
                (forward.host_port, forward.guest_port) = (*port, 80);
                net.mut_user().forwards.push(forward);
            }
            net
        };
        let all = |nets: &[NetConfig]| {
            let mut taken = Vec::new();
            let mut nets = nets.iter().enumerate();
            nets.try_for_each(|(n, net)| check_listeners(&format!("nets[{n}]"), net, &mut taken))
        };
        let check = |forwards: &[(&str, u32)]| all(&[user(forwards)]);
        for both in [
            ["", "127.0.0.1"],
            ["", "0.0.0.0"],
            ["0.0.0.0", "10.0.0.1"],
            ["::1", "::"],
            ["::1", "0:0:0:0:0:0:0:1"],
            ["10.0.0.1", "::ffff:10.0.0.1"],
        ] {
            let line = check(&both.map(|address| (address, 8080))).unwrap_err();
            let told = "nets[0].user.forwards[1].host_port 8080 at ";
            assert!(line.starts_with(told), "{both:?}: {line}");
        }
        for (one, other) in [
            (("", 8080), ("", 8081)),
            (("", 8080), ("127.0.0.2", 8080)),
            (("0.0.0.0", 8080), ("::", 8080)),
        ] {
            assert_eq!(check(&[one, other]), Ok(()), "{one:?} {other:?}");
        }
        let line = all(&[user(&[("", 8080)]), user(&[("127.0.0.1", 8080)])]).unwrap_err();
        assert!(line.starts_with("nets[1].user.forwards[0]"), "{line}");
    }
}
