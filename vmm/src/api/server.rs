//! The `api` thread: accepts clients, lets each connection work, and carries answers and
//! events to them. Started by the manager before the process confines itself; from then on
//! it makes no system calls but epoll_wait, epoll_ctl, accept4, getsockopt (SO_PEERCRED),
//! recvmsg, sendmsg, read and write on its eventfd, close, and what memory and locks need.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bulkhead_proto::sys;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::MachineService;
use super::access::{Door, Refusals, Role, TOLD_FOR};
use super::connection::{Connection, Context};
use super::events::EventLog;
use super::limits::Limits;
use super::refused_calls::RefusedCalls;
use super::reply::Replies;
use super::request::Services;
use crate::threads::{self, ThreadHook};

const BELL: u64 = 0;
/// Of the first socket; the others' follow.
const FIRST_DOOR: u64 = 1;
const FIRST_CONNECTION: u64 = 16;
/// Read at once from one client.
const CHUNK: usize = 16 * 1024;
/// Clients accepted before the others have their turn.
const ACCEPTS_PER_TURN: usize = 16;
/// How long to leave the listener alone when the process is out of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// How long [`ApiServerHandle`] waits for clients to read when it is merely dropped.
const DROP_GRACE: Duration = Duration::from_secs(1);

/// The outward server.
#[derive(Debug)]
pub struct ApiServer;

impl ApiServer {
    /// Starts the `api` thread on listening sockets, which share all of its bounds.
    ///
    /// # Errors
    ///
    /// The system call that failed: an epoll, an eventfd or a thread could not be had.
    pub fn start(
        doors: Vec<Door>,
        service: Arc<dyn MachineService>,
        events: Arc<EventLog>,
        services: Services,
        hook: ThreadHook,
    ) -> io::Result<ApiServerHandle> {
        let limits = Limits::default();
        Self::start_with(doors, service, events, (services, limits), hook)
    }

    pub(super) fn start_with(
        doors: Vec<Door>,
        service: Arc<dyn MachineService>,
        events: Arc<EventLog>,
        (services, limits): (Services, Limits),
        hook: ThreadHook,
    ) -> io::Result<ApiServerHandle> {
        for door in &doors {
            door.listener.set_nonblocking(true)?;
        }
        let bell = Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?);
        let epoll = Epoll::new()?;
        epoll.ctl(
            ControlOperation::Add,
            bell.as_raw_fd(),
            EpollEvent::new(EventSet::IN, BELL),
        )?;
        events.attach(Arc::clone(&bell));
        let stop = Arc::new(Mutex::new(None));
        let clients = Arc::new(AtomicUsize::new(0));
        let mut server = Server {
            epoll,
            doors,
            refusals: Refusals::default(),
            refused_calls: RefusedCalls::default(),
            full_told: None,
            trouble_told: None,
            troubled: false,
            accept_again: None,
            replies: Arc::new(Replies::new(Arc::clone(&bell))),
            bell: Arc::clone(&bell),
            stop: Arc::clone(&stop),
            service,
            events,
            services,
            limits,
            connections: BTreeMap::new(),
            clients: Arc::clone(&clients),
            next_token: FIRST_CONNECTION,
        };
        let thread = threads::spawn("api".into(), hook, || Ok(()), move || server.run())?;
        Ok(ApiServerHandle {
            stop,
            bell,
            clients,
            thread: Some(thread),
        })
    }
}

/// Ends the server.
#[derive(Debug)]
pub struct ApiServerHandle {
    stop: Arc<Mutex<Option<Instant>>>,
    bell: Arc<EventFd>,
    clients: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

impl ApiServerHandle {
    /// Clients that are connected and may end the machine.
    pub fn clients(&self) -> usize {
        self.clients.load(Ordering::Acquire)
    }

    /// Ends the server: sends the answers and events there are, refuses the calls that have
    /// none, and gives clients up to `grace` to read. No client that reads loses an answer
    /// that was completed before.
    pub fn stop(mut self, grace: Duration) {
        self.end(grace);
    }

    pub(super) fn end(&mut self, grace: Duration) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        let now = Instant::now();
        *self.stop.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(now.checked_add(grace).unwrap_or(now));
        let _ = self.bell.write(1);
        // Bounded by the grace: the thread never blocks otherwise. A panic aborts.
        let _ = thread.join();
    }
}

impl Drop for ApiServerHandle {
    fn drop(&mut self) {
        self.end(DROP_GRACE);
    }
}

struct Server {
    epoll: Epoll,
    doors: Vec<Door>,
    refusals: Refusals,
    refused_calls: RefusedCalls,
    /// When it was told that there is no room.
    full_told: Option<Instant>,
    /// When it was told that no client could be accepted.
    trouble_told: Option<Instant>,
    /// None has been accepted since.
    troubled: bool,
    /// When to listen again after an accept failed.
    accept_again: Option<Instant>,
    replies: Arc<Replies>,
    bell: Arc<EventFd>,
    /// Set: end, and at this time at the latest.
    stop: Arc<Mutex<Option<Instant>>>,
    service: Arc<dyn MachineService>,
    events: Arc<EventLog>,
    services: Services,
    limits: Limits,
    connections: BTreeMap<u64, Connection>,
    /// How many connections of operators there are, for others.
    clients: Arc<AtomicUsize>,
    next_token: u64,
}

impl Server {
    fn run(&mut self) {
        let mut chunk = vec![0; CHUNK];
        let mut ready = [EpollEvent::default(); 64];
        let mut ending: Option<Instant> = None;
        loop {
            let now = Instant::now();
            self.listen(ending.is_none(), now);
            let timeout = millis_until(self.next_deadline(ending), now);
            let count = match self.epoll.wait(timeout, &mut ready) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                Err(error) => {
                    log::error!("the API server ends: epoll: {error}");
                    break;
                }
            };
            let now = Instant::now();
            for event in ready.iter().take(count) {
                match event.data() {
                    BELL => {
                        // Only resets the counter: what rang is looked at below.
                        let _ = self.bell.read();
                    }
                    token @ FIRST_DOOR..FIRST_CONNECTION => self.accept(token, now),
                    token => {
                        if let Some(connection) = self.connections.get_mut(&token) {
                            connection.on_ready(event.event_set(), &mut chunk, now);
                        }
                    }
                }
            }
            // Before the answers: whoever asks us to stop has completed its own before.
            let stop = *self.stop.lock().unwrap_or_else(PoisonError::into_inner);
            self.deliver();
            if let Some(latest) = stop
                && ending.is_none()
            {
                ending = Some(latest);
                let limits = self.limits;
                self.connections
                    .values_mut()
                    .for_each(|connection| connection.end(&limits));
            }
            self.work(now);
            if ending.is_some_and(|latest| self.connections.is_empty() || latest <= now) {
                break;
            }
        }
        self.events.detach(&self.bell);
    }

    /// Answers that have come since the last turn.
    fn deliver(&mut self) {
        for completion in self.replies.take() {
            let key = completion.key;
            if let Some(connection) = self.connections.get_mut(&key.connection) {
                connection.on_completion(
                    key,
                    completion.outcome,
                    self.replies.bell(),
                    &self.limits,
                    &self.refused_calls,
                );
            }
        }
    }

    /// Every connection's turn; the finished ones are closed.
    fn work(&mut self, now: Instant) {
        let context = Context {
            service: &*self.service,
            replies: &self.replies,
            events: &self.events,
            limits: &self.limits,
            services: self.services,
            refused: &self.refused_calls,
            now,
        };
        let epoll = &self.epoll;
        self.connections.retain(|&token, connection| {
            connection.work(&context);
            if connection.is_finished() {
                // Closing the socket removes it from the epoll set.
                return false;
            }
            let wanted = connection.wanted(context.limits);
            if wanted == connection.interest {
                return true;
            }
            connection.interest = wanted;
            let fd = connection.socket().as_raw_fd();
            epoll
                .ctl(ControlOperation::Modify, fd, EpollEvent::new(wanted, token))
                .is_ok()
        });
        self.clients
            .store(self.count(Role::Operator), Ordering::Release);
    }

    fn next_deadline(&self, ending: Option<Instant>) -> Option<Instant> {
        self.connections
            .values()
            .filter_map(|connection| connection.next_deadline(&self.limits))
            .chain(self.accept_again)
            .chain(ending)
            .min()
    }

    fn count(&self, role: Role) -> usize {
        let connections = self.connections.values();
        connections.filter(|c| c.role() == role).count()
    }

    /// Puts the listeners into the epoll set, or takes them out of it.
    fn listen(&mut self, open: bool, now: Instant) {
        if self.accept_again.is_some_and(|at| at <= now) {
            self.accept_again = None;
        }
        let listening = open && self.accept_again.is_none();
        let mut trouble = None;
        for (token, door) in (FIRST_DOOR..).zip(&mut self.doors) {
            if listening == door.listening {
                continue;
            }
            let operation = match listening {
                true => ControlOperation::Add,
                false => ControlOperation::Delete,
            };
            let event = EpollEvent::new(EventSet::IN, token);
            match self.epoll.ctl(operation, door.listener.as_raw_fd(), event) {
                Ok(()) => door.listening = listening,
                // Out of memory or watches: as when accept is.
                Err(error) => trouble = Some(error),
            }
        }
        if let Some(error) = trouble {
            self.pause(&error, now);
        }
    }

    /// Takes clients that wait at a socket in.
    fn accept(&mut self, token: u64, now: Instant) {
        let Ok(index) = usize::try_from(token.saturating_sub(FIRST_DOOR)) else {
            return;
        };
        for _ in 0..ACCEPTS_PER_TURN {
            let Some(door) = self.doors.get(index) else {
                return;
            };
            match door.listener.accept() {
                Ok((socket, _)) => {
                    self.troubled = false;
                    self.admit(index, socket, now);
                }
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return,
                    // The client gave up in the queue.
                    io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => {}
                    // Most likely EMFILE, ENFILE or ENOMEM: the client stays in the queue,
                    // and the listener stays readable, so do not look for a while.
                    _ => {
                        self.pause(&error, now);
                        return;
                    }
                },
            }
        }
    }

    /// Leaves the listeners alone for a while, and says why: once until a client has been accepted
    /// again, and not often even then.
    fn pause(&mut self, error: &io::Error, now: Instant) {
        self.accept_again = now.checked_add(ACCEPT_PAUSE);
        let told = self.trouble_told;
        let lately = told.is_some_and(|at| now.saturating_duration_since(at) < TOLD_FOR);
        let known = std::mem::replace(&mut self.troubled, true);
        if known || lately {
            return;
        }
        self.trouble_told = Some(now);
        log::warn!(
            "API: cannot accept a client: {error}; it waits until that works: {}",
            remedy(error)
        );
    }

    fn admit(&mut self, door: usize, socket: UnixStream, now: Instant) {
        let Some(door) = self.doors.get(door) else {
            return;
        };
        let role = door.role;
        match sys::peer_credentials(socket.as_fd()) {
            Ok(peer) if (door.admits)(&peer) => {}
            Ok(peer) => return self.refusals.tell(role, &peer, &self.events, now),
            Err(error) => {
                log::warn!("API: refused a client without credentials: {error}");
                return;
            }
        }
        if self.is_full(role) && !self.evict(role) {
            let told = self.full_told;
            if told.is_none_or(|at| now.saturating_duration_since(at) >= TOLD_FOR) {
                self.full_told = Some(now);
                log::warn!("API: refused a client: {} are busy", self.connections.len());
            }
            return;
        }
        let token = self.next_token;
        // Never a socket's again: 2^64 connections do not happen.
        self.next_token = token.wrapping_add(1);
        let connection = Connection::new(socket, (token, role), &self.limits, now);
        let event = EpollEvent::new(connection.interest, token);
        let fd = connection.socket().as_raw_fd();
        match self.epoll.ctl(ControlOperation::Add, fd, event) {
            Ok(()) => {
                self.connections.insert(token, connection);
            }
            Err(error) => log::warn!("API: refused a client: epoll: {error}"),
        }
    }

    /// Readers leave half of the connections to operators.
    fn is_full(&self, role: Role) -> bool {
        let half = self.limits.connections / 2;
        self.connections.len() >= self.limits.connections
            || role == Role::Reader && self.count(role) >= half
    }

    /// Closes the connection that has been idle for longest, if any is: a reader's before an
    /// operator's, and an operator's for no reader.
    fn evict(&mut self, role: Role) -> bool {
        let idlest = self
            .connections
            .iter()
            .map(|(&token, connection)| (connection.role() == Role::Operator, connection, token))
            .filter(|(operator, ..)| role == Role::Operator || !operator)
            .filter_map(|(operator, connection, token)| {
                Some((operator, connection.idle_since()?, token))
            })
            .min();
        idlest.is_some_and(|(_, _, token)| self.connections.remove(&token).is_some())
    }
}

/// What to do about a client that cannot be accepted.
fn remedy(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EMFILE) => "end some clients, or start bulkhead with a larger `ulimit -n`",
        Some(libc::ENFILE) => "end some of the host's processes, or raise its fs.file-max",
        Some(libc::ENOSPC) => "raise the host's fs.epoll.max_user_watches",
        _ => "free some of the host's memory",
    }
}

/// epoll_wait's timeout, rounded up so as not to wake a moment too early and spin.
fn millis_until(deadline: Option<Instant>, now: Instant) -> i32 {
    deadline.map_or(-1, |at| {
        let left = at.saturating_duration_since(now).as_micros().div_ceil(1000);
        i32::try_from(left).unwrap_or(i32::MAX)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_are_rounded_up() {
        let now = Instant::now();
        assert_eq!(millis_until(None, now), -1);
        assert_eq!(millis_until(Some(now), now), 0);
        assert_eq!(
            millis_until(now.checked_add(Duration::from_micros(1)), now),
            1
        );
        assert_eq!(
            millis_until(now.checked_add(Duration::from_secs(1 << 40)), now),
            i32::MAX
        );
    }
}
