//! Networks without a tap: user mode by passt, switches of others (DPDK, passt) over
//! vhost-user that restart, and any vhost-user device of somebody else's.

use bulkhead_tests::host::{Namespace, debian, sh};
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, ctl, patience};

use crate::net::LIMIT;

/// The tests of this subject.
pub fn tests() -> Vec<Test> {
    let test = Test::short("net");
    vec![
        test(
            "user mode for an ordinary user: addresses by DHCP and router advertisement, a name by DNS, TCP and UDP out over both IP versions, forwarded ports in",
            user_mode,
        ),
        test(
            "a DPDK switch (testpmd's vhost) serves two queue pairs, also after it was killed and restarted: the link goes down and up",
            || switch(false),
        ),
        test(
            "a DPDK switch that connects to the VM's own socket, also after its restart",
            || switch(true),
        ),
        test(
            "a link that is down before a switch carries nothing, not even from and to a guest that does not care, also after the switch was restarted",
            carries,
        ),
        test("passt as somebody else's switch gives a lease", passt),
        test(
            "user mode goes on with another passt when its own is killed",
            passt_killed,
        ),
        test(
            "user mode: its link is taken down and up, and what passt uses of the host is told and limited",
            user_link,
        ),
        test(
            "a generic vhost-user device: qemu-storage-daemon's disk, also after its restart",
            generic,
        ),
        test(
            "a generic vhost-user device with config=HEX: the guest reads that, not the back-end's",
            given_config,
        ),
    ]
}

/// A program that the harness's host script names.
pub fn tool(variable: &str) -> Result<String, String> {
    std::env::var(variable).map_err(|_| format!("{variable} is not set: run by tests/e2e"))
}

fn user_mode() -> Verdict {
    let scratch = Scratch::new("user")?;
    // The VM's host is 192.0.2.2 with a default route to `outside`, which has the names and
    // the services; no privilege and no tap.
    let host = Namespace::new("host")?;
    let outside = Namespace::new("outside")?;
    sh(&format!(
        "modprobe veth; ip -n {host} link add up0 type veth peer name down0 netns {outside}
ip -n {host} addr add 192.0.2.2/24 dev up0; ip -n {host} link set up0 up
ip -n {outside} addr add 192.0.2.1/24 dev down0; ip -n {outside} addr add 198.51.100.7/32 dev down0
ip -n {outside} link set down0 up; ip -n {host} route add default via 192.0.2.1
ip -n {host} addr add 2001:db8:1::2/64 dev up0 nodad; ip -n {outside} addr add 2001:db8:1::1/64 dev down0 nodad
ip -n {outside} addr add 2001:db8:7::7/128 dev down0 nodad; ip -n {host} route add default via 2001:db8:1::1",
        host = host.name(),
        outside = outside.name()
    ))?;
    let _dns = outside.spawn(
        "dnsmasq --no-daemon --conf-file=/dev/null --no-resolv --no-hosts --user=root --address=/service.test/198.51.100.7",
    )?;
    let file = scratch.disk("file", 1 << 20, 89)?;
    let _tcp = outside.spawn(&format!("socat -u FILE:{file} TCP-LISTEN:8000,reuseaddr"))?;
    let _tcp6 = outside.spawn(&format!(
        "socat -u FILE:{file} TCP6-LISTEN:8000,bind=[2001:db8:7::7],ipv6only=1,reuseaddr"
    ))?;
    let _udp6 = outside.spawn(
        "socat -b 65536 UDP6-RECVFROM:8001,bind=[2001:db8:7::7],ipv6only=1,fork,reuseaddr SYSTEM:cat",
    )?;
    let _udp = outside
        .spawn("socat -b 65536 UDP4-RECVFROM:8001,bind=198.51.100.7,fork,reuseaddr SYSTEM:cat")?;
    let resolv = scratch.file("resolv.conf", b"nameserver 192.0.2.1\n")?;
    let script = "ip link set lo up; ip link set eth0 up
cat >/tmp/lease <<'END'
#!/bin/sh
[ \"$1\" = bound ] || exit 0
ip addr add $ip/$mask dev $interface
ip route add ${router%% *} dev $interface; ip route add default via ${router%% *}
for d in $dns; do echo nameserver $d; done >/tmp/resolv.conf
echo LEASE ip=$ip router=$router dns=$dns
END
chmod 755 /tmp/lease; : >/tmp/resolv.conf
mount --bind /tmp/resolv.conf /etc/resolv.conf 2>/dev/null || ln -sf /tmp/resolv.conf /etc/resolv.conf
busybox udhcpc -i eth0 -n -q -t 30 -T 2 -s /tmp/lease 2>&1
name=$(busybox nslookup service.test $(awk '{ print $2; exit }' /tmp/resolv.conf) 2>&1 | awk '/^Address/ { a = $NF } END { print a }')
echo NAME=$name
echo GOT=$(socat -u TCP:198.51.100.7:8000,retry=20,interval=0.3 - | sha256sum)
n=0; until [ \"$(echo datagram | socat -T 2 - UDP4:198.51.100.7:8001 2>/dev/null)\" = datagram ] || [ $n -gt 30 ]; do n=$((n + 1)); done
[ $n -le 30 ] && echo UDP=good
until ip -6 addr show dev eth0 scope global | grep -q inet6 && ip -6 route | grep -q ^default; do sleep 0.2; done
echo LEASE6 $(ip -6 addr show dev eth0 scope global | awk '/inet6/ { print $2; exit }')
echo GOT6=$(socat -u TCP6:[2001:db8:7::7]:8000,retry=20,interval=0.3 - | sha256sum)
n=0; until [ \"$(echo datagram | socat -T 2 - UDP6:[2001:db8:7::7]:8001 2>/dev/null)\" = datagram ] || [ $n -gt 30 ]; do n=$((n + 1)); done
[ $n -le 30 ] && echo UDP6=good
socat -b 65536 UDP4-RECVFROM:5301,fork,reuseaddr SYSTEM:cat 2>/dev/null &
socat -u FILE:/bin/busybox TCP6-LISTEN:81,ipv6only=1,reuseaddr & SIX=$!; echo SIXSUM=$(sha256sum </bin/busybox)
head -c 300000 /dev/urandom >/tmp/f; echo SUM=$(sha256sum </tmp/f | cut -d' ' -f1)
socat -u FILE:/tmp/f TCP-LISTEN:80,reuseaddr & echo SERVING; wait $! $SIX; read -r line; echo DONE";
    let root = bulkhead_tests::host::rootfs()?;
    let (root, script) = (
        format!("path={root},readonly=on,id=rootfs,queues=1"),
        format!(
            "path={},readonly=on,id=script,queues=1",
            scratch.script("script", script)?
        ),
    );
    // What an ordinary user may read, and nobody's process can be told apart from root's.
    sh(&format!(
        "chmod 755 {0}; chmod 644 {0}/*; chmod 666 /dev/kvm",
        scratch.path("")
    ))?;
    // `unshare --mount`: the host's resolver is the test's.
    let by = [
        "nsenter".to_string(),
        format!("--net=/run/netns/{}", host.name()),
        "unshare".into(),
        "--mount".into(),
        "sh".into(),
        "-c".into(),
        format!(
            "mount --bind {resolv} /etc/resolv.conf && exec setpriv --reuid=65534 --regid=65534 --clear-groups --no-new-privs \"$@\""
        ),
        "sh".into(),
    ];
    let by: Vec<&str> = by.iter().map(String::as_str).collect();
    let passt = tool("PASST")?;
    let args = [
        "--disk",
        &root,
        "--disk",
        &script,
        "--memory",
        "384M",
        "--net",
        "user,id=net0,forward=tcp:127.0.0.1:8080:80,forward=udp:127.0.0.1:5300:5301,forward=tcp:[::1]:8081:81",
        "--passt",
        &passt,
    ];
    let mut vmm = Vmm::boot_by(&by, "bh.cmd=script root=/dev/vda", &args)?;
    vmm.wait_for("LEASE", LIMIT)?;
    vmm.wait_for("NAME=198.51.100.7", LIMIT)?;
    let expected = sh(&format!("sha256sum <{file}"))?;
    vmm.wait_for(
        &format!("GOT={}", expected.split_whitespace().next().unwrap_or("?")),
        LIMIT,
    )?;
    vmm.wait_for("UDP=good", LIMIT)?;
    vmm.wait_for(
        &format!("GOT6={}", expected.split_whitespace().next().unwrap_or("?")),
        LIMIT,
    )?;
    vmm.wait_for("UDP6=good", LIMIT)?;
    vmm.wait_for("SERVING", LIMIT)?;
    let came = host.sh("socat -u TCP:127.0.0.1:8080,retry=20,interval=0.5 - | sha256sum")?;
    vmm.wait_for(
        &format!("SUM={}", came.split_whitespace().next().unwrap_or("?")),
        LIMIT,
    )
    .map_err(|e| format!("the forwarded port gave {came}: {e}"))?;
    let came = host.sh("socat -u TCP6:[::1]:8081,retry=20,interval=0.5 - | sha256sum")?;
    check(
        vmm.output().contains(&format!(
            "SIXSUM={}",
            came.split_whitespace().next().unwrap_or("?")
        )),
        || vmm.story(&format!("the forwarded port of ::1 gave {came}")),
    )?;
    host.sh("for n in $(seq 60); do [ \"$(echo datagram | socat -T 2 - UDP4:127.0.0.1:5300 2>/dev/null)\" = datagram ] && exit; done; exit 1")
        .map_err(|e| vmm.story(&format!("the forwarded UDP port: {e}")))?;
    let owner = sh(&format!("stat -c %u /proc/{}", vmm.pid()))?;
    check(owner.trim() == "65534", || format!("it runs as {owner}"))?;
    vmm.type_text("\n")?;
    vmm.wait_for("DONE", LIMIT)?;
    vmm.ends_with(0, LIMIT)?;
    let output = vmm.output();
    let leases: Vec<&str> = output.lines().filter(|l| l.starts_with("LEASE")).collect();
    println!("[{}]", leases.join("; ").replace('\r', ""));
    bulkhead_tests::vmm::nothing_left(LIMIT)
}

/// testpmd that answers ARP and ICMP echo, as a switch with a host behind it would.
pub fn testpmd(socket: &str, client: bool, pairs: u32) -> Result<Vmm, String> {
    testpmd_that(
        "icmpecho",
        socket,
        pairs,
        &format!("client={}", u8::from(client)),
    )
}

/// testpmd in a mode of its forwarding, with these options of its vhost.
pub fn testpmd_that(mode: &str, socket: &str, pairs: u32, more: &str) -> Result<Vmm, String> {
    let mut command = std::process::Command::new(tool("TESTPMD")?);
    command
        .args([
            "--lcores",
            "0@0,1@0",
            "--no-huge",
            "-m",
            "128",
            "--no-pci",
            "--no-telemetry",
        ])
        .args(["--file-prefix=bhe2e", "--vdev"])
        .arg(format!("net_vhost0,iface={socket},queues={pairs},{more}"))
        .args([
            "--",
            &format!("--forward-mode={mode}"),
            "--port-topology=loop",
            "--total-num-mbufs=4096",
        ])
        .args([format!("--rxq={pairs}"), format!("--txq={pairs}")])
        .args(["--stats-period=5", "--no-lsc-interrupt", "--auto-start"]);
    let mut running = Vmm::spawn(command)?;
    running.wait_for("Port statistics", LIMIT)?;
    Ok(running)
}

/// Of the guest's shell: interrupts of the queue pair with this number, and waiting for a carrier
/// that is 0 or 1, of eth0 or another interface.
pub const FUNCTIONS: &str = "queue() { awk -v n=-input.$1 'index($NF, n) { for (i = 2; i < NF; i++) if ($i ~ /^[0-9]+$/) s += $i } END { print s + 0 }' /proc/interrupts; }
carrier() { until [ \"$(cat /sys/class/net/${2-eth0}/carrier)\" = $1 ]; do sleep 0.1; done; }";

/// `ours`: the VM listens and the switch connects.
fn switch(ours: bool) -> Verdict {
    let scratch = Scratch::new("switch")?;
    let socket = scratch.path("switch");
    // A frame leaves by the queue of the CPU that it was made on, and comes back by the same.
    let script = "ip link set eth0 up; ip addr add 10.5.0.2/24 dev eth0
ip neigh replace 10.5.0.1 lladdr 02:00:00:00:00:01 dev eth0 nud permanent
answered() {
  for cpu in $(seq 0 $(($(nproc) - 1))); do
    before=$(queue $cpu)
    until taskset -c $cpu ping -q -c 1 -W 2 10.5.0.1 >/dev/null; do :; done
    taskset -c $cpu ping -q -c 5 -i 0.2 -W 5 -s 1000 10.5.0.1 | grep -q ' 0% packet loss' || return
    [ $(queue $cpu) -gt $before ] && echo QUEUE-$cpu-$1
  done
  echo ANSWERED-$1
}
echo PAIRS=$(ethtool -l eth0 | awk '/^Combined/ { n = $2 } END { print n }')
carrier 1; answered first; carrier 0; echo LINK=down; carrier 1; echo LINK=up; read -r line; answered again
echo DONE";
    let script = format!("{FUNCTIONS}\n{script}");
    let pairs = if ours { 1 } else { 2 };
    let net = format!(
        "vhost-user={socket},id=net0,queues={pairs}{}",
        if ours { ",server=on" } else { "" }
    );
    let mut first = None;
    if !ours {
        first = Some(testpmd(&socket, false, pairs)?);
    }
    let cpus = pairs.to_string();
    let more = ["--net", &net, "--cpus", &cpus];
    let mut vmm = debian(&scratch, &script, &[] as &[&str], &more)?;
    if ours {
        let end = std::time::Instant::now() + patience(LIMIT);
        while !std::path::Path::new(&socket).exists() {
            check(std::time::Instant::now() < end, || {
                vmm.story("the VM does not listen")
            })?;
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        first = Some(testpmd(&socket, true, pairs)?);
    }
    vmm.wait_for("ANSWERED-first", LIMIT)?;
    drop(first);
    vmm.wait_for("LINK=down", LIMIT)?;
    if !ours {
        let _ = std::fs::remove_file(&socket);
    }
    let _second = testpmd(&socket, ours, pairs)?;
    vmm.wait_for("LINK=up", LIMIT)?;
    vmm.type_text("\n")?;
    vmm.wait_for("ANSWERED-again", LIMIT)?;
    vmm.ends_with(0, LIMIT)?;
    let output = vmm.output();
    for queue in 0..pairs {
        for when in ["first", "again"] {
            check(output.contains(&format!("QUEUE-{queue}-{when}")), || {
                vmm.story(&format!("queue pair {queue} carried nothing, {when}"))
            })?;
        }
    }
    check(output.contains(&format!("PAIRS={pairs}")), || {
        vmm.story("not as many queue pairs as asked for")
    })
}

/// What a guest that tells of its frames has received: its last lines, the newest last.
fn received(vmm: &Vmm) -> Vec<u64> {
    let output = vmm.output();
    let counts = output
        .lines()
        .filter_map(|line| line.trim().strip_prefix("FRAMES received=")?.parse().ok());
    counts.collect()
}

/// Waits until the guest has received more, or (`still`) no more for ten of its lines.
fn until_frames(vmm: &Vmm, still: bool, when: &str) -> Verdict {
    let end = std::time::Instant::now() + patience(LIMIT);
    let from = received(vmm);
    loop {
        let now = received(vmm);
        let since = now.get(from.len()..).unwrap_or_default();
        let last = since.last_chunk::<10>();
        let done = match still {
            true => last.is_some_and(|last| last.iter().all(|n| *n == last[0])),
            false => since.last() > from.last().max(since.first()),
        };
        if done {
            return Ok(());
        }
        check(std::time::Instant::now() < end, || {
            vmm.story(&format!("{when}: frames {since:?}, wanted still: {still}"))
        })?;
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
}

fn carries() -> Verdict {
    let scratch = Scratch::new("carries")?;
    let (socket, api) = (scratch.path("switch"), scratch.path("api"));
    let program = crate::hostile_guest::program_disk(&scratch)?;
    let script = "dd if=/dev/vda of=/run/h bs=64k 2>/dev/null; chmod +x /run/h
/run/h --frames --seconds 100000 $(basename $(dirname $(readlink -f /sys/class/net/eth0/device)))";
    let script = scratch.script("script", script)?;
    let (program, script) = (
        format!("path={program},readonly=on,id=program"),
        format!("path={script},readonly=on,id=script"),
    );
    let net = format!("vhost-user={socket},id=net0");
    let more = [
        "--disk",
        &program,
        "--disk",
        &script,
        "--net",
        &net,
        "--api-socket",
        &api,
    ];
    let link = |way: &str| ctl(&api, &["update-net", "net0", "--link", way]);
    let first = testpmd(&socket, false, 1)?;
    let mut vmm = Vmm::boot("bh.cmd=script", &more)?;
    until_frames(&vmm, false, "at first")?;
    let switched = |way: &str, when: &str| {
        link(way)?;
        until_frames(&vmm, way == "down", when)
    };
    switched("down", "with the link down")?;
    switched("up", "with the link up again")?;
    link("down")?;
    // Another switch, which sends without being asked.
    drop(first);
    let _ = std::fs::remove_file(&socket);
    let _second = testpmd_that("txonly", &socket, 1, "client=0")?;
    crate::net_bad::until_event(&api, "device.reconnected", "serves")?;
    until_frames(&vmm, true, "with another switch and the link down")?;
    switched("up", "with another switch and the link up")?;
    switched("down", "with its link down")?;
    switched("up", "with its link up")?;
    vmm.kill();
    bulkhead_tests::vmm::nothing_left(LIMIT)
}

/// A host whose only interface to the outside is up0, for passt.
pub fn passt_host(name: &str) -> Result<Namespace, String> {
    let host = Namespace::new(name)?;
    host.sh("modprobe veth; ip link add up0 type veth peer name down0; ip link set down0 up; ip addr add 192.0.2.2/24 dev up0
ip link set up0 up; ip route add default via 192.0.2.1")?;
    Ok(host)
}

/// The guest gets leases, one after the other, each when it is told to.
const LEASES: &str = "ip link set eth0 up
for n in first again; do
  until busybox udhcpc -i eth0 -n -q -t 3 -T 2 -s /bin/true >/tmp/out 2>&1; do :; done; grep -q 192.0.2.2 /tmp/out && echo LEASE-$n
  [ $n = again ] || read -r line
done";

fn passt_killed() -> Verdict {
    let scratch = Scratch::new("passt-killed")?;
    let api = scratch.path("api");
    let host = passt_host("killed")?;
    let passt = tool("PASST")?;
    let net = [
        "--net",
        "user,id=net0",
        "--passt",
        &passt,
        "--api-socket",
        &api,
    ];
    let mut vmm = host.debian(&scratch, LEASES, &net)?;
    vmm.wait_for("LEASE-first", LIMIT)?;
    crate::recovery::kill(&api, "net0")?;
    crate::net_bad::until_event(&api, "device.reconnected", "passt serves")?;
    vmm.type_text("\n")?;
    vmm.wait_for("LEASE-again", LIMIT)?;
    vmm.ends_with(0, LIMIT)?;
    bulkhead_tests::vmm::nothing_left(LIMIT)
}

fn user_link() -> Verdict {
    let scratch = Scratch::new("user-link")?;
    let api = scratch.path("api");
    let host = passt_host("userlink")?;
    let script = "carrier() { until [ \"$(cat /sys/class/net/eth0/carrier)\" = $1 ]; do sleep 0.1; done; echo CARRIER=$1-$2; }
lease() { until busybox udhcpc -i eth0 -n -q -t 3 -T 2 -s /bin/true >/tmp/out 2>&1; do :; done; grep -q 192.0.2.2 /tmp/out && echo LEASE-$1; }
ip link set eth0 up; carrier 1 first; lease first; read -r line
carrier 0 then; busybox udhcpc -i eth0 -n -q -t 1 -T 2 -s /bin/true >/dev/null 2>&1 || echo SILENT; read -r line
carrier 1 last; lease last";
    let passt = tool("PASST")?;
    let more = [
        "--net",
        "user,id=net0,memory=512M",
        "--passt",
        &passt,
        "--api-socket",
        &api,
    ];
    let mut vmm = host.debian(&scratch, script, &more)?;
    vmm.wait_for("LEASE-first", LIMIT)?;
    let link = |way: &str| ctl(&api, &["update-net", "net0", "--link", way]);
    link("down")?;
    vmm.type_text("\n")?;
    vmm.wait_for("CARRIER=0-then", LIMIT)?;
    vmm.wait_for("SILENT", LIMIT)?;
    let stats = ctl(&api, &["stats", "net0"])?;
    check(stats["net"]["link_up"] == false, || stats.to_string())?;
    link("up")?;
    vmm.type_text("\n")?;
    vmm.wait_for("LEASE-last", LIMIT)?;
    ctl(&api, &["limit", "net0", "--memory", "400M", "--cpu", "50"])?;
    let usage = ctl(&api, &["stats", "net0"])?["usage"].clone();
    println!("[{usage}]");
    let used = ["cpu_us", "memory_bytes", "memory_peak_bytes", "pids"];
    let measured = used.iter().all(|key| usage[*key].as_u64() > Some(0));
    let limits = &usage["limits"];
    // Where the host has no controllers, that is said.
    let without = usage["cgroup"] == "" || usage["not_enforced"] != serde_json::json!([]);
    check(
        limits["memory_bytes"] == 400 << 20 && limits["cpu_percent"] == 50 && (measured || without),
        || usage.to_string(),
    )?;
    vmm.ends_with(0, LIMIT)?;
    bulkhead_tests::vmm::nothing_left(LIMIT)
}

/// passt that listens at a socket, for one front-end.
pub fn passt_at(host: &Namespace, socket: &str) -> Result<Vmm, String> {
    let passt = host.spawn(&format!(
        "{} --vhost-user -s {socket} -f --runas 0",
        tool("PASST")?
    ))?;
    let end = std::time::Instant::now() + patience(LIMIT);
    while !std::path::Path::new(socket).exists() {
        check(std::time::Instant::now() < end, || {
            passt.story("passt does not listen")
        })?;
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    Ok(passt)
}

fn passt() -> Verdict {
    let scratch = Scratch::new("passt")?;
    let socket = scratch.path("passt");
    let host = passt_host("passt")?;
    let start = || passt_at(&host, &socket);
    let first = start()?;
    let mut vmm = host.debian(
        &scratch,
        LEASES,
        &["--net", &format!("vhost-user={socket},id=net0")],
    )?;
    vmm.wait_for("LEASE-first", LIMIT)?;
    drop(first);
    let _ = std::fs::remove_file(&socket);
    let _second = start()?;
    vmm.type_text("\n")?;
    vmm.wait_for("LEASE-again", LIMIT)?;
    vmm.ends_with(0, LIMIT)
}

/// qemu-storage-daemon with this disk at this socket.
pub(super) fn storage_daemon(disk: &str, socket: &str) -> Result<Vmm, String> {
    let _ = std::fs::remove_file(socket);
    let mut command = std::process::Command::new("qemu-storage-daemon");
    command
        .args([
            "--blockdev",
            &format!("driver=file,node-name=f,filename={disk},locking=off"),
        ])
        .arg("--export")
        .arg(format!(
            "vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={socket},writable=on"
        ));
    let daemon = Vmm::spawn(command)?;
    let end = std::time::Instant::now() + patience(LIMIT);
    while !std::path::Path::new(socket).exists() {
        check(std::time::Instant::now() < end, || {
            daemon.story("qemu-storage-daemon does not listen")
        })?;
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    Ok(daemon)
}

/// The back-end says 8192 sectors, `config=` 4096: that is what the guest reads.
fn given_config() -> Verdict {
    let scratch = Scratch::new("config")?;
    let socket = scratch.path("blk");
    let disk = scratch.disk("disk", 4 << 20, 101)?;
    // struct virtio_blk_config (VIRTIO 1.2 section 5.2.4).
    let mut space = 4096u64.to_le_bytes().to_vec();
    space.extend([0, 126, 0, 512].map(u32::to_le_bytes).concat());
    space.extend([0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 1, 0]);
    space.extend([32768, 1, 8, 32768, 1, 1].map(u32::to_le_bytes).concat());
    let hex: String = space.iter().map(|byte| format!("{byte:02x}")).collect();
    let _daemon = storage_daemon(&disk, &socket)?;
    let script =
        "for d in vda vdb vdc; do [ $(cat /sys/block/$d/size) = 4096 ] && dev=/dev/$d; done
echo SIZES $(cat /sys/block/vd?/size)
echo FIRST=$(dd if=$dev bs=64k iflag=direct status=none | sha256sum)";
    let device = format!("socket={socket},device-id=2,queues=1,id=foreign,config={hex}");
    let mut vmm = debian(&scratch, script, &[] as &[&str], &["--vhost-user", &device])?;
    let half = sh(&format!("head -c 2M {disk} | sha256sum"))?;
    let half = half.split_whitespace().next().unwrap_or("?");
    vmm.wait_for(&format!("FIRST={half}"), LIMIT)?;
    vmm.ends_with(0, LIMIT)
}

fn generic() -> Verdict {
    let scratch = Scratch::new("generic")?;
    let socket = scratch.path("blk");
    let disk = scratch.disk("disk", 4 << 20, 97)?;
    let before = sh(&format!("sha256sum <{disk}"))?;
    let start = || storage_daemon(&disk, &socket);
    // Disks of ours first: vda (root), vdb (script); the foreign one is found by its size.
    let script =
        "for d in vda vdb vdc; do [ $(cat /sys/block/$d/size) = 8192 ] && dev=/dev/$d; done
echo BEFORE=$(dd if=$dev bs=64k iflag=direct status=none | sha256sum)
dd if=/dev/urandom of=$dev bs=64k count=10 oflag=direct status=none && sync && echo WRITTEN
echo STEP; read -r line
echo AFTER=$(dd if=$dev bs=64k iflag=direct status=none | sha256sum)";
    let first = start()?;
    let mut vmm = debian(
        &scratch,
        script,
        &[] as &[&str],
        &[
            "--vhost-user",
            &format!("socket={socket},device-id=2,queues=1,id=foreign"),
        ],
    )?;
    let word = |text: &str| text.split_whitespace().next().unwrap_or("?").to_string();
    vmm.wait_for(&format!("BEFORE={}", word(&before)), LIMIT)?;
    vmm.wait_for("STEP", LIMIT)?;
    drop(first);
    let _second = start()?;
    vmm.type_text("\n")?;
    let after = word(&sh(&format!("sha256sum <{disk}"))?);
    vmm.wait_for(&format!("AFTER={after}"), LIMIT)?;
    vmm.ends_with(0, LIMIT)?;
    check(vmm.output().contains("WRITTEN"), || vmm.story("no write"))
}
