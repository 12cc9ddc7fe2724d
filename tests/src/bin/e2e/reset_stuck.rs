//! A reset where the host's storage stands still: nothing of a process that is lost finds the next guest's memory, the
//! API is heard meanwhile, and the machine can be ended.

use std::time::{Duration, Instant};

use bulkhead_tests::host::sh;
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, ctl, nothing_left};

use super::disk::LIMIT;
use super::hotplug_late::until_told;
use super::hotplug_memory::pid_of;
use super::mapped::Mapped;
use super::rng::refused;
use super::shell::{Shell, guest};

const SECTORS: u64 = 16384;

/// The tests.
pub fn tests() -> Vec<Test> {
    vec![Test::short("reset")(
        "a reset waits for the I/O of a process that was lost, is heard of, and can be overtaken by the machine's end",
        stands_still,
    )]
}

/// The disk's process has a request in flight on storage that stands still, and does not answer any more.
fn falls_silent(socket: &str, mapped: &Mapped, guest: &mut Shell) -> Verdict {
    let pid = pid_of(socket, "slow")?;
    mapped.suspend()?;
    guest.run("dd if=/dev/vdb of=/dev/null bs=64k count=1 iflag=direct status=none & until read -r reads rest </sys/block/vdb/inflight && [ $reads = 1 ]; do sleep 0.1; done")?;
    // From the ring to the host's storage, where nothing shows it.
    std::thread::sleep(Duration::from_secs(2));
    sh(&format!("kill -STOP {pid}")).map(drop)
}

fn stands_still() -> Verdict {
    let scratch = Scratch::new("reset-stuck")?;
    let beneath = scratch.disk("slow", (SECTORS * 512) as usize, 3)?;
    let mapped = Mapped::new(&beneath, SECTORS)?;
    let slow = format!("path={},id=slow,lock=off,queues=1", mapped.path());
    let socket = scratch.path("api");
    let args = ["--api-socket", &socket];
    let mut guest = guest(&[], &scratch, &[slow.as_str()], &args)?;
    let begun = |guest: &Shell| guest.vmm.output().matches("GUEST-IS-READY").count();

    falls_silent(&socket, &mapped, &mut guest)?;
    std::thread::scope(|scope| {
        let reset = scope.spawn(|| ctl(&socket, &["reset"]));
        until_told(&socket, &["device.crashed", "slow"], 0)?;
        // As long as a guest takes to begin.
        std::thread::sleep(Duration::from_secs(6));
        ctl(&socket, &["info"])?;
        ctl(&socket, &["devices"])?;
        let early = reset.is_finished() || begun(&guest) > 1;
        mapped.resume()?;
        check(!early, || {
            guest.vmm.story("it begins beside I/O that is in flight")
        })?;
        reset.join().map_err(|_| "a client".to_owned())?.map(drop)
    })?;
    let end = Instant::now() + bulkhead_tests::vmm::patience(LIMIT);
    while begun(&guest) < 2 {
        check(Instant::now() < end, || guest.vmm.story("no next guest"))?;
        std::thread::sleep(Duration::from_millis(50));
    }
    let sum = sh(&format!("sha256sum <{beneath}"))?;
    let sum = sum.split_whitespace().next().unwrap_or_default();
    guest.run(&format!(
        "[ $(sha256sum </dev/vdb | cut -d ' ' -f 1) = {sum} ]"
    ))?;

    falls_silent(&socket, &mapped, &mut guest)?;
    std::thread::scope(|scope| {
        let reset = scope.spawn(|| ctl(&socket, &["reset"]));
        until_told(&socket, &["device.crashed", "slow"], 1)?;
        ctl(&socket, &["shutdown", "--force"])?;
        let reset = reset.join().map_err(|_| "a client".to_owned())?;
        refused(reset, "")
    })?;
    guest.vmm.ends_with(0, LIMIT)?;
    mapped.resume()?;
    nothing_left(LIMIT)
}
