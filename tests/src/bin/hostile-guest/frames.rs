//! A driver of a network device that knows nothing of its link (VIRTIO_NET_F_STATUS is not
//! accepted): it goes on sending, and takes what comes (virtio 1.2, 5.1.6).

use std::time::{Duration, Instant};

use crate::driver::{Desc, Driver, NET_QUEUES, SIZE, Setup, WRITE, page};
use crate::raw::{PAGE, barrier};

/// Between two frames.
const PAUSE: Duration = Duration::from_millis(50);
/// Frames between two lines.
const LINE: u32 = 10;
/// Length of a frame with its header.
const FRAME: u32 = 12 + 60;
/// Where buffers for frames lie in the page of data.
const BUFFERS: usize = PAGE / 2;

/// Asks who has 10.5.0.1, again and again, for `duration`. Now and then a line on standard
/// output: `FRAMES received=N`.
pub fn run(driver: &Driver, duration: Duration) -> Result<(), String> {
    let [receive, transmit, _] = NET_QUEUES;
    driver.pages.clear()?;
    driver.negotiate()?;
    let bytes = driver.pages.bytes();
    driver.choose(receive);
    driver.queue(Setup {
        size: SIZE,
        desc: driver.address(page::TABLE, 0)?,
        driver: driver.address(page::TABLE2, 0)?,
        device: driver.address(page::REQUEST, 0)?,
    })?;
    for index in 0..SIZE {
        let desc = Desc {
            addr: driver.address(page::DATA, BUFFERS)?,
            len: (PAGE - BUFFERS) as u32,
            flags: WRITE,
            next: 0,
        };
        driver.desc(page::TABLE, index, desc)?;
        bytes.w16(page::TABLE2 * PAGE + 4 + 2 * usize::from(index), index)?;
    }
    driver.choose(transmit);
    driver.queue(driver.honest()?)?;
    // An ARP request from 02:00:00:00:00:02, 10.5.0.2 (RFC 826), behind a header of zeros.
    let arp = b"\xff\xff\xff\xff\xff\xff\x02\0\0\0\0\x02\x08\x06\0\x01\x08\0\x06\x04\0\x01\
        \x02\0\0\0\0\x02\x0a\x05\0\x02\0\0\0\0\0\0\x0a\x05\0\x01";
    for (at, byte) in arp.iter().enumerate() {
        bytes.w8(page::DATA * PAGE + 12 + at, *byte)?;
    }
    let frame = Desc {
        addr: driver.address(page::DATA, 0)?,
        len: FRAME,
        flags: 0,
        next: 0,
    };
    for index in 0..SIZE {
        driver.desc(page::DESC, index, frame)?;
        bytes.w16(page::AVAIL * PAGE + 4 + 2 * usize::from(index), index)?;
    }
    driver.go()?;
    let (mut offered, mut taken, mut received, mut turns) = (0u16, 0u16, 0u64, 0u32);
    let end = Instant::now() + duration;
    while Instant::now() < end {
        // One more frame, unless the device holds a whole ring of them.
        let sent = bytes.r16(page::USED * PAGE + 2)?;
        if offered.wrapping_sub(sent) < SIZE {
            offered = offered.wrapping_add(1);
            driver.set_avail(offered)?;
        }
        driver.choose(transmit);
        driver.kick()?;
        let used = bytes.r16(page::REQUEST * PAGE + 2)?;
        received += u64::from(used.wrapping_sub(taken));
        taken = used;
        bytes.w16(page::TABLE2 * PAGE + 2, used.wrapping_add(SIZE))?;
        barrier();
        driver.choose(receive);
        driver.kick()?;
        if turns.is_multiple_of(LINE) {
            println!("FRAMES received={received}");
        }
        turns += 1;
        std::thread::sleep(PAUSE);
    }
    Ok(())
}
