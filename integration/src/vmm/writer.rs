// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The VMM's own writes to guest memory: a clock page and a ring of log records, through vm-memory.
//!
//! A record is four words: sequence, address, time in nanoseconds, check word. It stands at the start of the shared
//! part of a page. The writer goes round its pages, one record each, and looks first whether the record of the round
//! before is still there.

use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::guest::{pages, stamp_check};
use super::map::{AreaKind, Map, SHARED_BYTES};
use super::memory::{Memory, PAGE_BYTES};
use super::pace::{Pace, Pacer};
use super::worker::{Gate, Job, lock};

/// The check word of a record mixes this into the sequence, so that no guest stamp passes for a record.
const RECORD_MARK: u64 = 0x564D_4D00_0000_0000;
/// Wrong records that are remembered by address.
const MOST_FAULTS: usize = 1024;

type Record = [u64; 4];

/// The writer cannot reach guest memory.
#[derive(Debug, Error)]
#[error("The VMM's writer cannot reach guest memory")]
pub struct WriterError(#[from] GuestMemoryError);

/// Where the writer stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriterState {
    /// The sequence number of the next record, from 0.
    pub sequence: u64,
}

/// What the writer shares with its machine while it runs.
pub(super) struct WriterLink {
    pub(super) pace: Pace,
    faults: Mutex<Vec<u64>>,
}

impl WriterLink {
    pub(super) fn new(pace: Pace) -> Self {
        Self { pace, faults: Mutex::new(Vec::new()) }
    }

    pub(super) fn faults(&self) -> Vec<u64> {
        lock(&self.faults).clone()
    }
}

/// The job that writes.
pub(super) struct Writer {
    memory: Memory,
    clock_gpa: u64,
    ring: Vec<u64>,
    seed: u64,
    state: WriterState,
    link: Arc<WriterLink>,
    pacer: Pacer,
}

impl Writer {
    /// The clock is the first page that only the VMM writes; the ring is all others of its window.
    pub(super) fn new(memory: Memory, map: &Map, link: Arc<WriterLink>) -> Self {
        let own = map.ranges(AreaKind::Vmm).next().expect("every map has an area for the VMM");
        let clock_gpa = own.start;
        let ring = map.vmm_window().into_iter().flat_map(pages).filter(|&gpa| gpa != clock_gpa).collect();
        Self { memory, clock_gpa, ring, seed: 0, state: WriterState::default(), link, pacer: Pacer::new() }
    }

    /// Sets what the records' check words depend on, and where to go on.
    pub(super) fn place(&mut self, seed: u64, state: WriterState) {
        self.seed = seed;
        self.state = state;
    }

    pub(super) fn state(&self) -> WriterState {
        self.state
    }

    /// Writes the record whose turn it is, after a look at the one it replaces.
    fn write_record(&mut self) -> Result<(), GuestMemoryError> {
        let sequence = self.state.sequence;
        let round = self.ring.len() as u64;
        let gpa = self.ring[usize::try_from(sequence % round).expect("below the length of a vector")];
        let old: Record = self.memory.guest().read_obj(record_address(gpa))?;
        if !self.is_record(&old, gpa, sequence.checked_sub(round)) {
            self.report_fault(gpa);
        }
        let record = self.record(gpa, sequence);
        self.memory.guest().write_obj(record, record_address(gpa))?;
        self.state.sequence = sequence.wrapping_add(1);
        Ok(())
    }

    fn write_clock(&self) -> Result<(), GuestMemoryError> {
        let clock = self.record(self.clock_gpa, self.state.sequence);
        self.memory.guest().write_obj(clock, record_address(self.clock_gpa))
    }

    fn record(&self, gpa: u64, sequence: u64) -> Record {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let nanos = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        [sequence, gpa, nanos, self.check(gpa, sequence, nanos)]
    }

    fn check(&self, gpa: u64, sequence: u64, nanos: u64) -> u64 {
        stamp_check(sequence ^ RECORD_MARK, gpa / PAGE_BYTES, self.seed) ^ nanos
    }

    /// Tells whether `record` is the one of `sequence`; before the first round a place is still zero.
    fn is_record(&self, record: &Record, gpa: u64, sequence: Option<u64>) -> bool {
        match sequence {
            None => *record == [0; 4],
            Some(sequence) => {
                record[..2] == [sequence, gpa] && record[3] == self.check(gpa, sequence, record[2])
            }
        }
    }

    fn report_fault(&self, gpa: u64) {
        log::warn!("The VMM found a wrong record of its own at {gpa:#x}");
        let mut faults = lock(&self.link.faults);
        if faults.len() < MOST_FAULTS {
            faults.push(gpa);
        }
    }
}

impl Job for Writer {
    type Error = WriterError;

    fn run(&mut self, gate: &Gate) -> Result<(), WriterError> {
        let link = Arc::clone(&self.link);
        while gate.wants_run() {
            let granted = self.pacer.grant(&link.pace, gate);
            for _ in 0..granted {
                self.write_record()?;
            }
            if granted > 0 {
                self.write_clock()?;
            }
        }
        Ok(())
    }
}

fn record_address(gpa: u64) -> GuestAddress {
    GuestAddress(gpa + SHARED_BYTES.start)
}
