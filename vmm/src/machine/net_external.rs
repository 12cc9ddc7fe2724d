//! Makes devices whose back-end is somebody else's: network devices behind a switch or passt,
//! directories behind virtiofsd (`fs`), and any other vhost-user device. On the manager thread while the machine is made, so that
//! it may wait for a back-end, within bounds; what comes later is `net_switch`'s.

use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_proto::common::Resources;
use bulkhead_proto::machine::{
    MachineConfig, NetConfig, UserBackend, VhostUserConfig, net_config, user_backend::forward,
};

use super::device::{self, Device, END_LIMIT, Site, Special};
use super::kinds;
use super::net_kinds;
use super::net_mac::MacAddress;
use super::net_remedies::{of_first, of_others};
use super::net_switch::{HelperProcess, NetFacts, Origin, Switch};
use super::usage::Usage;
use crate::launcher::{Least, Program, helper, printable, sys};
use crate::vhost_user::Frontend;
use crate::virtio::{MAX_QUEUES, VirtioPciOptions};

/// How long one vhost-user message may take.
const MESSAGE_LIMIT: Duration = Duration::from_secs(5);
/// How long a back-end has to connect to our socket before the machine is given up.
const ACCEPT_LIMIT: Duration = Duration::from_secs(10);
/// Queues of a device that nothing is known of.
const UNKNOWN_QUEUES: u16 = 1;
/// Address that a forwarded port listens on when nothing is said.
const LOOPBACK: &str = "127.0.0.1";

/// The external helpers that a launcher is to have, opened before confinement: passt for a
/// machine with a user-mode network, virtiofsd for one with a directory, and each wherever it is
/// named, since a device may be added later.
///
/// # Errors
/// One line with the remedy: a network that the machine cannot do without has no passt.
pub fn helpers(
    machine: Option<&MachineConfig>,
    passt: Option<PathBuf>,
    virtiofsd: Option<PathBuf>,
) -> Result<Vec<Program>, String> {
    let mut all = passt_for(machine, passt)?;
    if virtiofsd.is_some() || machine.is_some_and(|machine| !machine.fs.is_empty()) {
        all.push(Program::find_virtiofsd(virtiofsd.as_deref())?);
    }
    Ok(all)
}

fn passt_for(
    machine: Option<&MachineConfig>,
    passt: Option<PathBuf>,
) -> Result<Vec<Program>, String> {
    let users = |machine: &MachineConfig| {
        let users = machine.nets.iter().filter(|net| net.has_user());
        users.map(|net| net.optional).collect::<Vec<_>>()
    };
    let users = machine.map(users).unwrap_or_default();
    if users.is_empty() && passt.is_none() {
        return Ok(Vec::new());
    }
    match Program::find(passt.as_deref()) {
        Ok(program) => Ok(vec![program]),
        Err(why) if !users.is_empty() && users.iter().all(|optional| *optional) => {
            // The device says that it has none; why one that was named cannot be had, only this.
            let level = if passt.is_some() {
                log::Level::Warn
            } else {
                log::Level::Debug
            };
            log::log!(level, "{why}");
            Ok(Vec::new())
        }
        Err(why) => Err(why),
    }
}

/// A back-end as it is had at first.
pub(super) struct First {
    origin: Origin,
    /// `None`: it is not there yet.
    frontend: Option<Frontend>,
    /// A helper's.
    process: Option<HelperProcess>,
    /// What a helper uses of the host.
    usage: Option<Arc<Usage>>,
    /// Why it is not there.
    missing: Option<String>,
    /// A network device may be without it.
    optional: bool,
}

impl First {
    /// It is not there.
    fn without(origin: Origin) -> Self {
        Self {
            origin,
            frontend: None,
            process: None,
            usage: None,
            missing: None,
            optional: false,
        }
    }
}

/// A network device behind a switch, behind passt, or (`Nothing`, by `absent`) behind
/// nothing.
///
/// # Errors
/// One line that names the device or its socket, and the remedy; nothing stays behind.
pub fn make_net(net: &NetConfig, site: &Site<'_>) -> Result<Device, String> {
    let first = match &net.backend {
        Some(net_config::Backend::VhostUser(switch)) => reach(
            &net.id,
            Path::new(&switch.socket),
            switch.server,
            net.optional,
            site,
        )?,
        Some(net_config::Backend::User(user)) => start_passt(net, user, site)?,
        _ => return Err(format!("device {}: has no back-end: give one", net.id)),
    };
    finish_net(net, first, site)
}

/// A network device whose tap cannot be had, for this reason: its link stays down.
///
/// # Errors
/// One line.
pub fn make_absent(net: &NetConfig, why: String, site: &Site<'_>) -> Result<Device, String> {
    finish_net(net, First::without(Origin::Nothing(why)), site)
}

fn finish_net(net: &NetConfig, first: First, site: &Site<'_>) -> Result<Device, String> {
    let mac = MacAddress::new(&net.mac)
        .map_err(|error| format!("device {}: its MAC {error}", net.id))?
        .bytes();
    let pairs = u16::try_from(net.queues).unwrap_or(u16::MAX);
    let mtu = u16::try_from(net.mtu).unwrap_or(u16::MAX);
    let options = VirtioPciOptions::external_net(&net.id, mac, pairs, mtu);
    let facts = NetFacts { mac, mtu: net.mtu };
    finish("net", options, first, Some(facts), site)
}

/// A device of somebody else's, or why the machine starts without it.
pub enum Foreign {
    /// It is there.
    Made(Box<Device>),
    /// Its back-end is not, and it may be missing: kind and reason.
    Absent(String),
}

/// Any other device.
///
/// # Errors
/// One line that names the device or its socket, and the remedy; nothing stays behind.
pub fn make_any(config: &VhostUserConfig, site: &Site<'_>) -> Result<Foreign, String> {
    let known = net_kinds::by_id(config.device_id);
    let name = known.map_or_else(
        || format!("virtio-{}", config.device_id),
        |k| k.name.to_owned(),
    );
    let first = reach(
        &config.id,
        Path::new(&config.socket),
        config.server,
        config.optional,
        site,
    )?;
    if let Some(why) = first.missing {
        // What it offers nobody knows before it is there: the guest gets no device at all, and
        // nobody is to connect in vain.
        if let Origin::Listen(path, _) = &first.origin {
            let _ = site.launcher.forget(path);
        }
        return Ok(Foreign::Absent(format!("{name}: {why}")));
    }
    let queues = match u16::try_from(config.queues) {
        Ok(0) => known.map_or(UNKNOWN_QUEUES, |k| k.queues),
        Ok(queues) => queues,
        Err(_) => MAX_QUEUES,
    };
    let space = (!config.config.is_empty()).then(|| config.config.clone());
    let device_type = u16::try_from(config.device_id).unwrap_or(u16::MAX);
    let mut options = VirtioPciOptions::external(&config.id, device_type, queues, space);
    if let Ok(size @ 1..) = u16::try_from(config.queue_size) {
        options.queue_size = size;
    }
    let made = finish(&name, options, first, None, site);
    match made {
        Ok(made) => Ok(Foreign::Made(Box::new(made))),
        Err(why) if config.optional => Ok(Foreign::Absent(format!("{name}: {why}"))),
        Err(why) => Err(why),
    }
}

/// Puts the function in front.
pub(super) fn finish(
    kind: &str,
    mut options: VirtioPciOptions,
    first: First,
    net: Option<NetFacts>,
    site: &Site<'_>,
) -> Result<Device, String> {
    let First {
        origin,
        frontend,
        process,
        usage,
        mut missing,
        optional,
    } = first;
    let id = options.id.clone();
    let queues = options.queues.into();
    options.hook = Arc::clone(site.hook);
    let mut serving = frontend.is_some();
    let granted = match (&origin, serving) {
        (Origin::Helper(..), true) => vec!["vhost-user channel".to_owned()],
        _ => Vec::new(),
    };
    let mut made = device::attach(site, options.clone(), frontend);
    // One that does not fit is as good as none; a successor of it may.
    if let Err(why) = &made
        && serving
        && optional
        && net.is_some()
        && process.is_none()
    {
        let why = format!("{origin}: {}", of_first(&id, why, optional, site));
        log::warn!("device {id}: {why}; {} without it", subject(site));
        (serving, missing) = (false, Some(why));
        made = device::attach(site, options, None);
    }
    let (function, address, port) = made.map_err(|why| {
        if process.is_some() {
            return device::undo(site.launcher, &id, 1, &why);
        }
        if usage.is_some() {
            device::forget(site.launcher, &id, 1);
        }
        if let Origin::Listen(path, _) = &origin {
            let _ = site.launcher.forget(path);
        }
        format!(
            "device {id}: {origin}: {}",
            of_first(&id, &why, optional, site)
        )
    })?;
    let mut switch = Switch::new(&id, kind, origin, net, serving, Instant::now());
    switch.set_usage(usage);
    if let Some(why) = missing {
        // It was told: the same again is no news.
        switch.news(why.strip_prefix(&format!("device {id}: ")).unwrap_or(&why));
    }
    if let Some(process) = process {
        switch = switch.with_process(1, process);
    }
    Ok(Device {
        id,
        kind: net_kinds::by_name(kind).map_or("vhost-user", |k| k.name),
        process: None,
        special: Special::Foreign(Box::new(switch)),
        function,
        address,
        port,
        queues,
        failed: None,
        drained: false,
        ring_errors: (None, 0),
        ring_alarms: (None, 0),
        granted,
    })
}

/// Connects to a back-end, or listens and waits for it. One that is not there is an error,
/// unless the device is optional.
fn reach(
    id: &str,
    socket: &Path,
    server: bool,
    optional: bool,
    site: &Site<'_>,
) -> Result<First, String> {
    let launcher = site.launcher;
    let (origin, stream) = if server {
        let listener = launcher
            .bind_unix(socket, "vhost-user")
            .map_err(|e| e.to_string())?;
        let limit = if optional {
            Duration::ZERO
        } else {
            ACCEPT_LIMIT
        };
        let came = accept(&listener, limit).map_err(|why| {
            let path = printable(&socket.to_string_lossy());
            let why = of_first(id, &why, optional, site);
            format!("vhost-user {path}: {why}")
        });
        (Origin::Listen(socket.to_owned(), listener), came)
    } else {
        let came = launcher
            .connect_unix(socket, "vhost-user")
            .map_err(|e| e.to_string());
        (Origin::Connect(PathBuf::from(socket)), came)
    };
    let frontend = stream.and_then(|stream| {
        Frontend::connect(stream, MESSAGE_LIMIT).map_err(|error| {
            let why = of_first(id, &error.to_string(), optional, site);
            format!("{origin}: {why}")
        })
    });
    match frontend {
        Ok(frontend) => Ok(First {
            frontend: Some(frontend),
            optional,
            ..First::without(origin)
        }),
        Err(why) if optional => {
            log::warn!("device {id}: {why}; {} without it", subject(site));
            Ok(First {
                missing: Some(why),
                optional,
                ..First::without(origin)
            })
        }
        Err(why) => {
            if server {
                let _ = launcher.forget(socket);
            }
            Err(format!("device {id}: {why}"))
        }
    }
}

/// What goes on without a back-end.
fn subject(site: &Site<'_>) -> &'static str {
    if site.at_start {
        "the machine starts"
    } else {
        "the device is added"
    }
}

/// Waits for a connection.
fn accept(listener: &UnixListener, limit: Duration) -> Result<UnixStream, String> {
    let deadline = Instant::now() + limit;
    loop {
        match listener.accept() {
            Ok((stream, _)) => return Ok(stream),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.to_string()),
        }
        if Instant::now() >= deadline {
            return Err(if limit.is_zero() {
                "nobody has connected yet".to_owned()
            } else {
                format!("nobody connected in {} s", limit.as_secs())
            });
        }
        sys::poll(&[(listener.as_fd(), libc::POLLIN)], Some(deadline))
            .map_err(|e| e.to_string())?;
    }
}

/// Starts passt and waits until it speaks.
fn start_passt(net: &NetConfig, user: &UserBackend, site: &Site<'_>) -> Result<First, String> {
    let order = HelperOrder {
        id: &net.id,
        kind: helper::PASST,
        options: passt_options(net, user),
        resources: net.resources.as_ref().cloned().unwrap_or_default(),
        least: kinds::passt_least(site.launcher.helper_data(helper::PASST)),
        hint,
    };
    let optional = net.optional;
    let refused = match start(order, optional, site)? {
        Started::First(first) => return Ok(*first),
        Started::Refused(why) => why,
    };
    if !optional {
        return Err(refused);
    }
    let why = of_others(&net.id, &refused);
    log::warn!("device {}: {why}; its link stays down", net.id);
    Ok(First {
        optional,
        ..First::without(Origin::Nothing(why))
    })
}

/// A helper to start.
pub(super) struct HelperOrder<'a> {
    /// Its device's.
    pub id: &'a str,
    /// "passt" or "virtiofsd".
    pub kind: &'static str,
    /// What the launcher is to tell it.
    pub options: Vec<String>,
    /// Its limits.
    pub resources: Resources,
    /// What it needs to start.
    pub least: Least,
    /// What may help when it does not, by how it ended.
    pub hint: fn(Option<&str>) -> &'static str,
}

/// What became of a helper's start.
pub(super) enum Started {
    /// It serves, or is started again by and by.
    First(Box<First>),
    /// It cannot be had, for this reason; nothing of it stays.
    Refused(String),
}

/// Starts a helper and waits until it speaks.
///
/// # Errors
/// One line: its limits are refused.
pub(super) fn start(
    order: HelperOrder<'_>,
    optional: bool,
    site: &Site<'_>,
) -> Result<Started, String> {
    let HelperOrder {
        id, kind, options, ..
    } = order;
    let origin = Origin::Helper(kind, options.clone());
    let placed = device::place(site.launcher, id, &order.resources, "", order.least)?;
    let usage = Some(placed);
    let begun = Instant::now();
    let started = site
        .launcher
        .spawn_helper(id, kind, 1, options)
        .map_err(|e| (e.to_string(), ""));
    let runs = started.is_ok();
    let first = started.and_then(|helper| {
        let connected = Frontend::connect(helper.vhost, MESSAGE_LIMIT);
        let frontend = connected.map_err(|error| {
            let how = device::ended(site.launcher, id, 1, kind);
            let hint = (order.hint)(how.as_deref());
            let how = how.unwrap_or_else(|| error.to_string());
            (format!("device {id}: {kind}: {how}"), hint)
        })?;
        let (pid, pidfd) = (helper.pid, helper.pidfd);
        let process = HelperProcess::serving(pid, pidfd, begun, Instant::now());
        Ok((frontend, process))
    });
    let (cause, hint) = match first {
        Ok((frontend, process)) => {
            return Ok(Started::First(Box::new(First {
                frontend: Some(frontend),
                process: Some(process),
                usage,
                optional,
                ..First::without(origin)
            })));
        }
        Err(why) => why,
    };
    let why = format!("{cause}{hint}");
    if optional && !helper::lasting(&why) {
        // Its leaf stays, with its limits: those of the next one.
        if runs && site.launcher.kill(id, 1).is_ok() {
            site.launcher.take_end(id, 1, END_LIMIT);
        }
        log::warn!("{why}; {} without its network", subject(site));
        return Ok(Started::First(Box::new(First {
            usage,
            // By which the same is known again.
            missing: Some(cause),
            optional,
            ..First::without(origin)
        })));
    }
    Ok(Started::Refused(if runs {
        device::undo(site.launcher, id, 1, &why)
    } else {
        // Nothing was started, but its place was made.
        device::forget(site.launcher, id, 1);
        why
    }))
}

/// What may help when passt does not start, by how it ended.
fn hint(how: Option<&str>) -> &'static str {
    match how {
        Some(how) if how.contains("Failed to bind") => {
            "; choose another port in forward=, or end what has this one"
        }
        // One that does not know an option prints its usage, which is indented.
        Some(how) if how.contains(": ") && !how.contains(":  ") => "",
        _ => " (for vhost-user it must be passt 2024_11_27 or later)",
    }
}

/// What the launcher is to tell passt.
fn passt_options(net: &NetConfig, user: &UserBackend) -> Vec<String> {
    let mut options = Vec::new();
    if net.mtu != 0 {
        options.push(format!("mtu={}", net.mtu));
    }
    for forward in &user.forwards {
        let protocol = match forward.protocol.enum_value_or_default() {
            forward::Protocol::TCP => "tcp",
            forward::Protocol::UDP => "udp",
        };
        let address = match forward.address.as_str() {
            "" => LOOPBACK,
            given => given,
        };
        let (host, guest) = (forward.host_port, forward.guest_port);
        options.push(format!("{protocol}={address}/{host}:{guest}"));
    }
    options
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_proto::machine::user_backend::Forward;

    #[test]
    fn passt_is_told_ports_and_mtu() {
        let mut net = NetConfig::new();
        net.mtu = 1400;
        let mut user = UserBackend::new();
        let mut forward = Forward::new();
        (forward.host_port, forward.guest_port) = (8080, 80);
        user.forwards.push(forward.clone());
        forward.protocol = forward::Protocol::UDP.into();
        forward.address = "::1".into();
        user.forwards.push(forward);
        assert_eq!(
            passt_options(&net, &user),
            ["mtu=1400", "tcp=127.0.0.1/8080:80", "udp=::1/8080:80"]
        );
        assert!(passt_options(&NetConfig::new(), &UserBackend::new()).is_empty());
    }

    #[test]
    fn what_passt_says_gets_a_remedy_where_there_is_one() {
        let bound = "exit status 1: Failed to bind port 80 (Address already in use)";
        assert!(hint(Some(bound)).contains("another port"));
        assert_eq!(hint(Some("exit status 1: No routable interface")), "");
        for how in [None, Some("exit status 0"), Some("exit status 1:   -h")] {
            assert!(hint(how).contains("2024_11_27"), "{how:?}");
        }
    }

    #[test]
    fn a_back_end_that_does_not_come_is_named_with_the_remedy() {
        let place = std::env::temp_dir().join(format!("bh-accept-{}", std::process::id()));
        let _ = std::fs::remove_file(&place);
        let listener = UnixListener::bind(&place).unwrap();
        listener.set_nonblocking(true).unwrap();
        let now = accept(&listener, Duration::ZERO).unwrap_err();
        assert!(now.contains("nobody has connected yet"), "{now}");
        let late = accept(&listener, Duration::from_millis(20)).unwrap_err();
        assert!(late.starts_with("nobody connected in"), "{late}");
        let _client = UnixStream::connect(&place).unwrap();
        assert!(accept(&listener, Duration::ZERO).is_ok());
        std::fs::remove_file(&place).unwrap();
    }
}
