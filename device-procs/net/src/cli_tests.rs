//! Tests of the command line.
#![allow(clippy::unwrap_used, clippy::panic)]

use super::*;

fn serve(line: &str) -> Result<Options, String> {
    match parse(line.split_whitespace().map(OsString::from)) {
        Ok(Command::Serve(options)) => Ok(*options),
        Ok(other) => panic!("{other:?}"),
        Err(e) => Err(e.to_string()),
    }
}

const LAUNCHED: &str = "--control-fd 3 --vhost-fd 4 --mac 52:54:00:12:34:56";

#[test]
fn the_launchers_line_is_understood() {
    let o = serve(&format!(
        "{LAUNCHED} --tap fds=5:6 --vhost-net fds=7:8 --queue-pairs 2 --mtu 9000 --link down \
         --fence-fd 9"
    ))
    .unwrap();
    assert_eq!(
        o.endpoint,
        Endpoint::Inherited {
            control: 3,
            vhost: 4,
            fence: Some(9)
        }
    );
    assert_eq!(o.tap, TapSource::Fds(vec![5, 6]));
    assert_eq!(o.vhost_net, [7, 8]);
    assert_eq!((o.pairs, o.mtu, o.link_up), (2, Some(9000), false));
    assert_eq!(o.mac, Some([0x52, 0x54, 0, 0x12, 0x34, 0x56]));
    let o = serve(&format!(
        "{LAUNCHED} --tap fds=5 --rx-bps 1000:2000 --tx-pps 5"
    ))
    .unwrap();
    assert_eq!(o.to_guest.bytes, Rate::new("", 1000, 2000).unwrap());
    assert_eq!(o.from_guest.packets, Rate::new("", 5, 0).unwrap());
    assert_eq!(o.from_guest.bytes, None);
    let o = serve(&format!("{LAUNCHED} --tap fds=5,vhost-fds=7")).unwrap();
    assert_eq!((o.pairs, o.vhost_net), (1, vec![7]));
}

#[test]
fn stand_alone_a_name_is_enough() {
    let o = serve("--socket /s --tap tap0").unwrap();
    assert_eq!(o.endpoint, Endpoint::Socket("/s".into()));
    assert_eq!(o.tap, TapSource::Name("tap0".into()));
    assert_eq!((o.pairs, o.mac, o.link_up), (1, None, true));
}

#[test]
fn nonsense_is_named() {
    for (line, what) in [
        ("--tap tap0", "--socket"),
        ("--socket /s", "--tap: is missing"),
        ("--socket /s --tap a/b", "name"),
        ("--socket /s --tap aaaaaaaaaaaaaaaa", "name"),
        ("--socket /s --tap fds=2", "above 2"),
        (
            "--socket /s --tap fds=5:6 --queue-pairs 3",
            "one descriptor",
        ),
        ("--socket /s --tap t --queue-pairs 0", "1 to 64"),
        ("--socket /s --tap t --queue-pairs 65", "1 to 64"),
        ("--socket /s --tap t --mac 01:00:00:00:00:00", "group"),
        ("--socket /s --tap t --mac 00:00:00:00:00:00", "zeros"),
        ("--socket /s --tap t --mac 02:00:00:00:00", "XX"),
        ("--socket /s --tap t --mac 02:00:00:00:00:00:00", "XX"),
        ("--socket /s --tap t --mac 02:00:00:00:00:0g", "XX"),
        ("--socket /s --tap t --mac 02:00:00:00:00:+1", "XX"),
        ("--socket /s --tap t --mtu 67", "68"),
        ("--socket /s --tap t --mtu 65522", "to 65521"),
        ("--socket /s --tap t --queue-pairs x", "1 to 64"),
        ("--socket /s --tap t --link sideways", "up or down"),
        ("--socket /s --tap t --rx-bps 0:5", "burst without"),
        ("--socket /s --tap t --rx-bps x", "N:BURST"),
        ("--socket /s --tap t --rx-bps 1:0", "burst of 0"),
        ("--socket /s --tap t --mtu 1400 --mtu 1500", "given twice"),
        ("--socket /s --tap t --tap u", "given twice"),
        ("--socket /s --tap t --io-engine x", "plain"),
        ("--socket /s --tap t --vhost-net fds=5:6", "per queue pair"),
        (
            "--socket /s --tap t --vhost-net fds=5 --tx-bps 5",
            "knows no limits",
        ),
        ("--socket /s --tap t,x=y", "unknown"),
        ("--socket /s --tap t --control-fd 3", "both"),
        ("--control-fd 3 --vhost-fd 4 --tap fds=5", "--mac"),
        (
            "--control-fd 3 --vhost-fd 3 --tap fds=5 --mac 02:00:00:00:00:01",
            "twice",
        ),
        (
            "--control-fd 3 --vhost-fd 4 --tap fds=4 --mac 02:00:00:00:00:01",
            "twice",
        ),
        (
            "--control-fd 3 --vhost-fd 4 --tap t --mac 02:00:00:00:00:01",
            "fds=",
        ),
    ] {
        let e = serve(line).unwrap_err();
        assert!(e.contains(what), "{line}: {e}");
        assert!(e.contains("--"), "{e}");
    }
}
