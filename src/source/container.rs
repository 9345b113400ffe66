// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `VFIO_IOMMU_DIRTY_PAGES`: what was written through the mappings of a type1 container.

use std::io;
use std::os::fd::AsRawFd;

use thiserror::Error;
use vfio_bindings::bindings::vfio::VFIO_TYPE1v2_IOMMU;

use super::mapped::{Mapped, spans, zeroed};
use super::{Cover, DirtySource, Harvest, Operation, Reports, Sink, SourceError};
use crate::bitmap::WORD_BITS;
use crate::granule::{Granule, GranuleError};
use crate::iova::{IovaMap, Mapping};
use crate::layout::Layout;
use crate::range::IovaRange;
use crate::sys::vfio::container as sys;

mod info;
mod steady;

use steady::Steady;

pub use info::{ContainerInfo, DirtyBitmapInfo};

/// What a set bit of a container's bitmap means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Meaning {
    /// A device wrote there: every device in the container is a mediated one, whose writes the kernel performs itself.
    Written,
    /// The page is mapped: the container holds a pass-through device, whose writes it cannot see, so it reports every
    /// mapped page.
    Mapped,
}

/// What a container refused, or cannot do.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ContainerLogError {
    /// The container's IOMMU model is not type 1 version 2, the only one with a dirty bitmap.
    #[error("Container of IOMMU model {model} has no dirty bitmap; only model 3 (type 1 version 2) has")]
    Model {
        /// What the container was given with `VFIO_SET_IOMMU`.
        model: u32,
    },
    /// The container's capabilities could not be read.
    #[error("Cannot read the container's information")]
    Info(#[source] io::Error),
    /// The container has no migration capability: an old kernel, or an iommufd that poses as a container.
    #[error("Container has no dirty bitmap")]
    NoDirtyBitmap,
    /// The bitmap's smallest page size is invalid.
    #[error("Container's dirty bitmap offers page sizes {page_sizes:#x}")]
    PageSizes {
        /// One bit per size.
        page_sizes: u64,
        /// What is wrong with the smallest.
        source: GranuleError,
    },
    /// One mapping's bitmap exceeds what the container reads at once, and a mapping cannot be read in parts.
    #[error("Mapping at IOVA {iova} takes a bitmap larger than the container's limit of {max_bytes} bytes")]
    MappingTooLarge {
        /// The mapping.
        iova: IovaRange,
        /// The limit.
        max_bytes: u64,
    },
    /// The log could not be switched on.
    #[error("Cannot start the container's dirty log")]
    Start(#[source] io::Error),
    /// The bits of a span could not be read and are lost. The log was restarted.
    #[error("Cannot read the dirty bitmap of IOVA {iova}")]
    Read {
        /// What was asked for.
        iova: IovaRange,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Mappings could not be taken down.
    #[error("Cannot unmap IOVA {iova}")]
    Unmap {
        /// What was asked for.
        iova: IovaRange,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The log could not be switched off.
    #[error("Cannot stop the container's dirty log")]
    Stop(#[source] io::Error),
}

/// The dirty bitmap of a type1 container, over any container descriptor.
///
/// Without a virtual IOMMU it assumes that each RAM region is mapped whole, by one mapping or several.
#[derive(Debug)]
pub struct ContainerLog<F> {
    id: String,
    container: F,
    meaning: Meaning,
    limits: Limits,
    mapped: Mapped,
    /// What one GET each reads; empty when it is to be worked out anew.
    requests: Vec<IovaRange>,
    words: Vec<u64>,
    steady: Steady,
    on: bool,
}

impl<F: AsRawFd + Send> ContainerLog<F> {
    /// Makes the source `id` for `container`, which was given `model` with `VFIO_SET_IOMMU`; its log is off until
    /// [`DirtySource::start`].
    ///
    /// # Errors
    /// The model is not type 1 version 2, or the container has no dirty bitmap.
    pub fn new(
        id: impl Into<String>,
        container: F,
        model: u32,
        meaning: Meaning,
    ) -> Result<Self, ContainerLogError> {
        if model != VFIO_TYPE1v2_IOMMU {
            return Err(ContainerLogError::Model { model });
        }
        let limits = Limits::new(Self::info(&container)?)?;
        let (mapped, requests, words) = (Mapped::default(), Vec::new(), Vec::new());
        let (id, steady) = (id.into(), Steady::default());
        Ok(Self { id, container, meaning, limits, mapped, requests, words, steady, on: false })
    }

    /// Asks a container what it can do.
    pub(crate) fn info(container: &F) -> Result<ContainerInfo, ContainerLogError> {
        let info = sys::iommu_info(container).map_err(ContainerLogError::Info)?;
        Ok(ContainerInfo::parse(&info))
    }

    /// Bytes per bit.
    pub fn granule(&self) -> Granule {
        self.limits.granule
    }

    /// Unmaps the mappings in `iova`, each of which must lie wholly inside, and reports their dirty pages; returns
    /// the bytes unmapped. If the log is off it only unmaps.
    ///
    /// The kernel reads the bitmap and unmaps under one lock, so none of its own writes falls in between; a
    /// pass-through device may still write between the two (C14).
    ///
    /// # Errors
    /// If a bitmap is lost, all its pages are marked and the mappings are gone. If the error names
    /// [`Operation::Unmap`], one mapping could not be removed: it and those above it still exist, those below it are
    /// gone and were reported or marked.
    pub fn unmap_with_bitmap(&mut self, iova: IovaRange, sink: &mut Sink<'_>) -> Result<u64, SourceError> {
        self.try_unmap(iova, sink).map_err(|cause| {
            let stands = matches!(cause, ContainerLogError::Unmap { .. });
            let operation = if stands { Operation::Unmap } else { Operation::Unmapped };
            SourceError::new(&self.id, operation, cause)
        })
    }

    fn try_unmap(&mut self, iova: IovaRange, sink: &mut Sink<'_>) -> Result<u64, ContainerLogError> {
        if !self.on {
            return sys::unmap(&self.container, iova)
                .map_err(|source| ContainerLogError::Unmap { iova, source });
        }
        let known = || self.mapped.iter().map(|mapping| mapping.iova());
        // A region may be mapped in parts, of which this is one: it is asked for as it is, and the kernel refuses what bisects.
        let part = known().any(|mapping| mapping.covers(iova)).then_some(iova);
        let inside = known().filter(|mapping| iova.covers(*mapping) && *mapping != iova);
        let requests = self.limits.grouped(part.into_iter().chain(inside));
        self.requests.clear();
        let Self { container, limits, mapped, words, .. } = self;
        let with_bitmap =
            |request, sink: &mut Sink<'_>| unmap_request(container, *limits, words, request, sink);
        let without = |request| {
            sys::unmap(container, request)
                .map_err(|source| ContainerLogError::Unmap { iova: request, source })
        };
        take_down(requests, mapped, sink, with_bitmap, without)
    }

    fn try_collect(&mut self, sink: &mut Sink<'_>) -> Result<(), ContainerLogError> {
        if self.requests.is_empty() {
            self.requests = self.limits.requests(self.mapped.iter().map(|mapping| mapping.iova()))?;
            self.steady.restart();
        }
        for index in 0..self.requests.len() {
            self.read(self.requests[index], sink)?;
            if self.meaning == Meaning::Written {
                self.steady.see(&self.words[..self.limits.words(self.requests[index])]);
            }
        }
        self.steady.end_report();
        Ok(())
    }

    fn read(&mut self, iova: IovaRange, sink: &mut Sink<'_>) -> Result<(), ContainerLogError> {
        let granule = self.limits.granule;
        let words = zeroed(&mut self.words, self.limits.words(iova));
        sys::dirty_pages_bitmap(&self.container, iova, granule, words)
            .map_err(|source| ContainerLogError::Read { iova, source })?;
        sink.iova_words(iova, granule, words).expect(COUNTED);
        Ok(())
    }

    /// Restarts a log that a failed read may have damaged; the caller marks every page dirty.
    fn rearm(&self) -> io::Result<()> {
        sys::dirty_pages_stop(&self.container)?;
        sys::dirty_pages_start(&self.container)
    }
}

const COUNTED: &str = "the words were counted for this range";

/// Unmaps `requests` one after the other. If a bitmap cannot be read, unmaps without it and marks all its pages.
fn take_down(
    requests: Vec<IovaRange>,
    mapped: &mut Mapped,
    sink: &mut Sink<'_>,
    mut with_bitmap: impl FnMut(IovaRange, &mut Sink<'_>) -> Result<u64, ContainerLogError>,
    without: impl Fn(IovaRange) -> Result<u64, ContainerLogError>,
) -> Result<u64, ContainerLogError> {
    let (mut bytes, mut lost) = (0, None);
    for request in requests {
        match with_bitmap(request, sink) {
            Ok(unmapped) => bytes += unmapped,
            Err(unread) => {
                bytes += without(request)?;
                // Marked here: if a later request cannot be unmapped, the caller sees only that error.
                sink.iova_range(request);
                lost = lost.or(Some(unread));
            }
        }
        mapped.remove(request);
    }
    lost.map_or(Ok(bytes), Err)
}

fn unmap_request(
    container: &impl AsRawFd,
    limits: Limits,
    words: &mut Vec<u64>,
    request: IovaRange,
    sink: &mut Sink<'_>,
) -> Result<u64, ContainerLogError> {
    limits.check(request)?;
    let words = zeroed(words, limits.words(request));
    let bytes = sys::unmap_with_bitmap(container, request, limits.granule, words)
        .map_err(|source| ContainerLogError::Read { iova: request, source })?;
    sink.iova_words(request, limits.granule, words).expect(COUNTED);
    Ok(bytes)
}

/// How the container's bitmap may be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Limits {
    granule: Granule,
    max_bytes: u64,
}

impl Limits {
    /// Words of zeros worth reading to save a request.
    const GAP_WORDS: u64 = 64;

    fn new(info: ContainerInfo) -> Result<Self, ContainerLogError> {
        let bitmap = info.dirty_bitmap.ok_or(ContainerLogError::NoDirtyBitmap)?;
        let page_sizes = bitmap.page_sizes;
        let smallest = page_sizes & page_sizes.wrapping_neg();
        let granule =
            Granule::new(smallest).map_err(|source| ContainerLogError::PageSizes { page_sizes, source })?;
        Ok(Self { granule, max_bytes: bitmap.max_bytes })
    }

    /// Groups mappings, ascending, into what one GET each may read: none bisected, no bitmap over the limit.
    fn requests(
        self,
        mappings: impl Iterator<Item = IovaRange>,
    ) -> Result<Vec<IovaRange>, ContainerLogError> {
        let requests = self.grouped(mappings);
        requests.iter().try_for_each(|&request| self.check(request))?;
        Ok(requests)
    }

    /// Groups mappings as [`Limits::requests`] does; one that is over the limit by itself stands alone.
    fn grouped(self, mappings: impl Iterator<Item = IovaRange>) -> Vec<IovaRange> {
        let gap = (Self::GAP_WORDS * WORD_BITS as u64) << self.granule.shift();
        spans(mappings, gap, self.max_span())
    }

    /// Checks that the bitmap of `iova` is within the limit.
    fn check(self, iova: IovaRange) -> Result<(), ContainerLogError> {
        match iova.len() > self.max_span() {
            true => Err(ContainerLogError::MappingTooLarge { iova, max_bytes: self.max_bytes }),
            false => Ok(()),
        }
    }

    /// Bytes of IOVA space whose bitmap, in whole words, is within the limit.
    fn max_span(self) -> u64 {
        let bits = (self.max_bytes / 8).saturating_mul(WORD_BITS as u64);
        bits.saturating_mul(self.granule.bytes())
    }

    fn words(self, iova: IovaRange) -> usize {
        usize::try_from(self.granule.bits_for(iova.len())).expect("mapped here").div_ceil(WORD_BITS)
    }
}

impl<F: AsRawFd + Send> DirtySource for ContainerLog<F> {
    fn id(&self) -> &str {
        &self.id
    }

    fn reports(&self) -> Reports {
        Reports::Devices
    }

    fn cover(&self) -> Cover {
        Cover { ranges: self.mapped.gpa_ranges(), precise: self.meaning == Meaning::Written }
    }

    fn standing_bytes(&self) -> u64 {
        self.steady.bytes(self.limits.granule)
    }

    fn start(&mut self, layout: &Layout, iova: &IovaMap) -> Result<(), SourceError> {
        if self.on {
            return Ok(());
        }
        self.steady = Steady::default();
        self.mapped = Mapped::at_start(layout, iova);
        self.requests.clear();
        let mappings = self.mapped.iter().map(|mapping| mapping.iova());
        let readable = self.limits.requests(mappings).map(drop);
        readable
            .and_then(|()| sys::dirty_pages_start(&self.container).map_err(ContainerLogError::Start))
            .map_err(|cause| SourceError::new(&self.id, Operation::Start, cause))?;
        self.on = true;
        Ok(())
    }

    fn collect(&mut self, sink: &mut Sink<'_>) -> Result<(), SourceError> {
        if !self.on {
            // A read would fail and restart the log unnoticed.
            return Ok(());
        }
        let result = self.try_collect(sink);
        if let Err(ContainerLogError::Read { .. }) = result {
            // Where this fails too, so does the next read: it is tried again there.
            let _told_by_the_read = self.rearm();
            self.steady.restart();
        }
        result.map_err(|cause| SourceError::new(&self.id, Operation::Collect, cause))
    }

    /// Refuses a mapping whose bitmap could never be read. Until it is unmapped, all its pages count as written.
    fn mapped(&mut self, mapping: &Mapping) -> Result<(), SourceError> {
        self.mapped.add(*mapping);
        self.requests.clear();
        let readable = self.limits.check(mapping.iova());
        readable.map_err(|cause| SourceError::new(&self.id, Operation::Mapped, cause))
    }

    fn devices_may_join(&self) -> bool {
        true
    }

    fn harvest(&self) -> Harvest {
        Harvest::ByUnmapping
    }

    /// Takes the mapping down, see [`ContainerLog::unmap_with_bitmap`].
    fn unmapped(&mut self, mapping: &Mapping, sink: &mut Sink<'_>) -> Result<(), SourceError> {
        self.unmap_with_bitmap(mapping.iova(), sink).map(drop)
    }

    fn forget(&mut self, mapping: &Mapping) {
        self.mapped.remove(mapping.iova());
        self.requests.clear();
    }

    fn stop(&mut self) -> Result<(), SourceError> {
        if !std::mem::take(&mut self.on) {
            return Ok(());
        }
        sys::dirty_pages_stop(&self.container)
            .map_err(|source| SourceError::new(&self.id, Operation::Stop, ContainerLogError::Stop(source)))
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::range::GpaRange;
    use crate::source::Marks;

    fn range(start: u64, len: u64) -> IovaRange {
        IovaRange::new(start, len).unwrap()
    }

    fn limits(max_bytes: u64) -> Limits {
        Limits { granule: Granule::KIB_4, max_bytes }
    }

    /// A source whose every ioctl fails: what stands behind it is no container.
    fn broken() -> ContainerLog<File> {
        ContainerLog {
            id: "container".to_owned(),
            container: File::open("/dev/null").unwrap(),
            meaning: Meaning::Written,
            limits: limits(256 << 20),
            mapped: Mapped::default(),
            requests: Vec::new(),
            words: Vec::new(),
            steady: Steady::default(),
            on: false,
        }
    }

    fn layout() -> Layout {
        Layout::new([GpaRange::new(0, 8 << 20).unwrap()], Granule::KIB_4).unwrap()
    }

    #[test]
    fn only_a_type1v2_container_is_asked_anything() {
        for model in [1, 2, 4, 6, 7, 8] {
            let log = ContainerLog::new("c", File::open("/dev/null").unwrap(), model, Meaning::Written);
            assert!(matches!(log, Err(ContainerLogError::Model { model: named }) if named == model));
        }
        let log = ContainerLog::new("c", File::open("/dev/null").unwrap(), 3, Meaning::Written);
        assert!(matches!(log, Err(ContainerLogError::Info(_))));
    }

    #[test]
    fn a_container_without_the_migration_capability_is_refused() {
        let info = ContainerInfo { page_sizes: 0x1000, dirty_bitmap: None };
        assert!(matches!(Limits::new(info), Err(ContainerLogError::NoDirtyBitmap)));
        let dirty_bitmap = Some(DirtyBitmapInfo { page_sizes: 0, max_bytes: 1 });
        let none = Limits::new(ContainerInfo { page_sizes: 0x1000, dirty_bitmap });
        assert!(matches!(none, Err(ContainerLogError::PageSizes { page_sizes: 0, .. })));
    }

    #[test]
    fn the_smallest_page_size_is_the_granule() {
        let dirty_bitmap = Some(DirtyBitmapInfo { page_sizes: 0x4021_0000, max_bytes: 1 });
        let limits = Limits::new(ContainerInfo { page_sizes: 0x1000, dirty_bitmap }).unwrap();
        assert_eq!(limits.granule.bytes(), 64 << 10);
    }

    #[test]
    fn c16_a_mapping_whose_bitmap_exceeds_the_limit_is_refused_before_the_start() {
        let words_of_two_mib = 512 / 8;
        let whole = limits(words_of_two_mib).requests([range(0, 2 << 20)].into_iter());
        assert_eq!(whole.unwrap(), [range(0, 2 << 20)]);
        let larger = limits(words_of_two_mib).requests([range(0, (2 << 20) + 4096)].into_iter());
        assert!(matches!(larger, Err(ContainerLogError::MappingTooLarge { max_bytes: 64, .. })));
    }

    #[test]
    fn c16_requests_hold_mappings_whole_and_stay_within_the_limit() {
        let mappings = (0..9).map(|index| range(index << 20, 1 << 20));
        let requests = limits(4 * 256 / 8).requests(mappings).unwrap();
        assert_eq!(requests, [range(0, 4 << 20), range(4 << 20, 4 << 20), range(8 << 20, 1 << 20)]);
    }

    #[test]
    fn c16_the_limit_of_a_real_kernel_is_8_tib() {
        assert_eq!(limits(268_435_456).max_span(), 8 << 40);
    }

    #[test]
    fn c07_a_failed_read_is_an_error_and_the_cover_is_known() {
        let (layout, iova) = (layout(), IovaMap::Identity);
        let mut log = broken();
        log.start(&layout, &iova).unwrap_err();
        log.mapped = Mapped::at_start(&layout, &iova);
        log.on = true;
        let mut marks = Marks::new(&layout);
        let error = log.collect(&mut Sink::new(&layout, &iova, &mut marks)).unwrap_err();
        assert_eq!(error.operation, Operation::Collect);
        assert!(error.cause.to_string().contains("0x0..0x800000"), "{}", error.cause);
        assert_eq!(log.cover(), Cover { ranges: vec![layout.regions()[0].range()], precise: true });
    }

    #[test]
    fn c13_a_mapping_that_cannot_be_taken_down_is_still_known() {
        let (layout, iova) = (layout(), IovaMap::Identity);
        let mut log = broken();
        let mapping = Mapping::identity(layout.regions()[0].range());
        log.mapped(&mapping).unwrap();
        log.on = true;
        let mut marks = Marks::new(&layout);
        let error = log.unmapped(&mapping, &mut Sink::new(&layout, &iova, &mut marks)).unwrap_err();
        assert_eq!(error.operation, Operation::Unmap);
        assert_eq!(log.cover().ranges, [mapping.gpa()]);
    }

    #[test]
    fn c13_what_is_gone_without_its_bitmap_is_marked_where_another_mapping_cannot_be_taken_down() {
        let (layout, iova) = (layout(), IovaMap::Identity);
        let mut mapped = Mapped::default();
        let [first, second] = [0, 4 << 20].map(|start| range(start, 1 << 20));
        for going in [first, second] {
            mapped.add(Mapping::identity(GpaRange::new(going.start(), going.len()).unwrap()));
        }
        let mut marks = Marks::new(&layout);
        let mut sink = Sink::new(&layout, &iova, &mut marks);
        let error = || io::Error::from_raw_os_error(libc::EIO);
        let unread = |iova, _: &mut Sink<'_>| Err(ContainerLogError::Read { iova, source: error() });
        let without = |iova: IovaRange| match iova == second {
            true => Err(ContainerLogError::Unmap { iova, source: error() }),
            false => Ok(iova.len()),
        };
        let failed = take_down(vec![first, second], &mut mapped, &mut sink, unread, without);
        assert!(matches!(failed, Err(ContainerLogError::Unmap { iova, .. }) if iova == second));
        let marked = (0..layout.words()).map(|word| marks.dirty.word(word).count_ones()).sum::<u32>();
        assert_eq!(marked, 256, "all of the first");
        assert_eq!(mapped.gpa_ranges(), [GpaRange::new(4 << 20, 1 << 20).unwrap()]);
    }

    #[test]
    fn c16_a_mapping_whose_bitmap_exceeds_the_limit_is_refused_and_taken_down_all_the_same() {
        let (layout, iova) = (layout(), IovaMap::Identity);
        let mut log = broken();
        log.limits = limits(8);
        log.on = true;
        let mapping = Mapping::identity(layout.regions()[0].range());
        let error = log.mapped(&mapping).unwrap_err();
        assert_eq!(error.operation, Operation::Mapped);
        let mut marks = Marks::new(&layout);
        let error = log.collect(&mut Sink::new(&layout, &iova, &mut marks)).unwrap_err();
        assert_eq!(error.operation, Operation::Collect, "all of it is dirty");
        let error = log.unmapped(&mapping, &mut Sink::new(&layout, &iova, &mut marks)).unwrap_err();
        assert_eq!(error.operation, Operation::Unmap, "it was tried, without a bitmap: {}", error.cause);
        assert_eq!(log.cover().ranges, [mapping.gpa()]);
    }

    #[test]
    fn c41_a_second_start_asks_the_kernel_nothing() {
        let mut log = broken();
        log.on = true;
        log.start(&layout(), &IovaMap::Identity).unwrap();
    }
}
