//! COM1: a 16550A (vm-superio's register model) at port 0x3f8, interrupt 4 by irqfd.
//!
//! vCPU threads access its registers; a thread named `serial` moves bytes between it and the
//! host. All descriptors come opened from outside; after its start the thread only polls,
//! reads, writes and accepts on them.

mod output;
pub(crate) mod poll;
mod pump;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use vm_superio::serial::SerialEvents;
use vm_superio::{Serial as Uart, Trigger};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::arch::x86_64::layout;
use crate::bus::{Bus, BusDevice, BusError};
use crate::kvm::borrow_fd;
use crate::line::Line;
use crate::threads::{self, ThreadHook};
use output::{Output, OutputWriter};

/// Where the guest's bytes go and come from.
#[derive(Debug)]
pub enum SerialBackend {
    /// Standard input, if it is to be read, and standard output.
    Stdio {
        /// Read until its end.
        input: Option<OwnedFd>,
        /// Written.
        output: OwnedFd,
    },
    /// A file, written only.
    File(OwnedFd),
    /// A listening unix stream socket: one client at a time; what was printed last waits for
    /// the next.
    Listener(OwnedFd),
    /// Nowhere.
    Null,
}

/// Bytes so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SerialStats {
    /// Given to the host.
    pub bytes_out: u64,
    /// Given to the guest.
    pub bytes_in: u64,
    /// Printed by the guest and lost because nobody read them in time.
    pub dropped_out: u64,
}

#[derive(Debug, Default)]
struct Counters {
    bytes_out: AtomicU64,
    bytes_in: AtomicU64,
}

/// The interrupt: a write to the irqfd.
struct IrqTrigger(Arc<EventFd>);

impl Trigger for IrqTrigger {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Wakes the thread when the guest has emptied the receive FIFO.
struct FifoEvents(Arc<EventFd>);

impl SerialEvents for FifoEvents {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        let _ = self.0.write(1);
    }
}

type Registers = Uart<IrqTrigger, FifoEvents, OutputWriter>;

fn registers(
    irq: &Arc<EventFd>,
    wake: &Arc<EventFd>,
    output: &Arc<Output>,
    line: &Arc<Line>,
) -> Registers {
    Uart::with_events(
        IrqTrigger(Arc::clone(irq)),
        FifoEvents(Arc::clone(wake)),
        OutputWriter(Arc::clone(output), Arc::clone(line)),
    )
}

/// The serial port.
pub struct Serial {
    registers: Arc<Mutex<Registers>>,
    output: Arc<Output>,
    line: Arc<Line>,
    counters: Arc<Counters>,
    irq: Arc<EventFd>,
    wake: Arc<EventFd>,
    stop: mpsc::SyncSender<Duration>,
    stopped: Mutex<mpsc::Receiver<()>>,
}

impl Serial {
    /// Makes the port and starts its thread; `hook` runs there before the first byte moves.
    pub fn new(backend: SerialBackend, hook: &ThreadHook) -> io::Result<Arc<Self>> {
        let eventfd = || EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map(Arc::new);
        let (irq, wake) = (eventfd()?, eventfd()?);
        let output = Arc::new(Output::new(Arc::clone(&wake)));
        let line = Line::new(Arc::clone(&wake));
        let registers = Arc::new(Mutex::new(registers(&irq, &wake, &output, &line)));
        let counters = Arc::new(Counters::default());
        let (stop, stops) = mpsc::sync_channel(1);
        let (done, stopped) = mpsc::sync_channel(1);
        let pump = pump::Pump::new(
            backend,
            Arc::clone(&registers),
            (Arc::clone(&output), Arc::clone(&line)),
            Arc::clone(&counters),
            Arc::clone(&wake),
            stops,
        )?;
        let ending = Arc::clone(&line);
        threads::spawn(
            "serial".into(),
            Arc::clone(hook),
            || Ok(()),
            move || {
                pump.run();
                ending.close();
                let _ = done.send(());
            },
        )?;
        Ok(Arc::new(Self {
            registers,
            output,
            line,
            counters,
            irq,
            wake,
            stop,
            stopped: Mutex::new(stopped),
        }))
    }

    /// Puts the registers on the port bus.
    pub fn attach(self: &Arc<Self>, pio: &Bus) -> Result<(), BusError> {
        pio.insert(layout::COM1_PORT, 8, Arc::clone(self) as _)
    }

    /// The eventfd to be made an irqfd of `layout::COM1_GSI`.
    pub fn irq_eventfd(&self) -> BorrowedFd<'_> {
        borrow_fd(&*self.irq, self.irq.as_raw_fd())
    }

    /// The registers as after power-on; what was typed and not read is lost.
    pub fn reset(&self) {
        let fresh = registers(&self.irq, &self.wake, &self.output, &self.line);
        let mut registers = self
            .registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *registers = fresh;
        drop(registers);
        // There is room for what is typed.
        let _ = self.wake.write(1);
    }

    /// By which clients of the API read and type, beside whoever is at the backend.
    pub fn line(&self) -> &Arc<Line> {
        &self.line
    }

    /// Bytes so far.
    pub fn stats(&self) -> SerialStats {
        SerialStats {
            bytes_out: self.counters.bytes_out.load(Ordering::Relaxed),
            bytes_in: self.counters.bytes_in.load(Ordering::Relaxed),
            dropped_out: self.output.dropped.load(Ordering::Relaxed),
        }
    }

    /// Hands what is buffered to the reader and ends the thread; false when the reader did not
    /// take it in time.
    pub fn stop(&self, timeout: Duration) -> bool {
        let _ = self.stop.try_send(timeout);
        let _ = self.wake.write(1);
        let stopped = self.stopped.lock().unwrap_or_else(PoisonError::into_inner);
        // The thread keeps to the time itself; a write that blocks may outlast it.
        stopped
            .recv_timeout(timeout.saturating_add(Duration::from_millis(500)))
            .is_ok()
            && self.output.is_empty()
    }
}

impl Drop for Serial {
    /// Its thread ends with it, also where the machine could not be made.
    fn drop(&mut self) {
        let _ = self.stop.try_send(Duration::ZERO);
        let _ = self.wake.write(1);
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        // The registers are one byte wide; wider accesses see them one after another.
        let mut registers = self
            .registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        for (byte, offset) in data.iter_mut().zip(offset..) {
            *byte = u8::try_from(offset).map_or(0xff, |offset| registers.read(offset));
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        {
            let mut registers = self
                .registers
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            for (byte, offset) in data.iter().zip(offset..) {
                if let Ok(offset) = u8::try_from(offset) {
                    // Fails only when the irqfd's counter is full: an interrupt is pending.
                    let _ = registers.write(offset, *byte);
                }
            }
        }
        self.output.wait_for_room();
    }
}

#[cfg(test)]
mod tests;
