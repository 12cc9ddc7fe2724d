//! Taps before confinement: those that the VMM inherited, those that it opens by their
//! names in the caller's network namespace because the machine is known from the start, and
//! those of a namespace that was made for a machine which is to come (a pod's). The main thread makes a [`Prepared`] as its first act, when every open descriptor beyond the
//! standard ones is an inherited one; the manager thread takes from it while it makes the
//! machine, when nothing can be opened any more but by the launcher.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use bulkhead_proto::machine::{
    MachineConfig, NetConfig, TapBackend, net_config, tap_backend::Datapath,
};

use super::net_mac::MacAddress;
use crate::launcher::{Launcher, LauncherError, tap};

/// A tap and how its packets move.
#[derive(Debug)]
pub struct Link {
    /// The tap.
    pub tap: tap::Tap,
    /// Descriptors of vhost-net, one for each queue; none: bulkhead-net moves the packets.
    pub vhost: Vec<OwnedFd>,
}

/// An interface by its name and the host's address of it.
type Interface = (String, Option<[u8; 6]>);

/// What was opened before confinement.
pub struct Prepared {
    /// Taps by the number under which they were inherited.
    inherited: BTreeMap<i32, tap::Inherited>,
    /// Of what each of those was a queue, also once a device has it.
    interfaces: BTreeMap<i32, Interface>,
    /// As many descriptors of vhost-net, or why there are none.
    vhost: Result<Vec<OwnedFd>, String>,
    /// Taps by the id of the device. An error is told when the machine is made.
    links: BTreeMap<String, Result<Link, String>>,
    /// Taps by their names, one queue each, of a namespace that is not the host's.
    present: BTreeMap<String, Link>,
    /// What tells this host from others.
    host: String,
}

impl Prepared {
    /// Takes the inherited taps, and opens those that `first` names.
    #[must_use]
    pub fn new(first: Option<&MachineConfig>) -> Self {
        let inherited = tap::inherited();
        let interfaces = inherited.iter();
        let interfaces = interfaces.map(|(number, queue)| (*number, queue.interface()));
        let mut prepared = Self {
            interfaces: interfaces.collect(),
            vhost: tap::open_vhost_net(inherited.len()),
            inherited,
            links: BTreeMap::new(),
            present: BTreeMap::new(),
            host: std::fs::read_to_string("/etc/machine-id").unwrap_or_default(),
        };
        for net in first.map(|c| c.nets.as_slice()).unwrap_or_default() {
            if let Some(net_config::Backend::Tap(backend)) = &net.backend
                && !backend.name.is_empty()
            {
                let link = open(net, backend);
                prepared.links.insert(net.id.clone(), link);
            }
        }
        prepared
    }

    /// Attaches to the taps of this network namespace, unless that is PID 1's: they were made
    /// for the machine that is to come. The launcher could attach only to those that have this
    /// user for their owner. What cannot be had is left to the launcher, which says why.
    #[must_use]
    pub fn with_taps_of_the_pod(mut self) -> Self {
        let namespace = |of: &str| std::fs::read_link(format!("/proc/{of}/ns/net"));
        match (namespace("self"), namespace("1")) {
            (Ok(own), Ok(hosts)) if own != hosts => {}
            _ => return self,
        }
        let interfaces = std::fs::read_to_string("/proc/self/net/dev").unwrap_or_default();
        for name in interface_names(&interfaces) {
            match tap::open_existing(name) {
                Ok(tap) => {
                    let vhost = tap::open_vhost_net(1).unwrap_or_default();
                    self.present.insert(name.to_owned(), Link { tap, vhost });
                }
                Err(why) => log::debug!("{why}"),
            }
        }
        self
    }

    /// Lets go of the taps of the namespace that no device of the machine has taken.
    pub fn let_go(&mut self) {
        self.present.clear();
    }

    /// Whether no two devices would have queues of one inherited tap: the kernel would share the
    /// frames out between them. A tap that one of them names and another has a descriptor of is
    /// not seen here.
    ///
    /// # Errors
    /// One line that names the descriptor, the tap and who has it.
    pub fn check(&self, nets: &[NetConfig]) -> Result<(), String> {
        let mut taken: BTreeMap<&Interface, &str> = BTreeMap::new();
        for net in nets {
            let Some(net_config::Backend::Tap(tap)) = &net.backend else {
                continue;
            };
            for number in &tap.fds {
                let Some(interface) = self.interfaces.get(number) else {
                    continue;
                };
                let other = *taken.entry(interface).or_insert(&net.id);
                if other != net.id {
                    let name = crate::launcher::printable(&interface.0);
                    return Err(format!(
                        "fd {number}: is a queue of tap {name}, which device {other} has: give each a tap of its own"
                    ));
                }
            }
        }
        Ok(())
    }

    /// The tap of a device, where it was opened before or inherited; `None`: the launcher is to
    /// open it ([`open_by_launcher`]), or it needs none. Waits for nobody.
    ///
    /// # Errors
    /// One line that names the tap and the remedy.
    pub fn take(&mut self, net: &NetConfig) -> Result<Option<Link>, String> {
        let Some(net_config::Backend::Tap(backend)) = &net.backend else {
            return Ok(None);
        };
        if backend.name.is_empty() {
            return self.adopt(net, backend).map(Some);
        }
        if let Some(link) = self.links.remove(&net.id) {
            return link.map(Some);
        }
        // Closed where it does not fit, so that the launcher finds it free.
        if let Some(mut link) = self.present.remove(&backend.name)
            && queue_pairs(net) == 1
        {
            match datapath(net, backend) {
                Datapath::VHOST_NET if link.vhost.is_empty() => {}
                Datapath::USER => {
                    link.vhost.clear();
                    return Ok(Some(link));
                }
                _ => return Ok(Some(link)),
            }
        }
        Ok(None)
    }

    /// The inherited descriptors that a configuration names.
    fn adopt(&mut self, net: &NetConfig, backend: &TapBackend) -> Result<Link, String> {
        let mut fds = Vec::new();
        for number in &backend.fds {
            let fd = self.inherited.remove(number).ok_or_else(|| {
                format!(
                    "fd {number}: is no tap that bulkhead inherited, or another device has it: pass one that is attached with IFF_TAP | IFF_NO_PI | IFF_VNET_HDR"
                )
            })?;
            fds.push((*number, fd));
        }
        let tap = tap::adopt(fds)?;
        let count = tap.queues.len();
        let vhost = match (datapath(net, backend), &mut self.vhost) {
            (Datapath::USER, _) | (Datapath::AUTO, Err(_)) => Vec::new(),
            (Datapath::VHOST_NET, Err(why)) => return Err(why.clone()),
            (_, Ok(pool)) => pool.split_off(pool.len().saturating_sub(count)),
        };
        Ok(Link { tap, vhost })
    }

    /// Fills in what a checked configuration leaves to us: queue pairs and MAC addresses.
    pub fn fill_defaults(&self, config: &mut MachineConfig) {
        for net in &mut config.nets {
            self.fill_net(net);
        }
    }

    /// The same of one device.
    pub fn fill_net(&self, net: &mut NetConfig) {
        net.queues = queue_pairs(net);
        if net.mac.is_empty() {
            let words = [self.host.trim(), &self.place(net), &net.id];
            net.mac = MacAddress::derived(&words).bytes().to_vec();
        }
    }

    /// What a device is attached to, by a name that no other has on this host.
    fn place(&self, net: &NetConfig) -> String {
        match &net.backend {
            Some(net_config::Backend::Tap(tap)) if !tap.name.is_empty() => tap.name.clone(),
            Some(net_config::Backend::Tap(tap)) => tap
                .fds
                .first()
                .and_then(|number| self.inherited.get(number))
                .map(|queue| queue.name().to_owned())
                .unwrap_or_default(),
            Some(net_config::Backend::VhostUser(switch)) => switch.socket.clone(),
            _ => String::new(),
        }
    }
}

/// A tap that the launcher opens now.
///
/// # Errors
/// One line that names the tap and the remedy.
pub fn open_by_launcher(
    net: &NetConfig,
    backend: &TapBackend,
    launcher: &Launcher,
) -> Result<Link, String> {
    let open = |vhost_net| launcher.open_tap(&backend.name, queue_pairs(net), vhost_net);
    let opened = match datapath(net, backend) {
        Datapath::USER => open(false),
        Datapath::VHOST_NET => open(true),
        Datapath::AUTO => match open(true) {
            // It is /dev/vhost-net that cannot be had, not the tap.
            Err(LauncherError::Refused(why)) if why.starts_with(tap::VHOST_NET) => open(false),
            other => other,
        },
    };
    let (tap, vhost) = opened.map_err(|e| e.to_string())?;
    Ok(Link { tap, vhost })
}

/// Interfaces in the text of /proc/net/dev: two lines of heads, then `name: numbers`.
fn interface_names(text: &str) -> impl Iterator<Item = &str> {
    let lines = text.lines().skip(2);
    let names = lines.filter_map(|line| line.split_once(':').map(|(name, _)| name.trim()));
    names.filter(|name| *name != "lo")
}

/// Opens a tap by its name with the rights of the caller.
fn open(net: &NetConfig, backend: &TapBackend) -> Result<Link, String> {
    let tap = tap::open_patiently(&backend.name, queue_pairs(net), net.mtu)?;
    let vhost = match datapath(net, backend) {
        Datapath::USER => Vec::new(),
        Datapath::AUTO => tap::open_vhost_net(tap.queues.len()).unwrap_or_default(),
        Datapath::VHOST_NET => tap::open_vhost_net(tap.queues.len())?,
    };
    Ok(Link { tap, vhost })
}

/// Queue pairs of a device: as many as it names descriptors, else one unless it says more.
fn queue_pairs(net: &NetConfig) -> u32 {
    match &net.backend {
        Some(net_config::Backend::Tap(tap)) if !tap.fds.is_empty() => {
            u32::try_from(tap.fds.len()).unwrap_or(u32::MAX)
        }
        _ => net.queues.max(1),
    }
}

/// Which datapath is asked for. Limits are bulkhead-net's, so that they choose it.
fn datapath(net: &NetConfig, backend: &TapBackend) -> Datapath {
    match backend.datapath.enum_value_or_default() {
        Datapath::AUTO if net.to_guest.is_some() || net.from_guest.is_some() => Datapath::USER,
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nothing prepared: other tests' taps are among this process's descriptors.
    fn bare() -> Prepared {
        Prepared {
            inherited: BTreeMap::new(),
            interfaces: BTreeMap::new(),
            vhost: Ok(Vec::new()),
            links: BTreeMap::new(),
            present: BTreeMap::new(),
            host: "host\n".into(),
        }
    }

    fn net(id: &str, tap: &str) -> NetConfig {
        let mut net = NetConfig::new();
        net.id = id.into();
        net.set_tap(TapBackend::new());
        net.mut_tap().name = tap.into();
        net
    }

    fn filled(nets: Vec<NetConfig>) -> Vec<NetConfig> {
        let mut config = MachineConfig::new();
        config.nets = nets;
        bare().fill_defaults(&mut config);
        config.nets
    }

    #[test]
    fn defaults_are_one_pair_and_an_address_that_stays() {
        let nets = || vec![net("a", "tap0"), net("b", "tap0"), net("a", "tap1")];
        let first = filled(nets());
        assert_eq!(first, filled(nets()));
        assert!(
            first
                .iter()
                .all(|n| n.queues == 1 && MacAddress::new(&n.mac).is_ok())
        );
        assert!(first[0].mac != first[1].mac && first[0].mac != first[2].mac);
        let mut given = net("a", "tap0");
        given.mac = vec![2, 0, 0, 0, 0, 9];
        given.queues = 3;
        let given = filled(vec![given]).remove(0);
        assert_eq!((given.mac[5], given.queues), (9, 3));
        let mut fds = net("a", "");
        fds.mut_tap().fds = vec![98, 99];
        assert_eq!(filled(vec![fds])[0].queues, 2);
    }

    #[test]
    fn interfaces_are_read_from_what_the_kernel_prints() {
        let text = "Inter-|   Receive    |  Transmit
 face |bytes    packets errs
    lo:       0       0    0
tap0_kata: 1 2 3
  eth0:1 2 3
";
        let names: Vec<&str> = interface_names(text).collect();
        assert_eq!(names, ["tap0_kata", "eth0"]);
        assert_eq!(interface_names("").count(), 0);
    }

    #[test]
    fn two_devices_never_have_queues_of_one_inherited_tap() {
        let mut prepared = bare();
        for (number, name, address) in [(5, "t", 1), (6, "t", 1), (7, "t", 2), (8, "u", 3)] {
            let interface = (name.to_owned(), Some([address; 6]));
            prepared.interfaces.insert(number, interface);
        }
        let with = |fds: &[&[i32]]| {
            let nets = fds.iter().zip(["a", "b"]).map(|(fds, id)| {
                let mut net = net(id, "");
                net.mut_tap().fds = fds.to_vec();
                net
            });
            prepared.check(&nets.collect::<Vec<_>>())
        };
        assert_eq!(with(&[&[5, 6], &[8]]), Ok(()));
        assert_eq!(with(&[&[5], &[7]]), Ok(()), "of another network namespace");
        assert_eq!(with(&[&[98], &[99]]), Ok(()), "told when they are taken");
        let line = with(&[&[5], &[6]]).unwrap_err();
        let told = "fd 6: is a queue of tap t, which device a has";
        assert!(line.starts_with(told), "{line}");
    }

    #[test]
    fn limits_choose_the_datapath_that_knows_them() {
        let plain = net("a", "tap0");
        assert_eq!(datapath(&plain, plain.tap()), Datapath::AUTO);
        let mut limited = plain.clone();
        limited.to_guest.mut_or_insert_default();
        assert_eq!(datapath(&limited, limited.tap()), Datapath::USER);
    }

    #[test]
    fn a_descriptor_that_was_not_inherited_is_refused_by_its_number() {
        let mut prepared = bare();
        let mut wrong = net("a", "");
        wrong.mut_tap().fds = vec![4001];
        let line = prepared.adopt(&wrong, wrong.tap()).unwrap_err();
        assert!(line.starts_with("fd 4001: is no tap"), "{line}");
    }
}
