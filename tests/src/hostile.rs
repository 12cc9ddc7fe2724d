//! The attacks of a hostile driver of a disk or a network device, and what the device must
//! answer to each (virtio 1.2, 2.1.2, 2.7, 5.1.6.5 and 5.2.6). The program that carries them out (`hostile-guest`) and the test
//! that judges it (`e2e`) both read this table, so that neither can forget a case.

/// What a device must do about an attack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// It stops the device: DEVICE_NEEDS_RESET.
    NeedsReset,
    /// It completes the request with this status byte.
    Status(u8),
    /// It may answer as it likes, so long as the device comes back.
    Survives,
}

/// One attack.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// What the command line and the report call it.
    pub name: &'static str,
    /// What must come of it.
    pub expect: Expect,
}

/// The case that lasts: garbage everywhere, for seconds.
pub const STORM: &str = "storm";

const fn case(name: &'static str, expect: Expect) -> Case {
    Case { name, expect }
}

/// Every case, in the order in which `all` runs them.
pub const CASES: &[Case] = &[
    // Descriptor chains (2.7.5).
    case("head-index", Expect::NeedsReset),
    case("next-index", Expect::NeedsReset),
    case("loop", Expect::NeedsReset),
    case("length-overflow", Expect::NeedsReset),
    case("outside-memory", Expect::NeedsReset),
    case("device-memory", Expect::NeedsReset),
    case("straddles-end", Expect::NeedsReset),
    case("huge-length", Expect::NeedsReset),
    case("total-length", Expect::NeedsReset),
    case("readable-after-writable", Expect::NeedsReset),
    case("no-status-byte", Expect::NeedsReset),
    case("header-outside", Expect::NeedsReset),
    // Indirect tables (2.7.5.3).
    case("indirect-nested", Expect::NeedsReset),
    case("indirect-and-next", Expect::NeedsReset),
    case("indirect-bounds", Expect::NeedsReset),
    case("indirect-outside", Expect::NeedsReset),
    case("indirect-next", Expect::NeedsReset),
    case("indirect-loop", Expect::NeedsReset),
    case("indirect-empty", Expect::NeedsReset),
    case("indirect-huge", Expect::NeedsReset),
    // Rings (2.7.6, 2.7.8, 4.1.4.3).
    case("avail-jump", Expect::NeedsReset),
    case("ring-outside", Expect::NeedsReset),
    case("avail-outside", Expect::NeedsReset),
    case("used-outside", Expect::NeedsReset),
    case("ring-wraps", Expect::NeedsReset),
    case("misaligned", Expect::NeedsReset),
    case("duplicate-head", Expect::Survives),
    case("queue-size", Expect::Survives),
    case("overlapping-rings", Expect::Survives),
    case("ring-as-buffer", Expect::Survives),
    case("no-driver-ok", Expect::Survives),
    case("enabled-while-running", Expect::Survives),
    // Requests that are well-formed and cannot be granted (5.2.6).
    case("zero-length", Expect::Survives),
    case("short-header", Expect::Survives),
    case("beyond-capacity", Expect::Status(1)),
    case("sector-overflow", Expect::Status(1)),
    case("partial-sector", Expect::Status(1)),
    case("unknown-type", Expect::Status(2)),
    // Everything at once.
    case(STORM, Expect::Survives),
];

/// Those that a network device's control queue is given: of rings, whatever is in them.
pub const NET_CASES: &[Case] = &[
    case("head-index", Expect::NeedsReset),
    case("next-index", Expect::NeedsReset),
    case("loop", Expect::NeedsReset),
    case("length-overflow", Expect::NeedsReset),
    case("outside-memory", Expect::NeedsReset),
    case("device-memory", Expect::NeedsReset),
    case("straddles-end", Expect::NeedsReset),
    case("huge-length", Expect::NeedsReset),
    case("total-length", Expect::NeedsReset),
    case("readable-after-writable", Expect::NeedsReset),
    case("header-outside", Expect::NeedsReset),
    case("no-status-byte", Expect::Survives),
    case("indirect-nested", Expect::NeedsReset),
    case("indirect-and-next", Expect::NeedsReset),
    case("indirect-bounds", Expect::NeedsReset),
    case("indirect-outside", Expect::NeedsReset),
    case("indirect-next", Expect::NeedsReset),
    case("indirect-loop", Expect::NeedsReset),
    case("indirect-empty", Expect::NeedsReset),
    case("indirect-huge", Expect::NeedsReset),
    case("avail-jump", Expect::NeedsReset),
    case("ring-outside", Expect::NeedsReset),
    case("avail-outside", Expect::NeedsReset),
    case("used-outside", Expect::NeedsReset),
    case("ring-wraps", Expect::NeedsReset),
    case("misaligned", Expect::NeedsReset),
    case("duplicate-head", Expect::Survives),
    case("queue-size", Expect::Survives),
    case("overlapping-rings", Expect::Survives),
    case("ring-as-buffer", Expect::Survives),
    case("no-driver-ok", Expect::Survives),
    case("enabled-while-running", Expect::Survives),
    case("zero-length", Expect::Survives),
    case("short-header", Expect::Survives),
    case("unknown-type", Expect::Survives),
    case(STORM, Expect::Survives),
];
