//! What is said of a device whose back-end is somebody else's: that it has none, that it takes no
//! such request, and what it waits for.

use super::{Origin, Phase, Switch};

impl Switch {
    /// That it has no back-end and will have none, with the remedy.
    pub fn absence(&self) -> Option<String> {
        match &self.origin {
            Origin::Nothing(why) => Some(absent(why)),
            _ => None,
        }
    }

    /// Why it is not drained or resumed, with the remedy.
    pub fn takes_none(&self) -> String {
        match &self.origin {
            Origin::Nothing(why) => absent(why),
            Origin::Helper(kind, _) => {
                format!("{kind} takes no such request, and is started again by itself when it ends")
            }
            _ => "its back-end is somebody else's process, which takes no such request: ask that"
                .to_owned(),
        }
    }

    /// What is to be said of it when the machine is made: kind and detail of an event.
    pub fn announcement(&self) -> (&'static str, String) {
        let kind = &self.kind;
        match (&self.phase, &self.origin) {
            (Phase::Serving { .. }, origin) => ("device.ready", format!("{kind} behind {origin}")),
            (_, Origin::Nothing(why)) => ("device.absent", format!("{kind}: {why}")),
            (_, origin) => {
                let meanwhile = match self.net {
                    Some(_) => "its link is down",
                    None => "nobody serves it",
                };
                (
                    "device.disconnected",
                    format!("{kind} waits for {origin}; until it comes, {meanwhile}"),
                )
            }
        }
    }
}

/// Of a device without a back-end: it was made without, for this reason.
fn absent(why: &str) -> String {
    format!(
        "it has no back-end, and its link stays down ({why}): once that is mended, remove-device and add-net bring it back"
    )
}
