//! A console's line: what the guest prints, on its way to clients of the API, and what they type,
//! on its way to the guest. Bounded both ways, and nobody waits for anybody: a client that is slow
//! misses bytes of a serial port's and is told how many, and a port of a device's is held back.
//!
//! vCPU threads or a port's thread print, the manager lets clients in, and the `api` thread reads
//! and types for them.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

/// Bytes that are kept of what was printed.
pub const KEPT: usize = 64 << 10;
/// Bytes that are kept of what was typed.
const TYPED: usize = 4 << 10;
/// Clients of one line.
pub const MOST_CLIENTS: usize = 8;

#[derive(Default)]
struct State {
    /// The newest bytes that were printed.
    printed: VecDeque<u8>,
    /// How many were, in all.
    end: u64,
    typed: VecDeque<u8>,
    /// Of each client, how many of the bytes that were printed it is through with.
    clients: BTreeMap<u64, u64>,
    next_client: u64,
    /// Wakes the `api` thread.
    bell: Option<Arc<EventFd>>,
    /// Somebody there has read everything.
    reader_waits: bool,
    /// Somebody there has more to type than there is room for.
    typist_waits: bool,
    closed: bool,
}

impl State {
    fn oldest(&self) -> u64 {
        self.end.saturating_sub(self.printed.len() as u64)
    }

    fn ring(&self) {
        if let Some(bell) = &self.bell {
            // Private to this process and non-blocking.
            let _ = bell.write(1);
        }
    }
}

/// The line.
pub struct Line {
    state: Mutex<State>,
    /// Wakes who takes what is typed to the guest.
    wake: Arc<EventFd>,
}

impl std::fmt::Debug for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Line").finish_non_exhaustive()
    }
}

impl Line {
    /// A line; `wake` is rung when something was typed, and when a client has left.
    pub fn new(wake: Arc<EventFd>) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            wake,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what the guest prints, at once: the newest bytes are kept.
    pub fn print(&self, bytes: &[u8]) {
        let mut state = self.lock();
        if state.closed {
            return;
        }
        for byte in bytes {
            if state.printed.len() >= KEPT {
                state.printed.pop_front();
            }
            state.printed.push_back(*byte);
        }
        state.end = state.end.saturating_add(bytes.len() as u64);
        if std::mem::take(&mut state.reader_waits) {
            state.ring();
        }
    }

    /// How many bytes can be printed without one that a client misses.
    pub fn room(&self) -> usize {
        let state = self.lock();
        let slowest = state.clients.values().min().copied().unwrap_or(state.end);
        let behind = usize::try_from(state.end.saturating_sub(slowest)).unwrap_or(usize::MAX);
        KEPT.saturating_sub(behind)
    }

    /// Takes up to `max` bytes of what was typed.
    pub fn take_typed(&self, max: usize) -> Vec<u8> {
        let mut state = self.lock();
        let count = max.min(state.typed.len());
        let typed = state.typed.drain(..count).collect();
        if count > 0 && std::mem::take(&mut state.typist_waits) {
            state.ring();
        }
        typed
    }

    /// Something was typed that was not taken.
    pub fn is_typed(&self) -> bool {
        !self.lock().typed.is_empty()
    }

    /// Somebody is there.
    pub fn is_joined(&self) -> bool {
        !self.lock().clients.is_empty()
    }

    /// The guest's end is gone: clients are told when they have read the rest.
    pub fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.typed.clear();
        state.ring();
    }

    /// Lets a client in, who first reads up to `history` bytes that were printed before. `None`:
    /// there are [`MOST_CLIENTS`].
    pub fn join(self: &Arc<Self>, history: usize) -> Option<Client> {
        let mut state = self.lock();
        if state.clients.len() >= MOST_CLIENTS {
            return None;
        }
        let id = state.next_client;
        state.next_client = id.wrapping_add(1);
        let history = history.min(state.printed.len());
        let from = state.end.saturating_sub(history as u64);
        state.clients.insert(id, from);
        drop(state);
        Some(Client {
            line: Arc::clone(self),
            id,
        })
    }
}

/// What a client reads.
#[derive(Debug, PartialEq, Eq)]
pub enum Printed {
    /// Bytes, after some that it missed.
    Bytes {
        /// How many it missed.
        lost: u64,
        /// What came then.
        bytes: Vec<u8>,
    },
    /// None yet: the bell rings when there are.
    NotYet,
    /// No more will come.
    Ended,
}

/// A client of a line; dropped, it has left.
#[derive(Debug)]
pub struct Client {
    line: Arc<Line>,
    id: u64,
}

impl Client {
    /// Rings this bell from now on.
    pub fn attend(&self, bell: &Arc<EventFd>) {
        self.line.lock().bell = Some(Arc::clone(bell));
    }

    /// Takes up to `max` bytes.
    pub fn read(&self, max: usize) -> Printed {
        let mut state = self.line.lock();
        let oldest = state.oldest();
        let (end, closed) = (state.end, state.closed);
        let State {
            printed, clients, ..
        } = &mut *state;
        let Some(position) = clients.get_mut(&self.id) else {
            return Printed::Ended;
        };
        let from = oldest.max(*position);
        let lost = from.saturating_sub(*position);
        let skip = usize::try_from(from.saturating_sub(oldest)).unwrap_or(usize::MAX);
        let bytes: Vec<u8> = printed.iter().skip(skip).take(max).copied().collect();
        *position = from.saturating_add(bytes.len() as u64);
        let full = end.saturating_sub(from) >= KEPT as u64;
        if bytes.is_empty() && lost == 0 {
            state.reader_waits = true;
            return match closed {
                true => Printed::Ended,
                false => Printed::NotYet,
            };
        }
        drop(state);
        if full {
            // Who holds the guest back may go on.
            let _ = self.line.wake.write(1);
        }
        Printed::Bytes { lost, bytes }
    }

    /// Types: how many bytes there was room for. The bell rings when there is more.
    pub fn type_in(&self, bytes: &[u8]) -> usize {
        let mut state = self.line.lock();
        if state.closed {
            return bytes.len();
        }
        let count = TYPED.saturating_sub(state.typed.len()).min(bytes.len());
        state.typed.extend(bytes.iter().take(count));
        state.typist_waits |= count < bytes.len();
        drop(state);
        if count > 0 {
            let _ = self.line.wake.write(1);
        }
        count
    }
}

impl PartialEq for Client {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id && Arc::ptr_eq(&self.line, &other.line)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.line.lock().clients.remove(&self.id);
        let _ = self.line.wake.write(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    fn eventfd() -> Arc<EventFd> {
        Arc::new(EventFd::new(EFD_NONBLOCK).unwrap())
    }

    fn text(lost: u64, bytes: &[u8]) -> Printed {
        let bytes = bytes.to_vec();
        Printed::Bytes { lost, bytes }
    }

    #[test]
    fn each_client_reads_all_from_where_it_came_and_the_bell_rings_once_for_who_waits() {
        let line = Line::new(eventfd());
        line.print(b"before");
        let (first, second) = (line.join(0).unwrap(), line.join(3).unwrap());
        let bell = eventfd();
        first.attend(&bell);
        assert_eq!(second.read(99), text(0, b"ore"));
        assert_eq!(first.read(99), Printed::NotYet);
        line.print(b"a");
        line.print(b"bc");
        assert_eq!(bell.read().unwrap(), 1);
        assert_eq!(first.read(2), text(0, b"ab"));
        assert_eq!(first.read(2), text(0, b"c"));
        assert_eq!(second.read(99), text(0, b"abc"));
        line.close();
        assert_eq!(first.read(99), Printed::Ended);
    }

    #[test]
    fn a_slow_client_misses_bytes_and_is_told_how_many() {
        let line = Line::new(eventfd());
        let client = line.join(KEPT).unwrap();
        assert_eq!(line.room(), KEPT);
        line.print(&vec![b'x'; KEPT]);
        assert_eq!(line.room(), 0);
        line.print(b"12345");
        assert_eq!(client.read(1), text(5, b"x"));
        line.close();
        line.print(b"nobody hears this");
        assert_eq!(client.read(KEPT * 2), {
            let mut rest = vec![b'x'; KEPT - 6];
            rest.extend(b"12345");
            text(0, &rest)
        });
        assert_eq!(client.read(1), Printed::Ended);
    }

    #[test]
    fn what_is_typed_is_bounded_and_who_has_more_is_rung_when_there_is_room() {
        let (wake, bell) = (eventfd(), eventfd());
        let line = Line::new(Arc::clone(&wake));
        let client = line.join(0).unwrap();
        client.attend(&bell);
        assert_eq!(client.type_in(&[b'k'; TYPED + 7]), TYPED);
        assert!(wake.read().is_ok() && bell.read().is_err());
        assert_eq!(line.take_typed(5), b"kkkkk");
        assert!(bell.read().is_ok());
        assert_eq!(client.type_in(&[b'l'; 7]), 5);
        line.close();
        assert!(!line.is_typed());
        assert_eq!(
            client.type_in(b"lost"),
            4,
            "nobody waits for a line that has ended"
        );
    }

    #[test]
    fn clients_are_bounded_and_leave_nothing() {
        let line = Line::new(eventfd());
        let clients: Vec<Client> = (0..MOST_CLIENTS).map(|_| line.join(0).unwrap()).collect();
        assert!(line.join(0).is_none());
        drop(clients);
        assert!(!line.is_joined());
        assert!(line.join(0).is_some());
    }
}
