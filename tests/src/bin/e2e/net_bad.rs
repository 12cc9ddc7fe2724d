//! Networks that cannot be had: each a clear line and a defined state; the VM boots without
//! that link only if `required=off`.

use std::time::{Duration, Instant};

use bulkhead_tests::host::Namespace;
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, bulkhead, ctl, nothing_left, patience};

use crate::net::LIMIT;
use crate::net_modes::{passt_at, testpmd_that};

/// The tests of this subject.
pub fn tests() -> Vec<Test> {
    let test = Test::short("net");
    vec![
        test(
            "a tap that is absent, busy, of the wrong type or without multiqueue is said so in one line",
            taps,
        ),
        test(
            "a MAC, an MTU or a number of queues that cannot be is said so in one line",
            options,
        ),
        test(
            "a switch that never answers, answers garbage or hangs up is said so in one line",
            switches,
        ),
        test(
            "a switch that comes back as a worse one (garbage, fewer queues, other features) is said so in one line, and the link waits for a good one",
            successors,
        ),
        test(
            "with required=off the VM boots and that link is down",
            not_required,
        ),
    ]
}

/// Starts a VM with this network in the namespace.
fn start(host: &Namespace, net: &str, more: &[&str]) -> Result<Vmm, String> {
    let enter = host.enter();
    let by: Vec<&str> = enter.iter().map(String::as_str).collect();
    let mut args = vec!["--net", net];
    args.extend_from_slice(more);
    Vmm::boot_by(&by, "bh.cmd=hang", &args)
}

/// It ends with this code and one line that holds the words; nothing is left.
fn refused(host: &Namespace, net: &str, more: &[&str], code: i32, words: &[&str]) -> Verdict {
    let mut vmm = start(host, net, more)?;
    let got = vmm.wait(LIMIT)?;
    let errors = vmm.errors();
    let fail = |what: &str| vmm.story(&format!("--net {net}: {what}"));
    check(got == code, || {
        fail(&format!("exit code {got}, not {code}"))
    })?;
    check(errors.lines().count() == 1, || fail("not one line"))?;
    for word in words {
        check(errors.contains(word), || fail(&format!("no {word:?}")))?;
    }
    println!("[{}]", errors.trim());
    nothing_left(Duration::from_secs(30))
}

fn taps() -> Verdict {
    let host = Namespace::new("bad")?;
    host.sh(
        "ip tuntap add single mode tap vnet_hdr; ip tuntap add many mode tap vnet_hdr multi_queue
ip tuntap add busy mode tap vnet_hdr; ip tuntap add layer3 mode tun; ip link add bridge0 type bridge
ip link set single up; ip link set many up; ip link set busy up",
    )?;
    // What is absent, run makes (as root), and takes away again.
    let mut maker = start(&host, "tap=made0", &[])?;
    maker.wait_for("BULKHEAD-GUEST-READY", LIMIT)?;
    host.sh("ip link show made0 >/dev/null")?;
    maker.kill();
    nothing_left(Duration::from_secs(30))?;
    host.sh("! ip link show made0 >/dev/null 2>&1")?;
    refused(&host, "tap=layer3", &[], 1, &["layer3"])?;
    refused(&host, "tap=bridge0", &[], 1, &["bridge0"])?;
    refused(
        &host,
        "tap=single,queues=2",
        &["--cpus", "2"],
        1,
        &["single"],
    )?;
    // One of several queues would let a second VM in, and share the first one's frames with it.
    for tap in ["tap=busy", "tap=many"] {
        let mut holder = start(&host, tap, &[])?;
        holder.wait_for("BULKHEAD-GUEST-READY", LIMIT)?;
        let mut vmm = start(&host, tap, &[])?;
        let code = vmm.wait(LIMIT)?;
        let errors = vmm.errors();
        check(
            code == 1 && errors.lines().count() == 1 && errors.contains("busy"),
            || vmm.story(&format!("a busy tap: exit code {code}")),
        )?;
        println!("[{}]", errors.trim());
        holder.kill();
        nothing_left(Duration::from_secs(30))?;
    }
    refused(
        &host,
        "tap=abcdefghijklmnopq",
        &[],
        2,
        &["abcdefghijklmnopq"],
    )?;
    refused(&host, "fd=77", &[], 1, &["77"])
}

fn options() -> Verdict {
    let host = Namespace::new("bad")?;
    host.sh("ip tuntap add tap0 mode tap vnet_hdr multi_queue; ip link set tap0 up")?;
    for mac in [
        "52:54:00:12:34",
        "52:54:00:12:34:zz",
        "525400123456",
        "01:00:5e:00:00:01",
        "ff:ff:ff:ff:ff:ff",
        "00:00:00:00:00:00",
    ] {
        refused(&host, &format!("tap=tap0,mac={mac}"), &[], 2, &[mac])?;
    }
    refused(&host, "tap=tap0,mtu=10", &[], 2, &["mtu"])?;
    refused(&host, "tap=tap0,mtu=70000", &[], 2, &["mtu"])?;
    refused(&host, "tap=tap0,backend=magic", &[], 2, &["magic"])?;
    refused(&host, "tap=tap0,queues=0", &[], 2, &["queues"])?;
    refused(&host, "tap=tap0,queues=100000", &[], 2, &["queues"])?;
    refused(
        &host,
        "tap=tap0,mtu=1400,mtu=1500",
        &[],
        2,
        &["mtu= is given twice"],
    )?;
    // More than one process serves, though there are vCPUs enough; and than the tap has.
    refused(
        &host,
        "tap=tap0,queues=33",
        &["--cpus", "64"],
        2,
        &["queues"],
    )?;
    host.sh("ip tuntap add tap1 mode tap vnet_hdr multi_queue; ip link set tap1 up")?;
    let hold = "import fcntl, os, struct, time
kept = []
for n in range(240):
    fd = os.open('/dev/net/tun', os.O_RDWR)
    fcntl.ioctl(fd, 0x400454ca, struct.pack('16sH22x', b'tap1', 0x5102))
    fcntl.ioctl(fd, 0x400454d9, struct.pack('16sH22x', b'tap1', 0x0400))
    kept.append(fd)
print('HELD', flush=True); time.sleep(600)";
    let mut holder = host.spawn(&format!("python3 -c \"{hold}\""))?;
    holder.wait_for("HELD", LIMIT)?;
    refused(&host, "tap=tap1,queues=20", &["--cpus", "20"], 1, &["tap1"])?;
    let mut vmm = start(&host, "tap=tap0,queues=3", &["--cpus", "2"])?;
    let code = vmm.wait(LIMIT)?;
    let errors = vmm.errors();
    check(
        (code == 1 || code == 2) && errors.lines().count() == 1 && errors.contains("queue"),
        || vmm.story(&format!("3 queues, 2 vCPUs: exit code {code}")),
    )?;
    println!("[{}]", errors.trim());
    Ok(())
}

/// A switch that behaves badly: what it does with each connection.
pub fn rogue(host: &Namespace, socket: &str, with: &str) -> Result<Vmm, String> {
    let program = format!(
        "import socket, os, time
s = socket.socket(socket.AF_UNIX); s.bind('{socket}'); s.listen(16); print('LISTENS', flush=True)
kept = []
while True:
    c, _ = s.accept()
    kept.append(c)
    try:
        {with}
    except OSError:
        pass"
    );
    let mut running = host.spawn(&format!("python3 -c \"{program}\""))?;
    running.wait_for("LISTENS", LIMIT)?;
    Ok(running)
}

const NEVER: &str = "pass";
/// It answers with garbage.
pub const GARBAGE: &str = "c.recv(12); c.sendall(os.urandom(8192))";
const SHORT: &str = "c.recv(12); c.sendall(bytes(5))";
/// It hangs up.
pub const HANGS_UP: &str = "c.close()";
const AFTER_ONE: &str = "c.recv(12); c.sendall(bytes([1,0,0,0,5,0,0,0,8,0,0,0]) + bytes([0,0,0,64,1,0,0,0])); c.close()";

fn switches() -> Verdict {
    let scratch = Scratch::new("rogue")?;
    let host = Namespace::new("rogue")?;
    let absent = scratch.path("absent");
    refused(
        &host,
        &format!("vhost-user={absent},id=net7"),
        &[],
        1,
        &[&absent],
    )?;
    let file = scratch.file("file", b"no socket")?;
    refused(&host, &format!("vhost-user={file}"), &[], 1, &[&file])?;
    for (name, with) in [
        ("never", NEVER),
        ("garbage", GARBAGE),
        ("short", SHORT),
        ("hangs-up", HANGS_UP),
        ("after-one", AFTER_ONE),
    ] {
        let socket = scratch.path(name);
        let _switch = rogue(&host, &socket, with)?;
        refused(
            &host,
            &format!("vhost-user={socket},id=net7"),
            &[],
            1,
            &["net7"],
        )
        .map_err(|e| format!("{name}: {e}"))?;
    }
    Ok(())
}

/// Waits for an event of this kind with these words.
pub fn until_event(api: &str, kind: &str, words: &str) -> Result<String, String> {
    let end = Instant::now() + patience(LIMIT);
    loop {
        let output = bulkhead(&["ctl", "--socket", api, "--json", "events"])?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let found = text
            .lines()
            .find(|line| line.contains(&format!("\"{kind}\"")) && line.contains(words));
        if let Some(line) = found {
            return Ok(line.to_owned());
        }
        check(Instant::now() < end, || {
            format!("no {kind} with {words:?}: {text}")
        })?;
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn successors() -> Verdict {
    let scratch = Scratch::new("successors")?;
    let (socket, api) = (scratch.path("switch"), scratch.path("api"));
    let host = Namespace::new("successors")?;
    host.sh(
        "ip link add up0 type dummy; ip addr add 192.0.2.2/24 dev up0; ip link set up0 up
ip route add default via 192.0.2.1",
    )?;
    let script = "ip link set eth0 up; ip addr add 10.5.0.2/24 dev eth0
ip neigh replace 10.5.0.1 lladdr 02:00:00:00:00:01 dev eth0 nud permanent
for n in first again; do
  until ping -q -c 1 -W 2 10.5.0.1 >/dev/null; do :; done; echo ANSWERED-$n; read -r line
done";
    let switch = |segments: &str| {
        let _ = std::fs::remove_file(&socket);
        testpmd_that("icmpecho", &socket, 2, &format!("client=0,tso={segments}"))
    };
    let first = switch("1")?;
    let net = format!("vhost-user={socket},id=net0,queues=2");
    let more = ["--net", &net, "--cpus", "2", "--api-socket", &api];
    let mut vmm = host.debian(&scratch, script, &more)?;
    vmm.wait_for("ANSWERED-first", LIMIT)?;
    drop(first);
    let told = |words: &str| -> Verdict {
        println!("[{}]", until_event(&api, "device.not-reconnected", words)?);
        let stats = ctl(&api, &["stats", "net0"])?;
        check(stats["net"]["link_up"] == false, || {
            vmm.story(&format!("{words}: {stats}"))
        })
    };
    let _ = std::fs::remove_file(&socket);
    let rogue = rogue(&host, &socket, GARBAGE)?;
    told("broke the vhost-user protocol")?;
    drop(rogue);
    let _ = std::fs::remove_file(&socket);
    let fewer = passt_at(&host, &socket)?;
    told("serves 1 queues, not 2")?;
    drop(fewer);
    let other = switch("0")?;
    told("lacks features that the driver uses")?;
    drop(other);
    let _last = switch("1")?;
    until_event(&api, "device.reconnected", "serves 4 queues")?;
    vmm.type_text("\n")?;
    vmm.wait_for("ANSWERED-again", LIMIT)?;
    vmm.type_text("\n")?;
    vmm.ends_with(0, LIMIT)
}

fn not_required() -> Verdict {
    let scratch = Scratch::new("optional")?;
    let host = Namespace::new("optional")?;
    let socket = scratch.path("hangs-up");
    host.sh("ip link add bridge0 type bridge")?;
    let _switch = rogue(&host, &socket, HANGS_UP)?;
    let script = "ip link set eth0 up 2>/dev/null; ip link set eth1 up 2>/dev/null; sleep 1
for i in eth0 eth1; do echo CARRIER-$i=$(cat /sys/class/net/$i/carrier 2>/dev/null || echo absent); done; echo UP";
    let nets = [
        format!("vhost-user={socket},id=net0,required=off"),
        "tap=bridge0,id=net1,required=off".to_string(),
    ];
    let mut vmm = host.debian(&scratch, script, &["--net", &nets[0], "--net", &nets[1]])?;
    vmm.wait_for("UP", LIMIT)?;
    vmm.ends_with(0, LIMIT)?;
    for i in ["eth0", "eth1"] {
        check(
            vmm.output().contains(&format!("CARRIER-{i}=0"))
                || vmm.output().contains(&format!("CARRIER-{i}=absent")),
            || vmm.story(&format!("{i} has a link")),
        )?;
    }
    let (out, errors) = (vmm.output(), vmm.errors());
    let carriers: Vec<&str> = out.lines().filter(|l| l.starts_with("CARRIER")).collect();
    println!(
        "[{}; {}]",
        carriers.join(" ").replace('\r', ""),
        errors.trim().replace('\n', "; ")
    );
    Ok(())
}
