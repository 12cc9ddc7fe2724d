//! What to do about a back-end of somebody else's that does not serve, by what is said of it.
//! Called on the manager thread, and by threads that add a device.

use super::device::Site;

/// What to do about one that fails in one of these ways.
const REMEDIES: [(&str, &str); 5] = [
    (
        "closed its vhost-user channel",
        "what it logs says why; it must serve this kind of device and have no other front-end",
    ),
    (
        "in time",
        "it must be a vhost-user back-end that has no other front-end: restart it",
    ),
    (
        "broke the vhost-user protocol",
        "name the socket of a vhost-user back-end for this kind of device",
    ),
    (
        "does not offer VIRTIO_F_VERSION_1",
        "it must be a back-end of virtio 1 or later: start one that is",
    ),
    (
        "nobody connected",
        "start the back-end as a client of this socket",
    ),
];

/// Why a back-end that is somebody else's does not serve, with a remedy; the device's name, which
/// stands before it already, left out.
pub fn of_others(id: &str, why: &str) -> String {
    let why = bare(id, why);
    match remedy(why) {
        Some(remedy) => format!("{why}: {remedy}"),
        None => why.to_owned(),
    }
}

/// The same of a helper, which nobody starts but the launcher: without a remedy.
pub fn bare<'a>(id: &str, why: &'a str) -> &'a str {
    let name = format!("device {id}: ");
    let why = why.strip_prefix(&name).unwrap_or(why);
    why.strip_prefix("taking over: ").unwrap_or(why)
}

/// The same of a device that is being made: a machine that is made with it may do without.
pub fn of_first(id: &str, why: &str, optional: bool, site: &Site<'_>) -> String {
    or_without(&of_others(id, why), optional || !site.at_start)
}

fn or_without(line: &str, decided: bool) -> String {
    match remedy(line) {
        Some(_) if !decided => format!("{line}, or give required=off"),
        _ => line.to_owned(),
    }
}

fn remedy(why: &str) -> Option<&'static str> {
    let found = REMEDIES.iter().find(|(sign, _)| why.contains(sign));
    found.map(|(_, remedy)| *remedy)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost_user::{VhostUserError, Violation};
    use crate::virtio::VirtioError;

    #[test]
    fn somebody_elses_process_is_named_once_and_has_a_remedy() {
        let legacy = VirtioError::Legacy("n0".into()).to_string();
        let line = of_others("n0", &legacy);
        assert!(line.starts_with("its back-end does not offer"), "{line}");
        assert!(line.ends_with("start one that is"), "{line}");
        for why in [
            VhostUserError::Closed,
            VhostUserError::Timeout("GET_FEATURES"),
            VhostUserError::Violation(Violation::Flood),
        ] {
            let why = why.to_string();
            let line = of_others("n0", &format!("device n0: taking over: {why}"));
            assert!(line.starts_with(&format!("{why}: ")), "{line}");
            assert!(!line.contains("required=off"), "{line}");
            let needed = or_without(&line, false);
            assert!(needed.ends_with(", or give required=off"), "{needed}");
            assert_eq!(or_without(&line, true), line);
        }
        assert_eq!(or_without("no such file", false), "no such file");
    }
}
