//! Networks that fail again and again, or not at once, of a machine that boots no guest: what is
//! told of them, how often, and what an operator can still do.

use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_tests::host::{Namespace, sh};
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, bin, ctl, guest_file, nothing_left, patience};

use super::disk::LIMIT;
use super::hotplug::{device, holdings, launchers, settled};
use super::net_bad::{GARBAGE, HANGS_UP, rogue};
use super::net_modes::{passt_at, tool};
use super::net_native::{Served, refused};

/// Those that need no guest.
pub fn native() -> Vec<Test> {
    let test = Test::short("net");
    vec![
        test(
            "passt is refused limits with which it cannot start, starts with the least that is told, and has its use of the host told",
            least_of_passt,
        ),
        test(
            "a passt that cannot start is told of in one line, however often it is tried",
            failing_passt,
        ),
        test(
            "connections beside a back-end's own are told of once, not each",
            surplus,
        ),
        test(
            "a signal ends a VM that waits for its switches at the start",
            interrupted,
        ),
        test(
            "two devices are refused queues of one inherited tap",
            one_tap_twice,
        ),
        test("limits in force are read back", read_back),
        test(
            "of a machine that could not be made no passt, cgroup or socket is in the way of the next",
            made_again,
        ),
        test(
            "of a network that could not be added no process, descriptor, cgroup or socket stays",
            nothing_stays,
        ),
        test(
            "the socket of a server=on device is there and answers after clients that are no vhost-user back-ends",
            strangers,
        ),
    ]
}

/// Waits until it is so.
fn until(what: &str, mut so: impl FnMut() -> Result<bool, String>) -> Verdict {
    let end = Instant::now() + patience(LIMIT);
    while !so()? {
        check(Instant::now() < end, || format!("never: {what}"))?;
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// `bulkhead serve` with passt, on a host that leads nowhere.
fn with_passt(host: &Namespace, scratch: &Scratch) -> Result<Served, String> {
    host.sh("ip link set lo up")?;
    Served::with(host, scratch, "api", &["--passt", &tool("PASST")?])
}

/// Lines of the log that are about a device.
fn told(served: &Served, id: &str) -> Vec<String> {
    let errors = served.errors();
    let lines = errors.lines().filter(|line| line.contains(id));
    lines.map(str::to_owned).collect()
}

fn least_of_passt() -> Verdict {
    let scratch = Scratch::new("net-least")?;
    let host = Namespace::new("least")?;
    let served = with_passt(&host, &scratch)?;
    let create = |memory: &str| served.create(&["--net", &format!("user,id=lan,memory={memory}")]);
    let why = create("16M").err().ok_or("16 MiB are enough")?;
    println!("[{}]", why.trim());
    check(
        why.contains("device lan: memory=16777216: ") && why.trim().lines().count() == 1,
        || why.clone(),
    )?;
    let least = why.split("give at least ").nth(1);
    let least = least.and_then(|rest| rest.split(',').next()?.parse::<u64>().ok());
    let least = least.ok_or_else(|| why.clone())?;
    create(&least.to_string())?;
    check(served.state("lan")? == "ready", || served.errors())?;
    let limit = |memory: u64| {
        let memory = memory.to_string();
        ctl(&served.socket, &["limit", "lan", "--memory", &memory])
    };
    refused(limit(least - 1), "give at least")?;
    // It needs as much when it is started again.
    let first = device(&served.socket, "lan")?.unwrap_or_default();
    let pid = first["pid"].as_i64().ok_or_else(|| first.to_string())?;
    sh(&format!("kill -9 {pid}"))?;
    until("another passt", || {
        let now = device(&served.socket, "lan")?.unwrap_or_default();
        Ok(now["state"] == "ready" && now["pid"].as_i64() != Some(pid))
    })?;
    limit(2 * least)?;
    let usage = ctl(&served.socket, &["stats", "lan"])?["usage"].clone();
    check(usage["limits"]["memory_bytes"] == 2 * least, || {
        usage.to_string()
    })?;
    let lines = told(&served, "passt: signal 9");
    check(lines.len() == 1, || served.errors())?;
    served.end()
}

fn failing_passt() -> Verdict {
    let scratch = Scratch::new("net-failing")?;
    let host = Namespace::new("failing")?;
    let served = with_passt(&host, &scratch)?;
    let mut holder = host.spawn("socat -d -d TCP-LISTEN:8080,bind=127.0.0.1 STDOUT")?;
    until("a listener", || Ok(holder.errors().contains("listening")))?;
    let net = "user,id=lan,forward=8080:80";
    refused(served.create(&["--net", net]), "8080")?;
    let memory: u64 = 512 << 20;
    let optional = format!("{net},required=off,memory={memory}");
    served.create(&["--net", &optional])?;
    until("some attempts", || {
        let found = device(&served.socket, "lan")?.unwrap_or_default();
        Ok(found["incarnation"].as_u64() >= Some(5))
    })?;
    check(served.state("lan")? == "disconnected", || served.errors())?;
    let lines = told(&served, "8080");
    println!("{lines:?}");
    check(lines.len() == 1 && lines[0].contains("lan: "), || {
        served.errors()
    })?;
    holder.kill();
    until("passt", || Ok(served.state("lan")? == "ready"))?;
    // The limits are those of whichever passt serves at last.
    let found = device(&served.socket, "lan")?.unwrap_or_default();
    let of = |file: &str| {
        let path = format!("/proc/{}/{file}", found["pid"]);
        std::fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))
    };
    let (cgroup, limits) = (of("cgroup")?, of("limits")?);
    let data = limits.lines().find(|l| l.starts_with("Max data size"));
    let data = data.is_some_and(|line| line.contains(&memory.to_string()));
    let usage = ctl(&served.socket, &["stats", "lan"])?["usage"].clone();
    println!("[{usage}]");
    let in_leaf = usage["cgroup"] == "" || cgroup.contains("/dev-lan\n");
    let by_kernel = usage["not_enforced"] == serde_json::json!([]);
    check(in_leaf && (by_kernel || data), || {
        format!("{usage} {cgroup} {limits}")
    })?;
    served.end()
}

fn made_again() -> Verdict {
    let scratch = Scratch::new("net-again")?;
    let host = Namespace::new("again")?;
    let served = with_passt(&host, &scratch)?;
    let socket = scratch.path("switch");
    let switch = format!("vhost-user={socket},server=on,required=off,id=switch");
    let nets = ["--net", "user,id=lan,memory=512M", "--net", &switch];
    let mut bad = nets.to_vec();
    bad.extend(["--net", "tap=absent0,id=bad"]);
    for _ in 0..2 {
        refused(served.create(&bad), "absent0")?;
        check(!std::path::Path::new(&socket).exists(), || {
            "its socket stays".to_owned()
        })?;
    }
    served.create(&nets)?;
    check(served.state("lan")? == "ready", || served.errors())?;
    let usage = ctl(&served.socket, &["stats", "lan"])?["usage"].clone();
    check(
        usage["cgroup"] == "" || usage["cpu_us"].as_u64() > Some(0),
        || usage.to_string(),
    )?;
    served.end()
}

fn surplus() -> Verdict {
    let scratch = Scratch::new("net-surplus")?;
    let host = Namespace::new("surplus")?;
    let served = Served::new(&host, &scratch, "api")?;
    let socket = scratch.path("switch");
    let net = format!("vhost-user={socket},server=on,required=off,id=lan");
    served.create(&["--net", &net])?;
    let connect = || UnixStream::connect(&socket).map_err(|e| e.to_string());
    // It is taken for a back-end, and says nothing.
    let _first = connect()?;
    let begun = Instant::now();
    for _ in 0..30 {
        let surplus = connect()?;
        let limit = surplus.set_read_timeout(Some(patience(LIMIT)));
        limit.map_err(|e| e.to_string())?;
        let mut byte = [0];
        // Closed by the other side.
        let closed = match std::io::Read::read(&mut &surplus, &mut byte) {
            Ok(count) => count == 0,
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        };
        check(closed, || "it stays".to_owned())?;
    }
    until("a line", || {
        Ok(!told(&served, "a connection to its socket was closed").is_empty())
    })?;
    let lines = told(&served, "a connection to its socket was closed");
    // Each minute anew.
    let most = begun.elapsed().as_secs() / 60 + 1;
    check(!lines.is_empty() && lines.len() as u64 <= most, || {
        format!("{lines:?}")
    })?;
    served.end()
}

fn interrupted() -> Verdict {
    let scratch = Scratch::new("net-interrupted")?;
    let host = Namespace::new("interrupted")?;
    // Switches that never answer.
    let sockets = ["one", "two", "three"].map(|name| scratch.path(name));
    let mut listeners = Vec::new();
    for socket in &sockets {
        let listener = UnixListener::bind(socket).map_err(|e| e.to_string())?;
        listener.set_nonblocking(true).map_err(|e| e.to_string())?;
        listeners.push(listener);
    }
    let nets = sockets.map(|socket| format!("vhost-user={socket}"));
    let enter = host.enter();
    let by: Vec<&str> = enter.iter().map(String::as_str).collect();
    let more: Vec<&str> = nets
        .iter()
        .flat_map(|net| ["--net", net.as_str()])
        .collect();
    for (name, code) in [("INT", 130), ("TERM", 143)] {
        let mut vmm = Vmm::boot_by(&by, "", &more)?;
        let first = listeners.first().ok_or("no listener")?;
        let mut waits = None;
        until("a connection", || {
            waits = first.accept().ok();
            Ok(waits.is_some())
        })?;
        sh(&format!("kill -{name} {}", vmm.pid()))?;
        // By itself it would end by an error, some seconds later.
        let got = vmm.wait(LIMIT)?;
        check(got == code, || vmm.story(&format!("{name}: {got}")))?;
        drop(waits);
        nothing_left(Duration::from_secs(20))?;
    }
    Ok(())
}

fn one_tap_twice() -> Verdict {
    let host = Namespace::new("twice")?;
    host.sh("ip tuntap add tap0 mode tap vnet_hdr multi_queue; ip link set tap0 up")?;
    let open = "import fcntl, os, struct, sys
for n in (11, 12):
    fd = os.open('/dev/net/tun', os.O_RDWR)
    fcntl.ioctl(fd, 0x400454ca, struct.pack('16sH22x', b'tap0', 0x5102))
    os.dup2(fd, n, inheritable=True); os.close(fd)
os.execv(sys.argv[1], sys.argv[1:])";
    let [first, second] = host.enter();
    let mut command = Command::new(first);
    command.arg(second).args(["python3", "-c", open]);
    command.arg(bin("bulkhead")).args(["run", "--kernel"]);
    command.arg(guest_file("vmlinux"));
    command.args(["--net", "fd=11,id=a", "--net", "fd=12,id=b"]);
    let done = command.output().map_err(|e| e.to_string())?;
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    println!("[{}]", said.trim());
    check(
        !done.status.success()
            && said.lines().count() == 1
            && said.contains("fd 12: is a queue of tap tap0, which device a has"),
        || format!("{}: {said}", done.status),
    )?;
    nothing_left(Duration::from_secs(20))
}

fn read_back() -> Verdict {
    let scratch = Scratch::new("net-limits")?;
    let host = Namespace::new("limits")?;
    host.tap("tap0", "10.5.0.1/24", "user root")?;
    let served = Served::new(&host, &scratch, "api")?;
    served.create(&["--net", "tap=tap0,id=lan,rx-bps=1M:2M,tx-pps=100"])?;
    let all = |path: &str| -> Result<String, String> {
        let stats = ctl(&served.socket, &["stats", "lan"])?;
        let info = ctl(&served.socket, &["info"])?;
        let (of_stats, of_info) = (stats["net"].pointer(path), info.pointer("/config/nets/0"));
        let of_info = of_info.and_then(|net| net.pointer(path));
        check(of_stats.is_some() && of_stats == of_info, || {
            format!("{path}: {stats} {info}")
        })?;
        Ok(of_stats.map(ToString::to_string).unwrap_or_default())
    };
    for (path, value) in [
        ("/to_guest/bytes/per_second", "1048576"),
        ("/to_guest/bytes/burst", "2097152"),
        ("/to_guest/packets", "null"),
        ("/from_guest/packets/per_second", "100"),
    ] {
        let got = all(path)?;
        check(got == value, || format!("{path}: {got}"))?;
    }
    let update = ["update-net", "lan", "--rx-bps", "0", "--tx-pps", "7:9"];
    ctl(&served.socket, &update)?;
    check(all("/to_guest/bytes")? == "null", || {
        "not lifted".to_owned()
    })?;
    check(all("/from_guest/packets/burst")? == "9", || {
        "not changed".to_owned()
    })?;
    served.end()
}

fn nothing_stays() -> Verdict {
    let scratch = Scratch::new("net-unadded")?;
    let host = Namespace::new("unadded")?;
    host.sh("ip link add bridge0 type bridge; ip tuntap add single mode tap vnet_hdr user root")?;
    let served = with_passt(&host, &scratch)?;
    served.create(&["--hotplug-ports", "1", "--cpus", "2"])?;
    let holder = host.spawn("socat -d -d TCP-LISTEN:8080,bind=127.0.0.1 STDOUT")?;
    until("a listener", || Ok(holder.errors().contains("listening")))?;
    let sockets = ["absent", "garbage", "hangs-up", "passt", "place"].map(|n| scratch.path(n));
    let [absent, garbage, hangs_up, one_pair, place] = &sockets;
    let _garbage = rogue(&host, garbage, GARBAGE)?;
    let _hangs_up = rogue(&host, hangs_up, HANGS_UP)?;
    let add = |net: &str| ctl(&served.socket, &["add-net", &format!("{net},id=lan")]);
    let bad = [
        ("tap=bridge0".to_owned(), "bridge0"),
        ("tap=absent0".to_owned(), "absent0"),
        ("tap=single,queues=2".to_owned(), "single"),
        ("user,forward=8080:80".to_owned(), "8080"),
        (format!("vhost-user={absent}"), absent),
        (format!("vhost-user={garbage}"), "lan"),
        (format!("vhost-user={hangs_up}"), "lan"),
        (format!("vhost-user={one_pair},queues=2"), "serves 1 queues"),
        (
            format!("vhost-user={}/x,server=on", scratch.path("none")),
            "none/x",
        ),
        (format!("vhost-user={place},server=on"), "lan"),
    ];
    let pid = served.pid();
    let rest = || -> Result<(String, String), String> {
        let found = sh(&format!(
            "find /sys/fs/cgroup -path '*bulkhead-vm-{pid}-*' -name 'dev-*'; ls {}",
            scratch.path("")
        ))?;
        Ok((launchers(&served.socket)?, found))
    };
    // What comes with the first of all stays: that is measured before the second round.
    let mut before = None;
    for _ in 0..3 {
        for (net, words) in &bad {
            // It serves one front-end, and ends.
            let passt = match net.contains(one_pair) {
                true => Some(passt_at(&host, one_pair)?),
                false => None,
            };
            // Who connects there hangs up.
            let stranger = match net.contains(place) {
                true => Some(host.spawn(&format!(
                    "socat -u FILE:/dev/null UNIX-CONNECT:{place},retry=600,interval=0.1"
                ))?),
                false => None,
            };
            let told = add(net);
            drop((passt, stranger));
            let _ = std::fs::remove_file(one_pair);
            refused(told.clone(), words)?;
            check(
                told.is_err_and(|why| why.trim().lines().count() == 1),
                || format!("{net}: not one line"),
            )?;
            let left = rest()?;
            check(
                !left.1.contains("dev-lan") && !left.1.contains("place"),
                || format!("{net}: {left:?}"),
            )?;
            check(device(&served.socket, "lan")?.is_none(), || {
                format!("{net}: it is there")
            })?;
        }
        match &before {
            None => before = Some((holdings(pid)?, rest()?)),
            Some((held, left)) => {
                settled(pid, held)?;
                let now = rest()?;
                check(now == *left, || format!("{left:?}, now {now:?}"))?;
            }
        }
    }
    // With its only port taken.
    ctl(&served.socket, &["add-net", "tap=single,id=good"])?;
    let held = holdings(pid)?;
    // Had the others left something, it would have been found.
    let leaves = ctl(&served.socket, &["info"])?["cgroup"] != "";
    println!("[cgroup leaves: {leaves}]");
    check(rest()?.1.contains("dev-good") == leaves, || {
        format!("{:?}", rest())
    })?;
    let told = add(&format!("vhost-user={place},server=on"));
    println!("[{}]", told.as_ref().err().map_or("", |why| why.trim()));
    refused(told, "port")?;
    check(!std::path::Path::new(place).exists(), || {
        "its socket stays".to_owned()
    })?;
    settled(pid, &held)?;
    served.end()
}

fn strangers() -> Verdict {
    use std::io::{Read, Write};
    let scratch = Scratch::new("net-strangers")?;
    let host = Namespace::new("strangers")?;
    let served = Served::new(&host, &scratch, "api")?;
    let socket = scratch.path("switch");
    let net = format!("vhost-user={socket},server=on,required=off,id=lan");
    served.create(&["--net", &net])?;
    // A header that announces four gigabytes, and half of one.
    let large = [1, 0, 0, 0, 5, 0, 0, 0, 255, 255, 255, 255];
    let clients: [&[u8]; 5] = [
        b"",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        &[0xa5; 8192],
        &large,
        &large[..6],
    ];
    for (number, words) in clients.iter().enumerate() {
        // The VMM speaks first: VHOST_USER_SET_OWNER, protocol version 1. Until it has seen
        // that the one before is gone, the next is one too many.
        let mut first = [0; 12];
        until("an answer", || {
            let mut client = UnixStream::connect(&socket).map_err(|e| format!("{number}: {e}"))?;
            let limit = client.set_read_timeout(Some(patience(LIMIT)));
            limit.map_err(|e| e.to_string())?;
            let answered = client.read_exact(&mut first).is_ok();
            // Who is refused is not heard.
            let _ = client.write_all(words);
            Ok(answered)
        })?;
        check(first == [3, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], || {
            format!("client {number} was told {first:?}")
        })?;
    }
    until("a last answer", || {
        let mut client = UnixStream::connect(&socket).map_err(|e| e.to_string())?;
        Ok(client.read_exact(&mut [0; 12]).is_ok())
    })?;
    check(served.state("lan")? == "disconnected", || served.errors())?;
    served.end()
}
