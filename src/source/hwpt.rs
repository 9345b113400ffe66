// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `IOMMU_HWPT_*_DIRTY_*`: what was written through an IOMMU page table that keeps dirty bits.

use std::io;
use std::os::fd::AsRawFd;

use thiserror::Error;

use super::mapped::{Mapped, zeroed};
use super::{Cover, DirtySource, Operation, Reports, Sink, SourceError};
use crate::bitmap::WORD_BITS;
use crate::granule::Granule;
use crate::iova::{IovaMap, Mapping};
use crate::layout::Layout;
use crate::range::IovaRange;
use crate::sys::iommufd::{self as sys, Afterwards};

/// Why a page table's dirty bits cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum HwptLogError {
    /// Tracking could not be switched; most often the page table was not allocated for it.
    #[error("Cannot switch dirty tracking of page table {hwpt_id} {}", if *.on { "on" } else { "off" })]
    Switch {
        /// The page table's object number.
        hwpt_id: u32,
        /// On or off.
        on: bool,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The bits of a mapping could not be read; some may be gone.
    #[error("Cannot read the dirty bits of IOVA {iova} in page table {hwpt_id}")]
    Read {
        /// The page table's object number.
        hwpt_id: u32,
        /// What was asked for.
        iova: IovaRange,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// The dirty bits of one page table of an iommufd, over any iommufd descriptor.
///
/// The page table was allocated with `IOMMU_HWPT_ALLOC_DIRTY_TRACKING`. An address space with several page tables
/// takes a source for each. Without a virtual IOMMU every RAM region must be mapped without holes: an unmapped part
/// would be reported clean.
#[derive(Debug)]
pub struct HwptLog<F> {
    id: String,
    iommufd: F,
    hwpt_id: u32,
    granule: Granule,
    mapped: Mapped,
    words: Vec<u64>,
    on: bool,
}

/// Bits one query reads at most, so that its bitmap stays in a processor's cache: 256 KiB.
const QUERY_BITS: u64 = 1 << 21;

impl<F: AsRawFd + Send> HwptLog<F> {
    /// Makes the source `id` for page table `hwpt_id`; tracking is off until [`DirtySource::start`].
    pub fn new(id: impl Into<String>, iommufd: F, hwpt_id: u32) -> Self {
        let (mapped, words) = (Mapped::default(), Vec::new());
        Self { id: id.into(), iommufd, hwpt_id, granule: Granule::host_page(), mapped, words, on: false }
    }

    /// Reads at a coarser granule than the host page, where a mapping is aligned to it: cheaper with huge pages.
    #[must_use]
    pub fn with_granule(self, granule: Granule) -> Self {
        Self { granule: granule.max(Granule::host_page()), ..self }
    }

    /// Tries whether the page table keeps dirty bits. It forgets those that it has.
    pub(crate) fn tracks(&self) -> bool {
        self.switch(true).and_then(|()| self.switch(false)).is_ok()
    }

    fn switch(&self, on: bool) -> Result<(), HwptLogError> {
        let hwpt_id = self.hwpt_id;
        sys::set_dirty_tracking(&self.iommufd, hwpt_id, on).map_err(|source| HwptLogError::Switch {
            hwpt_id,
            on,
            source,
        })
    }

    /// Reads the bits of one mapping only: for an unmapped range the kernel may report success and no bits.
    fn read(
        &mut self,
        mapping: IovaRange,
        afterwards: Afterwards,
        sink: &mut Sink<'_>,
    ) -> Result<(), HwptLogError> {
        for (granule, iova) in queries(mapping, self.granule) {
            let bits = usize::try_from(granule.bits_for(iova.len())).expect("a query's bits");
            let words = zeroed(&mut self.words, bits.div_ceil(WORD_BITS));
            let hwpt_id = self.hwpt_id;
            sys::dirty_bitmap(&self.iommufd, hwpt_id, iova, granule, afterwards, words)
                .map_err(|source| HwptLogError::Read { hwpt_id, iova, source })?;
            sink.iova_words(iova, granule, words).expect("the words were counted for this range");
        }
        Ok(())
    }
}

/// Cuts a mapping into what one query each reads, at the coarsest granule up to `coarsest` that both its ends are aligned to.
fn queries(mapping: IovaRange, coarsest: Granule) -> impl Iterator<Item = (Granule, IovaRange)> {
    let aligned = (mapping.start() | mapping.end()).trailing_zeros();
    let shift = coarsest.shift().min(aligned);
    let granule = Granule::new(1 << shift).unwrap_or(Granule::host_page()).max(Granule::host_page());
    mapping.pieces(QUERY_BITS << granule.shift()).map(move |iova| (granule, iova))
}

impl<F: AsRawFd + Send> DirtySource for HwptLog<F> {
    fn id(&self) -> &str {
        &self.id
    }

    fn reports(&self) -> Reports {
        Reports::Devices
    }

    fn devices_may_join(&self) -> bool {
        true
    }

    fn cover(&self) -> Cover {
        Cover { ranges: self.mapped.gpa_ranges(), precise: true }
    }

    /// Switches tracking on, once: a second call would clear bits not yet read.
    fn start(&mut self, layout: &Layout, iova: &IovaMap) -> Result<(), SourceError> {
        if self.on {
            return Ok(());
        }
        self.mapped = Mapped::at_start(layout, iova);
        self.switch(true).map_err(|cause| SourceError::new(&self.id, Operation::Start, cause))?;
        self.on = true;
        Ok(())
    }

    fn collect(&mut self, sink: &mut Sink<'_>) -> Result<(), SourceError> {
        if !self.on {
            return Ok(());
        }
        let mapped = std::mem::take(&mut self.mapped);
        let result = mapped.iter().try_for_each(|mapping| self.read(mapping.iova(), Afterwards::Clear, sink));
        self.mapped = mapped;
        result.map_err(|cause| SourceError::new(&self.id, Operation::Collect, cause))
    }

    fn mapped(&mut self, mapping: &Mapping) -> Result<(), SourceError> {
        self.mapped.add(*mapping);
        Ok(())
    }

    /// Reads the bits while their page-table entries are still there; they are not cleared, which saves a flush.
    fn unmapped(&mut self, mapping: &Mapping, sink: &mut Sink<'_>) -> Result<(), SourceError> {
        let result = if self.on { self.read(mapping.iova(), Afterwards::Keep, sink) } else { Ok(()) };
        result.map_err(|cause| SourceError::new(&self.id, Operation::Unmapped, cause))
    }

    fn forget(&mut self, mapping: &Mapping) {
        self.mapped.remove(mapping.iova());
    }

    fn stop(&mut self) -> Result<(), SourceError> {
        if !std::mem::take(&mut self.on) {
            return Ok(());
        }
        self.switch(false).map_err(|cause| SourceError::new(&self.id, Operation::Stop, cause))
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::range::GpaRange;
    use crate::source::Marks;

    fn layout() -> Layout {
        Layout::new([GpaRange::new(0, 8 << 20).unwrap()], Granule::host_page()).unwrap()
    }

    /// A source whose every ioctl fails: what stands behind it is no iommufd.
    fn broken() -> HwptLog<File> {
        HwptLog::new("hwpt", File::open("/dev/null").unwrap(), 7)
    }

    #[test]
    fn c41_a_second_start_does_not_enable_again() {
        let mut log = broken();
        let error = log.start(&layout(), &IovaMap::Identity).unwrap_err();
        assert_eq!(error.cause.to_string(), "Cannot switch dirty tracking of page table 7 on");
        log.on = true;
        log.start(&layout(), &IovaMap::Identity).unwrap();
    }

    #[test]
    fn c13_a_failed_read_before_an_unmap_is_an_error_and_the_mapping_goes_all_the_same() {
        let (layout, iova) = (layout(), IovaMap::Identity);
        let mut log = broken();
        log.on = true;
        let mapping = Mapping::identity(layout.regions()[0].range());
        log.mapped(&mapping).unwrap();
        let mut marks = Marks::new(&layout);
        let error = log.unmapped(&mapping, &mut Sink::new(&layout, &iova, &mut marks)).unwrap_err();
        assert_eq!(error.operation, Operation::Unmapped);
        assert_eq!(log.cover().ranges, [mapping.gpa()]);
        log.forget(&mapping);
        assert!(log.cover().ranges.is_empty());
    }

    #[test]
    fn c40_a_failed_read_of_one_page_table_keeps_its_cover() {
        let (layout, iova) = (layout(), IovaMap::Identity);
        let mut log = broken();
        log.on = true;
        log.mapped(&Mapping::identity(layout.regions()[0].range())).unwrap();
        let mut marks = Marks::new(&layout);
        log.collect(&mut Sink::new(&layout, &iova, &mut marks)).unwrap_err();
        assert_eq!(log.cover().ranges, [layout.regions()[0].range()]);
    }

    #[test]
    fn a_query_never_leaves_its_mapping_and_is_never_finer_than_a_host_page() {
        let mapping = IovaRange::new(0x1000, (20 << 30) + 0x3000).unwrap();
        for shift in [12, 16, 21, 30] {
            let asked: Vec<_> = queries(mapping, Granule::new(1 << shift).unwrap()).collect();
            assert_eq!(asked.iter().map(|(_, iova)| iova.len()).sum::<u64>(), mapping.len());
            assert!(
                asked.iter().all(|(granule, iova)| *granule == Granule::host_page() && mapping.covers(*iova))
            );
        }
        let aligned = IovaRange::new(2 << 20, 6 << 20).unwrap();
        let coarse = queries(aligned, Granule::new(1 << 30).unwrap()).next().unwrap();
        assert_eq!(coarse, (Granule::new(2 << 20).unwrap(), aligned));
    }
}
