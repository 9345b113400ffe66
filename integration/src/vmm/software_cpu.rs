// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A vCPU without KVM: the guest's loop as a thread that reads and writes guest memory through vm-memory.

use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::cpu::{CpuError, CpuLink, CpuState, Vcpu};
use super::guest::{Progress, carries_stamp, write_stamp};
use super::memory::{Memory, PAGE_BYTES};
use super::pace::Pacer;
use super::worker::Gate;

/// The last pass that a saved state may be on: nobody gets there, and counting on does not overflow.
const MAX_PASS: u64 = u64::MAX / 2;

/// Where the software vCPU stands in its loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SoftwareState {
    /// The pass being written, from 1.
    pub pass: u64,
    /// The next page of the walk, from 0.
    pub next_page: u64,
}

/// One software vCPU.
pub(super) struct SoftwareCpu {
    memory: Memory,
    walk: Vec<Range<u64>>,
    seed: u64,
    state: SoftwareState,
    link: Arc<CpuLink>,
    pacer: Pacer,
}

impl SoftwareCpu {
    pub(super) fn new(memory: Memory, walk: Vec<Range<u64>>, link: Arc<CpuLink>) -> Self {
        let state = SoftwareState { pass: 1, next_page: 0 };
        Self { memory, walk, seed: 0, state, link, pacer: Pacer::new() }
    }

    fn walk_pages(&self) -> u64 {
        self.walk.iter().map(|range| (range.end - range.start) / PAGE_BYTES).sum()
    }

    /// The address of a page of the walk.
    fn page_gpa(&self, page: u64) -> Option<u64> {
        let mut left = page * PAGE_BYTES;
        for range in &self.walk {
            let len = range.end - range.start;
            if left < len {
                return Some(range.start + left);
            }
            left -= len;
        }
        None
    }

    /// Checks and stamps one page.
    fn step(&mut self) -> Result<(), CpuError> {
        let (ram, SoftwareState { pass, next_page }) = (self.memory.guest(), self.state);
        let progress = Progress(ram);
        let Some(gpa) = self.page_gpa(next_page) else {
            progress.complete_pass(pass)?;
            self.state = SoftwareState { pass: pass + 1, next_page: 0 };
            return Ok(());
        };
        if !carries_stamp(ram, gpa, pass - 1, self.seed)? {
            progress.report_wrong(gpa)?;
            self.link.report_fault(gpa);
        }
        write_stamp(ram, gpa, pass, self.seed)?;
        progress.count_page()?;
        self.state.next_page += 1;
        Ok(())
    }
}

impl Vcpu for SoftwareCpu {
    fn boot(&mut self, seed: u64) -> Result<(), CpuError> {
        self.seed = seed;
        Ok(())
    }

    fn run(&mut self, gate: &Gate) -> Result<(), CpuError> {
        while gate.wants_run() {
            for _ in 0..self.pacer.grant(&self.link.pace, gate) {
                self.step()?;
            }
        }
        Ok(())
    }

    fn save(&self) -> Result<CpuState, CpuError> {
        Ok(CpuState::Software(self.state))
    }

    fn restore(&mut self, state: &CpuState, seed: u64) -> Result<(), CpuError> {
        let &CpuState::Software(state @ SoftwareState { next_page, .. }) = state else {
            return Err(CpuError::OtherKind { wanted: "software", found: state.kind() });
        };
        let pages = self.walk_pages();
        if next_page > pages || !(1..=MAX_PASS).contains(&state.pass) {
            return Err(CpuError::OutsideWalk { pass: state.pass, next_page, pages });
        }
        self.seed = seed;
        self.state = state;
        Ok(())
    }
}
