//! A disk that serves (zeros) until the guest reads its second half: then the worker of that queue
//! does what the disk's name says, each process of it anew. The main thread answers the VMM all
//! the while, as an honest one does. Once it is told that the disk is pulled out it fails requests.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bulkhead_blk::device::Block;
use bulkhead_proto::RpcStatus;
use bulkhead_proto::device::UpdateRequest;
use bulkhead_proto::device::update_request::Kind;
use bulkhead_runtime::chain::Chain;
use bulkhead_runtime::device::{Device, Update, Worker};
use bulkhead_runtime::mailbox::WorkerPort;
use bulkhead_runtime::memory::Memory;
use bulkhead_runtime::seat::{Seat, Wait};
use bulkhead_runtime::status::Sleep;

const SECTOR: u64 = 512;
const REQUEST_IN: u32 = 0;
const OK: u8 = 0;
const IOERR: u8 = 1;

/// The disk was told something by the operator: who waits for that may begin.
pub static TOLD: AtomicBool = AtomicBool::new(false);

/// What it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trap {
    /// Nothing more.
    Stuck,
    /// It exits with status 9.
    Crash,
}

impl Trap {
    /// By the disk's name.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "crash" => Some(Self::Crash),
            // Honest in what it serves.
            name if name.starts_with("early-") || name.starts_with("til-") => None,
            // No guest uses one that attacks: it is there for what it is told.
            _ => Some(Self::Stuck),
        }
    }
}

/// The disk.
pub struct Trapped {
    /// What it looks like.
    pub block: Block,
    /// What it does.
    pub trap: Trap,
    /// It was pulled out.
    pub pulled: Arc<AtomicBool>,
}

impl Device for Trapped {
    fn kind(&self) -> &'static str {
        self.block.kind()
    }

    fn version(&self) -> &'static str {
        self.block.version()
    }

    fn io_engine(&self) -> &'static str {
        self.block.io_engine()
    }

    fn features(&self) -> u64 {
        self.block.features()
    }

    fn queues(&self) -> u16 {
        self.block.queues()
    }

    fn config(&self) -> Vec<u8> {
        self.block.config()
    }

    fn update(&self, request: &UpdateRequest) -> Result<Update, RpcStatus> {
        TOLD.store(true, Ordering::Release);
        if let Some(Kind::Blk(update)) = &request.kind
            && update.pulled
        {
            self.pulled.store(true, Ordering::Release);
        }
        self.block.update(request)
    }

    fn worker(&self, port: WorkerPort) -> io::Result<Worker> {
        let config = self.block.config();
        let sectors = config.first_chunk().map_or(0, |c| u64::from_le_bytes(*c));
        let (trap, pulled) = (self.trap, Arc::clone(&self.pulled));
        Ok(Box::new(move |prepared| {
            prepared.ready();
            let mut seat = Seat::new(port);
            let mut chain = Chain::new();
            loop {
                let pulled = pulled.load(Ordering::Acquire);
                let trap = (!pulled).then_some((trap, sectors / 2));
                let kick = serve(&mut seat, &mut chain, trap);
                let wait = Wait {
                    kick,
                    limit: None,
                    why: Sleep::Idle,
                };
                seat.wait(wait, || {});
            }
        }))
    }
}

/// Does what is there, or fails it without a trap. False: it wants to hear of no more.
fn serve(seat: &mut Seat, chain: &mut Chain, trap: Option<(Trap, u64)>) -> bool {
    let Some(ring) = &mut seat.ring else {
        return true;
    };
    loop {
        let Some(head) = ring.pop(chain) else {
            ring.flush();
            if ring.enable_kicks() {
                continue;
            }
            return true;
        };
        let memory = Arc::clone(ring.memory());
        let status = if trap.is_some() { OK } else { IOERR };
        let Some(sector) = read(chain, &memory, status) else {
            ring.reject(head, &"no read");
            return true;
        };
        if let Some((trap, trapped)) = trap
            && sector >= trapped
        {
            if trap == Trap::Crash {
                // SAFETY: ends the process; no destructor of it has anything to do.
                unsafe { libc::_exit(9) };
            }
            ring.unpop(head);
            ring.flush();
            return false;
        }
        ring.complete(head, chain.writable_len());
    }
}

/// Fills a request's buffers with zeros, and the status; the sector that it is about.
fn read(chain: &Chain, memory: &Memory, status: u8) -> Option<u64> {
    let mut header = [0; 16];
    let first = chain.readable().first()?;
    if !memory.read(first.addr, &mut header) {
        return None;
    }
    let (kind, rest) = header.split_first_chunk()?;
    let (_, sector) = rest.split_last_chunk()?;
    let sector = match u32::from_le_bytes(*kind) {
        REQUEST_IN => u64::from_le_bytes(*sector),
        _ => 0,
    };
    let last = chain.writable().last()?;
    for buffer in chain.writable() {
        let zeros = vec![0; usize::try_from(buffer.len).ok()?];
        if !memory.write(buffer.addr, &zeros) {
            return None;
        }
    }
    let at = last.addr.checked_add(u64::from(last.len.checked_sub(1)?))?;
    if !memory.write(at, &[status]) {
        return None;
    }
    let data = u64::from(chain.writable_len().saturating_sub(1));
    Some(sector.saturating_add(data / SECTOR))
}
