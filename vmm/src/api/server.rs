//! The `api` thread: accepts clients, lets each connection work, and carries answers and
//! events to them. Started by the manager before the process confines itself; from then on
//! it makes no system calls but epoll_wait, epoll_ctl, accept4, getsockopt (SO_PEERCRED),
//! recvmsg, sendmsg, read and write on its eventfd, close, and what memory and locks need.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bulkhead_proto::sys::{self, PeerCredentials};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::MachineService;
use super::connection::{Connection, Context, Limits};
use super::events::EventLog;
use super::reply::Replies;
use super::request::Services;
use crate::threads::{self, ThreadHook};

const BELL: u64 = 0;
const LISTENER: u64 = 1;
const FIRST_CONNECTION: u64 = 2;
/// Read at once from one client.
const CHUNK: usize = 16 * 1024;
/// Clients accepted before the others have their turn.
const ACCEPTS_PER_TURN: usize = 16;
/// How long to leave the listener alone when the process is out of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// How long [`ApiServerHandle`] waits for clients to read when it is merely dropped.
const DROP_GRACE: Duration = Duration::from_secs(1);

/// Decides whether a peer may use the API.
type Admission = Box<dyn Fn(&PeerCredentials) -> bool + Send>;

/// The outward server.
#[derive(Debug)]
pub struct ApiServer;

impl ApiServer {
    /// Starts the `api` thread on a listening socket. To be called before the process
    /// confines itself.
    ///
    /// Clients must have this process's effective uid, or be root.
    ///
    /// # Errors
    ///
    /// The system call that failed: an epoll, an eventfd or a thread could not be had.
    pub fn start(
        listener: UnixListener,
        service: Arc<dyn MachineService>,
        events: Arc<EventLog>,
        services: Services,
        hook: ThreadHook,
    ) -> io::Result<ApiServerHandle> {
        let own = sys::effective_uid();
        let admits = Box::new(move |peer: &PeerCredentials| admits(own, peer));
        let limits = Limits::default();
        Self::start_with(listener, service, events, (services, limits), admits, hook)
    }

    pub(super) fn start_with(
        listener: UnixListener,
        service: Arc<dyn MachineService>,
        events: Arc<EventLog>,
        (services, limits): (Services, Limits),
        admits: Admission,
        hook: ThreadHook,
    ) -> io::Result<ApiServerHandle> {
        listener.set_nonblocking(true)?;
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
            listener,
            listening: false,
            accept_again: None,
            replies: Arc::new(Replies::new(Arc::clone(&bell), limits.outstanding)),
            bell: Arc::clone(&bell),
            stop: Arc::clone(&stop),
            service,
            events,
            services,
            limits,
            admits,
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

/// The API acts with this process's rights, so a client must have them already.
fn admits(own: u32, peer: &PeerCredentials) -> bool {
    peer.uid == own || peer.uid == 0
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
    /// Clients that are connected.
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
    listener: UnixListener,
    /// The listener is in the epoll set.
    listening: bool,
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
    admits: Admission,
    connections: BTreeMap<u64, Connection>,
    /// How many connections there are, for others.
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
                    LISTENER => self.accept(now),
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
                connection.on_completion(key, completion.outcome, &self.limits);
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
            .store(self.connections.len(), Ordering::Release);
    }

    fn next_deadline(&self, ending: Option<Instant>) -> Option<Instant> {
        self.connections
            .values()
            .filter_map(|connection| connection.next_deadline(&self.limits))
            .chain(self.accept_again)
            .chain(ending)
            .min()
    }

    /// Puts the listener into the epoll set, or takes it out of it.
    fn listen(&mut self, open: bool, now: Instant) {
        if self.accept_again.is_some_and(|at| at <= now) {
            self.accept_again = None;
        }
        let listening = open && self.accept_again.is_none();
        if listening == self.listening {
            return;
        }
        let operation = if listening {
            ControlOperation::Add
        } else {
            ControlOperation::Delete
        };
        let event = EpollEvent::new(EventSet::IN, LISTENER);
        match self.epoll.ctl(operation, self.listener.as_raw_fd(), event) {
            Ok(()) => self.listening = listening,
            // Out of memory or watches: as when accept is.
            Err(error) => {
                log::warn!("API: cannot listen: {error}; trying again");
                self.accept_again = now.checked_add(ACCEPT_PAUSE);
            }
        }
    }

    fn accept(&mut self, now: Instant) {
        for _ in 0..ACCEPTS_PER_TURN {
            match self.listener.accept() {
                Ok((socket, _)) => self.admit(socket, now),
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return,
                    // The client gave up in the queue.
                    io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => {}
                    // Most likely EMFILE, ENFILE or ENOMEM: the client stays in the queue,
                    // and the listener stays readable, so do not look for a while.
                    _ => {
                        log::warn!("API: cannot accept a client: {error}; trying again");
                        self.accept_again = now.checked_add(ACCEPT_PAUSE);
                        return;
                    }
                },
            }
        }
    }

    fn admit(&mut self, socket: UnixStream, now: Instant) {
        match sys::peer_credentials(socket.as_fd()) {
            Ok(peer) if (self.admits)(&peer) => {}
            Ok(peer) => {
                log::warn!("API: refused process {} of uid {}", peer.pid, peer.uid);
                return;
            }
            Err(error) => {
                log::warn!("API: refused a client without credentials: {error}");
                return;
            }
        }
        if self.connections.len() >= self.limits.connections && !self.evict() {
            log::warn!("API: refused a client: {} are busy", self.connections.len());
            return;
        }
        let token = self.next_token;
        // Never 0 or 1 again: 2^64 connections do not happen.
        self.next_token = token.wrapping_add(1);
        let connection = Connection::new(socket, token, &self.limits, now);
        let event = EpollEvent::new(connection.interest, token);
        let fd = connection.socket().as_raw_fd();
        match self.epoll.ctl(ControlOperation::Add, fd, event) {
            Ok(()) => {
                self.connections.insert(token, connection);
            }
            Err(error) => log::warn!("API: refused a client: epoll: {error}"),
        }
    }

    /// Closes the connection that has been idle for longest, if any is.
    fn evict(&mut self) -> bool {
        let idlest = self
            .connections
            .iter()
            .filter_map(|(&token, connection)| Some((connection.idle_since()?, token)))
            .min();
        idlest.is_some_and(|(_, token)| self.connections.remove(&token).is_some())
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
    fn only_the_owner_and_root_are_admitted() {
        let peer = |uid| PeerCredentials {
            pid: 1,
            uid,
            gid: 1000,
        };
        assert!(admits(1000, &peer(1000)));
        assert!(admits(1000, &peer(0)));
        assert!(!admits(1000, &peer(1001)));
        assert!(!admits(0, &peer(1000)));
        assert!(
            !admits(1000, &peer(65534)),
            "an unmapped uid shows as the overflow uid"
        );
    }

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
