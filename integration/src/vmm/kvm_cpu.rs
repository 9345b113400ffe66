// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A vCPU that KVM runs, in 64-bit mode, and all of its state.

use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_EXIT_DIRTY_RING_FULL, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_debugregs,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use serde::{Deserialize, Serialize};

use super::cpu::{CpuError, CpuLink, CpuState, ExitHook, Vcpu, VcpuExitKind};
use super::guest::{CHECK_PAGE_FACTOR, CHECK_PASS_FACTOR, PORT_GRANT, PORT_WRONG_PAGE};
use super::kick::ImmediateExit;
use super::kvm_vm::{KvmError, request};
use super::map::{CODE_GPA, PML4_GPA, PROGRESS_GPA, WALK_GPA};
use super::memory::PAGE_BYTES;
use super::pace::Pacer;
use super::worker::Gate;

/// The MSRs that 64-bit code can see on a machine without interrupt controllers, clocks or paravirtual devices.
/// EFER and the bases of FS and GS are part of the special registers.
const SAVED_MSRS: [u32; 11] = [
    0x0000_0010, // IA32_TSC
    0x0000_0174, // IA32_SYSENTER_CS
    0x0000_0175, // IA32_SYSENTER_ESP
    0x0000_0176, // IA32_SYSENTER_EIP
    0x0000_01a0, // IA32_MISC_ENABLE
    0x0000_0277, // IA32_PAT
    0xc000_0081, // STAR
    0xc000_0082, // LSTAR
    0xc000_0083, // CSTAR
    0xc000_0084, // SYSCALL_MASK
    0xc000_0102, // KERNEL_GS_BASE
];

const CR0_PE: u64 = 1;
const CR0_MP: u64 = 1 << 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_RESERVED: u64 = 1 << 1;

/// The complete state of a paused KVM vCPU, as KVM's own structures.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState {
    cpuid: Vec<kvm_cpuid_entry2>,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debugregs: kvm_debugregs,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

/// One KVM vCPU and what its run loop needs.
pub(super) struct KvmCpu {
    vcpu: VcpuFd,
    cpuid: CpuId,
    msrs: Vec<u32>,
    immediate_exit: Arc<ImmediateExit>,
    link: Arc<CpuLink>,
    hook: Option<ExitHook>,
    pacer: Pacer,
}

impl KvmCpu {
    pub(super) fn new(
        kvm: &Kvm,
        vcpu: VcpuFd,
        immediate_exit: Arc<ImmediateExit>,
        link: Arc<CpuLink>,
        hook: Option<ExitHook>,
    ) -> Result<Self, KvmError> {
        let cpuid =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(request("KVM_GET_SUPPORTED_CPUID"))?;
        let offered = kvm.get_msr_index_list().map_err(request("KVM_GET_MSR_INDEX_LIST"))?;
        let msrs = SAVED_MSRS.into_iter().filter(|index| offered.as_slice().contains(index)).collect();
        Ok(Self { vcpu, cpuid, msrs, immediate_exit, link, hook, pacer: Pacer::new() })
    }

    /// Enters the guest once and handles what it came back for.
    fn step(&mut self, gate: &Gate) -> Result<(), CpuError> {
        let outcome = self.vcpu.run();
        if let Some(hook) = &self.hook {
            hook(exit_kind(&outcome));
        }
        match outcome {
            Ok(VcpuExit::IoIn(PORT_GRANT, data)) => {
                let pages = self.pacer.grant(&self.link.pace, gate);
                data.copy_from_slice(&pages.to_le_bytes()[..data.len()]);
                Ok(())
            }
            Ok(VcpuExit::IoOut(PORT_WRONG_PAGE, &[a, b, c, d])) => {
                self.link.report_fault(u64::from(u32::from_le_bytes([a, b, c, d])) * PAGE_BYTES);
                Ok(())
            }
            Ok(VcpuExit::Intr | VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => Ok(()),
            Ok(exit) => Err(CpuError::UnexpectedExit { exit: format!("{exit:?}") }),
            Err(error) if is_interruption(&error) => Ok(()),
            Err(source) => Err(CpuError::Request { request: "KVM_RUN", source }),
        }
    }

    /// Completes the port access of the last exit: until the next `KVM_RUN` the registers do not show it.
    fn complete_pending_io(&mut self) -> Result<(), CpuError> {
        self.immediate_exit.set();
        match self.vcpu.run() {
            Err(error) if is_interruption(&error) => Ok(()),
            Err(source) => Err(CpuError::Request { request: "KVM_RUN", source }),
            Ok(exit) => Err(CpuError::UnexpectedExit { exit: format!("{exit:?} when nothing should run") }),
        }
    }

    fn read_msrs(&self) -> Result<Vec<kvm_msr_entry>, CpuError> {
        let wanted: Vec<_> =
            self.msrs.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut msrs = msr_list(&wanted)?;
        let read = self.vcpu.get_msrs(&mut msrs).map_err(failed("KVM_GET_MSRS"))?;
        match wanted.get(read) {
            None => Ok(msrs.as_slice().to_vec()),
            Some(unread) => Err(CpuError::Msr { index: unread.index }),
        }
    }

    fn write_msrs(&self, entries: &[kvm_msr_entry]) -> Result<(), CpuError> {
        let written = self.vcpu.set_msrs(&msr_list(entries)?).map_err(failed("KVM_SET_MSRS"))?;
        match entries.get(written) {
            None => Ok(()),
            Some(refused) => Err(CpuError::Msr { index: refused.index }),
        }
    }
}

impl Vcpu for KvmCpu {
    fn boot(&mut self, seed: u64) -> Result<(), CpuError> {
        self.vcpu.set_cpuid2(&self.cpuid).map_err(failed("KVM_SET_CPUID2"))?;
        let fresh = self.vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
        self.vcpu.set_sregs(&long_mode(fresh)).map_err(failed("KVM_SET_SREGS"))?;
        self.vcpu.set_regs(&boot_regs(seed)).map_err(failed("KVM_SET_REGS"))
    }

    fn run(&mut self, gate: &Gate) -> Result<(), CpuError> {
        // Whoever wants a pause changes the gate first and sets the flag after that, so between this line and the
        // next none is missed.
        self.immediate_exit.clear();
        while gate.wants_run() {
            self.step(gate)?;
        }
        self.complete_pending_io()
    }

    fn save(&self) -> Result<CpuState, CpuError> {
        let vcpu = &self.vcpu;
        let cpuid = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(failed("KVM_GET_CPUID2"))?;
        let state = VcpuState {
            cpuid: cpuid.as_slice().to_vec(),
            mp_state: vcpu.get_mp_state().map_err(failed("KVM_GET_MP_STATE"))?,
            regs: vcpu.get_regs().map_err(failed("KVM_GET_REGS"))?,
            sregs: vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?,
            xsave: vcpu.get_xsave().map_err(failed("KVM_GET_XSAVE"))?,
            xcrs: vcpu.get_xcrs().map_err(failed("KVM_GET_XCRS"))?,
            debugregs: vcpu.get_debug_regs().map_err(failed("KVM_GET_DEBUGREGS"))?,
            msrs: self.read_msrs()?,
            events: vcpu.get_vcpu_events().map_err(failed("KVM_GET_VCPU_EVENTS"))?,
        };
        Ok(CpuState::Kvm(Box::new(state)))
    }

    fn restore(&mut self, state: &CpuState, _seed: u64) -> Result<(), CpuError> {
        let CpuState::Kvm(state) = state else {
            return Err(CpuError::OtherKind { wanted: "KVM", found: state.kind() });
        };
        let vcpu = &self.vcpu;
        // CPUID comes first, for it decides what the rest may hold; events last, for they describe the rest.
        vcpu.set_cpuid2(&cpuid_list(&state.cpuid)?).map_err(failed("KVM_SET_CPUID2"))?;
        vcpu.set_mp_state(state.mp_state).map_err(failed("KVM_SET_MP_STATE"))?;
        vcpu.set_regs(&state.regs).map_err(failed("KVM_SET_REGS"))?;
        vcpu.set_sregs(&state.sregs).map_err(failed("KVM_SET_SREGS"))?;
        set_xsave(vcpu, &state.xsave).map_err(failed("KVM_SET_XSAVE"))?;
        vcpu.set_xcrs(&state.xcrs).map_err(failed("KVM_SET_XCRS"))?;
        vcpu.set_debug_regs(&state.debugregs).map_err(failed("KVM_SET_DEBUGREGS"))?;
        self.write_msrs(&state.msrs)?;
        vcpu.set_vcpu_events(&state.events).map_err(failed("KVM_SET_VCPU_EVENTS"))
    }
}

fn failed(request: &'static str) -> impl Fn(vmm_sys_util::errno::Error) -> CpuError {
    move |source| CpuError::Request { request, source }
}

fn is_interruption(error: &vmm_sys_util::errno::Error) -> bool {
    matches!(error.errno(), libc::EINTR | libc::EAGAIN)
}

fn exit_kind(outcome: &Result<VcpuExit<'_>, vmm_sys_util::errno::Error>) -> VcpuExitKind {
    match outcome {
        Ok(VcpuExit::IoIn(..) | VcpuExit::IoOut(..)) => VcpuExitKind::Io,
        Ok(VcpuExit::Intr) => VcpuExitKind::Interrupted,
        Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => VcpuExitKind::DirtyRingFull,
        Err(error) if is_interruption(error) => VcpuExitKind::Interrupted,
        _ => VcpuExitKind::Other,
    }
}

#[expect(
    unsafe_code,
    reason = "KVM reads as many bytes as the guest's features need, whatever the type says"
)]
fn set_xsave(vcpu: &VcpuFd, xsave: &kvm_xsave) -> vmm_sys_util::errno::Result<()> {
    // SAFETY: The image is longer than 4 KiB only for features that a process must first request for its guests
    // (AMX), and this one never does.
    unsafe { vcpu.set_xsave(xsave) }
}

fn msr_list(entries: &[kvm_msr_entry]) -> Result<Msrs, CpuError> {
    Msrs::from_entries(entries).map_err(|_| CpuError::ListTooLong { what: "MSRs", count: entries.len() })
}

fn cpuid_list(entries: &[kvm_cpuid_entry2]) -> Result<CpuId, CpuError> {
    CpuId::from_entries(entries)
        .map_err(|_| CpuError::ListTooLong { what: "CPUID entries", count: entries.len() })
}

/// Turns the special registers of a vCPU after reset into those of flat 64-bit code over the image's page tables.
///
/// There are no descriptor tables: nothing in the guest loads a segment or takes an exception.
fn long_mode(fresh: kvm_sregs) -> kvm_sregs {
    let flat = kvm_segment { limit: u32::MAX, present: 1, s: 1, g: 1, ..Default::default() };
    let code = kvm_segment { selector: 0x08, type_: 0b1011, l: 1, ..flat };
    let data = kvm_segment { selector: 0x10, type_: 0b0011, db: 1, ..flat };
    kvm_sregs {
        cs: code,
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        cr0: CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_PG,
        cr3: PML4_GPA,
        cr4: CR4_PAE,
        efer: EFER_LME | EFER_LMA,
        ..fresh
    }
}

/// The registers that the guest's code expects at its first instruction.
fn boot_regs(seed: u64) -> kvm_regs {
    kvm_regs {
        rip: CODE_GPA,
        rflags: RFLAGS_RESERVED,
        rbx: WALK_GPA,
        rbp: PROGRESS_GPA,
        r8: seed,
        r9: CHECK_PASS_FACTOR,
        r10: CHECK_PAGE_FACTOR,
        ..Default::default()
    }
}
