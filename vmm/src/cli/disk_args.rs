//! `--disk` of `bulkhead run` and `bulkhead ctl create`, and the limits of `bulkhead ctl
//! update-disk`: text in, [`DiskConfig`] out. Runs in the command line's process; nothing is
//! opened here.

use bulkhead_proto::common::TokenBucket;
use bulkhead_proto::machine::DiskConfig;
use bulkhead_proto::machine::disk_config::{Cache, Format};

use super::machine_args::{
    Keys, MAX_CPUS, absolute, check_id, parse_size, parse_switch, split_option,
};
use super::resource_args;

const KEYS: &str = "path, readonly, id, serial, queues, format, cache, backing, max-size, bps, \
                    iops, cpu, memory, pids, io and lock";

/// A disk from its option; `index` names it when the text does not.
///
/// # Errors
/// One line that names the option, the key and what it takes.
pub fn parse_disk(text: &str, index: usize) -> Result<DiskConfig, String> {
    let option = format!("--disk {text}");
    let wanted =
        |key: &str, value: &str, what: &str| Err(format!("{option}: {key}={value}: give {what}"));
    let mut disk = DiskConfig::new();
    let parts = split_option(text);
    let mut keys = Keys::default();
    for part in &parts {
        let (key, value) = part.split_once('=').ok_or_else(|| {
            format!(
                "{option}: {part:?} is no KEY=VALUE: the form is path=FILE[,readonly=on][,id=NAME]"
            )
        })?;
        keys.once(&option, key)?;
        match key {
            "path" => disk.path = absolute(&option, value)?,
            "readonly" => disk.readonly = parse_switch(&option, key, value)?,
            "id" => disk.id = value.to_string(),
            "serial" => disk.serial = value.to_string(),
            "queues" => {
                disk.queues = value
                    .parse()
                    .ok()
                    .filter(|n| (1..=MAX_CPUS).contains(n))
                    .ok_or_else(|| format!("{option}: queues: give 1 to {MAX_CPUS}"))?;
            }
            "format" => {
                disk.format = match value {
                    "raw" => Format::RAW.into(),
                    "qcow2" => Format::QCOW2.into(),
                    _ => return wanted(key, value, "raw or qcow2"),
                }
            }
            "cache" => {
                disk.cache = match value {
                    "none" => Cache::CACHE_NONE.into(),
                    "writeback" => Cache::WRITEBACK.into(),
                    "writethrough" => Cache::WRITETHROUGH.into(),
                    "unsafe" => Cache::UNSAFE.into(),
                    _ => return wanted(key, value, "none, writeback, writethrough or unsafe"),
                }
            }
            "backing" => {
                for path in value.split(':') {
                    disk.backing_paths.push(absolute(&option, path)?);
                }
            }
            "max-size" => {
                disk.max_size =
                    parse_size(value).map_err(|e| format!("{option}: {key}={value}: {e}"))?;
            }
            "bps" | "iops" => {
                let bucket = parse_bucket(key, value).map_err(|e| format!("{option}: {e}"))?;
                let limits = disk.limits.mut_or_insert_default();
                if key == "bps" {
                    limits.bytes = Some(bucket).into();
                } else {
                    limits.operations = Some(bucket).into();
                }
            }
            key if resource_args::KEYS.contains(&key) => {
                let resources = disk.resources.mut_or_insert_default();
                resource_args::set(resources, key, value).map_err(|e| format!("{option}: {e}"))?;
            }
            "lock" => disk.unlocked = !parse_switch(&option, key, value)?,
            _ => return Err(format!("{option}: {key:?} is unknown: the keys are {KEYS}")),
        }
    }
    if disk.path.is_empty() {
        return Err(format!("{option}: path=FILE is missing"));
    }
    if disk.id.is_empty() {
        disk.id = format!("disk{index}");
    }
    check_id(&disk.id).map_err(|e| format!("{option}: id={}: {e}", disk.id))?;
    if !disk.backing_paths.is_empty() && disk.format != Format::QCOW2.into() {
        return Err(format!(
            "{option}: backing= is for qcow2: add format=qcow2, or leave it out"
        ));
    }
    Ok(disk)
}

/// A limit, `bps` or `iops`: N[:BURST]. 0 lifts it.
///
/// # Errors
/// One line that names the key and what it takes.
pub fn parse_bucket(key: &str, value: &str) -> Result<TokenBucket, String> {
    let bytes = key == "bps";
    let number = |text: &str| match text {
        "0" => Some(0),
        text if bytes => parse_size(text).ok(),
        text => text.parse().ok(),
    };
    let (rate, burst) = match value.split_once(':') {
        Some((rate, burst)) => (number(rate), number(burst).filter(|n| *n > 0)),
        None => (number(value), Some(0)),
    };
    match (rate, burst) {
        (Some(per_second), Some(burst)) if per_second > 0 || burst == 0 => {
            let mut bucket = TokenBucket::new();
            (bucket.per_second, bucket.burst) = (per_second, burst);
            Ok(bucket)
        }
        _ => {
            let what = if bytes {
                "bytes per second and bytes, such as 100M:1M"
            } else {
                "operations per second and operations, such as 5000:500"
            };
            Err(format!(
                "{key}={value}: give N or N:BURST, {what}; 0 for no limit"
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_have_ids_of_their_own() {
        let disk = parse_disk("path=/a,readonly=on,id=root", 0).unwrap();
        assert!(disk.readonly);
        assert_eq!((disk.path.as_str(), disk.id.as_str()), ("/a", "root"));
        assert_eq!(parse_disk("path=/a", 3).unwrap().id, "disk3");
    }

    #[test]
    fn a_comma_in_a_path_is_written_twice() {
        let disk = parse_disk("path=/a,,b,id=root", 0).unwrap();
        assert_eq!((disk.path.as_str(), disk.id.as_str()), ("/a,b", "root"));
        assert!(parse_disk("path=/a,b,id=root", 0).is_err());
    }

    #[test]
    fn every_key_is_read() {
        let text = "path=/a,serial=S1,queues=2,format=qcow2,cache=unsafe,backing=/b:/c,max-size=1G,bps=10M:1M,iops=500,lock=off";
        let disk = parse_disk(text, 0).unwrap();
        assert_eq!((disk.serial.as_str(), disk.queues), ("S1", 2));
        assert_eq!(disk.format, Format::QCOW2.into());
        assert_eq!(disk.cache, Cache::UNSAFE.into());
        assert_eq!(disk.backing_paths, ["/b", "/c"]);
        assert_eq!(disk.max_size, 1 << 30);
        let limits = disk.limits.unwrap();
        assert_eq!(
            (limits.bytes.per_second, limits.bytes.burst),
            (10 << 20, 1 << 20)
        );
        let operations = limits.operations.unwrap();
        assert_eq!((operations.per_second, operations.burst), (500, 0));
        assert!(disk.unlocked);
    }

    #[test]
    fn the_plain_form_is_raw_uncached_and_locked() {
        let disk = parse_disk("path=/a", 0).unwrap();
        assert_eq!(disk.format, Format::RAW.into());
        assert_eq!(disk.cache, Cache::CACHE_NONE.into());
        assert!(!disk.unlocked && disk.limits.is_none() && disk.max_size == 0);
        assert!(!parse_disk("path=/a,lock=on", 0).unwrap().unlocked);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (bad, named) in [
            ("", "KEY=VALUE"),
            ("/a", "KEY=VALUE"),
            ("path=", "empty"),
            ("path=/a,readonly=yes", "readonly=yes"),
            ("path=/a,id=../x", "id=../x"),
            ("path=/a,ro=on", "\"ro\""),
            ("path=/a,path=/b", "path= is given twice"),
            ("path=/a,iops=5,id=a,iops=6", "iops= is given twice"),
            ("id=x", "path=FILE"),
            ("path=/a,format=vhd", "format=vhd"),
            ("path=/a,cache=directsync", "cache=directsync"),
            ("path=/a,backing=/b", "format=qcow2"),
            ("path=/a,format=qcow2,backing=", "empty"),
            ("path=/a,max-size=much", "max-size=much"),
            ("path=/a,bps=1K:0", "bps=1K:0"),
            ("path=/a,bps=0:1K", "bps=0:1K"),
            ("path=/a,iops=1K", "iops=1K"),
            ("path=/a,lock=no", "lock=no"),
            ("path=/a,queues=0", "queues"),
        ] {
            let error = parse_disk(bad, 0).unwrap_err();
            assert!(error.starts_with("--disk "), "{error}");
            assert!(error.contains(named), "{bad}: {error}");
            assert!(!error.contains('\n'));
        }
        assert_eq!(parse_bucket("iops", "0").unwrap().per_second, 0);
    }
}
