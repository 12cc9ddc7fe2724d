//! Networks of a machine that is made and boots no guest: what it starts without when
//! `required=off` says that it may, mistakes by the name of their option, taps that several want,
//! and where a network's process lives.

use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_tests::host::{Namespace, sh};
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, bin, bulkhead, ctl, guest_file, nothing_left, patience};

use super::disk::LIMIT;
use super::hotplug::device;
use super::net_modes::passt_at;

/// Those that need no guest.
pub fn native() -> Vec<Test> {
    let test = Test::short("net");
    vec![
        test(
            "with required=off a machine is made without tap, switch, passt or back-end, and says so once",
            not_required,
        ),
        test(
            "a switch with fewer queues than were asked for is one that is not there, where required=off",
            unfit,
        ),
        test(
            "a mistake in --net is one of usage and named by the option",
            mistakes,
        ),
        test(
            "two machines never share a tap, also one that is down or whose link was set down",
            one_user,
        ),
        test(
            "a network's process lives in a network namespace of its own, which is empty",
            empty_namespace,
        ),
        test(
            "by the API a tap that is absent, busy, of the wrong type or without multiqueue is refused with what to do, and the machine can be made without it",
            refused_taps,
        ),
        test(
            "a machine's MTU is its tap's or less, and is no setting of the API's",
            mtu,
        ),
    ]
}

/// `bulkhead serve` in a namespace.
pub struct Served {
    /// Its API socket.
    pub socket: String,
    vmm: Vmm,
}

impl Served {
    pub fn new(host: &Namespace, scratch: &Scratch, name: &str) -> Result<Self, String> {
        Self::with(host, scratch, name, &[])
    }

    /// The same with more options of `serve`.
    pub fn with(
        host: &Namespace,
        scratch: &Scratch,
        name: &str,
        more: &[&str],
    ) -> Result<Self, String> {
        let socket = scratch.path(name);
        let [first, second] = host.enter();
        let mut command = Command::new(first);
        command.arg(second).arg(bin("bulkhead"));
        command.args(["serve", "--api-socket", &socket]).args(more);
        let vmm = Vmm::spawn(command)?;
        let end = Instant::now() + patience(LIMIT);
        while ctl(&socket, &["info"]).is_err() {
            check(Instant::now() < end, || vmm.story("no API"))?;
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(Self { socket, vmm })
    }

    pub fn create(&self, more: &[&str]) -> Result<serde_json::Value, String> {
        let kernel = sh(&format!("realpath {}", guest_file("vmlinux")))?;
        let mut args = vec!["create", "--kernel", kernel.trim(), "--memory", "96M"];
        args.extend(["--serial", "none"]);
        args.extend(more);
        ctl(&self.socket, &args)
    }

    /// State of a device.
    pub fn state(&self, id: &str) -> Result<String, String> {
        let found = device(&self.socket, id)?;
        let state = found.as_ref().and_then(|d| d["state"].as_str());
        Ok(state.unwrap_or("none").to_owned())
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.vmm.pid()
    }

    /// What it has said.
    pub fn errors(&self) -> String {
        self.vmm.errors()
    }

    /// Events of this kind and device, as text.
    pub fn events(&self, kind: &str, id: &str) -> Result<Vec<String>, String> {
        let output = bulkhead(&["ctl", "--socket", &self.socket, "--json", "events"])?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let of = |line: &&str| {
            line.contains(&format!("\"{kind}\"")) && line.contains(&format!("\"{id}\""))
        };
        Ok(text.lines().filter(of).map(str::to_owned).collect())
    }

    /// Ends it while another one serves.
    fn end_beside(self) -> Verdict {
        self.ends()
    }

    /// By its machine's end, or by a signal where it has none.
    fn ends(&self) -> Verdict {
        match ctl(&self.socket, &["shutdown", "--force"]) {
            Err(why) if why.contains("no machine") => {
                sh(&format!("kill {}", self.vmm.pid())).map(drop)
            }
            other => other.map(drop),
        }
    }

    pub fn end(self) -> Verdict {
        self.ends()?;
        drop(self.vmm);
        nothing_left(Duration::from_secs(20))
    }
}

/// It was refused, with these words.
pub fn refused(result: Result<serde_json::Value, String>, words: &str) -> Verdict {
    check(
        result.as_ref().is_err_and(|line| line.contains(words)),
        || format!("no {words:?} in {result:?}"),
    )
}

fn not_required() -> Verdict {
    let scratch = Scratch::new("net-optional")?;
    let host = Namespace::new("optional")?;
    host.sh("ip link add bridge0 type bridge")?;
    let served = Served::new(&host, &scratch, "api")?;
    let (switch, back_end, listen) = (
        scratch.path("switch"),
        scratch.path("fs"),
        scratch.path("listen"),
    );
    let arguments = [
        ("--net", "tap=bridge0,id=tap".to_owned()),
        ("--net", format!("vhost-user={switch},id=switch")),
        ("--net", "user,id=user".to_owned()),
        ("--vhost-user", format!("socket={back_end},kind=fs,id=fs")),
        (
            "--vhost-user",
            format!("socket={listen},kind=rng,id=dice,server=on"),
        ),
    ];
    // One by one each is needed.
    for (option, text) in &arguments[..4] {
        let result = served.create(&[option, text]);
        check(result.is_err(), || format!("{text}: {result:?}"))?;
    }
    let texts: Vec<String> = arguments
        .iter()
        .map(|(_, text)| format!("{text},required=off"))
        .collect();
    let mut more = Vec::new();
    for ((option, _), text) in arguments.iter().zip(&texts) {
        more.extend([*option, text.as_str()]);
    }
    served.create(&more)?;
    for (id, state, event) in [
        ("tap", "absent", "device.absent"),
        ("switch", "disconnected", "device.disconnected"),
        ("user", "absent", "device.absent"),
        ("fs", "none", "device.absent"),
        ("dice", "none", "device.absent"),
    ] {
        let found = served.state(id)?;
        check(found == state, || {
            format!("{id} is {found}\n{}", served.vmm.errors())
        })?;
        let events = served.events(event, id)?;
        check(events.len() == 1, || format!("{id}: {event}: {events:?}"))?;
        let lines = served.vmm.errors();
        let lines: Vec<&str> = lines
            .lines()
            .filter(|line| line.contains(&format!("device {id}: ")))
            .collect();
        check(lines.len() == 1, || format!("{id}: {lines:?}"))?;
    }
    // Nobody is to connect in vain.
    check(!std::path::Path::new(&listen).exists(), || {
        "the socket of a device that is not there stays".to_owned()
    })?;
    // Longer than the first pauses: nothing is asked for again and again.
    std::thread::sleep(Duration::from_secs(2));
    let said = served.vmm.errors();
    check(said.lines().count() == 5, || said)?;
    served.end()
}

fn unfit() -> Verdict {
    let scratch = Scratch::new("net-unfit")?;
    let host = Namespace::new("unfit")?;
    let served = Served::new(&host, &scratch, "api")?;
    let socket = scratch.path("passt");
    // It serves one pair, and one machine after the other.
    let _passt = passt_at(&host, &socket)?;
    let net = format!("vhost-user={socket},id=lan,queues=2");
    let make = |net: &str| served.create(&["--cpus", "2", "--net", net]);
    refused(make(&net), "its back-end serves 1 queues, not 2")?;
    let _ = std::fs::remove_file(&socket);
    let _next = passt_at(&host, &socket)?;
    make(&format!("{net},required=off"))?;
    let found = served.state("lan")?;
    check(found == "disconnected", || {
        format!("{found}\n{}", served.vmm.errors())
    })?;
    served.end()
}

fn mistakes() -> Verdict {
    let kernel = guest_file("vmlinux");
    for (more, words) in [
        (
            vec!["--net", "tap=a,queues=3"],
            "--net tap=a,queues=3: queues",
        ),
        (
            vec!["--net", "tap=a", "--net", "tap=a,id=b"],
            "--net tap=a,id=b: tap.name: a is another",
        ),
        (
            vec!["--net", "tap=a,backend=vhost-net,rx-bps=1M"],
            "--net tap=a,backend=vhost-net,rx-bps=1M: backend=vhost-net",
        ),
        (vec!["--net", "tap=a,rx-bps=1:0"], "rx-bps=1:0: give"),
        (vec!["--net", "user,queues=2"], "--net user,queues=2: "),
        (vec!["--net", "fd=5,queues=2"], "--net fd=5,queues=2: "),
        (vec!["--net", "user,tx-pps=5"], "tx-pps= goes with"),
    ] {
        let mut args = vec!["run", "--kernel", &kernel, "--cpus", "2"];
        args.extend(&more);
        let done = bulkhead(&args)?;
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        check(
            done.status.code() == Some(2)
                && said.lines().count() == 1
                && said.contains(words)
                && !said.contains("config."),
            || format!("{more:?}: {:?}: {said}", done.status),
        )?;
    }
    let host = Namespace::new("kind")?;
    let [first, second] = host.enter();
    let mut command = Command::new(first);
    command.arg(second).arg(bin("bulkhead"));
    command.args(["run", "--kernel", &kernel, "--net", "tap=lo"]);
    let done = command.output().map_err(|e| e.to_string())?;
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    check(
        done.status.code() == Some(1)
            && said.contains("tap lo: is an interface of another kind, no tap")
            && !said.contains("add lo"),
        || said,
    )
}

fn one_user() -> Verdict {
    let scratch = Scratch::new("net-shared")?;
    let host = Namespace::new("shared")?;
    host.sh("ip tuntap add tap0 mode tap multi_queue user root")?;
    let (one, two) = (
        Served::new(&host, &scratch, "one")?,
        Served::new(&host, &scratch, "two")?,
    );
    let net = ["--net", "tap=tap0,id=net0"];
    one.create(&net)?;
    refused(two.create(&net), "tap0: busy")?;
    host.sh("ip link set tap0 up")?;
    refused(two.create(&net), "tap0: busy")?;
    ctl(&one.socket, &["update-net", "net0", "--link", "down"])?;
    refused(two.create(&net), "tap0: busy")?;
    // A stand-alone process is no exception.
    let [first, second] = host.enter();
    let mut command = Command::new(first);
    command.arg(second).arg(bin("bulkhead-net"));
    command.args(["--socket", &scratch.path("net"), "--tap", "tap0"]);
    let done = command.output().map_err(|e| e.to_string())?;
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    check(
        done.status.code() == Some(1) && said.contains("in use by another process"),
        || said,
    )?;
    // Who was killed lets go late, and is waited for.
    let mut one = one;
    one.vmm.kill();
    two.create(&net)?;
    let state = two.state("net0")?;
    check(state == "ready", || state.clone())?;
    two.end()
}

fn empty_namespace() -> Verdict {
    let scratch = Scratch::new("net-ns")?;
    let host = Namespace::new("ns")?;
    host.tap("tap0", "10.5.0.1/24", "multi_queue user root")?;
    let served = Served::new(&host, &scratch, "api")?;
    served.create(&["--net", "tap=tap0,id=net0,queues=2", "--cpus", "2"])?;
    let found = device(&served.socket, "net0")?.unwrap_or_default();
    let pid = found["pid"].as_i64().ok_or_else(|| found.to_string())?;
    let namespace = |pid: i64| sh(&format!("readlink /proc/{pid}/ns/net"));
    let (its, vmms, ours) = (
        namespace(pid)?,
        namespace(i64::from(served.vmm.pid()))?,
        namespace(i64::from(std::process::id()))?,
    );
    check(its != vmms && its != ours && vmms != ours, || {
        format!("{its} {vmms} {ours}")
    })?;
    // Nothing is in it but the loopback interface that the kernel puts everywhere, down.
    let links = sh(&format!("nsenter --net=/proc/{pid}/ns/net ip -o link"))?;
    check(
        links.lines().count() == 1 && links.contains(" lo: <LOOPBACK> "),
        || links.clone(),
    )?;
    let empty = "ip -o addr; ip route show table all; ip -6 route show table all";
    let rest = sh(&format!(
        "nsenter --net=/proc/{pid}/ns/net bash -c '{empty}'"
    ))?;
    check(rest.trim().is_empty(), || rest.clone())?;
    // And the tap is where it was.
    host.sh("ip link show tap0 >/dev/null")?;
    served.end()
}

fn refused_taps() -> Verdict {
    let scratch = Scratch::new("net-refused")?;
    let host = Namespace::new("refused")?;
    host.sh(
        "ip tuntap add single mode tap vnet_hdr user root; ip tuntap add layer3 mode tun user root
ip tuntap add good mode tap vnet_hdr user root; ip link add bridge0 type bridge",
    )?;
    let served = Served::new(&host, &scratch, "api")?;
    let other = Served::new(&host, &scratch, "other")?;
    other.create(&["--net", "tap=good,id=net0,backend=user"])?;
    for (net, words) in [
        (
            "tap=absent,id=net0",
            ["absent", "ip tuntap add absent mode tap"],
        ),
        ("tap=layer3,id=net0", ["layer3", "not a tap"]),
        ("tap=bridge0,id=net0", ["bridge0", "no tap"]),
        ("tap=good,id=net0", ["good", "busy"]),
        ("tap=single,id=net0,queues=2", ["single", "multi_queue"]),
    ] {
        let told = served.create(&["--net", net, "--cpus", "2"]);
        println!(
            "[{}]",
            told.as_ref().err().map_or("made", String::as_str).trim()
        );
        for word in words {
            refused(told.clone(), word)?;
        }
        check(
            told.is_err_and(|line| line.trim().lines().count() == 1),
            || format!("{net}: not one line"),
        )?;
    }
    served.create(&["--net", "tap=single,id=net0,backend=user"])?;
    check(served.state("net0")? == "ready", || "not made".to_owned())?;
    other.end_beside()?;
    served.end()
}

fn mtu() -> Verdict {
    let scratch = Scratch::new("net-mtu")?;
    let host = Namespace::new("mtu")?;
    host.tap("tap0", "10.5.0.1/24", "user root")?;
    let served = Served::new(&host, &scratch, "api")?;
    refused(
        served.create(&["--net", "tap=tap0,id=net0,mtu=1501"]),
        "its MTU is 1500, 1501 is asked for",
    )?;
    served.create(&["--net", "tap=tap0,id=net0,mtu=1400"])?;
    let told =
        |socket: &str| Ok::<_, String>(ctl(socket, &["stats", "net0"])?["net"]["mtu"].clone());
    check(told(&served.socket)? == 1400, || "not 1400".into())?;
    // What the driver was told once it keeps: a later change of the tap's is none of the guest's.
    host.sh("ip link set tap0 mtu 1300")?;
    check(told(&served.socket)? == 1400, || "not 1400".into())?;
    served.end()
}
