//! A tap that is handed in as open descriptors (`--net fd=N:N`), in one guest: segmentation
//! offloads of both IP versions and of UDP, both ways, as ethtool turns them on and off; limits
//! in packets, judged by counts; a drain; the death of the device's process.

use std::time::{Duration, Instant};

use bulkhead_tests::host::{Namespace, debian_by, sh};
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, ctl};

use crate::net::LIMIT;

/// The tests of this subject.
pub fn tests() -> Vec<Test> {
    let test = |name, long, run| Test {
        subject: "net",
        name,
        long,
        run,
    };
    vec![
        test(
            "a tap handed in by descriptors: TSO and USO on and off, packet limits, drain, a killed process (user space)",
            false,
            || handed("user"),
        ),
        test(
            "a tap handed in by descriptors: TSO and USO on and off, drain, a killed process (vhost-net)",
            true,
            || handed("vhost-net"),
        ),
    ]
}

/// Attaches two queues of tap0 as descriptors 10 and 11, and becomes what it is given.
const ATTACH: &str = "import fcntl, os, struct, sys
for number in (10, 11):
    fd = os.open('/dev/net/tun', os.O_RDWR)
    fcntl.ioctl(fd, 0x400454ca, struct.pack('16sH22x', b'tap0', 0x5102))
    os.dup2(fd, number, True)
    os.close(fd)
os.execvp(sys.argv[1], sys.argv[1:])";

/// What comes out of the tap: at each line the largest frame of each protocol since the last,
/// and how many datagrams have gone to port 7009.
const SNIFFER: &str = "import select, socket, sys
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
s.setsockopt(socket.SOL_SOCKET, 33, 16 << 20)
s.bind(('tap0', 0))
big, count, turn = {}, 0, 0
print('SNIFFS', flush=True)
while True:
    ready = select.select([s, sys.stdin], [], [])[0]
    if s in ready:
        f, a = s.recvfrom(70000)
        if a[2] == 4:
            continue
        four = f[12:14] == b'\\x08\\x00'
        name = {6: 'tcp', 17: 'udp'}.get(f[23] if four else f[20] if f[12:14] == b'\\x86\\xdd' else 0)
        if name:
            name += '4' if four else '6'
            big[name] = max(len(f), big.get(name, 0))
            count += name == 'udp4' and f[36:38] == (7009).to_bytes(2, 'big')
    elif sys.stdin.readline():
        turn += 1
        print(f'SEEN-{turn}', *(f'{n}={big.get(n, 0)}' for n in ('tcp4', 'tcp6', 'udp4')), f'count={count}', flush=True)
        big = {}
    else:
        break";

/// The guest's side. `turn` moves data both ways by TCP over both IP versions and by UDP in
/// segments of 1000 bytes, and says how long the frames were that came in, on average. Where a
/// limit holds ARP back, too, Linux would lose the address and then datagrams that wait for it.
const SCRIPT: &str = r#"ip link set lo up; ip link set eth0 up; ip addr add 10.5.0.2/24 dev eth0; ip -6 addr add fd05::2/64 dev eth0 nodad
until ping -q -c 1 -W 2 10.5.0.1 >/dev/null && ping -q -c 1 -W 2 fd05::1 >/dev/null; do :; done
at() { cat /sys/class/net/eth0/statistics/$1; }
average() { echo AVERAGE-$1=$((($(at rx_bytes) - bytes) / ($(at rx_packets) - packets))); }
mark() { bytes=$(at rx_bytes); packets=$(at rx_packets); }
head -c 256K /dev/urandom >/tmp/f; head -c 16000 /tmp/f >/tmp/u; echo SUM=$(sha256sum </tmp/f | cut -d' ' -f1) USUM=$(sha256sum </tmp/u | cut -d' ' -f1)
turn() {
  mark; echo GOT4-$1=$(socat -u TCP:10.5.0.1:7000,retry=50,interval=0.2 - | sha256sum | cut -d' ' -f1); average tcp4-$1
  mark; echo GOT6-$1=$(socat -u TCP6:[fd05::1]:7001,retry=50,interval=0.2 - | sha256sum | cut -d' ' -f1); average tcp6-$1
  socat -u FILE:/tmp/f TCP:10.5.0.1:7002,retry=50,interval=0.2
  socat -u FILE:/tmp/f TCP6:[fd05::1]:7003,retry=50,interval=0.2
  (timeout 600 socat -u -T 600 UDP4-RECV:7005 - | head -c 16000 | sha256sum | cut -d' ' -f1 >/tmp/usum) &
  until ss -lun | grep -q :7005; do sleep 0.05; done
  mark; echo LISTENS-$1
  until [ -s /tmp/usum ]; do sleep 0.1; done
  echo UGOT-$1=$(cat /tmp/usum); average udp-$1; rm -f /tmp/usum; pkill -f UDP4-RECV:7005; wait
  socat -u -b 16000 FILE:/tmp/u UDP4:10.5.0.1:7004,setsockopt-int=17:103:1000
  echo TURNED-$1; read -r line
}
has() { ethtool -k eth0 | grep -E '^[[:space:]]*(tx-tcp-segmentation|tx-tcp6-segmentation|tx-udp-segmentation|rx-gro-hw): ' | tr -d ' \t' | tr '\n' ' '; }
ethtool -K eth0 gro off; ethtool -K eth0 tx-udp-segmentation on
echo FEATURES $(has); turn on
for f in tx-tcp-segmentation tx-tcp6-segmentation tx-udp-segmentation rx-gro-hw; do ethtool -K eth0 $f off || echo REFUSED $f; done
echo FEATURES $(has); turn off
for f in tx-tcp-segmentation tx-tcp6-segmentation tx-udp-segmentation rx-gro-hw; do ethtool -K eth0 $f on || echo REFUSED $f; done
echo FEATURES $(has)
head -c 60000 /dev/zero >/tmp/z
timeout 600 socat -u -T 600 UDP4-RECV:7008 - >/tmp/came 2>/dev/null &
until ss -lun | grep -q :7008; do sleep 0.05; done
mac=$(ip neigh show 10.5.0.1 dev eth0 | sed 's/.*lladdr \([^ ]*\) .*/\1/'); ip neigh replace 10.5.0.1 lladdr $mac dev eth0 nud permanent
echo LIMITS; read -r line
echo CAME=$(($(stat -c %s /tmp/came) / 100)); echo TOLD; read -r line
echo SENDING; socat -u -b 100 FILE:/tmp/z UDP4:10.5.0.1:7009; echo SENT; read -r line
socat -u TCP:10.5.0.1:7000,retry=50,interval=0.2 CREATE:/tmp/long & echo LONG; wait $!; echo LONGGOT=$(sha256sum </tmp/long | cut -d' ' -f1)
read -r line"#;

/// Sends 16 segments of 1000 bytes at once.
fn send_segments(host: &Namespace, vmm: &mut Vmm, file: &str, wanted: &str) -> Verdict {
    let send = format!(
        "python3 -c 'import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.setsockopt(17, 103, 1000); s.sendto(open(\"{file}\", \"rb\").read(), (\"10.5.0.2\", 7005))'"
    );
    host.sh(&send)?;
    vmm.wait_for(wanted, LIMIT)
}

fn handed(backend: &str) -> Verdict {
    let scratch = Scratch::new("handed")?;
    let host = Namespace::new("handed")?;
    host.tap("tap0", "10.5.0.1/24", "multi_queue")?;
    host.sh(
        "sysctl -qw net.ipv6.conf.tap0.disable_ipv6=0; ip -6 addr add fd05::1/64 dev tap0 nodad",
    )?;
    let down = scratch.disk("down", 256 << 10, 101)?;
    let segments = scratch.disk("segments", 16_000, 103)?;
    let socket = scratch.path("api");
    let enter = host.enter();
    let by = [&enter[0], &enter[1], "python3", "-c", ATTACH];
    let net = format!("fd=10:11,id=net0,backend={backend}");
    let more = ["--net", &net, "--cpus", "2", "--api-socket", &socket];
    // Where datagrams are refused, the guest gives up.
    let _sink = host.spawn("socat -u UDP4-RECV:7009,bind=10.5.0.1 CREATE:/dev/null")?;
    let mut sniffer = host.spawn(&format!("python3 -c \"{}\"", SNIFFER.replace('"', "\\\"")))?;
    sniffer.wait_for("SNIFFS", LIMIT)?;
    let mut vmm = debian_by(&by, &scratch, SCRIPT, &[] as &[&str], &more)?;
    vmm.wait_for("USUM=", LIMIT)?;
    for (number, round) in (1..).zip(["on", "off"]) {
        turn(&host, &scratch, &mut vmm, round, (&down, &segments))?;
        sniffer.type_text("\n")?;
        sniffer.wait_for(&format!("SEEN-{number} "), LIMIT)?;
        frames(&vmm, &sniffer, round)?;
        vmm.type_text("\n")?;
    }
    vmm.wait_for("LIMITS", LIMIT)?;
    if backend == "user" {
        limits(&host, &mut vmm, &mut sniffer, &socket)?;
    } else {
        let refused = ctl(&socket, &["update-net", "net0", "--rx-pps", "1:50"]);
        check(refused.is_err(), || "vhost-net takes a limit".to_string())?;
        vmm.type_text("\n\n")?;
    }
    vmm.wait_for("SENT", LIMIT)?;
    drained(&host, &socket)?;
    killed(&host, &mut vmm, &socket, &scratch)?;
    let features: Vec<String> = lines(&vmm.output(), "FEATURES ");
    check(
        features.len() == 3 && features.first() == features.last(),
        || vmm.story("offloads that were turned on again are not what they were"),
    )?;
    println!("[{}]", features.first().map_or("?", String::as_str));
    vmm.type_text("\n")?;
    vmm.ends_with(0, LIMIT)
}

/// What follows each such word in what was printed.
fn lines(text: &str, word: &str) -> Vec<String> {
    let rest = |line: &str| line.trim().strip_prefix(word).map(str::to_string);
    text.lines().filter_map(rest).collect()
}

/// One turn of the guest's.
fn turn(
    host: &Namespace,
    scratch: &Scratch,
    vmm: &mut Vmm,
    round: &str,
    (down, segments): (&str, &str),
) -> Verdict {
    let (up4, up6, upu) = (
        scratch.path("up4"),
        scratch.path("up6"),
        scratch.path("upu"),
    );
    let _four = host.spawn(&format!(
        "socat -u FILE:{down} TCP-LISTEN:7000,bind=10.5.0.1,reuseaddr"
    ))?;
    let _six = host.spawn(&format!(
        "socat -u FILE:{down} TCP6-LISTEN:7001,bind=[fd05::1],reuseaddr"
    ))?;
    let mut up = [
        host.spawn(&format!(
            "socat -u TCP-LISTEN:7002,bind=10.5.0.1,reuseaddr CREATE:{up4}"
        ))?,
        host.spawn(&format!(
            "socat -u TCP6-LISTEN:7003,bind=[fd05::1],reuseaddr CREATE:{up6}"
        ))?,
    ];
    // Each datagram is written as it comes: 16 of them.
    let _ = std::fs::remove_file(&upu);
    let _datagrams = host.spawn(&format!(
        "socat -u UDP4-RECV:7004,bind=10.5.0.1 CREATE:{upu}"
    ))?;
    vmm.wait_for(&format!("LISTENS-{round}"), LIMIT)?;
    send_segments(host, vmm, segments, &format!("UGOT-{round}="))?;
    vmm.wait_for(&format!("TURNED-{round}"), LIMIT)?;
    for receiver in &mut up {
        receiver.ends_with(0, LIMIT)?;
    }
    let end = Instant::now() + LIMIT;
    while std::fs::metadata(&upu).map_or(0, |m| m.len()) < 16_000 {
        check(Instant::now() < end, || {
            vmm.story("the guest's datagrams did not all come")
        })?;
        std::thread::sleep(Duration::from_millis(20));
    }
    let sum = |path: &str| {
        sh(&format!("sha256sum <{path} | cut -d' ' -f1")).map(|s| s.trim().to_string())
    };
    let output = vmm.output();
    let (down, segments) = (sum(down)?, sum(segments)?);
    let mut wanted = vec![
        format!("GOT4-{round}={down}"),
        format!("GOT6-{round}={down}"),
        format!("UGOT-{round}={segments}"),
    ];
    wanted.push(format!("SUM={} USUM={}", sum(&up4)?, sum(&upu)?));
    wanted.push(format!("SUM={} USUM={}", sum(&up6)?, sum(&upu)?));
    for wanted in wanted {
        check(output.contains(&wanted), || {
            vmm.story(&format!("no {wanted}"))
        })?;
    }
    Ok(())
}

/// With offloads frames are longer than the MTU, both ways; without, none is.
fn frames(vmm: &Vmm, sniffer: &Vmm, round: &str) -> Verdict {
    let number = |text: &str| text.parse::<u64>().unwrap_or(u64::MAX);
    let mut averages = Vec::new();
    for kind in ["tcp4", "tcp6", "udp"] {
        let told = lines(&vmm.output(), &format!("AVERAGE-{kind}-{round}="));
        averages.push(told.first().map_or(u64::MAX, |n| number(n)));
    }
    let output = sniffer.output();
    let largest: Vec<u64> = output
        .lines()
        .last()
        .unwrap_or_default()
        .split_whitespace()
        .skip(1)
        .take(3)
        .map(|word| word.split_once('=').map_or(u64::MAX, |(_, n)| number(n)))
        .collect();
    let fail = |what: &str| {
        vmm.story(&format!(
            "{round}: {what}: in, on average {averages:?}; out, largest {largest:?}"
        ))
    };
    check(largest.len() == 3 && !averages.contains(&u64::MAX), || {
        fail("no numbers")
    })?;
    if round == "off" {
        check(averages.iter().all(|n| *n <= 1514), || {
            fail("a long frame came in")
        })?;
        check(largest.iter().all(|n| *n <= 1514), || {
            fail("a long frame went out")
        })
    } else {
        check(averages.iter().all(|n| *n > 1600), || {
            fail("no long frames came in")
        })?;
        check(largest.iter().all(|n| *n > 1600), || {
            fail("no long frames went out")
        })
    }
}

/// Datagrams of each kind that are sent.
const MANY: u64 = 600;

/// One packet a second and 50 saved up: of 600 no more pass, each way. Lifted: all that wait.
fn limits(host: &Namespace, vmm: &mut Vmm, sniffer: &mut Vmm, socket: &str) -> Verdict {
    let allowed = |since: Instant| 50 + since.elapsed().as_secs() + 1;
    let start = Instant::now();
    ctl(socket, &["update-net", "net0", "--rx-pps", "1:50"])?;
    let send = format!(
        "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); [s.sendto(bytes(100), (\"10.5.0.2\", 7008)) for _ in range({MANY})]"
    );
    host.sh(&format!("python3 -c '{send}'"))?;
    // Time for more to come than may; too little of it shows less, and fails nothing.
    std::thread::sleep(Duration::from_secs(2));
    vmm.type_text("\n")?;
    vmm.wait_for("TOLD", LIMIT)?;
    let (came, most) = (lines(&vmm.output(), "CAME="), allowed(start));
    let came: u64 = came
        .first()
        .and_then(|n| n.parse().ok())
        .unwrap_or(u64::MAX);
    check((1..=most).contains(&came), || {
        vmm.story(&format!(
            "{came} datagrams came in, {most} at most were allowed"
        ))
    })?;

    let start = Instant::now();
    ctl(
        socket,
        &["update-net", "net0", "--rx-pps", "0", "--tx-pps", "1:50"],
    )?;
    vmm.type_text("\n")?;
    vmm.wait_for("SENDING", LIMIT)?;
    std::thread::sleep(Duration::from_secs(2));
    let mut number = 3;
    let went = count(sniffer, number)?;
    let most = allowed(start);
    check(went <= most, || {
        vmm.story(&format!(
            "{went} datagrams went out, {most} at most were allowed"
        ))
    })?;
    check(!vmm.output().contains("SENT"), || {
        vmm.story("all were taken at once")
    })?;
    ctl(socket, &["update-net", "net0", "--tx-pps", "0"])?;
    vmm.wait_for("SENT", LIMIT)?;
    let end = Instant::now() + LIMIT;
    loop {
        number += 1;
        let gone = count(sniffer, number)?;
        if gone == MANY {
            break;
        }
        check(Instant::now() < end, || {
            let stats = ctl(socket, &["stats", "net0"]);
            let tap = host.sh("ip -s -s link show tap0; nstat -az | grep -i drop");
            let far = format!("{went} at first, {gone} of {MANY} now");
            vmm.story(&format!(
                "held-back datagrams did not all go: {far}: {stats:?} {tap:?}"
            ))
        })?;
        std::thread::sleep(Duration::from_millis(100));
    }
    println!("[of {MANY} at 1 a second and 50 at once: {came} in, {went} out]");
    Ok(())
}

/// Datagrams to port 7009 that have come out of the tap.
fn count(sniffer: &mut Vmm, number: u32) -> Result<u64, String> {
    sniffer.type_text("\n")?;
    sniffer.wait_for(&format!("SEEN-{number} "), LIMIT)?;
    let output = sniffer.output();
    let count = output
        .lines()
        .last()
        .and_then(|line| line.rsplit_once("count="));
    count
        .and_then(|(_, n)| n.parse().ok())
        .ok_or_else(|| sniffer.story("no count"))
}

/// A drained device moves nothing; resumed, it goes on.
fn drained(host: &Namespace, socket: &str) -> Verdict {
    host.sh("ping -q -c 1 -W 60 10.5.0.2")?;
    ctl(socket, &["drain", "net0"])?;
    let state = device(socket, "state")?;
    check(state == "drained", || {
        format!("drained, its state is {state}")
    })?;
    check(
        host.sh("ping -q -c 2 -i 0.2 -W 1 10.5.0.2").is_err(),
        || "frames pass a drained device".to_string(),
    )?;
    ctl(socket, &["resume-device", "net0"])?;
    host.sh("for n in $(seq 100); do ping -q -c 1 -W 3 10.5.0.2 >/dev/null && exit; done; exit 1")
        .map(drop)
}

/// A field of what the API says of the device.
fn device(socket: &str, field: &str) -> Result<serde_json::Value, String> {
    let devices = ctl(socket, &["devices"])?;
    let found = devices
        .as_array()
        .into_iter()
        .flatten()
        .find(|d| d["id"] == "net0");
    found
        .map(|d| d[field].clone())
        .ok_or_else(|| format!("no net0 in {devices}"))
}

/// Its process is killed while a file is on its way: the file arrives.
fn killed(host: &Namespace, vmm: &mut Vmm, socket: &str, scratch: &Scratch) -> Verdict {
    let file = scratch.disk("long", 3 << 20, 107)?;
    let _sender = host.spawn(&format!(
        "socat -u FILE:{file} TCP-LISTEN:7000,bind=10.5.0.1,reuseaddr"
    ))?;
    vmm.type_text("\n")?;
    vmm.wait_for("LONG", LIMIT)?;
    sh(&format!("kill -9 {}", device(socket, "pid")?))?;
    let sum = sh(&format!("sha256sum <{file} | cut -d' ' -f1"))?;
    vmm.wait_for(&format!("LONGGOT={}", sum.trim()), LIMIT)?;
    let (state, number) = (device(socket, "state")?, device(socket, "incarnation")?);
    check(state == "running" && number == 2, || {
        vmm.story(&format!(
            "after its death: {state}, process number {number}"
        ))
    })
}
