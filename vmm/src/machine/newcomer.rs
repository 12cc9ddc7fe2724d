//! A device process that is to take another one's place, from its start to its readiness:
//! greeted, told what was changed while its predecessor ran, drained if that was. Driven by
//! the manager thread's epoll loop like the control channel that it becomes; nothing blocks.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use bulkhead_proto::device::{
    BlkUpdate, ConsoleUpdate, DrainRequest, HelloRequest, HelloResponse, MemUpdate, NetUpdate,
    UpdateRequest,
};
use bulkhead_proto::protobuf::Message;
use bulkhead_proto::{AsyncClient, AsyncLimits, ClientError, DEVICE_SERVICE};

use super::control::CALL_LIMIT;
use super::device::check_hello;
use super::kinds::DeviceKind;
use crate::launcher::printable;

/// What was changed on a device since it was made, and must be again on each new process.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Changes {
    blk: Option<BlkUpdate>,
    net: Option<NetUpdate>,
    mem: Option<MemUpdate>,
    console: Option<ConsoleUpdate>,
}

impl Changes {
    /// A disk's process was told this. Its size is its file's.
    pub fn disk(&mut self, update: &BlkUpdate) {
        if update.limits.is_none() && !update.pulled {
            return;
        }
        let kept = self.blk.get_or_insert_default();
        if update.limits.is_some() {
            kept.limits = update.limits.clone();
        }
        kept.pulled |= update.pulled;
    }

    /// A network device's process was told this.
    pub fn net(&mut self, update: &NetUpdate) {
        let kept = self.net.get_or_insert_default();
        if update.link.value() != 0 {
            kept.link = update.link;
        }
        if update.to_guest.is_some() {
            kept.to_guest = update.to_guest.clone();
        }
        if update.from_guest.is_some() {
            kept.from_guest = update.from_guest.clone();
        }
    }

    /// Consoles are another size: of each, the last one counts.
    pub fn console(&mut self, update: &ConsoleUpdate) {
        let sizes = &mut self.console.get_or_insert_default().sizes;
        for size in &update.sizes {
            sizes.retain(|known| known.port != size.port);
            sizes.push(size.clone());
        }
    }

    /// How the memory device's memory is now.
    pub fn memory(&mut self, update: MemUpdate) {
        self.mem = Some(update);
    }

    fn request(&self) -> Option<UpdateRequest> {
        let mut request = UpdateRequest::new();
        if let Some(blk) = &self.blk {
            request.set_blk(blk.clone());
        }
        if let Some(net) = &self.net {
            request.set_net(net.clone());
        }
        if let Some(mem) = &self.mem {
            request.set_mem(mem.clone());
        }
        if let Some(console) = &self.console {
            request.set_console(console.clone());
        }
        request.kind.is_some().then_some(request)
    }
}

/// Where it is on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Started,
    Hello,
    Update,
    Drain,
    Ready,
}

/// A process on its way in.
pub struct Newcomer {
    /// Of the launcher's answer.
    pub ticket: u64,
    /// Counts the processes that have served the device.
    pub incarnation: u64,
    /// When it was asked for.
    pub begun: Instant,
    /// Its pid and pidfd, once the launcher has answered.
    pub started: Option<(i32, OwnedFd)>,
    /// Hangs up when nothing is left of it.
    pub fence: Option<OwnedFd>,
    /// It will not serve, and the launcher's answer is waited for only to see its end.
    pub abandoned: bool,
    id: String,
    kind: &'static DeviceKind,
    client: AsyncClient,
    vhost: Option<UnixStream>,
    step: Step,
    hello: Option<HelloResponse>,
    changes: Option<UpdateRequest>,
    drained: bool,
}

/// What is wrong with one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It closed its control channel: if it has ended, that will be told.
    HungUp,
    /// This.
    Wrong(String),
}

impl From<String> for Fault {
    fn from(why: String) -> Self {
        Self::Wrong(why)
    }
}

/// What a process that is ready brings along.
pub struct Ready {
    /// The control channel.
    pub client: AsyncClient,
    /// The vhost-user channel.
    pub vhost: UnixStream,
    /// What the process said of itself.
    pub hello: HelloResponse,
}

impl Newcomer {
    /// A process of a device that the launcher was asked for.
    pub fn new(
        (id, kind): (&str, &'static DeviceKind),
        (ticket, incarnation): (u64, u64),
        (control, vhost): (UnixStream, UnixStream),
        (changes, drained): (&Changes, bool),
        now: Instant,
    ) -> Self {
        Self {
            ticket,
            incarnation,
            begun: now,
            started: None,
            fence: None,
            abandoned: false,
            id: id.to_owned(),
            kind,
            client: AsyncClient::new(control, AsyncLimits::default()),
            vhost: Some(vhost),
            step: Step::Started,
            hello: None,
            changes: changes.request(),
            drained,
        }
    }

    /// The launcher has started it: begins to speak to it.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn greet(&mut self) -> Result<(), String> {
        let mut request = HelloRequest::new();
        request.device_id.clone_from(&self.id);
        request.incarnation = self.incarnation;
        match self.call(Step::Hello, "Hello", &request) {
            // That is told when its channel is looked at.
            Ok(()) | Err(Fault::HungUp) => Ok(()),
            Err(Fault::Wrong(why)) => Err(why),
        }
    }

    /// Its control channel is ready, or a deadline may have come. True: it is ready.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn on_event(&mut self, now: Instant) -> Result<bool, Fault> {
        let mut answers = Vec::new();
        let result = self
            .client
            .on_writable(now)
            .and_then(|()| self.client.on_readable(now, &mut answers))
            .and_then(|()| self.client.check(now, &mut answers));
        for (_, answer) in answers {
            let payload =
                answer.map_err(|status| format!("it refuses: {}", printable(&status.message)))?;
            self.advance(&payload)?;
        }
        // What it said before it broke the channel counts, but is of no use.
        result.map_err(fault)?;
        Ok(self.step == Step::Ready)
    }

    fn advance(&mut self, payload: &[u8]) -> Result<(), Fault> {
        if self.step == Step::Hello {
            let hello = HelloResponse::parse_from_bytes(payload)
                .map_err(|error| format!("it sent a malformed {}: {error}", HelloResponse::NAME))?;
            check_hello(&hello, self.kind, self.incarnation)?;
            self.hello = Some(hello);
        }
        if let Some(request) = self.changes.take() {
            return self.call(Step::Update, "Update", &request);
        }
        if std::mem::take(&mut self.drained) {
            return self.call(Step::Drain, "Drain", &DrainRequest::new());
        }
        self.step = Step::Ready;
        Ok(())
    }

    fn call<Req: Message>(&mut self, step: Step, method: &str, request: &Req) -> Result<(), Fault> {
        self.step = step;
        self.client
            .call(DEVICE_SERVICE, method, request, CALL_LIMIT, 1)
            .map_err(fault)
    }

    /// When [`on_event`](Self::on_event) is due.
    pub fn next_timer(&self) -> Option<Instant> {
        self.client.next_deadline()
    }

    /// Gives it more time, because the manager itself was held up.
    pub fn extend_deadlines(&mut self, span: std::time::Duration) {
        self.client.extend_deadlines(span);
    }

    /// Wait for room in its control channel, too.
    pub fn wants_write(&self) -> bool {
        self.client.wants_write()
    }

    /// It is ready: what it brings along, once.
    pub fn into_ready(mut self) -> Option<Ready> {
        Some(Ready {
            vhost: self.vhost.take()?,
            hello: self.hello.take()?,
            client: self.client,
        })
    }
}

impl AsFd for Newcomer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.client.as_fd()
    }
}

/// What became of its channel; where it hung up, its end says more.
fn fault(error: ClientError) -> Fault {
    match error {
        ClientError::Closed => Fault::HungUp,
        ClientError::Timeout(span) => {
            Fault::Wrong(format!("it did not answer within {} s", span.as_secs()))
        }
        other => Fault::Wrong(format!("its control channel: {other}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_proto::common::DiskLimits;
    use bulkhead_proto::device::net_update::Link;
    use bulkhead_proto::server::{CONTROL_MAX_FRAME, ControlServer};
    use bulkhead_proto::{Code, RpcStatus};

    use crate::machine::device::DEVICE_PROTOCOL;
    use crate::machine::kinds::BLK;

    struct Bed {
        newcomer: Newcomer,
        device: ControlServer,
        now: Instant,
        calls: Vec<String>,
    }

    fn bed(changes: &Changes, drained: bool) -> Bed {
        let (control, theirs) = UnixStream::pair().unwrap();
        let (vhost, _) = UnixStream::pair().unwrap();
        let now = Instant::now();
        Bed {
            newcomer: Newcomer::new(
                ("root", &BLK),
                (1, 7),
                (control, vhost),
                (changes, drained),
                now,
            ),
            device: ControlServer::new(theirs, CONTROL_MAX_FRAME),
            now,
            calls: Vec::new(),
        }
    }

    fn hello(incarnation: u64, kind: &str) -> Vec<u8> {
        let mut hello = HelloResponse::new();
        (hello.incarnation, hello.kind) = (incarnation, kind.into());
        hello.protocol = DEVICE_PROTOCOL;
        hello.write_to_bytes().unwrap()
    }

    impl Bed {
        /// The device answers once, Hello as given and the rest by nothing.
        fn answer(&mut self, hello: &Result<Vec<u8>, RpcStatus>) -> Result<bool, Fault> {
            let calls = &mut self.calls;
            let served = self.device.on_readable(&mut |_, method, _| {
                calls.push(method.to_owned());
                match method {
                    "Hello" => hello.clone(),
                    _ => Ok(Vec::new()),
                }
            });
            served.unwrap();
            self.newcomer.on_event(self.now)
        }
    }

    #[test]
    fn a_plain_one_is_ready_once_it_has_said_who_it_is() {
        let mut bed = bed(&Changes::default(), false);
        bed.newcomer.greet().unwrap();
        assert_eq!(bed.newcomer.on_event(bed.now), Ok(false));
        assert_eq!(bed.answer(&Ok(hello(7, "blk"))), Ok(true));
        assert_eq!(bed.calls, ["Hello"]);
        assert_eq!(bed.newcomer.into_ready().unwrap().hello.kind, "blk");
    }

    #[test]
    fn it_is_told_what_was_changed_and_drained_if_its_predecessor_was() {
        let mut changes = Changes::default();
        let mut update = BlkUpdate::new();
        update.size_bytes = 1 << 20;
        changes.disk(&update);
        assert_eq!(changes, Changes::default(), "a size is the file's");
        update.limits = Some(DiskLimits::new()).into();
        changes.disk(&update);
        let mut pulled = BlkUpdate::new();
        pulled.pulled = true;
        changes.disk(&pulled);
        let kept = changes.request().unwrap();
        assert!(kept.blk().pulled && kept.blk().limits.is_some());
        let mut bed = bed(&changes, true);
        bed.newcomer.greet().unwrap();
        let hello = Ok(hello(7, "blk"));
        assert_eq!(bed.answer(&hello), Ok(false));
        assert_eq!(bed.answer(&hello), Ok(false));
        assert_eq!(bed.answer(&hello), Ok(true));
        assert_eq!(bed.calls, ["Hello", "Update", "Drain"]);
    }

    #[test]
    fn the_changes_of_a_network_device_add_up() {
        let mut changes = Changes::default();
        let mut update = NetUpdate::new();
        update.link = Link::DOWN.into();
        changes.net(&update);
        let mut update = NetUpdate::new();
        update.to_guest.mut_or_insert_default();
        changes.net(&update);
        let request = changes.request().unwrap();
        assert_eq!(request.net().link, Link::DOWN.into());
        assert!(request.net().to_guest.is_some() && request.net().from_guest.is_none());
    }

    #[test]
    fn one_that_is_not_who_was_wanted_is_refused() {
        for answer in [
            Ok(hello(6, "blk")),
            Ok(hello(7, "net")),
            Ok(vec![0xff]),
            Err(RpcStatus::new(Code::Internal, "no")),
        ] {
            let mut bed = bed(&Changes::default(), false);
            bed.newcomer.greet().unwrap();
            assert!(bed.answer(&answer).is_err(), "{answer:?}");
        }
    }

    #[test]
    fn silence_and_a_hang_up_are_errors() {
        let mut bed = bed(&Changes::default(), false);
        bed.newcomer.greet().unwrap();
        bed.now = bed.newcomer.next_timer().unwrap();
        let line = bed.newcomer.on_event(bed.now).unwrap_err();
        assert_eq!(line, Fault::Wrong("it did not answer within 5 s".into()));
        let mut bed = self::bed(&Changes::default(), false);
        bed.newcomer.greet().unwrap();
        let (_, other) = UnixStream::pair().unwrap();
        bed.device = ControlServer::new(other, CONTROL_MAX_FRAME);
        let line = bed.newcomer.on_event(bed.now).unwrap_err();
        assert_eq!(line, Fault::HungUp);
        // Nor can one be blamed for it to which nothing can be said any more.
        let mut bed = self::bed(&Changes::default(), false);
        let (_, other) = UnixStream::pair().unwrap();
        bed.device = ControlServer::new(other, CONTROL_MAX_FRAME);
        bed.newcomer.greet().unwrap();
        let line = bed.newcomer.on_event(bed.now).unwrap_err();
        assert_eq!(line, Fault::HungUp);
    }
}
