//! Taps and connections by way of the launcher.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;

use bulkhead_vmm::launcher::{Launcher, LauncherError, LauncherEvent};

use super::bed::{Bed, soon};

fn refused<T: std::fmt::Debug>(result: Result<T, LauncherError>) -> String {
    match result {
        Err(LauncherError::Refused(why)) => why,
        other => panic!("{other:?}"),
    }
}

/// A tap that lasts until it is dropped, as an operator makes it.
struct Tap(String);

impl Tap {
    /// `None`, with a note, where that is not permitted.
    fn new(letter: char, several: bool) -> Option<Self> {
        let name = format!("bl{:x}{letter}", std::process::id());
        let mut command = Command::new("ip");
        command.args(["tuntap", "add", &name, "mode", "tap", "user", "0"]);
        if several {
            command.arg("multi_queue");
        }
        match command.output() {
            Ok(done) if done.status.success() => Some(Self(name)),
            other => {
                eprintln!("not tested here: ip tuntap: {other:?}");
                None
            }
        }
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "del", &self.0]).output();
    }
}

#[test]
fn given_a_tap_that_exists_then_the_launcher_attaches_to_it_and_makes_none() {
    let bed = Bed::new("taps");
    let launcher = bed.launcher();
    let absent = refused(launcher.open_tap("bh-absent", 1, false));
    assert!(
        absent.contains("ip tuntap add bh-absent mode tap"),
        "{absent}"
    );
    let surplus = refused(launcher.open_tap("bh-absent", 33, false));
    assert!(surplus.contains("at most 32"), "{surplus}");
    let wrong = refused(launcher.open_tap("lo", 1, false));
    assert!(wrong.contains("no tap"), "{wrong}");

    let (Some(one), Some(two)) = (Tap::new('a', false), Tap::new('b', true)) else {
        return;
    };
    let (tap, vhost) = launcher.open_tap(&two.0, 2, false).unwrap();
    assert_eq!((tap.queues.len(), vhost.len()), (2, 0));
    assert_eq!((tap.name.as_str(), tap.mtu), (two.0.as_str(), 1500));
    let held = launcher.open_tap(&one.0, 1, false).unwrap();
    let busy = refused(launcher.open_tap(&one.0, 1, false));
    assert!(busy.contains("busy"), "{busy}");
    let single = refused(launcher.open_tap(&one.0, 2, false));
    assert!(single.contains("multi_queue"), "{single}");
    drop(held);
    launcher.open_tap(&one.0, 1, false).unwrap();
}

fn next_link(launcher: &Launcher, wanted: u64) -> Result<(), String> {
    let mut answer = None;
    soon("an answer", || {
        for event in launcher.poll_events().unwrap() {
            match event {
                LauncherEvent::Linked { ticket, result } if ticket == wanted => {
                    answer = Some(result);
                }
                other => panic!("{other:?}"),
            }
        }
        answer.is_some()
    });
    answer.unwrap()
}

#[test]
fn given_a_connection_that_is_begun_then_the_answer_is_an_event() {
    let bed = Bed::new("links");
    let launcher = bed.launcher();
    let place = bed.path("switch");
    let ticket = launcher.begin_connect(&place, "switch").unwrap();
    let why = next_link(&launcher, ticket).unwrap_err();
    assert!(
        why.starts_with("switch /") && why.contains("no such file"),
        "{why}"
    );
    assert!(launcher.take_linked(ticket).is_none());

    let listener = UnixListener::bind(&place).unwrap();
    let ticket = launcher.begin_connect(&place, "switch").unwrap();
    // Other requests go on meanwhile, and their answers are not mixed up.
    launcher.connect_unix(&place, "switch").unwrap();
    next_link(&launcher, ticket).unwrap();
    let mut ours = UnixStream::from(launcher.take_linked(ticket).unwrap().fd);
    assert!(launcher.take_linked(ticket).is_none());
    ours.write_all(b"x").unwrap();
    let mut byte = [0];
    let mut came = [listener.accept().unwrap().0, listener.accept().unwrap().0];
    let read = came.iter_mut().any(|end| {
        end.set_nonblocking(true).unwrap();
        end.read(&mut byte).is_ok_and(|n| n == 1)
    });
    assert!(read && &byte == b"x");
}

#[test]
fn given_connections_that_nobody_takes_then_there_is_an_end_of_them() {
    let bed = Bed::new("surplus");
    let launcher = bed.launcher();
    let place = bed.path("nobody");
    let listener = UnixListener::bind(&place).unwrap();
    let mut begun = 0;
    let refusal = loop {
        match launcher.begin_connect(&place, "switch") {
            Ok(_) => begun += 1,
            Err(error) => break error.to_string(),
        }
        assert!(begun <= 64);
        let _ = listener.accept();
    };
    assert!(refusal.contains("busy"), "{refusal}");
    assert!(begun > 0);
}
