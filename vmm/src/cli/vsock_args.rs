//! `--vsock` of `bulkhead run` and `bulkhead ctl create`: text in, [`VsockConfig`] out. Runs in the
//! command line's process.

use bulkhead_proto::machine::VsockConfig;

use super::machine_args::{Keys, absolute, check_id, split_option};
use super::resource_args;

/// What `--vsock` takes, for its errors.
const VSOCK_FORM: &str = "socket=PATH[,cid=N][,id=NAME][,cpu=PERCENT][,memory=SIZE][,pids=N]";

/// A socket device from its option.
///
/// # Errors
/// One line that names the option, the key and what it takes.
pub fn parse_vsock(text: &str) -> Result<VsockConfig, String> {
    let option = format!("--vsock {text}");
    let mut vsock = VsockConfig::new();
    vsock.id = "vsock".to_owned();
    let parts = split_option(text);
    let mut keys = Keys::default();
    for part in parts.iter().map(String::as_str) {
        let unknown = |what: &str| {
            Err(format!(
                "{option}: {what:?} is unknown: the form is {VSOCK_FORM}"
            ))
        };
        let Some((key, value)) = part.split_once('=') else {
            return unknown(part);
        };
        keys.once(&option, key)?;
        match key {
            "socket" => vsock.socket = absolute(&option, value)?,
            "cid" => match value.parse() {
                Ok(cid) if (3..u32::MAX).contains(&cid) => vsock.cid = cid,
                _ => {
                    return Err(format!(
                        "{option}: cid={value}: give the guest's address, 3 to 4294967294"
                    ));
                }
            },
            "id" => vsock.id = value.to_owned(),
            key if resource_args::KEYS.contains(&key) && key != "io" => {
                let resources = vsock.resources.mut_or_insert_default();
                resource_args::set(resources, key, value).map_err(|e| format!("{option}: {e}"))?;
            }
            _ => return unknown(key),
        }
    }
    if vsock.socket.is_empty() {
        return Err(format!(
            "{option}: socket=PATH is missing: name the socket that clients connect to"
        ));
    }
    check_id(&vsock.id).map_err(|e| format!("{option}: id={}: {e}", vsock.id))?;
    Ok(vsock)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_needed_and_nothing_else() {
        let plain = parse_vsock("socket=/run/v").unwrap();
        assert_eq!(
            (plain.id.as_str(), plain.socket.as_str(), plain.cid),
            ("vsock", "/run/v", 0)
        );
        let all = parse_vsock("socket=/run/v,cid=77,id=v,cpu=50").unwrap();
        assert_eq!(
            (all.id.as_str(), all.cid, all.resources.cpu_percent),
            ("v", 77, 50)
        );
        for bad in [
            "",
            "cid=3",
            "socket=",
            "socket=/a,cid=2",
            "socket=/a,cid=x",
            "socket=/a,id=/",
            "/a",
        ] {
            let line = parse_vsock(bad).unwrap_err();
            assert!(line.starts_with("--vsock"), "{line}");
        }
    }
}
