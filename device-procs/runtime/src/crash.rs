//! For tests: a process that is killed at a store of its choice. Every store to memory
//! shared with the driver or with a later process is followed by [`point`], which panics
//! when its turn has come; what the test then finds is what such a process leaves behind.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, panic_any};

thread_local! {
    static LEFT: Cell<Option<u32>> = const { Cell::new(None) };
}

/// What the panic carries.
struct Killed;

/// A store has been made.
pub(crate) fn point() {
    LEFT.with(|left| match left.get() {
        Some(0) => {
            left.set(None);
            panic_any(Killed);
        }
        Some(n) => left.set(Some(n.saturating_sub(1))),
        None => {}
    });
}

/// Runs `device` until it has made `stores` stores; None if it was killed there.
pub(crate) fn killed_after<T>(stores: u32, device: impl FnOnce() -> T) -> Option<T> {
    if stores == 0 {
        return None;
    }
    LEFT.with(|left| left.set(Some(stores.saturating_sub(1))));
    let outcome = catch_unwind(AssertUnwindSafe(device));
    LEFT.with(|left| left.set(None));
    match outcome {
        Ok(value) => Some(value),
        Err(why) if why.is::<Killed>() => None,
        Err(why) => std::panic::resume_unwind(why),
    }
}
