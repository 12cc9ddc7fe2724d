//! PSS of every process of a VM, guest RAM excluded, for an idle guest with one disk.
//! Runs where KVM runs guests, as root.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::guest::{Files, Guest, Vmm};
use crate::process::{self, Pss};
use crate::table::{Table, median};

const LIMIT: Duration = Duration::from_secs(90);
const CMDLINE: &str = "console=ttyS0 quiet panic=-1 bh.cmd=hang";

/// Boots each VMM a few times and prints the table.
pub fn measure(runs: usize) -> crate::Report {
    let files = Files::new()?;
    let disk = files.scratch.disk("disk.img", 16 << 20, 7)?;
    let mut table = Table::new(&[
        "VMM",
        "process",
        "PSS, MiB",
        "of it anonymous",
        "its share of guest RAM",
        "aim",
    ]);
    let mut notes = String::new();
    for vmm in [Vmm::Bulkhead, Vmm::Q35] {
        let mut sizes: BTreeMap<(usize, String), Vec<Pss>> = BTreeMap::new();
        let mut totals = Vec::new();
        for _ in 0..runs {
            let seen = once(vmm, &files, &disk).unwrap_or_else(|why| {
                notes += &format!("{}: {why}\n\n", vmm.label());
                Vec::new()
            });
            if !seen.is_empty() {
                totals.push(seen.iter().map(|(_, pss)| pss.total).sum());
            }
            for (place, (name, pss)) in seen.into_iter().enumerate() {
                sizes.entry((place, name)).or_default().push(pss);
            }
        }
        let mib = |values: Vec<f64>| {
            median(&values).map_or_else(|| "–".into(), |kib| format!("{:.2}", kib / 1024.0))
        };
        for ((_, name), all) in &sizes {
            let of = |field: fn(&Pss) -> f64| mib(all.iter().map(field).collect());
            let row = [of(|p| p.total), of(|p| p.anonymous), of(|p| p.guest)];
            table.row(
                [vmm.label().into(), name.clone()]
                    .into_iter()
                    .chain(row)
                    .collect(),
            );
        }
        let aim = if vmm == Vmm::Bulkhead { "≤ 4" } else { "" };
        let none = String::new;
        table.row(vec![
            vmm.label().into(),
            "**together**".into(),
            mib(totals),
            none(),
            none(),
            aim.into(),
        ]);
    }
    Ok(format!(
        "## pss: memory of an idle guest with one disk, guest RAM excluded, medians of {runs} boots\n\n\
         256 MiB, one vCPU; every process of the VM, text included.\n\n{}\n{notes}",
        table.text()
    ))
}

/// One boot: name and PSS of each process.
fn once(vmm: Vmm, files: &Files, disk: &str) -> Result<Vec<(String, Pss)>, String> {
    let command = vmm.command(files, CMDLINE, Some(disk), true);
    let mut guest = Guest::start(command, &files.scratch, LIMIT)?;
    guest.reaches("BULKHEAD-GUEST-READY")?;
    // Let it come to rest.
    std::thread::sleep(Duration::from_secs(2));
    let name = if vmm == Vmm::Bulkhead {
        "guest-ram"
    } else {
        "memory-backend-memfd"
    };
    process::tree(guest.pid)
        .into_iter()
        .map(|pid| Ok((process::name(pid), process::pss(pid, name)?)))
        .collect()
}
