//! The commands of `bulkhead ctl` that name one device: what it has counted, what may be
//! changed while it runs, draining it. Runs in the command line's process.

use std::time::{Duration, Instant};

use bulkhead_proto::common::{DiskLimits, NetLimits};
use bulkhead_proto::machine::{
    DeviceStatsRequest, DeviceStatsResponse, DevicesRequest, DevicesResponse, DrainDeviceRequest,
    DrainDeviceResponse, InfoRequest, InfoResponse, MachineConfig, ResumeDeviceRequest,
    ResumeDeviceResponse, UpdateConsoleRequest, UpdateConsoleResponse, UpdateDeviceRequest,
    UpdateDeviceResponse, UpdateDiskRequest, UpdateDiskResponse, UpdateNetRequest,
    UpdateNetResponse, update_net_request::Link,
};
use clap::builder::PossibleValuesParser;

use super::ctl::{CALL, Failure, Output, Session};
use super::ctl_output as output;
use super::disk_args::parse_bucket;
use super::machine_args::parse_size;
use super::{EXIT_USAGE, console_args, ctl_stats, net_args};

/// How often a device that begins again is looked at.
const LOOK: Duration = Duration::from_millis(50);
/// What the VMM may take on top of the time that a drain has.
const DRAIN_MARGIN: Duration = Duration::from_secs(30);
/// What the VMM may take beside what is in flight when a device's process is replaced.
const REPLACE_MARGIN: Duration = Duration::from_secs(60);
/// Growing a file and telling its process.
const UPDATE: Duration = Duration::from_secs(90);

/// `ctl stats`.
#[derive(clap::Args, Debug, Clone)]
pub struct StatsArgs {
    /// The device, as `ctl devices` names it
    id: String,
}

/// `ctl update-disk`.
#[derive(clap::Args, Debug, Clone)]
pub struct UpdateDiskArgs {
    /// The disk, as `ctl devices` names it
    id: String,
    /// Grow it to this many bytes (with K, M, G or T); its file is grown, a block device must
    /// have them
    #[arg(long, value_name = "SIZE", allow_negative_numbers = true)]
    size: Option<String>,
    /// Limit its bytes per second, and the burst it may save up; 0 lifts the limit
    #[arg(long, value_name = "SIZE[:BURST]", allow_negative_numbers = true)]
    bps: Option<String>,
    /// Limit its operations per second, and the burst; 0 lifts the limit
    #[arg(long, value_name = "N[:BURST]", allow_negative_numbers = true)]
    iops: Option<String>,
}

/// `ctl update-net`.
#[derive(clap::Args, Debug, Clone)]
pub struct UpdateNetArgs {
    /// The network device, as `ctl devices` names it
    id: String,
    /// Plug the cable in, or pull it
    #[arg(long, value_name = "up|down", value_parser = PossibleValuesParser::new(["up", "down"]))]
    link: Option<String>,
    /// Limit the bytes per second that the guest receives, and the burst; 0 lifts the limit
    #[arg(long, value_name = "SIZE[:BURST]", allow_negative_numbers = true)]
    rx_bps: Option<String>,
    /// Limit the packets per second that the guest receives
    #[arg(long, value_name = "N[:BURST]", allow_negative_numbers = true)]
    rx_pps: Option<String>,
    /// Limit the bytes per second that the guest sends
    #[arg(long, value_name = "SIZE[:BURST]", allow_negative_numbers = true)]
    tx_bps: Option<String>,
    /// Limit the packets per second that the guest sends
    #[arg(long, value_name = "N[:BURST]", allow_negative_numbers = true)]
    tx_pps: Option<String>,
}

/// `ctl resize-console`.
#[derive(clap::Args, Debug, Clone)]
pub struct ResizeConsoleArgs {
    /// The console device, as `ctl devices` names it
    id: String,
    /// Columns and rows of a port, the first where none is given
    #[arg(required = true, value_name = "[PORT:]COLSxROWS")]
    sizes: Vec<String>,
}

/// `ctl drain`.
#[derive(clap::Args, Debug, Clone)]
pub struct DrainArgs {
    /// The device, as `ctl devices` names it
    id: String,
    /// Seconds it may take before it takes requests again
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 30,
        value_parser = clap::value_parser!(u32).range(1..=600)
    )]
    timeout: u32,
}

/// `ctl update-device`.
#[derive(clap::Args, Debug, Clone)]
pub struct UpdateDeviceArgs {
    /// The device, as `ctl devices` names it
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    id: Option<String>,
    /// Every device that has a process of ours, one after the other
    #[arg(long)]
    all: bool,
    /// The binary: a file under one of bulkhead's --device-dir directories, or its path beneath
    /// one; with --all the directory of the kinds' binaries [default: bulkhead-KIND]
    #[arg(long, value_name = "PATH")]
    binary: Option<String>,
    /// Seconds that what is in flight may take to finish, before nothing is changed
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 30,
        value_parser = clap::value_parser!(u32).range(1..=600)
    )]
    timeout: u32,
}

/// `ctl resume-device`.
#[derive(clap::Args, Debug, Clone)]
pub struct ResumeDeviceArgs {
    /// The device, as `ctl devices` names it
    id: String,
}

fn usage(line: String) -> Failure {
    Failure {
        code: EXIT_USAGE,
        line,
    }
}

/// One of the limits that are replaced together is given: the other stays as it is.
fn merged<L>(present: Option<&L>, change: impl FnOnce(&mut L)) -> L
where
    L: Default + Clone,
{
    let mut limits = present.cloned().unwrap_or_default();
    change(&mut limits);
    limits
}

impl StatsArgs {
    pub(super) fn run(
        &self,
        session: &mut Session<'_>,
        out: &mut Output<'_>,
    ) -> Result<(), Failure> {
        let mut request = DeviceStatsRequest::new();
        request.id.clone_from(&self.id);
        let stats: DeviceStatsResponse = session.call("DeviceStats", &request, CALL)?;
        if out.json {
            out.json_value(&ctl_stats::json(&stats))
        } else {
            out.text(|to| ctl_stats::text(to, &stats))
        }
    }
}

impl UpdateDiskArgs {
    /// The request, before anything is known of the machine. Limits that are not given are
    /// absent from it.
    ///
    /// # Errors
    /// One line that names the option.
    pub(super) fn request(&self) -> Result<UpdateDiskRequest, Failure> {
        let mut request = UpdateDiskRequest::new();
        request.id.clone_from(&self.id);
        if let Some(size) = &self.size {
            request.size_bytes =
                parse_size(size).map_err(|e| usage(format!("--size {size}: {e}")))?;
        }
        for (key, value) in [("bps", &self.bps), ("iops", &self.iops)] {
            let Some(value) = value else { continue };
            let bucket = parse_bucket(key, value).map_err(|e| usage(format!("--{e}")))?;
            let limits = request.limits.mut_or_insert_default();
            if key == "bps" {
                limits.bytes = Some(bucket).into();
            } else {
                limits.operations = Some(bucket).into();
            }
        }
        if request.size_bytes == 0 && request.limits.is_none() {
            return Err(usage(
                "nothing to change: give --size, --bps or --iops".to_owned(),
            ));
        }
        Ok(request)
    }

    pub(super) fn run(
        &self,
        session: &mut Session<'_>,
        out: &mut Output<'_>,
    ) -> Result<(), Failure> {
        let mut request = self.request()?;
        if let Some(given) = request.limits.as_ref()
            && (given.bytes.is_none() || given.operations.is_none())
        {
            let config = machine_config(session)?;
            let disk = config.disks.iter().find(|d| d.id == self.id);
            let given = given.clone();
            let limits = merged(
                disk.and_then(|d| d.limits.as_ref()),
                |limits: &mut DiskLimits| {
                    if given.bytes.is_some() {
                        limits.bytes = given.bytes;
                    }
                    if given.operations.is_some() {
                        limits.operations = given.operations;
                    }
                },
            );
            request.limits = Some(limits).into();
        }
        let disk: UpdateDiskResponse = session.call("UpdateDisk", &request, UPDATE)?;
        if out.json {
            out.json_value(&serde_json::json!({ "id": self.id, "size_bytes": disk.size_bytes }))
        } else {
            let size = match disk.size_bytes {
                0 => String::new(),
                bytes => format!(", {}", output::size(bytes)),
            };
            out.text(|to| writeln!(to, "updated{size}"))
        }
    }
}

impl UpdateNetArgs {
    /// As [`UpdateDiskArgs::request`].
    ///
    /// # Errors
    /// One line that names the option.
    pub(super) fn request(&self) -> Result<UpdateNetRequest, Failure> {
        let mut request = UpdateNetRequest::new();
        request.id.clone_from(&self.id);
        request.link = match self.link.as_deref() {
            Some("up") => Link::UP.into(),
            Some(_) => Link::DOWN.into(),
            None => Link::UNCHANGED.into(),
        };
        for (key, value) in self.limits() {
            let Some(value) = value else { continue };
            let limits = if key.starts_with("rx") {
                request.to_guest.mut_or_insert_default()
            } else {
                request.from_guest.mut_or_insert_default()
            };
            net_args::set_limit(limits, key, value).map_err(|e| usage(format!("--{e}")))?;
        }
        if self.link.is_none() && request.to_guest.is_none() && request.from_guest.is_none() {
            return Err(usage(
                "nothing to change: give --link, --rx-bps, --rx-pps, --tx-bps or --tx-pps"
                    .to_owned(),
            ));
        }
        Ok(request)
    }

    fn limits(&self) -> [(&'static str, &Option<String>); 4] {
        [
            ("rx-bps", &self.rx_bps),
            ("rx-pps", &self.rx_pps),
            ("tx-bps", &self.tx_bps),
            ("tx-pps", &self.tx_pps),
        ]
    }

    pub(super) fn run(
        &self,
        session: &mut Session<'_>,
        out: &mut Output<'_>,
    ) -> Result<(), Failure> {
        let mut request = self.request()?;
        let half = |limits: Option<&NetLimits>| {
            limits.is_some_and(|l| l.bytes.is_none() || l.packets.is_none())
        };
        if half(request.to_guest.as_ref()) || half(request.from_guest.as_ref()) {
            let config = machine_config(session)?;
            let net = config.nets.iter().find(|n| n.id == self.id);
            for (given, present) in [
                (&mut request.to_guest, net.map(|n| &n.to_guest)),
                (&mut request.from_guest, net.map(|n| &n.from_guest)),
            ] {
                let Some(change) = given.as_ref().cloned() else {
                    continue;
                };
                let present = present.and_then(|field| field.as_ref());
                let limits = merged(present, |limits: &mut NetLimits| {
                    if change.bytes.is_some() {
                        limits.bytes = change.bytes;
                    }
                    if change.packets.is_some() {
                        limits.packets = change.packets;
                    }
                });
                *given = Some(limits).into();
            }
        }
        session.call::<_, UpdateNetResponse>("UpdateNet", &request, UPDATE)?;
        out.done(&self.id, "updated")
    }
}

impl ResizeConsoleArgs {
    /// As [`UpdateDiskArgs::request`].
    ///
    /// # Errors
    /// One line that names what is wrong.
    pub(super) fn request(&self) -> Result<UpdateConsoleRequest, Failure> {
        let mut request = UpdateConsoleRequest::new();
        request.id.clone_from(&self.id);
        for text in &self.sizes {
            let size = console_args::parse_port_size(text).map_err(usage)?;
            request.sizes.push(size);
        }
        Ok(request)
    }

    pub(super) fn run(
        &self,
        session: &mut Session<'_>,
        out: &mut Output<'_>,
    ) -> Result<(), Failure> {
        let request = self.request()?;
        session.call::<_, UpdateConsoleResponse>("UpdateConsole", &request, UPDATE)?;
        out.done(&self.id, "resized")
    }
}

impl DrainArgs {
    pub(super) fn run(
        &self,
        session: &mut Session<'_>,
        out: &mut Output<'_>,
    ) -> Result<(), Failure> {
        let mut request = DrainDeviceRequest::new();
        request.id.clone_from(&self.id);
        request.timeout_ms = self.timeout.saturating_mul(1000);
        let patience = Duration::from_secs(u64::from(self.timeout)).saturating_add(DRAIN_MARGIN);
        session.call::<_, DrainDeviceResponse>("DrainDevice", &request, patience)?;
        out.done(&self.id, "drained")
    }
}

impl UpdateDeviceArgs {
    pub(super) fn run(
        &self,
        session: &mut Session<'_>,
        out: &mut Output<'_>,
    ) -> Result<(), Failure> {
        if self.binary.as_deref() == Some("") {
            return Err(usage(
                "--binary: give a file, or leave it out to start the same one anew".into(),
            ));
        }
        if let Some(id) = &self.id {
            let binary = self.binary.clone().unwrap_or_default();
            return self.update(session, out, id, binary);
        }
        let devices: DevicesResponse = session.call("Devices", &DevicesRequest::new(), CALL)?;
        let ours: Vec<_> = devices
            .devices
            .iter()
            .filter(|device| {
                let between = device.state == "quarantined" || device.state == "restarting";
                (device.pid != 0 || between) && device.helper.is_empty()
            })
            .collect();
        if ours.is_empty() && !out.json {
            return out
                .text(|to| writeln!(to, "no device has a process of ours: nothing to update"));
        }
        let mut failed = Vec::new();
        for device in &ours {
            let name = format!("bulkhead-{}", device.kind);
            let binary = self.binary.as_ref().map_or_else(String::new, |directory| {
                std::path::Path::new(directory)
                    .join(&name)
                    .to_string_lossy()
                    .into_owned()
            });
            // The others may well come up.
            if let Err(failure) = self.update(session, out, &device.id, binary) {
                failed.push(failure.line);
            }
        }
        if failed.is_empty() {
            return Ok(());
        }
        Err(Failure {
            code: 1,
            line: format!(
                "{} of {} devices were not updated: {}",
                failed.len(),
                ours.len(),
                failed.join("; ")
            ),
        })
    }

    fn update(
        &self,
        session: &mut Session<'_>,
        out: &mut Output<'_>,
        id: &str,
        binary: String,
    ) -> Result<(), Failure> {
        let mut request = UpdateDeviceRequest::new();
        id.clone_into(&mut request.id);
        request.binary = binary;
        request.timeout_ms = self.timeout.saturating_mul(1000);
        let patience = Duration::from_secs(u64::from(self.timeout)).saturating_add(REPLACE_MARGIN);
        let done: UpdateDeviceResponse = session.call("UpdateDevice", &request, patience)?;
        if out.json {
            out.json_value(&serde_json::json!({
                "id": id,
                "incarnation": done.incarnation,
                "version": done.version,
                "stall_us": done.stall_us,
            }))
        } else {
            out.text(|to| {
                writeln!(
                    to,
                    "{id}: updated to {}, process {}, after {} us without service",
                    done.version, done.incarnation, done.stall_us
                )
            })
        }
    }
}

impl ResumeDeviceArgs {
    pub(super) fn run(
        &self,
        session: &mut Session<'_>,
        out: &mut Output<'_>,
    ) -> Result<(), Failure> {
        let mut request = ResumeDeviceRequest::new();
        request.id.clone_from(&self.id);
        session.call::<_, ResumeDeviceResponse>("ResumeDevice", &request, CALL)?;
        // One that was quarantined begins with another process, which may end as those before it.
        let end = Instant::now() + CALL;
        while Instant::now() < end {
            let devices: DevicesResponse = session.call("Devices", &DevicesRequest::new(), CALL)?;
            let device = devices.devices.iter().find(|device| device.id == self.id);
            match device.map(|device| device.state.as_str()) {
                Some("restarting") => std::thread::sleep(LOOK),
                Some("quarantined") => {
                    return Err(Failure {
                        code: 1,
                        line: format!(
                            "device {}: was begun again, and is quarantined again: `bulkhead ctl events` says why",
                            self.id
                        ),
                    });
                }
                _ => break,
            }
        }
        out.done(&self.id, "resumed")
    }
}

pub(super) fn machine_config(session: &mut Session<'_>) -> Result<MachineConfig, Failure> {
    let info: InfoResponse = session.call("Info", &InfoRequest::new(), CALL)?;
    Ok(info.config.into_option().unwrap_or_default())
}
