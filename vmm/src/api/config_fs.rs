//! What directories of the host's must look like in a configuration: the part of `config` that knows
//! them. Called on the `api` thread for every Create.

use std::collections::BTreeSet;

use bulkhead_proto::machine::MachineConfig;

use super::config::{known, path};
use super::config_net::take_id;

/// Longest tag, bytes: what the configuration space has room for.
const MAX_TAG: usize = 36;

/// Checks `fs` of a configuration; `ids` are those taken so far.
///
/// # Errors
///
/// One line that names the field and what it takes.
pub(super) fn validate<'a>(
    config: &'a MachineConfig,
    ids: &mut BTreeSet<&'a str>,
) -> Result<(), String> {
    let mut tags = BTreeSet::new();
    for (index, fs) in config.fs.iter().enumerate() {
        let name = format!("config.fs[{index}]");
        known(&name, fs)?;
        take_id(&name, &fs.id, ids)?;
        let field = format!("{name}.tag");
        check_tag(&fs.tag).map_err(|why| format!("{field} {why}"))?;
        if !tags.insert(fs.tag.as_str()) {
            return Err(format!(
                "{field} {} is taken by another: give each its own",
                fs.tag
            ));
        }
        path(&format!("{name}.source"), &fs.source)?;
        if let Err(number) = fs.cache.enum_value() {
            return Err(format!("{name}.cache is {number}: give 0 to 3"));
        }
        let resources = fs.resources.as_ref();
        super::config_resources::check(&format!("{name}.resources"), resources, false)?;
    }
    Ok(())
}

/// The name that a guest mounts a directory by.
///
/// # Errors
/// What it is, and what to give.
pub(crate) fn check_tag(tag: &str) -> Result<(), String> {
    if tag.len() > MAX_TAG {
        return Err(format!(
            "has {} bytes: give a name of at most {MAX_TAG}",
            tag.len()
        ));
    }
    if let Some(control) = tag.chars().find(|c| c.is_control()) {
        return Err(format!(
            "has the control character {:?}: give letters, digits and other visible characters",
            control
        ));
    }
    if tag.is_empty() {
        return Err("is empty: give the name to mount it by, 1 to 36 bytes".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_proto::machine::FsConfig;
    use bulkhead_proto::protobuf::EnumOrUnknown;

    fn checked(change: impl FnOnce(&mut FsConfig)) -> Result<(), String> {
        let mut config = MachineConfig::new();
        let mut fs = FsConfig::new();
        fs.id = "home".into();
        fs.tag = "home".into();
        fs.source = "/srv/home".into();
        config.fs.push(fs.clone());
        (fs.id, fs.tag) = ("other".into(), "other".into());
        change(&mut fs);
        config.fs.push(fs);
        validate(&config, &mut BTreeSet::from(["disk0"]))
    }

    #[test]
    fn errors_name_the_field() {
        assert_eq!(checked(|_| {}), Ok(()));
        assert_eq!(checked(|fs| fs.tag = "x".repeat(36)), Ok(()));
        for (field, checked) in [
            ("id", checked(|fs| fs.id.clear())),
            ("id disk0", checked(|fs| fs.id = "disk0".into())),
            ("tag", checked(|fs| fs.tag.clear())),
            ("tag home", checked(|fs| fs.tag = "home".into())),
            (
                "tag has 37 bytes: give a name of at most 36",
                checked(|fs| fs.tag = "x".repeat(37)),
            ),
            (
                "tag has the control character '\\0'",
                checked(|fs| fs.tag = "a\0b".into()),
            ),
            ("tag", checked(|fs| fs.tag = "a\nb".into())),
            ("tag", checked(|fs| fs.tag = "a\u{9b}b".into())),
            ("source", checked(|fs| fs.source = "srv".into())),
            ("cache", checked(|fs| fs.cache = EnumOrUnknown::from_i32(4))),
            (
                "resources.cpu_percent",
                checked(|fs| fs.resources.mut_or_insert_default().cpu_percent = u32::MAX),
            ),
        ] {
            let error = checked.unwrap_err();
            let field = format!("config.fs[1].{field}");
            assert!(error.starts_with(&field), "{field}: {error}");
        }
    }
}
