//! For tests only: what the main thread and the driver do with a worker that runs on a thread of
//! the test's.
#![allow(clippy::unwrap_used, clippy::missing_panics_doc)]

use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::driver::DriverRing;
use crate::mailbox::{Answer, Order, RingSetup, WorkerHandle};
use crate::memory::Memory;
use crate::ring::RingFeatures;
use crate::sys;

const PATIENCE: Duration = Duration::from_secs(20);

/// Has the worker obey; its answer.
pub fn order(handle: &WorkerHandle, order: Order) -> Answer {
    handle.order(order);
    let begun = Instant::now();
    loop {
        if let Some(answer) = handle.take_answer() {
            return answer;
        }
        assert!(begun.elapsed() < PATIENCE, "no answer");
        handle.wait_answer(10);
    }
}

/// The order to serve a ring from an index on, without any of its features.
pub fn start(
    memory: &Arc<Memory>,
    ring: &DriverRing,
    base: u16,
    kick: &Arc<File>,
    err: &Arc<File>,
) -> Order {
    Order::Start(Box::new(RingSetup {
        memory: Arc::clone(memory),
        layout: ring.layout(),
        ring_features: RingFeatures {
            event_idx: false,
            indirect: false,
        },
        features: 0,
        base,
        kick: Arc::clone(kick),
        call: Some(Arc::new(sys::eventfd().unwrap())),
        err: Some(Arc::clone(err)),
        inflight: None,
    }))
}

/// The completion that comes next: the chain's head, and how many bytes were written.
pub fn completion(ring: &mut DriverRing) -> (u32, u32) {
    let begun = Instant::now();
    loop {
        if let Some(used) = ring.take_used() {
            return used;
        }
        assert!(begun.elapsed() < PATIENCE, "no completion");
        std::thread::yield_now();
    }
}
