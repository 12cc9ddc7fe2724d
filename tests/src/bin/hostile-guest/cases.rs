//! The attacks on rings and requests, one function for each table of rules they break.

use std::time::Duration;

use crate::driver::{DEADLINE, Desc, Driver, INDIRECT, NEXT, Outcome, SIZE, Setup, common, page};

/// An address that no guest of ours has memory at.
const NOWHERE: u64 = 0x0000_4000_0000_0000;
/// How long to watch a device that may well do nothing at all.
const QUIET: Duration = Duration::from_millis(300);

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_UNKNOWN: u32 = 0x7777;

/// Runs the case called `name`; `None` if there is none.
pub fn run(driver: &Driver, name: &str) -> Result<Option<Outcome>, String> {
    driver.reset()?;
    driver.pages.clear()?;
    driver.negotiate()?;
    driver.request(T_IN, 0)?;
    let outcome = match name {
        "avail-jump" | "duplicate-head" | "head-index" | "loop" | "next-index" => {
            descriptors(driver, name)?
        }
        _ if name.starts_with("indirect-") => indirect(driver, name)?,
        _ => match buffers(driver, name)? {
            Some(chain) => kick(driver, &chain)?,
            None => match registers(driver, name)? {
                Some(outcome) => outcome,
                None => return Ok(None),
            },
        },
    };
    driver.pages.still_there()?;
    Ok(Some(outcome))
}

/// Makes `chain` available in an honest ring and waits.
fn kick(driver: &Driver, chain: &[Desc]) -> Result<Outcome, String> {
    driver.chain(page::DESC, chain)?;
    driver.offer(&[0])?;
    start(driver, 1)
}

fn start(driver: &Driver, completions: u16) -> Result<Outcome, String> {
    driver.queue(driver.honest()?)?;
    driver.go()?;
    driver.kick()?;
    driver.wait(completions, DEADLINE)
}

/// Indices that lie, in the available ring and between descriptors.
fn descriptors(driver: &Driver, name: &str) -> Result<Outcome, String> {
    let (header, data, status) = (driver.header()?, driver.data(512)?, driver.status_desc()?);
    driver.chain(page::DESC, &[header, data, status])?;
    match name {
        "head-index" => driver.offer(&[SIZE])?,
        "next-index" => {
            driver.desc(page::DESC, 1, Desc { next: SIZE, ..data })?;
            driver.offer(&[0])?;
        }
        "loop" => {
            driver.desc(page::DESC, 1, Desc { next: 1, ..data })?;
            driver.offer(&[0])?;
        }
        "avail-jump" => driver.set_avail(SIZE + 1)?,
        _ => {
            // The second may come before or after the first has been completed.
            driver.offer(&[0, 0])?;
            return start(driver, 2);
        }
    }
    start(driver, 1)
}

/// Chains whose buffers are wrong, or whose request cannot be granted.
fn buffers(driver: &Driver, name: &str) -> Result<Option<Vec<Desc>>, String> {
    let (header, data, status) = (driver.header()?, driver.data(512)?, driver.status_desc()?);
    let request = |data: Desc| vec![header, data, status];
    let chain = match name {
        "length-overflow" => request(Desc {
            addr: u64::MAX - 0xff,
            len: 0x1000,
            ..data
        }),
        "outside-memory" => request(Desc {
            addr: NOWHERE,
            ..data
        }),
        "device-memory" => request(Desc {
            addr: driver.function.bar_address,
            ..data
        }),
        "straddles-end" => {
            // Only read by the device, and of a request that must fail: nothing is overwritten.
            driver.request(T_OUT, u64::MAX >> 9)?;
            let addr = end_of_memory()?.saturating_sub(0x100);
            request(Desc {
                addr,
                len: 0x2000,
                flags: NEXT,
                next: 0,
            })
        }
        "huge-length" => request(Desc {
            len: u32::MAX,
            ..data
        }),
        "total-length" => {
            // Each is inside memory, and only read; together they exceed 32 bits.
            driver.request(T_OUT, u64::MAX >> 9)?;
            return total_length(driver).map(Some);
        }
        "readable-after-writable" => vec![
            header,
            data,
            Desc {
                flags: NEXT,
                ..data
            },
            status,
        ],
        "no-status-byte" => vec![header, Desc { flags: 0, ..data }],
        "header-outside" => vec![
            Desc {
                addr: NOWHERE,
                ..header
            },
            data,
            status,
        ],
        "zero-length" => request(Desc { len: 0, ..data }),
        "short-header" => vec![Desc { len: 8, ..header }, data, status],
        "beyond-capacity" => {
            driver.request(T_IN, 1 << 40)?;
            request(data)
        }
        "sector-overflow" => {
            driver.request(T_IN, u64::MAX)?;
            request(data)
        }
        "partial-sector" => request(Desc { len: 100, ..data }),
        "unknown-type" => {
            driver.request(T_UNKNOWN, 0)?;
            request(data)
        }
        "ring-as-buffer" => {
            // The sector lands on the descriptors that are being worked on.
            request(Desc {
                addr: driver.address(page::DESC, 0)?,
                ..data
            })
        }
        _ => return Ok(None),
    };
    Ok(Some(chain))
}

/// A chain of one indirect table that names the same readable memory over and over.
fn total_length(driver: &Driver) -> Result<Vec<Desc>, String> {
    // 254 entries of 32 MiB are 8 GiB; every guest of ours has memory up to 33 MiB.
    let length = 32 << 20;
    let readable = Desc {
        addr: 1 << 20,
        len: length,
        flags: NEXT,
        next: 0,
    };
    let mut chain = vec![driver.header()?];
    chain.extend([readable; 254]);
    chain.push(driver.status_desc()?);
    driver.chain(page::TABLE, &chain)?;
    let addr = driver.address(page::TABLE, 0)?;
    Ok(vec![Desc {
        addr,
        len: 4096,
        flags: INDIRECT,
        next: 0,
    }])
}

/// Where the guest's RAM ends.
fn end_of_memory() -> Result<u64, String> {
    let path = "/proc/iomem";
    let text = std::fs::read_to_string(path).map_err(|e| format!("{path}: {e}"))?;
    text.lines()
        .filter(|line| line.ends_with(" : System RAM"))
        .filter_map(|line| line.split([' ', '-']).nth(1))
        .filter_map(|end| u64::from_str_radix(end, 16).ok())
        .max()
        .and_then(|last| last.checked_add(1))
        .ok_or_else(|| format!("no end of memory in {path}"))
}

/// Indirect tables.
fn indirect(driver: &Driver, name: &str) -> Result<Outcome, String> {
    let (header, data, status) = (driver.header()?, driver.data(512)?, driver.status_desc()?);
    driver.chain(page::TABLE, &[header, data, status])?;
    let addr = driver.address(page::TABLE, 0)?;
    let table = Desc {
        addr,
        len: 48,
        flags: INDIRECT,
        next: 0,
    };
    let chain = match name {
        "indirect-nested" => {
            driver.chain(page::TABLE2, &[header, data, status])?;
            let inner = Desc {
                addr: driver.address(page::TABLE2, 0)?,
                ..table
            };
            driver.desc(page::TABLE, 0, inner)?;
            vec![table]
        }
        "indirect-and-next" => vec![
            Desc {
                flags: INDIRECT | NEXT,
                ..table
            },
            status,
        ],
        "indirect-bounds" => vec![Desc { len: 47, ..table }],
        "indirect-outside" => vec![Desc {
            addr: NOWHERE,
            ..table
        }],
        "indirect-next" => {
            driver.desc(page::TABLE, 1, Desc { next: 3, ..data })?;
            vec![table]
        }
        "indirect-loop" => {
            driver.desc(page::TABLE, 1, Desc { next: 1, ..data })?;
            vec![table]
        }
        "indirect-empty" => vec![Desc { len: 0, ..table }],
        _ => vec![Desc {
            len: 0xffff_fff0,
            ..table
        }],
    };
    kick(driver, &chain)
}

/// Queues set up wrongly in the common configuration.
fn registers(driver: &Driver, name: &str) -> Result<Option<Outcome>, String> {
    let honest = driver.honest()?;
    driver.chain(
        page::DESC,
        &[driver.header()?, driver.data(512)?, driver.status_desc()?],
    )?;
    driver.offer(&[0])?;
    let mut setup = honest;
    let mut limit = DEADLINE;
    match name {
        "ring-outside" => setup.desc = NOWHERE,
        "avail-outside" => setup.driver = NOWHERE,
        "used-outside" => setup.device = NOWHERE,
        "ring-wraps" => setup.desc = u64::MAX - 0xf,
        "misaligned" => {
            setup.desc = setup.desc.wrapping_add(8);
            setup.driver = setup.driver.wrapping_add(1);
            setup.device = setup.device.wrapping_add(2);
        }
        "overlapping-rings" => {
            // No large writable buffer: the device may read descriptors that it overwrote.
            driver.chain(page::DESC, &[driver.header()?, driver.status_desc()?])?;
            (setup.driver, setup.device) = (setup.desc, setup.desc);
            limit = QUIET;
        }
        "queue-size" => {
            for size in [0, 3, 0x7fff, 0xffff] {
                driver.queue(Setup { size, ..honest })?;
                driver.go()?;
                driver.kick()?;
                driver.wait(1, QUIET)?;
                driver.negotiate()?;
            }
            setup.size = 7;
            limit = QUIET;
        }
        "no-driver-ok" => {
            driver.queue(setup)?;
            driver.kick()?;
            return driver.wait(1, QUIET).map(Some);
        }
        "enabled-while-running" => {
            driver.queue(setup)?;
            driver.go()?;
            driver.write16(common::QUEUE_ENABLE, 1)?;
            driver.write64(common::QUEUE_DESC, NOWHERE)?;
            driver.write16(common::QUEUE_SIZE, 5)?;
            driver.write16(common::QUEUE_ENABLE, 1)?;
            driver.write16(common::QUEUE_ENABLE, 0)?;
            driver.kick()?;
            return driver.wait(1, QUIET).map(Some);
        }
        _ => return Ok(None),
    }
    driver.queue(setup)?;
    driver.go()?;
    driver.kick()?;
    driver.wait(1, limit).map(Some)
}
