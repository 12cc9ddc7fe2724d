//! Why a machine stopped, and the exit code that says so to whoever started it.

/// Why a machine stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// The guest switched itself off (ACPI S5).
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// A vCPU triple-faulted (KVM_EXIT_SHUTDOWN).
    TripleFault,
    /// The host could not go on running the guest: one line of what and why.
    HostError(String),
    /// The launcher ended, and with it every device process.
    LauncherDied(String),
    /// The API or the operator ended it by force.
    Forced,
    /// A signal to the VMM ended it.
    Signal(i32),
}

impl StopReason {
    /// The exit code of `bulkhead run` and `bulkhead serve`.
    ///
    /// | code | meaning |
    /// |---|---|
    /// | 0 | the guest switched itself off, or a client ended it |
    /// | 1 | an error, told in one line |
    /// | 2 | the command line was wrong |
    /// | 3 | the guest asked for a reset |
    /// | 4 | the guest triple-faulted |
    /// | 5 | the launcher died |
    /// | 128+N | signal N ended the VMM |
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::PowerOff | Self::Forced => 0,
            Self::HostError(_) => 1,
            Self::Reset => 3,
            Self::TripleFault => 4,
            Self::LauncherDied(_) => 5,
            Self::Signal(n) => u8::try_from(*n).unwrap_or(0).wrapping_add(128),
        }
    }
}

impl std::fmt::Display for StopReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::PowerOff => f.write_str("the guest switched itself off"),
            Self::Reset => f.write_str("the guest asked for a reset"),
            Self::TripleFault => f.write_str("the guest triple-faulted"),
            Self::HostError(what) => f.write_str(what),
            Self::LauncherDied(how) => write!(
                f,
                "the launcher died ({how}): run `bulkhead reap` for sockets and cgroups that stay"
            ),
            Self::Forced => f.write_str("ended by force"),
            Self::Signal(n) => write!(f, "signal {n}"),
        }
    }
}
