//! A directory of the host's in the guest: from its configuration to a virtiofsd, which the launcher
//! starts, and its options. VIRTIO 1.2 section 5.11. Called on the manager thread, and by threads that
//! add a device.

use bulkhead_proto::machine::{FsConfig, fs_config::Cache};

use super::device::{Device, Site};
use super::kinds;
use super::net_external::{self, HelperOrder, Started};
use crate::launcher::helper::VIRTIOFSD;
use crate::virtio::VirtioPciOptions;

/// Virtio device id.
const DEVICE_TYPE: u16 = 26;
/// One for requests that cannot wait, and the one for requests that virtiofsd has.
const QUEUES: u16 = 2;
/// Bytes of a tag in the configuration space.
const TAG: usize = 36;

/// Starts virtiofsd, and puts a function in front.
///
/// # Errors
/// One line that names the device, and the remedy; nothing stays behind.
pub fn spawn(fs: &FsConfig, site: &Site<'_>) -> Result<Device, String> {
    let order = HelperOrder {
        id: &fs.id,
        kind: VIRTIOFSD,
        options: options(fs),
        resources: fs.resources.as_ref().cloned().unwrap_or_default(),
        least: kinds::virtiofsd_least(site.launcher.helper_data(VIRTIOFSD)),
        hint: |_| " (it must be virtiofsd 1.13 or later)",
    };
    let first = match net_external::start(order, false, site)? {
        Started::First(first) => *first,
        Started::Refused(why) => return Err(why),
    };
    let space = configuration(&fs.tag, QUEUES.into());
    let options = VirtioPciOptions::external(&fs.id, DEVICE_TYPE, QUEUES, Some(space));
    net_external::finish("fs", options, first, None, site)
}

/// What the launcher is to tell virtiofsd.
fn options(fs: &FsConfig) -> Vec<String> {
    let cache = match fs.cache.enum_value_or_default() {
        Cache::CACHE_AUTO => "auto",
        Cache::CACHE_ALWAYS => "always",
        Cache::CACHE_METADATA => "metadata",
        Cache::CACHE_NEVER => "never",
    };
    let mut options = vec![format!("source={}", fs.source), format!("cache={cache}")];
    options.extend(fs.readonly.then(|| "readonly".to_owned()));
    options.extend(fs.xattr.then(|| "xattr".to_owned()));
    options
}

/// The configuration space: the tag, and how many queues there are for requests, which come after the
/// one for those that cannot wait.
pub fn configuration(tag: &str, queues: u32) -> Vec<u8> {
    let mut space = tag.as_bytes().to_vec();
    space.resize(TAG, 0);
    space.extend_from_slice(&queues.saturating_sub(1).max(1).to_le_bytes());
    space
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn virtiofsd_is_told_what_the_configuration_says() {
        let mut fs = FsConfig::new();
        fs.source = "/srv/a".into();
        assert_eq!(options(&fs), ["source=/srv/a", "cache=auto"]);
        (fs.readonly, fs.xattr) = (true, true);
        fs.cache = Cache::CACHE_NEVER.into();
        let all = ["source=/srv/a", "cache=never", "readonly", "xattr"];
        assert_eq!(options(&fs), all);
    }

    #[test]
    fn the_guest_finds_the_tag_and_one_queue() {
        let space = configuration("home", QUEUES.into());
        assert_eq!((space.len(), &space[..5]), (40, &b"home\0"[..]));
        assert_eq!(space[36..], [1, 0, 0, 0]);
    }
}
