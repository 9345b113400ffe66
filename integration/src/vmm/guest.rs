// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the guest is made of: its code, its page tables, its stamps, and what it tells about its progress.

use std::ops::Range;
use std::sync::atomic::Ordering;

use vfio_migration::source::SummaryBitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::map::{AreaKind, CODE_GPA, Map, PD_GPA, PDPT_GPA, PML4_GPA, PROGRESS_GPA, WALK_GPA};
use super::memory::{MAX_RAM_BYTES, Memory, PAGE_BYTES, PAGE_LEN};

/// The guest reads from here how many pages it may stamp.
pub(super) const PORT_GRANT: u16 = 0x600;
/// The guest writes the number of a wrong page here.
pub(super) const PORT_WRONG_PAGE: u16 = 0x604;

/// Multiplies the pass in a check word.
pub(super) const CHECK_PASS_FACTOR: u64 = 0x9E37_79B9_7F4A_7C15;
/// Multiplies the page number in a check word.
pub(super) const CHECK_PAGE_FACTOR: u64 = 0xC2B2_AE3D_27D4_EB4F;

/// Where in a page the check word stands: at the far end, so that half a page is noticed as well.
const CHECK_OFFSET: u64 = PAGE_BYTES - 8;

const PROGRESS_PASSES: u64 = 0;
const PROGRESS_PAGES: u64 = 8;
const PROGRESS_WRONG: u64 = 16;
const PROGRESS_LAST_WRONG: u64 = 24;

/// Present, writable, and accessed and dirty from the start, so that the page walker has nothing to write.
const ENTRY_FLAGS: u64 = 1 | 1 << 1 | 1 << 5 | 1 << 6;
/// In an entry of the third level: maps 2 MiB.
const ENTRY_LARGE: u64 = 1 << 7;

type Ram = GuestMemoryMmap<SummaryBitmap>;

/// Returns the check word of a page that was stamped on `pass`.
pub(super) fn stamp_check(pass: u64, page_number: u64, seed: u64) -> u64 {
    pass.wrapping_mul(CHECK_PASS_FACTOR) ^ page_number.wrapping_mul(CHECK_PAGE_FACTOR) ^ seed
}

/// Writes the stamp of `pass` into the page at `gpa`, as the guest code does.
pub(super) fn write_stamp(ram: &Ram, gpa: u64, pass: u64, seed: u64) -> Result<(), GuestMemoryError> {
    let page_number = gpa / PAGE_BYTES;
    ram.write_obj([pass, page_number], GuestAddress(gpa))?;
    ram.write_obj(stamp_check(pass, page_number, seed), GuestAddress(gpa + CHECK_OFFSET))
}

/// Tells whether the page at `gpa` carries the stamp of `pass`.
pub(super) fn carries_stamp(ram: &Ram, gpa: u64, pass: u64, seed: u64) -> Result<bool, GuestMemoryError> {
    let page_number = gpa / PAGE_BYTES;
    let head: [u64; 2] = ram.read_obj(GuestAddress(gpa))?;
    let check: u64 = ram.read_obj(GuestAddress(gpa + CHECK_OFFSET))?;
    Ok(head == [pass, page_number] && check == stamp_check(pass, page_number, seed))
}

/// The content of a cold page: pseudo-random, a function of the seed and the page number alone.
pub(super) fn cold_page(seed: u64, page_number: u64) -> [u8; PAGE_LEN] {
    let mut state = stamp_check(1, page_number, seed) | 1;
    let mut page = [0; PAGE_LEN];
    for word in page.as_chunks_mut::<8>().0 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *word = state.to_le_bytes();
    }
    page
}

/// Puts everything into zeroed RAM that the guest needs before its first instruction: its code, an identity map,
/// the walk table, the stamps of pass 0, and the cold content. RAM that no page tables can map gets none.
pub(super) fn write_image(memory: &Memory, map: &Map, seed: u64) -> Result<(), GuestMemoryError> {
    let ram = memory.guest();
    ram.write_slice(payload::code(), GuestAddress(CODE_GPA))?;
    if memory.layout().total_bytes() <= MAX_RAM_BYTES {
        write_page_tables(ram, memory.layout().regions())?;
    }
    let walk = map.guest_walk();
    write_walk(ram, &walk)?;
    for gpa in walk.into_iter().flat_map(pages) {
        write_stamp(ram, gpa, 0, seed)?;
    }
    for gpa in map.ranges(AreaKind::Cold).flat_map(pages) {
        ram.write_slice(&cold_page(seed, gpa / PAGE_BYTES), GuestAddress(gpa))?;
    }
    Ok(())
}

/// The first addresses of the pages of `range`.
pub(super) fn pages(range: Range<u64>) -> impl Iterator<Item = u64> {
    range.step_by(PAGE_LEN)
}

/// Maps RAM one to one with 2 MiB pages. A tail shorter than that is mapped with what follows it, which is no RAM.
fn write_page_tables(ram: &Ram, regions: &[Range<u64>]) -> Result<(), GuestMemoryError> {
    ram.write_obj(PDPT_GPA | ENTRY_FLAGS, GuestAddress(PML4_GPA))?;
    for region in regions {
        for gpa in region.clone().step_by(2 << 20) {
            let directory = PD_GPA + (gpa >> 30) * PAGE_BYTES;
            ram.write_obj(directory | ENTRY_FLAGS, GuestAddress(PDPT_GPA + (gpa >> 30) * 8))?;
            let entry = directory + (gpa >> 21) % 512 * 8;
            ram.write_obj(gpa | ENTRY_FLAGS | ENTRY_LARGE, GuestAddress(entry))?;
        }
    }
    Ok(())
}

fn write_walk(ram: &Ram, walk: &[Range<u64>]) -> Result<(), GuestMemoryError> {
    ram.write_obj(walk.len() as u64, GuestAddress(WALK_GPA))?;
    for (range, gpa) in walk.iter().zip((WALK_GPA + 8..).step_by(16)) {
        ram.write_obj([range.start, range.end], GuestAddress(gpa))?;
    }
    Ok(())
}

/// What the guest has written into its progress page. It lies in guest memory, so it moves with the guest.
pub(super) struct Progress<'a>(pub(super) &'a Ram);

impl Progress<'_> {
    pub(super) fn passes(&self) -> Result<u64, GuestMemoryError> {
        self.load(PROGRESS_PASSES)
    }

    pub(super) fn pages(&self) -> Result<u64, GuestMemoryError> {
        self.load(PROGRESS_PAGES)
    }

    pub(super) fn wrong_pages(&self) -> Result<u64, GuestMemoryError> {
        self.load(PROGRESS_WRONG)
    }

    pub(super) fn complete_pass(&self, pass: u64) -> Result<(), GuestMemoryError> {
        self.store(PROGRESS_PASSES, pass)
    }

    pub(super) fn count_page(&self) -> Result<(), GuestMemoryError> {
        self.store(PROGRESS_PAGES, self.pages()? + 1)
    }

    pub(super) fn report_wrong(&self, gpa: u64) -> Result<(), GuestMemoryError> {
        self.store(PROGRESS_WRONG, self.wrong_pages()? + 1)?;
        self.store(PROGRESS_LAST_WRONG, gpa)
    }

    fn load(&self, offset: u64) -> Result<u64, GuestMemoryError> {
        self.0.load(GuestAddress(PROGRESS_GPA + offset), Ordering::Relaxed)
    }

    fn store(&self, offset: u64, value: u64) -> Result<(), GuestMemoryError> {
        self.0.store(value, GuestAddress(PROGRESS_GPA + offset), Ordering::Relaxed)
    }
}

/// The guest's machine code, assembled together with this program and kept in its read-only data.
mod payload {
    #![expect(unsafe_code, reason = "the assembled bytes are reached through two linker symbols")]

    use super::{
        CHECK_OFFSET, PORT_GRANT, PORT_WRONG_PAGE, PROGRESS_LAST_WRONG, PROGRESS_PAGES, PROGRESS_PASSES,
        PROGRESS_WRONG,
    };

    std::arch::global_asm!(
        ".pushsection .rodata.vfio_migration_guest_payload, \"a\", @progbits",
        ".globl vfio_migration_guest_payload_start, vfio_migration_guest_payload_end",
        "vfio_migration_guest_payload_start:",
        include_str!("../../../resources/guest/payload.S"),
        "vfio_migration_guest_payload_end:",
        ".popsection",
        port_grant = const PORT_GRANT,
        port_wrong_page = const PORT_WRONG_PAGE,
        check_offset = const CHECK_OFFSET,
        progress_passes = const PROGRESS_PASSES,
        progress_pages = const PROGRESS_PAGES,
        progress_wrong = const PROGRESS_WRONG,
        progress_last_wrong = const PROGRESS_LAST_WRONG,
    );

    // SAFETY: The assembly above defines both symbols, in read-only data, and nothing else does.
    unsafe extern "C" {
        static vfio_migration_guest_payload_start: u8;
        static vfio_migration_guest_payload_end: u8;
    }

    /// Returns the code. It runs at any address.
    pub(super) fn code() -> &'static [u8] {
        let start = &raw const vfio_migration_guest_payload_start;
        let end = &raw const vfio_migration_guest_payload_end;
        // SAFETY: The two symbols mark the ends of one unbroken run of initialised, immutable bytes.
        unsafe { std::slice::from_raw_parts(start, end as usize - start as usize) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_payload_fits_between_its_address_and_the_page_tables() {
        let len = payload::code().len() as u64;
        assert!(len > 64, "{len} bytes assembled");
        assert!(CODE_GPA + len <= PML4_GPA);
    }

    #[test]
    fn the_payload_starts_by_counting_the_pass() {
        // inc r12; mov rdi, [rbx]
        assert_eq!(payload::code()[..6], [0x49, 0xff, 0xc4, 0x48, 0x8b, 0x3b]);
    }

    #[test]
    fn a_check_word_differs_between_passes_pages_and_seeds() {
        let base = stamp_check(7, 300, 1);
        assert_ne!(base, stamp_check(8, 300, 1));
        assert_ne!(base, stamp_check(7, 301, 1));
        assert_ne!(base, stamp_check(7, 300, 2));
    }

    #[test]
    fn cold_pages_are_reproducible_and_distinct() {
        assert_eq!(cold_page(5, 9), cold_page(5, 9));
        assert_ne!(cold_page(5, 9), cold_page(5, 10));
        assert_ne!(cold_page(5, 9), cold_page(6, 9));
    }
}
