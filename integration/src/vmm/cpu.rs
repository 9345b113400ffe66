// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the KVM vCPU and the software vCPU have in common: their jobs, states, exits and errors.

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_memory::GuestMemoryError;

use super::kvm_cpu::VcpuState;
use super::pace::Pace;
use super::software_cpu::SoftwareState;
use super::worker::{Gate, Job, lock};

/// Why a vCPU could not be set up, run, saved or restored.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CpuError {
    /// A KVM request on the vCPU failed.
    #[error("{request} failed on the vCPU")]
    Request {
        /// The ioctl.
        request: &'static str,
        /// What the kernel answered.
        source: vmm_sys_util::errno::Error,
    },
    /// The guest left KVM for a reason that its code never gives.
    #[error("The guest stopped with an unexpected exit: {exit}")]
    UnexpectedExit {
        /// The exit as KVM described it.
        exit: String,
    },
    /// Not every saved MSR was accepted.
    #[error("KVM refuses the saved value of MSR {index:#x}")]
    Msr {
        /// The first MSR that was not set.
        index: u32,
    },
    /// A saved list is longer than KVM takes.
    #[error("The saved vCPU has {count} {what}, more than KVM takes")]
    ListTooLong {
        /// What is listed.
        what: &'static str,
        /// Entries of the list.
        count: usize,
    },
    /// A KVM vCPU was given a software vCPU's state, or the other way round.
    #[error("A {found} vCPU's state cannot be restored into a {wanted} vCPU")]
    OtherKind {
        /// The vCPU at hand.
        wanted: &'static str,
        /// Whose state it is.
        found: &'static str,
    },
    /// A software vCPU's state points outside of its walk, or to a pass that cannot be.
    #[error("The saved vCPU stands at page {next_page} of {pages} in its walk, on pass {pass}")]
    OutsideWalk {
        /// The pass that the state says.
        pass: u64,
        /// Where the state says the vCPU stands.
        next_page: u64,
        /// Pages of the walk.
        pages: u64,
    },
    /// Guest memory could not be reached.
    #[error("The vCPU cannot reach guest memory")]
    Memory(#[from] GuestMemoryError),
}

/// Everything of a paused vCPU that is not in guest memory.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CpuState {
    /// Of a KVM vCPU.
    Kvm(Box<VcpuState>),
    /// Of a software vCPU.
    Software(SoftwareState),
}

impl CpuState {
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Kvm(_) => "KVM",
            Self::Software(_) => "software",
        }
    }
}

/// Why a KVM vCPU came back to the VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VcpuExitKind {
    /// The guest used a port.
    Io,
    /// A signal or a pause interrupted it.
    Interrupted,
    /// Its dirty ring is nearly full: it does not run again before entries were harvested and reset.
    DirtyRingFull,
    /// Anything else; the guest's code gives no reason for it.
    Other,
}

/// Called on the vCPU's thread after each exit, before the exit is handled.
pub type ExitHook = Arc<dyn Fn(VcpuExitKind) + Send + Sync>;

/// One virtual CPU that runs the guest's loop. All but `run` are called while it is parked.
pub(super) trait Vcpu: Send {
    /// Points a fresh vCPU at the guest's first instruction, with its image already in memory.
    fn boot(&mut self, seed: u64) -> Result<(), CpuError>;
    /// Runs the guest until `gate` wants it to stop; afterwards the state is complete.
    fn run(&mut self, gate: &Gate) -> Result<(), CpuError>;
    /// Reads the state out.
    fn save(&self) -> Result<CpuState, CpuError>;
    /// Puts a saved state into a fresh vCPU.
    fn restore(&mut self, state: &CpuState, seed: u64) -> Result<(), CpuError>;
}

impl Job for Box<dyn Vcpu> {
    type Error = CpuError;

    fn run(&mut self, gate: &Gate) -> Result<(), CpuError> {
        self.as_mut().run(gate)
    }
}

/// What a vCPU shares with its machine while it runs.
pub(super) struct CpuLink {
    /// How fast the guest may stamp pages.
    pub(super) pace: Pace,
    faults: Mutex<Vec<u64>>,
}

impl CpuLink {
    /// Wrong pages that are remembered by address; the guest counts all of them.
    const MOST_FAULTS: usize = 1024;

    pub(super) fn new(pace: Pace) -> Self {
        Self { pace, faults: Mutex::new(Vec::new()) }
    }

    pub(super) fn report_fault(&self, gpa: u64) {
        log::warn!("The guest found a wrong page at {gpa:#x}");
        let mut faults = lock(&self.faults);
        if faults.len() < Self::MOST_FAULTS {
            faults.push(gpa);
        }
    }

    pub(super) fn faults(&self) -> Vec<u64> {
        lock(&self.faults).clone()
    }
}
