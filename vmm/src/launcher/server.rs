//! The launcher process: PID 1 of the VM's pid namespace, one thread, one loop.
//!
//! It serves the VMM's requests one by one, passes on what devices say, and reaps and
//! reports them. When its control socket ends or the VMM's pidfd fires it kills every
//! device, removes the sockets it bound, and exits; should it be killed itself, the kernel
//! ends every process in its namespace. As PID 1 it ignores every signal that it has no
//! handler for, from outside too, SIGKILL and SIGSTOP excepted.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use bulkhead_proto::launcher as wire;
use bulkhead_proto::protobuf::Message;

use super::args::{Args, CONTROL_FD, FIRST_BINARY_FD, VMM_FD};
use super::cgroup::{Cgroups, Group};
use super::device::{self, Device};
use super::dial::Dial;
use super::isolate;
use super::kept::Kept;
use super::leftovers::Note;
use super::log::{LOOK_AGAIN, Sink};
use super::packet::{Packet, PacketSocket};
use super::paths::{Mode, Paths};
use super::programs::Directory;
use super::sys::{self, ExitOutcome};
use super::{MAX_QUEUE_PAIRS, confine, printable, tap};

mod processes;

/// How long devices have to die at the end: SIGKILL waits for I/O in the kernel.
const END_DEADLINE: Duration = Duration::from_secs(2);

/// A packet on its way to the VMM.
#[derive(Default)]
struct Outgoing {
    reply: wire::Reply,
    fds: Vec<OwnedFd>,
    /// In this pid namespace.
    pid: Option<i32>,
}

impl Outgoing {
    fn error(id: u64, line: String) -> Self {
        let reply = wire::Reply {
            id,
            error: printable(&line),
            ..Default::default()
        };
        Self {
            reply,
            ..Self::default()
        }
    }

    fn success(id: u64, result: Option<wire::reply::Result>) -> Self {
        let reply = wire::Reply {
            id,
            result,
            ..Default::default()
        };
        Self {
            reply,
            ..Self::default()
        }
    }
}

/// By what a device says something.
#[derive(Clone, Copy, Debug)]
enum SaysBy {
    /// Its stderr.
    Log,
    /// The listener of its filter.
    Watch,
    /// Its channel for requests.
    Dial,
}

struct Server {
    args: Args,
    control: PacketSocket,
    vmm: OwnedFd,
    children: OwnedFd,
    binaries: Vec<OwnedFd>,
    /// Programs of external helpers.
    helpers: Vec<OwnedFd>,
    /// Where programs of live updates may lie.
    device_dirs: Vec<Directory>,
    devices: Vec<Device>,
    kept: Kept,
    /// The lock on the devices' host ids, which ends with this process.
    _ids: Option<OwnedFd>,
    cgroups: Cgroups,
    paths: Paths,
    /// Asks the kernel for taps: opened before confinement, after which no such socket is.
    interfaces: tap::Interfaces,
    sink: Sink,
    outgoing: VecDeque<Outgoing>,
}

/// The whole life of the launcher; returns its exit status.
pub fn main() -> i32 {
    match Server::start() {
        Ok(mut server) => {
            let result = server.serve();
            server.end();
            match result {
                Ok(()) => 0,
                Err(error) => {
                    server.sink.line("bulkhead-launcher", &error);
                    1
                }
            }
        }
        Err(line) => {
            Sink::stderr().line("bulkhead-launcher", &line);
            1
        }
    }
}

impl Server {
    /// Takes over what was inherited, confines itself, and says so.
    fn start() -> Result<Self, String> {
        let args = Args::parse(std::env::args_os().skip(1))?;
        let take = |what: &'static str, number| {
            sys::take_inherited(number).map_err(|error| {
                format!("{what}: {error}: bulkhead-launcher is started by bulkhead only")
            })
        };
        let control = PacketSocket::from(take("control socket", CONTROL_FD)?);
        let vmm = take("pidfd of the VMM", VMM_FD)?;
        let programs = args.binaries.len().saturating_add(args.helpers.len());
        let count = programs
            .saturating_add(args.device_dirs.len())
            .saturating_add(usize::from(args.cgroup.is_some()))
            .saturating_add(usize::from(args.note.is_some()))
            .saturating_add(usize::from(args.ids_held));
        let mut binaries = device::inherited_binaries(count, FIRST_BINARY_FD)
            .map_err(|error| format!("device binaries: {error}"))?;
        let mut others = binaries.split_off(programs).into_iter();
        let helpers = binaries.split_off(args.binaries.len());
        let device_dirs = args
            .device_dirs
            .iter()
            .zip(others.by_ref())
            .map(|((path, roots), fd)| Directory {
                path: path.clone(),
                file: fd.into(),
                roots: *roots,
            })
            .collect();
        let cgroups = cgroups(&args, &mut others);
        let note = args.note.clone().zip(others.next());
        let note = note.map(|(path, file)| Note {
            file: file.into(),
            path,
        });
        let ids = if args.ids_held { others.next() } else { None };
        let sink = Sink::stderr();
        let children = sys::child_signals().map_err(|error| format!("signalfd: {error}"))?;
        let interfaces = tap::Interfaces::open().map_err(|error| format!("rtnetlink: {error}"))?;
        let confined = confine::launcher(&args);
        let hello = match &confined {
            // Not empty: a packet without bytes would read as the end of the connection.
            Ok(()) => {
                Outgoing::success(0, Some(wire::reply::Result::Bound(wire::Bound::default())))
            }
            Err(line) => Outgoing::error(0, line.clone()),
        };
        let mut server = Self {
            paths: Paths::new(args.allow_paths.clone()).noted_in(note),
            cgroups,
            args,
            control,
            vmm,
            children,
            binaries,
            helpers,
            device_dirs,
            devices: Vec::new(),
            kept: Kept::default(),
            _ids: ids,
            interfaces,
            sink,
            outgoing: VecDeque::from([hello]),
        };
        server
            .flush()
            .map_err(|error| format!("control socket: {error}"))?;
        confined.map(|()| server)
    }

    /// The loop; ends well when the VMM does.
    fn serve(&mut self) -> Result<(), String> {
        loop {
            let now = Instant::now();
            let mut waits = false;
            for device in &mut self.devices {
                device.log.tick(now, &mut self.sink);
                waits |= device.log.waits();
            }
            // One packet in, its answer out: while something waits to be sent, nothing is
            // taken, and nothing is reaped, so that a pid in a packet still names its process.
            let blocked = !self.outgoing.is_empty();
            let (control, children) = if blocked {
                (libc::POLLOUT, 0)
            } else {
                (libc::POLLIN, libc::POLLIN)
            };
            let mut polled: Vec<(BorrowedFd<'_>, i16)> = vec![
                (self.control.as_fd(), control),
                (self.vmm.as_fd(), libc::POLLIN),
                (self.children.as_fd(), children),
            ];
            let mut says = Vec::new();
            for (index, device) in self.devices.iter().enumerate() {
                for (fd, says_by) in [
                    (device.log.wants(), SaysBy::Log),
                    (device.watch.fd(), SaysBy::Watch),
                    (device.dial.as_ref().and_then(Dial::fd), SaysBy::Dial),
                ] {
                    if let Some(fd) = fd {
                        polled.push((fd, libc::POLLIN));
                        says.push((index, says_by));
                    }
                }
            }
            let revents = sys::poll(&polled, waits.then(|| now + LOOK_AGAIN))
                .map_err(|error| format!("poll: {error}"))?;
            let [control, vmm, children, said @ ..] = revents.as_slice() else {
                return Err("poll: fewer answers than questions".into());
            };
            if *vmm != 0 {
                return Ok(());
            }
            let said = said.iter().zip(says).filter(|(events, _)| **events != 0);
            for (_, (index, by)) in said {
                self.listen_to(index, by);
            }
            if *control & libc::POLLOUT != 0 {
                if self.flush().is_err() {
                    return Ok(());
                }
            } else if *control & libc::POLLIN != 0 {
                match self.control.receive() {
                    Ok(Some(packet)) => {
                        let answer = self.answer(packet);
                        self.outgoing.push_back(answer);
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Ok(None) => return Ok(()),
                    // A VMM that dies with a packet of ours unread.
                    Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
                    Err(error) => return Err(format!("control socket: {error}")),
                }
                if self.flush().is_err() {
                    return Ok(());
                }
            } else if *control != 0 {
                return Ok(());
            }
            if *children != 0 && self.outgoing.is_empty() {
                // What it says does not matter: SIGCHLDs merge.
                let mut drained = [0; 1024];
                let _ = sys::read(self.children.as_fd(), &mut drained);
                self.reap();
                self.cgroups.prune();
                if self.flush().is_err() {
                    return Ok(());
                }
            }
        }
    }

    /// Takes what a device has to say.
    fn listen_to(&mut self, index: usize, by: SaysBy) {
        let Some(device) = self.devices.get_mut(index) else {
            return;
        };
        match by {
            SaysBy::Log => device.log.on_readable(&mut self.sink),
            SaysBy::Watch => {
                if device.watch.on_readable()
                    && let Err(why) = device.kill()
                {
                    self.sink.line("bulkhead-launcher", &why);
                }
            }
            SaysBy::Dial => {
                if let Some(dial) = &mut device.dial {
                    dial.on_readable(&self.paths);
                }
            }
        }
    }

    /// Reaps every child that has ended and queues the events.
    fn reap(&mut self) {
        while let Ok(Some((pid, outcome))) = sys::reap(None) {
            let Some(index) = self.devices.iter().position(|d| d.pid == pid) else {
                continue;
            };
            let mut device = self.devices.swap_remove(index);
            device.log.finish(&mut self.sink);
            let (status, signal) = match outcome {
                ExitOutcome::Status(status) => (status, 0),
                ExitOutcome::Signal(signal) => (0, signal),
                ExitOutcome::Violation(_) => (0, libc::SIGSYS),
            };
            let exited = wire::Exited {
                device_id: device.id,
                incarnation: device.incarnation,
                status,
                signal,
                violation: device
                    .watch
                    .violation()
                    .map(|call| wire::Violation {
                        nr: call.nr,
                        arch: call.arch,
                        ..Default::default()
                    })
                    .into(),
                last_line: device.log.last_line().to_owned(),
                ..Default::default()
            };
            self.outgoing.push_back(Outgoing::success(
                0,
                Some(wire::reply::Result::Exited(exited)),
            ));
        }
    }

    /// Sends what it can; an error means that the VMM is gone.
    fn flush(&mut self) -> io::Result<()> {
        while let Some(next) = self.outgoing.front() {
            let bytes = next.reply.write_to_bytes().map_err(io::Error::other)?;
            let fds: Vec<BorrowedFd<'_>> = next.fds.iter().map(AsFd::as_fd).collect();
            let credentials = next.pid.map(|pid| (pid, isolate::effective_ids()));
            match self.control.send(&bytes, &fds, credentials) {
                Ok(()) => {
                    self.outgoing.pop_front();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn answer(&mut self, packet: Packet) -> Outgoing {
        let Ok(request) = wire::Request::parse_from_bytes(&packet.bytes) else {
            return Outgoing::error(0, "a request that is no message".into());
        };
        let id = request.id;
        let result = match request.op {
            Some(wire::request::Op::OpenPath(op)) => self.open(id, &op),
            Some(wire::request::Op::BindUnix(op)) => self.bind(id, &op),
            Some(wire::request::Op::OpenTap(op)) => self.open_tap(id, &op),
            Some(wire::request::Op::SpawnHelper(op)) => self.spawn_helper(id, op, packet.fds),
            Some(wire::request::Op::ConnectUnix(op)) => self.connect(id, &op),
            Some(wire::request::Op::Spawn(op)) => self.spawn(id, op, packet.fds),
            Some(wire::request::Op::Respawn(op)) => self.respawn(id, &op, packet.fds),
            Some(wire::request::Op::Settle(op)) => self.settle(id, &op),
            Some(wire::request::Op::Kill(op)) => self.kill(id, &op),
            Some(wire::request::Op::Place(op)) => self.place(id, &op),
            Some(wire::request::Op::GrowFile(op)) => self.grow(id, &op),
            Some(wire::request::Op::Forget(op)) => {
                self.paths.forget(Path::new(&op.path)).map(|()| Outgoing::success(id, None))
            }
            _ => Err("a request that this launcher does not know: are bulkhead and bulkhead-launcher of one version?".into()),
        };
        result.unwrap_or_else(|line| Outgoing::error(id, line))
    }

    fn open(&self, id: u64, op: &wire::OpenPath) -> Result<Outgoing, String> {
        let mode = match op.access.enum_value() {
            Ok(wire::open_path::Access::READ) => Mode::Read,
            Ok(wire::open_path::Access::READ_WRITE) => Mode::ReadWrite,
            Ok(wire::open_path::Access::APPEND) => Mode::Append,
            Err(_) => return Err("an access that this launcher does not know".into()),
        };
        let opened = self.paths.open(
            Path::new(&op.path),
            &role(&op.role),
            mode,
            op.direct,
            op.lock,
        )?;
        let answer = wire::Opened {
            direct: opened.direct,
            size: opened.size,
            block_device: opened.block_device,
            secure_erase: opened.secure_erase,
            ..Default::default()
        };
        let mut outgoing = Outgoing::success(id, Some(wire::reply::Result::Opened(answer)));
        outgoing.fds.push(opened.file.into());
        Ok(outgoing)
    }

    fn bind(&mut self, id: u64, op: &wire::BindUnix) -> Result<Outgoing, String> {
        let path = Path::new(&op.path);
        let listener = self.paths.bind_for(path, &role(&op.role), op.anybody)?;
        if op.made_directory {
            self.paths.has_made_directory(path)?;
        }
        let answer = wire::reply::Result::Bound(wire::Bound::default());
        let mut outgoing = Outgoing::success(id, Some(answer));
        outgoing.fds.push(listener.into());
        Ok(outgoing)
    }

    fn connect(&self, id: u64, op: &wire::ConnectUnix) -> Result<Outgoing, String> {
        let stream = self.paths.connect(Path::new(&op.path), &role(&op.role))?;
        let answer = wire::reply::Result::Connected(wire::Connected::default());
        let mut outgoing = Outgoing::success(id, Some(answer));
        outgoing.fds.push(stream.into());
        Ok(outgoing)
    }

    /// A tap's queues, and as many descriptors of vhost-net if asked for and to be had.
    fn open_tap(&self, id: u64, op: &wire::OpenTap) -> Result<Outgoing, String> {
        let queues = op.queues.max(1);
        if queues > MAX_QUEUE_PAIRS {
            return Err(format!(
                "tap {}: {queues} queues: at most {MAX_QUEUE_PAIRS} are served",
                printable(&op.name)
            ));
        }
        let opened = tap::open(&self.interfaces, &op.name, queues, 0)?;
        let answer = wire::Tap {
            name: opened.name,
            mtu: opened.mtu,
            ..Default::default()
        };
        let mut outgoing = Outgoing::success(id, Some(wire::reply::Result::Tap(answer)));
        if op.vhost_net {
            outgoing.fds = tap::open_vhost_net(opened.queues.len())?;
        }
        outgoing.fds.splice(..0, opened.queues);
        Ok(outgoing)
    }

    fn grow(&self, id: u64, op: &wire::GrowFile) -> Result<Outgoing, String> {
        let answer = wire::Grown {
            size: self.kept.grow(&op.device_id, op.index, op.size)?,
            ..Default::default()
        };
        let answer = wire::reply::Result::Grown(answer);
        Ok(Outgoing::success(id, Some(answer)))
    }

    /// The VMM has ended: so does all that is its.
    fn end(&mut self) {
        self.paths.remove_all();
        for device in &self.devices {
            // The kernel ends what is left when this process, PID 1, exits.
            let _ = device.kill();
        }
        let deadline = Instant::now() + END_DEADLINE;
        while !self.devices.is_empty() && Instant::now() < deadline {
            let _ = sys::poll(&[(self.children.as_fd(), libc::POLLIN)], Some(deadline));
            let mut drained = [0; 1024];
            let _ = sys::read(self.children.as_fd(), &mut drained);
            self.reap();
        }
        self.cgroups.remove_all();
        self.paths.end_note();
        // A VMM that has not ended itself hears how they ended.
        let _ = self.flush();
    }
}

/// The VM's cgroup, as the VMM prepared it.
fn cgroups(args: &Args, inherited: &mut impl Iterator<Item = OwnedFd>) -> Cgroups {
    let group = args.cgroup.as_ref().and_then(|cgroup| {
        Some(Group {
            directory: inherited.next()?.into(),
            name: cgroup.path.rsplit('/').next()?.to_owned(),
            path: cgroup.path.clone(),
            controllers: cgroup.controllers.clone(),
        })
    });
    Cgroups::new(group, args.cgroup_note.clone())
}

/// A role as it may stand at the head of a line.
fn role(text: &str) -> String {
    let short: String = text.chars().take(32).collect();
    if short.is_empty() {
        "path".into()
    } else {
        printable(&short)
    }
}
