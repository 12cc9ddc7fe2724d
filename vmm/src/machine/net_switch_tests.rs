//! A tie to somebody else's back-end, against a launcher that does as it is told and a clock
//! that is set.

use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;

use bulkhead_proto::Code;
use bulkhead_proto::common::NetLimits;

use super::super::net_told::{CAME_INTERVAL, SURPLUS_INTERVAL};
use super::*;

const GONE: &str = "its back-end closed the vhost-user channel";

#[derive(Default)]
struct Fake {
    refuse: Cell<bool>,
    asked: RefCell<Vec<String>>,
}

impl Fake {
    fn ask(&self, what: String) -> Result<u64, String> {
        self.asked.borrow_mut().push(what);
        if self.refuse.get() {
            return Err("the launcher is busy".to_owned());
        }
        Ok(u64::try_from(self.asked.borrow().len()).unwrap())
    }

    fn count(&self) -> usize {
        self.asked.borrow().len()
    }
}

impl Links for Fake {
    fn connect(&self, path: &Path) -> Result<u64, String> {
        self.ask(format!("connect {}", path.display()))
    }

    fn helper(
        &self,
        kind: &str,
        id: &str,
        incarnation: u64,
        options: &[String],
    ) -> Result<(u64, Option<UnixStream>), String> {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        self.ask(format!("{kind} {id} {incarnation} {}", options.join(" ")))
            .map(|ticket| (ticket, (kind == "passt").then_some(ours)))
    }

    fn end_helper(&self, id: &str, incarnation: u64) {
        self.asked
            .borrow_mut()
            .push(format!("end {id} {incarnation}"));
    }
}

fn came(pid: Option<i32>) -> Came {
    let (fd, _) = UnixStream::pair().unwrap();
    Came {
        fd: OwnedFd::from(fd),
        pid,
        channel: None,
    }
}

fn taken(_: UnixStream) -> Result<(), ReconnectError> {
    Ok(())
}

fn switch(origin: Origin, now: Instant) -> Switch {
    let facts = NetFacts {
        mac: [2, 0, 0, 0, 0, 1],
        mtu: 0,
    };
    Switch::new("net0", "net", origin, Some(facts), true, now)
}

fn state(switch: &Switch) -> String {
    let mut info = DeviceInfo::new();
    info.state = "ready".into();
    switch.describe(&mut info);
    info.state
}

/// Lets time pass to the next timer and do what is due; the pause that it was.
fn pass(switch: &mut Switch, fake: &Fake, now: &mut Instant) -> (Duration, Option<String>) {
    let at = switch.next_timer().unwrap();
    let pause = at.saturating_duration_since(*now);
    *now = at;
    (pause, switch.on_timer(fake, &taken, at))
}

#[test]
fn a_lost_back_end_is_looked_for_with_pauses_that_double() {
    let fake = Fake::default();
    let mut now = Instant::now();
    let mut tie = switch(Origin::Connect("/s".into()), now);
    assert_eq!((state(&tie).as_str(), tie.next_timer()), ("ready", None));
    assert!(tie.lost(&fake, (GONE, true), now));
    assert_eq!(state(&tie), "disconnected");
    let mut pauses = Vec::new();
    let mut told = 0;
    for attempt in 1..=8 {
        pauses.push(pass(&mut tie, &fake, &mut now).0.as_millis());
        assert!(tie.awaits(attempt) && !tie.awaits(attempt + 1));
        let news = tie.on_linked(Err("nobody listens".into()), &taken, now);
        told += usize::from(news.is_some());
    }
    assert_eq!(pauses, [100, 200, 400, 800, 1600, 3200, 5000, 5000]);
    assert_eq!(told, 1, "the same reason is told once");

    pass(&mut tie, &fake, &mut now);
    assert_eq!(tie.on_linked(Ok(came(None)), &taken, now), None);
    assert_eq!(tie.next_timer(), None);
    assert!(tie.reconnected(now));
    assert_eq!(state(&tie), "ready");
    assert!(fake.asked.borrow().iter().all(|a| a == "connect /s"));

    // One that goes at once is not met at once, nor told of again and again; one that served
    // for a while is.
    assert!(
        tie.lost(&fake, (GONE, true), now),
        "it was told that it came"
    );
    assert_eq!(tie.next_timer().unwrap() - now, PAUSE.1);
    assert!(!tie.reconnected(now));
    assert!(!tie.lost(&fake, (GONE, true), now));
    assert!(!tie.reconnected(now));
    now += STEADY;
    assert!(tie.lost(&fake, (GONE, true), now));
    assert_eq!(tie.next_timer().unwrap() - now, PAUSE.0);
}

#[test]
fn a_launcher_that_refuses_or_is_silent_holds_nothing_up() {
    let fake = Fake::default();
    let mut now = Instant::now();
    let mut tie = switch(Origin::Connect("/s".into()), now);
    tie.lost(&fake, (GONE, true), now);
    fake.refuse.set(true);
    let (_, news) = pass(&mut tie, &fake, &mut now);
    assert_eq!(news.as_deref(), Some("the launcher is busy"));
    fake.refuse.set(false);
    pass(&mut tie, &fake, &mut now);
    let ticket = u64::try_from(fake.count()).unwrap();
    let (waited, news) = pass(&mut tie, &fake, &mut now);
    assert_eq!(waited, LINK_LIMIT);
    assert!(news.unwrap().contains("does not answer"));
    // What comes too late is for nobody.
    assert!(!tie.awaits(ticket));
    assert_eq!(tie.on_linked(Ok(came(None)), &taken, now), None);
    assert_eq!(state(&tie), "disconnected");
}

#[test]
fn passt_is_started_again_as_another_incarnation_and_the_old_one_ended() {
    let fake = Fake::default();
    let mut now = Instant::now();
    let later = now + Duration::from_micros(1500);
    let process = HelperProcess::serving(77, came(None).fd, now, later);
    let mut tie =
        switch(Origin::Helper("passt", vec!["mtu=1400".into()]), now).with_process(1, process);
    let mut info = DeviceInfo::new();
    tie.describe(&mut info);
    assert_eq!((info.pid, info.helper.as_str()), (77, "passt"));
    assert_eq!(info.spawn_us, 1500);
    assert_eq!(
        tie.serving().map(|(process, n)| (process.pid, n)),
        Some((77, 1))
    );
    tie.lost(&fake, (GONE, true), now);
    pass(&mut tie, &fake, &mut now);
    assert_eq!(
        *fake.asked.borrow(),
        ["end net0 1", "passt net0 2 mtu=1400"]
    );
    assert_eq!(tie.on_linked(Ok(came(Some(78))), &taken, now), None);
    let mut info = DeviceInfo::new();
    tie.describe(&mut info);
    assert_eq!((info.pid, info.incarnation), (78, 2));
    let exited = tie.exited(1, "signal 11", now);
    assert_eq!(
        exited,
        Some(("device.exited", "passt: signal 11".into(), true))
    );
    // What it was given up for is told, and not that it was killed.
    let wrong = |tie: &mut Switch| tie.not_reconnected(&fake, ("it is wrong", false), now);
    assert_eq!(wrong(&mut tie).unwrap(), "passt: it is wrong");
    assert_eq!(tie.exited(2, "signal 9", now), None);
    assert_eq!(fake.asked.borrow().last().unwrap(), "end net0 2");
    assert_eq!(wrong(&mut tie), None);
    // Nobody starts it but the launcher: no remedy of a switch's.
    let why = "device net0: taking over: the back-end broke the vhost-user protocol: flood";
    let line = tie.not_reconnected(&fake, (why, false), now);
    let said = "passt: the back-end broke the vhost-user protocol: flood";
    assert_eq!(line.as_deref(), Some(said));
}

#[test]
fn the_end_of_a_passt_that_served_for_long_is_told_whichever_is_seen_first() {
    let fake = Fake::default();
    let mut now = Instant::now();
    let mut tie = switch(Origin::Helper("passt", Vec::new()), now);
    let mut told = Vec::new();
    for round in 0..4 {
        tie.lost(&fake, (GONE, true), now);
        pass(&mut tie, &fake, &mut now);
        assert_eq!(tie.on_linked(Ok(came(Some(78))), &taken, now), None);
        tie.reconnected(now);
        if round == 3 {
            now += STEADY;
        }
        let incarnation = tie.incarnation;
        told.extend(tie.exited(incarnation, "signal 11", now).map(|end| end.2));
    }
    // The first, and the one of a passt that had served for long.
    assert_eq!(told, [true, false, false, true]);
    // The loss is of the same passt: it does not make it news again.
    now += STEADY;
    tie.lost(&fake, (GONE, true), now);
    assert_eq!(pass(&mut tie, &fake, &mut now).0, PAUSE.0);
    assert_eq!(tie.on_linked(Ok(came(Some(78))), &taken, now), None);
    let incarnation = tie.incarnation;
    assert_eq!(tie.exited(incarnation, "signal 11", now), None);
}

#[test]
fn that_a_back_end_came_is_not_the_last_that_is_told_of_one_that_is_gone() {
    let fake = Fake::default();
    let mut now = Instant::now();
    let mut tie = switch(Origin::Connect("/s".into()), now);
    let mut round = |tie: &mut Switch| {
        let lost = tie.lost(&fake, (GONE, true), now);
        let why = ("it is wrong", true);
        let refused = tie.not_reconnected(&fake, why, now).is_some();
        now += Duration::from_secs(1);
        (lost, refused, tie.reconnected(now))
    };
    assert_eq!(round(&mut tie), (true, true, true));
    assert_eq!(round(&mut tie), (true, true, false));
    assert_eq!(round(&mut tie), (false, false, false));
    // Another cause is another line.
    let why = "its back-end broke the vhost-user protocol: flood";
    assert!(tie.lost(&fake, (why, false), now));
    now += CAME_INTERVAL;
    assert!(tie.reconnected(now) && tie.lost(&fake, (GONE, true), now));
}

#[test]
fn a_passt_that_always_fails_is_told_of_once_by_how_it_ends() {
    let fake = Fake::default();
    let mut now = Instant::now();
    let mut tie = switch(Origin::Helper("passt", Vec::new()), now);
    tie.lost(&fake, (GONE, true), now);
    let mut told = Vec::new();
    for round in 0..4 {
        pass(&mut tie, &fake, &mut now);
        assert_eq!(tie.on_linked(Ok(came(Some(78))), &taken, now), None);
        let why = "device net0: taking over: the back-end closed its vhost-user channel";
        let incarnation = tie.incarnation;
        let how = match round {
            0..3 => "signal 11",
            _ => "status 1: port",
        };
        // Either may be seen first.
        if round % 2 == 0 {
            assert_eq!(tie.not_reconnected(&fake, (why, true), now), None);
        }
        told.extend(tie.exited(incarnation, how, now).map(|(kind, line, _)| {
            assert_eq!(kind, "device.not-reconnected");
            line
        }));
        if round % 2 == 1 {
            assert_eq!(tie.not_reconnected(&fake, (why, true), now), None);
        }
    }
    assert_eq!(told, ["passt: signal 11", "passt: status 1: port"]);
}

#[test]
fn a_back_end_that_does_not_take_over_is_named_by_its_socket_with_a_remedy() {
    let now = Instant::now();
    let mut tie = switch(Origin::Connect("/run/s".into()), now);
    let why = "device net0: taking over: the back-end closed its vhost-user channel";
    let told = tie
        .not_reconnected(&Fake::default(), (why, true), now)
        .unwrap();
    assert!(
        told.starts_with("vhost-user /run/s: the back-end closed"),
        "{told}"
    );
    assert!(
        told.ends_with("no other front-end") && !told.contains("net0"),
        "{told}"
    );
}

#[test]
fn a_back_end_that_never_can_be_is_never_looked_for() {
    let fake = Fake::default();
    let now = Instant::now();
    let mut tie = switch(Origin::Nothing("tap x: absent".into()), now);
    tie.lost(&fake, (GONE, true), now);
    assert_eq!((state(&tie).as_str(), tie.next_timer()), ("absent", None));
    let (kind, detail) = tie.announcement();
    assert_eq!(
        (kind, detail.as_str()),
        ("device.absent", "net: tap x: absent")
    );
    assert_eq!(fake.count(), 0);
}

#[test]
fn where_the_vmm_listens_one_back_end_is_let_in_at_a_time() {
    let place = std::env::temp_dir().join(format!("bh-switch-{}", std::process::id()));
    let _ = std::fs::remove_file(&place);
    let listener = UnixListener::bind(&place).unwrap();
    listener.set_nonblocking(true).unwrap();
    let now = Instant::now();
    let mut tie = switch(Origin::Listen(place.clone(), listener), now);
    assert!(tie.listener().is_some());
    let let_in = Cell::new(0);
    let count = |_| {
        let_in.set(let_in.get() + 1);
        Ok(())
    };
    let _surplus = UnixStream::connect(&place).unwrap();
    tie.on_listener(&count, now);
    assert_eq!(let_in.get(), 0, "it has a back-end");
    tie.lost(&Fake::default(), (GONE, true), now);
    assert_eq!(tie.next_timer(), None, "it waits for whoever comes");
    let _first = UnixStream::connect(&place).unwrap();
    let _second = UnixStream::connect(&place).unwrap();
    tie.on_listener(&count, now);
    tie.on_listener(&count, now);
    tie.on_listener(&count, now);
    assert_eq!(let_in.get(), 1);
    std::fs::remove_file(&place).unwrap();
}

#[test]
fn who_comes_and_goes_where_the_vmm_listens_is_let_in_ever_more_rarely() {
    let place = std::env::temp_dir().join(format!("bh-flap-{}", std::process::id()));
    let _ = std::fs::remove_file(&place);
    let listener = UnixListener::bind(&place).unwrap();
    listener.set_nonblocking(true).unwrap();
    let (fake, mut now) = (Fake::default(), Instant::now());
    let mut tie = switch(Origin::Listen(place.clone(), listener), now);
    let let_in = Cell::new(0);
    let count = |_| {
        let_in.set(let_in.get() + 1);
        Ok(())
    };
    tie.lost(&fake, (GONE, true), now);
    let mut pauses = Vec::new();
    for round in 1..=8 {
        let _early = UnixStream::connect(&place).unwrap();
        tie.on_listener(&count, now);
        if round > 1 {
            let _surplus = UnixStream::connect(&place).unwrap();
            tie.on_listener(&count, now);
            assert_eq!(let_in.get(), round - 1, "nobody is let in during the pause");
            let at = tie.next_timer().unwrap();
            pauses.push(at.saturating_duration_since(now).as_millis());
            now = at;
            tie.on_timer(&fake, &count, now);
        }
        assert_eq!(let_in.get(), round);
        tie.reconnected(now);
        tie.lost(&fake, (GONE, true), now);
    }
    assert_eq!(pauses, [200, 400, 800, 1600, 3200, 5000, 5000]);
    // Nobody comes in the last pause: then the next is let in at once.
    now = tie.next_timer().unwrap();
    tie.on_timer(&fake, &count, now);
    assert_eq!(tie.next_timer(), None);
    let _late = UnixStream::connect(&place).unwrap();
    tie.on_listener(&count, now);
    assert_eq!(let_in.get(), 9);
    // One that has served for a while may be followed at once.
    tie.reconnected(now);
    tie.lost(&fake, (GONE, true), now + STEADY);
    assert_eq!(tie.next_timer(), None);
    assert_eq!(fake.count(), 0, "the launcher has no part in it");
    std::fs::remove_file(&place).unwrap();
}

#[test]
fn surplus_connections_are_told_of_once_a_minute() {
    let now = Instant::now();
    let mut tie = switch(Origin::Connect("/s".into()), now);
    let told = (0..500).filter_map(|_| tie.told.surplus(now)).count();
    assert_eq!(told, 1);
    let later = tie.told.surplus(now + SURPLUS_INTERVAL).unwrap();
    assert!(later.ends_with("(499 more were not told of)"), "{later}");
}

#[test]
fn what_somebody_else_keeps_is_not_changed_here() {
    let refused = |update: NetUpdate, origin: Origin| {
        let tie = switch(origin, Instant::now());
        tie.check_update(&update).unwrap_err()
    };
    let mut limits = NetUpdate::new();
    limits.to_guest = Some(NetLimits::new()).into();
    let status = refused(limits, Origin::Connect("/s".into()));
    assert_eq!(status.code, Code::FailedPrecondition);
    assert!(
        status.message.contains("set limits there"),
        "{}",
        status.message
    );
    let mut up = NetUpdate::new();
    up.link = net_update::Link::UP.into();
    let status = refused(up, Origin::Nothing("gone".into()));
    assert!(status.message.contains("no back-end"), "{}", status.message);
    let mut limits = NetUpdate::new();
    limits.to_guest = Some(NetLimits::new()).into();
    let message = refused(limits, Origin::Nothing("tap x: gone".into())).message;
    assert!(
        message.contains("tap x: gone") && message.contains("add-net"),
        "{message}"
    );
}

#[test]
fn what_a_peer_sends_makes_no_reason_a_new_one() {
    let mut told = Told::default();
    assert!(told.news("socket /s: a header with flags 0x92df5b62"));
    for flags in 0..1000_u32 {
        assert!(!told.news(&format!("socket /s: a header with flags {flags:#x}")));
    }
    assert!(told.news("socket /s: 4294967295 bytes"));
    assert!(!told.news("socket /s: 4294967294 bytes"));
    assert!(told.news("passt: exit status 1") && told.news("passt: exit status 2"));
    let more = (0..1000).filter(|n| told.news(&format!("{n} of them")));
    assert!(more.count() < 8);
    told.clear();
    assert!(told.news("passt: exit status 1"));
}
