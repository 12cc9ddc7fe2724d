//! What the manager's epoll events are about, packed into their tokens.

use crate::virtio::EventSource;

/// What an epoll event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    Requests,
    Vcpus,
    Launcher,
    LauncherDeath,
    Signals,
    Device {
        index: u16,
        source: EventSource,
    },
    Control {
        index: u16,
    },
    Fence {
        index: u16,
    },
    /// The control channel of a process on trial.
    Trial {
        index: u16,
    },
    /// Its fence.
    TrialFence {
        index: u16,
    },
    Listener {
        index: u16,
    },
    /// The memory device wants something.
    Bell {
        index: u16,
    },
    /// Threads that make devices have news.
    Hotplug,
    /// Of a device on its way out, by the low bits of its operation.
    Leaving {
        operation: u32,
        fence: bool,
    },
}

impl Source {
    /// As an epoll token.
    pub(super) fn token(self) -> u64 {
        match self {
            Self::Requests => 0,
            Self::Vcpus => 1,
            Self::Launcher => 2,
            Self::LauncherDeath => 3,
            Self::Signals => 4,
            Self::Hotplug => 16,
            Self::Leaving { operation, fence } => {
                (1 << 62) | ((16 + u64::from(fence)) << 32) | u64::from(operation)
            }
            Self::Control { index } => (1 << 62) | u64::from(index),
            Self::Fence { index } => (1 << 62) | (1 << 33) | u64::from(index),
            Self::Trial { index } => (1 << 62) | (3 << 32) | u64::from(index),
            Self::TrialFence { index } => (1 << 62) | (4 << 32) | u64::from(index),
            Self::Bell { index } => (1 << 62) | (5 << 32) | u64::from(index),
            Self::Listener { index } => (1 << 62) | (1 << 32) | u64::from(index),
            Self::Device { index, source } => {
                (1 << 63) | (u64::from(index) << 32) | u64::from(source.to_u32())
            }
        }
    }

    /// From an epoll token; `None` for one that was never made.
    pub(super) fn from_token(token: u64) -> Option<Self> {
        if token >> 63 == 1 {
            let source = EventSource::from_u32(u32::try_from(token & 0xffff_ffff).ok()?)?;
            let index = u16::try_from((token >> 32) & 0xffff).ok()?;
            return Some(Self::Device { index, source });
        }
        if token >> 62 == 1 && (token >> 32) & 0x3fff_fffe == 16 {
            return Some(Self::Leaving {
                operation: (token & 0xffff_ffff) as u32,
                fence: (token >> 32) & 1 == 1,
            });
        }
        if token >> 62 == 1 {
            let index = u16::try_from(token & 0xffff_ffff).ok()?;
            return match (token >> 32) & 0x3fff_ffff {
                0 => Some(Self::Control { index }),
                1 => Some(Self::Listener { index }),
                2 => Some(Self::Fence { index }),
                3 => Some(Self::Trial { index }),
                4 => Some(Self::TrialFence { index }),
                5 => Some(Self::Bell { index }),
                _ => None,
            };
        }
        Some(match token {
            0 => Self::Requests,
            1 => Self::Vcpus,
            2 => Self::Launcher,
            3 => Self::LauncherDeath,
            4 => Self::Signals,
            16 => Self::Hotplug,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_round_trip() {
        let plain = [
            Source::Requests,
            Source::Vcpus,
            Source::Launcher,
            Source::LauncherDeath,
            Source::Signals,
            Source::Hotplug,
        ];
        let devices = [
            EventSource::RingError(7),
            EventSource::Backend,
            EventSource::Hangup,
        ]
        .into_iter()
        .flat_map(|source| [0, 1, u16::MAX].map(|index| Source::Device { index, source }));
        let controls = [0, 1, u16::MAX]
            .into_iter()
            .flat_map(|index| [Source::Control { index }, Source::Listener { index }]);
        let leaving = [0, 1, u32::MAX]
            .into_iter()
            .flat_map(|operation| [true, false].map(|fence| Source::Leaving { operation, fence }));
        let fences = [0, 1, u16::MAX].into_iter().flat_map(|index| {
            [
                Source::Fence { index },
                Source::Trial { index },
                Source::TrialFence { index },
                Source::Bell { index },
            ]
        });
        for source in plain
            .into_iter()
            .chain(devices)
            .chain(controls)
            .chain(fences)
            .chain(leaving)
        {
            assert_eq!(Source::from_token(source.token()), Some(source));
        }
        assert_eq!(Source::from_token(5), None);
    }
}
