// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The arcs between device states: which may be asked for, what lies between, and what helps after a failure.
//!
//! Pure; mirrors the state machine described at `enum vfio_device_mig_state` in `linux/vfio.h`.

use thiserror::Error;

use super::{Capabilities, DeviceState};

/// Why an arc must not be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ArcError {
    /// An end of the arc is an optional state the device does not offer.
    #[error("Device does not offer {state}")]
    Unsupported {
        /// That state.
        state: DeviceState,
    },
    /// The interface forbids the arc; kernels have been seen to loop forever when asked for it.
    #[error("Arc from {from} to {to} is blocked")]
    Blocked {
        /// Where the device is.
        from: DeviceState,
        /// Where it was to go.
        to: DeviceState,
    },
    /// Only a reset leads out of ERROR.
    #[error("Device is in ERROR and cannot move to {to} before a reset")]
    NeedsReset {
        /// Where it was to go.
        to: DeviceState,
    },
    /// ERROR cannot be requested: only a failure leads there.
    #[error("ERROR is no state to ask for")]
    Error,
}

impl DeviceState {
    /// Whether a device with these capabilities has this state.
    pub fn is_offered(self, capabilities: Capabilities) -> bool {
        match self {
            Self::Error | Self::Stop | Self::Running | Self::StopCopy | Self::Resuming => true,
            Self::RunningP2p => capabilities.p2p,
            Self::PreCopy => capabilities.pre_copy,
            Self::PreCopyP2p => capabilities.pre_copy && capabilities.p2p,
        }
    }

    /// Whether the device runs without restraint: it may start DMA to memory and to other devices.
    pub fn is_running(self) -> bool {
        matches!(self, Self::Running | Self::PreCopy)
    }

    /// Whether the device starts no DMA at all and its state stands still.
    pub fn is_stopped(self) -> bool {
        matches!(self, Self::Stop | Self::StopCopy | Self::Resuming)
    }

    /// Whether the state is of the saving group, whose members share one data session.
    pub fn is_saving(self) -> bool {
        matches!(self, Self::PreCopy | Self::PreCopyP2p | Self::StopCopy)
    }
}

/// Returns the state a device goes to first on its way `from` one state `to` another; `to` itself when it is one arc away or none.
///
/// The way is the shortest that neither enters nor leaves the saving group halfway; optional states the device does not
/// offer are skipped.
///
/// ```
/// use vfio_migration::device::{Capabilities, DeviceState, next_state};
/// let (running, stop) = (DeviceState::Running, DeviceState::Stop);
/// assert_eq!(next_state(running, stop, Capabilities { p2p: true, pre_copy: false })?, DeviceState::RunningP2p);
/// assert_eq!(next_state(running, stop, Capabilities::default())?, stop);
/// # Ok::<(), vfio_migration::device::ArcError>(())
/// ```
///
/// # Errors
/// The arc must not be asked for.
pub fn next_state(
    from: DeviceState,
    to: DeviceState,
    capabilities: Capabilities,
) -> Result<DeviceState, ArcError> {
    check_arc(from, to, capabilities)?;
    let mut next = step(from, to);
    while !next.is_offered(capabilities) {
        next = step(next, to);
    }
    Ok(next)
}

/// Returns the states a device passes through on its way `from` one state `to` another, `to` included; none when it is there.
///
/// # Errors
/// As [`next_state`].
pub fn path(
    from: DeviceState,
    to: DeviceState,
    capabilities: Capabilities,
) -> Result<impl Iterator<Item = DeviceState>, ArcError> {
    check_arc(from, to, capabilities)?;
    let mut now = from;
    Ok(std::iter::from_fn(move || {
        if now == to {
            return None;
        }
        now = next_state(now, to, capabilities).expect("every state on a legal path has a next one");
        Some(now)
    }))
}

fn check_arc(from: DeviceState, to: DeviceState, capabilities: Capabilities) -> Result<(), ArcError> {
    use DeviceState::{Error, PreCopy, PreCopyP2p, StopCopy};
    if let Some(state) = [from, to].into_iter().find(|state| !state.is_offered(capabilities)) {
        return Err(ArcError::Unsupported { state });
    }
    match (from, to) {
        (_, Error) => Err(ArcError::Error),
        (Error, _) => Err(ArcError::NeedsReset { to }),
        (StopCopy, PreCopy | PreCopyP2p) => Err(ArcError::Blocked { from, to }),
        _ => Ok(()),
    }
}

/// The arc table for a device that offers everything. Neither state is ERROR, and the arc is not blocked.
fn step(from: DeviceState, to: DeviceState) -> DeviceState {
    use DeviceState::{Error, PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};
    match (from, to) {
        (Stop, Stop | StopCopy | Resuming) => to,
        (Stop, _) => RunningP2p,

        (Running, Running | PreCopy) => to,
        (Running, _) => RunningP2p,

        (RunningP2p, Running | PreCopy) => Running,
        (RunningP2p, RunningP2p | PreCopyP2p) => to,
        (RunningP2p, _) => Stop,

        (PreCopy, PreCopy) => PreCopy,
        (PreCopy, PreCopyP2p | StopCopy) => PreCopyP2p,
        (PreCopy, _) => Running,

        (PreCopyP2p, PreCopyP2p | PreCopy | StopCopy) => to,
        (PreCopyP2p, _) => RunningP2p,

        (StopCopy, StopCopy) | (Resuming, Resuming) => to,
        (StopCopy | Resuming, _) => Stop,

        (Error, _) => Error,
    }
}

/// Returns the P2P-quiescent state to visit before any device is stopped, on the way from `now` to `goal` (STOP or STOP_COPY).
///
/// None when the device is quiescent already, or has no such state. Keeps the data session where `goal` is of the saving
/// group.
pub(super) fn quiescent_state(
    now: DeviceState,
    goal: DeviceState,
    capabilities: Capabilities,
) -> Option<DeviceState> {
    let quiescent = match now {
        DeviceState::PreCopy if goal.is_saving() => DeviceState::PreCopyP2p,
        DeviceState::PreCopy | DeviceState::Running => DeviceState::RunningP2p,
        _ => return None,
    };
    quiescent.is_offered(capabilities).then_some(quiescent)
}

/// What helps a device that should run and does not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Recovery {
    /// Nothing: it runs, or cannot be improved without losing its state.
    Settled,
    /// Asking it to move to this state.
    Move(DeviceState),
    /// Resetting it: it runs, but its state is lost.
    Reset,
}

/// Attempts to move a device that does not run before it is reset.
pub(super) const RECOVERY_MOVES: u32 = 3;

/// Returns what to do next to make a device run that is in `now`, `None` when it does not say, after so many attempts.
///
/// A device in PRE_COPY works; it is never reset merely because it does not leave. RESUMING is abandoned by a reset only.
pub(super) fn recovery(now: Option<DeviceState>, attempts: u32) -> Recovery {
    use DeviceState::{Error, PreCopy, Resuming, Running, Stop, StopCopy};
    match now {
        Some(Running) => Recovery::Settled,
        Some(Error | Resuming) => Recovery::Reset,
        Some(PreCopy) if attempts >= RECOVERY_MOVES => Recovery::Settled,
        _ if attempts >= RECOVERY_MOVES => Recovery::Reset,
        Some(StopCopy) if attempts > 0 => Recovery::Move(Stop),
        _ => Recovery::Move(Running),
    }
}

#[cfg(test)]
mod tests {
    use super::DeviceState::{Error, PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};
    use super::*;

    fn capability_sets() -> impl Iterator<Item = Capabilities> {
        [false, true].into_iter().flat_map(|p2p| [false, true].map(|pre_copy| Capabilities { p2p, pre_copy }))
    }

    /// The arcs a driver implements, as the text lists them.
    fn driver_arcs(capabilities: Capabilities) -> Vec<(DeviceState, DeviceState)> {
        let mut arcs = vec![(Resuming, Stop), (Stop, Resuming), (Stop, StopCopy), (StopCopy, Stop)];
        match capabilities.p2p {
            true => arcs.extend([
                (Running, RunningP2p),
                (RunningP2p, Running),
                (RunningP2p, Stop),
                (Stop, RunningP2p),
            ]),
            false => arcs.extend([(Running, Stop), (Stop, Running)]),
        }
        if capabilities.pre_copy {
            arcs.extend([(Running, PreCopy), (PreCopy, Running)]);
        }
        match capabilities {
            Capabilities { p2p: true, pre_copy: true } => arcs.extend([
                (PreCopy, PreCopyP2p),
                (PreCopyP2p, PreCopy),
                (PreCopyP2p, RunningP2p),
                (PreCopyP2p, StopCopy),
                (RunningP2p, PreCopyP2p),
            ]),
            Capabilities { p2p: false, pre_copy: true } => arcs.push((PreCopy, StopCopy)),
            _ => {}
        }
        arcs
    }

    /// All paths without a loop, found by walking every arc.
    fn walks(
        path: &[DeviceState],
        to: DeviceState,
        arcs: &[(DeviceState, DeviceState)],
    ) -> Vec<Vec<DeviceState>> {
        let now = path[path.len() - 1];
        if now == to {
            return vec![path.to_vec()];
        }
        arcs.iter()
            .filter(|(from, next)| *from == now && !path.contains(next))
            .flat_map(|&(_, next)| walks(&[path, &[next]].concat(), to, arcs))
            .collect()
    }

    /// The text's rule: the shortest path; no saving state inside it unless all of it is of the saving group.
    fn paths_by_the_text(
        from: DeviceState,
        to: DeviceState,
        capabilities: Capabilities,
    ) -> Vec<Vec<DeviceState>> {
        let saving = |state: &DeviceState| [PreCopy, PreCopyP2p, StopCopy].contains(state);
        let mut walks = walks(&[from], to, &driver_arcs(capabilities));
        walks.retain(|walk| {
            let inner = walk.get(1..walk.len() - 1).unwrap_or_default();
            !inner.iter().any(saving) || walk.iter().all(saving)
        });
        let shortest = walks.iter().map(Vec::len).min();
        walks.retain(|walk| Some(walk.len()) == shortest);
        walks.iter().map(|walk| walk[1..].to_vec()).collect()
    }

    #[test]
    fn every_path_is_the_shortest_the_text_allows_and_the_only_one() {
        let mut compared = 0;
        for capabilities in capability_sets() {
            let offered =
                || DeviceState::ALL.into_iter().filter(|s| s.is_offered(capabilities) && *s != Error);
            for (from, to) in offered().flat_map(|from| offered().map(move |to| (from, to))) {
                let blocked = from == StopCopy && [PreCopy, PreCopyP2p].contains(&to);
                let Ok(path) = path(from, to, capabilities) else {
                    assert!(blocked, "{from} to {to} with {capabilities:?}");
                    continue;
                };
                assert!(!blocked);
                let expected = paths_by_the_text(from, to, capabilities);
                assert_eq!(vec![path.collect::<Vec<_>>()], expected, "{from} to {to} with {capabilities:?}");
                compared += 1;
            }
        }
        assert_eq!(compared, 4 * 4 + 5 * 5 + (5 * 5 - 1) + (7 * 7 - 2));
    }

    #[test]
    fn every_state_by_target_by_capability_set_is_a_step_or_a_named_refusal() {
        for capabilities in capability_sets() {
            for from in DeviceState::ALL {
                for to in DeviceState::ALL {
                    let absent = |state: DeviceState| {
                        (state == RunningP2p && !capabilities.p2p)
                            || (state == PreCopy && !capabilities.pre_copy)
                            || (state == PreCopyP2p && !(capabilities.p2p && capabilities.pre_copy))
                    };
                    let refusal = if absent(from) {
                        Some(ArcError::Unsupported { state: from })
                    } else if absent(to) {
                        Some(ArcError::Unsupported { state: to })
                    } else if to == Error {
                        Some(ArcError::Error)
                    } else if from == Error {
                        Some(ArcError::NeedsReset { to })
                    } else if from == StopCopy && (to == PreCopy || to == PreCopyP2p) {
                        Some(ArcError::Blocked { from, to })
                    } else {
                        None
                    };
                    let next = next_state(from, to, capabilities);
                    assert_eq!(next.err(), refusal, "{from} to {to} with {capabilities:?}");
                    assert!(next.map_or(true, |next| next.is_offered(capabilities)));
                }
            }
        }
    }

    #[test]
    fn c05_the_state_before_a_stop_is_quiescent_and_keeps_the_session_it_needs() {
        for capabilities in capability_sets() {
            for now in DeviceState::ALL.into_iter().filter(|state| state.is_offered(capabilities)) {
                for goal in [Stop, StopCopy] {
                    let quiescent = quiescent_state(now, goal, capabilities);
                    assert_eq!(quiescent.is_some(), capabilities.p2p && now.is_running());
                    let Some(quiescent) = quiescent else { continue };
                    assert!(!quiescent.is_running() && !quiescent.is_stopped());
                    assert_eq!(quiescent.is_saving(), now.is_saving() && goal.is_saving());
                    assert!(next_state(now, quiescent, capabilities).is_ok());
                    assert!(path(quiescent, goal, capabilities).unwrap().all(|state| !state.is_running()));
                }
            }
        }
    }

    #[test]
    fn c31_recovery_ends_and_asks_for_no_refused_arc() {
        for capabilities in capability_sets() {
            for now in DeviceState::ALL.into_iter().filter(|state| state.is_offered(capabilities)) {
                for attempts in 0..=RECOVERY_MOVES {
                    match recovery(Some(now), attempts) {
                        Recovery::Settled => assert!(now.is_running()),
                        Recovery::Move(target) => {
                            assert!(attempts < RECOVERY_MOVES);
                            assert!(next_state(now, target, capabilities).is_ok() && now != target);
                        }
                        Recovery::Reset => assert!(!now.is_running()),
                    }
                }
            }
        }
        assert_eq!(recovery(Some(StopCopy), 1), Recovery::Move(Stop));
        assert_eq!(recovery(None, 0), Recovery::Move(Running));
        assert_eq!(recovery(None, RECOVERY_MOVES), Recovery::Reset);
    }

    #[test]
    fn c32_an_unfinished_resuming_is_abandoned_by_a_reset() {
        assert_eq!(recovery(Some(Resuming), 0), Recovery::Reset);
    }
}
