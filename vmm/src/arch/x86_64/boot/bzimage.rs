//! A compressed kernel: the Linux/x86 boot protocol, 64-bit entry
//! (Documentation/arch/x86/boot.rst, sections "The Real-Mode Kernel Header" and "64-bit Boot
//! Protocol").

use linux_loader::loader::bootparam::setup_header;
use vm_memory::ByteValued;

use super::image::Image;
use super::working_set::WorkingSet;
use super::{BootError, Problem};
use crate::arch::x86_64::layout;
use crate::memory::GuestRam;

/// Where the header lies in the file and in the zero page.
const HEADER_OFFSET: u64 = 0x1f1;
/// Where the jump's displacement says that the header ends, relative to 0x202.
const JUMP_DISPLACEMENT: usize = 0x201 - 0x1f1;
const MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
const BOOT_FLAG: u16 = 0xaa55;
/// 2.12 introduced xloadflags.
const MIN_VERSION: u16 = 0x020c;
const XLF_KERNEL_64: u16 = 1;
const LOADED_HIGH: u8 = 1;
const SECTOR: u64 = 512;
/// The 64-bit entry point, relative to the load address.
const ENTRY_64: u64 = 0x200;

/// A bzImage in guest RAM.
pub(super) struct BzImage {
    /// The header, for the zero page.
    pub(super) header: setup_header,
    /// The 64-bit entry point.
    pub(super) entry: u64,
    /// The first address above what the kernel needs to itself until it is up.
    pub(super) end: u64,
}

/// True when the file claims to be a bzImage.
pub(super) fn matches(image: &Image<'_>) -> bool {
    let flag = image.bytes::<2>(0x1fe).map(u16::from_le_bytes);
    let magic = image.bytes::<4>(0x202).map(u32::from_le_bytes);
    matches!((flag, magic), (Ok(BOOT_FLAG), Ok(MAGIC)))
}

/// Copies the protected-mode part into `ram`.
pub(super) fn load(
    image: &Image<'_>,
    ram: &GuestRam,
    set: &mut WorkingSet<'_>,
) -> Result<BzImage, BootError> {
    const SIZE: usize = size_of::<setup_header>();
    let mut bytes = image.bytes::<SIZE>(HEADER_OFFSET)?;
    // What lies behind the header's end is code of the real-mode part.
    let displacement = bytes.get(JUMP_DISPLACEMENT).copied().unwrap_or(0);
    let end = usize::from(displacement).saturating_add(0x202 - 0x1f1);
    if let Some(code) = bytes.get_mut(end..) {
        code.fill(0);
    }
    let header = *setup_header::from_slice(&bytes).unwrap_or(&setup_header::default());
    let (version, xloadflags) = (header.version, header.xloadflags);
    if version < MIN_VERSION || xloadflags & XLF_KERNEL_64 == 0 {
        return Err(image.error(Problem::NotX86_64));
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return Err(image.error(Problem::NotAKernel));
    }
    let setup_sectors = match header.setup_sects {
        0 => 4,
        n => u64::from(n),
    };
    let start = setup_sectors.saturating_add(1).saturating_mul(SECTOR);
    let stated = u64::from(header.syssize).saturating_mul(16);
    let len = image.size().saturating_sub(start);
    // Signed kernels are longer than they state; a shorter one has been cut.
    if stated == 0 || len < stated.saturating_sub(15) {
        return Err(image.error(Problem::Truncated));
    }
    let address = header.pref_address;
    if address < layout::EXTENDED_RAM_START {
        return Err(image.error(Problem::NotAKernel));
    }
    let room = u64::from(header.init_size).max(len);
    let end = address.saturating_add(room);
    if end > ram.low_end() {
        return Err(image.too_big(ram, end));
    }
    set.add(address, room);
    image.copy(start, len, ram, address)?;
    Ok(BzImage {
        header,
        entry: address.saturating_add(ENTRY_64),
        end,
    })
}
