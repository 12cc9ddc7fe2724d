//! For tests: a process that is killed at a store of its choice. Every store to memory
//! shared with the driver or with a later process is followed by [`point`], which unwinds
//! when its turn has come; what the test then finds is what such a process leaves behind.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

thread_local! {
    static LEFT: Cell<Option<u32>> = const { Cell::new(None) };
}

/// What unwinding carries.
struct Killed;

/// A store has been made.
pub(crate) fn point() {
    LEFT.with(|left| match left.get() {
        Some(0 | 1) => {
            left.set(None);
            // Without the noise of a panic.
            resume_unwind(Box::new(Killed));
        }
        Some(n) => left.set(Some(n.saturating_sub(1))),
        None => {}
    });
}

/// This thread's process will be killed right after its `stores`th store from now on (0
/// counts as 1).
pub(crate) fn arm(stores: u32) {
    LEFT.with(|left| left.set(Some(stores)));
}

/// This thread's process will not be killed.
pub(crate) fn disarm() {
    LEFT.with(|left| left.set(None));
}

/// A part of the process's life; None if it is killed in it.
pub(crate) fn live<T>(part: impl FnOnce() -> T) -> Option<T> {
    match catch_unwind(AssertUnwindSafe(part)) {
        Ok(value) => Some(value),
        Err(why) if why.is::<Killed>() => None,
        Err(why) => resume_unwind(why),
    }
}
