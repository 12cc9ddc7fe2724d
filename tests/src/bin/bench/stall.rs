//! How long a guest waits when its disk's process is killed or updated under load: the longest
//! time between two completions. No guest runs: this is the VMM's side of `bulkhead-blk`, by the
//! VMM's own launcher and front-end, in the order in which the manager does things, with a
//! driver of its own behind it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bulkhead_proto::device::{DrainRequest, DrainResponse, HelloRequest, HelloResponse};
use bulkhead_proto::server::CONTROL_MAX_FRAME;
use bulkhead_proto::{BlockingClient, DEVICE_SERVICE};
use bulkhead_tests::vmm::{Scratch, bin};
use bulkhead_vmm::launcher::{Access, Launcher, LauncherConfig, LauncherEvent, Linked, SpawnSpec};
use bulkhead_vmm::vhost_user::{
    Deadline, Frontend, Geometry, InflightRegion, MemoryRegion, RingAddresses,
};
use rustix::event::{EventfdFlags, eventfd};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use crate::table::{Table, figure, judged, share};

/// Requests in flight.
const DEPTH: u16 = 16;
/// Descriptors of a request: header, data, status.
const PARTS: u16 = 3;
const RING: u16 = 64;
const BLOCK: u32 = 4096;
const DISK: u64 = 256 << 20;
const RAM: usize = 4 << 20;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const HEADERS: u64 = 0x4000;
const DATA: u64 = 0x10_0000;
const LIMIT: Duration = Duration::from_secs(20);
/// VIRTIO_F_VERSION_1, and VHOST_USER_F_PROTOCOL_FEATURES.
const FEATURES: u64 = 1 << 32;
/// Undisturbed time before a process is killed.
const CALM: Duration = Duration::from_millis(30);

fn at(address: u64) -> GuestAddress {
    GuestAddress(address)
}

/// What can go wrong here, in one line.
type Try<T> = Result<T, String>;

fn say<E: std::fmt::Display>(what: &'static str) -> impl Fn(E) -> String {
    move |error| format!("{what}: {error}")
}

fn event() -> Try<File> {
    let event = eventfd(0, EventfdFlags::CLOEXEC).map_err(say("eventfd"))?;
    Ok(event.into())
}

fn signal(mut event: &File) -> Try<()> {
    event
        .write_all(&1_u64.to_ne_bytes())
        .map_err(say("eventfd"))
}

/// The driver's half of the ring, on a thread of its own.
struct Driver {
    memory: GuestMemoryMmap,
    kick: File,
    call: File,
    stop: AtomicBool,
    /// Longest time between two completions since it was last taken, nanoseconds.
    longest: AtomicU64,
    completions: AtomicU64,
}

impl Driver {
    fn new(memory: GuestMemoryMmap) -> Try<Self> {
        Ok(Self {
            memory,
            kick: event()?,
            call: event()?,
            stop: AtomicBool::new(false),
            longest: AtomicU64::new(0),
            completions: AtomicU64::new(0),
        })
    }

    fn used_index(&self) -> Try<u16> {
        self.memory
            .load(at(USED + 2), Ordering::Acquire)
            .map_err(say("used ring"))
    }

    /// The chain of a slot: descriptors never change, only the sector does.
    fn prepare(&self, slot: u16) -> Try<()> {
        let (head, slot) = (slot * PARTS, u64::from(slot));
        let header = HEADERS + slot * 64;
        let read = slot % 2 == 0;
        let data_flags: u16 = if read { 1 | 2 } else { 1 };
        let parts = [
            (header, 16_u32, 1_u16),
            (DATA + slot * u64::from(BLOCK), BLOCK, data_flags),
            (header + 16, 1, 2),
        ];
        for (index, (address, length, flags)) in (head..).zip(parts) {
            let mut raw = address.to_le_bytes().to_vec();
            raw.extend(length.to_le_bytes());
            raw.extend(flags.to_le_bytes());
            raw.extend(index.wrapping_add(1).to_le_bytes());
            self.memory
                .write_slice(&raw, at(DESCRIPTORS + 16 * u64::from(index)))
                .map_err(say("descriptor"))?;
        }
        let kind = u32::from(!read);
        self.memory
            .write_slice(&kind.to_le_bytes(), at(header))
            .map_err(say("header"))
    }

    fn submit(&self, available: &mut u16, head: u16, sector: u64) -> Try<()> {
        let header = HEADERS + u64::from(head / PARTS) * 64;
        let entry = AVAILABLE + 4 + 2 * u64::from(*available % RING);
        *available = available.wrapping_add(1);
        self.memory
            .write_slice(&sector.to_le_bytes(), at(header + 8))
            .and_then(|()| self.memory.write_slice(&head.to_le_bytes(), at(entry)))
            .and_then(|()| {
                self.memory
                    .store(*available, at(AVAILABLE + 2), Ordering::Release)
            })
            .map_err(say("available ring"))
    }

    /// Keeps the ring full until told to stop.
    fn run(&self) -> Try<()> {
        let (mut available, mut used, mut random) = (0_u16, 0_u16, 0x5eed_u64);
        let mut sector = || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % (DISK / u64::from(BLOCK)) * u64::from(BLOCK / 512)
        };
        for slot in 0..DEPTH {
            self.prepare(slot)?;
            self.submit(&mut available, slot * PARTS, sector())?;
        }
        signal(&self.kick)?;
        let mut last = Instant::now();
        while !self.stop.load(Ordering::Acquire) {
            (&self.call).read_exact(&mut [0; 8]).map_err(say("call"))?;
            let index = self.used_index()?;
            if index == used {
                continue;
            }
            let now = Instant::now();
            let gap = u64::try_from((now - last).as_nanos()).unwrap_or(u64::MAX);
            self.longest.fetch_max(gap, Ordering::AcqRel);
            last = now;
            while used != index {
                let entry = USED + 4 + 8 * u64::from(used % RING);
                let mut raw = [0; 4];
                self.memory
                    .read_slice(&mut raw, at(entry))
                    .map_err(say("used ring"))?;
                let head = u16::try_from(u32::from_le_bytes(raw)).map_err(say("used head"))?;
                let mut status = [0];
                let place = HEADERS + u64::from(head / PARTS) * 64 + 16;
                self.memory
                    .read_slice(&mut status, at(place))
                    .map_err(say("status"))?;
                if status != [0] || head % PARTS != 0 || head >= DEPTH * PARTS {
                    return Err(format!("request {head} ended with status {status:?}"));
                }
                used = used.wrapping_add(1);
                self.completions.fetch_add(1, Ordering::AcqRel);
                self.submit(&mut available, head, sector())?;
            }
            signal(&self.kick)?;
        }
        Ok(())
    }
}

/// A process that serves.
struct Process {
    incarnation: u64,
    control: BlockingClient,
    frontend: Frontend,
    fence: OwnedFd,
}

struct Bed {
    launcher: Launcher,
    driver: Arc<Driver>,
    region: MemoryRegion,
    inflight: Option<InflightRegion>,
    errors: File,
    last: u64,
    /// Of a kill, each of [`SPANS`], milliseconds.
    parts_ms: [Vec<f64>; 4],
    /// From a spawn to ready, milliseconds.
    ready_ms: Vec<f64>,
}

impl Bed {
    fn new(scratch: &Scratch) -> Try<Self> {
        let mut config =
            LauncherConfig::new(vec!["bulkhead-blk".into()]).map_err(say("launcher"))?;
        let path = bin("bulkhead-blk");
        config.libexec = path.parent().unwrap_or(Path::new("/")).to_owned();
        config.device_dirs = vec![config.libexec.clone()];
        let launcher = Launcher::start(&config).map_err(say("launcher"))?;
        let ram = scratch.path("ram");
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&ram)
            .map_err(say("guest memory"))?;
        file.set_len(RAM as u64).map_err(say("guest memory"))?;
        let file = Arc::new(file);
        let offset = FileOffset::from_arc(Arc::clone(&file), 0);
        let memory = GuestMemoryMmap::from_ranges_with_files([(at(0), RAM, Some(offset))])
            .map_err(say("guest memory"))?;
        Ok(Self {
            launcher,
            driver: Arc::new(Driver::new(memory)?),
            region: MemoryRegion {
                guest_base: 0,
                size: RAM as u64,
                file,
                file_offset: 0,
            },
            inflight: None,
            errors: event()?,
            last: 1,
            parts_ms: Default::default(),
            ready_ms: Vec::new(),
        })
    }

    fn first(&mut self, disk: &str) -> Try<Process> {
        let (file, info) = self
            .launcher
            .open_disk(Path::new(disk), Access::ReadWrite, true, true)
            .map_err(say("disk"))?;
        let direct = if info.direct { ",direct=on" } else { "" };
        let disk = format!("fd=5{direct},serial=bench");
        let args = [
            "--control-fd",
            "3",
            "--vhost-fd",
            "4",
            "--disk",
            &disk,
            "--queues",
            "1",
            "--io-engine",
            "io_uring",
            "--fence-fd",
            "6",
        ];
        let spawned = self
            .launcher
            .spawn(SpawnSpec {
                dial: None,
                device_id: "disk".into(),
                binary: "bulkhead-blk".into(),
                policy: "bulkhead-blk".into(),
                args: args.map(str::to_owned).to_vec(),
                incarnation: 1,
                fds: vec![file.into()],
                fence: true,
            })
            .map_err(say("spawn"))?;
        let fence = spawned.fence.ok_or("no fence")?;
        self.greet(1, spawned.control, spawned.vhost, fence)
    }

    fn greet(
        &mut self,
        incarnation: u64,
        control: impl Into<OwnedFd>,
        vhost: std::os::unix::net::UnixStream,
        fence: OwnedFd,
    ) -> Try<Process> {
        let mut control = BlockingClient::new(control, CONTROL_MAX_FRAME);
        let mut request = HelloRequest::new();
        request.incarnation = incarnation;
        let _: HelloResponse = control
            .call(DEVICE_SERVICE, "Hello", &request, LIMIT)
            .map_err(say("Hello"))?;
        let frontend = Frontend::connect(vhost, LIMIT).map_err(say("vhost-user"))?;
        Ok(Process {
            incarnation,
            control,
            frontend,
            fence,
        })
    }

    /// What the launcher says, until this is it.
    fn until<T>(&self, mut wanted: impl FnMut(LauncherEvent) -> Option<Try<T>>) -> Try<T> {
        let end = Instant::now() + LIMIT;
        while Instant::now() < end {
            for event in self.launcher.poll_events().map_err(say("launcher"))? {
                if let Some(found) = wanted(event) {
                    return found;
                }
            }
            std::thread::yield_now();
        }
        Err("the launcher does not answer".into())
    }

    /// Another process, by what begins it.
    fn another(&mut self, update: bool) -> Try<Process> {
        self.last += 1;
        let begun = Instant::now();
        let (ticket, control, vhost) = if update {
            self.launcher
                .begin_update("disk", self.last, "bulkhead-blk")
                .map_err(say("update"))?
        } else {
            self.launcher
                .begin_respawn("disk", self.last)
                .map_err(say("respawn"))?
        };
        self.until(|event| match event {
            LauncherEvent::Linked { ticket: of, result } if of == ticket => Some(result),
            _ => None,
        })?;
        let Linked { second: fence, .. } = self.launcher.take_linked(ticket).ok_or("no process")?;
        let fence = fence.ok_or("no fence")?;
        let process = self.greet(self.last, control, vhost, fence)?;
        self.ready_ms.push(begun.elapsed().as_secs_f64() * 1e3);
        Ok(process)
    }

    /// Gives a process the ring, and greets it.
    fn start(&mut self, process: &mut Process, base: Option<u16>) -> Try<()> {
        let deadline = Deadline::after(LIMIT);
        let f = &mut process.frontend;
        let region = std::slice::from_ref(&self.region);
        let driver = &self.driver;
        let told = say("set-up");
        f.set_features(FEATURES, deadline).map_err(&told)?;
        let geometry = Geometry {
            queues: 1,
            queue_size: RING,
        };
        let log = match self.inflight.take() {
            Some(log) => log,
            None => f
                .get_inflight_fd(geometry, false, deadline)
                .map_err(&told)?,
        };
        f.set_inflight_fd(self.inflight.insert(log), deadline)
            .map_err(&told)?;
        f.set_mem_table(region, deadline).map_err(&told)?;
        f.set_vring_num(0, RING, deadline).map_err(&told)?;
        let addresses = RingAddresses {
            descriptor: DESCRIPTORS,
            available: AVAILABLE,
            used: USED,
        };
        f.set_vring_addr(0, addresses, deadline).map_err(&told)?;
        let base = match base {
            Some(base) => base,
            None => driver.used_index()?,
        };
        f.set_vring_base(0, base, deadline).map_err(&told)?;
        f.set_vring_err(0, self.errors.as_fd(), deadline)
            .map_err(&told)?;
        f.set_vring_call(0, driver.call.as_fd(), deadline)
            .map_err(&told)?;
        f.set_vring_kick(0, driver.kick.as_fd(), deadline)
            .map_err(&told)?;
        f.barrier(deadline).map_err(&told)?;
        f.set_vring_enable(0, true, deadline).map_err(&told)?;
        f.barrier(deadline).map_err(&told)?;
        signal(&driver.kick)?;
        signal(&driver.call)
    }

    /// SIGKILL, and another process in its place.
    fn kill(&mut self, process: Process) -> Try<Process> {
        let incarnation = process.incarnation;
        let begun = Instant::now();
        self.launcher
            .kill("disk", incarnation)
            .map_err(say("kill"))?;
        self.until(|event| match event {
            LauncherEvent::Exited {
                incarnation: of, ..
            } if of == incarnation => Some(Ok(())),
            _ => None,
        })?;
        let reaped = begun.elapsed();
        // Its I/O has ended when this hangs up.
        let mut byte = [0];
        let mut fence = File::from(process.fence);
        if fence.read(&mut byte).map_err(say("fence"))? != 0 {
            return Err("the fence has something to say".into());
        }
        let ended = begun.elapsed();
        let mut next = self.another(false)?;
        let ready = begun.elapsed();
        self.start(&mut next, None)?;
        let all = begun.elapsed();
        for (part, from, to) in [
            (0, Duration::ZERO, reaped),
            (1, reaped, ended),
            (2, ended, ready),
            (3, ready, all),
        ] {
            if let Some(part) = self.parts_ms.get_mut(part) {
                part.push((to - from).as_secs_f64() * 1e3);
            }
        }
        Ok(next)
    }

    /// Another process while the one before it serves.
    fn update(&mut self, mut process: Process) -> Try<Process> {
        let mut next = self.another(true)?;
        while {
            let drain: DrainResponse = process
                .control
                .call(DEVICE_SERVICE, "Drain", &DrainRequest::new(), LIMIT)
                .map_err(say("Drain"))?;
            !drain.drained
        } {
            std::thread::sleep(Duration::from_millis(1));
        }
        let deadline = Deadline::after(LIMIT);
        process
            .frontend
            .set_vring_enable(0, false, deadline)
            .map_err(say("stop"))?;
        let base = process
            .frontend
            .get_vring_base(0, deadline)
            .map_err(say("stop"))?;
        self.start(&mut next, Some(base))?;
        self.launcher
            .begin_settle("disk", next.incarnation)
            .map_err(say("settle"))?;
        Ok(next)
    }

    /// Waits until so many requests more have been completed.
    fn go_on(&self, requests: u64) -> Try<()> {
        let target = self.driver.completions.load(Ordering::Acquire) + requests;
        let end = Instant::now() + LIMIT;
        while self.driver.completions.load(Ordering::Acquire) < target {
            if Instant::now() > end || self.driver.stop.load(Ordering::Acquire) {
                return Err("requests are not completed any more".into());
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }

    /// So many rounds of one kind: the longest gap of each, milliseconds.
    fn rounds(
        &mut self,
        rounds: usize,
        process: &mut Option<Process>,
        step: fn(&mut Self, Process) -> Try<Process>,
    ) -> Try<Vec<f64>> {
        let mut gaps = Vec::new();
        for _ in 0..rounds {
            self.go_on(64)?;
            std::thread::sleep(CALM);
            self.driver.longest.store(0, Ordering::Release);
            let before = process.take().ok_or("no process")?;
            *process = Some(step(self, before)?);
            self.go_on(64)?;
            gaps.push(self.driver.longest.load(Ordering::Acquire) as f64 / 1e6);
        }
        Ok(gaps)
    }
}

/// Kills and updates, on a file in memory and on a disk.
pub fn measure(rounds: usize) -> crate::Report {
    let mut table = Table::new(&[
        "longest gap between completions, ms",
        "p50",
        "p99",
        "most",
        "aim",
    ]);
    let (mut ready, mut because) = (Vec::new(), Vec::new());
    let disk = std::env::var("BENCH_DISK_DIR").unwrap_or_else(|_| ".".into());
    for (place, directory, aim) in [
        ("tmpfs", "/dev/shm", Some([20.0, 100.0])),
        ("disk", disk.as_str(), None),
    ] {
        let scratch = Scratch::new(&format!("bench-stall-{place}"))?;
        let path = format!("{directory}/bulkhead-stall-{}.img", std::process::id());
        let outcome = on(&scratch, &path, rounds);
        let _ = std::fs::remove_file(&path);
        let (killed, updated, starts, parts) = outcome?;
        let told = SPANS.iter().zip(&parts);
        let told = told.map(|(what, of)| format!("{} {what}", figure(share(of, 0.5), 2)));
        let told: Vec<String> = told.collect();
        because.push(format!(
            "{place}: medians of a SIGKILL's parts, ms: {}.",
            told.join(", ")
        ));
        let mut row = |what: String, values: &[f64], aim: String| {
            let most = values.iter().copied().fold(0.0, f64::max);
            table.row(vec![
                what,
                figure(share(values, 0.5), 2),
                figure(share(values, 0.99), 2),
                figure(Some(most), 2),
                aim,
            ]);
        };
        let aim = match aim {
            Some([p50, p99]) => format!(
                "{}, {}",
                judged("p50", share(&killed, 0.5), p50),
                judged("p99", share(&killed, 0.99), p99)
            ),
            None => "the same and what old requests take".to_owned(),
        };
        row(format!("{place}: SIGKILL"), &killed, aim);
        let aim = judged("p50", share(&updated, 0.5), 10.0);
        row(format!("{place}: live update"), &updated, aim);
        ready.extend(starts);
    }
    because.push("The kernel takes an io_uring ring apart, and with it lets go of the pipe that tells that its I/O has ended, after grace periods of its RCU; the next process is spawned then.".to_owned());
    let most = ready.iter().copied().fold(0.0, f64::max);
    table.row(vec![
        "spawn → ready under this load".into(),
        figure(share(&ready, 0.5), 2),
        figure(share(&ready, 0.99), 2),
        figure(Some(most), 2),
        judged("p50", share(&ready, 0.5), 5.0),
    ]);
    Ok(format!(
        "## stall: bulkhead-blk killed and updated under load ({DEPTH} requests of 4 KiB in flight, half of them writes), {rounds} times each\n\n{}\n{}\n",
        table.text(),
        because.join("\n")
    ))
}

/// Gaps of kills and of updates, times to ready, and [`SPANS`].
type Gaps = (Vec<f64>, Vec<f64>, Vec<f64>, [Vec<f64>; 4]);
/// What a kill's gap is made of, in order.
const SPANS: [&str; 4] = [
    "from SIGKILL until the launcher has told its end",
    "until its I/O has ended",
    "until the next is ready",
    "until its rings are set up",
];

fn on(scratch: &Scratch, path: &str, rounds: usize) -> Try<Gaps> {
    let file = File::create(path).map_err(|e| format!("{path}: {e}"))?;
    // Not sparse: what is measured is the disk's process and not the file system.
    let piece = vec![7; 1 << 20];
    for _ in 0..DISK >> 20 {
        (&file)
            .write_all(&piece)
            .map_err(|e| format!("{path}: {e}"))?;
    }
    file.sync_all().map_err(|e| format!("{path}: {e}"))?;
    let mut bed = Bed::new(scratch)?;
    let mut process = bed.first(path)?;
    bed.start(&mut process, Some(0))?;
    let driver = Arc::clone(&bed.driver);
    let guest = std::thread::spawn(move || {
        let result = driver.run();
        driver.stop.store(true, Ordering::Release);
        result
    });
    let mut process = Some(process);
    let measured = bed
        .rounds(rounds, &mut process, Bed::kill)
        .and_then(|killed| Ok((killed, bed.rounds(rounds, &mut process, Bed::update)?)));
    bed.driver.stop.store(true, Ordering::Release);
    let _ = signal(&bed.driver.call);
    let ended = guest.join().map_err(|_| "the driver has panicked")?;
    let (killed, updated) = match (measured, ended) {
        (_, Err(why)) | (Err(why), _) => return Err(why),
        (Ok(measured), Ok(())) => measured,
    };
    Ok((killed, updated, bed.ready_ms, bed.parts_ms))
}
