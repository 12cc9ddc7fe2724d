//! A signal that comes while the machine is being made. The manager may then wait for somebody
//! else's back-end, and does not look at its signals: a thread of this moment does, and ends the
//! process, once the launcher has ended all that was made, if nobody waits for the launcher just
//! then. Nothing is lost by that, since there is no guest yet.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use crate::launcher::{Launcher, sys};
use crate::machine::stop::StopReason;
use crate::signals::Signals;
use crate::threads::ThreadHook;

/// Runs `work`, which may wait for long, so that a signal ends the process meanwhile.
///
/// # Errors
/// One line: the thread that looks cannot be had.
pub(super) fn interruptible<T>(
    signals: &Signals,
    launcher: &Launcher,
    hook: &ThreadHook,
    work: impl FnOnce() -> T,
) -> Result<T, String> {
    let say = |error: std::io::Error| format!("a thread that waits for signals: {error}");
    let (until, done) = UnixStream::pair().map_err(say)?;
    std::thread::scope(|scope| {
        let look = move || match hook() {
            Ok(()) => look(signals, launcher, &done),
            Err(why) => log::warn!(
                "no signal is heeded before the machine is made: the filter of the thread for them: {why}"
            ),
        };
        let builder = std::thread::Builder::new().name("signals".to_owned());
        builder.spawn_scoped(scope, look).map_err(say)?;
        let result = work();
        // The other end is readable by that.
        drop(until);
        Ok(result)
    })
}

/// Looks for signals until `done` hangs up.
fn look(signals: &Signals, launcher: &Launcher, done: &UnixStream) {
    let both = [
        (signals.as_fd(), libc::POLLIN),
        (done.as_fd(), libc::POLLIN),
    ];
    loop {
        let ready = sys::poll(&both, None).unwrap_or_default();
        if ready.get(1).is_none_or(|events| *events != 0) {
            return;
        }
        if let Some(signal) = signals.next() {
            launcher.end_unless_busy();
            let code = StopReason::Signal(signal).exit_code();
            std::process::exit(code.into());
        }
    }
}
