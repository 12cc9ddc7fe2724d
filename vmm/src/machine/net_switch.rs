//! Devices whose back-end is somebody else's: a network switch or any other vhost-user
//! process behind a socket, and helpers (passt, virtiofsd), which the launcher runs. The manager thread makes them
//! with the machine, and afterwards keeps their connection: nothing here waits then.
//!
//! ```text
//!            lost                   due                     linked
//!   serving ──────▶ waiting ───────────▶ linking ──────────────────▶ adopting
//!      ▲              ▲   ▲                 │ refused, too late          │ │
//!      │              │   └─────────────────┘                            │ │
//!      │              └──────────────── did not take over ───────────────┘ │
//!      └───────────────────────────────── took over ──────────────────────┘
//! ```
//!
//! Where the VMM listens, "waiting" is for somebody to connect, and "linking" is left out. A
//! back-end that comes and goes at once is met with pauses that double from 100 ms to 5 s: it
//! is not connected to, or, where it connects, not spoken to before.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_proto::RpcStatus;
use bulkhead_proto::device::{NetUpdate, net_update};
use bulkhead_proto::machine::{DeviceInfo, DeviceStatsResponse, NetStatus};

pub use super::net_helper::{EXITED, HelperProcess};
use super::net_links::Links;
use super::net_mac;
pub use super::net_origin::Origin;
use super::net_remedies::{bare, of_others};
use super::net_told::Told;
use super::usage::Usage;
use crate::launcher::{Launcher, LauncherError};
use crate::virtio::{ReconnectError, VirtioPciFunction};

/// First and longest pause before another attempt.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// A connection that lasted so long begins anew with the first pause.
const STEADY: Duration = Duration::from_secs(5);
/// How long the launcher may take to connect or to start a helper.
const LINK_LIMIT: Duration = Duration::from_secs(10);

/// What the guest was told of a network device, for its status.
#[derive(Clone, Debug)]
pub struct NetFacts {
    /// Its address.
    pub mac: [u8; 6],
    /// Its MTU; 0: nothing was said.
    pub mtu: u32,
}

/// Hands a connection to the device's function; its end is told later.
pub type Adopt<'a> = &'a dyn Fn(UnixStream) -> Result<(), ReconnectError>;

#[derive(Debug)]
enum Phase {
    Serving {
        since: Instant,
        /// It was noted that it has lasted.
        rested: bool,
    },
    Waiting {
        /// `None`: for somebody to connect, or for nothing.
        until: Option<Instant>,
        /// Who has connected before the pause is over.
        early: Option<UnixStream>,
    },
    Linking {
        ticket: u64,
        begun: Instant,
        deadline: Instant,
        /// Our end of a helper's channel, where it does not come with the process.
        ours: Option<UnixStream>,
    },
    Adopting,
}

/// What the launcher has brought: a connection, or a helper's pidfd and pid.
#[derive(Debug)]
pub struct Came {
    /// The descriptor.
    pub fd: OwnedFd,
    /// A helper's host pid.
    pub pid: Option<i32>,
    /// Our end of a helper's channel, where the launcher made it.
    pub channel: Option<OwnedFd>,
}

/// A device with such a back-end.
#[derive(Debug)]
pub struct Switch {
    id: String,
    kind: String,
    origin: Origin,
    /// A network device.
    net: Option<NetFacts>,
    phase: Phase,
    /// The next pause.
    pause: Duration,
    /// Attempts to get a helper, and its process.
    incarnation: u64,
    /// The last of them that served.
    served: u64,
    process: Option<HelperProcess>,
    /// What its helper uses of the host, if it has one.
    usage: Option<Arc<Usage>>,
    /// What was told of it.
    told: Told,
    /// The incarnation of a helper that was given up for a reason which was told.
    given_up: u64,
}

impl Switch {
    /// It serves a network device.
    pub fn is_net(&self) -> bool {
        self.net.is_some()
    }

    /// A device that is served, or (`serving` false) waits for its back-end.
    pub fn new(
        id: &str,
        kind: &str,
        origin: Origin,
        net: Option<NetFacts>,
        serving: bool,
        now: Instant,
    ) -> Self {
        let mut switch = Self {
            id: id.to_owned(),
            kind: kind.to_owned(),
            origin,
            net,
            phase: Phase::Serving {
                since: now,
                rested: false,
            },
            pause: PAUSE.0,
            incarnation: 0,
            served: 0,
            process: None,
            usage: None,
            told: Told::default(),
            given_up: 0,
        };
        if !serving {
            switch.wait(now);
        }
        switch
    }

    /// A helper serves it already.
    #[must_use]
    pub fn with_process(mut self, incarnation: u64, process: HelperProcess) -> Self {
        self.incarnation = incarnation;
        self.served = incarnation;
        self.process = Some(process);
        self
    }

    /// Notes what its helper uses of the host.
    pub fn set_usage(&mut self, usage: Option<Arc<Usage>>) {
        self.usage = usage;
    }

    /// The incarnation of its helper that runs.
    pub fn running(&self) -> Option<u64> {
        self.process.as_ref().map(|_| self.incarnation)
    }

    /// Its helper's process and its number, if it serves.
    pub fn serving(&self) -> Option<(&HelperProcess, u64)> {
        let served = self.served == self.incarnation;
        Some((self.process.as_ref().filter(|_| served)?, self.incarnation))
    }

    /// Its helper's process, if it runs.
    pub fn process(&self) -> Option<&HelperProcess> {
        self.process.as_ref()
    }

    /// What its helper uses of the host; `None`: it has none.
    pub fn usage(&self) -> Option<&Arc<Usage>> {
        self.usage.as_ref()
    }

    /// Where its back-end comes from, for events.
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// What the API says of it beyond any device.
    pub fn describe(&self, info: &mut DeviceInfo) {
        if let Some(process) = &self.process {
            info.pid = process.pid;
            info.spawn_us = process.ready_us();
            info.helper = self.origin.helper().unwrap_or_default().to_owned();
        }
        info.incarnation = self.incarnation;
        if info.state != "failed" && !matches!(self.phase, Phase::Serving { .. }) {
            info.state = if self.origin.returns() {
                "disconnected"
            } else {
                "absent"
            }
            .to_owned();
        }
    }

    /// The device is removed: the number and pidfd of the helper that is to end, if it has one,
    /// and the path that it was reached by, if we made that.
    pub fn dismiss(&mut self) -> (u64, Option<OwnedFd>, Option<PathBuf>) {
        let path = match &self.origin {
            Origin::Listen(path, _) => Some(path.clone()),
            _ => None,
        };
        let pidfd = self.process.take().map(|process| process.pidfd);
        (self.incarnation, pidfd, path)
    }

    /// The machine was not made after all: has the launcher end its helper, with its cgroup, and
    /// remove the socket that we listen on.
    ///
    /// # Errors
    /// When the launcher is gone or does not answer.
    pub fn forget(&self, launcher: &Launcher) -> Result<(), LauncherError> {
        let mut result = Ok(());
        if self.usage.is_some() {
            result = launcher.kill_and_forget(&self.id, self.incarnation);
        }
        if let Origin::Listen(path, _) = &self.origin {
            result = result.and(launcher.forget(path));
        }
        result
    }

    /// Its back-end is gone. `hung_up`: it went by itself. True: the operator is to be told; how
    /// a helper ended says more than that it hung up.
    pub fn lost(
        &mut self,
        launcher: &dyn Links,
        (why, hung_up): (&str, bool),
        now: Instant,
    ) -> bool {
        self.rest(now);
        let end_tells = self.leave(launcher, hung_up);
        self.wait(now);
        !end_tells && self.news(&format!("lost: {why}"))
    }

    /// A back-end that has served for a while is gone: what comes now is news again, once.
    fn rest(&mut self, now: Instant) {
        if let Phase::Serving { since, rested } = &mut self.phase
            && !*rested
            && now.saturating_duration_since(*since) >= STEADY
        {
            *rested = true;
            self.pause = PAUSE.0;
            self.told.clear();
        }
    }

    /// A back-end serves. True: the operator is to be told.
    pub fn reconnected(&mut self, now: Instant) -> bool {
        self.phase = Phase::Serving {
            since: now,
            rested: false,
        };
        self.served = self.incarnation;
        if let Some(process) = &mut self.process {
            process.ready = now.saturating_duration_since(process.begun);
        }
        self.told.came(now)
    }

    /// One that came did not take over. A line that is news comes back.
    pub fn not_reconnected(
        &mut self,
        launcher: &dyn Links,
        (why, hung_up): (&str, bool),
        now: Instant,
    ) -> Option<String> {
        let end_tells = self.leave(launcher, hung_up);
        self.wait(now);
        let why = match self.origin {
            Origin::Helper(..) => bare(&self.id, why).to_owned(),
            _ => of_others(&self.id, why),
        };
        let line = format!("{}: {why}", self.origin);
        (!end_tells && self.news(&line)).then_some(line)
    }

    /// Its helper has ended like this: the event that says so, and whether the operator is to be
    /// told.
    pub fn exited(
        &mut self,
        incarnation: u64,
        how: &str,
        now: Instant,
    ) -> Option<(&'static str, String, bool)> {
        if self.incarnation == incarnation {
            self.process = None;
            self.rest(now);
        }
        let line = format!("{}: {how}", self.origin);
        let news = self.given_up != incarnation && self.news(&line);
        if self.served == incarnation {
            return Some((EXITED, line, news));
        }
        news.then_some(("device.not-reconnected", line, true))
    }

    /// Ends what is left of a helper. True: it hung up, and how it ended is still to be told.
    fn leave(&mut self, launcher: &dyn Links, hung_up: bool) -> bool {
        // Its end may have been told before.
        let helper = self.origin.helper().is_some();
        if helper && !hung_up {
            self.given_up = self.incarnation;
        }
        self.end_process(launcher);
        helper && hung_up
    }

    /// Notes why it is not served; false when that was told already.
    pub fn news(&mut self, why: &str) -> bool {
        self.told.news(why)
    }

    /// A process that is no longer listened to could still write to guest memory.
    fn end_process(&mut self, launcher: &dyn Links) {
        if self.process.take().is_some() {
            launcher.end_helper(&self.id, self.incarnation);
        }
    }

    fn wait(&mut self, now: Instant) {
        let until = match &self.origin {
            Origin::Connect(_) | Origin::Helper(..) => now.checked_add(self.pause),
            // The first to come is not kept waiting.
            Origin::Listen(..) if self.pause > PAUSE.0 => now.checked_add(self.pause),
            Origin::Listen(..) | Origin::Nothing(_) => None,
        };
        self.pause = self.pause.saturating_mul(2).min(PAUSE.1);
        self.phase = Phase::Waiting { until, early: None };
    }

    /// The listener that a back-end comes by, to be watched.
    pub fn listener(&self) -> Option<RawFd> {
        match &self.origin {
            Origin::Listen(_, listener) => Some(listener.as_raw_fd()),
            _ => None,
        }
    }

    /// Somebody connects. While a back-end serves, or another is on its way in, nobody else
    /// is let in; during a pause the first to come waits until it is over.
    pub fn on_listener(&mut self, adopt: Adopt<'_>, now: Instant) {
        let Origin::Listen(_, listener) = &self.origin else {
            return;
        };
        match listener.accept() {
            Ok((stream, _)) => match &mut self.phase {
                Phase::Waiting { until: None, .. } => self.adopt(stream, adopt, now),
                Phase::Waiting { early, .. } if early.is_none() => *early = Some(stream),
                _ => self.surplus(now),
            },
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => log::warn!("device {}: its socket: {error}", self.id),
        }
    }

    /// A connection was closed since another is there.
    fn surplus(&mut self, now: Instant) {
        if let Some(line) = self.told.surplus(now) {
            log::warn!("device {}: {line}", self.id);
        }
    }

    fn adopt(&mut self, stream: UnixStream, adopt: Adopt<'_>, now: Instant) {
        match adopt(stream) {
            Ok(()) => self.phase = Phase::Adopting,
            Err(error) => {
                log::debug!("{error}");
                self.wait(now);
            }
        }
    }

    /// When something is to be done, if nothing happens before.
    pub fn next_timer(&self) -> Option<Instant> {
        match &self.phase {
            Phase::Waiting { until, .. } => *until,
            Phase::Linking { deadline, .. } => Some(*deadline),
            Phase::Serving { .. } | Phase::Adopting => None,
        }
    }

    /// Does what is due. A line that is news comes back.
    pub fn on_timer(
        &mut self,
        launcher: &dyn Links,
        adopt: Adopt<'_>,
        now: Instant,
    ) -> Option<String> {
        match &mut self.phase {
            Phase::Waiting {
                until: until @ Some(_),
                early,
            } if until.is_some_and(|at| at <= now) => {
                *until = None;
                match early.take() {
                    Some(stream) => self.adopt(stream, adopt, now),
                    None => return self.link(launcher, now),
                }
                None
            }
            Phase::Linking { deadline, .. } if *deadline <= now => {
                self.wait(now);
                let why = format!("{}: the launcher does not answer", self.origin);
                self.news(&why).then_some(why)
            }
            _ => None,
        }
    }

    /// Begins another attempt.
    fn link(&mut self, launcher: &dyn Links, now: Instant) -> Option<String> {
        let begun = match &self.origin {
            Origin::Connect(path) => launcher.connect(path).map(|ticket| (ticket, None)),
            Origin::Helper(kind, options) => {
                self.incarnation = self.incarnation.saturating_add(1);
                launcher.helper(kind, &self.id, self.incarnation, options)
            }
            Origin::Listen(..) | Origin::Nothing(_) => return None,
        };
        match begun {
            Ok((ticket, ours)) => {
                let deadline = now.checked_add(LINK_LIMIT).unwrap_or(now);
                self.phase = Phase::Linking {
                    ticket,
                    begun: now,
                    deadline,
                    ours,
                };
                None
            }
            Err(why) => {
                self.wait(now);
                self.news(&why).then_some(why)
            }
        }
    }

    /// Whether this answer of the launcher is for it.
    pub fn awaits(&self, answer: u64) -> bool {
        matches!(self.phase, Phase::Linking { ticket, .. } if ticket == answer)
    }

    /// The launcher has connected or started what [`awaits`](Self::awaits) it, or not. A line
    /// that is news comes back.
    pub fn on_linked(
        &mut self,
        linked: Result<Came, String>,
        adopt: Adopt<'_>,
        now: Instant,
    ) -> Option<String> {
        let old = std::mem::replace(&mut self.phase, Phase::Adopting);
        let Phase::Linking { ours, begun, .. } = old else {
            self.phase = old;
            return None;
        };
        let stream = match linked {
            Ok(linked) if self.origin.helper().is_none() => UnixStream::from(linked.fd),
            Ok(linked) => {
                self.process = Some(HelperProcess {
                    pid: linked.pid.unwrap_or_default(),
                    pidfd: linked.fd,
                    begun,
                    ready: Duration::ZERO,
                });
                // Without one it is as if it had closed it.
                let made = linked.channel.map(UnixStream::from);
                match ours.or(made) {
                    Some(stream) => stream,
                    None => {
                        self.wait(now);
                        let why = format!("{}: the launcher's answer was lost", self.origin);
                        return self.news(&why).then_some(why);
                    }
                }
            }
            Err(why) => {
                self.wait(now);
                return self.news(&why).then_some(why);
            }
        };
        self.adopt(stream, adopt, now);
        None
    }

    /// Its state, as far as the VMM knows it; what moves through it, only its back-end does.
    ///
    /// # Errors
    /// When it is no network device.
    pub fn stats(&self, function: &VirtioPciFunction) -> Result<DeviceStatsResponse, RpcStatus> {
        let mut response = DeviceStatsResponse::new();
        response.id = self.id.clone();
        response.kind = self.kind.clone();
        response.usage = self.usage.as_ref().map(|usage| usage.read()).into();
        let Some(net) = &self.net else {
            if self.usage.is_some() {
                return Ok(response);
            }
            return Err(RpcStatus::failed_precondition(format!(
                "device {}: its back-end is somebody else's process, which tells no counters: ask that",
                self.id
            )));
        };
        let state = function.status();
        let mut status = NetStatus::new();
        status.link_up = state.link_up.unwrap_or_default();
        status.queue_pairs = state.queue_pairs.unwrap_or_default().into();
        status.mac = net_mac::format(&net.mac);
        status.mtu = net.mtu;
        status.datapath = match &self.origin {
            Origin::Connect(_) | Origin::Listen(..) => "vhost-user",
            Origin::Helper(kind, _) => kind,
            Origin::Nothing(_) => "none",
        }
        .to_owned();
        response.net = Some(status).into();
        Ok(response)
    }

    /// Takes its link up or down.
    ///
    /// # Errors
    /// What is not possible, and the remedy.
    pub fn update_net(
        &mut self,
        function: &VirtioPciFunction,
        update: &NetUpdate,
    ) -> Result<(), RpcStatus> {
        use net_update::Link;
        match self.check_update(update)? {
            Link::UNCHANGED => Ok(()),
            link if function.set_link(link == Link::UP) => Ok(()),
            _ => Err(self.refused("its link is its back-end's")),
        }
    }

    fn refused(&self, why: &str) -> RpcStatus {
        RpcStatus::failed_precondition(format!("device {}: {why}", self.id))
    }

    /// What an update asks of the link, if it is possible.
    fn check_update(&self, update: &NetUpdate) -> Result<net_update::Link, RpcStatus> {
        if self.net.is_none() {
            return Err(self.refused("is no network device: see Devices"));
        }
        if update.to_guest.is_some() || update.from_guest.is_some() {
            if let Some(why) = self.absence() {
                return Err(self.refused(&why));
            }
            return Err(
                self.refused("its frames are moved by somebody else's process: set limits there")
            );
        }
        let link = update.link.enum_value_or_default();
        if let (true, Some(why)) = (link != net_update::Link::UNCHANGED, self.absence()) {
            return Err(self.refused(&why));
        }
        Ok(link)
    }
}

#[path = "net_switch_words.rs"]
mod words;

#[cfg(test)]
#[path = "net_switch_tests.rs"]
mod tests;
