// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device's migration states and the way between them, as the protocol's text has it.

/// Names a migration state; the numbers are `VFIO_DEVICE_STATE_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum State {
    /// The device failed; only a reset helps.
    Error = 0,
    /// Nothing changes.
    Stop = 1,
    /// The device runs.
    Running = 2,
    /// Nothing changes and the state can be read.
    StopCopy = 3,
    /// A state is being loaded.
    Resuming = 4,
    /// The device runs and the state can be read.
    PreCopy = 6,
}

impl State {
    /// Every state there is.
    pub const ALL: [State; 6] =
        [State::Error, State::Stop, State::Running, State::StopCopy, State::Resuming, State::PreCopy];

    /// Returns the state with this number.
    pub fn from_wire(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|state| *state as u32 == number)
    }

    /// Tells whether the device does DMA in this state.
    pub fn runs(self) -> bool {
        matches!(self, State::Running | State::PreCopy)
    }

    /// Tells whether the state can be read.
    pub fn saves(self) -> bool {
        matches!(self, State::PreCopy | State::StopCopy)
    }

    /// Returns the next state on the shortest way to `to`, or `None` where there is no way.
    ///
    /// Saving states are never passed through, and STOP_COPY never leads back to PRE_COPY.
    pub fn step_towards(self, to: State) -> Option<State> {
        use State::*;
        match (self, to) {
            (Error, _) | (_, Error) | (StopCopy, PreCopy) => None,
            (PreCopy, StopCopy) => Some(StopCopy),
            (PreCopy, _) => Some(Running),
            (Running, PreCopy) => Some(PreCopy),
            (Running | StopCopy | Resuming, _) => Some(Stop),
            (Stop, PreCopy) => Some(Running),
            (Stop, to) => Some(to),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::State::{self, *};

    /// Walks from `from` to `to` and returns what lies between, both ends left out.
    fn between(from: State, to: State) -> Option<Vec<State>> {
        let mut path = Vec::new();
        let mut at = from;
        while at != to {
            at = at.step_towards(to)?;
            path.push(at);
            assert!(path.len() < 6, "{from:?} to {to:?} never ends");
        }
        path.pop();
        Some(path)
    }

    #[test]
    fn paths_are_those_of_the_specification() {
        assert_eq!(between(Running, StopCopy), Some(vec![Stop]));
        assert_eq!(between(PreCopy, Stop), Some(vec![Running]));
        assert_eq!(between(PreCopy, StopCopy), Some(vec![]));
        assert_eq!(between(PreCopy, Resuming), Some(vec![Running, Stop]));
        assert_eq!(between(StopCopy, Running), Some(vec![Stop]));
        assert_eq!(between(StopCopy, Resuming), Some(vec![Stop]));
        assert_eq!(between(Resuming, PreCopy), Some(vec![Stop, Running]));
        assert_eq!(between(StopCopy, PreCopy), None);
    }

    #[test]
    fn every_pair_has_a_path_without_saving_states_inside_or_none() {
        for from in State::ALL {
            for to in State::ALL.into_iter().filter(|to| *to != from) {
                let possible = from != Error && to != Error && (from, to) != (StopCopy, PreCopy);
                let path = between(from, to);
                assert_eq!(path.is_some(), possible, "{from:?} to {to:?}");
                assert!(path.is_none_or(|path| path.iter().all(|state| !state.saves())));
            }
        }
    }
}
