//! A guest that carries out what is typed, and what its kernel says afterwards.

use std::time::{Duration, Instant};

use bulkhead_tests::host::debian_by;
use bulkhead_tests::runner::Verdict;
use bulkhead_tests::vmm::{Scratch, Vmm, patience};

use super::disk::LIMIT;

/// What no kernel says that is well.
const COMPLAINTS: &str = "BUG:|Oops|WARNING: CPU|Call Trace|blocked for more than|soft lockup|hung_task|self-detected stall|detected stalls";
/// What runs in it.
pub const READER: &str = "echo GUEST-IS-'READY'
while read -r line; do eval \"$line\"; done";

/// A guest that carries out what is typed.
pub struct Shell {
    pub vmm: Vmm,
    steps: u32,
}

impl Shell {
    /// Of a guest that was started with [`READER`], when it reads.
    pub fn new(mut vmm: Vmm) -> Result<Self, String> {
        vmm.wait_for("GUEST-IS-READY", LIMIT)?;
        Ok(Self { vmm, steps: 0 })
    }

    /// Of one that was started so, which does not read yet.
    pub fn booting(vmm: Vmm) -> Self {
        Self { vmm, steps: 0 }
    }

    /// Its kernel has not complained, nor said any of `more`, a regular expression.
    pub fn is_well(&mut self, more: &str) -> Verdict {
        let words = format!(
            "{COMPLAINTS}{}{more}",
            if more.is_empty() { "" } else { "|" }
        );
        self.run(&format!("! dmesg | grep -E '{words}'"))
    }

    /// It is well, and ends in order.
    pub fn ends(mut self) -> Verdict {
        self.is_well("")?;
        self.vmm.type_text("exit\n")?;
        self.vmm.ends_with(0, LIMIT)
    }
    /// Runs a command in the guest, which must succeed.
    pub fn run(&mut self, command: &str) -> Verdict {
        self.steps += 1;
        let step = self.steps;
        // What is typed is echoed: the mark must not be in it.
        self.vmm.type_text(&format!(
            "{{ {command}; }} && echo STEP-'{step}'-DONE || echo STEP-'{step}'-BAD\n"
        ))?;
        let end = Instant::now() + patience(LIMIT);
        loop {
            let output = self.vmm.output();
            if output.contains(&format!("STEP-{step}-DONE")) {
                return Ok(());
            }
            if output.contains(&format!("STEP-{step}-BAD")) || Instant::now() > end {
                return Err(self.vmm.story(&format!("{command}: failed in the guest")));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Debian, with these disks beside its own and these options, that carries out what is typed.
pub fn guest(
    by: &[&str],
    scratch: &Scratch,
    disks: &[&str],
    more: &[&str],
) -> Result<Shell, String> {
    Shell::new(debian_by(by, scratch, READER, disks, more)?)
}
