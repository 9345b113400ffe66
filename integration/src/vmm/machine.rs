// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The machine: memory, vCPU and the VMM's writer, started and paused as one.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use vfio_migration::source::SummaryBitmap;
use vm_memory::{GuestMemoryError, GuestMemoryMmap};

use super::cpu::{CpuError, CpuLink, CpuState, ExitHook, Vcpu};
use super::guest::{Progress, write_image};
use super::kick::ImmediateExit;
use super::kvm_cpu::KvmCpu;
use super::kvm_vm::{KvmError, KvmVm, request};
use super::map::Map;
use super::memory::{MAX_RAM_BYTES, Memory, RegionBacking};
use super::pace::{Pace, Rate};
use super::software_cpu::SoftwareCpu;
use super::worker::{Kick, Worker, lock};
use super::writer::{Writer, WriterError, WriterLink, WriterState};

/// How long a pause may take before it counts as failed.
const PAUSE_PATIENCE: Duration = Duration::from_secs(5);

/// Why a machine did not do as it was told.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MachineError {
    /// There is no VM to be had.
    #[error("Cannot make a KVM machine")]
    Kvm(#[from] KvmError),
    /// There is more RAM than the guest's page tables can map.
    #[error("A KVM guest's page tables map {} GiB at most, not {} GiB", MAX_RAM_BYTES >> 30, .total_bytes >> 30)]
    TooLarge {
        /// Bytes of RAM.
        total_bytes: u64,
    },
    /// A thread of the machine could not be started.
    #[error("Cannot start the machine's {name} thread")]
    Thread {
        /// The thread's name.
        name: &'static str,
        /// What the system answered.
        source: io::Error,
    },
    /// The operation does not fit what the machine is doing.
    #[error("Cannot {operation} a machine that is {phase}")]
    Phase {
        /// What was asked for.
        operation: &'static str,
        /// What the machine is doing.
        phase: Phase,
    },
    /// The vCPU could not be set up, saved or restored.
    #[error("Cannot {operation} the vCPU")]
    Cpu {
        /// What was asked for.
        operation: &'static str,
        /// Why not.
        source: CpuError,
    },
    /// The vCPU stopped by itself.
    #[error("The vCPU stopped by itself")]
    CpuStopped(#[source] Arc<CpuError>),
    /// The VMM's writer stopped by itself.
    #[error("The VMM's writer stopped by itself")]
    WriterStopped(#[source] Arc<WriterError>),
    /// A thread of the machine did not stop.
    #[error("The machine's {name} did not pause within {PAUSE_PATIENCE:?}")]
    PauseTimedOut {
        /// Whose thread.
        name: &'static str,
    },
    /// Guest memory could not be reached.
    #[error("Cannot reach guest memory")]
    Memory(#[from] GuestMemoryError),
}

/// What executes the guest's loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CpuKind {
    /// A KVM vCPU.
    Kvm {
        /// Bytes of each vCPU's dirty ring, a power of two; `None` leaves the VM with the dirty bitmap.
        dirty_ring_bytes: Option<u32>,
    },
    /// A thread that does what the guest's code does, for hosts without KVM.
    Software,
}

/// What a machine is made of.
#[non_exhaustive]
pub struct MachineConfig {
    /// Its RAM.
    pub memory: Memory,
    /// What executes the guest.
    pub cpu: CpuKind,
    /// How fast the guest stamps pages.
    pub guest_rate: Rate,
    /// How fast the VMM writes records.
    pub vmm_rate: Rate,
    /// What the content of memory depends on. A restored machine goes on with the saved one.
    pub seed: u64,
    /// Called after each exit of a KVM vCPU.
    pub exit_hook: Option<ExitHook>,
}

impl MachineConfig {
    /// Describes a machine with modest rates: 2000 pages a second by the guest, 200 by the VMM.
    pub fn new(memory: Memory, cpu: CpuKind) -> Self {
        Self {
            memory,
            cpu,
            guest_rate: Rate::PagesPerSecond(2000),
            vmm_rate: Rate::PagesPerSecond(200),
            seed: 0,
            exit_hook: None,
        }
    }
}

/// Everything of a paused machine that is not in its memory.
#[derive(Debug, Serialize, Deserialize)]
pub struct MachineState {
    /// What the content of memory depends on.
    pub seed: u64,
    /// The vCPU.
    pub cpu: CpuState,
    /// The VMM's writer.
    pub writer: WriterState,
}

/// What a machine is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Neither booted nor restored.
    Empty,
    /// Has a state and stands still.
    Paused,
    /// Runs.
    Running,
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Empty => "neither booted nor restored",
            Self::Paused => "paused",
            Self::Running => "running",
        })
    }
}

/// A virtual machine with one vCPU.
///
/// All methods take `&self`: one thread may drive the machine while others read its counters. Dropping it stops it.
pub struct Machine {
    // The vCPU goes before the VM, and both before the memory they use.
    cpu: Worker<Box<dyn Vcpu>>,
    writer: Worker<Writer>,
    kvm: Option<KvmParts>,
    memory: Memory,
    map: Map,
    phase: Mutex<Phase>,
    seed: Mutex<u64>,
    cpu_link: Arc<CpuLink>,
    writer_link: Arc<WriterLink>,
}

/// What a KVM machine keeps besides its vCPU's thread.
struct KvmParts {
    vm: Arc<VmFd>,
    vcpu: RawFd,
}

impl Machine {
    /// Makes a machine that has neither run nor any content in its memory.
    ///
    /// # Errors
    /// [`MachineError::Kvm`] says whether KVM is absent, denied or refused something.
    pub fn new(config: MachineConfig) -> Result<Self, MachineError> {
        let MachineConfig { memory, cpu, guest_rate, vmm_rate, seed, exit_hook } = config;
        let map = Map::new(memory.layout());
        let cpu_link = Arc::new(CpuLink::new(Pace::new(guest_rate)));
        let (kvm, vcpu, kick): (_, Box<dyn Vcpu>, Kick) = match cpu {
            CpuKind::Kvm { .. } if memory.layout().total_bytes() > MAX_RAM_BYTES => {
                return Err(MachineError::TooLarge { total_bytes: memory.layout().total_bytes() });
            }
            CpuKind::Kvm { dirty_ring_bytes } => {
                let (parts, vcpu, kick) = kvm_cpu(&memory, dirty_ring_bytes, &cpu_link, exit_hook)?;
                (Some(parts), Box::new(vcpu), kick)
            }
            CpuKind::Software => {
                let vcpu = SoftwareCpu::new(memory.clone(), map.guest_walk(), Arc::clone(&cpu_link));
                (None, Box::new(vcpu), Box::new(|_| {}))
            }
        };
        let writer_link = Arc::new(WriterLink::new(Pace::new(vmm_rate)));
        let writer = Writer::new(memory.clone(), &map, Arc::clone(&writer_link));
        let thread = |name| move |source| MachineError::Thread { name, source };
        Ok(Self {
            cpu: Worker::spawn("vcpu", vcpu, kick).map_err(thread("vCPU"))?,
            writer: Worker::spawn("vmm-writer", writer, Box::new(|_| {})).map_err(thread("writer"))?,
            kvm,
            memory,
            map,
            phase: Mutex::new(Phase::Empty),
            seed: Mutex::new(seed),
            cpu_link,
            writer_link,
        })
    }

    /// Fills the memory, which must read zero, and points the vCPU at its first instruction: paused on success.
    ///
    /// # Errors
    /// [`MachineError::Phase`] unless the machine is fresh.
    pub fn boot(&self) -> Result<(), MachineError> {
        let mut phase = self.expect_phase("boot", Phase::Empty)?;
        let seed = *lock(&self.seed);
        write_image(&self.memory, &self.map, seed)?;
        self.cpu.job().boot(seed).map_err(cpu_failed("boot"))?;
        self.writer.job().place(seed, WriterState::default());
        *phase = Phase::Paused;
        Ok(())
    }

    /// Puts a saved state into a fresh machine whose memory is that of the saved one: paused on success.
    ///
    /// # Errors
    /// [`MachineError::Phase`] unless the machine is fresh; [`MachineError::Cpu`] when the state does not fit.
    pub fn restore(&self, state: &MachineState) -> Result<(), MachineError> {
        let mut phase = self.expect_phase("restore", Phase::Empty)?;
        self.cpu.job().restore(&state.cpu, state.seed).map_err(cpu_failed("restore"))?;
        self.writer.job().place(state.seed, state.writer);
        *lock(&self.seed) = state.seed;
        *phase = Phase::Paused;
        Ok(())
    }

    /// Lets the booted or restored machine run.
    ///
    /// # Errors
    /// [`MachineError::Phase`] unless it is paused; why a thread had stopped by itself, if one had.
    pub fn start(&self) -> Result<(), MachineError> {
        let mut phase = self.expect_phase("start", Phase::Paused)?;
        self.health()?;
        self.writer.unpark();
        self.cpu.unpark();
        *phase = Phase::Running;
        Ok(())
    }

    /// Stops the vCPU and the VMM's writer. On success neither writes any more; a paused machine stays paused.
    ///
    /// # Errors
    /// Names a thread that did not stop, or that had stopped by itself. The machine then counts as paused.
    pub fn pause(&self) -> Result<(), MachineError> {
        let mut phase = lock(&self.phase);
        if *phase == Phase::Empty {
            return Err(MachineError::Phase { operation: "pause", phase: *phase });
        }
        *phase = Phase::Paused;
        self.cpu.ask_to_park();
        self.writer.ask_to_park();
        for (name, parked) in [
            ("vCPU", self.cpu.wait_parked(PAUSE_PATIENCE)),
            ("writer", self.writer.wait_parked(PAUSE_PATIENCE)),
        ] {
            if !parked {
                return Err(MachineError::PauseTimedOut { name });
            }
        }
        self.health()
    }

    /// Lets a paused machine run on; a running one runs on anyway.
    ///
    /// # Errors
    /// [`MachineError::Phase`] for a machine that has nothing to run.
    pub fn resume(&self) -> Result<(), MachineError> {
        if self.phase() == Phase::Running { Ok(()) } else { self.start() }
    }

    /// Reads the state out of a paused machine and leaves it as it is.
    ///
    /// # Errors
    /// [`MachineError::Phase`] unless the machine is paused.
    pub fn save(&self) -> Result<MachineState, MachineError> {
        let _phase = self.expect_phase("save", Phase::Paused)?;
        self.health()?;
        let cpu = self.cpu.job().save().map_err(cpu_failed("save"))?;
        Ok(MachineState { seed: *lock(&self.seed), cpu, writer: self.writer.job().state() })
    }

    /// Reports a thread that stopped by itself.
    ///
    /// # Errors
    /// Why it stopped.
    pub fn health(&self) -> Result<(), MachineError> {
        if let Some(error) = self.cpu.failure() {
            return Err(MachineError::CpuStopped(error));
        }
        self.writer.failure().map_or(Ok(()), |error| Err(MachineError::WriterStopped(error)))
    }

    /// What the machine is doing.
    pub fn phase(&self) -> Phase {
        *lock(&self.phase)
    }

    /// The memory as vm-memory sees it.
    pub fn memory(&self) -> &GuestMemoryMmap<SummaryBitmap> {
        self.memory.guest()
    }

    /// The regions of RAM with their files and KVM slots.
    pub fn regions(&self) -> &[RegionBacking] {
        self.memory.regions()
    }

    /// Who writes where.
    pub fn map(&self) -> &Map {
        &self.map
    }

    /// The VM, for its dirty log; `None` on a software machine.
    pub fn vm_fd(&self) -> Option<&Arc<VmFd>> {
        self.kvm.as_ref().map(|kvm| &kvm.vm)
    }

    /// The vCPU's descriptor, for mapping its dirty ring; `None` on a software machine.
    ///
    /// It is open as long as the machine exists.
    pub fn vcpu_fd(&self) -> Option<RawFd> {
        self.kvm.as_ref().map(|kvm| kvm.vcpu)
    }

    /// Addresses of the wrong pages that the guest found on this machine: the first 1024, in the order found.
    pub fn faults(&self) -> Vec<u64> {
        self.cpu_link.faults()
    }

    /// Addresses of pages whose record the VMM's writer found wrong on this machine: the first 1024.
    pub fn writer_faults(&self) -> Vec<u64> {
        self.writer_link.faults()
    }

    /// Wrong pages that the guest counted since it booted, on whichever machine.
    ///
    /// # Errors
    /// When guest memory cannot be reached, as for the two below.
    pub fn wrong_pages(&self) -> Result<u64, MachineError> {
        Ok(Progress(self.memory()).wrong_pages()?)
    }

    /// Passes that the guest completed since it booted, on whichever machine.
    ///
    /// # Errors
    /// When guest memory cannot be reached.
    pub fn passes(&self) -> Result<u64, MachineError> {
        Ok(Progress(self.memory()).passes()?)
    }

    /// Pages that the guest stamped since it booted, on whichever machine; the same page counts every time.
    ///
    /// # Errors
    /// When guest memory cannot be reached.
    pub fn pages_written(&self) -> Result<u64, MachineError> {
        Ok(Progress(self.memory()).pages()?)
    }

    /// Takes `percent` of the guest's time and rate away, 99 at most; 0 gives all back.
    pub fn throttle(&self, percent: u8) {
        self.cpu_link.pace.throttle(percent);
    }

    /// Changes how fast the guest stamps pages.
    pub fn limit_guest(&self, rate: Rate) {
        self.cpu_link.pace.limit(rate);
    }

    /// Changes how fast the VMM writes records.
    pub fn limit_vmm(&self, rate: Rate) {
        self.writer_link.pace.limit(rate);
    }

    fn expect_phase(
        &self,
        operation: &'static str,
        expected: Phase,
    ) -> Result<MutexGuard<'_, Phase>, MachineError> {
        let phase = lock(&self.phase);
        if *phase == expected { Ok(phase) } else { Err(MachineError::Phase { operation, phase: *phase }) }
    }
}

fn cpu_failed(operation: &'static str) -> impl Fn(CpuError) -> MachineError {
    move |source| MachineError::Cpu { operation, source }
}

/// Makes the VM, its vCPU, and what gets the vCPU's thread out of the guest.
fn kvm_cpu(
    memory: &Memory,
    dirty_ring_bytes: Option<u32>,
    link: &Arc<CpuLink>,
    hook: Option<ExitHook>,
) -> Result<(KvmParts, KvmCpu, Kick), KvmError> {
    let KvmVm { kvm, vm } = KvmVm::new(memory.regions(), dirty_ring_bytes)?;
    let vcpu = vm.create_vcpu(0).map_err(request("KVM_CREATE_VCPU"))?;
    let parts = KvmParts { vm: Arc::new(vm), vcpu: vcpu.as_raw_fd() };
    let exit = Arc::new(ImmediateExit::new(&vcpu).map_err(request("Mapping the vCPU"))?);
    let cpu = KvmCpu::new(&kvm, vcpu, Arc::clone(&exit), Arc::clone(link), hook)?;
    Ok((parts, cpu, Box::new(move |thread| exit.kick(thread))))
}
