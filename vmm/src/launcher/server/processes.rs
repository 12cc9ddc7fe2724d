//! Device processes and helpers that the VMM asks the launcher for: started, started anew or on
//! trial, placed and killed.

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Instant;

use bulkhead_proto::launcher as wire;

use super::super::MAX_DEVICES;
use super::super::cgroup::Least;
use super::super::device::{self, Device, HelperOrder, Order, Standing};
use super::super::dial::Dial;
use super::super::programs::{self, Owners};
use super::super::{printable, sys};
use super::{Outgoing, Server};

impl Server {
    pub(super) fn spawn(
        &mut self,
        id: u64,
        op: wire::Spawn,
        fds: Vec<OwnedFd>,
    ) -> Result<Outgoing, String> {
        let begin = Instant::now();
        let order = Order {
            id: op.device_id,
            incarnation: op.incarnation,
            binary: op.binary,
            program: None,
            policy: op.policy,
            args: op.args,
            fds,
            dial: (!op.dial.is_empty()).then(|| op.dial.into()),
        };
        if !self.kept.has_room(&order.id) {
            return Err(format!("there are {MAX_DEVICES} devices already"));
        }
        self.start_device(id, order, op.fence, begin)
    }

    /// Starts a process in the place of one that has ended, or on trial beside one that has not.
    pub(super) fn respawn(
        &mut self,
        id: u64,
        op: &wire::Respawn,
        fds: Vec<OwnedFd>,
    ) -> Result<Outgoing, String> {
        let begin = Instant::now();
        let mut own = self.devices.iter().filter(|d| d.id == op.device_id);
        if op.program.is_empty() {
            if own.any(|d| matches!(d.standing, Standing::Only)) {
                return Err(format!(
                    "device {}: its last process has not ended",
                    printable(&op.device_id)
                ));
            }
            let (order, fence) = self.kept.order(&op.device_id, op.incarnation, fds)?;
            return self.start_device(id, order, fence, begin);
        }
        if own.any(|d| matches!(d.standing, Standing::OnTrial(_))) {
            return Err(format!(
                "device {}: another new process of it has not ended: retry later",
                printable(&op.device_id)
            ));
        }
        let owners = Owners::new(self.args.rights);
        let program = programs::open(&self.device_dirs, &op.program, owners)
            .map_err(|why| format!("device {}: {why}", printable(&op.device_id)))?;
        let program = Rc::new(program);
        let (mut order, fence) = self.kept.order(&op.device_id, op.incarnation, fds)?;
        order.program = Some(Rc::clone(&program));
        self.execute(id, &mut order, fence, begin, Standing::OnTrial(program))
    }

    /// A process that was on trial is its device's.
    pub(super) fn settle(&mut self, id: u64, op: &wire::Settle) -> Result<Outgoing, String> {
        let mut result = Ok(());
        for device in self.devices.iter_mut().filter(|d| d.id == op.device_id) {
            if device.incarnation < op.incarnation {
                device.standing = Standing::Replaced;
                result = result.and(device.kill());
            } else if device.incarnation == op.incarnation
                && let Standing::OnTrial(program) = &device.standing
            {
                self.kept.set_program(&op.device_id, Rc::clone(program));
                device.standing = Standing::Only;
            }
        }
        result.map(|()| Outgoing::success(id, None))
    }

    fn start_device(
        &mut self,
        id: u64,
        mut order: Order,
        fence: bool,
        begin: Instant,
    ) -> Result<Outgoing, String> {
        let answer = self.execute(id, &mut order, fence, begin, Standing::Only)?;
        self.kept.keep(order, fence);
        Ok(answer)
    }

    fn execute(
        &mut self,
        id: u64,
        order: &mut Order,
        fence: bool,
        begin: Instant,
        standing: Standing,
    ) -> Result<Outgoing, String> {
        let name = printable(&order.id);
        let own = order.fds.len();
        let mut dial = None;
        if let Some(path) = &order.dial {
            let (ours, theirs) = Dial::new(path, &self.paths)
                .map_err(|why| format!("device {name}: its requests: {why}"))?;
            order.fds.push(theirs);
            dial = Some(ours);
        }
        let mut read_end = None;
        if fence {
            let (read, write) =
                sys::pipe().map_err(|error| format!("device {name}: its fence: {error}"))?;
            order.fds.push(write);
            read_end = Some(read);
        }
        let mut device = device::spawn(
            order,
            &self.args,
            &self.binaries,
            &self.devices,
            &mut self.cgroups,
        )?;
        device.standing = standing;
        device.dial = dial;
        // Only the process holds these.
        order.fds.truncate(own);
        let mut outgoing = self.started(id, device, begin)?;
        outgoing.fds.extend(read_end);
        Ok(outgoing)
    }

    /// Notes a process that runs; the reply carries its pid and pidfd.
    fn started(&mut self, id: u64, device: Device, begin: Instant) -> Result<Outgoing, String> {
        let pidfd = device.pidfd.try_clone();
        let pid = device.pid;
        self.devices.push(device);
        let pidfd = match (pidfd, self.devices.last()) {
            (Ok(pidfd), _) => pidfd,
            (Err(error), device) => {
                let _ = device.map(Device::kill);
                return Err(format!("pidfd: {error}"));
            }
        };
        let spawned = wire::Spawned {
            spawn_us: u64::try_from(begin.elapsed().as_micros()).unwrap_or(u64::MAX),
            ..Default::default()
        };
        let mut outgoing = Outgoing::success(id, Some(wire::reply::Result::Spawned(spawned)));
        outgoing.fds.push(pidfd);
        outgoing.pid = Some(pid);
        Ok(outgoing)
    }

    pub(super) fn spawn_helper(
        &mut self,
        id: u64,
        op: wire::SpawnHelper,
        fds: Vec<OwnedFd>,
    ) -> Result<Outgoing, String> {
        let begin = Instant::now();
        let order = HelperOrder {
            id: op.id,
            incarnation: op.incarnation,
            kind: op.kind,
            options: op.options,
            fds,
        };
        let mut device = device::spawn_helper(
            &order,
            &self.args,
            &self.helpers,
            &self.devices,
            &mut self.cgroups,
            &self.paths,
        )?;
        let channel = device.channel.take();
        let mut outgoing = self.started(id, device, begin)?;
        outgoing.fds.extend(channel);
        Ok(outgoing)
    }

    pub(super) fn kill(&mut self, id: u64, op: &wire::Kill) -> Result<Outgoing, String> {
        let killed = self
            .devices
            .iter()
            .filter(|d| d.id == op.device_id && (op.forget || d.incarnation == op.incarnation))
            .try_for_each(Device::kill);
        if op.forget {
            self.kept.forget(&op.device_id);
            self.cgroups.forget(&op.device_id);
        }
        killed.map(|()| Outgoing::success(id, None))
    }

    /// Makes a device's cgroup leaf, or changes its limits.
    pub(super) fn place(&mut self, id: u64, op: &wire::Place) -> Result<Outgoing, String> {
        let resources = op.resources.as_ref().cloned().unwrap_or_default();
        let least = Least {
            memory: op.least_memory,
            data: op.least_data,
            pids: op.least_pids,
        };
        let placed = self
            .cgroups
            .place(&op.device_id, &resources, &op.block_device, least)?;
        let (names, fds): (Vec<&str>, Vec<OwnedFd>) = placed.files.into_iter().unzip();
        let answer = wire::Placed {
            cgroup: placed.path,
            files: names.into_iter().map(str::to_owned).collect(),
            not_enforced: placed.not_enforced,
            ..Default::default()
        };
        let mut outgoing = Outgoing::success(id, Some(wire::reply::Result::Placed(answer)));
        outgoing.fds = fds;
        Ok(outgoing)
    }
}
