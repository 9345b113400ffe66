// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Who writes where: the guest-physical memory map of a machine.
//!
//! ```text
//! 0                 1 MiB       +8 KiB
//! │ boot            │ control   │ device │ guest+device │ guest │ guest+vmm │ vmm │ cold │ untouched │
//! │ code, tables    │ progress  │                                                                   │
//!
//!                                 ├── device window ──┤
//!                                          ├────── guest walk ──────────┤
//!                                                          ├─── VMM window ──┤
//! ```
//! Every region has all areas from `device` on; boot and control are in the first one only. The windows overlap,
//! so each writer has pages that only it writes and pages that it shares with one other. In a shared page the
//! guest owns the first 16 bytes and the last 8, and the other writer owns [`SHARED_BYTES`], so that neither spoils
//! what the other one checks.

use std::ops::Range;

use super::memory::{PAGE_BYTES, RamLayout};

/// The part of a page that the device or the VMM may write in an area which the guest stamps too.
pub const SHARED_BYTES: Range<u64> = 1024..3072;

/// First byte of the guest's code.
pub(super) const CODE_GPA: u64 = 0x8000;
/// The root of the guest's page tables.
pub(super) const PML4_GPA: u64 = 0x1_0000;
/// The second level, one entry a GiB.
pub(super) const PDPT_GPA: u64 = 0x1_1000;
/// The third level: one page a GiB, up to the end of the boot area.
pub(super) const PD_GPA: u64 = 0x1_2000;
/// End of the boot area.
pub(super) const BOOT_END: u64 = 0x10_0000;
/// The table of ranges that the guest walks. Written at boot, only read afterwards.
pub(super) const WALK_GPA: u64 = BOOT_END;
/// What the guest tells about its progress. Written by the guest alone.
pub(super) const PROGRESS_GPA: u64 = WALK_GPA + PAGE_BYTES;
/// End of the control area.
const CONTROL_END: u64 = PROGRESS_GPA + PAGE_BYTES;

/// Who writes the pages of an area while the machine runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AreaKind {
    /// Code and page tables: written at boot, then only read.
    Boot,
    /// The guest's walk table, written at boot, and its progress page, which the guest writes.
    Control,
    /// Only the device, by DMA.
    Device,
    /// The guest's stamps, and the device within [`SHARED_BYTES`].
    GuestAndDevice,
    /// Only the guest.
    Guest,
    /// The guest's stamps, and the VMM within [`SHARED_BYTES`].
    GuestAndVmm,
    /// Only the VMM.
    Vmm,
    /// Filled at boot with pseudo-random content, never written again: half of what is left, or 16 MiB of it at most in a sparse layout.
    Cold,
    /// Never written at all: reads zero.
    Untouched,
}

/// One stretch of RAM with one kind of writer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Area {
    /// Who writes it.
    pub kind: AreaKind,
    /// Where it is.
    pub range: Range<u64>,
}

/// The memory map: areas that tile RAM exactly, in ascending order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Map {
    areas: Vec<Area>,
}

/// One kind of area's share of a region, in pages.
struct Share {
    kind: AreaKind,
    divisor: u64,
    most: u64,
}

/// Most pages of a region's cold area in a sparse layout.
const SPARSE_COLD_PAGES: u64 = 4096;

/// Shares in the order in which the areas lie. The caps keep a pass over a large machine short: it is the size of
/// the written areas, not of RAM, that decides how long the guest needs to look at all its pages again.
const SHARES: [Share; 5] = [
    Share { kind: AreaKind::Device, divisor: 8, most: 4096 },
    Share { kind: AreaKind::GuestAndDevice, divisor: 64, most: 256 },
    Share { kind: AreaKind::Guest, divisor: 4, most: 4096 },
    Share { kind: AreaKind::GuestAndVmm, divisor: 64, most: 256 },
    Share { kind: AreaKind::Vmm, divisor: 32, most: 1024 },
];

impl Map {
    /// Computes the map of a RAM layout.
    pub fn new(layout: &RamLayout) -> Self {
        let mut areas = Vec::new();
        for region in layout.regions() {
            let mut start = region.start;
            if start == 0 {
                areas.push(Area { kind: AreaKind::Boot, range: 0..BOOT_END });
                areas.push(Area { kind: AreaKind::Control, range: BOOT_END..CONTROL_END });
                start = CONTROL_END;
            }
            let most_cold = if layout.is_sparse() { SPARSE_COLD_PAGES } else { u64::MAX };
            push_shares(&mut areas, start..region.end, most_cold);
        }
        Self { areas }
    }

    /// All areas in ascending order. Together they are RAM, without gap or overlap.
    pub fn areas(&self) -> &[Area] {
        &self.areas
    }

    /// The ranges of one kind, one a region at most.
    pub fn ranges(&self, kind: AreaKind) -> impl Iterator<Item = Range<u64>> + '_ {
        self.areas.iter().filter(move |area| area.kind == kind).map(|area| area.range.clone())
    }

    /// Bytes that are not left untouched.
    pub fn populated_bytes(&self) -> u64 {
        let written = self.areas.iter().filter(|area| area.kind != AreaKind::Untouched);
        written.map(|area| area.range.end - area.range.start).sum()
    }

    /// What the guest stamps and checks on every pass, one range a region.
    pub fn guest_walk(&self) -> Vec<Range<u64>> {
        self.window(&[AreaKind::GuestAndDevice, AreaKind::Guest, AreaKind::GuestAndVmm])
    }

    /// Where the device may write, one range a region. Within [`AreaKind::GuestAndDevice`] only [`SHARED_BYTES`].
    pub fn device_window(&self) -> Vec<Range<u64>> {
        self.window(&[AreaKind::Device, AreaKind::GuestAndDevice])
    }

    /// Where the VMM writes, one range a region. Within [`AreaKind::GuestAndVmm`] only [`SHARED_BYTES`].
    pub fn vmm_window(&self) -> Vec<Range<u64>> {
        self.window(&[AreaKind::GuestAndVmm, AreaKind::Vmm])
    }

    /// Joins neighbouring areas of the given kinds.
    fn window(&self, kinds: &[AreaKind]) -> Vec<Range<u64>> {
        let mut joined: Vec<Range<u64>> = Vec::new();
        for area in self.areas.iter().filter(|area| kinds.contains(&area.kind)) {
            match joined.last_mut() {
                Some(last) if last.end == area.range.start => last.end = area.range.end,
                _ => joined.push(area.range.clone()),
            }
        }
        joined
    }
}

/// Cuts one region's free part: the shares, then half of the rest cold, `most_cold` pages at most, and what is left untouched.
fn push_shares(areas: &mut Vec<Area>, free: Range<u64>, most_cold: u64) {
    let free_pages = (free.end - free.start) / PAGE_BYTES;
    let mut start = free.start;
    let mut push = |kind, pages: u64| {
        let range = start..start + pages * PAGE_BYTES;
        start = range.end;
        areas.push(Area { kind, range });
        pages
    };
    let mut rest_pages = free_pages;
    for Share { kind, divisor, most } in SHARES {
        rest_pages -= push(kind, (free_pages / divisor).min(most));
    }
    rest_pages -= push(AreaKind::Cold, (rest_pages / 2).min(most_cold));
    push(AreaKind::Untouched, rest_pages);
}
