//! What a device's cgroup is to hold it to, by the API's account, against what the kernel's files of
//! that leaf say (Linux's Documentation/admin-guide/cgroup-v2.rst). Called by the audit only.

use bulkhead_proto::common::{IoLimits, Resources};

use super::limits::Limits;

/// Limits that a client has asked for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Asked {
    /// 0 or absent: none.
    pub limits: Resources,
    /// Controllers for which the VMM says that this host cannot enforce them.
    pub not_enforced: Vec<String>,
}

impl Eq for Asked {}

/// A limit of io.max: its key there, and what was asked.
type Io = (&'static str, fn(&IoLimits) -> u64);
const IO: [Io; 4] = [
    ("rbps", |io| io.read_bps),
    ("wbps", |io| io.write_bps),
    ("riops", |io| io.read_iops),
    ("wiops", |io| io.write_iops),
];

/// A number of such a file; what is none bounds nothing.
fn number(text: &str) -> u64 {
    text.trim().parse().unwrap_or(u64::MAX)
}

impl Asked {
    /// By the API's account. The controller stands before the colon of each line.
    pub fn new(limits: Resources, not_enforced: &[String]) -> Self {
        let controllers = not_enforced.iter();
        let controllers = controllers.map(|line| line.split(':').next().unwrap_or_default());
        Self {
            limits,
            not_enforced: controllers.map(str::to_owned).collect(),
        }
    }

    /// What allows more than was asked, one line each.
    pub fn looser(&self, is: &Limits) -> Vec<String> {
        let mut wrong = Vec::new();
        // One without a leaf is a weakness that is noted, or in another one's place.
        if !is.own_leaf {
            return wrong;
        }
        let enforced = |controller: &str| self.not_enforced.iter().all(|c| c != controller);
        let text = |file: &str| {
            let mut files = is.limits.iter();
            let found = files.find(|(name, _)| name == file);
            found.map(|(_, text)| text.as_str())
        };
        let mut hold = |file: &str, asked: String, within: bool| {
            if !within {
                let is = text(file).unwrap_or("not there");
                wrong.push(format!(
                    "its {file} is {is}, and {asked} is what was asked: `ctl limit` sets it again"
                ));
            }
        };
        let limits = &self.limits;
        if limits.cpu_percent != 0 && enforced("cpu") {
            let within = text("cpu.max").is_some_and(|text| {
                let (quota, period) = text.split_once(' ').unwrap_or((text, ""));
                let most = u128::from(number(period)).saturating_mul(limits.cpu_percent.into());
                u128::from(number(quota)).saturating_mul(100) <= most && quota != "max"
            });
            hold("cpu.max", format!("{} %", limits.cpu_percent), within);
        }
        for (controller, file, asked) in [
            ("memory", "memory.max", limits.memory_bytes),
            ("pids", "pids.max", limits.pids.into()),
        ] {
            if asked != 0 && enforced(controller) {
                let within = text(file).is_some_and(|text| number(text) <= asked);
                hold(file, asked.to_string(), within);
            }
        }
        let io = limits.io.as_ref().filter(|_| enforced("io"));
        for (key, asked) in IO {
            let asked = io.map_or(0, asked);
            if asked == 0 {
                continue;
            }
            // "MAJ:MIN rbps=N wbps=N riops=N wiops=N" of each device.
            let mut words = text("io.max").unwrap_or_default().split(' ');
            let of_it = |word: &str| {
                let value = word.strip_prefix(key)?.strip_prefix('=')?;
                Some(number(value) <= asked)
            };
            let within = words.any(|word| of_it(word) == Some(true));
            hold("io.max", format!("{key}={asked}"), within);
        }
        wrong
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked() -> Asked {
        let mut limits = Resources::new();
        limits.cpu_percent = 50;
        limits.memory_bytes = 1 << 20;
        limits.pids = 9;
        let io = limits.io.mut_or_insert_default();
        (io.read_bps, io.write_iops) = (1000, 20);
        Asked::new(limits, &[])
    }

    fn is(cpu: &str, memory: &str, pids: &str, io: &str) -> Limits {
        let files = ["cpu.max", "memory.max", "pids.max", "io.max"];
        Limits {
            own_leaf: true,
            limits: files
                .iter()
                .zip([cpu, memory, pids, io])
                .map(|(file, text)| ((*file).to_owned(), text.to_owned()))
                .collect(),
            ..Limits::default()
        }
    }

    #[test]
    fn what_allows_as_much_as_was_asked_or_less_is_in_order() {
        let exact = is(
            "50000 100000",
            "1048576",
            "9",
            "8:0 rbps=1000 wbps=max riops=max wiops=20",
        );
        assert_eq!(asked().looser(&exact), [""; 0]);
        let less = is(
            "1000 100000",
            "4096",
            "2",
            "8:0 rbps=1 wbps=1 riops=1 wiops=1",
        );
        assert_eq!(asked().looser(&less), [""; 0]);
        let open = is("max 100000", "max", "max", "");
        assert_eq!(Asked::default().looser(&open), [""; 0]);
    }

    #[test]
    fn each_that_was_lifted_is_named() {
        let io = "8:0 rbps=1000 wbps=max riops=max wiops=20";
        let (cpu, memory, pids) = ("50000 100000", "1048576", "9");
        for (is, file) in [
            (is("max 100000", memory, pids, io), "cpu.max"),
            (is("50001 100000", memory, pids, io), "cpu.max"),
            (is("", memory, pids, io), "cpu.max"),
            (is(cpu, "max", pids, io), "memory.max"),
            (is(cpu, "1048577", pids, io), "memory.max"),
            (is(cpu, memory, "max", io), "pids.max"),
            (
                is(cpu, memory, pids, "8:0 rbps=max wbps=1 riops=1 wiops=20"),
                "io.max",
            ),
            (
                is(cpu, memory, pids, "8:0 rbps=1000 wbps=1 riops=1 wiops=21"),
                "io.max",
            ),
        ] {
            let lines = asked().looser(&is);
            assert!(
                lines.len() == 1 && lines[0].contains(file),
                "{file}: {lines:?}"
            );
        }
        assert_eq!(asked().looser(&is(cpu, memory, pids, "")).len(), 2);
    }

    #[test]
    fn what_this_host_cannot_enforce_is_not_held_against_it() {
        let open = is("max 100000", "max", "max", "");
        let told = ["cpu: no controller", "io: none", "pids: x", "memory: y: z"];
        let told = told.map(str::to_owned);
        assert_eq!(Asked::new(asked().limits, &told).looser(&open), [""; 0]);
        let mut elsewhere = open;
        elsewhere.own_leaf = false;
        assert_eq!(asked().looser(&elsewhere), [""; 0]);
    }
}
