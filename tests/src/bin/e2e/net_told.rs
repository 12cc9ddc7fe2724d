//! What a guest makes of a network without a tap: the MTU that it is told, its queue pairs when
//! it changes their number under traffic, and a switch that comes after the boot.

use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, nothing_left};

use crate::net::LIMIT;
use crate::net_modes::{FUNCTIONS, passt_host, testpmd, tool};

/// The tests of this subject.
pub fn tests() -> Vec<Test> {
    let test = Test::short("net");
    vec![test(
        "mtu= of a switch, of passt and of a switch that is absent reach the guest; ethtool -L changes a switch's queue pairs under ping; a switch that is absent at the boot (required=off) serves when it comes",
        told,
    )]
}

fn told() -> Verdict {
    let scratch = Scratch::new("told")?;
    let host = passt_host("told")?;
    let (socket, late) = (scratch.path("switch"), scratch.path("late"));
    let script = "for i in 0 1 2; do ip link set eth$i up; echo MTU-$i=$(cat /sys/class/net/eth$i/mtu); done
for i in 0 2; do ip addr add 10.$i.0.2/24 dev eth$i; ip neigh replace 10.$i.0.1 lladdr 02:00:00:00:00:01 dev eth$i nud permanent; done
echo LATE=$(cat /sys/class/net/eth2/carrier)
pings() { grep -c 'bytes from' /tmp/pings; }
carrier 1; ping -i 0.1 10.0.0.1 >/tmp/pings & pinger=$!
for n in 1 2 1 2; do
  ethtool -L eth0 combined $n || echo REFUSED-$n
  seen=$(pings); until [ $(pings) -ge $((seen + 5)) ]; do sleep 0.1; done
  before=$(queue 1); taskset -c 1 ping -q -c 5 -i 0.2 -W 5 -s 1000 10.0.0.1 | grep -q ' 0% packet loss' || echo LOST-$n
  echo PAIRS=$(ethtool -l eth0 | awk '/^Combined/ { n = $2 } END { print n }') SECOND=$([ $(queue 1) -gt $before ] && echo used || echo idle)
done
kill $pinger; echo CHANGED
carrier 1 eth2; echo LINK=up
for cpu in 0 1; do
  until taskset -c $cpu ping -q -c 1 -W 2 10.2.0.1 >/dev/null; do :; done
  taskset -c $cpu ping -q -c 5 -i 0.2 -W 5 -s 1000 10.2.0.1 | grep -q ' 0% packet loss' || echo LOST-late
done
echo ANSWERED";
    let script = format!("{FUNCTIONS}\n{script}");
    let nets = [
        format!("vhost-user={socket},id=net0,queues=2,mtu=1400"),
        "user,id=net1,mtu=1300".to_owned(),
        format!("vhost-user={late},id=net2,queues=2,mtu=1280,required=off"),
    ];
    let passt = tool("PASST")?;
    let mut more = vec!["--passt", &passt, "--cpus", "2"];
    for net in &nets {
        more.extend(["--net", net]);
    }
    let first = testpmd(&socket, false, 2)?;
    let mut vmm = host.debian(&scratch, &script, &more)?;
    vmm.wait_for("CHANGED", LIMIT)?;
    check(!vmm.output().contains("LINK=up"), || {
        vmm.story("a link to a switch that is not there")
    })?;
    drop(first);
    let _second = testpmd(&late, false, 2)?;
    vmm.wait_for("LINK=up", LIMIT)?;
    vmm.wait_for("ANSWERED", LIMIT)?;
    vmm.ends_with(0, LIMIT)?;
    let output = vmm.output();
    let found: Vec<&str> = output
        .lines()
        .map(str::trim)
        .filter(|line| {
            ["MTU-", "LATE", "PAIRS", "REFUSED", "LOST"]
                .iter()
                .any(|w| line.starts_with(w))
        })
        .collect();
    let wanted = [
        "MTU-0=1400",
        "MTU-1=1300",
        "MTU-2=1280",
        "LATE=0",
        "PAIRS=1 SECOND=idle",
        "PAIRS=2 SECOND=used",
        "PAIRS=1 SECOND=idle",
        "PAIRS=2 SECOND=used",
    ];
    check(found == wanted, || {
        vmm.story(&format!("{found:?}, not {wanted:?}"))
    })?;
    nothing_left(LIMIT)
}
