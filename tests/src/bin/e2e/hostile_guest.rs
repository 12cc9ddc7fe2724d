//! A hostile guest: malformed rings, requests and registers cost it that device until it
//! resets it, and nothing else. `hostile-guest` attacks from inside; see its table of cases.

use std::time::Duration;

use bulkhead_tests::chaos;
use bulkhead_tests::host::Namespace;
use bulkhead_tests::hostile::{CASES, Case, Expect, NET_CASES, STORM};
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, bin, ctl, nothing_left};
use serde_json::Value;

use crate::block::sha256;

const LIMIT: Duration = Duration::from_secs(120);
/// All cases, should a device use its whole deadline for each.
const ALL_CASES: Duration = Duration::from_secs(600);
const MIB: usize = 1 << 20;

/// The tests of this subject.
pub fn tests() -> Vec<Test> {
    let test = |long, name, run| Test {
        subject: "hostile-guest",
        name,
        long,
        run,
    };
    vec![
        test(
            false,
            "malformed rings and a storm cost a guest those devices until it resets them, no more",
            || attacked(&[1], 2),
        ),
        test(
            false,
            "malformed control rings and a storm cost a guest that network device until it resets it, no more",
            || attacked_net(&[11], 2),
        ),
        test(
            true,
            "longer storms on a network device from other seeds",
            || attacked_net(&[12, 13, 14, 15], 20),
        ),
        test(true, "longer storms from other seeds", || {
            attacked(&[2, 3, 4, 5, 6], 20)
        }),
    ]
}

/// The seeds of storms: others where a seed was given for all.
fn others(seeds: &[u64], seconds: u64) -> Vec<u64> {
    let other = |seed: &u64| seed ^ chaos::seed() << 8;
    let seeds: Vec<u64> = seeds.iter().map(other).collect();
    chaos::injected(&format!(
        "from the guest: all cases, storms of {seconds} s by the seeds {seeds:?}"
    ));
    seeds
}

/// Boots one guest that attacks its first two disks and leaves the third alone: the ring
/// cases on the first, a storm for each seed on the second.
fn attacked(seeds: &[u64], seconds: u64) -> Verdict {
    let seeds = &others(seeds, seconds);
    let scratch = Scratch::new("hostile")?;
    let socket = scratch.path("api");
    let victim = scratch.disk("victim", MIB, 29)?;
    let stormed = scratch.disk("stormed", MIB, 31)?;
    let bystander = scratch.disk("bystander", 8 * MIB, 37)?;
    let program = program_disk(&scratch)?;
    let cases: Vec<&str> = CASES
        .iter()
        .map(|c| c.name)
        .filter(|n| *n != STORM)
        .collect();
    let storms: String = seeds
        .iter()
        .map(|seed| format!("/run/h --seed {seed} --seconds {seconds} $storm {STORM} >>/run/out\n"))
        .collect();
    // Reports go to a file first, so that no line of the kernel's comes between.
    let script = format!(
        "dd if=/dev/vdd of=/run/h bs=64k 2>/dev/null; chmod +x /run/h
address() {{ basename $(dirname $(readlink -f /sys/block/$1/device)); }}
victim=$(address vda); storm=$(address vdb)
echo ARMED; read -r line
/run/h $victim {} >/run/out
{storms}cat /run/out
for a in $victim $storm; do echo $a >/sys/bus/pci/drivers/virtio-pci/bind; done
wait_for /dev/vda; wait_for /dev/vdb
echo VICTIM=$(dd if=/dev/vda bs=64k iflag=direct 2>/dev/null | sha256sum)
echo STORMED=$(dd if=/dev/vdb bs=512 count=1 iflag=direct 2>/dev/null | sha256sum)
echo BYSTANDER=$(dd if=/dev/vdc bs=64k iflag=direct 2>/dev/null | sha256sum)
echo JUDGED; read -r line",
        cases.join(" ")
    );
    let script = scratch.script("script", &script)?;
    let disks = [
        format!("path={victim},id=victim"),
        format!("path={stormed},id=stormed"),
        format!("path={bystander},readonly=on,id=bystander"),
        format!("path={program},readonly=on,id=program"),
        format!("path={script},readonly=on,id=script"),
    ];
    let mut arguments = vec!["--api-socket", &socket];
    for disk in &disks {
        arguments.extend_from_slice(&["--disk", disk]);
    }
    let (first_victim, first_stormed) = (first_bytes(&victim)?, first_bytes(&stormed)?);
    let (sum_victim, sum_bystander) = (sha256(&victim)?, sha256(&bystander)?);
    let first_sector = first_sector_sum(&scratch, &stormed)?;

    let mut vmm = Vmm::boot("bh.cmd=script", &arguments)?;
    vmm.wait_for("ARMED", LIMIT)?;
    let before = identities(&socket)?;
    vmm.type_text("\n")?;
    vmm.wait_for(
        "JUDGED",
        ALL_CASES + Duration::from_secs(seconds) * seeds.len() as u32,
    )?;

    let output = vmm.output();
    let mut faults: Vec<String> = Vec::new();
    for case in CASES {
        let reports: Vec<&str> = output
            .lines()
            .filter_map(|l| report(l, case.name))
            .collect();
        let (wanted, first) = match case.name {
            STORM => (seeds.len(), &first_stormed),
            _ => (1, &first_victim),
        };
        if reports.len() != wanted {
            faults.push(format!(
                "{}: {} reports, not {wanted}",
                case.name,
                reports.len()
            ));
        }
        faults.extend(reports.iter().filter_map(|r| fault(case, r, first)));
    }
    faults.extend(
        output
            .lines()
            .filter(|l| l.starts_with("# ") && !l.contains("attacks"))
            .map(str::to_string),
    );
    for (what, sum) in [
        ("VICTIM", &sum_victim),
        ("STORMED", &first_sector),
        ("BYSTANDER", &sum_bystander),
    ] {
        if !output.contains(&format!("{what}={sum}")) {
            faults.push(format!("{what} does not read {sum} any more"));
        }
    }
    let after = identities(&socket)?;
    if after != before {
        faults.push(format!(
            "device processes changed from {before:?} to {after:?}"
        ));
    }
    let state = ctl(&socket, &["info"])?["state"].to_string();
    if !state.contains("running") {
        faults.push(format!("the machine is {state}"));
    }
    check(faults.is_empty(), || vmm.story(&faults.join("\n")))?;

    vmm.type_text("\n")?;
    vmm.ends_with(0, LIMIT)?;
    nothing_left(Duration::from_secs(5))
}

/// Boots one guest with two network devices on taps; it attacks the first: the ring cases on
/// its control queue, then storms over all queues, in user space and by vhost-net.
fn attacked_net(seeds: &[u64], seconds: u64) -> Verdict {
    let seeds = &others(seeds, seconds);
    let scratch = Scratch::new("hostile-net")?;
    let socket = scratch.path("api");
    let host = Namespace::new("hostile")?;
    for (index, tap) in ["tap0", "tap1", "tap2"].iter().enumerate() {
        host.tap(tap, &format!("10.5.{index}.1/24"), "")?;
    }
    let program = program_disk(&scratch)?;
    let cases: Vec<&str> = NET_CASES
        .iter()
        .map(|c| c.name)
        .filter(|n| *n != STORM)
        .collect();
    let storms: String = seeds
        .iter()
        .flat_map(|seed| ["eth0", "eth1"].map(|device| (seed, device)))
        .map(|(seed, device)| {
            format!(
                "/run/h --net --seed {seed} --seconds {seconds} $({device}) {STORM} >>/run/out\n"
            )
        })
        .collect();
    let script = format!(
        "dd if=/dev/vda of=/run/h bs=64k 2>/dev/null; chmod +x /run/h
a0=$(basename $(dirname $(readlink -f /sys/class/net/eth0/device))); a1=$(basename $(dirname $(readlink -f /sys/class/net/eth1/device)))
eth0() {{ echo $a0; }}; eth1() {{ echo $a1; }}
ip link set eth2 up; ip addr add 10.5.2.2/24 dev eth2
echo ARMED; read -r line
/run/h --net $(eth0) {} >/run/out
{storms}cat /run/out
for a in $a0 $a1; do echo $a >/sys/bus/pci/drivers/virtio-pci/bind; done
n=0; for a in $a0 $a1; do name=$(ls /sys/bus/pci/devices/$a/virtio*/net); ip link set $name up; ip addr add 10.5.$n.2/24 dev $name; n=$((n + 1)); done
for n in 0 1 2; do tries=0; until ping -c 1 -W 2 10.5.$n.1 >/dev/null || [ $tries -gt 20 ]; do tries=$((tries + 1)); done; [ $tries -le 20 ] && echo PING-$n=good; done
echo JUDGED; read -r line",
        cases.join(" ")
    );
    let script = scratch.script("script", &script)?;
    let disks = [
        format!("path={program},readonly=on,id=program"),
        format!("path={script},readonly=on,id=script"),
    ];
    let mut arguments = vec!["--api-socket", &socket];
    for disk in &disks {
        arguments.extend_from_slice(&["--disk", disk]);
    }
    for net in [
        "tap=tap0,id=net0,backend=user",
        "tap=tap1,id=net1,backend=vhost-net",
        "tap=tap2,id=net2,backend=user",
    ] {
        arguments.extend_from_slice(&["--net", net]);
    }
    let enter = host.enter();
    let by: Vec<&str> = enter.iter().map(String::as_str).collect();
    let mut vmm = Vmm::boot_by(&by, "bh.cmd=script", &arguments)?;
    vmm.wait_for("ARMED", LIMIT)?;
    let before = identities(&socket)?;
    vmm.type_text("\n")?;
    vmm.wait_for(
        "JUDGED",
        ALL_CASES + Duration::from_secs(2 * seconds) * seeds.len() as u32,
    )?;
    let output = vmm.output();
    let mut faults: Vec<String> = Vec::new();
    for case in NET_CASES {
        let reports: Vec<&str> = output
            .lines()
            .filter_map(|l| report(l, case.name))
            .collect();
        let wanted = if case.name == STORM {
            2 * seeds.len()
        } else {
            1
        };
        if reports.len() != wanted {
            faults.push(format!(
                "{}: {} reports, not {wanted}",
                case.name,
                reports.len()
            ));
        }
        faults.extend(
            reports
                .iter()
                .filter_map(|r| fault(case, r, "0000000000000000")),
        );
    }
    faults.extend(
        output
            .lines()
            .filter(|l| l.starts_with("# ") && !l.contains("attacks"))
            .map(str::to_string),
    );
    for n in 0..3 {
        if !output.contains(&format!("PING-{n}=good")) {
            faults.push(format!("eth{n} does not work any more"));
        }
    }
    let after = identities(&socket)?;
    if after != before {
        faults.push(format!(
            "device processes changed from {before:?} to {after:?}"
        ));
    }
    check(faults.is_empty(), || vmm.story(&faults.join("\n")))?;
    vmm.type_text("\n")?;
    vmm.ends_with(0, LIMIT)?;
    nothing_left(Duration::from_secs(5))
}

/// The program as a disk: NUL behind it, up to whole sectors.
pub fn program_disk(scratch: &Scratch) -> Result<String, String> {
    let path = bin("hostile-guest");
    let mut content = std::fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    content.resize(content.len().next_multiple_of(4096), 0);
    scratch.file("program", &content)
}

/// The first eight bytes of a file, as the program prints them.
fn first_bytes(path: &str) -> Result<String, String> {
    let content = std::fs::read(path).map_err(|e| format!("{path}: {e}"))?;
    let first = content
        .first_chunk::<8>()
        .ok_or_else(|| format!("{path} is too short"))?;
    Ok(first.iter().map(|b| format!("{b:02x}")).collect())
}

fn first_sector_sum(scratch: &Scratch, path: &str) -> Result<String, String> {
    let content = std::fs::read(path).map_err(|e| format!("{path}: {e}"))?;
    let sector = content
        .get(..512)
        .ok_or_else(|| format!("{path} is too short"))?;
    sha256(&scratch.file("sector", sector)?)
}

/// What a line of the console reports of `case`.
fn report<'a>(line: &'a str, case: &str) -> Option<&'a str> {
    line.trim()
        .strip_prefix("HOSTILE ")?
        .strip_prefix(case)?
        .strip_prefix(' ')
}

/// Why `report` is not what `case` expects.
fn fault(case: &Case, report: &str, first: &str) -> Option<String> {
    let field = |name: &str| {
        let value = |word: &'_ str| Some(word.strip_prefix(name)?.strip_prefix('=')?.to_string());
        report.split(' ').find_map(value).unwrap_or_default()
    };
    let answered = match case.expect {
        Expect::NeedsReset => field("needs_reset") == "yes",
        Expect::Status(n) => field("needs_reset") == "no" && field("status") == n.to_string(),
        Expect::Survives => true,
    };
    let back = field("recovered") == "yes" && field("sector0") == first;
    (!answered || !back).then(|| {
        format!(
            "{}: {report}; expected {:?}, sector0={first}",
            case.name, case.expect
        )
    })
}

/// Each device's id, state, process and incarnation.
fn identities(socket: &str) -> Result<Vec<String>, String> {
    let answer = ctl(socket, &["devices"])?;
    let devices = answer.get("devices").unwrap_or(&answer).as_array();
    let devices = devices.ok_or_else(|| format!("no list of devices: {answer}"))?;
    let line = |device: &Value| {
        ["id", "state", "pid", "incarnation"]
            .map(|field| format!("{field}={}", device.get(field).unwrap_or(&Value::Null)))
            .join(" ")
    };
    Ok(devices.iter().map(line).collect())
}
