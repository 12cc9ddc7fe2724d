//! The machine: what it is made of, its states, and the manager thread that owns them.
//!
//! ```text
//!   api thread ──requests──▶ ┌───────────────┐ ◀──events── vCPU threads
//!                            │ manager thread│ ◀──exits─── launcher
//!   signals ───────────────▶ └───────────────┘ ◀──errors── device channels
//! ```
//!
//! `build` makes a machine from its configuration, `host` runs the loop above and
//! answers requests, `state` holds the transitions, `kinds` the table of device kinds,
//! `device` and `disk` make devices, `control` speaks to their processes.

pub mod boot_files;
pub mod build;
pub mod console;
pub mod control;
pub mod device;
pub mod device_stats;
pub mod device_table;
pub mod disk;
pub mod fs;
pub mod host;
pub mod hotplug;
pub mod kinds;
pub mod life;
pub mod mem;
pub mod net;
pub mod net_external;
mod net_helper;
pub mod net_kinds;
mod net_links;
pub mod net_mac;
mod net_origin;
mod net_remedies;
pub mod net_start;
pub mod net_switch;
mod net_told;
pub mod newcomer;
pub mod operations;
pub mod plugger;
pub mod plugging;
pub mod queue;
pub mod reset;
pub mod rng;
pub mod state;
pub mod stop;
pub mod supervise;
pub mod told;
pub mod trial;
pub mod usage;
pub mod vsock;
