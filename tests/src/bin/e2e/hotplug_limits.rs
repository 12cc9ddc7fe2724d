//! Devices that are added where a limit is near: a full bus of the widest disks, a VMM that may
//! open hardly anything more, a launcher that stands still. No guest is booted.

use std::time::Duration;

use bulkhead_tests::host::{Undo, sh};
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, ctl, nothing_left};

use super::disk::sparse;
use super::hotplug::{Site, created, created_on, holdings, settled};
use super::hotplug_order::refused;

const MIB: u64 = 1 << 20;

/// Those that need none.
pub fn native() -> Vec<Test> {
    let test = Test::short("hotplug");
    vec![
        test("31 disks of as many queues as there may be are added", wide),
        test(
            "a device for which the VMM has no descriptors left leaves nothing, and says so",
            short_of_descriptors,
        ),
        test(
            "a launcher that stands still fails an add and a removal in time, and nothing is left of either",
            standing_still,
        ),
    ]
}

fn wide() -> Verdict {
    let scratch = Scratch::new("hotplug-wide")?;
    let (vmm, socket) = created(&scratch, None, 31)?;
    let path = sparse(&scratch, "disk", MIB)?;
    let disk = |number: u32| format!("path={path},readonly=on,id=d{number},queues=64");
    for number in 0..31 {
        ctl(&socket, &["add-disk", &disk(number)])?;
    }
    refused(
        &ctl(&socket, &["add-disk", &disk(31)]),
        "every root port is taken",
    )?;
    ctl(&socket, &["shutdown", "--force"])?;
    drop(vmm);
    nothing_left(Duration::from_secs(20))
}

fn short_of_descriptors() -> Verdict {
    let scratch = Scratch::new("hotplug-short")?;
    let site = Site {
        wrapper: &["prlimit", "--nofile=256"],
        ..Site::default()
    };
    let (vmm, socket) = created_on(&scratch, site, 31)?;
    let path = sparse(&scratch, "disk", MIB)?;
    let disk = |number: u32| format!("path={path},readonly=on,id=d{number},queues=16");
    let add = |number| ctl(&socket, &["add-disk", &disk(number)]);
    let count = (0..31).take_while(|number| add(*number).is_ok()).count() as u32;
    check((1..31).contains(&count), || format!("{count} disks"))?;
    let before = holdings(vmm.pid())?;
    for number in count..count + 3 {
        refused(&add(number), "give the devices fewer queues=")?;
    }
    settled(vmm.pid(), &before)?;
    // What fits does.
    ctl(&socket, &["remove-device", "d0"])?;
    add(0)?;
    ctl(&socket, &["shutdown", "--force"])?;
    drop(vmm);
    nothing_left(Duration::from_secs(20))
}

fn standing_still() -> Verdict {
    let scratch = Scratch::new("hotplug-still")?;
    let (vmm, socket) = created(&scratch, None, 2)?;
    let path = sparse(&scratch, "disk", MIB)?;
    let disk = |id: &str| format!("path={path},readonly=on,id={id}");
    ctl(&socket, &["add-disk", &disk("there")])?;
    let info = ctl(&socket, &["info"])?;
    let launcher = info["launcher_pid"].as_i64().unwrap_or_default();
    check(launcher > 1, || info.to_string())?;
    let before = holdings(vmm.pid())?;
    let undo = Undo::new(format!("kill -CONT {launcher}"));
    sh(&format!("kill -STOP {launcher}"))?;
    refused(&ctl(&socket, &["add-disk", &disk("late")]), "launcher")?;
    // The API is served meanwhile.
    ctl(&socket, &["info"])?;
    refused(&ctl(&socket, &["remove-device", "there"]), "launcher")?;
    drop(undo);
    settled(vmm.pid(), &before).or_else(|_| {
        // The one that was to go has gone meanwhile.
        check(ctl(&socket, &["stats", "there"]).is_err(), || {
            "the device is there, and something else is left".to_owned()
        })
    })?;
    for id in ["late", "later"] {
        ctl(&socket, &["add-disk", &disk(id)])?;
    }
    ctl(&socket, &["shutdown", "--force"])?;
    drop(vmm);
    nothing_left(Duration::from_secs(20))
}
