// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Comparing the RAM of two machines page by page, straight from their memfds.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use crate::vmm::{Memory, PAGE_BYTES, PAGE_LEN, RegionBacking};

/// The parts of a region to compare: all of it; in a sparse layout where either side holds data, for the rest reads zero on both.
fn pieces(first: &RegionBacking, second: &RegionBacking, sparse: bool) -> io::Result<Vec<Range<u64>>> {
    let mut held = match sparse {
        true => [data(first)?, data(second)?].concat(),
        false => std::iter::once(0..first.len).collect(),
    };
    held.sort_unstable_by_key(|piece| piece.start);
    let mut pieces: Vec<Range<u64>> = Vec::new();
    for piece in held {
        match pieces.last_mut() {
            Some(last) if piece.start <= last.end => last.end = last.end.max(piece.end),
            _ => pieces.push(piece),
        }
    }
    Ok(pieces)
}

/// Where a region's file holds data, in whole pages.
fn data(region: &RegionBacking) -> io::Result<Vec<Range<u64>>> {
    let (mut data, mut at) = (Vec::new(), 0);
    while at < region.len {
        let start = match seek(&*region.file, SeekFrom::Data(region.offset + at)) {
            Ok(start) => start - region.offset,
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = seek(&*region.file, SeekFrom::Hole(region.offset + start))? - region.offset;
        at = end.next_multiple_of(PAGE_BYTES).min(region.len);
        data.push(start / PAGE_BYTES * PAGE_BYTES..at);
    }
    Ok(data)
}

/// What a comparison of two machines' RAM found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Comparison {
    /// Pages compared.
    pub pages: u64,
    /// Addresses of the pages that differ, ascending; no more than [`MAX_WRONG`] of them.
    pub wrong: Vec<u64>,
    /// Pages that differ.
    pub wrong_pages: u64,
    /// BLAKE3 of the first machine's RAM; of a sparse layout's, of each page that is not zero behind its address.
    pub first_digest: String,
    /// BLAKE3 of the second machine's RAM.
    pub second_digest: String,
}

/// Addresses a comparison names at the most.
pub const MAX_WRONG: usize = 16;

/// Pages read at a time.
const BLOCK_PAGES: usize = 256;

/// Compares the RAM of two machines of the same layout, which both stand still.
///
/// # Errors
/// A memfd cannot be read.
pub fn compare(first: &Memory, second: &Memory) -> io::Result<Comparison> {
    assert_eq!(first.layout(), second.layout(), "machines of one layout");
    let mut found = Comparison {
        pages: 0,
        wrong: Vec::new(),
        wrong_pages: 0,
        first_digest: String::new(),
        second_digest: String::new(),
    };
    let (mut first_hash, mut second_hash) = (blake3::Hasher::new(), blake3::Hasher::new());
    let (mut a, mut b) = (vec![0; BLOCK_PAGES * PAGE_LEN], vec![0; BLOCK_PAGES * PAGE_LEN]);
    let sparse = first.layout().is_sparse();
    let hash = if sparse { hash_nonzero } else { hash_all };
    for (left, right) in first.regions().iter().zip(second.regions()) {
        found.pages += left.len / PAGE_BYTES;
        for Range { start: mut offset, end } in pieces(left, right, sparse)? {
            while offset < end {
                let bytes = usize::try_from(end - offset).unwrap_or(usize::MAX).min(a.len());
                read(left, offset, &mut a[..bytes])?;
                read(right, offset, &mut b[..bytes])?;
                hash(&mut first_hash, left.gpa + offset, &a[..bytes]);
                hash(&mut second_hash, left.gpa + offset, &b[..bytes]);
                found.note(left.gpa + offset, &a[..bytes], &b[..bytes]);
                offset += bytes as u64;
            }
        }
    }
    found.first_digest = first_hash.finalize().to_hex().to_string();
    found.second_digest = second_hash.finalize().to_hex().to_string();
    Ok(found)
}

impl Comparison {
    fn note(&mut self, gpa: u64, a: &[u8], b: &[u8]) {
        if a == b {
            return;
        }
        let pages = a.chunks(PAGE_LEN).zip(b.chunks(PAGE_LEN)).enumerate();
        for (page, _) in pages.filter(|(_, (x, y))| x != y) {
            self.wrong_pages += 1;
            if self.wrong.len() < MAX_WRONG {
                self.wrong.push(gpa + (page * PAGE_LEN) as u64);
            }
        }
    }
}

fn hash_all(hash: &mut blake3::Hasher, _gpa: u64, bytes: &[u8]) {
    hash.update(bytes);
}

fn hash_nonzero(hash: &mut blake3::Hasher, gpa: u64, bytes: &[u8]) {
    for (page, gpa) in bytes.chunks(PAGE_LEN).zip((gpa..).step_by(PAGE_LEN)) {
        if page.iter().any(|&byte| byte != 0) {
            hash.update(&gpa.to_le_bytes()).update(page);
        }
    }
}

fn read(region: &RegionBacking, offset: u64, into: &mut [u8]) -> io::Result<()> {
    let file: &File = &region.file;
    file.read_exact_at(into, region.offset + offset)
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::vmm::{MIN_RAM_BYTES, RamLayout, Split};

    #[test]
    fn one_flipped_bit_is_found_and_named() {
        let layout = RamLayout::new(MIN_RAM_BYTES, Split::default()).unwrap();
        let (first, second) = (Memory::create(&layout).unwrap(), Memory::create(&layout).unwrap());
        let gpa = layout.regions()[1].start + 0x5123;
        for memory in [&first, &second] {
            memory.guest().write_obj(0x77u8, GuestAddress(0x9000)).unwrap();
        }
        let same = compare(&first, &second).unwrap();
        assert_eq!((same.pages, same.wrong_pages), (MIN_RAM_BYTES >> 12, 0));
        assert_eq!(same.first_digest, same.second_digest);
        second.guest().write_obj(1u8, GuestAddress(gpa)).unwrap();
        let differ = compare(&first, &second).unwrap();
        assert_eq!((differ.wrong, differ.wrong_pages), (vec![gpa & !0xfff], 1));
        assert_ne!(differ.first_digest, differ.second_digest);
    }

    #[test]
    fn a_sparse_layout_is_compared_where_either_side_holds_data() {
        let layout = RamLayout::sparse(4 << 40, Split::default()).unwrap();
        let (first, second) = (Memory::create(&layout).unwrap(), Memory::create(&layout).unwrap());
        let last = layout.regions()[1].end - PAGE_BYTES;
        for memory in [&first, &second] {
            memory.guest().write_obj(0x77u8, GuestAddress(0x9000)).unwrap();
        }
        second.guest().write_obj(0u8, GuestAddress(0xb000)).unwrap();
        let same = compare(&first, &second).unwrap();
        assert_eq!((same.pages, same.wrong_pages), ((4 << 40) / PAGE_BYTES, 0));
        assert_eq!(same.first_digest, same.second_digest, "a page of zeros is as good as none");
        second.guest().write_obj(1u8, GuestAddress(last)).unwrap();
        let differ = compare(&first, &second).unwrap();
        assert_eq!((differ.wrong, differ.wrong_pages), (vec![last], 1));
        assert_ne!(differ.first_digest, differ.second_digest);
    }
}
