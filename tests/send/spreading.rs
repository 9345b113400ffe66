// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Every round goes over every connection, the last one with the VM stopped too, as far as there is enough for each.

use std::collections::BTreeSet;
use std::time::Duration;

use vfio_migration::precopy::TimeoutStrategy;
use vfio_migration::transfer::limits::ConnectionCount;
use vfio_migration::transfer::{SendOptions, Sender};

use crate::frames::MEMORY;
use crate::peer::{Fault, Peer, Seen};
use crate::vm::{FakeVm, Machine, PAGE, PAGES, Report, ScriptedSource};

/// Bytes below which a round is cut no finer.
const LEAST_CHUNK_BYTES: u64 = 64 << 10;

/// How a VM is sent.
#[derive(Clone, Copy)]
struct Plan {
    connections: u64,
    /// Pages that turn out dirty at each collect, never the same.
    dirty_pages: u64,
    /// Rounds before the VM is stopped; `None`: it was paused to begin with.
    running_rounds: Option<u32>,
}

impl Plan {
    /// Bytes of each round, the last of which has what two collects found.
    fn rounds(self) -> Vec<u64> {
        let later = self.running_rounds.unwrap_or(1) as usize - 1;
        let mut rounds = vec![PAGES * PAGE];
        rounds.extend(std::iter::repeat_n(self.dirty_pages * PAGE, later));
        rounds.push(2 * self.dirty_pages * PAGE);
        rounds
    }

    /// Sends the VM, and returns the Memory messages in the order in which they came.
    fn send(self) -> Vec<Seen> {
        let mut vm = FakeVm::new(0);
        let collects = u64::from(self.running_rounds.unwrap_or(1)) + 1;
        let script =
            (0..collects).map(|at| Report::Pages(at * self.dirty_pages..(at + 1) * self.dirty_pages));
        let source = Box::new(ScriptedSource::new(&vm.log, script));
        let machine = Machine::from(vm.builder().source(source).build().unwrap());
        let peer = Peer::tcp(self.connections as usize, Fault::None);
        let options = SendOptions::new(peer.url.clone())
            .connections(ConnectionCount::new(self.connections).unwrap())
            .unwrap()
            .downtime(Duration::ZERO)
            .timeout_strategy(TimeoutStrategy::Ignore)
            .max_rounds(self.running_rounds)
            .complete_paused(self.running_rounds.is_none());
        let sent = Sender::new(options).send(&mut vm, &machine.tracker, &machine.devices).unwrap();
        assert_eq!(sent.progress.round as usize, self.rounds().len());
        let (transcript, outcome) = peer.end();
        outcome.unwrap();
        transcript.assert_equals(&vm);
        transcript.of(MEMORY).into_iter().cloned().collect()
    }
}

fn bytes(seen: &Seen) -> u64 {
    seen.table.iter().map(|range| range.1).sum()
}

/// Checks that each round used as many connections as there are, or as it has pieces worth a message.
fn assert_spread(plan: Plan) {
    let memory = plan.send();
    let mut messages = memory.iter();
    for (round, round_bytes) in plan.rounds().into_iter().enumerate() {
        // No round begins before the last one is acknowledged: none of its messages came late.
        let (mut left, mut used) = (round_bytes, BTreeSet::new());
        while left > 0 {
            let seen = messages.next().expect("the round has more bytes");
            left = left.checked_sub(bytes(seen)).expect("no message is of two rounds");
            used.insert(seen.connection);
        }
        let useful = round_bytes.div_ceil(LEAST_CHUNK_BYTES).min(plan.connections);
        assert_eq!(
            used.len() as u64,
            useful,
            "connections in round {round} of {round_bytes} bytes: {used:?}"
        );
        assert!(!used.contains(&0), "the control connection carries nothing of a round");
    }
    let captured: Vec<_> = messages.map(|seen| (seen.connection, bytes(seen))).collect();
    assert_eq!(captured, [(0, PAGE)], "what the capture wrote");
}

#[test]
fn every_round_with_64_kib_for_each_connection_uses_them_all() {
    for connections in [4, 16] {
        let least = connections * LEAST_CHUNK_BYTES / PAGE;
        for dirty_pages in [least, least + 5] {
            assert_spread(Plan { connections, dirty_pages, running_rounds: Some(4) });
        }
    }
}

#[test]
fn the_last_round_of_a_paused_vm_uses_every_connection() {
    for connections in [4, 16] {
        let dirty_pages = connections * LEAST_CHUNK_BYTES / PAGE / 2;
        assert_spread(Plan { connections, dirty_pages, running_rounds: None });
    }
}

#[test]
fn a_small_round_uses_as_many_connections_as_it_has_64_kib() {
    for dirty_pages in [1, 16, 17, 100] {
        assert_spread(Plan { connections: 16, dirty_pages, running_rounds: Some(3) });
    }
}
