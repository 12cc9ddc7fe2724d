//! What the options of a command line are added to: the file of `--config`, or a machine of which
//! nothing has been said; and whose a refusal is, the file's or an option's. Runs in the command
//! line's process.

use std::collections::BTreeSet;
use std::path::Path;

use bulkhead_proto::machine::MachineConfig;

use super::config_file::{self, ConfigFile};
use super::machine_args::MachineArgs;

/// What there is before options are added.
#[derive(Debug)]
pub(super) struct Base {
    file: Option<ConfigFile>,
    /// Disks, nets, vhost_users, rngs, consoles and fs.
    counts: [usize; 6],
    /// Of its devices.
    pub(super) ids: BTreeSet<String>,
}

impl Base {
    /// Reads the file, if there is one.
    ///
    /// # Errors
    /// One line that names the file.
    pub(super) fn read(path: Option<&Path>) -> Result<(MachineConfig, Self), String> {
        let (config, file) = match path {
            Some(path) => {
                let (config, file) = ConfigFile::read(path)?;
                (config, Some(file))
            }
            None => (config_file::plain(), None),
        };
        let disks = config.disks.iter().map(|d| &d.id);
        let nets = config.nets.iter().map(|d| &d.id);
        let others = config.vhost_users.iter().map(|d| &d.id);
        let rngs = config.rngs.iter().map(|d| &d.id);
        let consoles = config.consoles.iter().map(|d| &d.id);
        let fs = config.fs.iter().map(|d| &d.id);
        let vsock = config.vsock.iter().map(|d| &d.id);
        let all = disks.chain(nets).chain(others).chain(rngs).chain(consoles);
        let base = Self {
            file,
            counts: [
                config.disks.len(),
                config.nets.len(),
                config.vhost_users.len(),
                config.rngs.len(),
                config.consoles.len(),
                config.fs.len(),
            ],
            ids: all.chain(fs).chain(vsock).cloned().collect(),
        };
        Ok((config, base))
    }

    /// A refusal that names a field of the configuration, with the option that gave it named
    /// instead, or the file and its key.
    pub(super) fn refusal(&self, args: &MachineArgs, why: &str) -> String {
        // Those with a socket are in another list, behind its own.
        let source = |text: &&String| text.split(',').all(|part| !part.starts_with("socket="));
        let fs = args.fs.iter().filter(source).cloned().collect();
        let lists = [
            ("disks", "--disk", &args.disks),
            ("nets", "--net", &args.nets),
            ("vhost_users", "--vhost-user", &args.vhost_users),
            ("rngs", "--rng", &args.rngs),
            ("consoles", "--console", &args.consoles),
            ("fs", "--fs", &fs),
        ];
        for ((list, option, texts), before) in lists.into_iter().zip(self.counts) {
            for (index, text) in texts.iter().enumerate() {
                let field = format!("config.{list}[{}]", index.saturating_add(before));
                if let Some(rest) = why.strip_prefix(&field) {
                    let rest = rest.trim_start_matches(['.', ':', ' ']);
                    let rest = rest.replace(&format!("{field}."), "");
                    return format!("{option} {text}: {rest}");
                }
            }
        }
        let fields = [
            ("kernel", "--kernel", args.kernel.is_some()),
            ("initrd", "--initrd", args.initrd.is_some()),
            ("cmdline", "--cmdline", args.cmdline.is_some()),
            ("memory", "--memory", args.memory.is_some()),
            ("cpus", "--cpus", args.cpus.is_some()),
            (
                "hotplug_ports",
                "--hotplug-ports",
                args.hotplug_ports.is_some(),
            ),
            ("vsock", "--vsock", args.vsock.is_some()),
            ("serial", "--serial", args.serial.is_some()),
            ("on_reset", "--on-reset", args.on_reset.is_some()),
        ];
        let field = why.strip_prefix("config.");
        let option = field.and_then(|rest| {
            let named = fields.iter().find(|(name, _, _)| rest.starts_with(name));
            named.filter(|(_, _, given)| *given || self.file.is_none())
        });
        match (field, option, &self.file) {
            (Some(rest), Some((_, option, _)), _) => format!("{option}: {rest}"),
            (_, _, Some(file)) => file.in_file(why),
            _ => why.to_owned(),
        }
    }
}
