//! What the driver and the device have told each other of the ports (VIRTIO 1.2 section 5.3.6.2).
//!
//! ```text
//!   driver: DEVICE_READY ──▶ PORT_ADD each ──▶ driver: PORT_READY ──▶ CONSOLE_PORT or PORT_NAME
//!                                                  ──▶ RESIZE, PORT_OPEN, as they change
//! ```
//!
//! There is no queue of messages: of each port it is known what the driver was told and what is
//! true, and the next message is the first difference. So nothing grows, whatever the driver and
//! the clients do, and a process that takes another's place goes on with what was told.

use std::sync::{Mutex, MutexGuard, PoisonError};

use bulkhead_runtime::inflight::KeptMemory;

/// VIRTIO_CONSOLE_F_SIZE
pub const F_SIZE: u64 = 1;
/// VIRTIO_CONSOLE_F_MULTIPORT
pub const F_MULTIPORT: u64 = 1 << 1;

/// Bytes of a message without what follows it: id u32, event u16, value u16.
pub const MESSAGE: usize = 8;
const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const RESIZE: u16 = 5;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// Of what is kept: version and number of ports, and whether the driver is ready; then a word for
/// each port.
const VERSION: u64 = 1;
const WORD: usize = 8;

/// How large a console is, in characters; 0 each: nobody has said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// Columns.
    pub cols: u16,
    /// Rows.
    pub rows: u16,
}

/// A port as it was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Traits {
    /// `None`: a console.
    pub name: Option<String>,
    /// Of a console.
    pub size: Size,
}

/// A message that the driver is to get: which port it is about, and what it says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    port: usize,
    what: What,
    /// As it goes into the guest's memory.
    pub bytes: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Add,
    Kind,
    Size(Size),
    Open(bool),
}

/// What is known of a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Known {
    /// The driver has one for it.
    ready: bool,
    /// Somebody in the guest has it open.
    guest_open: bool,
    /// The driver was told that there is such a port,
    added: bool,
    /// what it is,
    kind: bool,
    /// that somebody on the host has it open,
    open: bool,
    /// and its size.
    size: Size,
}

impl Known {
    fn word(&self) -> u64 {
        let flags = [
            self.ready,
            self.guest_open,
            self.added,
            self.kind,
            self.open,
        ];
        let bits = (0..).zip(flags).map(|(bit, set)| u64::from(set) << bit);
        let size = u64::from(self.size.cols) << 16 | u64::from(self.size.rows) << 32;
        bits.fold(size, |all, bit| all | bit)
    }

    fn of(word: u64) -> Self {
        let bit = |n: u32| word >> n & 1 != 0;
        let half = |n: u32| (word >> n & 0xffff) as u16;
        Self {
            ready: bit(0),
            guest_open: bit(1),
            added: bit(2),
            kind: bit(3),
            open: bit(4),
            size: Size {
                cols: half(16),
                rows: half(32),
            },
        }
    }
}

/// All of it; shared by the main thread, which hears of features and sizes, and the worker.
#[derive(Debug)]
pub struct Control(Mutex<Inner>);

#[derive(Debug)]
struct Inner {
    traits: Vec<Traits>,
    /// Clients are there.
    joined: Vec<bool>,
    known: Vec<Known>,
    ready: bool,
    features: u64,
    kept: Option<KeptMemory>,
}

impl Control {
    /// Nothing was told of these ports.
    pub fn new(traits: Vec<Traits>) -> Self {
        let count = traits.len();
        Self(Mutex::new(Inner {
            traits,
            joined: vec![false; count],
            known: vec![Known::default(); count],
            ready: false,
            features: 0,
            kept: None,
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of what is kept.
    pub fn kept_bytes(&self) -> u64 {
        let words = self.lock().known.len().saturating_add(1);
        words.saturating_mul(WORD) as u64
    }

    /// Memory that outlives this process: takes over what is in it.
    pub fn keep(&self, memory: KeptMemory) {
        let mut inner = self.lock();
        inner.kept = Some(memory);
        inner.begin();
    }

    /// It is a successor's from now on.
    pub fn let_go(&self) {
        self.lock().kept = None;
    }

    /// The driver accepted these features; 0: there is none any more.
    pub fn accepted(&self, features: u64) {
        let mut inner = self.lock();
        inner.features = features;
        if features == 0 {
            inner.forget();
        } else {
            inner.begin();
        }
    }

    /// The driver speaks of several ports.
    pub fn is_multiport(&self) -> bool {
        self.lock().features & F_MULTIPORT != 0
    }

    /// The guest takes what comes by this port.
    pub fn is_open(&self, port: usize) -> bool {
        let inner = self.lock();
        if inner.features & F_MULTIPORT == 0 {
            return port == 0;
        }
        inner.known.get(port).is_some_and(|known| known.guest_open)
    }

    /// Whether a client is there.
    pub fn join(&self, port: usize, joined: bool) {
        if let Some(place) = self.lock().joined.get_mut(port) {
            *place = joined;
        }
    }

    /// The size of the first port, which the configuration space has.
    pub fn size(&self) -> Size {
        let inner = self.lock();
        inner.traits.first().map(|t| t.size).unwrap_or_default()
    }

    /// Is there such a console?
    ///
    /// # Errors
    /// No: one line.
    pub fn check(&self, port: usize) -> Result<(), String> {
        let inner = self.lock();
        match inner.traits.get(port) {
            None => Err(format!("sizes: there is no port {port}: they count from 0")),
            Some(traits) if traits.name.is_some() => Err(format!(
                "sizes: port {port} has a name and no size: give that of a console"
            )),
            Some(_) => Ok(()),
        }
    }

    /// A console has this size from now on.
    pub fn resize(&self, port: usize, size: Size) {
        if let Some(traits) = self.lock().traits.get_mut(port) {
            traits.size = size;
        }
    }

    /// A message of the driver's; false: it says nothing that a driver may say.
    pub fn hear(&self, message: [u8; MESSAGE]) -> bool {
        let [a, b, c, d, event, event_high, value, value_high] = message;
        let port = usize::try_from(u32::from_le_bytes([a, b, c, d])).unwrap_or(usize::MAX);
        let event = u16::from_le_bytes([event, event_high]);
        let yes = u16::from_le_bytes([value, value_high]) != 0;
        let mut inner = self.lock();
        if event == DEVICE_READY {
            inner.forget();
            inner.ready = yes;
            inner.store_ready();
            return true;
        }
        let Some(known) = inner.known.get_mut(port) else {
            return false;
        };
        match event {
            PORT_READY => known.ready = yes,
            PORT_OPEN => known.guest_open = yes,
            _ => return false,
        }
        inner.store(port);
        true
    }

    /// What the driver should hear next.
    pub fn next(&self) -> Option<Message> {
        let inner = self.lock();
        if !inner.ready || inner.features & F_MULTIPORT == 0 {
            return None;
        }
        let ports = inner.known.iter().zip(&inner.traits).zip(&inner.joined);
        let mut said = ports
            .enumerate()
            .filter_map(|(port, ((known, traits), joined))| {
                let what = due(known, traits, *joined)?;
                Some(message(port, what, traits))
            });
        said.next()
    }

    /// The driver has it.
    pub fn told(&self, message: &Message) {
        let mut inner = self.lock();
        if let Some(known) = inner.known.get_mut(message.port) {
            match message.what {
                What::Add => known.added = true,
                What::Kind => known.kind = true,
                What::Size(size) => known.size = size,
                What::Open(open) => known.open = open,
            }
        }
        inner.store(message.port);
    }
}

/// The first difference between what is and what was told.
fn due(known: &Known, traits: &Traits, joined: bool) -> Option<What> {
    let console = traits.name.is_none();
    // A console is open whoever looks at it.
    let open = joined || console;
    if !known.added {
        return Some(What::Add);
    }
    if !known.ready {
        return None;
    }
    if !known.kind {
        return Some(What::Kind);
    }
    if console && known.size != traits.size {
        return Some(What::Size(traits.size));
    }
    (known.open != open).then_some(What::Open(open))
}

fn message(port: usize, what: What, traits: &Traits) -> Message {
    let (event, value) = match what {
        What::Add => (PORT_ADD, 1),
        What::Kind if traits.name.is_some() => (PORT_NAME, 1),
        What::Kind => (CONSOLE_PORT, 1),
        What::Size(_) => (RESIZE, 0),
        What::Open(open) => (PORT_OPEN, u16::from(open)),
    };
    let id = u32::try_from(port).unwrap_or(u32::MAX);
    let mut bytes = id.to_le_bytes().to_vec();
    bytes.extend(event.to_le_bytes());
    bytes.extend(value.to_le_bytes());
    match what {
        What::Kind => bytes.extend(traits.name.iter().flat_map(|name| name.bytes())),
        What::Size(size) => {
            bytes.extend(size.cols.to_le_bytes());
            bytes.extend(size.rows.to_le_bytes());
        }
        What::Add | What::Open(_) => {}
    }
    Message { port, what, bytes }
}

impl Inner {
    /// A driver begins anew.
    fn forget(&mut self) {
        self.ready = false;
        self.known.fill(Known::default());
        self.store_ready();
        for port in 0..self.known.len() {
            self.store(port);
        }
    }

    /// Takes over what a process before this one has kept, if it is of the same ports.
    fn begin(&mut self) {
        let Some(kept) = self.kept.clone().filter(|_| self.features != 0) else {
            return;
        };
        let word = |at: usize| {
            let mut bytes = [0; WORD];
            kept.read(at.saturating_mul(WORD), &mut bytes);
            u64::from_le_bytes(bytes)
        };
        let (head, ports) = (word(0), self.head() & !1);
        if head & !1 != ports {
            return self.forget();
        }
        self.ready = head & 1 != 0;
        for (at, known) in (1..).zip(&mut self.known) {
            *known = Known::of(word(at));
        }
    }

    /// The first word: none of them is 0, which is what memory is that nobody has written to.
    fn head(&self) -> u64 {
        let ports = self.known.len() as u64;
        VERSION << 8
            | ports << 16
            | self.features << 32 & (F_MULTIPORT << 32)
            | u64::from(self.ready)
    }

    fn store_ready(&self) {
        if let Some(kept) = &self.kept {
            kept.store(0, self.head());
        }
    }

    fn store(&self, port: usize) {
        let known = self.known.get(port);
        if let (Some(kept), Some(known)) = (&self.kept, known) {
            kept.store(port.saturating_add(1).saturating_mul(WORD), known.word());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use proptest::test_runner::RngSeed;

    fn control() -> Control {
        let console = Traits {
            name: None,
            size: Size::default(),
        };
        let named = Traits {
            name: Some("agent".into()),
            size: Size::default(),
        };
        let control = Control::new(vec![console, named]);
        control.accepted(F_MULTIPORT);
        control
    }

    fn says(port: u32, event: u16, value: u16) -> [u8; MESSAGE] {
        let mut bytes = [0; MESSAGE];
        bytes[..4].copy_from_slice(&port.to_le_bytes());
        bytes[4..6].copy_from_slice(&event.to_le_bytes());
        bytes[6..].copy_from_slice(&value.to_le_bytes());
        bytes
    }

    /// All that is due, told.
    fn all(control: &Control) -> Vec<Vec<u8>> {
        let next = || {
            let message = control.next()?;
            control.told(&message);
            Some(message.bytes)
        };
        std::iter::from_fn(next).collect()
    }

    fn text(port: u32, event: u16, value: u16, more: &[u8]) -> Vec<u8> {
        [&says(port, event, value), more].concat()
    }

    #[test]
    fn a_driver_hears_of_each_port_what_it_is_and_what_changes() {
        let control = control();
        assert_eq!(control.next(), None, "the driver has not spoken");
        assert!(control.hear(says(0, DEVICE_READY, 1)));
        let added = [text(0, PORT_ADD, 1, b""), text(1, PORT_ADD, 1, b"")];
        assert_eq!(all(&control), added);
        assert!(control.hear(says(1, PORT_READY, 1)));
        assert_eq!(all(&control), [text(1, PORT_NAME, 1, b"agent")]);
        assert!(control.hear(says(0, PORT_READY, 1)));
        let console = [text(0, CONSOLE_PORT, 1, b""), text(0, PORT_OPEN, 1, b"")];
        assert_eq!(all(&control), console);
        assert!(!control.is_open(0) && !control.is_open(1));
        assert!(control.hear(says(0, PORT_OPEN, 1)));
        assert!(control.is_open(0) && !control.is_open(1) && !control.is_open(2));

        control.join(1, true);
        assert_eq!(all(&control), [text(1, PORT_OPEN, 1, b"")]);
        // Gone and back again before the driver has room for a message: nothing to be told.
        control.join(1, false);
        control.join(1, true);
        assert_eq!(control.next(), None);
        let size = Size {
            cols: 0x102,
            rows: 0x304,
        };
        assert_eq!(control.check(0), Ok(()));
        control.resize(0, size);
        assert_eq!(all(&control), [text(0, RESIZE, 0, &[2, 1, 4, 3])]);
        assert_eq!(control.size(), size);
        assert!(control.check(1).is_err() && control.check(2).is_err());
    }

    #[test]
    fn another_driver_hears_everything_again() {
        let control = control();
        assert!(control.hear(says(0, DEVICE_READY, 1)));
        assert!(control.hear(says(0, PORT_READY, 1)) && control.hear(says(0, PORT_OPEN, 1)));
        let first = all(&control);
        assert!(control.hear(says(u32::MAX, DEVICE_READY, 1)));
        assert!(!control.is_open(0));
        assert!(control.hear(says(0, PORT_READY, 1)));
        assert_eq!(all(&control), first);
        control.accepted(0);
        assert_eq!(control.next(), None);
        // One that knows nothing of several ports has the first one.
        control.accepted(1 << 32);
        assert!(control.is_open(0) && !control.is_open(1) && !control.is_multiport());
        assert!(control.hear(says(0, DEVICE_READY, 1)) && control.next().is_none());
    }

    #[test]
    fn what_is_kept_is_what_was_known() {
        for bits in 0..32 {
            let word = bits | 80 << 16 | 24 << 32;
            assert_eq!(Known::of(word).word(), word);
        }
        assert_eq!(Known::of(u64::MAX).word(), 0xffff_ffff_001f);
        assert_eq!(Known::of(0), Known::default());
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: 64,
            rng_seed: RngSeed::Fixed(0xc0_0501e),
            ..ProptestConfig::default()
        })]
        #[test]
        fn whatever_a_driver_says_a_ready_one_hears_all_of_it(
            said in prop::collection::vec((0..4_u32, 0..10_u16, 0..3_u16, any::<bool>()), 0..200),
        ) {
            let control = control();
            for (port, event, value, joined) in said {
                control.hear(says(port, event, value));
                control.join(1, joined);
                // Each port has four things to be told at most.
                prop_assert!(all(&control).len() <= 8);
            }
            control.join(1, true);
            control.hear(says(0, DEVICE_READY, 1));
            control.hear(says(0, PORT_READY, 1));
            control.hear(says(1, PORT_READY, 1));
            prop_assert_eq!(all(&control).len(), 6);
        }
    }
}
