//! The commands of `bulkhead ctl` that add and remove devices and vCPUs. Runs in the command
//! line's process.

use std::time::Duration;

use bulkhead_proto::machine::{
    AddDeviceRequest, AddDeviceResponse, MemoryInfo, RemoveDeviceRequest, RemoveDeviceResponse,
    ResizeCpusRequest, ResizeCpusResponse, ResizeMemoryRequest, ResizeMemoryResponse,
};

use super::ctl::{Failure, Output, Session};
use super::fs_args::{self, Fs};
use super::machine_args::{MAX_CPUS, parse_size, split_option};
use super::{EXIT_USAGE, console_args, disk_args, net_args, rng_args, vsock_args};

/// A device process may have to be waited for, and the launcher, and a back-end.
const ADD: Duration = Duration::from_secs(120);
/// What the VMM may take on top of the guest's time: an end that does not come.
const MARGIN: Duration = Duration::from_secs(60);

/// `ctl add-disk`, `ctl add-net`, `ctl add-vhost-user`, `ctl add-rng`, `ctl add-vsock`,
/// `ctl add-console`, `ctl add-fs`.
#[derive(clap::Args, Debug, Clone)]
pub struct AddArgs {
    /// The device, as `bulkhead run` takes it; id=NAME must be there
    #[arg(value_name = "DEVICE")]
    device: String,
    /// The root port, as `ctl info` names it [default: the first that is free]
    #[arg(long, value_name = "NAME")]
    port: Option<String>,
}

/// What `ctl add-…` adds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Disk,
    Net,
    VhostUser,
    Rng,
    Vsock,
    Console,
    Fs,
}

/// `ctl remove-device`.
#[derive(clap::Args, Debug, Clone)]
pub struct RemoveArgs {
    /// The device, as `ctl devices` names it
    id: String,
    /// Do not ask the guest: the device is gone, as if its card was pulled
    #[arg(long)]
    force: bool,
    /// Seconds the guest has to give it up
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 30,
        value_parser = clap::value_parser!(u32).range(1..=600)
    )]
    timeout: u32,
}

/// `ctl resize-cpus`.
#[derive(clap::Args, Debug, Clone)]
pub struct ResizeCpusArgs {
    /// vCPUs that there shall be, up to the machine's max=
    #[arg(value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_CPUS)))]
    count: u32,
    /// Seconds the guest has
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 30,
        value_parser = clap::value_parser!(u32).range(1..=600)
    )]
    timeout: u32,
}

/// `ctl resize-memory`.
#[derive(clap::Args, Debug, Clone)]
pub struct ResizeMemoryArgs {
    /// All of the guest's memory, from what it started with up to the machine's max=
    #[arg(value_name = "SIZE")]
    size: String,
    /// Seconds after which an event says that the guest has stopped short of it
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 30,
        value_parser = clap::value_parser!(u32).range(1..=600)
    )]
    timeout: u32,
}

fn usage(line: String) -> Failure {
    Failure {
        code: EXIT_USAGE,
        line,
    }
}

impl AddArgs {
    /// The request, before anything is known of the machine.
    ///
    /// # Errors
    /// One line that names the option.
    pub(super) fn request(&self, kind: Kind) -> Result<AddDeviceRequest, Failure> {
        let text = self.device.as_str();
        // A number would be another device's before long.
        let named = |part: &String| part.strip_prefix("id=").is_some_and(|id| !id.is_empty());
        if !split_option(text).iter().any(named) {
            return Err(usage(format!(
                "{text}: id=NAME is missing: the device needs one to be removed by"
            )));
        }
        let mut request = AddDeviceRequest::new();
        match kind {
            Kind::Disk => request.set_disk(disk_args::parse_disk(text, 0).map_err(usage)?),
            Kind::Net => request.set_net(net_args::parse_net(text, 0).map_err(usage)?),
            Kind::Rng => request.set_rng(rng_args::parse_rng(text, 0).map_err(usage)?),
            Kind::Vsock => request.set_vsock(vsock_args::parse_vsock(text).map_err(usage)?),
            Kind::Console => {
                request.set_console(console_args::parse_console(text, 0).map_err(usage)?);
            }
            Kind::Fs => match fs_args::parse_fs(text, 0).map_err(usage)? {
                Fs::Directory(fs) => request.set_fs(fs),
                Fs::Socket(device) => request.set_vhost_user(device),
            },
            Kind::VhostUser => {
                request.set_vhost_user(net_args::parse_vhost_user(text, 0).map_err(usage)?);
            }
        }
        request.port = self.port.clone().unwrap_or_default();
        Ok(request)
    }

    pub(super) fn run(
        &self,
        kind: Kind,
        session: &mut Session<'_>,
        out: &mut Output<'_>,
    ) -> Result<(), Failure> {
        let request = self.request(kind)?;
        let added: AddDeviceResponse = session.call("AddDevice", &request, ADD)?;
        let device = added.device.get_or_default();
        if out.json {
            out.json_value(&serde_json::json!({
                "operation": added.operation,
                "id": device.id,
                "port": device.port,
                "pci_address": device.pci_address,
                "pid": device.pid,
                "spawn_us": device.spawn_us,
            }))
        } else {
            let (id, port, address) = (&device.id, &device.port, &device.pci_address);
            out.text(|to| writeln!(to, "{id} added behind {port} ({address})"))
        }
    }
}

impl RemoveArgs {
    pub(super) fn run(
        &self,
        session: &mut Session<'_>,
        out: &mut Output<'_>,
    ) -> Result<(), Failure> {
        let mut request = RemoveDeviceRequest::new();
        request.id.clone_from(&self.id);
        request.force = self.force;
        request.timeout_ms = self.timeout.saturating_mul(1000);
        let patience = Duration::from_secs(u64::from(self.timeout)).saturating_add(MARGIN);
        session.call::<_, RemoveDeviceResponse>("RemoveDevice", &request, patience)?;
        out.done(&self.id, "removed")
    }
}

impl ResizeCpusArgs {
    pub(super) fn run(
        &self,
        session: &mut Session<'_>,
        out: &mut Output<'_>,
    ) -> Result<(), Failure> {
        let mut request = ResizeCpusRequest::new();
        request.count = self.count;
        request.timeout_ms = self.timeout.saturating_mul(1000);
        let patience = Duration::from_secs(u64::from(self.timeout)).saturating_add(MARGIN);
        let cpus: ResizeCpusResponse = session.call("ResizeCpus", &request, patience)?;
        if out.json {
            let json = serde_json::json!({ "operation": cpus.operation, "cpus": cpus.count });
            out.json_value(&json)
        } else {
            out.text(|to| writeln!(to, "{} vCPUs", cpus.count))
        }
    }
}

impl ResizeMemoryArgs {
    pub(super) fn run(
        &self,
        session: &mut Session<'_>,
        out: &mut Output<'_>,
    ) -> Result<(), Failure> {
        let mut request = ResizeMemoryRequest::new();
        request.size_bytes =
            parse_size(&self.size).map_err(|e| usage(format!("{}: {e}", self.size)))?;
        request.timeout_ms = self.timeout.saturating_mul(1000);
        let asked: ResizeMemoryResponse = session.call("ResizeMemory", &request, MARGIN)?;
        let memory = asked.memory.get_or_default();
        if out.json {
            let mut json = memory_json(memory);
            json["operation"] = asked.operation.into();
            out.json_value(&json)
        } else {
            out.text(|to| writeln!(to, "{}", memory_text(memory)))
        }
    }
}

/// For `info` and the answer to `resize-memory`.
pub(super) fn memory_json(memory: &MemoryInfo) -> serde_json::Value {
    serde_json::json!({
        "requested_bytes": memory.requested_bytes,
        "present_bytes": memory.present_bytes,
        "max_bytes": memory.max_bytes,
        "block_bytes": memory.block_bytes,
    })
}

/// The same in words.
pub(super) fn memory_text(memory: &MemoryInfo) -> String {
    let mib = |bytes: u64| bytes >> 20;
    format!(
        "{} MiB of {} MiB requested, at most {} MiB",
        mib(memory.present_bytes),
        mib(memory.requested_bytes),
        mib(memory.max_bytes)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(kind: Kind, text: &str) -> Result<AddDeviceRequest, String> {
        let args = AddArgs {
            device: text.into(),
            port: Some("hp1".into()),
        };
        args.request(kind).map_err(|failure| failure.line)
    }

    #[test]
    fn a_device_is_named_by_whoever_adds_it() {
        let disk = request(Kind::Disk, "path=/d,id=data").unwrap();
        assert_eq!(
            (disk.disk().id.as_str(), disk.port.as_str()),
            ("data", "hp1")
        );
        let net = request(Kind::Net, "tap=t0,id=lan").unwrap();
        assert_eq!(net.net().id, "lan");
        let line = request(Kind::Disk, "path=/d").unwrap_err();
        assert!(line.contains("id=NAME is missing"), "{line}");
        assert_eq!(request(Kind::Rng, "id=dice").unwrap().rng().id, "dice");
        assert!(request(Kind::Rng, "").is_err());
        assert!(request(Kind::VhostUser, "id=x,nonsense=1").is_err());
    }
}
