//! What entropy devices must look like in a configuration: the part of `config` that knows them.
//! Called on the `api` thread for every Create.

use std::collections::BTreeSet;

use bulkhead_proto::machine::MachineConfig;

use super::config::known;
use super::config_net::{check_bucket, take_id};

/// Checks `rngs` of a configuration; `ids` are those taken so far.
///
/// # Errors
///
/// One line that names the field and what it takes.
pub(super) fn validate<'a>(
    config: &'a MachineConfig,
    ids: &mut BTreeSet<&'a str>,
) -> Result<(), String> {
    for (index, rng) in config.rngs.iter().enumerate() {
        let name = format!("config.rngs[{index}]");
        known(&name, rng)?;
        take_id(&name, &rng.id, ids)?;
        if let Some(bytes) = rng.bytes.as_ref() {
            check_bucket(&format!("{name}.bytes"), bytes)?;
        }
        let resources = rng.resources.as_ref();
        super::config_resources::check(&format!("{name}.resources"), resources, false)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_proto::machine::RngConfig;

    fn checked(change: impl FnOnce(&mut RngConfig)) -> Result<(), String> {
        let mut config = MachineConfig::new();
        let mut rng = RngConfig::new();
        rng.id = "dice".into();
        change(&mut rng);
        config.rngs.push(rng);
        validate(&config, &mut BTreeSet::from(["disk0"]))
    }

    #[test]
    fn errors_name_the_field() {
        assert_eq!(checked(|_| {}), Ok(()));
        let limited = checked(|rng| rng.bytes.mut_or_insert_default().per_second = 1);
        assert_eq!(limited, Ok(()));
        for (field, checked) in [
            ("id", checked(|rng| rng.id.clear())),
            ("id disk0", checked(|rng| rng.id = "disk0".into())),
            (
                "bytes.burst",
                checked(|rng| rng.bytes.mut_or_insert_default().burst = 1),
            ),
            (
                "resources.pids",
                checked(|rng| rng.resources.mut_or_insert_default().pids = u32::MAX),
            ),
            (
                "resources.io",
                checked(|rng| {
                    let resources = rng.resources.mut_or_insert_default();
                    resources.io.mut_or_insert_default().read_bps = 1;
                }),
            ),
        ] {
            let error = checked.unwrap_err();
            let field = format!("config.rngs[0].{field}");
            assert!(error.starts_with(&field), "{field}: {error}");
        }
    }
}
