//! `--config FILE` and `--print-config`: `bulkhead.v1.MachineConfig` as a TOML file. Runs in the
//! command line's process, before it confines itself; of what the file names nothing is opened.

mod fields;
mod read;
#[cfg(test)]
mod tests;
mod write;

use std::fs::File;
use std::io::Read;
use std::path::Path;

use bulkhead_proto::machine::{MachineConfig, serial_config::Mode};
use toml::de::DeTable;

pub(super) use fields::ON_RESET;

use crate::machine::net_kinds;

/// Longest file, bytes.
const MAX_FILE: u64 = 1 << 20;
/// Names of lists in the API, and of one table in a file.
const LISTS: [(&str, &str); 8] = [
    ("disks", "disk"),
    ("nets", "net"),
    ("vhost_users", "vhost_user"),
    ("rngs", "rng"),
    ("consoles", "console"),
    ("fs", "fs"),
    ("ports", "port"),
    ("forwards", "forward"),
];
/// Fields of the API that are in a table of their own in a file.
const MEMORY: [(&str, &str); 2] = [
    ("memory_bytes", "memory.size"),
    ("memory_max_bytes", "memory.max"),
];

/// A machine of which nothing has been said: what a file and the command line begin with.
pub fn plain() -> MachineConfig {
    let mut config = MachineConfig::new();
    config.cmdline = "console=ttyS0".to_owned();
    config.memory_bytes = 512 << 20;
    config.cpus.mut_or_insert_default().boot = 1;
    config.serial.mut_or_insert_default().mode = Mode::STDIO.into();
    config
}

/// A file that was read.
#[derive(Debug)]
pub struct ConfigFile {
    /// Its name, as it was given.
    name: String,
    /// The line of each key.
    places: Vec<(String, usize)>,
}

impl ConfigFile {
    /// Reads a file. What it describes is not validated.
    ///
    /// # Errors
    /// One line that names the file, the line and the key, and what to do.
    pub fn read(path: &Path) -> Result<(MachineConfig, Self), String> {
        let name = path.display().to_string();
        let fail = |what: String| format!("--config {name}: {what}");
        let mut bytes = Vec::new();
        File::open(path)
            .and_then(|file| {
                file.take(MAX_FILE.saturating_add(1))
                    .read_to_end(&mut bytes)
            })
            .map_err(|error| fail(format!("{error}: name a file that can be read")))?;
        if bytes.len() as u64 > MAX_FILE {
            return Err(fail(format!(
                "is longer than {MAX_FILE} bytes: a configuration is not; name the right file, or take out what is not needed"
            )));
        }
        let text = String::from_utf8(bytes).map_err(|error| {
            let at = error.utf8_error().valid_up_to();
            fail(format!("byte {at} is not UTF-8: save it as UTF-8"))
        })?;
        let (config, places) = parse(&text).map_err(|fault| match fault.line {
            0 => fail(fault.text),
            line => format!("--config {name}:{line}: {}", fault.text),
        })?;
        Ok((config, Self { name, places }))
    }

    /// A refusal that names a field of the API's, with the file, the line and the key named.
    pub fn in_file(&self, why: &str) -> String {
        let words: Vec<String> = why.split(' ').map(in_keys).collect();
        let text = words.join(" ");
        let key = text.split([' ', ':']).next().unwrap_or_default();
        let line = self
            .places
            .iter()
            .filter(|(place, _)| {
                key.strip_prefix(place.as_str())
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
            })
            .max_by_key(|(place, _)| place.len());
        match line {
            Some((_, line)) => format!("--config {}:{line}: {text}", self.name),
            None => format!("--config {}: {text}", self.name),
        }
    }
}

/// A field's name in the API as a file has it; any other word as it is.
fn in_keys(word: &str) -> String {
    let field = word.strip_prefix("config.");
    for (name, key) in MEMORY {
        if let Some(rest) = field.unwrap_or(word).strip_prefix(name) {
            return format!("{key}{rest}");
        }
    }
    let Some(field) = field else {
        return word.to_owned();
    };
    let parts: Vec<String> = field.split('.').map(in_key).collect();
    parts.join(".")
}

/// One part of a field's name.
fn in_key(part: &str) -> String {
    let end = part.find(|c: char| !c.is_ascii_lowercase() && c != '_');
    let (name, rest) = part.split_at(end.unwrap_or(part.len()));
    let list = LISTS.iter().find(|(list, _)| *list == name);
    format!("{}{rest}", list.map_or(name, |(_, key)| key))
}

/// What a file's text describes, and on which line each key is.
fn parse(text: &str) -> Result<(MachineConfig, Vec<(String, usize)>), fields::Fault> {
    let source = read::Source::new(text);
    let table = DeTable::parse(text).map_err(|error| {
        let span = error.span().unwrap_or_default();
        let what = error.message().replace('\n', " ");
        let words = match text.get(span.clone()).unwrap_or_default().trim() {
            "" => what,
            at => format!("{what}: {:?}", at.chars().take(64).collect::<String>()),
        };
        let remedy = if words.contains("duplicate key") {
            "give each key and each table once"
        } else {
            "the file is TOML: KEY = VALUE below [TABLE]"
        };
        fields::Fault {
            line: source.line(span.start),
            text: format!("{words}: {remedy}"),
        }
    })?;
    let mut config = plain();
    let whole = (0, String::new());
    read::Reader::whole(
        &source,
        Some(table.get_ref()),
        whole,
        &mut config,
        fields::machine,
    )?;
    name_devices(&mut config);
    Ok((config, source.places()))
}

/// Devices without an id are called as on the command line.
fn name_devices(config: &mut MachineConfig) {
    let disks = config.disks.iter_mut().map(|d| &mut d.id);
    let nets = config.nets.iter_mut().map(|d| &mut d.id);
    let rngs = config.rngs.iter_mut().map(|d| &mut d.id);
    let consoles = config.consoles.iter_mut().map(|d| &mut d.id);
    number(disks, "disk");
    number(nets, "net");
    number(rngs, "rng");
    number(consoles, "console");
    number(config.fs.iter_mut().map(|d| &mut d.id), "fs");
    for (index, device) in config.vhost_users.iter_mut().enumerate() {
        if device.id.is_empty() {
            let kind = net_kinds::by_id(device.device_id).map_or("vhost", |kind| kind.name);
            device.id = format!("{kind}{index}");
        }
    }
    if let Some(vsock) = config.vsock.as_mut()
        && vsock.id.is_empty()
    {
        vsock.id = "vsock".to_owned();
    }
}

fn number<'a>(ids: impl Iterator<Item = &'a mut String>, kind: &str) {
    for (index, id) in ids.enumerate().filter(|(_, id)| id.is_empty()) {
        *id = format!("{kind}{index}");
    }
}

/// A configuration as a file: [`ConfigFile::read`] takes it and comes to the same.
///
/// # Errors
/// One line.
pub fn print(config: &MachineConfig) -> Result<String, String> {
    let mut config = config.clone();
    let mut writer = write::Writer::default();
    fields::machine(&mut writer, &mut config).map_err(|fault| fault.text)?;
    Ok(writer.finish())
}
