//! virtio-net (virtio 1.2, 5.1) as a process of its own, over vhost-user.
//!
//! `main` attaches or inherits the tap ([`tap`]) and hands a [`device::Net`] to the runtime.
//! One worker thread serves each queue pair ([`pair`]): frames go from the guest to the tap
//! ([`transmit`]) and back ([`receive`]) through its engine ([`engine_uring`] over [`frame_ring`],
//! [`engine_plain`]). The control
//! Or the kernel
//! moves the frames itself, by vhost-net ([`kernel`]). The control queue ([`control`]) has a thread of its own; what it is told lies in [`state`], and
//! a copy where a successor finds it ([`kept`]).

pub mod cli;
pub mod control;
pub mod device;
pub mod engine_plain;
pub mod engine_uring;
pub mod features;
pub mod filter;
pub mod frame_ring;
#[cfg(test)]
mod fuzz_tests;
pub mod kept;
pub mod kernel;
pub mod pair;
pub mod receive;
pub mod state;
pub mod tap;
mod tap_ioctl;
pub mod transmit;
mod vhost_ioctl;
