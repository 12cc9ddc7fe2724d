//! Garbage everywhere at once: registers, doorbells, rings, requests, configuration space and
//! MSI-X table, from a seeded generator, so that a failure can be repeated.
//!
//! The device must not be harmed; nor may this guest's kernel, which would prove nothing. A
//! device does what it is told, so no mixture of the values written here, however torn, may
//! tell it to write to memory that is not ours or to raise an interrupt that is an exception:
//!
//! - addresses are those of our own pages, or have [`OUTSIDE`] set in their lower half, which
//!   lies in the 32-bit hole or beyond the end of memory whatever the upper half holds;
//! - lengths of buffers stay inside a page or exceed all of memory;
//! - rings are small enough for a page, or larger than any ring may be;
//! - MSI-X messages carry vectors that Linux ignores, with fixed delivery.

use std::time::{Duration, Instant};

use crate::driver::{Driver, Kind, NET_QUEUES, Setup, common, page};
use crate::function::{COMMAND, Window};
use crate::raw::PAGE;

const OUTSIDE: u64 = 0xc000_0000;
/// Buffers in our pages begin at most here and are at most [`SMALL`] long.
const LAST_START: u64 = (PAGE - 2 * SMALL as usize) as u64;
const SMALL: u32 = 600;
/// More than the guest's memory.
const HUGE: u32 = 0xc000_0000;

/// xorshift64.
pub struct Random(u64);

impl Random {
    /// A generator that `seed` determines.
    pub fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: usize) -> usize {
        // The upper bits are the better ones.
        ((self.next() >> 16) % (limit.max(1) as u64)) as usize
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> Option<T> {
        let n = self.below(from.len());
        from.get(n).copied()
    }

    fn address(&mut self, driver: &Driver) -> Result<u64, String> {
        let own = driver.address(self.below(page::COUNT), 0)?;
        Ok(match self.below(4) {
            // Rings are aligned, so some of these fit.
            0 => own,
            1 => own + self.next() % LAST_START,
            2 => (self.next() & 0xffff_ffff) | OUTSIDE,
            _ => self.next() | OUTSIDE,
        })
    }

    fn length(&mut self) -> u32 {
        let n = self.next() as u32;
        match self.below(4) {
            0 => n | HUGE,
            1 => 16 * (n % 8),
            _ => n % SMALL,
        }
    }

    fn ring_size(&mut self) -> u16 {
        self.pick(&[0, 1, 2, 3, 7, 8, 16, 100, 128, 0x401, 0x8000, 0xffff])
            .unwrap_or(1)
    }
}

/// Storms for `duration`; how many things were done.
pub fn run(driver: &Driver, random: &mut Random, duration: Duration) -> Result<u64, String> {
    let end = Instant::now() + duration;
    let mut done = 0;
    while Instant::now() < end {
        // Configuration space is put right often, or the registers would soon be out of reach.
        for round in 0..64 {
            let kinds = if round < 48 { 6 } else { 10 };
            match random.below(kinds) {
                0 | 1 => rings(driver, random)?,
                2 => common_configuration(driver, random)?,
                3 => doorbells(driver, random)?,
                4 => live_queue(driver, random)?,
                5 => device_configuration(driver, random)?,
                6 => configuration_space(driver, random)?,
                7 => base_addresses(driver, random)?,
                8 => msix(driver, random)?,
                _ => window(driver, random)?,
            }
            done += 1;
        }
        driver.function.restore_config()?;
    }
    driver.choose_attacked();
    // Quiet before the pages go, whatever state the device is in.
    driver.function.restore_config()?;
    driver.reset()?;
    driver.pages.still_there()?;
    Ok(done)
}

fn rings(driver: &Driver, random: &mut Random) -> Result<(), String> {
    let bytes = driver.pages.bytes();
    for _ in 0..random.below(24) {
        let table = random
            .pick(&[page::DESC, page::TABLE, page::TABLE2])
            .unwrap_or(page::DESC);
        let at = table * PAGE + 16 * random.below(20);
        match random.below(6) {
            0 => bytes.w64(at, random.address(driver)?)?,
            1 => bytes.w32(at + 8, random.length())?,
            2 => bytes.w16(at + 12, random.below(8) as u16)?,
            3 => bytes.w16(at + 14, random.below(18) as u16)?,
            4 => {
                let slot = page::AVAIL * PAGE + 2 * random.below(20);
                bytes.w16(slot, random.below(20) as u16)?;
            }
            _ => {
                // Header and status share a page; a write that succeeds spares the first sectors.
                let kind = random.pick(&[0, 1, 4, 8, 0x7fff_0000]).unwrap_or(0);
                let sector = random.next() >> random.below(64) | 64;
                bytes.w32(page::REQUEST * PAGE, kind)?;
                bytes.w64(page::REQUEST * PAGE + 8, sector)?;
            }
        }
    }
    let index = page::AVAIL * PAGE + 2;
    let ahead = random.below(3) as u16;
    bytes.w16(index, bytes.r16(index)?.wrapping_add(ahead))?;
    if random.below(32) == 0 {
        let index = page::USED * PAGE + 2;
        bytes.w16(index, random.next() as u16)?;
    }
    Ok(())
}

fn common_configuration(driver: &Driver, random: &mut Random) -> Result<(), String> {
    let word = random.next();
    match random.below(10) {
        0 => driver.write32(common::DEVICE_FEATURE_SELECT, random.below(4) as u32),
        1 => driver.write32(common::DRIVER_FEATURE_SELECT, word as u32),
        2 => driver.write32(common::DRIVER_FEATURE, word as u32),
        3 => driver.write16(common::CONFIG_MSIX_VECTOR, random.below(6) as u16),
        4 => driver.write8(common::STATUS, word as u8),
        5 => driver.write16(
            common::QUEUE_SELECT,
            [0, 1, 2, word as u16][random.below(4)],
        ),
        6 => driver.write16(common::QUEUE_SIZE, random.ring_size()),
        7 => driver.write16(common::QUEUE_MSIX_VECTOR, random.below(6) as u16),
        8 => driver.write16(common::QUEUE_ENABLE, random.below(3) as u16),
        _ => {
            let field = [
                common::QUEUE_DESC,
                common::QUEUE_DRIVER,
                common::QUEUE_DEVICE,
            ];
            let address = random.address(driver)?;
            driver.write64(random.pick(&field).unwrap_or(common::QUEUE_DESC), address)
        }
    }
}

fn doorbells(driver: &Driver, random: &mut Random) -> Result<(), String> {
    let Window { offset, len, .. } = driver.function.notify;
    let bells = driver.function.bar(driver.function.notify)?;
    let len = len.min(bells.len().saturating_sub(offset));
    let at = offset.saturating_add(random.below(len));
    let value = random.next() >> random.below(64);
    match random.below(3) {
        0 if at + 4 <= offset + len => bells.w32(at & !3, value as u32),
        1 => bells.w8(at, value as u8),
        _ if at + 2 <= offset + len => bells.w16(at & !1, value as u16),
        _ => Ok(()),
    }
}

/// A queue that works, so that what the rings hold is read, and at times one that cannot.
fn live_queue(driver: &Driver, random: &mut Random) -> Result<(), String> {
    // All ones: out of reach behind a moved or disabled BAR, where no reset ever ends.
    if driver.status()? == 0xff {
        driver.function.restore_config()?;
    }
    if driver.kind == Kind::Net {
        driver.choose(random.pick(&NET_QUEUES).unwrap_or(0));
    }
    driver.negotiate()?;
    let mut setup = driver.honest()?;
    if random.below(4) == 0 {
        setup = Setup {
            size: random.ring_size(),
            desc: random.address(driver)?,
            driver: random.address(driver)?,
            device: random.address(driver)?,
        };
    }
    // A fresh ring begins at index 0: offer a few heads.
    driver.set_avail(random.below(20) as u16)?;
    driver.queue(setup)?;
    driver.go()?;
    driver.kick()
}

fn device_configuration(driver: &Driver, random: &mut Random) -> Result<(), String> {
    for place in [driver.function.device, driver.function.isr] {
        let registers = driver.function.bar(place)?;
        let len = place.len.min(registers.len().saturating_sub(place.offset));
        if len == 0 {
            continue;
        }
        let at = place.offset + random.below(len);
        registers.r8(at)?;
        registers.w8(at, random.next() as u8)?;
    }
    Ok(())
}

fn configuration_space(driver: &Driver, random: &mut Random) -> Result<(), String> {
    let size = random.pick(&[1_usize, 2, 4]).unwrap_or(1);
    let space = if random.below(2) == 0 {
        256
    } else {
        driver.function.config_size as usize
    };
    let at = (random.below(space) & !(size - 1)) as u64;
    // Through the window, a random write could set half an address: see `window`.
    let through = |cap: u64| (cap + 4..cap + 20).contains(&(at & !3));
    if driver.function.pci_cfg_cap.is_some_and(through) {
        return Ok(());
    }
    let bytes = random.next().to_le_bytes();
    driver
        .function
        .write_config(at, bytes.get(..size).unwrap_or_default())
}

fn base_addresses(driver: &Driver, random: &mut Random) -> Result<(), String> {
    let at = COMMAND + 12 + 4 * random.below(8) as u64;
    let word = [
        0,
        u32::MAX,
        random.next() as u32,
        0xfee0_0000,
        0xfec0_0000,
        0xe000_0000,
    ];
    let word = random.pick(&word).unwrap_or(0);
    driver.function.write_config(at, &word.to_le_bytes())?;
    let command = random.next() as u16;
    driver
        .function
        .write_config(COMMAND, &command.to_le_bytes())
}

fn msix(driver: &Driver, random: &mut Random) -> Result<(), String> {
    let Some(table) = driver.function.msix_table else {
        return Ok(());
    };
    let registers = driver.function.bar(table)?;
    let entry = table.offset + 16 * random.below(table.len / 16);
    match random.below(5) {
        0 => registers.w32(entry, 0xfee0_0000 | (random.next() as u32 & 0x000f_fffc)),
        1 => registers.w32(entry + 4, random.pick(&[0, 1 << 16, u32::MAX]).unwrap_or(0)),
        2 => registers.w32(entry + 8, 0x30 + random.below(0x50) as u32),
        3 => registers.w32(entry + 12, random.next() as u32),
        _ => {
            // Enabled and masked in all four ways.
            let control = ((random.next() & 3) << 14) as u16;
            driver.function.write_msix_control(control)
        }
    }
}

/// The window to a BAR in configuration space (4.1.4.9).
fn window(driver: &Driver, random: &mut Random) -> Result<(), String> {
    let Some(cap) = driver.function.pci_cfg_cap else {
        return Ok(());
    };
    let status = (driver.function.common.offset + common::STATUS) as u32;
    let bar = random
        .pick(&[driver.function.common.bar, 1, 5, 6, 0xff])
        .unwrap_or(0);
    // The status register, or something that lies in no BAR.
    let offset = random
        .pick(&[status, 0x1000_0000, 0x7fff_fff0, u32::MAX])
        .unwrap_or(status);
    let length = random.pick(&[0, 1, 2, 3, 4, 8, u32::MAX]).unwrap_or(1);
    // Only one byte is written to the status register's window: its neighbours select a queue.
    let length = if offset == status { length & 1 } else { length };
    driver.function.write_config(cap + 4, &[bar])?;
    driver
        .function
        .write_config(cap + 8, &offset.to_le_bytes())?;
    driver
        .function
        .write_config(cap + 12, &length.to_le_bytes())?;
    driver.function.config8(cap + 16)?;
    let value = random.next() as u32;
    driver.function.write_config(cap + 16, &value.to_le_bytes())
}
