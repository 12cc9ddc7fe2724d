//! Who may call the API, and what: the sockets it is served on, the peers that are heard there, and
//! the methods of one that only tells. Used on the `api` thread.

use std::collections::VecDeque;
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use bulkhead_proto::sys::PeerCredentials;
use bulkhead_proto::{Code, MACHINE_SERVICE, RpcStatus};

use super::events::EventLog;
use super::request::short;
use crate::cli::OVERFLOW_ID;

/// Methods of a socket that only tells.
const TELLING: [&str; 6] = [
    "Info",
    "Devices",
    "DeviceStats",
    "Operation",
    "Operations",
    "Events",
];
/// How long a peer that was refused is not told of again, and how many are told of in that time:
/// who is not heard does not fill the log of events.
pub(super) const TOLD_FOR: Duration = Duration::from_secs(60);
const MOST_TOLD: usize = 8;

/// What a socket's clients may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Whatever the API has.
    Operator,
    /// Be told: nothing that changes the machine.
    Reader,
}

impl Role {
    /// Whether this method may be called.
    ///
    /// # Errors
    ///
    /// The status for the caller.
    pub(super) fn allows(self, service: &str, method: &str) -> Result<(), RpcStatus> {
        let told = service == MACHINE_SERVICE && TELLING.contains(&method);
        if self == Self::Operator || told {
            return Ok(());
        }
        Err(RpcStatus::new(
            Code::PermissionDenied,
            format!(
                "{} is not for this socket, which only tells ({}): call it on the socket of --api-socket",
                short(method),
                TELLING.join(", ")
            ),
        ))
    }
}

/// Whose calls are heard: by the effective ids that the kernel gives of a peer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Callers {
    /// Users, beside root and who started this process.
    pub uids: Vec<u32>,
    /// Groups.
    pub gids: Vec<u32>,
}

impl Callers {
    /// Nobody but root and who started this process.
    pub fn is_empty(&self) -> bool {
        self.uids.is_empty() && self.gids.is_empty()
    }

    /// Whether a peer is one of them; `own`: who started this process.
    pub fn hears(&self, own: u32, peer: &PeerCredentials) -> bool {
        peer.uid == own
            || peer.uid == 0
            || self.uids.contains(&peer.uid)
            || self.gids.contains(&peer.gid)
    }
}

/// Decides whether a peer is heard.
pub(super) type Admission = Box<dyn Fn(&PeerCredentials) -> bool + Send>;

/// A socket that the API is served on.
pub struct Door {
    pub(super) listener: UnixListener,
    pub(super) role: Role,
    pub(super) admits: Admission,
    /// The listener is in the epoll set.
    pub(super) listening: bool,
}

impl Door {
    /// A listening socket; `own`: the user who started this process.
    pub fn new(listener: UnixListener, role: Role, callers: Callers, own: u32) -> Self {
        let admits = Box::new(move |peer: &PeerCredentials| callers.hears(own, peer));
        Self::admitting(listener, role, admits)
    }

    pub(super) fn admitting(listener: UnixListener, role: Role, admits: Admission) -> Self {
        Self {
            listener,
            role,
            admits,
            listening: false,
        }
    }
}

impl std::fmt::Debug for Door {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Door")
            .field("listener", &self.listener)
            .field("role", &self.role)
            .finish_non_exhaustive()
    }
}

/// Peers that were hung up on and told of.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    told: VecDeque<(u32, Instant)>,
    untold: u64,
}

impl Refusals {
    /// Tells of a peer that is not heard, by an event and in the log, unless that was told lately.
    pub(super) fn tell(
        &mut self,
        role: Role,
        peer: &PeerCredentials,
        events: &EventLog,
        now: Instant,
    ) {
        let lately = |(_, at): &(u32, Instant)| now.saturating_duration_since(*at) < TOLD_FOR;
        while self.told.front().is_some_and(|told| !lately(told)) {
            self.told.pop_front();
        }
        let known = self.told.iter().any(|(uid, _)| *uid == peer.uid);
        if known || self.told.len() >= MOST_TOLD {
            self.untold = self.untold.saturating_add(1);
            return;
        }
        self.told.push_back((peer.uid, now));
        let (socket, option) = match role {
            Role::Operator => ("API socket", "--api-uid"),
            Role::Reader => ("reading API socket", "--api-read-uid"),
        };
        let remedy = match peer.uid {
            // It cannot be named.
            OVERFLOW_ID => format!("run it as another user, whom {option} can name"),
            uid => format!("{option} {uid} at the start lets it in"),
        };
        let mut line = format!(
            "process {} of uid {} and gid {} was hung up on at the {socket}: {remedy}",
            peer.pid, peer.uid, peer.gid
        );
        match std::mem::take(&mut self.untold) {
            0 => {}
            untold => line.push_str(&format!("; {untold} more before it were")),
        }
        log::warn!("API: {line}");
        events.publish("api.refused", "", &line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::events::Lookup;
    use bulkhead_proto::machine::Event;
    use bulkhead_proto::protobuf::Message;

    fn peer(uid: u32, gid: u32) -> PeerCredentials {
        PeerCredentials { pid: 1, uid, gid }
    }

    #[test]
    fn only_who_started_it_root_and_those_who_are_named_are_heard() {
        let nobody = Callers::default();
        assert!(nobody.is_empty());
        assert!(nobody.hears(1000, &peer(1000, 1)));
        assert!(nobody.hears(1000, &peer(0, 1)));
        assert!(!nobody.hears(1000, &peer(1001, 1000)));
        assert!(!nobody.hears(0, &peer(1000, 0)));
        assert!(
            !nobody.hears(1000, &peer(65534, 65534)),
            "an unmapped uid shows as the overflow uid"
        );
        let some = Callers {
            uids: vec![7, 8],
            gids: vec![9],
        };
        assert!(!some.is_empty());
        for (uid, gid, heard) in [
            (7, 1, true),
            (8, 1, true),
            (9, 1, false),
            (1, 9, true),
            (1, 7, false),
        ] {
            assert_eq!(some.hears(1000, &peer(uid, gid)), heard, "{uid} {gid}");
        }
    }

    #[test]
    fn a_reader_is_told_and_changes_nothing() {
        for method in TELLING {
            assert_eq!(Role::Reader.allows(MACHINE_SERVICE, method), Ok(()));
        }
        for (service, method) in [
            (MACHINE_SERVICE, "Pause"),
            (MACHINE_SERVICE, "info"),
            (MACHINE_SERVICE, ""),
            ("vmservice.VM", "Info"),
            ("vmservice.VM", "Quit"),
        ] {
            let status = Role::Reader.allows(service, method).unwrap_err();
            assert_eq!(status.code, Code::PermissionDenied);
            assert!(
                status
                    .message
                    .starts_with(&format!("{method} is not for this socket"))
            );
            assert_eq!(Role::Operator.allows(service, method), Ok(()));
        }
    }

    #[test]
    fn who_cannot_be_named_is_told_what_helps() {
        for (role, option) in [
            (Role::Operator, "--api-uid"),
            (Role::Reader, "--api-read-uid"),
        ] {
            let (events, mut refusals) = (EventLog::new(), Refusals::default());
            refusals.tell(role, &peer(OVERFLOW_ID, 5), &events, Instant::now());
            let Lookup::Event(bytes) = events.get(1) else {
                panic!("it was not told")
            };
            let told = Event::parse_from_bytes(&bytes).unwrap().detail;
            let end = format!("socket: run it as another user, whom {option} can name");
            assert!(told.ends_with(&end), "{told}");
        }
    }

    #[test]
    fn who_is_refused_again_and_again_does_not_fill_the_events() {
        let (events, mut refusals) = (EventLog::new(), Refusals::default());
        let now = Instant::now();
        for uid in (0..100).flat_map(|uid| [uid; 3]) {
            refusals.tell(Role::Reader, &peer(uid, 5), &events, now);
        }
        let detail = |sequence| match events.get(sequence) {
            Lookup::Event(bytes) => Event::parse_from_bytes(&bytes).unwrap().detail,
            other => panic!("{other:?}"),
        };
        assert!(detail(1).contains("uid 0 and gid 5"), "{}", detail(1));
        assert_eq!(events.get(MOST_TOLD as u64 + 1), Lookup::NotYet);
        // 292 were not told of; seven of the eight events told of two before them.
        let later = now.checked_add(TOLD_FOR).unwrap();
        refusals.tell(Role::Operator, &peer(3, 5), &events, later);
        let last = detail(MOST_TOLD as u64 + 1);
        assert!(
            last.ends_with("--api-uid 3 at the start lets it in; 278 more before it were"),
            "{last}"
        );
    }
}
