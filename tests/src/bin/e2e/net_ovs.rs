//! Open vSwitch with DPDK's datapath as the switch of a VM: frames of two queue pairs, files
//! both ways, and another vswitchd after the first was killed.

use std::io::Write;
use std::os::unix::net::UnixStream;

use bulkhead_tests::host::Namespace;
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, nothing_left};

use crate::net::{LIMIT, sum};
use crate::net_modes::{FUNCTIONS, tool};

/// The tests of this subject.
pub fn tests() -> Vec<Test> {
    let test = Test::short("net");
    vec![
        test(
            "OVS-DPDK connects to the VM's own socket (dpdkvhostuserclient): two queue pairs, files both ways, also after its vswitchd was killed and restarted: the link goes down and up",
            || switch(true),
        ),
        test(
            "OVS-DPDK at whose socket the VM connects (dpdkvhostuser), also after its vswitchd was killed and restarted",
            || switch(false),
        ),
    ]
}

/// The bridge's own address and MAC, which another vswitchd's bridge has, too.
const BRIDGE: &str = "ip addr replace 10.6.0.1/24 dev br0; ip link set br0 up";
const MAC: &str = "02:00:00:00:06:01";

/// An Open vSwitch in a namespace: its database, and the vswitchd that serves it.
struct Ovs<'a> {
    host: &'a Namespace,
    tools: String,
    run: String,
    _database: Vmm,
    vswitchd: Option<Vmm>,
    served: u32,
}

impl<'a> Ovs<'a> {
    /// Without a bridge; its files in that directory.
    fn start(host: &'a Namespace, run: String) -> Result<Self, String> {
        let tools = tool("OVS")?;
        let place = place(&run);
        host.sh(&format!(
            "mkdir {run}; {place} {tools}/ovsdb-tool create {run}/conf.db"
        ))?;
        let database = host.spawn(&format!(
            "env {place} {tools}/ovsdb-server {run}/conf.db --remote=punix:{run}/db.sock --no-chdir --log-file=/dev/null"
        ))?;
        host.sh(&format!(
            "for n in $(seq 600); do [ ! -S {run}/db.sock ] || exit 0; sleep 0.1; done; exit 1"
        ))
        .map_err(|e| database.story(&format!("the database does not listen: {e}")))?;
        let mut ovs = Self {
            host,
            tools,
            run,
            _database: database,
            vswitchd: None,
            served: 0,
        };
        // One CPU serves all of this: its poll thread sleeps when there is nothing to do.
        ovs.vsctl("--no-wait init -- set Open_vSwitch . other_config:dpdk-init=true other_config:pmd-maxsleep=1000 other_config:dpdk-extra='--no-huge --legacy-mem -m 128 --no-pci --no-telemetry --file-prefix=bhovs'")?;
        ovs.serve()?;
        Ok(ovs)
    }

    /// Starts a vswitchd.
    fn serve(&mut self) -> Verdict {
        self.served += 1;
        self.vswitchd = Some(self.host.spawn(&format!(
            "env {} {}/ovs-vswitchd unix:{}/db.sock --no-chdir --pidfile",
            place(&self.run),
            self.tools,
            self.run
        ))?);
        Ok(())
    }

    /// Unless told not to wait: until vswitchd has done it.
    fn vsctl(&self, words: &str) -> Result<String, String> {
        let (tools, run, seconds) = (&self.tools, &self.run, LIMIT.as_secs());
        let errors = |vswitchd: &Option<Vmm>| {
            let story = vswitchd.as_ref().map(|v| v.story("vswitchd said"));
            story.unwrap_or_default()
        };
        self.host
            .sh(&format!(
                "{tools}/ovs-vsctl --db=unix:{run}/db.sock --timeout={seconds} {words}"
            ))
            .map_err(|e| format!("{e}\n{}", errors(&self.vswitchd)))
    }

    /// Waits until vswitchd has made everything of the database, and gives the bridge its address.
    fn ready(&self) -> Verdict {
        // What changes nothing is not waited for.
        self.vsctl(&format!(
            "set Open_vSwitch . external_ids:served={}",
            self.served
        ))?;
        self.vsctl("-- --columns=name,error find Interface 'error!=[]'")
            .and_then(|bad| check(bad.trim().is_empty(), || bad))?;
        self.host.sh(BRIDGE).map(drop)
    }

    /// By SIGKILL; what it counted is forgotten.
    fn kill(&mut self) -> Verdict {
        self.vswitchd = None;
        self.vsctl("--no-wait clear Interface port0 statistics")
            .map(drop)
    }

    /// Both queue pairs have brought the guest's pings: they are polled, and (where this version
    /// counts the port's frames) counted.
    fn heard(&self, counted: bool) -> Verdict {
        let (tools, place) = (&self.tools, place(&self.run));
        let polled = self.host.sh(&format!(
            "{place} {tools}/ovs-appctl -t ovs-vswitchd-dpdk dpif-netdev/pmd-rxq-show"
        ))?;
        for queue in 0..2 {
            let row = |line: &str| {
                line.contains("port0") && line.contains(&format!("queue-id:  {queue} (enabled)"))
            };
            check(polled.lines().any(row), || {
                format!("queue pair {queue} is not polled: {polled}")
            })?;
            if counted {
                self.vsctl(&format!(
                    "wait-until Interface port0 'statistics:rx_q{queue}_good_packets>=6'"
                ))
                .map_err(|e| format!("queue pair {queue} brought too little: {e}"))?;
            }
        }
        Ok(())
    }
}

/// Where its programs look for their files.
fn place(run: &str) -> String {
    format!("OVS_RUNDIR={run} OVS_LOGDIR={run} OVS_DBDIR={run} OVS_SYSCONFDIR={run}")
}

/// `ours`: the VM listens and vswitchd connects.
fn switch(ours: bool) -> Verdict {
    let scratch = Scratch::new("ovs")?;
    let host = Namespace::new("ovs")?;
    let run = scratch.path("run");
    let mut ovs = Ovs::start(&host, run.clone())?;
    // With dpdkvhostuser, the port's name is its socket's.
    let (socket, port) = match ours {
        true => (scratch.path("vm"), "type=dpdkvhostuserclient"),
        false => (format!("{run}/port0"), "type=dpdkvhostuser"),
    };
    let at = match ours {
        true => format!("options:vhost-server-path={socket}"),
        false => String::new(),
    };
    ovs.vsctl(&format!("add-br br0 -- set Bridge br0 datapath_type=netdev 'other-config:hwaddr=\"{MAC}\"' -- add-port br0 port0 -- set Interface port0 {port} {at}"))?;
    ovs.ready()?;
    let file = scratch.disk("file", 1 << 20, 131)?;
    let _down = host.spawn(&format!(
        "socat -U TCP-LISTEN:7000,fork,reuseaddr OPEN:{file},rdonly"
    ))?;
    let mut up = host.spawn("socat -u TCP-LISTEN:7001,fork,reuseaddr SYSTEM:sha256sum")?;
    let script = "ip link set eth0 up; ip addr add 10.6.0.2/24 dev eth0
talk() {
  for cpu in 0 1; do
    until taskset -c $cpu ping -q -c 1 -W 2 10.6.0.1 >/dev/null; do :; done
    taskset -c $cpu ping -q -c 5 -i 0.2 -W 5 -s 1000 10.6.0.1 | grep -q ' 0% packet loss' || echo LOST-$cpu
  done
  head -c 1M /dev/urandom >/tmp/up; echo SENT-$1=$(sha256sum </tmp/up | cut -d' ' -f1)
  echo GOT-$1=$(socat -u TCP:10.6.0.1:7000,retry=50,interval=0.2 - | sha256sum | cut -d' ' -f1)
  socat -u FILE:/tmp/up TCP:10.6.0.1:7001,retry=50,interval=0.2; echo TALKED-$1
}
echo PAIRS=$(ethtool -l eth0 | awk '/^Combined/ { n = $2 } END { print n }')
carrier 1; talk first; read -r line; carrier 0; echo LINK=down; carrier 1; echo LINK=up; read -r line; talk again; read -r line";
    let script = format!("{FUNCTIONS}\n{script}");
    let listen = if ours { ",server=on" } else { "" };
    let net = format!("vhost-user={socket},id=net0,queues=2{listen}");
    let mut vmm = host.debian(&scratch, &script, &["--net", &net, "--cpus", "2"])?;
    let wanted = format!("={}", sum(&file)?);
    talked(&mut vmm, &mut up, "first", &wanted)?;
    ovs.heard(ours)?;
    vmm.type_text("\n")?;
    ovs.kill()?;
    vmm.wait_for("LINK=down", LIMIT)?;
    if ours {
        // Somebody else is at the socket meanwhile.
        let stranger = UnixStream::connect(&socket).map_err(|e| format!("{socket}: {e}"))?;
        let _ = (&stranger).write_all(&[0xa5; 4096]);
    } else {
        // A killed one leaves it, and its successor does not listen there.
        let _ = std::fs::remove_file(&socket);
    }
    ovs.serve()?;
    ovs.ready()?;
    vmm.wait_for("LINK=up", LIMIT)?;
    vmm.type_text("\n")?;
    talked(&mut vmm, &mut up, "again", &wanted)?;
    ovs.heard(ours)?;
    vmm.type_text("\n")?;
    vmm.ends_with(0, LIMIT)?;
    let output = vmm.output();
    check(
        output.contains("PAIRS=2") && !output.contains("LOST"),
        || vmm.story("not two queue pairs, or answers that did not come"),
    )?;
    nothing_left(LIMIT)
}

/// The guest has talked: what it got is the host's file, what it sent the host got.
fn talked(vmm: &mut Vmm, up: &mut Vmm, when: &str, wanted: &str) -> Verdict {
    vmm.wait_for(&format!("TALKED-{when}"), LIMIT)?;
    let output = vmm.output();
    check(output.contains(&format!("GOT-{when}{wanted}")), || {
        vmm.story("another file came down")
    })?;
    let sent = output
        .lines()
        .find_map(|line| line.trim().strip_prefix(&format!("SENT-{when}=")));
    let sent = sent.ok_or("the guest does not say what it sent")?;
    up.wait_for(sent, LIMIT)
        .map_err(|e| format!("another file came up, {when}: {e}"))
}
