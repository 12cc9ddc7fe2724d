//! The end-to-end tests: real guests under KVM. Runs inside the nested host (or on a
//! machine whose own KVM runs Linux guests); `tests/e2e` starts it.
//!
//! usage: e2e [--long] [--native] [--without SUBJECT | --only SUBJECT]… [--subjects | SUBJECT]

use std::collections::BTreeSet;
use std::process::ExitCode;

use bulkhead_tests::runner::{self, Test};

mod again;
mod api;
mod api_access;
mod api_fuzz;
mod api_obeyed;
mod assault;
mod attach;
mod audit;
mod audit_native;
mod audit_outside;
mod bad_input;
mod block;
mod boot;
mod config;
mod console;
mod death;
mod delete;
mod disk;
mod disk_devices;
mod disk_faults;
mod disk_formats;
mod events;
mod faults;
mod fs;
mod hostile_device;
mod hostile_disk;
mod hostile_guest;
mod hotplug;
mod hotplug_beside;
mod hotplug_kinds;
mod hotplug_late;
mod hotplug_limits;
mod hotplug_memory;
mod hotplug_order;
mod hotplug_paused;
mod kata;
mod kata_native;
mod kata_vhost_user;
mod mapped;
mod net;
mod net_bad;
mod net_faults;
mod net_handed;
mod net_modes;
mod net_native;
mod net_ovs;
mod net_told;
mod operations;
mod recovery;
mod recovery_net;
mod reset;
mod reset_stuck;
mod resources;
mod resources_enforced;
mod rng;
mod shell;
mod update;
mod update_kinds;
mod vhost_user;
mod vsock;
mod vsock_guest;

fn main() -> ExitCode {
    let (mut long, mut native, mut filter) = (false, false, None);
    let (mut without, mut only, mut list) = (Vec::new(), Vec::new(), false);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--without" => without.extend(arguments.next()),
            // What stands for itself is also looked for in the names of tests of other subjects.
            "--only" => only.extend(arguments.next()),
            // Names them and runs none.
            "--subjects" => list = true,
            "--long" => long = true,
            // Only the tests that need no guest.
            "--native" => native = true,
            _ => filter = Some(argument),
        }
    }
    let mut tests: Vec<Test> = Vec::new();
    if native {
        tests.extend(bad_input::native());
        tests.extend(audit_native::native());
        tests.extend(audit_outside::native());
        tests.extend(audit_outside::hostile());
        tests.extend(config::native());
        tests.extend(api_access::native());
        tests.extend(api_fuzz::native());
        tests.extend(api_obeyed::native());
        tests.extend(death::native());
        tests.extend(events::native());
        tests.extend(faults::native());
        tests.extend(update::native());
        tests.extend(hotplug::native());
        tests.extend(hotplug_limits::native());
        tests.extend(hotplug_kinds::native());
        tests.extend(hotplug_memory::native());
        tests.extend(kata_native::native());
        tests.extend(kata_vhost_user::native());
        tests.extend(resources::native());
        tests.extend(rng::native());
        tests.extend(console::native());
        tests.extend(attach::native());
        tests.extend(operations::native());
        tests.extend(delete::native());
        tests.extend(again::native());
        tests.extend(net_native::native());
        tests.extend(net_faults::native());
        tests.extend(vsock::native());
        tests.extend(fs::native());
        tests.extend(hostile_device::tests());
    } else {
        tests.extend(boot::tests());
        tests.extend(config::tests());
        tests.extend(block::tests());
        tests.extend(disk::tests());
        tests.extend(disk_formats::tests());
        tests.extend(disk_faults::tests());
        tests.extend(disk_devices::tests());
        tests.extend(net::tests());
        tests.extend(net_modes::tests());
        tests.extend(net_ovs::tests());
        tests.extend(net_told::tests());
        tests.extend(net_bad::tests());
        tests.extend(net_handed::tests());
        tests.extend(vhost_user::tests());
        tests.extend(fs::tests());
        tests.extend(api::tests());
        tests.extend(api_fuzz::tests());
        tests.extend(audit::tests());
        tests.extend(audit_native::native());
        tests.extend(audit_outside::hostile());
        tests.extend(audit_outside::tests());
        tests.extend(death::tests());
        tests.extend(reset::tests());
        tests.extend(reset_stuck::tests());
        tests.extend(recovery::tests());
        tests.extend(recovery_net::tests());
        tests.extend(update::tests());
        tests.extend(update_kinds::tests());
        tests.extend(resources::tests());
        tests.extend(resources_enforced::tests());
        tests.extend(hostile_device::tests());
        tests.extend(hostile_disk::tests());
        tests.extend(hostile_guest::tests());
        tests.extend(hotplug::tests());
        tests.extend(hotplug_beside::tests());
        tests.extend(hotplug_kinds::tests());
        tests.extend(hotplug_late::tests());
        tests.extend(hotplug_memory::tests());
        tests.extend(hotplug_order::tests());
        tests.extend(hotplug_paused::tests());
        tests.extend(rng::tests());
        tests.extend(console::tests());
        tests.extend(attach::tests());
        tests.extend(kata::tests());
        tests.extend(vsock::tests());
        tests.extend(vsock_guest::tests());
        tests.extend(bad_input::tests());
    }
    let is = |subjects: &[String], test: &Test| subjects.iter().any(|s| s == test.subject);
    tests.retain(|test| !is(&without, test) && (only.is_empty() || is(&only, test)));
    if list {
        let subjects: BTreeSet<&str> = tests.iter().map(|test| test.subject).collect();
        for subject in subjects {
            println!("{subject}");
        }
        return ExitCode::SUCCESS;
    }
    runner::run(&tests, filter.as_deref(), long)
}
