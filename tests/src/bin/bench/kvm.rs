//! KVM's counters (debugfs) and histograms of its trace points (tracefs), for all VMs of
//! the host together: one VM at a time, please.

use std::collections::BTreeMap;
use std::fs;

const COUNTERS: &str = "/sys/kernel/debug/kvm";
const EVENTS: &str = "/sys/kernel/tracing/events/kvm";

/// Exits since KVM was loaded.
///
/// # Errors
/// Why the counter cannot be read.
pub fn exits() -> Result<u64, String> {
    let path = format!("{COUNTERS}/exits");
    let text = fs::read_to_string(&path)
        .map_err(|e| format!("{path}: {e}: mount debugfs, and run as root"))?;
    text.trim().parse().map_err(|e| format!("{path}: {e}"))
}

/// A histogram: a trace point and the fields that make its key.
pub struct Histogram {
    event: &'static str,
    trigger: String,
}

impl Histogram {
    /// Starts counting `event` by `keys`.
    ///
    /// # Errors
    /// Why this kernel does not.
    pub fn start(event: &'static str, keys: &str) -> Result<Self, String> {
        let histogram = Self {
            event,
            trigger: format!("hist:keys={keys}"),
        };
        histogram.write(&histogram.trigger)?;
        Ok(histogram)
    }

    fn write(&self, what: &str) -> Result<(), String> {
        let path = format!("{EVENTS}/{}/trigger", self.event);
        fs::write(&path, what).map_err(|e| format!("{path}: {what}: {e}"))
    }

    /// The counts so far.
    pub fn read(&self) -> Vec<(Vec<u64>, u64)> {
        let text = fs::read_to_string(format!("{EVENTS}/{}/hist", self.event)).unwrap_or_default();
        text.lines().filter_map(parse).collect()
    }
}

impl Drop for Histogram {
    fn drop(&mut self) {
        let _ = self.write(&format!("!{}", self.trigger));
    }
}

/// `{ rw: 1, port: 1016 } hitcount: 23`; of a bucket (`~ 4096-8191`) the start.
fn parse(line: &str) -> Option<(Vec<u64>, u64)> {
    let (keys, count) = line.trim().strip_prefix('{')?.split_once('}')?;
    let number = |text: &str| -> Option<u64> {
        let text = text.rsplit(':').next()?.trim().trim_start_matches("~ ");
        let text = text.split('-').next()?;
        match text.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16).ok(),
            None => text.parse().ok(),
        }
    };
    let keys: Option<Vec<u64>> = keys.split(',').map(number).collect();
    Some((keys?, number(count.split_whitespace().nth(1)?)?))
}

/// Names of exit reasons, by instruction set (1: VMX, 2: SVM) and number, as the trace
/// point's own format describes them.
pub fn reason_names() -> BTreeMap<(u64, u64), String> {
    let text = fs::read_to_string(format!("{EVENTS}/kvm_exit/format")).unwrap_or_default();
    let mut names = BTreeMap::new();
    for (isa, part) in (1..=2).zip(text.split("__print_symbolic").skip(1)) {
        // { 0x040 + 1, "DB excp" }
        for pair in part.split('{').skip(1) {
            let Some((number, rest)) = pair.split_once(',') else {
                continue;
            };
            let sum: Option<u64> = number
                .split('+')
                .map(|term| match term.trim().strip_prefix("0x") {
                    Some(hex) => u64::from_str_radix(hex, 16).ok(),
                    None => term.trim().parse().ok(),
                })
                .sum();
            if let (Some(number), Some(name)) = (sum, rest.split('"').nth(1)) {
                names
                    .entry((isa, number))
                    .or_insert_with(|| name.to_string());
            }
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_a_histogram_is_read() {
        let line = "{ rw:          1, port:       1016 } hitcount:         23";
        assert_eq!(parse(line), Some((vec![1, 1016], 23)));
        assert_eq!(
            parse("{ gpa: 0xfee00000 } hitcount: 2"),
            Some((vec![0xfee0_0000], 2))
        );
        assert_eq!(parse("{ len: ~ 16-31 } hitcount: 2"), Some((vec![16], 2)));
        assert_eq!(parse("# event histogram"), None);
    }
}
