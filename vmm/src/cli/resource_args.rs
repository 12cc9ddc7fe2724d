//! What a device's process may use of the host, as `--disk`, `--net` and `bulkhead ctl limit`
//! take it: text in, [`Resources`] out. Runs in the command line's process.

use bulkhead_proto::common::{IoLimits, Resources};
use bulkhead_proto::machine::{MachineConfig, UpdateResourcesRequest, UpdateResourcesResponse};

use super::EXIT_USAGE;
use super::ctl::{CALL, Failure, Output, Session};
use super::ctl_device::machine_config;
use super::machine_args::parse_size;

/// The keys.
pub const KEYS: [&str; 4] = ["cpu", "memory", "pids", "io"];
/// What `io` takes.
const IO_FORM: &str =
    "rbps=SIZE, wbps=SIZE, riops=N and wiops=N, with ':' between, such as rbps=10M:wiops=500";

/// `ctl limit`.
#[derive(clap::Args, Debug, Clone)]
pub struct LimitArgs {
    /// The device, as `ctl devices` names it
    id: String,
    /// Percent of one CPU's time; 150: one and a half CPUs; 0 lifts the limit
    #[arg(long, value_name = "PERCENT")]
    cpu: Option<String>,
    /// Memory of its own and for the files it reads, and guest memory it touches first
    #[arg(long, value_name = "SIZE")]
    memory: Option<String>,
    /// Threads, those of the kernel for its I/O included
    #[arg(long, value_name = "N")]
    pids: Option<String>,
    /// Of the block device that a disk's file lies on; replaces all four
    #[arg(long, value_name = "rbps=SIZE:wbps=SIZE:riops=N:wiops=N|0")]
    io: Option<String>,
}

/// Sets the limit that a key names.
///
/// # Errors
/// One line that names the key and what it takes.
pub fn set(resources: &mut Resources, key: &str, value: &str) -> Result<(), String> {
    let wanted = |what: &str| format!("{key}={value}: give {what}");
    match key {
        "cpu" => {
            let percent = value.strip_suffix('%').unwrap_or(value);
            resources.cpu_percent = percent
                .parse()
                .map_err(|_| wanted("percent of one CPU's time, such as 50; 0 for no limit"))?;
        }
        "memory" if value == "0" => resources.memory_bytes = 0,
        "memory" => {
            resources.memory_bytes = parse_size(value).map_err(|error| wanted(&error))?;
        }
        "pids" => {
            resources.pids = value
                .parse()
                .map_err(|_| wanted("a number of threads, such as 32; 0 for no limit"))?;
        }
        "io" => resources.io = Some(parse_io(value).ok_or_else(|| wanted(IO_FORM))?).into(),
        _ => {
            return Err(format!(
                "{key:?} is no limit: the limits are cpu, memory, pids and io"
            ));
        }
    }
    Ok(())
}

fn parse_io(value: &str) -> Option<IoLimits> {
    let mut io = IoLimits::new();
    if value == "0" {
        return Some(io);
    }
    for part in value.split(':') {
        let (key, value) = part.split_once('=')?;
        let field = match key {
            "rbps" => &mut io.read_bps,
            "wbps" => &mut io.write_bps,
            "riops" => &mut io.read_iops,
            "wiops" => &mut io.write_iops,
            _ => return None,
        };
        let limit = match key.ends_with("bps") {
            true => parse_size(value).ok(),
            false => value.parse().ok(),
        };
        *field = limit.filter(|n| *n > 0)?;
    }
    Some(io)
}

impl LimitArgs {
    fn given(&self) -> [(&'static str, Option<&String>); 4] {
        let values = [&self.cpu, &self.memory, &self.pids, &self.io];
        let mut given = KEYS.map(|key| (key, None));
        for ((_, slot), value) in given.iter_mut().zip(values) {
            *slot = value.as_ref();
        }
        given
    }

    /// The limits that are given, over what there is.
    ///
    /// # Errors
    /// One line that names the option.
    pub(super) fn over(&self, present: Option<&Resources>) -> Result<Resources, Failure> {
        let usage = |line: String| Failure {
            code: EXIT_USAGE,
            line,
        };
        let mut resources = present.cloned().unwrap_or_default();
        let mut nothing = true;
        for (key, value) in self.given() {
            if let Some(value) = value {
                nothing = false;
                set(&mut resources, key, value).map_err(|e| usage(format!("--{e}")))?;
            }
        }
        if nothing {
            return Err(usage(
                "nothing to change: give --cpu, --memory, --pids or --io".to_owned(),
            ));
        }
        Ok(resources)
    }

    pub(super) fn run(
        &self,
        session: &mut Session<'_>,
        out: &mut Output<'_>,
    ) -> Result<(), Failure> {
        let config = machine_config(session)?;
        let mut request = UpdateResourcesRequest::new();
        request.id.clone_from(&self.id);
        request.resources = Some(self.over(present(&config, &self.id))?).into();
        let answer: UpdateResourcesResponse = session.call("UpdateResources", &request, CALL)?;
        if out.json {
            return out.json_value(
                &serde_json::json!({ "id": self.id, "not_enforced": answer.not_enforced }),
            );
        }
        out.text(|to| {
            writeln!(to, "limited")?;
            for line in &answer.not_enforced {
                writeln!(to, "not enforced: {}", super::ctl_output::clean(line))?;
            }
            Ok(())
        })
    }
}

/// A device's limits by its configuration.
fn present<'a>(config: &'a MachineConfig, id: &str) -> Option<&'a Resources> {
    let disk = config.disks.iter().find(|d| d.id == id);
    let net = config.nets.iter().find(|n| n.id == id);
    let of_disk = disk.and_then(|d| d.resources.as_ref());
    let rng = config.rngs.iter().find(|r| r.id == id);
    let of_net = net.and_then(|n| n.resources.as_ref());
    let of_rng = rng.and_then(|r| r.resources.as_ref());
    let vsock = config.vsock.as_ref().filter(|v| v.id == id);
    let of_vsock = vsock.and_then(|v| v.resources.as_ref());
    let console = config.consoles.iter().find(|c| c.id == id);
    let of_console = console.and_then(|c| c.resources.as_ref());
    let fs = config.fs.iter().find(|f| f.id == id);
    let of_fs = fs.and_then(|f| f.resources.as_ref());
    let of_others = of_rng.or(of_vsock).or(of_console).or(of_fs);
    of_disk.or(of_net).or(of_others)
}

/// Limits as they are given on a command line; empty: none.
pub(super) fn text(resources: &Resources) -> String {
    let mut parts = Vec::new();
    if resources.cpu_percent != 0 {
        parts.push(format!("cpu={}", resources.cpu_percent));
    }
    if resources.memory_bytes != 0 {
        parts.push(format!("memory={}", resources.memory_bytes));
    }
    if resources.pids != 0 {
        parts.push(format!("pids={}", resources.pids));
    }
    if let Some(io) = resources.io.as_ref() {
        let limits = [
            ("rbps", io.read_bps),
            ("wbps", io.write_bps),
            ("riops", io.read_iops),
            ("wiops", io.write_iops),
        ];
        let set: Vec<String> = limits
            .into_iter()
            .filter(|(_, limit)| *limit != 0)
            .map(|(key, limit)| format!("{key}={limit}"))
            .collect();
        if !set.is_empty() {
            parts.push(format!("io={}", set.join(":")));
        }
    }
    parts.join(",")
}

/// Limits for programs.
pub(super) fn json(resources: &Resources) -> serde_json::Value {
    let io = resources.io.as_ref();
    serde_json::json!({
        "cpu_percent": resources.cpu_percent,
        "memory_bytes": resources.memory_bytes,
        "pids": resources.pids,
        "io": {
            "read_bps": io.map_or(0, |io| io.read_bps),
            "write_bps": io.map_or(0, |io| io.write_bps),
            "read_iops": io.map_or(0, |io| io.read_iops),
            "write_iops": io.map_or(0, |io| io.write_iops),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(options: &[(&str, &str)]) -> Result<Resources, String> {
        let mut resources = Resources::new();
        for (key, value) in options {
            set(&mut resources, key, value)?;
        }
        Ok(resources)
    }

    #[test]
    fn every_limit_is_read_and_shown_as_it_is_given() {
        let given = [
            ("cpu", "150%"),
            ("memory", "64M"),
            ("pids", "20"),
            ("io", "rbps=1M:wiops=100"),
        ];
        let resources = read(&given).unwrap();
        assert_eq!(
            text(&resources),
            "cpu=150,memory=67108864,pids=20,io=rbps=1048576:wiops=100"
        );
        assert_eq!(json(&resources)["io"]["write_iops"], 100);
        let lifted = [("cpu", "0"), ("memory", "0"), ("pids", "0"), ("io", "0")];
        assert_eq!(text(&read(&lifted).unwrap()), "");
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (key, value) in [
            ("cpu", "half"),
            ("cpu", "-1"),
            ("memory", "much"),
            ("pids", "1K"),
            ("io", "10M"),
            ("io", "rbps=0"),
            ("io", "bps=1M"),
            ("io", "riops=1K"),
            ("disk", "1"),
        ] {
            let error = read(&[(key, value)]).unwrap_err();
            assert!(error.contains(key) && !error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn limits_that_are_not_given_stay() {
        let args = LimitArgs {
            id: "d".into(),
            cpu: Some("20".into()),
            memory: None,
            pids: None,
            io: None,
        };
        let present = read(&[("pids", "9"), ("cpu", "50")]).unwrap();
        let over = args.over(Some(&present)).unwrap();
        assert_eq!((over.cpu_percent, over.pids), (20, 9));
        let nothing = LimitArgs { cpu: None, ..args };
        assert!(nothing.over(None).is_err());
    }
}
