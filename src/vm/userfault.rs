// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory that a userfaultfd is registered for: a page it lacks looks like a hole, and is one that its handler will fill.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::ops::Range;
#[cfg(feature = "snapshot")]
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{CWD, Dir, Mode, OFlags, fstat, major, minor, openat, readlinkat};
use thiserror::Error;
use vm_memory::{Address, FileOffset, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use super::backing::Backing;
#[cfg(feature = "snapshot")]
use crate::error::Chain;
use crate::range::GpaRange;

/// Why guest memory cannot be told from what a userfaultfd has yet to fill.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum UserfaultError {
    /// The kernel does not say what is registered.
    #[error("Cannot read /proc/self/smaps to look for userfaultfds")]
    Smaps(#[source] io::Error),
    /// The VM's own mapping is not registered, so what is read through it is zeros where pages are missing.
    #[error(
        "Memory {range} has pages that only another mapping of its file brings in: a userfaultfd is registered there"
    )]
    OtherMapping {
        /// The memory.
        range: GpaRange,
    },
    /// Holes were looked for where pages were missing.
    #[error("A userfaultfd was registered for memory {range} while its holes were looked for")]
    Late {
        /// The memory.
        range: GpaRange,
    },
}

/// The memory whose holes are looked for in a migration, none of which may be registered while that goes on.
#[derive(Debug, Default)]
pub(crate) struct HoleWatch {
    /// Sorted, disjoint.
    ranges: Vec<GpaRange>,
    /// Bytes of holes found when it was last looked.
    hole_bytes: u64,
    /// How often RAM had been plugged in by then.
    plugs: u64,
    /// The kernel does not say what is registered, which is known by now.
    is_blind: bool,
}

impl HoleWatch {
    /// Takes what is registered now out of `backing`, which is of `memory`, and watches over the rest.
    ///
    /// # Errors
    /// It cannot be told what is registered, or `memory` cannot be read as it is. Then no hole of it may be left out.
    pub(crate) fn begin<M: GuestMemoryBackend>(
        memory: &M,
        backing: Backing,
    ) -> Result<(Self, Backing), UserfaultError> {
        // What has no hole holds all it will be read as, whoever fills holes.
        let registered = if backing.is_without_hole(memory) { Vec::new() } else { registered(memory)? };
        let backing = backing.without(&registered);
        Ok((Self { ranges: backing.ranges().collect(), ..Self::default() }, backing))
    }

    /// Watches where it cannot be told what is registered, and no hole is left out.
    pub(crate) fn blind() -> Self {
        Self { is_blind: true, ..Self::default() }
    }

    /// Looks again when more holes were found, `hole_bytes` in all, or RAM was plugged in, for the `plugs`th time, since it was last
    /// looked. Returns an error, once, where the RAM plugged in cannot be looked at: what it reads as is taken for its contents.
    ///
    /// Looks only where this process holds a userfaultfd: one that was registered since and given away is not seen.
    ///
    /// # Errors
    /// Memory among whose holes they may be is registered now, or new memory cannot be read as it is, or it cannot be told whether the
    /// holes found since are some.
    pub(crate) fn check<M: GuestMemoryBackend>(
        &mut self,
        memory: &M,
        hole_bytes: u64,
        plugs: u64,
    ) -> Result<Option<UserfaultError>, UserfaultError> {
        let look = || if is_held() { registered(memory) } else { Ok(Vec::new()) };
        self.check_by(hole_bytes, plugs, look)
    }

    /// Checks by what `look` finds registered.
    fn check_by(
        &mut self,
        hole_bytes: u64,
        plugs: u64,
        look: impl FnOnce() -> Result<Vec<GpaRange>, UserfaultError>,
    ) -> Result<Option<UserfaultError>, UserfaultError> {
        let more_holes = std::mem::replace(&mut self.hole_bytes, hole_bytes) != hole_bytes;
        let new_ram = std::mem::replace(&mut self.plugs, plugs) != plugs;
        if !more_holes && (!new_ram || self.is_blind) {
            return Ok(None);
        }
        let registered = match look() {
            Err(unknown @ UserfaultError::Smaps(_)) if !more_holes => {
                self.is_blind = true;
                return Ok(Some(unknown));
            }
            looked => looked?,
        };
        let mut late = registered
            .into_iter()
            .filter_map(|part| self.ranges.iter().find_map(|range| range.intersection(part)));
        late.next().map_or(Ok(None), |range| Err(UserfaultError::Late { range }))
    }
}

/// Makes sure once, for a reader of many chunks, that what is read is what memory holds.
#[cfg(feature = "snapshot")]
#[derive(Debug, Default)]
pub(crate) struct ReadableCheck {
    is_done: AtomicBool,
}

#[cfg(feature = "snapshot")]
impl ReadableCheck {
    /// Looks at `memory`, unless it was found readable before.
    ///
    /// # Errors
    /// As [`check_readable`]. The next call looks again.
    pub(crate) fn check<M: GuestMemoryBackend>(&self, memory: &M) -> Result<(), UserfaultError> {
        self.check_by(|| check_readable(memory))
    }

    fn check_by(&self, look: impl FnOnce() -> Result<(), UserfaultError>) -> Result<(), UserfaultError> {
        if !self.is_done.load(Ordering::Relaxed) {
            look()?;
            self.is_done.store(true, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// Makes sure that what is read of `memory` is what it holds, and not zeros in the place of pages that another mapping of its file
/// would bring in.
///
/// Looks only where this process holds a userfaultfd: one that was registered and given away is not seen. Where it cannot be told
/// what is registered, a warning in the log says so.
///
/// # Errors
/// A part of `memory` is registered through another mapping of its file only.
#[cfg(feature = "snapshot")]
fn check_readable<M: GuestMemoryBackend>(memory: &M) -> Result<(), UserfaultError> {
    let told = if is_held() { registered(memory).map(drop) } else { Ok(()) };
    told.or_else(|error| match error {
        UserfaultError::Smaps(_) => {
            log::warn!("{}; memory is taken for what it reads as", Chain(&error));
            Ok(())
        }
        unreadable => Err(unreadable),
    })
}

/// Whether this process holds a userfaultfd open, or it cannot be told.
///
/// Asks the kernel, not the C library: the system calls that reading a folder takes there differ from version to version, and
/// [`crate::syscalls`] lists them.
fn is_held() -> bool {
    let folder = openat(CWD, c"/proc/self/fd", OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    let Ok(mut files) = folder.and_then(Dir::new) else { return true };
    while let Some(file) = files.read() {
        let Ok(file) = file else { return true };
        let link = files.fd().and_then(|fd| readlinkat(fd, file.file_name(), Vec::new()));
        if link.is_ok_and(|link| link.as_c_str() == c"anon_inode:[userfaultfd]") {
            return true;
        }
    }
    false
}

/// Returns the parts of `memory` that a userfaultfd is registered for, in any mode: sorted, disjoint, coalesced.
///
/// Memory that is read from its file and has no host address is registered nowhere. Memory that has neither file nor address counts as
/// registered where anything is. What is registered in another process is not seen.
///
/// Reads `/proc/self/smaps` once, for which the kernel walks the page tables: 25 to 45 ms per GiB in pages of 4 KiB, next to
/// nothing in huge pages.
///
/// # Errors
/// That file cannot be read, or a part of `memory` is registered through another mapping of the same file only.
fn registered<M: GuestMemoryBackend>(memory: &M) -> Result<Vec<GpaRange>, UserfaultError> {
    let smaps = File::open("/proc/self/smaps").map_err(UserfaultError::Smaps)?;
    let mappings = registered_mappings(BufReader::new(smaps)).map_err(UserfaultError::Smaps)?;
    registered_parts(memory, &mappings)
}

/// A mapping of this process that a userfaultfd is registered for.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Mapping {
    hva: Range<u64>,
    /// The file whose pages it shares, and where in it the mapping begins.
    shared: Option<(FileId, u64)>,
}

/// A file, whatever name it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct FileId {
    major: u32,
    minor: u32,
    inode: u64,
}

impl FileId {
    fn of(file: &File) -> io::Result<Self> {
        let stat = fstat(file)?;
        Ok(Self { major: major(stat.st_dev), minor: minor(stat.st_dev), inode: stat.st_ino })
    }
}

/// Reads the registered mappings out of the text of `/proc/PID/smaps`.
fn registered_mappings(mut smaps: impl BufRead) -> io::Result<Vec<Mapping>> {
    let mut mappings = Vec::new();
    let mut mapping = None;
    let mut line = Vec::new();
    while smaps.read_until(b'\n', &mut line)? > 0 {
        let text = String::from_utf8_lossy(&line);
        match text.strip_prefix("VmFlags:") {
            Some(flags) if is_registered(flags) => mappings.extend(mapping.take()),
            Some(_) => mapping = None,
            None => mapping = parse_mapping(&text).or(mapping),
        }
        line.clear();
    }
    Ok(mappings)
}

/// Whether a mapping with these flags is registered: for missing pages, for writes, or for minor faults.
fn is_registered(flags: &str) -> bool {
    flags.split_ascii_whitespace().any(|flag| ["um", "uw", "ui"].contains(&flag))
}

/// Parses the line that a mapping begins with: `7f12a000-7f12b000 rw-s 00001000 00:01 4711 /memfd:ram`; `None` for any other.
fn parse_mapping(line: &str) -> Option<Mapping> {
    let number = |text| u64::from_str_radix(text, 16).ok();
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let hva = number(start)?..number(end)?;
    let is_shared = words.next()?.ends_with('s');
    let offset = number(words.next()?)?;
    let (major, minor) = words.next()?.split_once(':')?;
    let (major, minor) = (u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?);
    let inode = words.next()?.parse().ok()?;
    let shared = is_shared.then_some((FileId { major, minor, inode }, offset));
    Some(Mapping { hva, shared })
}

fn registered_parts<M: GuestMemoryBackend>(
    memory: &M,
    mappings: &[Mapping],
) -> Result<Vec<GpaRange>, UserfaultError> {
    let mut parts = Vec::new();
    if mappings.is_empty() {
        return Ok(parts);
    }
    for region in memory.iter() {
        let Ok(gpa) = GpaRange::new(region.start_addr().raw_value(), region.len()) else { continue };
        match region.get_host_address(MemoryRegionAddress(0)) {
            Ok(hva) => parts.extend(mappings.iter().filter_map(|mapping| at(gpa, hva as u64, &mapping.hva))),
            Err(_) if region.file_offset().is_some() => {}
            Err(_) => parts.push(gpa),
        }
    }
    let parts = coalesced(parts);
    for region in memory.iter() {
        if let Some(range) = elsewhere(region, mappings).find(|&range| !is_covered(range, &parts)) {
            return Err(UserfaultError::OtherMapping { range });
        }
    }
    Ok(parts)
}

/// Returns the part of the region `gpa`, whose first byte is at `base`, that lies within `wanted`: both of one address space.
fn at(gpa: GpaRange, base: u64, wanted: &Range<u64>) -> Option<GpaRange> {
    let inside = |address: u64| address.saturating_sub(base).min(gpa.len());
    GpaRange::from_bounds(gpa.start() + inside(wanted.start), gpa.start() + inside(wanted.end)).ok()
}

/// Returns the parts of a region whose file's pages are registered in a mapping of this process.
fn elsewhere<R: GuestMemoryRegion>(region: &R, mappings: &[Mapping]) -> impl Iterator<Item = GpaRange> {
    let gpa = GpaRange::new(region.start_addr().raw_value(), region.len()).ok();
    let file =
        region.file_offset().and_then(|file| Some((FileId::of(file.file()).ok()?, FileOffset::start(file))));
    gpa.zip(file).into_iter().flat_map(move |(gpa, (id, base))| {
        mappings.iter().filter_map(move |mapping| {
            let (_, offset) = mapping.shared.filter(|(file, _)| *file == id)?;
            at(gpa, base, &(offset..offset + (mapping.hva.end - mapping.hva.start)))
        })
    })
}

/// Sorts ranges and joins those that touch or overlap.
fn coalesced(mut ranges: Vec<GpaRange>) -> Vec<GpaRange> {
    ranges.sort_unstable();
    ranges.dedup_by(|next, last| {
        let touches = next.start() <= last.end();
        if touches {
            let end = last.end().max(next.end());
            *last = GpaRange::from_bounds(last.start(), end).expect("it grows");
        }
        touches
    });
    ranges
}

fn is_covered(range: GpaRange, by: &[GpaRange]) -> bool {
    by.iter().any(|part| part.covers(range))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::Arc;

    use proptest::prelude::*;
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    use super::*;

    const SMAPS: &str = "\
5581a000-5581b000 r-xp 00000000 fe:00 10010770                   /usr/bin/a-vmm
Size:                  4 kB
VmFlags: rd ex mr mw me sd
7f0000000000-7f0000100000 rw-s 00200000 00:01 4711               /memfd:guest-ram (deleted)
Size:               1024 kB
ProtectionKey:         0
VmFlags: rd wr sh mr mw me ms um
7f0000100000-7f0000200000 rw-p 00000000 00:00 0
VmFlags: rd wr mr mw me ac uw
7f0000200000-7f0000300000 rw-p 00000000 00:00 0
VmFlags: rd wr mr mw me ac
7f0000300000-7f0000400000 rw-p 00000000 00:01 4712 /memfd:um
VmFlags: rd wr mr mw me ac ui
";

    #[test]
    fn c49_registered_mappings_are_told_by_their_flags_in_all_three_modes() {
        let found = registered_mappings(SMAPS.as_bytes()).unwrap();
        let file = FileId { major: 0, minor: 1, inode: 4711 };
        let mapping = |start: u64, shared| Mapping { hva: start..start + (1 << 20), shared };
        let expected = [
            mapping(0x7f00_0000_0000, Some((file, 0x20_0000))),
            mapping(0x7f00_0010_0000, None),
            mapping(0x7f00_0030_0000, None),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn what_this_kernel_says_of_a_shared_memfd_names_the_same_file_as_its_descriptor() {
        let file = rustix::fs::memfd_create("guest-ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = Arc::new(File::from(file));
        file.set_len(1 << 20).unwrap();
        let offset = FileOffset::from_arc(Arc::clone(&file), 1 << 16);
        let memory = memory(Some(offset), 1 << 16);
        let hva = memory.get_host_address(GuestAddress(BASE)).unwrap() as u64;
        let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
        let mappings: Vec<_> = smaps.lines().filter_map(parse_mapping).collect();
        let own = mappings.iter().find(|mapping| mapping.hva.contains(&hva)).unwrap();
        assert_eq!(own.shared, Some((FileId::of(&file).unwrap(), 1 << 16)));
    }

    const BASE: u64 = 1 << 32;

    fn unreadable() -> UserfaultError {
        UserfaultError::Smaps(io::Error::from_raw_os_error(libc::EACCES))
    }

    #[test]
    fn what_is_registered_is_looked_up_once_for_each_plug_and_not_in_every_round_after_it() {
        let mut watch = HoleWatch::default();
        let mut looks = 0;
        for plugs in [0, 1, 1, 1, 2, 2] {
            let look = || {
                looks += 1;
                Ok(Vec::new())
            };
            assert!(watch.check_by(0, plugs, look).unwrap().is_none());
        }
        assert_eq!(looks, 2);
    }

    #[test]
    fn c49_what_cannot_be_told_of_ram_plugged_in_is_a_degradation_once_and_of_holes_left_out_an_error() {
        let mut watch = HoleWatch::default();
        let mut check = |holes, plugs| watch.check_by(holes, plugs, || Err(unreadable()));
        assert!(matches!(check(0, 1), Ok(Some(UserfaultError::Smaps(_)))));
        assert!(matches!(check(0, 2), Ok(None)));
        assert!(matches!(check(4096, 2), Err(UserfaultError::Smaps(_))));
        let look =
            || -> Result<Vec<GpaRange>, UserfaultError> { panic!("it is known that nothing can be told") };
        assert!(matches!(HoleWatch::blind().check_by(0, 1, look), Ok(None)));
    }

    #[cfg(feature = "snapshot")]
    #[test]
    fn memory_is_looked_at_until_it_was_found_readable_and_not_for_every_chunk() {
        let check = ReadableCheck::default();
        assert!(check.check_by(|| Err(unreadable())).is_err());
        check.check_by(|| Ok(())).unwrap();
        check.check_by(|| panic!("it was looked at")).unwrap();
    }

    fn memory(file: Option<FileOffset>, bytes: usize) -> GuestMemoryMmap<()> {
        GuestMemoryMmap::from_ranges_with_files([(GuestAddress(BASE), bytes, file)]).unwrap()
    }

    fn gpa(start: u64, end: u64) -> GpaRange {
        GpaRange::from_bounds(BASE + start, BASE + end).unwrap()
    }

    #[test]
    fn parts_of_a_region_are_found_where_it_is_mapped_and_joined() {
        let memory = memory(None, 0x8000);
        let hva = memory.get_host_address(GuestAddress(BASE)).unwrap() as u64;
        let mapping = |start: u64, end: u64| Mapping { hva: start..end, shared: None };
        let mappings = [
            mapping(hva + 0x6000, hva + 0x9000),
            mapping(hva - 0x1000, hva + 0x1000),
            mapping(hva + 0x1000, hva + 0x2000),
            mapping(hva + 0x8000, hva + 0x9000),
            mapping(0x1000, 0x2000),
        ];
        assert_eq!(registered_parts(&memory, &mappings).unwrap(), [gpa(0, 0x2000), gpa(0x6000, 0x8000)]);
    }

    #[test]
    fn c49_a_file_that_is_registered_only_where_another_mapping_of_it_lies_is_refused() {
        let file = rustix::fs::memfd_create("guest-ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = Arc::new(File::from(file));
        file.set_len(1 << 20).unwrap();
        let memory = memory(Some(FileOffset::from_arc(Arc::clone(&file), 0x4000)), 0x4000);
        let hva = memory.get_host_address(GuestAddress(BASE)).unwrap() as u64;
        let shared = |offset| Some((FileId::of(&file).unwrap(), offset));
        let other = Mapping { hva: 0x10000..0x12000, shared: shared(0x6000) };
        let refused = registered_parts(&memory, std::slice::from_ref(&other)).unwrap_err();
        assert!(matches!(refused, UserfaultError::OtherMapping { range } if range == gpa(0x2000, 0x4000)));

        // Not where the VM's own mapping is registered too, nor where the other one is of other pages.
        let own = Mapping { hva: hva..hva + 0x4000, shared: shared(0x4000) };
        assert_eq!(registered_parts(&memory, &[other, own]).unwrap(), [gpa(0, 0x4000)]);
        let apart = Mapping { hva: 0x10000..0x14000, shared: shared(0) };
        assert_eq!(registered_parts(&memory, &[apart]).unwrap(), []);
    }

    proptest! {
        #[test]
        fn coalesced_ranges_hold_the_same_bytes(ranges in prop::collection::vec((0..64_u64, 1..16_u64), 0..12)) {
            let ranges: Vec<_> = ranges.into_iter().map(|(start, len)| GpaRange::new(start, len).unwrap()).collect();
            let joined = coalesced(ranges.clone());
            for byte in 0..100 {
                let holds = |ranges: &[GpaRange]| ranges.iter().any(|range| range.contains(byte));
                prop_assert_eq!(holds(&joined), holds(&ranges));
            }
            prop_assert!(joined.windows(2).all(|pair| pair[0].end() < pair[1].start()));
        }
    }
}
