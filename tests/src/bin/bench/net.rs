//! Network: packets through `bulkhead-net` on a tap, and through passt, driven by DPDK's
//! testpmd (virtio-user, polling); and bare loops on the same tap, which are the limit. No
//! guest runs. `tests/bench/run` starts this in a network namespace of its own, as root.
//!
//! On a machine of two CPUs testpmd polls on CPU 0, and the back-end has CPU 1. What feeds a
//! tap shares CPU 1 with the back-end, and with the bare loop: with a spinning CPU 0, so that
//! it has no more than the back-end.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use bulkhead_tests::vmm::{Scratch, bin};

use crate::Options;
use crate::process;
use crate::table::{Table, figure, median, overlap, spread};

/// The tap that all share, one after another.
const TAP: &str = "bench0";
const PASST_PORT: u16 = 5009;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// From the guest's side to the host's.
    Out,
    /// To the guest.
    In,
}

#[derive(Clone, Copy)]
struct Load {
    way: Way,
    size: u32,
    pairs: u32,
}

impl Load {
    fn name(self) -> String {
        let way = if self.way == Way::Out { "out" } else { "in" };
        format!("{way} {} B q{}", self.size, self.pairs)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Peer {
    Bulkhead,
    Passt,
    Bare,
}

/// Packets per second, CPU µs per packet.
struct Sample {
    rate: f64,
    cpu_us: f64,
}

/// A process that is ended with the value.
struct Running(Child);

impl Running {
    fn start(mut command: Command) -> Result<Self, String> {
        command.stdin(Stdio::null());
        let child = command.spawn().map_err(|e| format!("{command:?}: {e}"))?;
        Ok(Self(child))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // testpmd keeps its run-time files unless it is asked.
        let _ = Command::new("kill")
            .args(["-INT", &self.0.id().to_string()])
            .status();
        let end = Instant::now() + Duration::from_secs(2);
        while matches!(self.0.try_wait(), Ok(None)) && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn pinned(cpus: &str, program: &str) -> Command {
    let mut command = Command::new("taskset");
    command.args(["-c", cpus, program]);
    command
}

/// CPUs of the back-end: of one pair the last one, of more all.
fn back_end_cpus(load: Load) -> String {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    if load.pairs > 1 || cpus < 2 {
        format!("0-{}", cpus.saturating_sub(1))
    } else {
        (cpus - 1).to_string()
    }
}

fn own(arguments: &[&str], cpus: &str) -> Result<Command, String> {
    let me = std::env::current_exe().map_err(|e| e.to_string())?;
    let mut command = pinned(cpus, &me.to_string_lossy());
    command.args(arguments);
    Ok(command)
}

fn ip(line: &str) -> Result<(), String> {
    let output = Command::new("ip")
        .args(line.split_whitespace())
        .output()
        .map_err(|e| format!("ip: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    let why = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(format!("ip {line}: {}", why.trim()))
}

/// A fresh tap, up, silent (no IPv6), and somewhere for passt to take its address from.
fn prepare(load: Load) -> Result<(), String> {
    let _ = ip(&format!("link del {TAP}"));
    let many = if load.pairs > 1 { "multi_queue" } else { "" };
    ip(&format!("tuntap add {TAP} mode tap vnet_hdr {many}"))?;
    let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{TAP}/disable_ipv6"), "1");
    ip(&format!("link set {TAP} up"))?;
    if ip("link show bench1").is_err() {
        ip("link set lo up")?;
        ip("link add bench1 type veth peer name bench2")?;
        ip("link set bench2 up")?;
        ip("addr add 198.18.0.1/24 dev bench1")?;
        ip("link set bench1 up")?;
        ip("route add default via 198.18.0.254")?;
    }
    Ok(())
}

fn back_end(peer: Peer, load: Load, socket: &str) -> Result<Running, String> {
    let _ = std::fs::remove_file(socket);
    let cpus = back_end_cpus(load);
    let mut command;
    if peer == Peer::Bulkhead {
        command = pinned(&cpus, &bin("bulkhead-net").to_string_lossy());
        command.args([
            "--socket",
            socket,
            "--tap",
            TAP,
            "--mac",
            "02:00:00:00:00:01",
        ]);
        command.args(["--queue-pairs", &load.pairs.to_string()]);
        if let Ok(more) = std::env::var("BENCH_NET_ARGS") {
            command.args(more.split_whitespace());
        }
    } else {
        let passt = std::env::var("PASST").map_err(|_| "PASST names no passt")?;
        command = pinned(&cpus, &passt);
        command.args([
            "--vhost-user",
            "-s",
            socket,
            "-f",
            "-1",
            "-q",
            "--no-map-gw",
        ]);
        command.args(["-u", &PASST_PORT.to_string(), "-t", "none"]);
    }
    command.stdout(Stdio::null()).stderr(Stdio::inherit());
    let running = Running::start(command)?;
    process::appears(socket, Duration::from_secs(10))?;
    Ok(running)
}

/// testpmd on the socket; its cumulative counter's samples until they end.
fn testpmd(load: Load, socket: &str) -> Result<(Running, mpsc::Receiver<(Instant, f64)>), String> {
    let program = std::env::var("TESTPMD").map_err(|_| "TESTPMD names no dpdk-testpmd")?;
    let pairs = load.pairs;
    let mode = if load.way == Way::Out {
        "txonly"
    } else {
        "rxonly"
    };
    let mut command = Command::new(program);
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let lcores = if cpus < 2 { "0@0,1@0" } else { "0@1,1@0" };
    command
        .args([
            "--lcores",
            lcores,
            "--no-huge",
            "-m",
            "256",
            "--no-pci",
            "--no-telemetry",
        ])
        .arg(format!("--file-prefix=bench{}", std::process::id()))
        .args([
            "--vdev",
            &format!("net_virtio_user0,path={socket},queues={pairs},queue_size=256"),
        ])
        .args([
            "--",
            &format!("--forward-mode={mode}"),
            &format!("--txpkts={}", load.size),
        ])
        .args([&format!("--rxq={pairs}"), &format!("--txq={pairs}")])
        .args([
            "--total-num-mbufs=16384",
            "--stats-period=1",
            "--no-lsc-interrupt",
            "--auto-start",
        ])
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut running = Running::start(command)?;
    let (to, from) = mpsc::channel();
    let out = running.0.stdout.take().ok_or("no pipe")?;
    let name = if load.way == Way::Out {
        "TX-packets:"
    } else {
        "RX-packets:"
    };
    std::thread::spawn(move || {
        for line in BufReader::new(out).lines().map_while(Result::ok) {
            // `  TX-packets: 12345      TX-errors: 0          TX-bytes:  740700`
            let mut words = line.split_whitespace();
            if words.next() == Some(name)
                && let Some(count) = words.next().and_then(|w| w.parse().ok())
                && to.send((Instant::now(), count)).is_err()
            {
                return;
            }
        }
    });
    Ok((running, from))
}

/// One run.
fn run(peer: Peer, load: Load, seconds: u32, scratch: &Scratch) -> Result<Sample, String> {
    prepare(load)?;
    if peer == Peer::Bare {
        return bare(load, seconds);
    }
    let socket = scratch.path("net.sock");
    let back_end = back_end(peer, load, &socket)?;
    let (_testpmd, samples) = testpmd(load, &socket)?;
    let mut _feeder = None;
    let (mut first, mut last) = (None, None);
    let end = Instant::now() + Duration::from_secs(30 + u64::from(seconds));
    loop {
        let (at, count) = match samples.recv_timeout(Duration::from_secs(10)) {
            Ok(sample) => sample,
            Err(RecvTimeoutError::Timeout) => return Err("testpmd says nothing".into()),
            Err(RecvTimeoutError::Disconnected) => return Err("testpmd ended".into()),
        };
        if load.way == Way::In && _feeder.is_none() {
            _feeder = Some(feeder(peer, load)?);
            continue;
        }
        let cpu = process::cpu(back_end.0.id());
        let Some((begin, count_then, cpu_then)) = first else {
            // The first second is its start.
            if last.replace(count).is_some() {
                first = Some((at, count, cpu));
            }
            continue;
        };
        let elapsed = at.duration_since(begin);
        if elapsed.as_secs_f64() + 0.5 >= f64::from(seconds) {
            let packets: f64 = count - count_then;
            if packets < 1.0 {
                return Err("not one packet".into());
            }
            return Ok(Sample {
                rate: packets / elapsed.as_secs_f64(),
                cpu_us: cpu.saturating_sub(cpu_then).as_secs_f64() * 1e6 / packets,
            });
        }
        if Instant::now() > end {
            return Err("testpmd never ends".into());
        }
    }
}

/// What sends to the guest: into the tap, or to passt's forwarded port.
fn feeder(peer: Peer, load: Load) -> Result<Running, String> {
    let (size, cpus) = (load.size.to_string(), back_end_cpus(load));
    if peer == Peer::Passt {
        return Running::start(own(&["feed-udp", &size], &cpus)?);
    }
    Running::start(own(&["feed", TAP, &size], &cpus)?)
}

/// The bare loop on the tap.
fn bare(load: Load, seconds: u32) -> Result<Sample, String> {
    let cpus = back_end_cpus(load);
    let (size, pairs, seconds) = (
        load.size.to_string(),
        load.pairs.to_string(),
        seconds.to_string(),
    );
    let what = if load.way == Way::Out {
        "tap-write"
    } else {
        "tap-read"
    };
    let mut command = own(&[what, TAP, &size, &pairs, &seconds], &cpus)?;
    command.stdout(Stdio::piped()).stdin(Stdio::null());
    let child = command.spawn().map_err(|e| e.to_string())?;
    let mut others = Vec::new();
    // As testpmd does beside a back-end.
    others.push(Running::start(own(&["spin"], "0")?)?);
    if load.way == Way::In {
        others.push(feeder(Peer::Bare, load)?);
    }
    let output = child.wait_with_output().map_err(|e| e.to_string())?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let numbers: Vec<f64> = text
        .split_whitespace()
        .filter_map(|w| w.parse().ok())
        .collect();
    let [packets, elapsed, cpu] = numbers.as_slice() else {
        return Err(format!("the bare loop said {text:?}"));
    };
    Ok(Sample {
        rate: packets / elapsed,
        cpu_us: cpu * 1e6 / packets,
    })
}

/// What two queue pairs carry to one, and whether this machine can show it.
fn two_to_one(ours: &[(Load, f64)]) -> String {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    // testpmd polls on one.
    let free = cpus.saturating_sub(1);
    let mut text = String::new();
    for (load, one) in ours.iter().filter(|(load, _)| load.pairs == 1) {
        let two = ours
            .iter()
            .find(|(l, _)| l.pairs == 2 && (l.way, l.size) == (load.way, load.size));
        let Some(ratio) = two.map(|(_, two)| two / one) else {
            continue;
        };
        let verdict = match (free >= 2, ratio >= 1.7) {
            (true, true) => "met",
            (true, false) => "**missed**",
            (false, _) => "cannot be shown here",
        };
        let name = load.name();
        let way = name.trim_end_matches(" q1");
        text += &format!("- {way}: two queue pairs carry {ratio:.2}× of one: {verdict}\n");
    }
    if text.is_empty() {
        return text;
    }
    format!(
        "Aim: at least 1.7× where two host cores are free beside testpmd's; here are {free} of {cpus}.\n\n{text}\n"
    )
}

/// Why aims were missed, as far as the runs tell: each load, and whether its range overlaps the
/// limit's.
fn missed(loads: &[(String, bool)]) -> String {
    if loads.is_empty() {
        return String::new();
    }
    let names: Vec<&str> = loads.iter().map(|(name, _)| name.as_str()).collect();
    let overlap = loads.iter().filter(|(_, overlap)| *overlap).count();
    format!(
        "Missed ({}): what is at the tap's other end shares the back-end's CPU, and each run divides that otherwise; in {overlap} of these {} the ranges of the runs overlap the limit's.\n\n",
        names.join(", "),
        loads.len()
    )
}

/// Runs the loads and prints the table.
pub fn measure(options: &Options) -> crate::Report {
    let (runs, seconds) = (options.runs.unwrap_or(5), options.seconds.unwrap_or(3));
    let scratch = Scratch::new("bench-net")?;
    let mut table = Table::new(&[
        "load",
        "back-end",
        "packets/s",
        "of the limit",
        "of passt's",
        "CPU µs",
        "aim",
    ]);
    let mut notes = String::new();
    let mut ours: Vec<(Load, f64)> = Vec::new();
    let mut misses = Vec::new();
    let mut loads = Vec::new();
    for pairs in [1, 2] {
        for way in [Way::Out, Way::In] {
            for size in [64, 1500] {
                loads.push(Load { way, size, pairs });
            }
        }
    }
    loads.retain(|l| options.wants(&l.name()));
    for load in loads {
        eprintln!("bench: {}", load.name());
        let peers = [
            (Peer::Bulkhead, "bulkhead-net"),
            (Peer::Passt, "passt"),
            (Peer::Bare, "bare loop on the tap"),
        ];
        let mut all: Vec<Vec<Sample>> = peers.iter().map(|_| Vec::new()).collect();
        for _ in 0..runs {
            for ((peer, name), samples) in peers.iter().zip(&mut all) {
                // passt has one pair.
                if *peer == Peer::Passt && load.pairs > 1 {
                    continue;
                }
                match run(*peer, load, seconds, &scratch) {
                    Ok(sample) => samples.push(sample),
                    Err(why) => {
                        let note = format!("{}, {name}: a run failed: {why}\n\n", load.name());
                        if !notes.contains(&note) {
                            notes += &note;
                        }
                    }
                }
            }
        }
        let rate = |samples: &[Sample]| {
            let all: Vec<f64> = samples.iter().map(|s| s.rate).collect();
            median(&all)
        };
        let (passt, limit) = (
            all.get(1).and_then(|s| rate(s)),
            all.get(2).and_then(|s| rate(s)),
        );
        ours.extend(all.first().and_then(|s| rate(s)).map(|rate| (load, rate)));
        for ((peer, name), samples) in peers.iter().zip(&all) {
            if samples.is_empty() {
                continue;
            }
            let rates: Vec<f64> = samples.iter().map(|s| s.rate).collect();
            let costs: Vec<f64> = samples.iter().map(|s| s.cpu_us).collect();
            let of = |base: Option<f64>| rate(samples).zip(base).map(|(r, b)| r / b);
            let aim = match (peer, of(limit)) {
                (Peer::Bulkhead, Some(ratio)) if ratio >= 0.9 => "≥ 0.9 of the limit: met",
                (Peer::Bulkhead, Some(_)) => {
                    let limits = all.get(2).into_iter().flatten().map(|s| s.rate);
                    let limits: Vec<f64> = limits.collect();
                    misses.push((load.name(), overlap(&rates, &limits)));
                    "≥ 0.9 of the limit: **missed**"
                }
                _ => "",
            };
            table.row(vec![
                load.name(),
                (*name).into(),
                spread(&rates, 0),
                figure(of(limit), 2),
                figure(of(passt), 2),
                figure(median(&costs), 2),
                aim.into(),
            ]);
        }
    }
    let _ = ip(&format!("link del {TAP}"));
    Ok(format!(
        "## net: medians of {runs} interleaved runs of {seconds} s (least–most)\n\n\
         testpmd (virtio-user) polls on CPU 0, the back-end of one pair has CPU 1, of two pairs all; what feeds the tap \
         shares the back-end's. qQ: Q queue pairs; packets/s and CPU µs of the back-end's process per packet.\n\n{}\n{}{}{notes}",
        table.text(),
        missed(&misses),
        two_to_one(&ours)
    ))
}

/// Sends UDP datagrams to passt's port until it is killed.
///
/// # Errors
/// Why it cannot.
pub fn feed_udp(arguments: &[String]) -> Result<(), String> {
    let size: usize = arguments
        .first()
        .and_then(|s| s.parse().ok())
        .ok_or("give SIZE")?;
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").map_err(|e| e.to_string())?;
    // Ethernet, IP and UDP headers come on top.
    let payload = vec![0; size.saturating_sub(42)];
    loop {
        let _ = socket.send_to(&payload, ("198.18.0.1", PASST_PORT));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missed_aims_are_explained_by_what_the_runs_tell() {
        assert_eq!(missed(&[]), "");
        let text = missed(&[("in 64 B q1".into(), true), ("in 64 B q2".into(), false)]);
        assert!(text.starts_with("Missed (in 64 B q1, in 64 B q2): "));
        assert!(text.contains("in 1 of these 2 the ranges"), "{text}");
        assert!(overlap(&[1.0, 3.0], &[3.0, 4.0]) && !overlap(&[1.0, 2.0], &[3.0]));
        assert!(!overlap(&[], &[3.0]));
    }

    #[test]
    fn two_pairs_are_held_against_one_of_the_same_load() {
        let load = |size, pairs| Load {
            way: Way::Out,
            size,
            pairs,
        };
        let text = two_to_one(&[
            (load(64, 1), 100.0),
            (load(1500, 1), 100.0),
            (load(64, 2), 180.0),
        ]);
        assert!(text.contains("- out 64 B: two queue pairs carry 1.80× of one"));
        assert!(!text.contains("1500"), "{text}");
        assert!(text.contains("Aim: at least 1.7×"), "{text}");
        assert_eq!(two_to_one(&[(load(64, 2), 1.0)]), "");
    }
}
