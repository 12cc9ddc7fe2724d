//! Every order in which a process can be lost, end, and be replaced.

use proptest::prelude::*;

use super::*;

fn life() -> (Life, Instant) {
    (Life::new(Budget::default()), Instant::now())
}

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn kinds(actions: &[Action]) -> Vec<&str> {
    actions
        .iter()
        .map(|action| match action {
            Action::Suspend(_) => "suspend",
            Action::HangUp(_) => "hang up",
            Action::Fail(_) => "fail",
            Action::Kill => "kill",
            Action::Quiesced => "quiesced",
            Action::Start => "start",
            Action::Tell(kind, _) => kind,
        })
        .collect()
}

const KILLED: CrashReason = CrashReason::Signal(9);

#[test]
fn a_process_that_dies_is_replaced_once_nothing_of_it_is_left() {
    let (mut life, now) = life();
    assert_eq!(kinds(&life.lost(None, now)), ["suspend"]);
    assert_eq!(life.state(), Some("restarting"));
    assert_eq!(kinds(&life.exited(KILLED, now)), ["device.crashed"]);
    assert_eq!(
        kinds(&life.fence_fell(now + ms(3))),
        ["quiesced", "start"],
        "the first time without a pause"
    );
    assert!(life.starting());
    assert!(life.answered(now + ms(8)));
    let done = life.took_over("1 queue", now + ms(9));
    assert_eq!(
        done,
        [Action::Tell(
            "device.restarted",
            "after 9000 us, 1 queue".into()
        )]
    );
    assert!(life.serving() && life.state().is_none());
    assert_eq!((life.next_timer(), life.restarts()), (None, 1));
}

#[test]
fn a_device_that_restarts_has_no_process_until_the_next_one_has_answered() {
    let (mut life, now) = life();
    assert!(life.is_manned());
    life.lost(None, now);
    assert!(!life.is_manned(), "it is ending");
    life.exited(KILLED, now);
    assert!(!life.is_manned(), "it has ended");
    life.fence_fell(now);
    assert_eq!((life.starting(), life.is_manned()), (true, false));
    assert!(life.answered(now));
    assert!(life.is_manned(), "the next one gets the rings");
    life.took_over("", now);
    assert!(life.serving() && life.is_manned());
    // The same where the next one does not come up.
    life.exited(KILLED, now);
    life.fence_fell(now);
    life.on_timer(now + ms(60));
    assert!(life.starting());
    life.lost(Some(CrashReason::Start("late".into())), now + ms(70));
    assert!(!life.is_manned());
    // One that is given up for good is named until it has ended.
    let (mut life, now) = (
        Life::new(Budget {
            restarts: 0,
            ..Budget::default()
        }),
        now,
    );
    life.lost(None, now);
    assert_eq!(
        (life.state(), life.is_manned()),
        (Some("quarantined"), true)
    );
    life.exited(KILLED, now);
    assert!(!life.is_manned());
}

#[test]
fn the_end_may_be_told_before_the_hang_up_and_the_fence_before_both() {
    let (mut life, now) = life();
    assert!(life.fence_fell(now).is_empty());
    assert!(life.serving(), "a process may close its fence");
    let actions = life.exited(KILLED, now);
    assert_eq!(
        kinds(&actions),
        ["suspend", "device.crashed", "quiesced", "start"]
    );
    // The hang-up is old news. It belongs to the one before.
    assert!(life.starting());
}

#[test]
fn one_that_hangs_up_and_lives_on_is_killed() {
    let (mut life, now) = life();
    life.lost(None, now);
    let at = life.next_timer().unwrap();
    assert_eq!(at, now + LAST_WORDS);
    let actions = life.on_timer(at);
    assert_eq!(kinds(&actions), ["device.crashed", "kill"]);
    assert!(matches!(&actions[0], Action::Tell(_, why) if why.contains("and lives on")));
    assert!(life.next_timer().unwrap() > at, "it would spin");
    assert!(life.exited(KILLED, at).is_empty());
    assert_eq!(kinds(&life.fence_fell(at)), ["quiesced", "start"]);
}

#[test]
fn one_that_breaks_a_rule_is_killed_at_once_and_that_is_the_reason() {
    let (mut life, now) = life();
    let reason = CrashReason::Protocol("a frame too long".into());
    let actions = life.lost(Some(reason), now);
    assert_eq!(kinds(&actions), ["suspend", "device.crashed", "kill"]);
    assert!(actions.contains(&Action::Tell(
        "device.crashed",
        "protocol: a frame too long".into()
    )));
    // Its death by our hand is no news.
    assert!(life.exited(KILLED, now).is_empty());
}

#[test]
fn without_the_fence_nothing_is_started_and_the_device_is_quarantined() {
    let (mut life, now) = life();
    life.exited(KILLED, now);
    let at = life.next_timer().unwrap();
    assert_eq!(at, now + END_LIMIT);
    let actions = life.on_timer(at);
    assert_eq!(kinds(&actions), ["fail", "device.quarantined"]);
    assert!(matches!(&actions[0], Action::Fail(why) if why.contains("I/O does not end")));
    // A client asks for it, but only the fence lets it come back.
    let (taken, actions) = life.revive(at);
    assert!(taken && actions.is_empty());
    assert_eq!(kinds(&life.fence_fell(at + ms(1))), ["quiesced", "start"]);
}

#[test]
fn too_many_crashes_quarantine_it_and_a_pardon_starts_afresh() {
    let (mut life, start) = life();
    let mut now = start;
    for round in 0..5 {
        life.exited(KILLED, now);
        let mut actions = life.fence_fell(now);
        if !kinds(&actions).contains(&"start") {
            now = life.next_timer().unwrap();
            actions = life.on_timer(now);
        }
        assert!(kinds(&actions).contains(&"start"), "{round}: {actions:?}");
        life.answered(now);
        life.took_over("", now);
    }
    let actions = life.lost(None, now);
    assert_eq!(kinds(&actions), ["suspend", "fail"], "nothing is known yet");
    assert_eq!(life.state(), Some("quarantined"));
    assert_eq!(life.next_timer(), Some(now + LAST_WORDS));
    assert_eq!(kinds(&life.ends(KILLED, now)), ["device.crashed"]);
    // Here its end is told.
    assert_eq!(kinds(&life.is_reaped(now)), ["device.quarantined"]);
    assert_eq!(life.next_timer(), None);
    assert_eq!(kinds(&life.fence_fell(now)), ["quiesced"]);
    let (taken, actions) = life.revive(now);
    assert!(taken);
    assert_eq!(kinds(&actions), ["quiesced", "start"]);
    assert!(!life.revive(now).0, "it is being started");
}

#[test]
fn a_successor_that_ends_by_itself_is_told_by_its_status() {
    let (mut life, now) = life();
    life.exited(KILLED, now);
    life.fence_fell(now);
    assert!(life.starting());
    assert!(life.lost(None, now).is_empty(), "its end will tell");
    let actions = life.ends(CrashReason::Exit(7), now);
    let told = Action::Tell("device.crashed", "exit: status 7".into());
    assert_eq!(actions, [told]);
}

#[test]
fn a_quarantine_is_told_though_the_process_does_not_end() {
    let now = Instant::now();
    let mut life = Life::new(Budget {
        restarts: 0,
        ..Budget::default()
    });
    assert_eq!(kinds(&life.lost(None, now)), ["suspend", "fail"]);
    let at = life.next_timer().unwrap();
    assert_eq!(kinds(&life.on_timer(at)), ["device.crashed", "kill"]);
    let at = life.next_timer().unwrap();
    assert_eq!(at, now + END_LIMIT);
    assert_eq!(kinds(&life.on_timer(at)), ["device.quarantined"]);
    assert_eq!(life.next_timer(), None);
    assert!(life.exited(KILLED, at).is_empty());
    // A client that asks for it meanwhile has it told first, and waits for the end.
    let mut life = Life::new(Budget {
        restarts: 0,
        ..Budget::default()
    });
    life.lost(None, now);
    let (taken, actions) = life.revive(now);
    assert!(taken && kinds(&actions) == ["device.quarantined"]);
    assert_eq!(life.next_timer(), Some(now + LAST_WORDS), "it is killed");
}

#[test]
fn one_that_does_not_come_up_counts_as_a_crash() {
    let (mut life, now) = life();
    life.exited(KILLED, now);
    life.fence_fell(now);
    let actions = life.not_started("no room".into(), now);
    assert_eq!(kinds(&actions), ["device.crashed", "quiesced"]);
    assert!(actions.contains(&Action::Tell("device.crashed", "start: no room".into())));
    let at = life.next_timer().unwrap();
    assert!(at > now, "the second time after a pause");
    assert_eq!(kinds(&life.on_timer(at)), ["quiesced", "start"]);
    // It is started and never answers.
    let late = life.next_timer().unwrap();
    assert_eq!(kinds(&life.on_timer(late)), ["device.crashed", "kill"]);
    assert!(!life.answered(late), "an answer that comes too late");
    assert!(life.took_over("", late).is_empty());
}

#[test]
fn one_that_dies_while_it_takes_over_is_replaced_and_the_outage_goes_on() {
    let (mut life, now) = life();
    life.exited(KILLED, now);
    life.fence_fell(now);
    life.answered(now + ms(5));
    // Its channel, hung up, would wake the manager on behalf of its successor.
    assert_eq!(kinds(&life.lost(None, now + ms(6))), ["hang up"]);
    life.exited(CrashReason::Exit(1), now + ms(7));
    life.fence_fell(now + ms(7));
    let at = life.next_timer().unwrap();
    assert!(kinds(&life.on_timer(at)).contains(&"start"));
    life.answered(at);
    let done = life.took_over("x", at);
    let whole = (at - now).as_micros();
    assert_eq!(
        done,
        [Action::Tell(
            "device.restarted",
            format!("after {whole} us, x")
        )]
    );
}

#[test]
fn one_that_is_revived_before_it_has_ended_is_told_to_have_crashed_all_the_same() {
    let budget = Budget {
        restarts: 0,
        ..Budget::default()
    };
    let (mut life, now) = (Life::new(budget), Instant::now());
    assert_eq!(kinds(&life.lost(None, now)), ["suspend", "fail"]);
    assert_eq!(kinds(&life.revive(now).1), ["device.quarantined"]);
    assert_eq!(kinds(&life.ends(KILLED, now)), ["device.crashed"]);
    life.is_reaped(now);
    assert_eq!(kinds(&life.fence_fell(now)), ["quiesced", "start"]);
    // Once is enough.
    let mut life = Life::new(budget);
    life.exited(KILLED, now);
    life.revive(now);
    assert_eq!(kinds(&life.fence_fell(now)), ["quiesced", "start"]);
}

/// What can be seen of a process, from without.
#[derive(Clone, Copy, Debug)]
enum Sees {
    HungUp,
    Breach,
    Exited,
    Fence,
    Answered,
    TookOver,
    NotStarted,
    Revive,
    Timer,
    Later(u64),
}

fn sees() -> impl Strategy<Value = Sees> {
    prop_oneof![
        Just(Sees::HungUp),
        Just(Sees::Breach),
        Just(Sees::Exited),
        Just(Sees::Fence),
        Just(Sees::Answered),
        Just(Sees::TookOver),
        Just(Sees::NotStarted),
        Just(Sees::Revive),
        Just(Sees::Timer),
        (1u64..40_000).prop_map(Sees::Later),
    ]
}

proptest! {
    #[test]
    fn two_processes_never_live_at_once_and_nothing_waits_for_ever(
        seen in prop::collection::vec(sees(), 1..120),
    ) {
        let (mut life, mut now) = life();
        // Whether the process, and its I/O, can still be there.
        let (mut alive, mut io) = (true, true);
        // Whether the control channel of one that served, or was to, is listened to.
        let mut heard = true;
        // Of the last process: its crash was told, and its end.
        let (mut crashed, mut ended) = (false, false);
        for sees in seen {
            let actions = match sees {
                Sees::HungUp => life.lost(None, now),
                Sees::Breach => life.lost(Some(CrashReason::Deadline("x".into())), now),
                Sees::Exited if alive => {
                    alive = false;
                    let mut actions = life.ends(KILLED, now);
                    crashed |= kinds(&actions).contains(&"device.crashed");
                    prop_assert!(crashed, "an end before its reason");
                    prop_assert!(!kinds(&actions).contains(&"device.quarantined"));
                    ended = true;
                    actions.extend(life.is_reaped(now));
                    actions
                }
                Sees::Fence if io => {
                    io = false;
                    life.fence_fell(now)
                }
                Sees::Exited | Sees::Fence => continue,
                Sees::Answered => {
                    heard |= life.answered(now);
                    Vec::new()
                }
                Sees::TookOver => life.took_over("", now),
                // Only said of one that does not exist.
                Sees::NotStarted if life.starting() => {
                    (alive, io, ended) = (false, false, true);
                    life.not_started("x".into(), now)
                }
                Sees::NotStarted => continue,
                Sees::Revive => life.revive(now).1,
                Sees::Timer => match life.next_timer() {
                    Some(at) => {
                        now = now.max(at);
                        life.on_timer(now)
                    }
                    None => continue,
                },
                Sees::Later(ms) => {
                    now += Duration::from_millis(ms);
                    life.on_timer(now)
                }
            };
            for action in &actions {
                if let Action::Suspend(_) | Action::HangUp(_) | Action::Fail(_) = action {
                    heard = false;
                }
                match action {
                    Action::Tell("device.crashed", _) => crashed = true,
                    Action::Tell("device.quarantined", _) => {
                        prop_assert!(crashed || !matches!(sees, Sees::Exited | Sees::Breach));
                        prop_assert!(ended || !matches!(sees, Sees::Exited | Sees::Breach | Sees::HungUp));
                    }
                    _ => {}
                }
                if *action == Action::Start {
                    (crashed, ended) = (false, false);
                    prop_assert!(!heard, "it wakes us for ever");
                    prop_assert!(!alive && !io, "a second process");
                    (alive, io) = (true, true);
                }
            }
            // Whatever was due has been done.
            prop_assert!(life.next_timer().is_none_or(|at| at > now || !matches!(sees, Sees::Timer | Sees::Later(_))));
            // Not serving: there is a timer, or it is quarantined.
            if !life.serving() && life.state() != Some("quarantined") {
                prop_assert!(life.next_timer().is_some());
            }
        }
    }
}
