//! What a socket device must look like in a configuration: the part of `config` that knows it.
//! Called on the `api` thread for every Create.

use std::collections::BTreeSet;

use bulkhead_proto::machine::MachineConfig;

use super::config::{known, path};
use super::config_net::take_id;

/// Checks `vsock` of a configuration; `ids` are those taken so far.
///
/// # Errors
///
/// One line that names the field and what it takes.
pub(super) fn validate<'a>(
    config: &'a MachineConfig,
    ids: &mut BTreeSet<&'a str>,
) -> Result<(), String> {
    let Some(vsock) = config.vsock.as_ref() else {
        return Ok(());
    };
    let name = "config.vsock";
    known(name, vsock)?;
    take_id(name, &vsock.id, ids)?;
    path("config.vsock.socket", &vsock.socket)?;
    if vsock.cid != 0 && !(3..u32::MAX).contains(&vsock.cid) {
        return Err(format!(
            "{name}.cid is {}: give the guest's address, 3 to 4294967294, or 0 for 3",
            vsock.cid
        ));
    }
    super::config_resources::check("config.vsock.resources", vsock.resources.as_ref(), false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_proto::machine::VsockConfig;

    fn checked(change: impl FnOnce(&mut VsockConfig)) -> Result<(), String> {
        let mut config = MachineConfig::new();
        let mut vsock = VsockConfig::new();
        (vsock.id, vsock.socket) = ("vsock".into(), "/run/v".into());
        change(&mut vsock);
        config.vsock = Some(vsock).into();
        validate(&config, &mut BTreeSet::from(["disk0"]))
    }

    #[test]
    fn errors_name_the_field() {
        assert_eq!(checked(|_| {}), Ok(()));
        assert_eq!(checked(|vsock| vsock.cid = 3), Ok(()));
        for (field, checked) in [
            ("id disk0", checked(|vsock| vsock.id = "disk0".into())),
            ("socket", checked(|vsock| vsock.socket = "v".into())),
            ("cid", checked(|vsock| vsock.cid = 2)),
            ("cid", checked(|vsock| vsock.cid = u32::MAX)),
        ] {
            let error = checked.unwrap_err();
            assert!(
                error.starts_with(&format!("config.vsock.{field}")),
                "{error}"
            );
        }
    }
}
