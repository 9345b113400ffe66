// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the device was given of the guest's memory, and its access by message to what it cannot map.

use std::collections::BTreeMap;
use std::fmt;

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use zerocopy::IntoBytes;

use super::message::{DmaAccess, VfioUserCommand};
use crate::range::IovaRange;

/// Describes memory given to the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DmaRegion {
    /// Where the device sees it.
    pub iova: IovaRange,
    /// Where it begins in its file.
    pub file_offset: u64,
    /// Whether the device may write it.
    pub writeable: bool,
}

/// The mapped ranges, none of which overlap, by their first IOVA.
#[derive(Debug, Default)]
pub(super) struct Mappings {
    ranges: BTreeMap<u64, Mapped>,
    writeable_by_itself: Vec<IovaRange>,
}

#[derive(Debug)]
struct Mapped {
    iova: IovaRange,
    writeable: bool,
}

impl Mappings {
    /// Returns a mapped range that shares IOVAs with `iova`.
    pub(super) fn overlap(&self, iova: IovaRange) -> Option<IovaRange> {
        let (_, last) = self.ranges.range(..iova.end()).next_back()?;
        (last.iova.end() > iova.start()).then_some(last.iova)
    }

    /// Adds a range; `shared` is one that the device can reach by itself.
    pub(super) fn insert(&mut self, region: &DmaRegion, shared: bool) {
        let DmaRegion { iova, writeable, .. } = *region;
        self.ranges.insert(iova.start(), Mapped { iova, writeable });
        if writeable && shared {
            self.writeable_by_itself.push(iova);
        }
    }

    pub(super) fn remove(&mut self, iova: IovaRange) {
        self.ranges.retain(|_, mapped| mapped.iova != iova);
        self.writeable_by_itself.retain(|range| *range != iova);
    }

    /// Returns what the device can write to with no message: each range as it was mapped, in no order.
    pub(super) fn writeable_by_itself(&self) -> &[IovaRange] {
        &self.writeable_by_itself
    }

    /// Checks that every byte of `iova` is mapped, and writeable where it is to be written.
    fn allow(&self, iova: IovaRange, write: bool) -> Result<(), i32> {
        let mut at = iova.start();
        while at < iova.end() {
            let below = self.ranges.range(..=at).next_back().map(|(_, mapped)| mapped);
            let mapped = below.filter(|mapped| mapped.iova.contains(at)).ok_or(libc::EFAULT)?;
            if write && !mapped.writeable {
                return Err(libc::EPERM);
            }
            at = mapped.iova.end();
        }
        Ok(())
    }
}

/// One transfer between a buffer and guest memory.
enum Transfer<'a> {
    Read(&'a mut [u8]),
    Write(&'a [u8]),
}

type GuestMemoryAccess = dyn FnMut(u64, Transfer<'_>) -> Result<(), vm_memory::GuestMemoryError> + Send;

/// Serves DMA_READ and DMA_WRITE from the mapped ranges.
pub(super) struct DmaServer {
    pub(super) mappings: Mappings,
    max_bytes: usize,
    access: Option<Box<GuestMemoryAccess>>,
}

impl fmt::Debug for DmaServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DmaServer").field("mappings", &self.mappings).finish_non_exhaustive()
    }
}

impl DmaServer {
    /// Makes a server that moves at most `max_bytes` in one request, and declines all without memory.
    pub(super) fn new(max_bytes: usize) -> Self {
        DmaServer { mappings: Mappings::default(), max_bytes, access: None }
    }

    /// Serves requests from `memory`, whose dirty bitmap marks what they write.
    pub(super) fn serve_from<A>(&mut self, memory: A)
    where
        A: GuestAddressSpace + Send + 'static,
    {
        self.access = Some(Box::new(move |iova, transfer| match transfer {
            Transfer::Read(buffer) => memory.memory().read_slice(buffer, GuestAddress(iova)),
            Transfer::Write(data) => memory.memory().write_slice(data, GuestAddress(iova)),
        }));
    }

    /// Returns the most bytes that a request's payload may have.
    pub(super) fn max_request_bytes(&self) -> usize {
        self.max_bytes.saturating_add(size_of::<DmaAccess>())
    }

    /// Appends the payload of the reply to `request` to `reply`, or returns the errno to refuse it with.
    pub(super) fn answer(&mut self, command: u16, request: &[u8], reply: &mut Vec<u8>) -> Result<(), i32> {
        let access = self.access.as_mut().ok_or(libc::EOPNOTSUPP)?;
        let malformed = |_| libc::EINVAL;
        let (asked, data) = match VfioUserCommand::from_wire(command) {
            Some(VfioUserCommand::DmaRead) => (DmaAccess::decode(request).map_err(malformed)?, None),
            Some(VfioUserCommand::DmaWrite) => {
                let (asked, data) = DmaAccess::decode_with_data(request).map_err(malformed)?;
                (asked, Some(data))
            }
            _ => return Err(libc::EOPNOTSUPP),
        };
        let count = usize::try_from(asked.count.get()).ok().filter(|count| *count <= self.max_bytes);
        let count = count.ok_or(libc::EINVAL)?;
        let iova = IovaRange::new(asked.iova.get(), asked.count.get()).map_err(|_| libc::EINVAL)?;
        self.mappings.allow(iova, data.is_some())?;
        reply.extend_from_slice(asked.as_bytes());
        let moved = match data {
            Some(data) => access(iova.start(), Transfer::Write(data)),
            None => {
                let begin = reply.len();
                reply.resize(begin + count, 0);
                access(iova.start(), Transfer::Read(&mut reply[begin..]))
            }
        };
        moved.map_err(|_| libc::EFAULT)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::bitmap::{AtomicBitmap, Bitmap};
    use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

    use super::*;

    type Memory = GuestMemoryMmap<AtomicBitmap>;

    fn iova(start: u64, bytes: u64) -> IovaRange {
        IovaRange::new(start, bytes).unwrap()
    }

    fn server() -> (DmaServer, Arc<Memory>) {
        let memory = Arc::new(Memory::from_ranges(&[(GuestAddress(0), 0x8000)]).unwrap());
        let mut server = DmaServer::new(0x2000);
        for (start, writeable) in [(0x1000, true), (0x2000, true), (0x4000, false), (0x9000, true)] {
            server
                .mappings
                .insert(&DmaRegion { iova: iova(start, 0x1000), file_offset: 0, writeable }, false);
        }
        server.serve_from(Arc::clone(&memory));
        (server, memory)
    }

    fn access(iova: u64, count: u64) -> DmaAccess {
        DmaAccess { iova: iova.into(), count: count.into() }
    }

    fn ask(
        server: &mut DmaServer,
        command: VfioUserCommand,
        asked: DmaAccess,
        data: &[u8],
    ) -> Result<Vec<u8>, i32> {
        let mut reply = Vec::new();
        server.answer(command.to_wire(), &[asked.as_bytes(), data].concat(), &mut reply)?;
        Ok(reply)
    }

    #[test]
    fn what_is_written_can_be_read_and_is_marked_dirty_page_by_page() {
        let (mut server, memory) = server();
        let asked = access(0x1ffe, 4);
        assert_eq!(ask(&mut server, VfioUserCommand::DmaWrite, asked, b"four").unwrap(), asked.as_bytes());
        let read = ask(&mut server, VfioUserCommand::DmaRead, asked, &[]).unwrap();
        assert_eq!(read, [asked.as_bytes(), b"four"].concat());
        let region = memory.find_region(GuestAddress(0)).unwrap();
        let dirty: Vec<_> = (0..8).filter(|page| region.bitmap().dirty_at(page << 12)).collect();
        assert_eq!(dirty, [1, 2], "across two mapped ranges");
    }

    #[test]
    fn what_is_not_mapped_or_not_writeable_or_not_memory_is_refused() {
        let (mut server, memory) = server();
        let mut write = |iova, count: usize| {
            ask(&mut server, VfioUserCommand::DmaWrite, access(iova, count as u64), &vec![1; count])
                .unwrap_err()
        };
        assert_eq!(write(0x0fff, 2), libc::EFAULT, "begins below what is mapped");
        assert_eq!(write(0x2fff, 2), libc::EFAULT, "ends past it");
        assert_eq!(write(0x4000, 1), libc::EPERM);
        assert_eq!(write(0x9000, 1), libc::EFAULT, "mapped, and no memory");
        assert_eq!(write(0x1000, 0), libc::EINVAL);
        assert_eq!(write(u64::MAX, 2), libc::EINVAL);
        assert_eq!(write(0x1000, 0x2001), libc::EINVAL, "more than was announced");
        let short = ask(&mut server, VfioUserCommand::DmaWrite, access(0x1000, 9), &[1; 8]);
        assert_eq!(short, Err(libc::EINVAL));
        let endless = ask(&mut server, VfioUserCommand::DmaRead, access(0x1000, u64::MAX), &[]);
        assert_eq!(endless, Err(libc::EINVAL));
        assert_eq!(ask(&mut server, VfioUserCommand::DeviceReset, access(0, 1), &[]), Err(libc::EOPNOTSUPP));
        assert!(
            (0..8).all(|page| !memory.find_region(GuestAddress(0)).unwrap().bitmap().dirty_at(page << 12))
        );
        server.access = None;
        assert_eq!(ask(&mut server, VfioUserCommand::DmaRead, access(0x1000, 1), &[]), Err(libc::EOPNOTSUPP));
    }

    #[test]
    fn ranges_that_share_an_iova_are_found_whichever_way_they_do() {
        let mut mappings = Mappings::default();
        let region = DmaRegion { iova: iova(0x2000, 0x2000), file_offset: 0, writeable: true };
        mappings.insert(&region, true);
        for (start, bytes) in [(0x1000, 0x1001), (0x2000, 0x2000), (0x3000, 0x10), (0x3fff, 1), (0, 0x9000)] {
            assert_eq!(mappings.overlap(iova(start, bytes)), Some(region.iova), "{start:#x} {bytes:#x}");
        }
        for (start, bytes) in [(0x1000, 0x1000), (0x4000, 0x1000), (0, 1)] {
            assert_eq!(mappings.overlap(iova(start, bytes)), None, "{start:#x} {bytes:#x}");
        }
        assert_eq!(mappings.writeable_by_itself(), [region.iova]);
        mappings.remove(region.iova);
        assert_eq!(mappings.overlap(iova(0, 0x9000)), None);
        assert!(mappings.writeable_by_itself().is_empty());
    }
}
