// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A minimal VMM: enough of a machine to be migrated, and to notice when that went wrong.
//!
//! A [`Machine`] has RAM in memfds, one vCPU, and a thread that stands for all that a VMM writes to guest memory
//! itself. The guest stamps its pages over and over and checks on each pass what it wrote on the one before, so a
//! page that did not move, or moved in an old version, is found by the guest itself and named. [`Map`] says who
//! writes where.
//!
//! ```no_run
//! # use vfio_migration_integration::vmm::*;
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let layout = RamLayout::new(64 << 20, Split::default())?;
//! let config = MachineConfig::new(Memory::create(&layout)?, CpuKind::Kvm { dirty_ring_bytes: None });
//! let machine = Machine::new(config)?;
//! machine.boot()?;
//! machine.start()?;
//! machine.pause()?;
//! let state = machine.save()?;
//! # Ok(())
//! # }
//! ```

mod cpu;
mod guest;
mod kick;
mod kvm_cpu;
mod kvm_vm;
mod machine;
mod map;
mod memory;
mod pace;
mod software_cpu;
mod worker;
mod writer;

pub use cpu::{CpuError, CpuState, ExitHook, VcpuExitKind};
pub use kvm_cpu::VcpuState;
pub use kvm_vm::{KvmError, probe_kvm};
pub use machine::{CpuKind, Machine, MachineConfig, MachineError, MachineState, Phase};
pub use map::{Area, AreaKind, Map, SHARED_BYTES};
pub(crate) use memory::host_available_bytes;
pub use memory::{
    HOLE_END, HOLE_START, MAX_RAM_BYTES, MAX_SPARSE_BYTES, MIN_RAM_BYTES, Memory, MemoryError, PAGE_BYTES,
    PAGE_LEN, RamLayout, RegionBacking, Split,
};
pub use pace::Rate;
pub use software_cpu::SoftwareState;
pub use writer::{WriterError, WriterState};
