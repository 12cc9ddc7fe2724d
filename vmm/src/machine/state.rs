//! The machine's states and the transitions between them; owned by the manager thread.
//!
//! ```text
//!     created ──boot──▶ running ◀──resume / pause──▶ paused
//!         │                │                           │
//!         └────────────────┴───────── stop ───────────▶ stopped
//! ```
//!
//! The state is a type that only [`MachineState::apply`] changes, and every transition that
//! the drawing lacks is an error that names the request and the state.

use bulkhead_proto::machine::State as WireState;

/// What a machine is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachineState {
    /// Built, its vCPUs parked before their first instruction.
    Created,
    /// Its vCPUs run.
    Running,
    /// Its vCPUs are parked between two instructions.
    Paused,
    /// Its vCPUs have ended for good.
    Stopped,
}

/// A request that changes the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transition {
    /// Let the vCPUs of a created machine go.
    Boot,
    /// Park the vCPUs.
    Pause,
    /// Let parked vCPUs go on.
    Resume,
    /// End the vCPUs.
    Stop,
}

/// A transition that the machine's state does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot {transition} a machine that is {state}: {remedy}", remedy = self.remedy())]
pub struct IllegalTransition {
    /// What was asked.
    pub transition: Transition,
    /// What the machine was doing.
    pub state: MachineState,
}

impl IllegalTransition {
    fn remedy(&self) -> &'static str {
        match (self.transition, self.state) {
            (_, MachineState::Stopped) => "start a new one",
            (Transition::Boot, MachineState::Paused) => "it has booted already: resume it",
            (Transition::Boot, _) => "it has booted already",
            (Transition::Pause, MachineState::Created)
            | (Transition::Resume, MachineState::Created) => "boot it first",
            (Transition::Pause | Transition::Resume, _) => "it is so already",
            (Transition::Stop, _) => "wait for it",
        }
    }
}

impl std::fmt::Display for Transition {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Boot => "boot",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Stop => "stop",
        })
    }
}

impl std::fmt::Display for MachineState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        })
    }
}

impl MachineState {
    /// The state after `transition`.
    ///
    /// # Errors
    /// [`IllegalTransition`] when the drawing above has no such arrow.
    pub fn apply(self, transition: Transition) -> Result<Self, IllegalTransition> {
        match (self, transition) {
            (Self::Created, Transition::Boot) => Ok(Self::Running),
            (Self::Running, Transition::Pause) => Ok(Self::Paused),
            (Self::Paused, Transition::Resume) => Ok(Self::Running),
            (Self::Created | Self::Running | Self::Paused, Transition::Stop) => Ok(Self::Stopped),
            (state, transition) => Err(IllegalTransition { transition, state }),
        }
    }

    /// The state as the API names it.
    pub fn to_wire(self) -> WireState {
        match self {
            Self::Created => WireState::STATE_CREATED,
            Self::Running => WireState::STATE_RUNNING,
            Self::Paused => WireState::STATE_PAUSED,
            Self::Stopped => WireState::STATE_STOPPED,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_arrows_of_the_drawing_exist() {
        use MachineState::*;
        use Transition::*;
        let arrows = [
            (Created, Boot, Running),
            (Running, Pause, Paused),
            (Paused, Resume, Running),
            (Created, Stop, Stopped),
            (Running, Stop, Stopped),
            (Paused, Stop, Stopped),
        ];
        for from in [Created, Running, Paused, Stopped] {
            for transition in [Boot, Pause, Resume, Stop] {
                let arrow = arrows
                    .iter()
                    .find(|(f, t, _)| (*f, *t) == (from, transition));
                match (from.apply(transition), arrow) {
                    (Ok(to), Some((_, _, expected))) => assert_eq!(to, *expected),
                    (Err(e), None) => {
                        assert!(e.to_string().contains(&from.to_string()), "{e}");
                        assert!(!e.to_string().contains('\n'));
                    }
                    (result, _) => panic!("{from} {transition}: {result:?}"),
                }
            }
        }
    }
}
