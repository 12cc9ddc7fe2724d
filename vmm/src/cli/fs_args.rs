//! `--fs` of `bulkhead run` and `bulkhead ctl create`: text in, [`FsConfig`] out, or, with a socket, the
//! device of somebody else's that it is short for. Runs in the command line's process.

use bulkhead_proto::machine::{FsConfig, VhostUserConfig, fs_config::Cache};

use super::machine_args::{Keys, absolute, check_id, parse_switch, split_option};
use super::net_args::parse_vhost_user;
use super::resource_args;
use crate::api::check_tag;

/// What `--fs` takes, for its errors.
const FS_FORM: &str = "tag=NAME,source=DIR[,readonly=on][,cache=auto|always|metadata|never][,xattr=on][,id=NAME][,cpu=PERCENT][,memory=SIZE][,pids=N], or tag=NAME,socket=PATH[,KEY=VALUE]… as --vhost-user takes it";

/// What `--fs` asks for.
#[derive(Clone, Debug, PartialEq)]
pub enum Fs {
    /// A directory, by a virtiofsd of our own.
    Directory(FsConfig),
    /// Somebody else's virtiofsd.
    Socket(VhostUserConfig),
}

impl Fs {
    /// Its id.
    pub fn id(&self) -> &str {
        match self {
            Self::Directory(fs) => &fs.id,
            Self::Socket(device) => &device.id,
        }
    }
}

/// A file system from its option; `index` names it when the text does not.
///
/// # Errors
/// One line that names the option, the key and what it takes.
pub fn parse_fs(text: &str, index: usize) -> Result<Fs, String> {
    let option = format!("--fs {text}");
    let parts = split_option(text);
    let names = |key: &str| parts.iter().any(|part| part.starts_with(key));
    if names("socket=") && names("source=") {
        return Err(format!(
            "{option}: source= and socket= are both there: give source=DIR for a virtiofsd of bulkhead's own, or socket=PATH of one that runs"
        ));
    }
    if names("socket=") {
        let device = parse_vhost_user(&format!("kind=fs,{text}"), index);
        let own = |why: String| why.replacen("--vhost-user kind=fs,", "--fs ", 1);
        return device.map_err(own).map(Fs::Socket);
    }
    let mut fs = FsConfig::new();
    let mut keys = Keys::default();
    for part in parts.iter().map(String::as_str) {
        let unknown = |what: &str| {
            Err(format!(
                "{option}: {what:?} is unknown: the form is {FS_FORM}"
            ))
        };
        let Some((key, value)) = part.split_once('=') else {
            return unknown(part);
        };
        keys.once(&option, key)?;
        match key {
            "tag" => {
                check_tag(value).map_err(|why| format!("{option}: tag={value}: {why}"))?;
                value.clone_into(&mut fs.tag);
            }
            "source" => fs.source = absolute(&option, value)?,
            "readonly" => fs.readonly = parse_switch(&option, key, value)?,
            "xattr" => fs.xattr = parse_switch(&option, key, value)?,
            "cache" => {
                fs.cache = match value {
                    "auto" => Cache::CACHE_AUTO,
                    "always" => Cache::CACHE_ALWAYS,
                    "metadata" => Cache::CACHE_METADATA,
                    "never" => Cache::CACHE_NEVER,
                    _ => {
                        return Err(format!(
                            "{option}: cache={value}: give auto, always, metadata or never"
                        ));
                    }
                }
                .into();
            }
            "id" => value.clone_into(&mut fs.id),
            key if resource_args::KEYS.contains(&key) && key != "io" => {
                let resources = fs.resources.mut_or_insert_default();
                resource_args::set(resources, key, value).map_err(|e| format!("{option}: {e}"))?;
            }
            _ => return unknown(key),
        }
    }
    if fs.source.is_empty() {
        return Err(format!(
            "{option}: source=DIR is missing: name the directory, or socket=PATH of a virtiofsd that runs"
        ));
    }
    if fs.tag.is_empty() {
        return Err(format!(
            "{option}: tag=NAME is missing: the guest mounts it by that"
        ));
    }
    if fs.id.is_empty() {
        fs.id = format!("fs{index}");
    }
    check_id(&fs.id).map_err(|e| format!("{option}: id={}: {e}", fs.id))?;
    Ok(Fs::Directory(fs))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(text: &str) -> FsConfig {
        match parse_fs(text, 3).unwrap() {
            Fs::Directory(fs) => fs,
            Fs::Socket(device) => panic!("{device}"),
        }
    }

    #[test]
    fn a_directory_and_a_socket_are_understood() {
        let fs = directory("tag=home,source=/srv/a,,b,readonly=on,cache=never,xattr=on,cpu=50");
        assert_eq!(
            (fs.id.as_str(), fs.tag.as_str(), fs.source.as_str()),
            ("fs3", "home", "/srv/a,b")
        );
        assert!(fs.readonly && fs.xattr && fs.cache == Cache::CACHE_NEVER.into());
        assert_eq!(fs.resources.cpu_percent, 50);
        let plain = directory("source=/srv,tag=x,id=y");
        assert_eq!((plain.id.as_str(), plain.readonly), ("y", false));
        let other = parse_fs("tag=home,socket=/run/fs,queues=2,id=h", 0).unwrap();
        let same = parse_vhost_user("kind=fs,tag=home,socket=/run/fs,queues=2,id=h", 0);
        assert_eq!(other, Fs::Socket(same.unwrap()));
        assert_eq!(other.id(), "h");
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        for (bad, why) in [
            ("tag=a", "source=DIR is missing"),
            ("source=/a", "tag=NAME is missing"),
            ("tag=,source=/a", "1 to 36 bytes"),
            ("tag=a,source=/a,readonly=yes", "readonly=yes"),
            ("tag=a,source=/a,cache=none", "auto, always"),
            ("tag=a,source=/a,io=rbps=1", "is unknown"),
            ("tag=a,source=/a,id=../x", "id=../x"),
            ("tag=a,source=/a,tag=b", "tag="),
            ("tag=a,socket=/a,readonly=on", "is unknown"),
            ("tag=a,socket=/a,source=/a", "source= and socket= are both"),
            ("source=/a,socket=/a,tag=a", "source= and socket= are both"),
            ("tag=a\nb,source=/a", "the control character '\\n'"),
            ("home", "is unknown"),
        ] {
            let line = parse_fs(bad, 0).unwrap_err();
            assert!(line.starts_with("--fs ") && line.contains(why), "{line}");
        }
    }
}
