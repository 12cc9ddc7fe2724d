//! A virtio device's PCI function, taken from the kernel's driver by sysfs: configuration
//! space, virtio capabilities (virtio 1.2, 4.1.4) and the mapped BARs they point into.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::raw::Mapping;

/// Offset of the command register.
pub const COMMAND: u64 = 4;
/// Memory space, bus master, no INTx.
const COMMAND_ON: u16 = 1 << 1 | 1 << 2 | 1 << 10;
const CAPABILITIES: u64 = 0x34;
const CAP_POWER: u8 = 0x01;
const CAP_VENDOR: u8 = 0x09;
const CAP_MSIX: u8 = 0x11;
/// The first header's bytes, of which a copy is kept.
const SAVED: usize = 256;

/// A window into a BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Number of the BAR.
    pub bar: u8,
    /// Where in it the window begins.
    pub offset: usize,
    /// Its length.
    pub len: usize,
}

/// The function.
pub struct Function {
    config: File,
    saved: Vec<u8>,
    bars: BTreeMap<u8, Mapping>,
    /// Common configuration.
    pub common: Window,
    /// Doorbells.
    pub notify: Window,
    /// Bytes between two queues' doorbells, per queue_notify_off.
    pub notify_multiplier: usize,
    /// Interrupt status.
    pub isr: Window,
    /// Device configuration.
    pub device: Window,
    /// MSI-X table.
    pub msix_table: Option<Window>,
    /// Offset of the MSI-X capability.
    msix_cap: Option<u64>,
    /// Offset of the power management capability.
    power_cap: Option<u64>,
    /// Offset of the window to a BAR in configuration space (VIRTIO_PCI_CAP_PCI_CFG).
    pub pci_cfg_cap: Option<u64>,
    /// Physical address of the common configuration's BAR.
    pub bar_address: u64,
    /// Size of configuration space.
    pub config_size: u64,
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    fs::write(path, text).map_err(|e| format!("{text:?} to {}: {e}", path.display()))
}

/// The PCI address of `name`: a disk (`vda`, `/dev/vda`) or the address itself.
fn address(name: &str) -> Result<String, String> {
    let name = name.trim_start_matches("/dev/");
    if name.contains(':') {
        return Ok(name.to_string());
    }
    let link = format!("/sys/block/{name}/device");
    let path = fs::canonicalize(&link).map_err(|e| format!("{link}: {e}"))?;
    // …/0000:01:00.0/virtio3
    path.parent()
        .and_then(Path::file_name)
        .and_then(|n| n.to_str())
        .filter(|n| n.contains(':'))
        .map(str::to_string)
        .ok_or_else(|| format!("{name} is not on PCI: {}", path.display()))
}

impl Function {
    /// Takes the device called `name` from its driver, enables it and maps its BARs.
    pub fn open(name: &str) -> Result<Self, String> {
        let address = address(name)?;
        let dir = PathBuf::from("/sys/bus/pci/devices").join(&address);
        if dir.join("driver").exists() {
            write(&dir.join("driver/unbind"), &address)?;
        }
        write(&dir.join("enable"), "1")?;
        let path = dir.join("config");
        let failed = |e| format!("{}: {e}", path.display());
        let config = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .map_err(failed)?;
        let config_size = config.metadata().map_err(failed)?.len();
        let nowhere = Window {
            bar: 0,
            offset: 0,
            len: 0,
        };
        let mut function = Self {
            config,
            saved: Vec::new(),
            bars: BTreeMap::new(),
            common: nowhere,
            notify: nowhere,
            notify_multiplier: 0,
            isr: nowhere,
            device: nowhere,
            msix_table: None,
            msix_cap: None,
            power_cap: None,
            pci_cfg_cap: None,
            bar_address: 0,
            config_size,
        };
        function.write_config(COMMAND, &COMMAND_ON.to_le_bytes())?;
        function.read_capabilities()?;
        function.map_bars(&dir)?;
        let mut saved = vec![0; SAVED];
        function
            .config
            .read_exact_at(&mut saved, 0)
            .map_err(failed)?;
        function.saved = saved;
        Ok(function)
    }

    fn read_capabilities(&mut self) -> Result<(), String> {
        let mut at = u64::from(self.config8(CAPABILITIES)?) & !3;
        // 48 capabilities of 4 bytes fill the space: more is a loop.
        for _ in 0..48 {
            if at == 0 {
                break;
            }
            match self.config8(at)? {
                CAP_VENDOR => self.read_virtio_capability(at)?,
                CAP_MSIX => {
                    let entries = usize::from(self.config16(at + 2)? & 0x7ff) + 1;
                    let table = self.config32(at + 4)?;
                    self.msix_cap = Some(at);
                    self.msix_table = Some(Window {
                        bar: (table & 7) as u8,
                        offset: (table & !7) as usize,
                        len: entries * 16,
                    });
                }
                CAP_POWER => self.power_cap = Some(at),
                _ => {}
            }
            at = u64::from(self.config8(at + 1)?) & !3;
        }
        match (self.common.len, self.notify.len) {
            (56.., 2..) => Ok(()),
            (common, notify) => Err(format!(
                "no virtio 1.0 function: common configuration {common} bytes, doorbells {notify}"
            )),
        }
    }

    fn read_virtio_capability(&mut self, at: u64) -> Result<(), String> {
        let window = Window {
            bar: self.config8(at + 4)?,
            offset: self.config32(at + 8)? as usize,
            len: self.config32(at + 12)? as usize,
        };
        match self.config8(at + 3)? {
            1 => self.common = window,
            2 => {
                self.notify = window;
                self.notify_multiplier = self.config32(at + 16)? as usize;
            }
            3 => self.isr = window,
            4 => self.device = window,
            5 => self.pci_cfg_cap = Some(at),
            _ => {}
        }
        Ok(())
    }

    fn map_bars(&mut self, dir: &Path) -> Result<(), String> {
        let path = dir.join("resource");
        let text = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let mut wanted = vec![
            self.common.bar,
            self.notify.bar,
            self.isr.bar,
            self.device.bar,
        ];
        wanted.extend(self.msix_table.map(|w| w.bar));
        for bar in wanted {
            if self.bars.contains_key(&bar) {
                continue;
            }
            let mut ends = text
                .lines()
                .nth(bar.into())
                .unwrap_or_default()
                .split_whitespace();
            let mut end = || {
                let hex = ends.next()?.trim_start_matches("0x");
                u64::from_str_radix(hex, 16).ok()
            };
            let (Some(first), Some(last @ 1..)) = (end(), end()) else {
                return Err(format!("BAR {bar} has no address"));
            };
            let path = dir.join(format!("resource{bar}"));
            let failed = |e| format!("{}: {e}", path.display());
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .open(&path)
                .map_err(failed)?;
            let len = last.saturating_sub(first).saturating_add(1) as usize;
            self.bars
                .insert(bar, Mapping::registers(&file, len).map_err(failed)?);
            if bar == self.common.bar {
                self.bar_address = first;
            }
        }
        Ok(())
    }

    /// The registers that `window` lies in; its offsets are relative to the BAR.
    pub fn bar(&self, window: Window) -> Result<&Mapping, String> {
        self.bars
            .get(&window.bar)
            .ok_or_else(|| format!("BAR {} is not mapped", window.bar))
    }

    /// Reads a byte of configuration space.
    pub fn config8(&self, at: u64) -> Result<u8, String> {
        self.read_config(at).map(|[b]| b)
    }

    fn config16(&self, at: u64) -> Result<u16, String> {
        self.read_config(at).map(u16::from_le_bytes)
    }

    fn config32(&self, at: u64) -> Result<u32, String> {
        self.read_config(at).map(u32::from_le_bytes)
    }

    fn read_config<const N: usize>(&self, at: u64) -> Result<[u8; N], String> {
        let mut bytes = [0; N];
        self.config
            .read_exact_at(&mut bytes, at)
            .map_err(|e| format!("configuration space at {at:#x}: {e}"))?;
        Ok(bytes)
    }

    /// Writes 1, 2 or 4 bytes to configuration space, in one access.
    pub fn write_config(&self, at: u64, bytes: &[u8]) -> Result<(), String> {
        self.config
            .write_all_at(bytes, at)
            .map_err(|e| format!("configuration space at {at:#x}: {e}"))
    }

    /// Writes the MSI-X message control register.
    pub fn write_msix_control(&self, control: u16) -> Result<(), String> {
        match self.msix_cap {
            Some(cap) => self.write_config(cap + 2, &control.to_le_bytes()),
            None => Ok(()),
        }
    }

    /// Puts configuration space back as it was: awake, BARs in place, MSI-X off.
    pub fn restore_config(&self) -> Result<(), String> {
        if let Some(cap) = self.power_cap {
            self.write_config(cap + 4, &[0, 0])?;
        }
        for (n, word) in self.saved.chunks_exact(4).enumerate() {
            let at = n as u64 * 4;
            // A write to the last word of the window would be a write to the BAR it names.
            let through = self.pci_cfg_cap.is_some_and(|cap| at == cap + 16);
            // Command comes last; MSI-X below.
            if through || at == COMMAND || self.msix_cap == Some(at) {
                continue;
            }
            self.write_config(at, word)?;
        }
        self.write_msix_control(0)?;
        self.write_config(COMMAND, &COMMAND_ON.to_le_bytes())
    }
}
