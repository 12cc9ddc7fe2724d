//! Start of the VMM to the guest's first kernel line and to its init, and KVM's exits on
//! the way, beside QEMU. Runs where KVM runs guests, as root; one VM at a time.

use std::fmt::Write;
use std::fs;
use std::time::Duration;

use crate::guest::{Files, Guest, Vmm};
use crate::kvm::{self, Histogram};
use crate::table::{Table, figure, median, spread};

const LIMIT: Duration = Duration::from_secs(60);
const QUIET: &str = "console=ttyS0 quiet panic=-1 bh.cmd=poweroff reboot=t";
const LOUD: &str = "console=ttyS0 panic=-1 bh.cmd=poweroff reboot=t";
const FIRST_LINE: &str = "Linux version";
const INIT_LINE: &str = "BULKHEAD-GUEST-INIT";
const SHMEM: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// One VMM under one setting, and what was measured.
struct Subject {
    vmm: Vmm,
    /// Huge pages for shared memory.
    huge: bool,
    /// Guest RAM in shared memory.
    shared: bool,
    first: Vec<f64>,
    init: Vec<f64>,
    exits: Vec<f64>,
    failures: Vec<String>,
}

impl Subject {
    fn new(vmm: Vmm, huge: bool, shared: bool) -> Self {
        Self {
            vmm,
            huge,
            shared,
            first: vec![],
            init: vec![],
            exits: vec![],
            failures: vec![],
        }
    }

    fn label(&self) -> String {
        let memory = match (self.shared, self.huge) {
            (false, _) => "private memory",
            (true, true) => "shared memory, huge pages",
            (true, false) => "shared memory, 4 KiB pages",
        };
        format!("{}, {memory}", self.vmm.label())
    }

    fn start(&self, files: &Files, cmdline: &str) -> Result<Guest, String> {
        set_huge_pages(self.huge)?;
        Guest::start(
            self.vmm.command(files, cmdline, None, self.shared),
            &files.scratch,
            LIMIT,
        )
    }

    fn time_init(&mut self, files: &Files) -> Result<(), String> {
        let before = kvm::exits()?;
        let mut guest = self.start(files, QUIET)?;
        let seconds = guest.reaches(INIT_LINE)?;
        let exits = kvm::exits()?.saturating_sub(before);
        self.init.push(seconds);
        self.exits.push(exits as f64);
        guest.finish();
        Ok(())
    }

    fn time_first_line(&mut self, files: &Files) -> Result<(), String> {
        self.first
            .push(self.start(files, LOUD)?.reaches(FIRST_LINE)?);
        Ok(())
    }

    /// Exits up to init by reason, and what they were about.
    fn anatomy(&self, files: &Files) -> Result<String, String> {
        let reasons = Histogram::start("kvm_exit", "isa,exit_reason")?;
        let pio = Histogram::start("kvm_pio", "rw,port")?;
        let mmio = Histogram::start("kvm_mmio", "type,gpa")?;
        let msr = Histogram::start("kvm_msr", "write,ecx")?;
        let faults = Histogram::start("kvm_page_fault", "fault_address.buckets=16777216")?;
        let mut guest = self.start(files, QUIET)?;
        guest.reaches(INIT_LINE)?;
        let counts = [
            reasons.read(),
            pio.read(),
            mmio.read(),
            msr.read(),
            faults.read(),
        ];
        guest.finish();
        let [reasons, pio, mmio, msr, faults] = counts;
        let names = kvm::reason_names();
        let mut text = format!("**{}**: ", self.label());
        text += &top(&reasons, 14, |key| match key {
            [isa, reason] => names
                .get(&(*isa, *reason))
                .cloned()
                .unwrap_or(format!("{reason:#x}")),
            _ => String::new(),
        });
        let word = |write| if write == 0 { "read" } else { "write" };
        let _ = write!(
            text,
            ".\n  - port I/O: {}",
            top(&pio, 8, |key| match key {
                [rw, port] => format!("{} {port:#x}", word(*rw)),
                _ => String::new(),
            })
        );
        // trace_kvm_mmio's type: 0 unsatisfied read, 1 read, 2 write.
        let mmio: Vec<_> = mmio
            .into_iter()
            .filter(|(key, _)| key.first() != Some(&0))
            .collect();
        let _ = write!(
            text,
            "\n  - MMIO, by page: {}",
            top(&by_page(mmio), 8, |key| match key {
                [kind, page] => format!("{} {:#x}", word(kind.saturating_sub(1)), page << 12),
                _ => String::new(),
            })
        );
        let _ = write!(
            text,
            "\n  - MSRs: {}",
            top(&msr, 8, |key| match key {
                [write, index] => format!("{} {index:#x}", word(*write)),
                _ => String::new(),
            })
        );
        let _ = writeln!(
            text,
            "\n  - page faults (MMIO too), by 16 MiB of guest-physical address, from MiB: {}",
            top(&faults, 12, |key| match key {
                [start] => (start >> 20).to_string() + ":",
                _ => String::new(),
            })
        );
        Ok(text)
    }
}

type Counts = Vec<(Vec<u64>, u64)>;

fn by_page(counts: Counts) -> Counts {
    let mut pages = std::collections::BTreeMap::new();
    for (mut key, count) in counts {
        if let Some(address) = key.last_mut() {
            *address >>= 12;
        }
        let sum: &mut u64 = pages.entry(key).or_default();
        *sum = sum.saturating_add(count);
    }
    pages.into_iter().collect()
}

/// `name count, …` of the most frequent, with the sum first.
fn top(counts: &Counts, most: usize, name: impl Fn(&[u64]) -> String) -> String {
    let sum: u64 = counts.iter().map(|(_, n)| *n).sum();
    let mut sorted = counts.clone();
    sorted.sort_by_key(|(_, n)| std::cmp::Reverse(*n));
    let mut text = format!("{sum}");
    for (index, (key, count)) in sorted.iter().take(most).enumerate() {
        let _ = write!(
            text,
            "{}{} {count}",
            if index == 0 { ": " } else { ", " },
            name(key)
        );
    }
    text
}

fn set_huge_pages(on: bool) -> Result<(), String> {
    let setting = if on { "advise" } else { "never" };
    fs::write(SHMEM, setting).map_err(|e| format!("{SHMEM}: {e}: run as root"))
}

/// Runs the series and prints the tables.
pub fn measure(runs: usize) -> crate::Report {
    kvm::exits()?;
    let files = Files::new()?;
    let mut subjects = [
        Subject::new(Vmm::Bulkhead, true, true),
        Subject::new(Vmm::Bulkhead, false, true),
        Subject::new(Vmm::Q35, true, false),
        Subject::new(Vmm::Q35, false, true),
        Subject::new(Vmm::Microvm, true, false),
    ];
    // The first boot of each reads its files from afar and is not counted.
    for subject in &mut subjects {
        if let Err(why) = subject.time_init(&files) {
            eprintln!("{}: warm-up: {why}", subject.label());
        }
        subject.init.clear();
        subject.exits.clear();
    }
    for run in 0..runs {
        eprintln!("boot: run {} of {runs}", run + 1);
        for subject in &mut subjects {
            // Three failures, and it is left out from then on.
            if subject.failures.len() < 3 {
                let result = subject
                    .time_init(&files)
                    .and_then(|()| subject.time_first_line(&files));
                subject.failures.extend(result.err());
            }
        }
    }
    let q35 = subjects.iter().find(|s| s.vmm == Vmm::Q35 && !s.shared);
    let base = q35.and_then(|s| median(&s.init));
    let mut table = Table::new(&[
        "VMM",
        "boots",
        "start → first kernel line, s",
        "start → init, s",
        "of q35's",
        "aim",
        "KVM exits to init",
        "aim",
    ]);
    let mut notes = String::new();
    for subject in &subjects {
        let ratio = median(&subject.init)
            .zip(base)
            .map(|(ours, base)| ours / base);
        let (time_aim, exits_aim) = match (subject.vmm, subject.huge) {
            (Vmm::Bulkhead, true) => ("≤ 0.62", "≤ 2900"),
            (Vmm::Bulkhead, false) => ("≤ 0.62", "≤ 10000"),
            _ => ("", ""),
        };
        table.row(vec![
            subject.label(),
            subject.init.len().to_string(),
            spread(&subject.first, 2),
            spread(&subject.init, 2),
            figure(ratio, 2),
            time_aim.into(),
            spread(&subject.exits, 0),
            exits_aim.into(),
        ]);
        if let Some(why) = subject.failures.first() {
            let _ = writeln!(
                notes,
                "{}: {} failed, first: {why}\n",
                subject.label(),
                subject.failures.len()
            );
        }
    }
    let mut text = format!(
        "## boot: medians of {runs} interleaved runs (least–most)\n\n\
         256 MiB, one vCPU, an uncompressed kernel, `{QUIET}`; the first kernel line in boots without `quiet`.\n\n{}\n{notes}",
        table.text()
    );
    text.push_str("Exits to init by kind, of one traced boot each (tracing adds none):\n\n");
    for subject in &subjects {
        if subject.failures.len() < 3 {
            let _ = writeln!(
                text,
                "- {}",
                subject
                    .anatomy(&files)
                    .unwrap_or_else(|e| format!("{}: {e}", subject.label()))
            );
        }
    }
    Ok(text)
}
