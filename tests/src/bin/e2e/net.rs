//! Networks on taps, in namespaces of the host: what arrives is what was sent, both ways, by
//! the user-space data path and by vhost-net; queues, offloads, MTU and link change under it.

use std::time::{Duration, Instant};

use bulkhead_tests::host::{Namespace, Undo, sh};
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, ctl};

use crate::net_native::Served;

/// Nothing fails by slowness.
pub const LIMIT: Duration = Duration::from_secs(240);

/// The tests of this subject.
pub fn tests() -> Vec<Test> {
    let test = Test::short("net");
    vec![
        test(
            "TCP, UDP and ICMP both ways arrive unchanged, with every offload on and off (user space)",
            || traffic("user"),
        ),
        test(
            "TCP, UDP and ICMP both ways arrive unchanged, with every offload on and off (vhost-net)",
            || traffic("vhost-net"),
        ),
        test("jumbo frames of 9000 bytes arrive unchanged", jumbo),
        test(
            "ethtool -L changes the queues under traffic (user space)",
            || queues("user"),
        ),
        test(
            "ethtool -L changes the queues under traffic (vhost-net)",
            || queues("vhost-net"),
        ),
        test(
            "backend=auto takes vhost-net where it is, and user space where it is not",
            auto,
        ),
        test(
            "the guest sees its link go down and come up, and traffic with it",
            || link("user"),
        ),
        test(
            "the guest sees its link go down and come up, and traffic with it (vhost-net)",
            || link("vhost-net"),
        ),
        test("two guests on one bridge reach each other", bridge),
        test(
            "MAC and VLAN filters are read back, foreign frames stay out",
            filters,
        ),
        test(
            "rate limits hold each direction back at least as long as they say",
            rate_limits,
        ),
        test("a killed VM leaves its tap usable", reuse),
    ]
}

/// The guest's address and the host's on the tap.
const SETUP: &str = "ip link set lo up; ip link set eth0 up; ip addr add 10.5.0.2/24 dev eth0";

/// Boots a guest on tap0 of the namespace; `net` is what follows `tap=tap0`.
fn guest(
    host: &Namespace,
    scratch: &Scratch,
    net: &str,
    script: &str,
    more: &[&str],
) -> Result<Vmm, String> {
    let net = format!("tap=tap0,id=net0{net}");
    let mut args = vec!["--net", &net];
    args.extend_from_slice(more);
    host.debian(scratch, &format!("{SETUP}\n{script}"), &args)
}

/// SHA-256 of a file of the host's.
pub fn sum(path: &str) -> Result<String, String> {
    sh(&format!("sha256sum <{path} | cut -d' ' -f1")).map(|s| s.trim().to_string())
}

/// Sends numbered datagrams to an echo server and expects each back unchanged; a lost one is
/// sent again, as on any network.
const UDP_ECHO: &str = r#"python3 - <<'END'
import random, socket, sys, time
random.seed(3)
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(0.5)
for n in range(25):
    data = n.to_bytes(4, 'big') + random.randbytes(random.choice((0, 1, 100, 1000, 1400, 4000, 16000)))
    for attempt in range(200):
        s.sendto(data, ('10.5.0.2', 7003))
        try:
            back = s.recv(65536)
            while back[:4] != data[:4]:
                back = s.recv(65536)
        except TimeoutError:
            continue
        if back != data:
            sys.exit(f'datagram {n} of {len(data)} bytes came back changed')
        break
    else:
        sys.exit(f'datagram {n} never came back')
END"#;

fn traffic(backend: &str) -> Verdict {
    let scratch = Scratch::new("traffic")?;
    let host = Namespace::new("traffic")?;
    host.tap("tap0", "10.5.0.1/24", "")?;
    let down = scratch.disk("down", 2 << 20, 71)?;
    // Each round: down by TCP, up by TCP, an echo server for UDP, pings both ways.
    let script = "head -c 2M /dev/urandom >/tmp/up
round() {
  echo GOT-$1=$(socat -u TCP:10.5.0.1:7000,retry=50,interval=0.2 - | sha256sum | cut -d' ' -f1)
  echo SENT-$1=$(sha256sum </tmp/up | cut -d' ' -f1)
  socat -u FILE:/tmp/up TCP:10.5.0.1:7001,retry=50,interval=0.2
  ping -c 5 -i 0.2 -W 20 -s 1400 -p a55a 10.5.0.1 >/tmp/ping 2>&1
  grep -q ' 0% packet loss' /tmp/ping && ! grep -Eq 'wrong|truncated|DUP|[Ee]rror' /tmp/ping && echo PING-$1=good || cat /tmp/ping
  echo ROUND-$1; read -r line
}
socat -b 65536 UDP4-RECVFROM:7003,fork,reuseaddr SYSTEM:cat 2>/dev/null &
echo FEATURES $(ethtool -k eth0 | grep -E '^(rx-checksumming|tx-checksumming|tcp-segmentation-offload|generic-receive-offload|scatter-gather): ' | tr -d ' ' | tr '\\n' ' ')
echo DRIVER $(ethtool -i eth0 | head -1)
round on
for f in tx rx sg tso gso gro; do ethtool -K eth0 $f off || echo REFUSED $f; done
echo FEATURES $(ethtool -k eth0 | grep -E '^(rx-checksumming|tx-checksumming|tcp-segmentation-offload|generic-receive-offload|scatter-gather): ' | tr -d ' ' | tr '\\n' ' ')
round off
for f in tx rx sg tso gso gro; do ethtool -K eth0 $f on; done
round again
kill %1";
    let api = scratch.path("api");
    let more = ["--api-socket", &api];
    let mut vmm = guest(
        &host,
        &scratch,
        &format!(",backend={backend}"),
        script,
        &more,
    )?;
    for round in ["on", "off", "again"] {
        let up = scratch.path("up");
        let _sender = host.spawn(&format!(
            "socat -u FILE:{down} TCP-LISTEN:7000,bind=10.5.0.1,reuseaddr"
        ))?;
        let mut receiver = host.spawn(&format!(
            "socat -u TCP-LISTEN:7001,bind=10.5.0.1,reuseaddr CREATE:{up}"
        ))?;
        vmm.wait_for(&format!("ROUND-{round}"), LIMIT)?;
        receiver.ends_with(0, LIMIT)?;
        let (down, up) = (sum(&down)?, sum(&up)?);
        let output = vmm.output();
        for wanted in [
            format!("GOT-{round}={down}"),
            format!("SENT-{round}={up}"),
            format!("PING-{round}=good"),
        ] {
            check(output.contains(&wanted), || {
                vmm.story(&format!("no {wanted}"))
            })?;
        }
        host.sh(UDP_ECHO)
            .map_err(|e| vmm.story(&format!("UDP, round {round}: {e}")))?;
        let replies = host.sh("ping -c 5 -i 0.2 -W 20 -s 1400 -p 5aa5 10.5.0.2 2>&1")?;
        let spoiled = ["wrong", "truncated", "DUP", "rror"]
            .iter()
            .any(|word| replies.contains(word));
        check(replies.contains(" 0% packet loss") && !spoiled, || {
            vmm.story(&format!("round {round}: {replies}"))
        })?;
        // W^X, descriptors, filters: after frames of every kind as before them.
        super::rng::audited(&api, "bulkhead-net")?;
        vmm.type_text("\n")?;
    }
    vmm.ends_with(0, LIMIT)?;
    let output = vmm.output();
    let features: Vec<&str> = output
        .lines()
        .filter_map(|l| l.strip_prefix("FEATURES "))
        .collect();
    println!("[{}]", features.first().unwrap_or(&"no features").trim());
    check(
        features.first().is_some_and(|f| {
            ["tx-checksumming:on", "tcp-segmentation-offload:on"]
                .iter()
                .all(|w| f.contains(w))
        }),
        || vmm.story("offloads are not there"),
    )
}

fn jumbo() -> Verdict {
    let scratch = Scratch::new("jumbo")?;
    let host = Namespace::new("jumbo")?;
    host.tap("tap0", "10.5.0.1/24", "")?;
    host.sh("ip link set tap0 mtu 9000")?;
    let script = "echo MTU=$(cat /sys/class/net/eth0/mtu)
ping -q -c 5 -i 0.2 -s 8972 -M do -p a55a 10.5.0.1 >/dev/null && echo PING=good
for f in tso gso gro; do ethtool -K eth0 $f off; done
echo GOT=$(socat -u TCP:10.5.0.1:7000,retry=50,interval=0.2 - | sha256sum)
ping -q -c 1 -s 8973 -M do 10.5.0.1 >/dev/null 2>&1 || echo LARGER=refused
echo DONE; read -r line";
    let down = scratch.disk("down", 2 << 20, 73)?;
    for backend in ["user", "vhost-net"] {
        let _sender = host.spawn(&format!(
            "socat -u FILE:{down} TCP-LISTEN:7000,bind=10.5.0.1,reuseaddr"
        ))?;
        let mut vmm = guest(
            &host,
            &scratch,
            &format!(",mtu=9000,backend={backend}"),
            script,
            &[],
        )?;
        vmm.wait_for("DONE", LIMIT)?;
        host.sh("ping -q -c 3 -i 0.2 -s 8972 -M do 10.5.0.2")?;
        vmm.type_text("\n")?;
        vmm.ends_with(0, LIMIT)?;
        for wanted in [
            "MTU=9000",
            "PING=good",
            &format!("GOT={}", sum(&down)?),
            "LARGER=refused",
        ] {
            check(vmm.output().contains(wanted), || {
                vmm.story(&format!("{backend}: no {wanted}"))
            })?;
        }
    }
    Ok(())
}

fn queues(backend: &str) -> Verdict {
    let scratch = Scratch::new("queues")?;
    let host = Namespace::new("queues")?;
    host.tap("tap0", "10.5.0.1/24", "multi_queue")?;
    let down = scratch.disk("down", 6 << 20, 79)?;
    let socket = scratch.path("api");
    // Each change is read back, and the second queue carries what its CPU sends, or nothing.
    let script = "pairs() { ethtool -l eth0 | awk '/^Combined/ { n = $2 } END { print n }'; }
second() { ethtool -S eth0 | awk '/tx(_queue_)?1_kicks/ { n = $2 } END { print n + 0 }'; }
echo AT-FIRST=$(pairs)
(for n in 1 2 3 4; do echo GOT-$n=$(socat -u TCP:10.5.0.1:700$n,retry=50,interval=0.2 - | sha256sum); done; echo ALL >/tmp/all) &
changes=0
until [ -e /tmp/all ]; do
  for n in 1 2; do
    ethtool -L eth0 combined $n || echo WRONG: $n refused
    [ $(pairs) = $n ] || echo WRONG: $(pairs) pairs, not $n
    before=$(second)
    taskset -c 1 ping -q -c 3 -i 0.2 -W 2 10.5.0.1 >/dev/null
    after=$(second)
    case $n in
      1) [ $after = $before ] || echo WRONG: the second queue went on from $before to $after ;;
      2) [ $after -gt $before ] || echo WRONG: the second queue stays at $after ;;
    esac
    changes=$((changes + 1))
  done
done
wait
echo CHANGES=$changes
echo AT-LAST=$(pairs)
ethtool -L eth0 combined 3 2>/dev/null || echo THREE=refused
ping -q -c 3 -i 0.2 10.5.0.1 >/dev/null && echo PING=good
echo DONE; read -r line";
    let mut senders = Vec::new();
    for n in 1..=4 {
        senders.push(host.spawn(&format!(
            "socat -u FILE:{down} TCP-LISTEN:700{n},bind=10.5.0.1,reuseaddr"
        ))?);
    }
    let mut vmm = guest(
        &host,
        &scratch,
        &format!(",queues=2,backend={backend}"),
        script,
        &["--cpus", "2", "--api-socket", &socket],
    )?;
    vmm.wait_for("DONE", LIMIT)?;
    let stats = ctl(&socket, &["stats", "net0"])?;
    vmm.type_text("\n")?;
    vmm.ends_with(0, LIMIT)?;
    let expected = sum(&down)?;
    let output = vmm.output();
    let mut wanted: Vec<String> = (1..=4).map(|n| format!("GOT-{n}={expected}")).collect();
    wanted.extend(["AT-LAST=2", "THREE=refused", "PING=good"].map(String::from));
    for wanted in wanted {
        check(output.contains(&wanted), || {
            vmm.story(&format!("no {wanted}"))
        })?;
    }
    check(!output.contains("WRONG"), || {
        vmm.story("a change did not take hold")
    })?;
    check(stats["net"]["queue_pairs"] == 2, || stats.to_string())?;
    if backend == "user" {
        let sent = stats["queues"][3]["requests"].as_u64();
        check(sent.unwrap_or(0) > 0, || stats.to_string())?;
    }
    let changes = output.lines().find_map(|l| l.strip_prefix("CHANGES="));
    println!("[{} changes under traffic]", changes.unwrap_or("?").trim());
    Ok(())
}

fn auto() -> Verdict {
    let scratch = Scratch::new("auto")?;
    let host = Namespace::new("auto")?;
    host.tap("tap0", "10.5.0.1/24", "user root")?;
    let datapath = |name: &str, net: &str| -> Result<String, String> {
        let served = Served::new(&host, &scratch, name)?;
        served.create(&["--net", net])?;
        let stats = ctl(&served.socket, &["stats", "net0"])?;
        served.end()?;
        Ok(stats["net"]["datapath"].to_string())
    };
    let (plain, limited) = ("tap=tap0,id=net0", "tap=tap0,id=net0,rx-bps=1M");
    sh("[ -c /dev/vhost-net ]")?;
    for (net, wanted) in [(plain, "\"vhost-net\""), (limited, "\"tap\"")] {
        let got = datapath("with", net)?;
        check(got == wanted, || format!("{net}: {got}, not {wanted}"))?;
    }
    let number = sh("stat -c '%Hr %Lr' /dev/vhost-net")?;
    let _again = Undo::new(format!("mknod -m 600 /dev/vhost-net c {}", number.trim()));
    sh("rm /dev/vhost-net")?;
    let got = datapath("without", plain)?;
    check(got == "\"tap\"", || format!("without vhost-net: {got}"))?;
    let served = Served::new(&host, &scratch, "asked")?;
    let refused = served.create(&["--net", "tap=tap0,id=net0,backend=vhost-net"]);
    let told = refused
        .as_ref()
        .is_err_and(|e| e.contains("/dev/vhost-net: ") && e.contains("load the kernel module"));
    check(told, || format!("{refused:?}"))?;
    served.end()
}

fn link(backend: &str) -> Verdict {
    let scratch = Scratch::new("link")?;
    let host = Namespace::new("link")?;
    host.tap("tap0", "10.5.0.1/24", "")?;
    let socket = scratch.path("api");
    let script = "carrier() { until [ \"$(cat /sys/class/net/eth0/carrier)\" = $1 ]; do sleep 0.1; done; echo CARRIER=$1-$2; }
carrier 1 first; read -r line
carrier 0 then; read -r line
carrier 1 last
until ping -q -c 1 -W 2 10.5.0.1 >/dev/null; do :; done; echo PING=good; read -r line
carrier 0 gone";
    let mut vmm = guest(
        &host,
        &scratch,
        &format!(",backend={backend}"),
        script,
        &["--api-socket", &socket],
    )?;
    vmm.wait_for("CARRIER=1-first", LIMIT)?;
    host.sh("ping -q -c 2 -i 0.2 10.5.0.2")?;
    ctl(&socket, &["update-net", "net0", "--link", "down"])?;
    vmm.type_text("\n")?;
    vmm.wait_for("CARRIER=0-then", LIMIT)?;
    let stats = ctl(&socket, &["stats", "net0"])?;
    check(stats["net"]["link_up"] == false, || stats.to_string())?;
    check(
        host.sh("ping -q -c 2 -i 0.2 -W 1 10.5.0.2").is_err(),
        || "frames pass a link that is down".to_string(),
    )?;
    ctl(&socket, &["update-net", "net0", "--link", "up"])?;
    vmm.type_text("\n")?;
    vmm.wait_for("CARRIER=1-last", LIMIT)?;
    vmm.wait_for("PING=good", LIMIT)?;
    // A tap that is deleted is a link that is down, for the guest and for the operator.
    host.sh("ip link del tap0")?;
    crate::net_bad::until_event(&socket, "device.disconnected", "tap tap0 was deleted")?;
    let found = crate::hotplug::device(&socket, "net0")?.unwrap_or_default();
    check(found["state"] == "disconnected", || {
        vmm.story(&found.to_string())
    })?;
    let stats = ctl(&socket, &["stats", "net0"])?;
    check(stats["net"]["link_up"] == false, || stats.to_string())?;
    vmm.type_text("\n")?;
    vmm.wait_for("CARRIER=0-gone", LIMIT)?;
    vmm.ends_with(0, LIMIT)?;
    let told = vmm.errors();
    check(told.lines().count() == 1, || {
        vmm.story("not told in one line")
    })
}

fn bridge() -> Verdict {
    let host = Namespace::new("bridge")?;
    host.tap("tap0", "", "")?;
    host.tap("tap1", "", "")?;
    host.sh(
        "ip link add br0 type bridge; ip link set br0 up; ip addr add 10.5.0.1/24 dev br0
for t in tap0 tap1; do ip link set $t master br0; done",
    )?;
    let (one, two) = (Scratch::new("one")?, Scratch::new("two")?);
    // The first serves a file of its own, the second fetches it and sends it back.
    let serve = "ip link set eth0 up; ip addr add 10.5.0.2/24 dev eth0
head -c 2M /dev/urandom >/tmp/f; echo SUM=$(sha256sum </tmp/f | cut -d' ' -f1)
socat -u FILE:/tmp/f TCP-LISTEN:7000 && socat -u TCP-LISTEN:7001 CREATE:/tmp/g; echo BACK=$(sha256sum </tmp/g | cut -d' ' -f1)";
    let fetch = "ip link set eth0 up; ip addr add 10.5.0.3/24 dev eth0
socat -u TCP:10.5.0.2:7000,retry=1000,interval=0.3 CREATE:/tmp/f; echo GOT=$(sha256sum </tmp/f | cut -d' ' -f1)
ping -q -c 3 -i 0.2 -s 1400 10.5.0.2 >/dev/null && echo PING=good
socat -u FILE:/tmp/f TCP:10.5.0.2:7001,retry=1000,interval=0.3";
    let mut first = host.debian(&one, serve, &["--net", "tap=tap0,id=net0,backend=user"])?;
    let mut second = host.debian(
        &two,
        fetch,
        &["--net", "tap=tap1,id=net1,backend=vhost-net"],
    )?;
    second.wait_for("PING=good", LIMIT)?;
    second.ends_with(0, LIMIT)?;
    first.ends_with(0, LIMIT)?;
    let output = first.output();
    let sum = output.lines().find_map(|l| l.strip_prefix("SUM="));
    let sum = sum.ok_or_else(|| first.story("no sum"))?.trim();
    check(second.output().contains(&format!("GOT={sum}")), || {
        second.story(&format!("not {sum}"))
    })?;
    check(output.contains(&format!("BACK={sum}")), || {
        first.story("what came back is something else")
    })
}

fn filters() -> Verdict {
    let scratch = Scratch::new("filters")?;
    let host = Namespace::new("filters")?;
    host.tap("tap0", "10.5.0.1/24", "")?;
    let socket = scratch.path("api");
    let script = "ip maddr add 01:00:5e:11:22:33 dev eth0
ip link add link eth0 name eth0.5 type vlan id 5; ip link set eth0.5 up; ip addr add 10.6.0.2/24 dev eth0.5
echo SET; read -r line
tcpdump -p -n -i eth0 -c 1 ether dst 02:99:99:99:99:99 >/tmp/seen 2>/tmp/err & sleep 1; echo LISTENING; read -r line
grep -q 0x9999 /tmp/seen && echo FOREIGN=seen || echo FOREIGN=kept-out; kill %1 2>/dev/null
ip link set eth0 promisc on; sleep 0.2; echo PROMISC; read -r line
ip link set eth0 promisc off
ping -q -c 3 -i 0.2 10.6.0.1 >/dev/null && echo VLAN=good
ip link set eth0 down; ip link set eth0 address 02:12:34:56:78:9a; ip link set eth0 up; ip addr add 10.5.0.2/24 dev eth0 2>/dev/null
until ping -q -c 1 -W 2 10.5.0.1 >/dev/null; do :; done; echo NEWMAC; read -r line";
    let mut vmm = guest(
        &host,
        &scratch,
        ",backend=user,mac=52:54:00:aa:bb:cc",
        script,
        &["--api-socket", &socket],
    )?;
    vmm.wait_for("SET", LIMIT)?;
    let stats = ctl(&socket, &["stats", "net0"])?;
    let has = |key: &str, value: serde_json::Value| {
        stats["net"][key]
            .as_array()
            .is_some_and(|a| a.contains(&value))
    };
    check(
        stats["net"]["mac"] == "52:54:00:aa:bb:cc"
            && has("multicast_filter", "01:00:5e:11:22:33".into())
            && has("vlan_filter", 5.into()),
        || format!("the driver's filters are not read back: {stats}"),
    )?;
    vmm.type_text("\n")?;
    vmm.wait_for("LISTENING", LIMIT)?;
    // A frame to somebody else, ten times.
    let send = "import socket; s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW); s.bind((\"tap0\", 0x9999)); [s.send(bytes.fromhex(\"029999999999020000000001\") + b\"\\x99\\x99\" + bytes(60)) for _ in range(10)]";
    host.sh(&format!("python3 -c '{send}'"))?;
    host.sh("ping -q -c 3 -i 0.2 10.5.0.2")?;
    vmm.type_text("\n")?;
    // A line comes letter by letter: the next one ends it.
    vmm.wait_for("PROMISC", LIMIT)?;
    check(vmm.output().contains("FOREIGN=kept-out"), || {
        vmm.story("a frame to a foreign address came in")
    })?;
    let stats = ctl(&socket, &["stats", "net0"])?;
    check(stats["net"]["promiscuous"] == true, || stats.to_string())?;
    host.sh("ip link add link tap0 name tap0.5 type vlan id 5; ip link set tap0.5 up; ip addr add 10.6.0.1/24 dev tap0.5")?;
    vmm.type_text("\n")?;
    vmm.wait_for("VLAN=good", LIMIT)?;
    vmm.wait_for("NEWMAC", LIMIT)?;
    let stats = ctl(&socket, &["stats", "net0"])?;
    check(stats["net"]["mac"] == "02:12:34:56:78:9a", || {
        stats.to_string()
    })?;
    vmm.type_text("\n")?;
    vmm.ends_with(0, LIMIT)
}

fn rate_limits() -> Verdict {
    let scratch = Scratch::new("netlimit")?;
    let host = Namespace::new("netlimit")?;
    host.tap("tap0", "10.5.0.1/24", "")?;
    let socket = scratch.path("api");
    let down = scratch.disk("down", 2 << 20, 83)?;
    let script = "socat -u TCP:10.5.0.1:7000,retry=50,interval=0.2 CREATE:/tmp/f; echo DOWN=$(sha256sum </tmp/f); read -r line
socat -u FILE:/tmp/f TCP:10.5.0.1:7001,retry=50,interval=0.2; echo UP; read -r line";
    let mut vmm = guest(
        &host,
        &scratch,
        ",backend=user,rx-bps=512K:64K",
        script,
        &["--api-socket", &socket],
    )?;
    // 2 MiB at 512 KiB/s with a burst of 64 KiB and one large frame on credit: at least 3.7 s.
    let mut sender = host.spawn(&format!(
        "socat -u FILE:{down} TCP-LISTEN:7000,bind=10.5.0.1,reuseaddr"
    ))?;
    let start = Instant::now();
    vmm.wait_for(&format!("DOWN={}", sum(&down)?), LIMIT)?;
    sender.ends_with(0, LIMIT)?;
    let to_guest = start.elapsed();
    check(to_guest >= Duration::from_millis(3600), || {
        format!("2 MiB to the guest at 512 KiB/s took {to_guest:?}")
    })?;
    ctl(
        &socket,
        &[
            "update-net",
            "net0",
            "--rx-bps",
            "0",
            "--tx-bps",
            "512K:64K",
        ],
    )?;
    let up = scratch.path("up");
    let mut receiver = host.spawn(&format!(
        "socat -u TCP-LISTEN:7001,bind=10.5.0.1,reuseaddr CREATE:{up}"
    ))?;
    let start = Instant::now();
    vmm.type_text("\n")?;
    receiver.ends_with(0, LIMIT)?;
    let from_guest = start.elapsed();
    vmm.wait_for("UP", LIMIT)?;
    check(from_guest >= Duration::from_millis(3600), || {
        format!("2 MiB from the guest at 512 KiB/s took {from_guest:?}")
    })?;
    check(sum(&up)? == sum(&down)?, || {
        "what came back is something else".to_string()
    })?;
    vmm.type_text("\n")?;
    println!("[2 MiB at 512 KiB/s: {to_guest:?} to the guest, {from_guest:?} from it]");
    vmm.ends_with(0, LIMIT)
}

fn reuse() -> Verdict {
    let scratch = Scratch::new("reuse")?;
    let host = Namespace::new("reuse")?;
    host.tap("tap0", "10.5.0.1/24", "")?;
    let script = "ping -q -c 2 -i 0.2 10.5.0.1 >/dev/null && echo PING=good; read -r line";
    for backend in ["user", "vhost-net"] {
        let mut vmm = guest(&host, &scratch, &format!(",backend={backend}"), script, &[])?;
        vmm.wait_for("PING=good", LIMIT)?;
        vmm.kill();
        bulkhead_tests::vmm::nothing_left(LIMIT)?;
    }
    Ok(())
}
