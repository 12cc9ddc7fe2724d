//! `--net` and `--vhost-user` of `bulkhead run` and `bulkhead ctl create`: text in,
//! [`NetConfig`] and [`VhostUserConfig`] out. Runs in the command line's process; nothing is
//! opened here, and what the text cannot show (does the tap exist?) is seen later.

use std::net::IpAddr;

use bulkhead_proto::common::{NetLimits, TokenBucket};
use bulkhead_proto::machine::{
    NetConfig, TapBackend, UserBackend, VhostUserBackend, VhostUserConfig, net_config,
    tap_backend::Datapath,
    user_backend::{Forward, forward::Protocol},
};

use super::machine_args::{Keys, absolute, check_id, parse_size, parse_switch, split_option};
use super::resource_args;
use crate::api::{check_interface_name, check_tag};
use crate::launcher::MAX_QUEUE_PAIRS;
use crate::machine::net_mac::MacAddress;
use crate::machine::{fs, net_kinds};

/// What `--net` takes, for its errors.
const NET_FORM: &str = "tap=NAME|fd=N[:N…]|vhost-user=SOCKET[,server=on]|user[,forward=[tcp:|udp:][ADDR:]HOST:GUEST]…[,mac=MAC][,queues=N][,mtu=N][,id=NAME][,backend=auto|user|vhost-net][,required=off][,rx-bps=SIZE[:BURST]][,rx-pps=N[:BURST]][,tx-bps=…][,tx-pps=…][,cpu=PERCENT][,memory=SIZE][,pids=N]";
/// What `--vhost-user` takes, for its errors.
const VHOST_USER_FORM: &str = "socket=PATH,device-id=N|kind=fs|gpu|…[,queues=N][,queue-size=N][,config=HEX|tag=NAME][,server=on][,required=off][,id=NAME]";

/// Most bytes of a configuration space.
const MAX_CONFIG: usize = 256;

/// Virtio device id of a file system (VIRTIO 1.2 section 5.11).
const FILE_SYSTEM: u32 = 26;

/// A network device from its option; `index` names it when the text does not.
///
/// # Errors
/// One line that names the option, the key and what it takes.
pub fn parse_net(text: &str, index: usize) -> Result<NetConfig, String> {
    let option = format!("--net {text}");
    let fail = |key: &str, value: &str, wanted: &str| {
        Err(format!("{option}: {key}={value}: give {wanted}"))
    };
    let mut net = NetConfig::new();
    let mut forwards = Vec::new();
    let (mut server, mut datapath) = (None, None);
    let (mut limit, mut resource) = (None, None);
    let parts = split_option(text);
    let mut keys = Keys::default();
    for part in parts.iter().map(String::as_str) {
        if part == "user" {
            set_backend(
                &option,
                &mut net,
                net_config::Backend::User(UserBackend::new()),
            )?;
            continue;
        }
        let (key, value) = part.split_once('=').ok_or_else(|| {
            format!(
                "{option}: {part:?} is no KEY=VALUE: begin with tap=NAME, fd=N, vhost-user=SOCKET or user"
            )
        })?;
        // A list of its own, and what else is one of several has an error of its own.
        if !["forward", "tap", "fd", "vhost-user"].contains(&key) {
            keys.once(&option, key)?;
        }
        match key {
            "tap" => {
                check_interface_name(value).map_err(|e| format!("{option}: tap={value}: {e}"))?;
                let mut tap = TapBackend::new();
                tap.name = value.to_owned();
                set_backend(&option, &mut net, net_config::Backend::Tap(tap))?;
            }
            "fd" => {
                let mut tap = TapBackend::new();
                for number in value.split(':') {
                    match number.parse() {
                        Ok(fd @ 3..) => tap.fds.push(fd),
                        _ => {
                            return fail(
                                key,
                                value,
                                "numbers of open descriptors from 3 on, one for each queue pair",
                            );
                        }
                    }
                }
                set_backend(&option, &mut net, net_config::Backend::Tap(tap))?;
            }
            "vhost-user" => {
                let mut switch = VhostUserBackend::new();
                switch.socket = absolute(&option, value)?;
                set_backend(&option, &mut net, net_config::Backend::VhostUser(switch))?;
            }
            "server" => server = Some(parse_switch(&option, key, value)?),
            "forward" => forwards
                .push(parse_forward(value).map_err(|e| format!("{option}: forward={value}: {e}"))?),
            "mac" => match value.parse::<MacAddress>() {
                Ok(mac) => net.mac = mac.bytes().to_vec(),
                Err(e) => return Err(format!("{option}: mac={value}: {e}")),
            },
            "queues" => match value.parse() {
                Ok(pairs @ 1..=MAX_QUEUE_PAIRS) => net.queues = pairs,
                _ => return fail(key, value, "1 to 32 queue pairs, and a vCPU for each"),
            },
            "mtu" => match value.parse() {
                Ok(mtu @ 68..=65535) => net.mtu = mtu,
                _ => return fail(key, value, "68 to 65521, with vhost-user= to 65535"),
            },
            "id" => net.id = value.to_owned(),
            "backend" => {
                datapath = Some(match value {
                    "auto" => Datapath::AUTO,
                    "user" => Datapath::USER,
                    "vhost-net" => Datapath::VHOST_NET,
                    _ => return fail(key, value, "auto, user or vhost-net"),
                });
            }
            key if resource_args::KEYS.contains(&key) && key != "io" => {
                resource = Some(key.to_owned());
                let resources = net.resources.mut_or_insert_default();
                resource_args::set(resources, key, value).map_err(|e| format!("{option}: {e}"))?;
            }
            "required" => net.optional = !parse_switch(&option, key, value)?,
            "rx-bps" | "rx-pps" | "tx-bps" | "tx-pps" => {
                limit = Some(key.to_owned());
                let limits = if key.starts_with("rx") {
                    net.to_guest.mut_or_insert_default()
                } else {
                    net.from_guest.mut_or_insert_default()
                };
                set_limit(limits, key, value).map_err(|e| format!("{option}: {e}"))?;
            }
            "user" => {
                return Err(format!(
                    "{option}: user takes no value: forward=HOST:GUEST and others follow it"
                ));
            }
            _ => {
                return Err(format!(
                    "{option}: {key:?} is unknown: the form is {NET_FORM}"
                ));
            }
        }
    }
    let misplaced = |key: &str, form: &str| Err(format!("{option}: {key}= goes with {form} only"));
    match &mut net.backend {
        None => {
            return Err(format!(
                "{option}: say where it leads: tap=NAME, fd=N, vhost-user=SOCKET or user"
            ));
        }
        Some(net_config::Backend::Tap(tap)) => {
            if let Some(datapath) = datapath.take() {
                tap.datapath = datapath.into();
            }
            if limit.is_some() && tap.datapath.enum_value() == Ok(Datapath::VHOST_NET) {
                return Err(format!(
                    "{option}: backend=vhost-net: the kernel moves the packets and knows no limits: choose backend=user, or leave rx-…= and tx-…= out"
                ));
            }
            let count = u32::try_from(tap.fds.len()).unwrap_or(u32::MAX);
            if count != 0 && net.queues != 0 && net.queues != count {
                return fail(
                    "queues",
                    &net.queues.to_string(),
                    "as many as fd= has, or leave it out",
                );
            }
            limit = None;
        }
        Some(net_config::Backend::VhostUser(switch)) => {
            switch.server = server.take().unwrap_or_default();
        }
        Some(net_config::Backend::User(user)) => user.forwards = std::mem::take(&mut forwards),
        Some(_) => return Err(format!("{option}: is of a form that is not built")),
    }
    if let Some(key) = limit {
        return misplaced(&key, "tap=NAME or fd=N");
    }
    if let (Some(key), Some(net_config::Backend::VhostUser(_))) = (resource, &net.backend) {
        return misplaced(
            &key,
            "a process of ours, started for tap=NAME, fd=N or user,",
        );
    }
    if net.queues > 1 && matches!(net.backend, Some(net_config::Backend::User(_))) {
        let queues = net.queues.to_string();
        return fail("queues", &queues, "1: a user-mode network has one pair");
    }
    if server.is_some() {
        return misplaced("server", "vhost-user=SOCKET");
    }
    if datapath.is_some() {
        return misplaced("backend", "tap=NAME or fd=N");
    }
    if !forwards.is_empty() {
        return misplaced("forward", "user");
    }
    if net.id.is_empty() {
        net.id = format!("net{index}");
    }
    check_id(&net.id).map_err(|e| format!("{option}: id={}: {e}", net.id))?;
    Ok(net)
}

fn set_backend(
    option: &str,
    net: &mut NetConfig,
    backend: net_config::Backend,
) -> Result<(), String> {
    if net.backend.is_some() {
        return Err(format!(
            "{option}: give one of tap=NAME, fd=N, vhost-user=SOCKET and user, once"
        ));
    }
    net.backend = Some(backend);
    Ok(())
}

/// One of the rates `rx-bps`, `rx-pps`, `tx-bps`, `tx-pps`: N[:BURST]. 0 lifts the limit.
///
/// # Errors
/// One line that names the key and what it takes.
pub fn set_limit(limits: &mut NetLimits, key: &str, value: &str) -> Result<(), String> {
    let bytes = key.ends_with("bps");
    let number = |text: &str| match text {
        "0" => Some(0),
        text if bytes => parse_size(text).ok(),
        text => text.parse().ok(),
    };
    let (rate, burst) = value
        .split_once(':')
        .map_or((value, None), |(r, b)| (r, Some(b)));
    let bucket = number(rate).and_then(|per_second| {
        let mut bucket = TokenBucket::new();
        bucket.per_second = per_second;
        bucket.burst = match burst {
            None => 0,
            Some(burst) => number(burst).filter(|burst| *burst > 0 && per_second > 0)?,
        };
        Some(bucket)
    });
    let Some(bucket) = bucket else {
        let what = if bytes {
            "bytes per second and bytes, such as 10M:1M"
        } else {
            "packets per second and packets, such as 50000:1000"
        };
        return Err(format!(
            "{key}={value}: give N or N:BURST, {what}; 0 for no limit"
        ));
    };
    if bytes {
        limits.bytes = Some(bucket).into();
    } else {
        limits.packets = Some(bucket).into();
    }
    Ok(())
}

/// [tcp:|udp:][ADDRESS:]HOST:GUEST; an IPv6 address stands in brackets.
fn parse_forward(text: &str) -> Result<Forward, String> {
    let wanted = || {
        "give [tcp:|udp:][ADDRESS:]HOSTPORT:GUESTPORT, such as 8080:80 or udp:[::1]:5300:53"
            .to_owned()
    };
    let mut forward = Forward::new();
    let rest = match (text.strip_prefix("tcp:"), text.strip_prefix("udp:")) {
        (Some(rest), _) => rest,
        (_, Some(rest)) => {
            forward.protocol = Protocol::UDP.into();
            rest
        }
        _ => text,
    };
    let (rest, guest) = rest.rsplit_once(':').ok_or_else(wanted)?;
    let (address, host) = match rest.rsplit_once(':') {
        Some((address, host)) => (address, host),
        None => ("", rest),
    };
    if !address.is_empty() {
        let bare = address
            .strip_prefix('[')
            .and_then(|a| a.strip_suffix(']'))
            .unwrap_or(address);
        let parsed: IpAddr = bare.parse().map_err(|_| wanted())?;
        if parsed.is_ipv6() != address.starts_with('[') {
            return Err(wanted());
        }
        forward.address = parsed.to_string();
    }
    let port = |text: &str| {
        text.parse::<u16>()
            .ok()
            .filter(|port| *port > 0)
            .map(u32::from)
            .ok_or_else(wanted)
    };
    forward.host_port = port(host)?;
    forward.guest_port = port(guest)?;
    Ok(forward)
}

/// A device of somebody else's from its option; `index` names it when the text does not.
///
/// # Errors
/// One line that names the option, the key and what it takes.
pub fn parse_vhost_user(text: &str, index: usize) -> Result<VhostUserConfig, String> {
    let option = format!("--vhost-user {text}");
    let fail = |key: &str, value: &str, wanted: &str| {
        Err(format!("{option}: {key}={value}: give {wanted}"))
    };
    let mut device = VhostUserConfig::new();
    let mut kind_name = None;
    let mut tag = None;
    let parts = split_option(text);
    let mut keys = Keys::default();
    for part in parts.iter().map(String::as_str) {
        let (key, value) = part.split_once('=').ok_or_else(|| {
            format!("{option}: {part:?} is no KEY=VALUE: the form is {VHOST_USER_FORM}")
        })?;
        keys.once(&option, key)?;
        match key {
            "socket" => device.socket = absolute(&option, value)?,
            "device-id" | "kind" if device.device_id != 0 => {
                return Err(format!("{option}: give device-id=N or kind=NAME, once"));
            }
            "device-id" => match value.parse() {
                Ok(id @ 1..=63) => device.device_id = id,
                _ => return fail(key, value, "a virtio device id, 1 to 63"),
            },
            "kind" => match net_kinds::by_name(value) {
                Some(kind) => {
                    device.device_id = kind.virtio_id.into();
                    kind_name = Some(kind.name);
                }
                None => {
                    return Err(format!(
                        "{option}: kind={value} is unknown: the kinds are {}; or give device-id=N",
                        net_kinds::names()
                    ));
                }
            },
            "queues" => match value.parse() {
                Ok(queues @ 1..=255) => device.queues = queues,
                _ => return fail(key, value, "1 to 255"),
            },
            "queue-size" => match value.parse::<u32>() {
                Ok(size @ 2..=1024) if size.is_power_of_two() => device.queue_size = size,
                _ => return fail(key, value, "a power of two from 2 to 1024"),
            },
            "config" => match hex(value) {
                Some(bytes) => device.config = bytes,
                None => {
                    return fail(
                        key,
                        value,
                        "up to 256 bytes, two hexadecimal digits for each",
                    );
                }
            },
            "tag" => {
                check_tag(value).map_err(|why| format!("{option}: tag={value}: {why}"))?;
                tag = Some(value);
            }
            "server" => device.server = parse_switch(&option, key, value)?,
            "required" => device.optional = !parse_switch(&option, key, value)?,
            "id" => device.id = value.to_owned(),
            _ => {
                return Err(format!(
                    "{option}: {key:?} is unknown: the form is {VHOST_USER_FORM}"
                ));
            }
        }
    }
    if device.socket.is_empty() {
        return Err(format!("{option}: socket=PATH is missing"));
    }
    if device.device_id == 0 {
        return Err(format!(
            "{option}: what is it? Give device-id=N or kind=NAME, one of {}",
            net_kinds::names()
        ));
    }
    if let Some(tag) = tag {
        if device.device_id != FILE_SYSTEM || !device.config.is_empty() {
            return Err(format!("{option}: tag= goes with kind=fs, without config="));
        }
        device.config = fs::configuration(tag, device.queues);
    }
    if device.id.is_empty() {
        device.id = format!("{}{index}", kind_name.unwrap_or("vhost"));
    }
    check_id(&device.id).map_err(|e| format!("{option}: id={}: {e}", device.id))?;
    Ok(device)
}

fn hex(text: &str) -> Option<Vec<u8>> {
    let digits: Vec<u8> = text
        .chars()
        .map(|c| c.to_digit(16).and_then(|d| u8::try_from(d).ok()))
        .collect::<Option<_>>()?;
    let (pairs, rest) = digits.as_chunks::<2>();
    let fits = rest.is_empty() && (1..=MAX_CONFIG).contains(&pairs.len());
    fits.then(|| pairs.iter().map(|[high, low]| (high << 4) | low).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use net_config::Backend;

    fn refused(text: &str) -> String {
        let error = parse_net(text, 0).unwrap_err();
        assert!(error.starts_with("--net "), "{error}");
        assert!(!error.contains('\n'), "{error}");
        error
    }

    #[test]
    fn every_form_of_a_network_device_is_read() {
        assert_eq!(MAX_QUEUE_PAIRS, 32, "the number in the line");
        let net = parse_net(
            "tap=tap7,queues=4,mac=52:54:00:12:34:56,mtu=9000,backend=user",
            2,
        )
        .unwrap();
        assert_eq!((net.id.as_str(), net.queues, net.mtu), ("net2", 4, 9000));
        assert_eq!(net.mac, [0x52, 0x54, 0, 0x12, 0x34, 0x56]);
        assert!(!net.optional);
        let Some(Backend::Tap(tap)) = &net.backend else {
            panic!("{net}")
        };
        assert_eq!(
            (tap.name.as_str(), tap.datapath),
            ("tap7", Datapath::USER.into())
        );

        let net = parse_net("fd=5:6,id=lan,required=off,rx-bps=10M:1M,tx-pps=5000", 0).unwrap();
        let Some(Backend::Tap(tap)) = &net.backend else {
            panic!("{net}")
        };
        assert_eq!(
            (tap.fds.as_slice(), net.id.as_str(), net.optional),
            (&[5, 6][..], "lan", true)
        );
        let bytes = net.to_guest.bytes.clone().unwrap();
        assert_eq!((bytes.per_second, bytes.burst), (10 << 20, 1 << 20));
        assert_eq!(net.from_guest.packets.per_second, 5000);
        assert!(net.from_guest.bytes.is_none());

        let net = parse_net("vhost-user=/run/ovs.sock,server=on", 0).unwrap();
        let Some(Backend::VhostUser(switch)) = &net.backend else {
            panic!("{net}")
        };
        assert!(switch.server && switch.socket == "/run/ovs.sock");

        let net = parse_net(
            "user,forward=8080:80,forward=udp:[::1]:5300:53,forward=tcp:0.0.0.0:22:22",
            0,
        )
        .unwrap();
        let Some(Backend::User(user)) = &net.backend else {
            panic!("{net}")
        };
        let seen: Vec<_> = user
            .forwards
            .iter()
            .map(|f| {
                (
                    f.protocol.value(),
                    f.address.as_str(),
                    f.host_port,
                    f.guest_port,
                )
            })
            .collect();
        assert_eq!(
            seen,
            [
                (0, "", 8080, 80),
                (1, "::1", 5300, 53),
                (0, "0.0.0.0", 22, 22)
            ]
        );
    }

    #[test]
    fn a_bad_network_device_is_refused_and_the_key_is_named() {
        for (text, names) in [
            ("", "tap=NAME"),
            ("tap", "tap=NAME"),
            ("id=x", "tap=NAME"),
            ("tap=a,fd=5", "once"),
            ("tap=a,user", "once"),
            ("fd=1", "fd=1"),
            ("fd=5:", "fd=5:"),
            ("tap=a,mac=52:54:00", "mac="),
            ("tap=a,mac=01:00:5e:00:00:01", "multicast"),
            ("tap=a,mac=00:00:00:00:00:00", "zero"),
            ("tap=a,queues=0", "queues="),
            ("tap=a,queues=33", "1 to 32"),
            ("tap=a,mtu=big", "mtu="),
            ("tap=a,mtu=67", "68 to 65521"),
            ("tap=a,mtu=65536", "68 to 65521"),
            ("tap=a,backend=kernel", "backend="),
            ("user,backend=user", "backend="),
            ("tap=a,server=on", "server="),
            ("tap=a,forward=1:1", "forward="),
            ("user,forward=80", "forward="),
            ("user,forward=0:80", "forward="),
            ("user,forward=::1:80:80", "forward="),
            ("user,forward=[127.0.0.1]:80:80", "forward="),
            ("user,forward=sctp:80:80", "forward="),
            ("tap=a,required=no", "required="),
            ("tap=a,rx-bps=fast", "rx-bps="),
            ("tap=a,tx-pps=5K", "tx-pps="),
            ("tap=a,rx-bps=5:", "rx-bps="),
            ("tap=a,rx-bps=1:0", "rx-bps="),
            ("tap=a,tx-pps=0:5", "tx-pps="),
            ("user,rx-bps=5", "rx-bps= goes with tap=NAME or fd=N only"),
            (
                "vhost-user=/s,tx-pps=5",
                "tx-pps= goes with tap=NAME or fd=N only",
            ),
            ("vhost-user=/s,cpu=50", "cpu="),
            (
                "tap=a,backend=vhost-net,tx-bps=5M",
                "backend=vhost-net: the kernel",
            ),
            ("fd=5:6,queues=3", "queues=3: "),
            ("user,queues=2", "queues=2: "),
            ("vhost-user=", "empty"),
            ("tap=a,id=../b", "id="),
            ("tap=a,colour=red", "colour"),
            ("tap=a,queues=2,mtu=1400,queues=4", "queues= is given twice"),
            (
                "tap=a,mac=02:00:00:00:00:01,mac=02:00:00:00:00:01",
                "mac= is given twice",
            ),
            ("tap=a,tap=b", "once"),
        ] {
            let error = refused(text);
            assert!(error.contains(names), "{text}: {error}");
        }
    }

    #[test]
    fn a_device_of_somebody_else_is_read() {
        let device = parse_vhost_user("socket=/run/fs,kind=fs", 1).unwrap();
        assert_eq!((device.device_id, device.id.as_str()), (26, "fs1"));
        let device = parse_vhost_user(
            "socket=/s,device-id=42,queues=3,queue-size=64,config=00ffA0,id=x",
            0,
        )
        .unwrap();
        assert_eq!((device.queues, device.queue_size), (3, 64));
        assert_eq!(device.config, [0, 0xff, 0xa0]);
        let device = parse_vhost_user("socket=/s,kind=fs,tag=home,queues=4", 0).unwrap();
        assert_eq!(device.config.len(), 40);
        assert!(device.config.starts_with(b"home\0") && device.config.ends_with(&[3, 0, 0, 0]));
        assert!(
            parse_vhost_user("socket=/s,kind=fs,tag=home", 0)
                .unwrap()
                .config
                .ends_with(&[1, 0, 0, 0])
        );
        for bad in [
            "",
            "kind=fs",
            "socket=/s",
            "socket=/s,kind=toaster",
            "socket=/s,device-id=0",
            "socket=/s,device-id=64",
            "socket=/s,kind=fs,device-id=26",
            "socket=/s,kind=fs,queues=0",
            "socket=/s,kind=fs,queue-size=100",
            "socket=/s,kind=fs,config=0",
            "socket=/s,kind=fs,config=xy",
            "socket=/s,kind=fs,config=",
            "socket=/s,kind=fs,wire=red",
            "socket=/s,kind=fs,tag=",
            "socket=/s,kind=rng,tag=x",
            "socket=/s,kind=fs,tag=x,config=00",
            "socket=/s,kind=fs,socket=/t",
            "socket=/s,kind=fs,queues=1,queues=2",
        ] {
            let error = parse_vhost_user(bad, 0).unwrap_err();
            assert!(error.starts_with("--vhost-user "), "{error}");
        }
    }
}
