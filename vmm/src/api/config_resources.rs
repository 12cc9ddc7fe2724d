//! What limits on a device's process must look like. Called on the `api` thread for every
//! Create and UpdateResources.

use bulkhead_proto::common::Resources;

use super::config::known;

/// Least and most percent of a CPU: the kernel's cpu.max takes no less than 1 ms of 100.
const CPU: std::ops::RangeInclusive<u32> = 1..=102_400;
/// Most threads that count: the kernel has no more pids.
const PIDS: u32 = 4_194_304;

/// Checks limits, if there are any. How much memory and how many threads are too few, the launcher
/// says, which is told what a process of this device needs.
///
/// # Errors
///
/// One line that names the field and what it takes.
pub(super) fn check(name: &str, resources: Option<&Resources>, disk: bool) -> Result<(), String> {
    let Some(resources) = resources else {
        return Ok(());
    };
    known(name, resources)?;
    let Resources {
        cpu_percent, pids, ..
    } = *resources;
    if cpu_percent != 0 && !CPU.contains(&cpu_percent) {
        return Err(format!(
            "{name}.cpu_percent is {cpu_percent}: give {} to {}, or 0 for no limit",
            CPU.start(),
            CPU.end()
        ));
    }
    if pids > PIDS {
        return Err(format!(
            "{name}.pids is {pids}: give at most {PIDS}, or 0 for no limit"
        ));
    }
    if let Some(io) = resources.io.as_ref() {
        known(&format!("{name}.io"), io)?;
        if !disk {
            return Err(format!(
                "{name}.io is set: only disks lie on block devices; leave it out"
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_the_field() {
        let plain = Resources::new();
        assert_eq!(check("r", None, false), Ok(()));
        assert_eq!(check("r", Some(&plain), false), Ok(()));
        type Change = fn(&mut Resources);
        let cases: [(&str, Change); 4] = [
            ("r.cpu_percent", |r| r.cpu_percent = 200_000),
            ("r.pids", |r| r.pids = u32::MAX),
            ("r.io", |r| {
                r.io.mut_or_insert_default();
            }),
            ("r has a field 99", |r| {
                r.special_fields.mut_unknown_fields().add_varint(99, 1)
            }),
        ];
        for (field, change) in cases {
            let mut resources = plain.clone();
            change(&mut resources);
            let error = check("r", Some(&resources), false).unwrap_err();
            assert!(error.starts_with(field), "{field}: {error}");
        }
    }
}
