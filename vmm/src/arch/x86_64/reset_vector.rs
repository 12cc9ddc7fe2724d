//! The real-mode reset vector at the end of the first MiB: what a guest meets that reboots
//! "through the BIOS". Linux does so on a hardware-reduced machine without EFI: it takes the
//! EFI way for granted there, and falls back to a far jump to FFFF:0000 when there is none.
//! There is no firmware here; the code does what firmware would, and resets the machine.
//! Written by the manager thread before the guest starts.

use crate::memory::MappedMemory;
use vm_memory::{Bytes, GuestAddress};

use super::layout;

/// FFFF:0000.
const RESET_VECTOR: u64 = 0xf_fff0;
// The port fits an immediate, and ACPI's tables begin below the code.
const _: () = assert!(layout::RESET_PORT <= u16::MAX as u64 && layout::ACPI_START < RESET_VECTOR);

/// Writes the code.
///
/// # Errors
/// When there is no RAM at the vector, which no machine of ours lacks.
pub fn write(ram: &MappedMemory) -> Result<(), vm_memory::GuestMemoryError> {
    let [low, high, ..] = layout::RESET_PORT.to_le_bytes();
    let code = [
        0xba,
        low,
        high, // mov dx, RESET_PORT
        0xb0,
        layout::RESET_VALUE, // mov al, RESET_VALUE
        0xee,                // out dx, al
        0xf4,                // hlt
        0xeb,
        0xfd, // jmp to the hlt
    ];
    ram.write_slice(&code, GuestAddress(RESET_VECTOR))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_fits_between_the_vector_and_the_end_of_the_first_mebibyte() {
        let ram = MappedMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        write(&ram).unwrap();
        let first: u8 = ram.read_obj(GuestAddress(RESET_VECTOR)).unwrap();
        assert_eq!(first, 0xba);
    }
}
