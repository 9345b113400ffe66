// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Breadth-first search over everything that can happen.
//!
//! The tracker under test cannot be copied, so a state is kept as the way to it: it is built anew, action by action, for each
//! step from it. Known states are told apart by a hash of 128 bits.

use std::collections::HashSet;
use std::fmt;
use std::hash::{BuildHasherDefault, Hasher};
use std::thread;
use std::time::{Duration, Instant};

use super::action::Action;
use super::machine::Machine;
use super::{Mutation, Scenario};

/// What was explored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explored {
    /// Different states.
    pub states: usize,
    /// Steps from one to another.
    pub transitions: usize,
    /// Actions on the shortest way to the farthest state.
    pub depth: usize,
    /// How long it took.
    pub time: Duration,
    /// States in which the receiver runs the VM.
    pub handed_over: usize,
}

/// What must not happen, and the shortest way to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// What is wrong.
    pub what: String,
    /// What happened, each with how things stood afterwards.
    pub trace: Vec<String>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, step) in (1..).zip(&self.trace) {
            writeln!(f, "{number:>3}. {step}")?;
        }
        write!(f, "Violation: {}", self.what)
    }
}

/// A state, by the way to it.
#[derive(Clone, Copy)]
struct Node {
    parent: u32,
    action: Action,
}

/// What one step led to.
struct Step {
    node: Node,
    hash: u128,
    handed_over: bool,
}

/// What is wrong, and the last step to it if it is not in the state itself.
struct Found {
    at: u32,
    action: Option<Action>,
    what: String,
}

/// What the steps from some states led to.
#[derive(Default)]
struct Expanded {
    /// How many there are.
    transitions: usize,
    /// Those to states that were not known, in order; some of them to the same state.
    steps: Vec<Step>,
    found: Option<Found>,
}

/// The first state, which has no parent.
const ROOT: u32 = 0;

/// Takes half of a state's hash for the hash of that.
#[derive(Default)]
struct Hashed(u64);

impl Hasher for Hashed {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        let half = bytes.first_chunk().expect("a state's hash has 16 bytes");
        self.0 = u64::from_ne_bytes(*half);
    }
}

struct Search<'a> {
    scenario: &'a Scenario,
    mutation: Option<Mutation>,
    nodes: Vec<Node>,
    /// Hashes of all states in `nodes`.
    known: HashSet<u128, BuildHasherDefault<Hashed>>,
}

/// Explores all that can happen in `scenario`.
///
/// # Errors
/// Something happened that must not; no way to anything that must not is shorter.
pub fn explore(scenario: &Scenario, mutation: Option<Mutation>) -> Result<Explored, Box<Violation>> {
    let began = Instant::now();
    let nodes = vec![Node { parent: ROOT, action: Action::Resume }];
    let mut search = Search { scenario, mutation, nodes, known: HashSet::default() };
    search.known.insert(search.machine(ROOT).fingerprint());
    let (mut transitions, mut depth, mut handed_over) = (0, 0, 0);
    let mut frontier = ROOT..1;
    while !frontier.is_empty() {
        let expanded = search.expand(&frontier);
        if let Some(found) = expanded.found {
            return Err(Box::new(search.violation(&found)));
        }
        transitions += expanded.transitions;
        for step in expanded.steps {
            if search.known.insert(step.hash) {
                search.nodes.push(step.node);
                handed_over += usize::from(step.handed_over);
            }
        }
        frontier = frontier.end..index(search.nodes.len());
        depth += usize::from(!frontier.is_empty());
    }
    Ok(Explored { states: search.nodes.len(), transitions, depth, time: began.elapsed(), handed_over })
}

impl Search<'_> {
    /// Takes every step from the states of `frontier`, on all processors.
    fn expand(&self, frontier: &std::ops::Range<u32>) -> Expanded {
        let threads = thread::available_parallelism().map_or(1, usize::from).min(frontier.len());
        let share = frontier.len().div_ceil(threads);
        thread::scope(|scope| {
            let starts = frontier.clone().step_by(share);
            let parts: Vec<_> = starts.map(|at| at..(at + index(share)).min(frontier.end)).collect();
            let workers: Vec<_> =
                parts.into_iter().map(|part| scope.spawn(move || self.expand_part(part))).collect();
            let mut all = Expanded::default();
            for worker in workers {
                let part = worker.join().expect("the model does not panic");
                all.transitions += part.transitions;
                all.steps.extend(part.steps);
                all.found = all.found.or(part.found);
            }
            all
        })
    }

    fn expand_part(&self, states: std::ops::Range<u32>) -> Expanded {
        let mut expanded = Expanded::default();
        for at in states {
            if let Err(found) = self.expand_state(at, &mut expanded) {
                expanded.found = Some(found);
                break;
            }
        }
        expanded
    }

    fn expand_state(&self, at: u32, expanded: &mut Expanded) -> Result<(), Found> {
        let state = self.machine(at);
        let actions = state.enabled();
        if !actions.iter().any(|action| action.is_progress()) && !state.is_over() {
            let what = "nothing leads on: the migration neither ends nor fails".to_owned();
            return Err(Found { at, action: None, what });
        }
        expanded.transitions += actions.len();
        let mut built = Some(state);
        for action in actions {
            let mut machine = built.take().unwrap_or_else(|| self.machine(at));
            machine.step(action).map_err(|what| Found { at, action: Some(action), what })?;
            let (node, handed_over) = (Node { parent: at, action }, machine.is_handed_over());
            let hash = machine.fingerprint();
            if !self.known.contains(&hash) {
                expanded.steps.push(Step { node, hash, handed_over });
            }
        }
        Ok(())
    }

    /// Builds a state anew.
    fn machine(&self, at: u32) -> Machine {
        let mut machine = Machine::new(self.scenario, self.mutation);
        for action in self.way(at) {
            machine.step(action).expect("a known state is sound");
        }
        machine
    }

    fn way(&self, at: u32) -> Vec<Action> {
        let node = |at: u32| self.nodes[at as usize];
        let back = std::iter::successors(Some(at), |&at| Some(node(at).parent)).take_while(|&at| at != ROOT);
        let mut way: Vec<_> = back.map(|at| node(at).action).collect();
        way.reverse();
        way
    }

    fn violation(&self, found: &Found) -> Violation {
        let mut machine = Machine::new(self.scenario, self.mutation);
        let told = |action: Action| {
            let _told_below = machine.step(action);
            format!("{action}  [{}]", machine.summary())
        };
        let trace = self.way(found.at).into_iter().chain(found.action).map(told).collect();
        Violation { what: found.what.clone(), trace }
    }
}

fn index(states: usize) -> u32 {
    u32::try_from(states).expect("fewer states than fit memory")
}
