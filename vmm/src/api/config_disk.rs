//! What a disk's configuration, and a change to a disk that is in use, must look like before
//! anything is opened or asked for it. Called on the `api` thread for every Create and
//! UpdateDisk, and on the manager's.

use std::collections::BTreeMap;

use bulkhead_proto::common::DiskLimits;
use bulkhead_proto::machine::DiskConfig;
use bulkhead_proto::machine::disk_config::Format;

use super::config::{check_device_id, known, path, text};
use super::config_net::check_bucket;
use crate::cli::machine_args::MAX_CPUS;

/// VIRTIO 1.2 section 5.2.6: the serial number of a disk.
const MAX_SERIAL: usize = 20;
/// Files of a backing chain: each is a descriptor of the process.
pub const MAX_BACKING: usize = 16;
/// Sizes are counted in these.
const SECTOR: u64 = 512;
/// Linux's off_t.
const MAX_SIZE: u64 = i64::MAX as u64 / SECTOR * SECTOR;

/// Checks one disk; `name` is the field's.
///
/// # Errors
///
/// One line that names the field and what it takes.
pub(super) fn check_disk(name: &str, disk: &DiskConfig) -> Result<(), String> {
    known(name, disk)?;
    check_device_id(&disk.id).map_err(|error| format!("{name}.id: {error}"))?;
    path(&format!("{name}.path"), &disk.path)?;
    check_serial(&format!("{name}.serial"), &disk.serial)?;
    if disk.queues > MAX_CPUS {
        return Err(format!(
            "{name}.queues is {}: give 0 to {MAX_CPUS}",
            disk.queues
        ));
    }
    let format = disk
        .format
        .enum_value()
        .map_err(|number| format!("{name}.format is {number}: give 0 (raw) or 1 (qcow2)"))?;
    disk.cache
        .enum_value()
        .map_err(|number| format!("{name}.cache is {number}: give 0 to 3"))?;
    if format == Format::RAW && !disk.backing_paths.is_empty() {
        return Err(format!(
            "{name}.backing_paths has entries: only a disk of format QCOW2 has backing files"
        ));
    }
    if disk.backing_paths.len() > MAX_BACKING {
        return Err(format!(
            "{name}.backing_paths has {} entries: at most {MAX_BACKING} are allowed; merge some with qemu-img rebase",
            disk.backing_paths.len()
        ));
    }
    for (index, backing) in disk.backing_paths.iter().enumerate() {
        path(&format!("{name}.backing_paths[{index}]"), backing)?;
    }
    check_limits(&format!("{name}.limits"), disk.limits.as_ref())?;
    let resources = disk.resources.as_ref();
    super::config_resources::check(&format!("{name}.resources"), resources, true)?;
    if disk.max_size != 0 && disk.readonly {
        return Err(format!(
            "{name}.max_size is {}: a read-only disk does not grow; leave it out",
            disk.max_size
        ));
    }
    if disk.max_size != 0 && !(SECTOR..=MAX_SIZE).contains(&disk.max_size) {
        return Err(format!(
            "{name}.max_size is {}: give {SECTOR} to {MAX_SIZE} bytes, or 0 for no limit",
            disk.max_size
        ));
    }
    Ok(())
}

/// Disks of one machine that lie in the same file: what one writes the other would not know of.
/// Links are found by the file's lock, later.
///
/// # Errors
///
/// One line that names both.
pub(super) fn check_together(disks: &[DiskConfig]) -> Result<(), String> {
    let mut files: BTreeMap<&str, Vec<&DiskConfig>> = BTreeMap::new();
    for disk in disks {
        let others = files.entry(&disk.path).or_default();
        let shares = |other: &&&DiskConfig| {
            disk.readonly && other.readonly || disk.unlocked && other.unlocked
        };
        if let Some(other) = others.iter().find(|other| !shares(other)) {
            return Err(format!(
                "disks {} and {} are both in {}: give each a file of its own, or readonly=on to both; lock=off to both is for guests that share it knowingly",
                other.id, disk.id, disk.path
            ));
        }
        others.push(disk);
    }
    Ok(())
}

/// A serial number goes into the process's command line, where a comma ends it.
fn check_serial(name: &str, serial: &str) -> Result<(), String> {
    text(name, serial, MAX_SERIAL)?;
    if serial.chars().all(|c| c.is_ascii_graphic() && c != ',') {
        return Ok(());
    }
    Err(format!(
        "{name} is {serial:?}: give letters, digits and other visible ASCII characters but ','"
    ))
}

/// Checks a size that a disk is to have; 0: none is wanted.
///
/// # Errors
///
/// One line that names the field and what it takes.
pub(super) fn check_size(name: &str, size: u64) -> Result<(), String> {
    if size > MAX_SIZE {
        return Err(format!("{name} is {size}: at most {MAX_SIZE} are possible"));
    }
    if !size.is_multiple_of(SECTOR) {
        return Err(format!(
            "{name} is {size}: give a multiple of {SECTOR} bytes"
        ));
    }
    Ok(())
}

/// Checks a disk's limits, if there are any.
///
/// # Errors
///
/// One line that names the field and what it takes.
pub(super) fn check_limits(name: &str, limits: Option<&DiskLimits>) -> Result<(), String> {
    let Some(limits) = limits else {
        return Ok(());
    };
    known(name, limits)?;
    for (field, bucket) in [
        ("bytes", limits.bytes.as_ref()),
        ("operations", limits.operations.as_ref()),
    ] {
        if let Some(bucket) = bucket {
            check_bucket(&format!("{name}.{field}"), bucket)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_proto::machine::disk_config::Cache;
    use bulkhead_proto::protobuf::{EnumOrUnknown, Message};

    fn good() -> DiskConfig {
        let mut disk = DiskConfig::new();
        disk.id = "root".into();
        disk.path = "/disk".into();
        disk
    }

    fn full() -> DiskConfig {
        let mut disk = good();
        disk.serial = "WD-1234:5".into();
        disk.format = Format::QCOW2.into();
        disk.cache = Cache::UNSAFE.into();
        disk.backing_paths = vec!["/a".into(); MAX_BACKING];
        disk.max_size = 1 << 40;
        let bytes = disk
            .limits
            .mut_or_insert_default()
            .bytes
            .mut_or_insert_default();
        (bytes.per_second, bytes.burst) = (1 << 20, 1 << 24);
        disk
    }

    #[test]
    fn two_disks_share_a_file_only_if_neither_writes_or_both_know() {
        let disk = |id: &str, readonly, unlocked| {
            let mut disk = DiskConfig::new();
            (disk.id, disk.path) = (id.into(), "/a".into());
            (disk.readonly, disk.unlocked) = (readonly, unlocked);
            disk
        };
        let together = |one, two| check_together(&[one, disk("x", true, true), two]);
        for (one, two, fits) in [
            (disk("a", false, false), disk("b", false, false), false),
            (disk("a", true, false), disk("b", false, true), false),
            (disk("a", true, true), disk("b", false, false), false),
            (disk("a", true, false), disk("b", true, false), true),
            (disk("a", false, true), disk("b", false, true), true),
        ] {
            let said = together(one, two);
            assert_eq!(said.is_ok(), fits, "{said:?}");
        }
        let mut other = disk("b", false, false);
        other.path = "/b".into();
        assert_eq!(check_together(&[disk("a", false, false), other]), Ok(()));
        let said = check_together(&[disk("a", false, false), disk("b", false, false)]);
        let said = said.unwrap_err();
        assert!(said.starts_with("disks a and b are both in /a: "), "{said}");
    }

    #[test]
    fn every_option_passes() {
        assert_eq!(check_disk("d", &good()), Ok(()));
        assert_eq!(check_disk("d", &full()), Ok(()));
    }

    #[test]
    fn errors_name_the_field() {
        type Change = fn(&mut DiskConfig);
        let cases: [(&str, Change); 13] = [
            ("d.path", |d| d.path = "disk".into()),
            ("d.serial", |d| d.serial = "x".repeat(21)),
            ("d.serial", |d| d.serial = "a,direct=on".into()),
            ("d.serial", |d| d.serial = "a b".into()),
            ("d.queues", |d| d.queues = 1000),
            ("d.format", |d| d.format = EnumOrUnknown::from_i32(7)),
            ("d.cache", |d| d.cache = EnumOrUnknown::from_i32(7)),
            ("d.backing_paths", |d| d.format = Format::RAW.into()),
            ("d.backing_paths", |d| {
                d.backing_paths = vec!["/a".into(); 17]
            }),
            ("d.backing_paths[1]", |d| d.backing_paths[1] = "a".into()),
            ("d.limits.bytes.burst", |d| {
                d.limits
                    .mut_or_insert_default()
                    .bytes
                    .mut_or_insert_default()
                    .per_second = 0;
            }),
            ("d.max_size", |d| d.readonly = true),
            ("d.max_size", |d| d.max_size = 511),
        ];
        for (field, change) in cases {
            let mut disk = full();
            change(&mut disk);
            let error = check_disk("d", &disk).unwrap_err();
            assert!(error.starts_with(field), "{field}: {error}");
            assert!(!error.contains('\n'));
        }
    }

    #[test]
    fn a_limit_from_the_future_is_refused() {
        let mut disk = full();
        let limits = disk.limits.mut_or_insert_default();
        limits
            .mut_special_fields()
            .mut_unknown_fields()
            .add_varint(9, 1);
        let error = check_disk("d", &disk).unwrap_err();
        assert!(error.starts_with("d.limits has a field 9"), "{error}");
    }

    #[test]
    fn sizes_are_whole_sectors_that_exist() {
        for good in [0, 512, 1 << 40, MAX_SIZE] {
            assert_eq!(check_size("s", good), Ok(()));
        }
        for bad in [1, 511, 513, MAX_SIZE + 512, u64::MAX] {
            assert!(
                check_size("s", bad).unwrap_err().starts_with("s is"),
                "{bad}"
            );
        }
    }
}
