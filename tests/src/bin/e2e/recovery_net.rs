//! Network processes that die under a flow: it goes on.

use std::time::{Duration, Instant};

use bulkhead_tests::chaos::{self, kills};
use bulkhead_tests::host::Namespace;
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, ctl, nothing_left};

use crate::disk::LIMIT;
use crate::net_bad::until_event;
use crate::recovery::{field, kill};
use crate::shell::{READER, Shell};

/// The tests of this subject.
pub fn tests() -> Vec<Test> {
    let test = |name, long, run| Test {
        subject: "recovery",
        name,
        long,
        run,
    };
    vec![
        test(
            "a guest announces its address on the tap after its network process died, and after its link came up",
            false,
            announces,
        ),
        test(
            "a network device that is given up answers its guest's commands, and is removed as any other",
            false,
            given_up,
        ),
        test(
            "a network process is killed 4 times during iperf3 both ways: the flow goes on",
            false,
            || killed_under_iperf("user", 4),
        ),
        test(
            "a network process is killed 50 times (a tenth of BULKHEAD_KILLS) during iperf3 both ways: the flow goes on",
            true,
            || killed_under_iperf("user", kills(500) / 10),
        ),
        test(
            "the same by vhost-net, 50 times (a tenth of BULKHEAD_KILLS)",
            true,
            || killed_under_iperf("vhost-net", kills(500) / 10),
        ),
    ]
}

/// Linux waits for the answer to a command for ever, and nothing of its networks can be changed
/// meanwhile.
fn given_up() -> Verdict {
    let scratch = Scratch::new("given-up")?;
    let socket = scratch.path("api");
    let host = Namespace::new("givenup")?;
    host.tap("tap0", "10.5.0.1/24", "")?;
    let args = [
        "--net",
        "tap=tap0,id=lan,backend=user",
        "--hotplug-ports",
        "1",
        "--restarts",
        "1:3600",
        "--api-socket",
        &socket,
    ];
    let mut guest = Shell::new(host.debian(&scratch, READER, &args)?)?;
    let reaches = |name: &str, network: u8| {
        format!(
            "{name}=$(ls /sys/class/net | grep -v lo) && ip link set ${name} up && ip addr add 10.5.{network}.2/24 dev ${name} && ping -q -c 1 -w 60 10.5.{network}.1 >/dev/null"
        )
    };
    guest.run(&reaches("n", 0))?;
    // Without its tap, no process can be put in the place of this one.
    host.sh("ip link del tap0")?;
    kill(&socket, "lan")?;
    until_event(&socket, "device.quarantined", "lan")?;
    // Nobody serves it: so its link is down, as a bond in the guest would want to know.
    guest.run("until [ $(cat /sys/class/net/$n/carrier) = 0 ]; do sleep 0.1; done")?;
    guest.run("ip link set $n promisc on; ip link set $n down; ip link set $n up")?;
    ctl(&socket, &["remove-device", "lan", "--timeout", "300"])?;
    guest.run("until [ $(ls /sys/class/net) = lo ]; do sleep 0.1; done")?;
    host.tap("tap1", "10.5.1.1/24", "user root")?;
    ctl(&socket, &["add-net", "tap=tap1,id=next,backend=user"])?;
    guest.run("until ls /sys/class/net | grep -qv lo; do sleep 0.1; done")?;
    guest.run(&reaches("m", 1))?;
    guest.ends()?;
    nothing_left(LIMIT)
}

/// Seconds of the flow in which something arrived: `role` is RX (from the guest) or TX.
fn seconds_alive(server: &Vmm, role: &str) -> usize {
    let output = server.output();
    let intervals = output.lines().filter(|line| line.contains(role));
    intervals
        .filter(|line| line.contains("bits/sec") && !line.contains(" 0.00 Bytes"))
        .count()
}

/// One iperf3 connection each way for as long as it takes; whoever serves it sees data in
/// seconds that begin after each death.
fn killed_under_iperf(backend: &str, kills: u32) -> Verdict {
    let scratch = Scratch::new("flow")?;
    let socket = scratch.path("api");
    let host = Namespace::new("flow")?;
    host.tap("tap0", "10.5.0.1/24", "")?;
    // It serves one test and ends: a second connection finds nobody.
    let server = host.spawn("iperf3 -s -1 -B 10.5.0.1 -i 1 --forceflush")?;
    let script = "ip link set lo up; ip link set eth0 up; ip addr add 10.5.0.2/24 dev eth0
until ping -q -c 1 -W 1 10.5.0.1 >/dev/null; do :; done
iperf3 -c 10.5.0.1 -t 86400 -i 0 --bidir >/tmp/out 2>&1 & flow=$!
echo READY; read -r line
kill -0 $flow && kill -INT $flow && wait $flow; cat /tmp/out; echo OVER";
    let mut vmm = host.debian(
        &scratch,
        script,
        &[
            "--net",
            &format!("tap=tap0,id=net0,backend={backend}"),
            "--api-socket",
            &socket,
            "--restarts",
            "100000:3600",
        ],
    )?;
    vmm.wait_for("READY", LIMIT)?;
    let flows = |what: &str| -> Verdict {
        // The second that is running may have begun before.
        let wanted = ["RX-S", "TX-S"].map(|role| (role, seconds_alive(&server, role) + 2));
        let end = Instant::now() + LIMIT;
        for (role, count) in wanted {
            while seconds_alive(&server, role) < count {
                check(Instant::now() < end, || {
                    vmm.story(&format!(
                        "{what}: nothing flows {role}: {}",
                        server.output()
                    ))
                })?;
                std::thread::sleep(Duration::from_millis(100));
            }
        }
        Ok(())
    };
    flows("at first")?;
    for round in 0..u64::from(kills) {
        let pause = chaos::pause(backend, round, Duration::from_millis(500));
        kill(&socket, "net0")?;
        chaos::injected(&format!(
            "SIGKILL of a network process ({backend}) after {pause:?}"
        ));
        let wanted = round + 2;
        let end = Instant::now() + LIMIT;
        while field(&socket, "net0", "incarnation")? != wanted
            || field(&socket, "net0", "state")? != "running"
        {
            check(Instant::now() < end, || {
                let events = ctl(&socket, &["events"]).map_or_else(|e| e, |e| e.to_string());
                vmm.story(&format!("process {wanted} does not serve: {events}"))
            })?;
            std::thread::sleep(Duration::from_millis(20));
        }
        flows(&format!("after death {}", round + 1))?;
    }
    vmm.type_text("stop\n")?;
    vmm.wait_for("OVER", LIMIT)?;
    let output = vmm.output();
    check(
        output.contains("sender") && !output.contains("unable"),
        || vmm.story("the client broke off"),
    )?;
    vmm.ends_with(0, LIMIT)?;
    nothing_left(Duration::from_secs(5))
}

/// Switches on the way learn by an announcement where a guest is now. Nobody else says a word.
fn announces() -> Verdict {
    let scratch = Scratch::new("announce")?;
    let socket = scratch.path("api");
    let host = Namespace::new("announce")?;
    let nets = [("tap0", "10.5.0", "user"), ("tap1", "10.5.1", "vhost-net")];
    let mut options = vec!["--api-socket".to_owned(), socket.clone()];
    for (tap, network, backend) in nets {
        host.tap(tap, &format!("{network}.1/24"), "")?;
        // An entry comes of an announcement, too.
        host.sh(&format!("sysctl -q -w net.ipv4.conf.{tap}.arp_accept=1"))?;
        options.push("--net".to_owned());
        options.push(format!("tap={tap},id={tap},backend={backend}"));
    }
    let script = "for n in 0 1; do ip link set eth$n up; ip addr add 10.5.$n.2/24 dev eth$n; done
until ping -q -c 1 -W 1 10.5.0.1 >/dev/null && ping -q -c 1 -W 1 10.5.1.1 >/dev/null; do :; done
echo READY
while read -r network && [ $network != stop ]; do
  i=$(ip -o addr | awk -v n=$network. 'index($4, n) == 1 { print $2 }')
  until [ \"$(cat /sys/class/net/$i/carrier)\" = 0 ]; do sleep 0.1; done; echo DOWN-$network
done; echo OVER";
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let mut vmm = host.debian(&scratch, script, &options)?;
    vmm.wait_for("READY", LIMIT)?;
    let forget = |tap: &str| -> Verdict {
        // What the pings left may come back as long as its answers are under way.
        let end = Instant::now() + LIMIT;
        let mut quiet = 0;
        while quiet < 10 {
            check(Instant::now() < end, || format!("{tap} is not quiet"))?;
            let known = host.sh(&format!(
                "ip neigh show dev {tap}; ip neigh flush dev {tap}"
            ))?;
            quiet = if known.trim().is_empty() {
                quiet + 1
            } else {
                0
            };
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    };
    let announced = |vmm: &Vmm, tap: &str, network: &str| -> Verdict {
        let end = Instant::now() + LIMIT;
        while !host
            .sh(&format!("ip neigh show dev {tap}"))?
            .contains(&format!("{network}.2 lladdr"))
        {
            check(Instant::now() < end, || {
                vmm.story(&format!("{tap}: not announced"))
            })?;
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    };
    for (tap, network, _) in nets {
        forget(tap)?;
        kill(&socket, tap)?;
        announced(&vmm, tap, network)?;
        let link = |way: &str| ctl(&socket, &["update-net", tap, "--link", way]);
        link("down")?;
        // The guest must have seen it, or there is nothing to announce.
        let seen = format!("DOWN-{network}");
        vmm.type_text(&format!("{network}\n"))?;
        vmm.wait_for(&seen, LIMIT)?;
        forget(tap)?;
        link("up")?;
        announced(&vmm, tap, network)?;
    }
    vmm.type_text("stop\n")?;
    vmm.wait_for("OVER", LIMIT)?;
    vmm.ends_with(0, LIMIT)?;
    nothing_left(Duration::from_secs(5))
}
