//! Network of guests: iperf3 and ping between a guest and its host over a tap, for Bulkhead
//! and QEMU, each with packets moved in user space and by vhost-net. The same kernel, the
//! same run, interleaved. Runs where KVM runs guests, as root; in a nested host of two CPUs
//! the vCPU has one and everything else the other.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bulkhead_tests::host::{Namespace, rootfs};
use bulkhead_tests::vmm::{Scratch, bin, guest_file};

use crate::Options;
use crate::guest::Guest;
use crate::kvm;
use crate::process;
use crate::table::{Table, figure, median, overlap, spread};

const LIMIT: Duration = Duration::from_secs(1200);
const MEMORY: &str = "384M";

/// A VMM and what moves its packets.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Peer {
    ours: bool,
    vhost: bool,
}

const PEERS: [Peer; 4] = [
    Peer {
        ours: true,
        vhost: false,
    },
    Peer {
        ours: false,
        vhost: false,
    },
    Peer {
        ours: true,
        vhost: true,
    },
    Peer {
        ours: false,
        vhost: true,
    },
];

impl Peer {
    fn label(self) -> String {
        let vmm = if self.ours { "bulkhead" } else { "QEMU" };
        let path = if self.vhost {
            "vhost-net"
        } else {
            "user space"
        };
        format!("{vmm}, {path}")
    }
}

/// What is measured: its name, the guest's command (`$S` seconds), the unit, what the aim
/// compares (more is better, unless it is a time).
struct Load {
    name: &'static str,
    command: &'static str,
    unit: &'static str,
    less_is_better: bool,
}

/// Each command prints one number.
const LOADS: [Load; 9] = [
    Load {
        name: "TCP from the guest, 1 stream",
        command: "iperf3 -c 10.5.0.1 -t $S -f m | awk '/receiver/ { print $(NF-2) }'",
        unit: "Mbit/s",
        less_is_better: false,
    },
    Load {
        name: "TCP from the guest, 4 streams",
        command: "iperf3 -c 10.5.0.1 -t $S -f m -P 4 | awk '/SUM.*receiver/ { print $(NF-2) }'",
        unit: "Mbit/s",
        less_is_better: false,
    },
    Load {
        name: "TCP to the guest, 1 stream",
        command: "iperf3 -c 10.5.0.1 -t $S -f m -R | awk '/receiver/ { print $(NF-2) }'",
        unit: "Mbit/s",
        less_is_better: false,
    },
    Load {
        name: "TCP to the guest, 4 streams",
        command: "iperf3 -c 10.5.0.1 -t $S -f m -P 4 -R | awk '/SUM.*receiver/ { print $(NF-2) }'",
        unit: "Mbit/s",
        less_is_better: false,
    },
    // 22 bytes of payload make frames of 64; what arrived is counted.
    Load {
        name: "UDP 64 B from the guest",
        command: "iperf3 -c 10.5.0.1 -t $S -u -b 0 -l 22 | awk -v seconds=$S '/receiver/ { split($(NF-2), n, \"/\"); print (n[2] - n[1]) / seconds }'",
        unit: "packets/s",
        less_is_better: false,
    },
    Load {
        name: "UDP 64 B to the guest, arrived",
        command: "iperf3 -c 10.5.0.1 -t $S -u -b 0 -l 22 -R >/tmp/out; awk -v seconds=$S '/receiver/ { split($(NF-2), n, \"/\"); print (n[2] - n[1]) / seconds }' /tmp/out",
        unit: "packets/s",
        less_is_better: false,
    },
    Load {
        name: "the same, offered by the host",
        command: "awk -v seconds=$S '/sender/ { split($(NF-2), n, \"/\"); print n[2] / seconds }' /tmp/out",
        unit: "packets/s",
        less_is_better: false,
    },
    Load {
        name: "the same, lost of those sent",
        command: "awk '/receiver/ { split($(NF-2), n, \"/\"); print 100 * n[1] / n[2] }' /tmp/out",
        unit: "%",
        less_is_better: true,
    },
    Load {
        name: "ping round trip",
        command: "ping -c 100 -i 0.01 10.5.0.1 | sed -n 's/.*time=\\([0-9.]*\\) ms.*/\\1/p' | sort -n | awk '{ t[NR] = $1 } END { print 1000 * t[int((NR + 1) / 2)] }'",
        unit: "µs",
        less_is_better: true,
    },
];

struct Host {
    namespace: Namespace,
    scratch: Scratch,
    kernel: String,
    initrd: String,
    rootfs: String,
    script: String,
}

/// Kills a process that the benchmark started.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Host {
    fn new(seconds: u32) -> Result<Self, String> {
        let namespace = Namespace::new("bench")?;
        namespace.tap("tap0", "10.5.0.1/24", "")?;
        let scratch = Scratch::new("bench-guestnet")?;
        let copy = |name: &str| {
            let (from, to) = (guest_file(name), scratch.path(name));
            std::fs::copy(&from, &to).map_err(|e| format!("{from}: {e}: run `make guest`"))?;
            Ok::<_, String>(to)
        };
        let (kernel, initrd) = (copy("vmlinux")?, copy("initrd.img")?);
        let mut script = format!(
            "S={seconds}\nip link set lo up; ip link set eth0 up; ip addr add 10.5.0.2/24 dev eth0\n\
             ping -q -c 3 -i 0.2 10.5.0.1 >/dev/null\n"
        );
        for (index, load) in LOADS.iter().enumerate() {
            script += &format!(
                "echo BEGIN-{index}\nvalue=$({{ {} ; }} 2>/dev/null)\necho RESULT-{index} ${{value:-none}}.\n",
                load.command
            );
        }
        let script = scratch.script("script", &script)?;
        Ok(Self {
            namespace,
            scratch,
            kernel,
            initrd,
            rootfs: rootfs()?,
            script,
        })
    }

    /// A command in the namespace, on the CPU that is not the vCPU's.
    fn command(&self, program: &str) -> Command {
        let [enter, net] = self.namespace.enter();
        let mut command = Command::new(enter);
        command.args([net.as_str(), "taskset", "-c", "0", program]);
        command
    }

    fn start(&self, peer: Peer) -> Result<Guest, String> {
        let cmdline = "console=ttyS0 quiet panic=-1 bh.cmd=script root=/dev/vda";
        let mut command;
        if peer.ours {
            let datapath = if peer.vhost { "vhost-net" } else { "user" };
            command = self.command(&bin("bulkhead").to_string_lossy());
            command
                .args(["run", "--kernel", &self.kernel, "--initrd", &self.initrd])
                .args(["--cmdline", cmdline, "--memory", MEMORY])
                .args([
                    "--disk",
                    &format!("path={},readonly=on,id=root,queues=1", self.rootfs),
                ])
                .args([
                    "--disk",
                    &format!("path={},readonly=on,id=script,queues=1", self.script),
                ])
                .args(["--net", &format!("tap=tap0,id=net0,backend={datapath}")]);
        } else {
            let vhost = if peer.vhost { "on" } else { "off" };
            command = self.command("qemu-system-x86_64");
            command
                .args([
                    "-M", "q35", "-accel", "kvm", "-cpu", "host", "-smp", "1", "-m", MEMORY,
                ])
                .args([
                    "-nodefaults",
                    "-no-user-config",
                    "-display",
                    "none",
                    "-no-reboot",
                ])
                .args([
                    "-serial",
                    "stdio",
                    "-kernel",
                    &self.kernel,
                    "-initrd",
                    &self.initrd,
                ])
                .args(["-append", cmdline, "-name", "bench,debug-threads=on"]);
            for (index, file) in [&self.rootfs, &self.script].iter().enumerate() {
                command
                    .args([
                        "-drive",
                        &format!("file={file},format=raw,if=none,id=d{index},readonly=on"),
                    ])
                    .args([
                        "-device",
                        &format!("virtio-blk-pci,drive=d{index},addr={}", index + 2),
                    ]);
            }
            command
                .args([
                    "-netdev",
                    &format!("tap,id=n0,ifname=tap0,script=no,downscript=no,vhost={vhost}"),
                ])
                .args(["-device", "virtio-net-pci,netdev=n0,romfile=,addr=8"]);
        }
        Guest::start(command, &self.scratch, LIMIT)
    }
}

/// Puts the vCPU threads of a VM on the last CPU, if there are two.
fn pin(root: u32) {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    if cpus < 2 {
        return;
    }
    for pid in process::tree(root) {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task"));
        for task in tasks.into_iter().flatten().flatten() {
            let name = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
            if name.starts_with("vp-") || name.contains("/KVM") {
                let _ = Command::new("taskset")
                    .args(["-c", "-p", &(cpus - 1).to_string()])
                    .arg(task.file_name())
                    .stdout(Stdio::null())
                    .stderr(Stdio::null())
                    .status();
            }
        }
    }
}

/// What one boot gave of one load.
#[derive(Clone, Copy)]
struct Sample {
    value: f64,
    exits_per_second: f64,
}

/// One boot: every load.
fn once(host: &Host, peer: Peer) -> Result<Vec<Option<Sample>>, String> {
    let mut guest = host.start(peer)?;
    // vCPU threads are there once the guest speaks.
    guest.reaches("BULKHEAD-GUEST-INIT")?;
    pin(guest.pid);
    let mut samples = Vec::new();
    for index in 0..LOADS.len() {
        guest.reaches(&format!("BEGIN-{index}"))?;
        let (exits, start) = (kvm::exits().unwrap_or(0), Instant::now());
        guest.reaches(&format!("RESULT-{index} "))?;
        guest.reaches_line(&format!("RESULT-{index} "))?;
        let exits = kvm::exits().unwrap_or(0).saturating_sub(exits);
        let said = guest.after(&format!("RESULT-{index} "));
        let value = said.trim().trim_end_matches('.').parse::<f64>().ok();
        samples.push(value.map(|value| Sample {
            value,
            exits_per_second: exits as f64 / start.elapsed().as_secs_f64(),
        }));
    }
    guest.finish();
    Ok(samples)
}

/// Runs the loads and prints the table.
pub fn measure(options: &Options) -> crate::Report {
    let (runs, seconds) = (options.runs.unwrap_or(3), options.seconds.unwrap_or(3));
    let host = Host::new(seconds)?;
    let mut server = host.command("iperf3");
    server
        .args(["-s", "-B", "10.5.0.1"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let _server = Server(server.spawn().map_err(|e| format!("iperf3: {e}"))?);
    let mut notes = String::new();
    // By peer, then by load.
    let mut all: Vec<Vec<Vec<Sample>>> = PEERS
        .iter()
        .map(|_| LOADS.iter().map(|_| Vec::new()).collect())
        .collect();
    for run in 0..runs {
        for (peer, loads) in PEERS.iter().zip(&mut all) {
            eprintln!("bench: run {run}, {}", peer.label());
            match once(&host, *peer) {
                Ok(samples) => {
                    for ((sample, kept), load) in samples.into_iter().zip(loads).zip(&LOADS) {
                        match sample {
                            Some(sample) => kept.push(sample),
                            None => {
                                notes += &format!(
                                    "{}, {}: no figure in a run\n\n",
                                    peer.label(),
                                    load.name
                                )
                            }
                        }
                    }
                }
                Err(why) => notes += &format!("{}: a run failed: {why}\n\n", peer.label()),
            }
        }
    }
    let mut table = Table::new(&[
        "load",
        "unit",
        "VMM",
        "median (least–most)",
        "of QEMU's",
        "exits/s",
        "aim",
    ]);
    let mut misses = Vec::new();
    for (index, load) in LOADS.iter().enumerate() {
        let values = |peer: usize| -> Vec<f64> {
            let samples = all.get(peer).and_then(|p| p.get(index));
            samples.into_iter().flatten().map(|s| s.value).collect()
        };
        for (place, peer) in PEERS.iter().enumerate() {
            let exits = |peer: usize| -> Vec<f64> {
                let samples = all.get(peer).and_then(|p| p.get(index));
                let samples = samples.into_iter().flatten();
                samples.map(|s| s.exits_per_second).collect()
            };
            // QEMU's of the same kind follows ours.
            let ratio = peer
                .ours
                .then(|| median(&values(place)).zip(median(&values(place + 1))))
                .flatten()
                .map(|(ours, theirs)| ours / theirs);
            let aim = aim(*peer, load, ratio);
            if aim.contains("missed") {
                misses.push(Miss {
                    overlap: overlap(&values(place), &values(place + 1)),
                    more_exits: median(&exits(place)) > median(&exits(place + 1)),
                });
            }
            table.row(vec![
                load.name.into(),
                load.unit.into(),
                peer.label(),
                spread(&values(place), 1),
                figure(ratio, 2),
                figure(median(&exits(place)), 0),
                aim,
            ]);
        }
    }
    Ok(format!(
        "## guestnet: medians of {runs} interleaved boots, {seconds} s each load (least–most)\n\n\
         One vCPU, {MEMORY}, Debian's iperf3 3.12 in guest and host, a tap. Huge pages for both. Exits of KVM per second during the load.\n\
         Where KVM itself is emulated (the nested host), an exit costs the guest more than a frame does: exits/s beside the rate say\n\
         how many exits a frame takes, and a back-end that is slow to wake the guest wakes it for many frames at once and wins.\n\
         The back-end's own work is in the table of `net`.\n\n{}\n{}{notes}",
        table.text(),
        missed(&misses)
    ))
}

/// What the runs tell of an aim that was missed.
struct Miss {
    /// The ranges of ours and QEMU's overlap.
    overlap: bool,
    /// The guest left KVM more often in a second than QEMU's.
    more_exits: bool,
}

/// Why aims were missed, as far as the runs tell.
fn missed(misses: &[Miss]) -> String {
    if misses.is_empty() {
        return String::new();
    }
    let count = |of: fn(&Miss) -> bool| misses.iter().filter(|miss| of(miss)).count();
    let (overlap, more) = (count(|m| m.overlap), count(|m| m.more_exits));
    let neither = count(|m| !m.overlap && !m.more_exits);
    format!(
        "Missed: {} aims; in {overlap} of them the ranges of the runs overlap QEMU's, in {more} the guest left KVM more often in a second than QEMU's, which software emulation makes dearer than a frame, and {neither} are neither: guest, VMM and iperf3 of the host share two CPUs.\n\n",
        misses.len()
    )
}

/// Whether the aim is met, where there is one: that in user space is of rates.
fn aim(peer: Peer, load: &Load, ratio: Option<f64>) -> String {
    let Some(ratio) = ratio.filter(|_| load.unit != "%") else {
        return String::new();
    };
    let (text, met) = match (peer.vhost, load.less_is_better) {
        (true, true) => ("≤ 1.03 of QEMU's", ratio <= 1.03),
        (true, false) => ("≥ 0.97 of QEMU's", ratio >= 0.97),
        (false, true) => return String::new(),
        (false, false) => ("≥ 1.5 of QEMU's", ratio >= 1.5),
    };
    format!("{text}: {}", if met { "met" } else { "**missed**" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missed_aims_are_explained_by_what_the_runs_tell() {
        assert_eq!(missed(&[]), "");
        let miss = |overlap, more_exits| Miss {
            overlap,
            more_exits,
        };
        let text = missed(&[miss(true, true), miss(false, true), miss(false, false)]);
        assert!(text.starts_with("Missed: 3 aims; in 1 of them"), "{text}");
        assert!(text.contains("in 2 the guest left KVM"), "{text}");
        assert!(text.contains("and 1 are neither"), "{text}");
    }
}
