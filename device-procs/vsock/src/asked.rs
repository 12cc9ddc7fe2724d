//! Streams that the guest has asked for, while the launcher looks for the host's end of them. So
//! many are, and so many requests to the launcher at a time, that its channel never fills.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use crate::packet::Header;
use crate::streams::{MOST, Ports};

/// Tells requests to the launcher apart.
pub type Ticket = u32;

/// How long the launcher may take; the guest's own patience is some seconds.
const PATIENCE: Duration = Duration::from_secs(10);
/// Most requests that the launcher has not answered.
const AT_ONCE: usize = 32;

#[derive(Debug)]
struct Wish {
    request: Header,
    until: Option<Instant>,
    /// Of the request to the launcher, once that is made.
    ticket: Option<Ticket>,
}

/// All of them.
#[derive(Debug, Default)]
pub struct Asked {
    wishes: BTreeMap<Ports, Wish>,
    /// Those that the launcher has not been asked for; some may be given up.
    queue: VecDeque<Ports>,
    /// Requests to the launcher, some of which may be for what was given up.
    open: BTreeMap<Ticket, Ports>,
    last: Ticket,
}

impl Asked {
    /// How many there are.
    pub fn count(&self) -> usize {
        self.wishes.len()
    }

    /// One of these ports.
    pub fn holds(&self, ports: Ports) -> bool {
        self.wishes.contains_key(&ports)
    }

    /// All are given up; the launcher will answer all the same.
    pub fn clear(&mut self) {
        self.wishes.clear();
        self.queue.clear();
    }

    /// Another one; false: too many wait.
    pub fn want(&mut self, request: Header, now: Instant) -> bool {
        if self.queue.len() >= MOST {
            return false;
        }
        let ports = (request.dst_port, request.src_port);
        let wish = Wish {
            request,
            until: now.checked_add(PATIENCE),
            ticket: None,
        };
        self.wishes.insert(ports, wish);
        self.queue.push_back(ports);
        true
    }

    /// It is given up, if there is one.
    pub fn forget(&mut self, ports: Ports) {
        self.wishes.remove(&ports);
    }

    /// What the launcher is to be asked next: a port.
    pub fn next_request(&mut self) -> Option<(Ticket, u32)> {
        while self.open.len() < AT_ONCE {
            let ports = self.queue.pop_front()?;
            let Some(wish) = self.wishes.get_mut(&ports).filter(|w| w.ticket.is_none()) else {
                continue;
            };
            self.last = self.last.wrapping_add(1);
            wish.ticket = Some(self.last);
            self.open.insert(self.last, ports);
            return Some((self.last, ports.0));
        }
        None
    }

    /// The launcher is to answer something.
    pub fn is_waiting(&self) -> bool {
        !self.open.is_empty()
    }

    /// It has answered: what the guest asked for, if it has not given that up.
    pub fn take(&mut self, ticket: Ticket) -> Option<Header> {
        let ports = self.open.remove(&ticket)?;
        self.wishes
            .get(&ports)
            .filter(|wish| wish.ticket == Some(ticket))?;
        self.wishes.remove(&ports).map(|wish| wish.request)
    }

    /// It answers no more: whoever waits.
    pub fn end(&mut self) -> Vec<Ports> {
        self.open.clear();
        self.queue.clear();
        let wishes = std::mem::take(&mut self.wishes);
        wishes.into_keys().collect()
    }

    /// When somebody's time is over, the next one's.
    pub fn next_end(&self) -> Option<Instant> {
        self.wishes.values().filter_map(|wish| wish.until).min()
    }

    /// Gives up those whose time is over.
    pub fn expire(&mut self, now: Instant) -> Vec<Ports> {
        let late = |wish: &Wish| wish.until.is_some_and(|until| until <= now);
        let late: Vec<Ports> = self
            .wishes
            .iter()
            .filter_map(|(ports, wish)| late(wish).then_some(*ports))
            .collect();
        for ports in &late {
            self.wishes.remove(ports);
        }
        late
    }
}
