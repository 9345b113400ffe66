// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `VFIO_DEVICE_FEATURE_DMA_LOGGING_*`: a device's own log of its DMA writes.

use std::io;
use std::os::fd::AsRawFd;

use thiserror::Error;

use super::mapped::{Mapped, spans, zeroed};
use super::{Cover, DirtySource, Harvest, Operation, Reports, Sink, SourceError};
use crate::bitmap::WORD_BITS;
use crate::granule::{Granule, GranuleError};
use crate::iova::{IovaMap, Mapping};
use crate::layout::Layout;
use crate::range::{IovaRange, united};
use crate::sys::vfio::device as sys;
use crate::units::Count;

mod interface;
mod ranges;
mod widening;

use interface::DmaLogging;
use ranges::{Search, in_words, merged, rounded, word_bytes};
use widening::{Widening, with_room};

/// The IOVAs a device is asked to log. They are fixed while it logs: a mapping outside them restarts the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Coverage {
    /// What is mapped when the log starts: for VMs without a virtual IOMMU.
    Mappings,
    /// These ranges, which must contain all mappings: for a virtual IOMMU, everything that the guest may map.
    Ranges(Vec<IovaRange>),
}

/// What a device refused, or cannot do.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DeviceLogError {
    /// The device does not log its own DMA.
    #[error("Device has no DMA logging")]
    Absent(#[source] io::Error),
    /// Nothing is mapped, so there is nothing to log.
    #[error("No memory is mapped for the device")]
    NothingMapped,
    /// A range cannot be rounded to host pages within mapped memory.
    #[error("DMA logging ranges cannot be rounded to pages of {page} within mapped memory")]
    Unaligned {
        /// The host's page size.
        page: Granule,
    },
    /// The device accepted no number of ranges.
    #[error("Cannot start DMA logging of {}, {first} to {last}, at {granule}", Count(.ranges, "range"))]
    Start {
        /// How many ranges there were in the last attempt.
        ranges: usize,
        /// The lowest.
        first: IovaRange,
        /// The highest.
        last: IovaRange,
        /// Bytes per bit asked for.
        granule: Granule,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The device chose a page size that is none.
    #[error("Device chose an impossible page size")]
    Granule(#[source] GranuleError),
    /// The log starts but cannot be read; a kernel built without iommufd answers so.
    #[error("Device logs its DMA, but the kernel cannot report it")]
    NoReport(#[source] io::Error),
    /// A report failed, so the log was corrupt. It was restarted.
    #[error("Cannot report the DMA to IOVA {iova}")]
    Report {
        /// What was asked for.
        iova: IovaRange,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The log was lost in an earlier failure. It was restarted.
    #[error("DMA log was lost at an earlier failure")]
    Lost,
    /// The device writes through a mapping that the log does not cover.
    #[error("Mapping at IOVA {iova} lies outside what the device was asked to log")]
    Uncovered {
        /// The mapping.
        iova: IovaRange,
    },
    /// The log could not be switched off.
    #[error("Cannot stop DMA logging")]
    Stop(#[source] io::Error),
}

/// The DMA log of one device, over any VFIO device descriptor.
///
/// Nobody else may start or stop the device's log while this source is on.
#[derive(Debug)]
pub struct DeviceLog<F> {
    id: String,
    device: F,
    coverage: Coverage,
    hint: Granule,
    max_ranges: usize,
    mapped: Mapped,
    /// What START covered, while the source is on.
    armed: Option<Armed>,
    widening: Widening,
    requests: Option<Requests>,
    words: Vec<u64>,
}

/// What the device was asked to log, and in what state its log is.
#[derive(Debug, Clone)]
struct Armed {
    ranges: Vec<IovaRange>,
    asked: Granule,
    chosen: Granule,
    /// The log's content is lost, or it is off: its reports are ignored until it is restarted.
    lost: bool,
    /// The log was off for a moment: anything mapped may have been written, which is still to be reported.
    gap: bool,
    /// The device once refused to log more than this, and is not asked again.
    full: bool,
}

/// What to do at a report.
#[derive(Debug, Default, PartialEq, Eq)]
struct Requests {
    /// Read these.
    reports: Vec<IovaRange>,
    /// Mark these: START did not cover them.
    unknown: Vec<IovaRange>,
}

impl<F: AsRawFd> DeviceLog<F> {
    /// Makes the source `id` for `device`; its log is off until [`DirtySource::start`].
    ///
    /// # Errors
    /// The device does not log its own DMA.
    pub fn new(id: impl Into<String>, device: F) -> Result<Self, DeviceLogError> {
        sys::probe_dma_logging(&device).map_err(DeviceLogError::Absent)?;
        Ok(Self::unprobed(id.into(), device))
    }
}

impl<F> DeviceLog<F> {
    fn unprobed(id: String, device: F) -> Self {
        let hint = Granule::host_page();
        Self {
            id,
            device,
            coverage: Coverage::Mappings,
            hint,
            max_ranges: kernel_max_ranges(hint),
            mapped: Mapped::default(),
            armed: None,
            widening: Widening::default(),
            requests: None,
            words: Vec::new(),
        }
    }

    /// Chooses what to log; [`Coverage::Mappings`] by default.
    #[must_use]
    pub fn with_coverage(self, coverage: Coverage) -> Self {
        Self { coverage, ..self }
    }

    /// Limits the number of ranges to what the device accepts, if that is known; otherwise it is found by trying.
    #[must_use]
    pub fn with_max_ranges(self, max_ranges: usize) -> Self {
        Self { max_ranges: max_ranges.min(self.max_ranges), ..self }
    }

    /// Asks for a coarser granule than the host page; the device decides.
    #[must_use]
    pub fn with_granule(self, hint: Granule) -> Self {
        Self { hint, ..self }
    }

    /// Bytes per bit that the device chose; `None` while the log is off.
    pub fn granule(&self) -> Option<Granule> {
        self.armed.as_ref().map(|armed| armed.chosen)
    }

    /// The IOVAs that the device logs, including gaps between mappings; none while the log is off.
    pub fn covered(&self) -> &[IovaRange] {
        self.armed.as_ref().map_or(&[], |armed| &armed.ranges)
    }
}

impl<F: DmaLogging> DeviceLog<F> {
    fn try_start(&self) -> Result<Armed, DeviceLogError> {
        let armed = match &self.coverage {
            Coverage::Mappings => self.arm_over(&self.mapped_iovas()),
            Coverage::Ranges(ranges) => self.arm_over(&united(ranges.iter().copied())),
        }?;
        self.check_report(&armed).inspect_err(|_| {
            let _already_failing = self.device.stop();
        })?;
        Ok(armed)
    }

    /// Starts the log of `wanted`, in which all that is mapped must lie.
    fn arm_over(&self, wanted: &[IovaRange]) -> Result<Armed, DeviceLogError> {
        let (page, mapped) = (Granule::host_page(), self.mapped_iovas());
        let (asked, ranges) =
            rounded(wanted, &mapped, self.hint, page).ok_or(DeviceLogError::Unaligned { page })?;
        match mapped.iter().find(|mapping| !covers(&ranges, **mapping)) {
            Some(&iova) => Err(DeviceLogError::Uncovered { iova }),
            None => self.arm(&in_words(&ranges, asked), asked),
        }
    }

    fn mapped_iovas(&self) -> Vec<IovaRange> {
        united(self.mapped.iter().map(|mapping| mapping.iova()))
    }

    /// Starts, reads and stops the log of one page: only a report tells whether the kernel can report.
    pub(crate) fn trial(&self) -> Result<(), DeviceLogError> {
        let page = Granule::host_page();
        let armed = self.arm(&[IovaRange::new(0, page.bytes()).expect("a page is a range")], page)?;
        let read = self.check_report(&armed);
        self.device.stop().map_err(DeviceLogError::Stop).and(read)
    }

    /// Starts the log of `ranges`, merged as far as the device demands.
    fn arm(&self, ranges: &[IovaRange], asked: Granule) -> Result<Armed, DeviceLogError> {
        let (Some(&first), Some(&last)) = (ranges.first(), ranges.last()) else {
            return Err(DeviceLogError::NothingMapped);
        };
        let mut search = Search::new(ranges.len(), self.max_ranges);
        let mut refusal = (0, io::Error::from_raw_os_error(libc::E2BIG));
        while let Some(count) = search.count() {
            let ranges = merged(ranges, count);
            match self.device.start(asked, &ranges) {
                Ok(bytes) => return self.armed_with(ranges, asked, bytes),
                Err(source) => {
                    search.refused(source.raw_os_error());
                    refusal = (ranges.len(), source);
                }
            }
        }
        let (ranges, source) = refusal;
        Err(DeviceLogError::Start { ranges, first, last, granule: asked, source })
    }

    fn armed_with(
        &self,
        ranges: Vec<IovaRange>,
        asked: Granule,
        bytes: u64,
    ) -> Result<Armed, DeviceLogError> {
        match Granule::new(bytes) {
            Ok(chosen) => Ok(Armed { ranges, asked, chosen, lost: false, gap: false, full: false }),
            Err(source) => {
                let _already_failing = self.device.stop();
                Err(DeviceLogError::Granule(source))
            }
        }
    }

    /// Reads the first bit of the log just started, to find out now whether reading works at all.
    fn check_report(&self, armed: &Armed) -> Result<(), DeviceLogError> {
        let Some(first) = armed.ranges.first() else { return Ok(()) };
        let bit =
            IovaRange::new(first.start(), first.len().min(armed.chosen.bytes())).expect("part of a range");
        self.device.report(bit, armed.chosen, &mut [0]).map_err(DeviceLogError::NoReport)
    }

    fn try_collect(&mut self, sink: &mut Sink<'_>) -> Result<(), DeviceLogError> {
        let Some(armed) = self.armed.as_mut() else { return Ok(()) };
        if armed.lost {
            return Err(DeviceLogError::Lost);
        }
        let mut asked =
            self.requests.take().unwrap_or_else(|| requests(&self.mapped, &armed.ranges, armed.chosen));
        if let Some(&iova) = asked.unknown.first().filter(|_| !armed.full && self.widening.is_due()) {
            self.widen_over(iova)?;
            let Some(armed) = &self.armed else { return Ok(()) };
            asked = requests(&self.mapped, &armed.ranges, armed.chosen);
        }
        if self.armed.as_mut().is_some_and(|armed| std::mem::take(&mut armed.gap)) {
            self.mapped.iter().for_each(|mapping| sink.iova_range(mapping.iova()));
        }
        let requests = asked;
        let result = self.carry_out(&requests, sink);
        self.requests = Some(requests);
        result
    }

    fn carry_out(&mut self, requests: &Requests, sink: &mut Sink<'_>) -> Result<(), DeviceLogError> {
        requests.unknown.iter().for_each(|&iova| sink.iova_range(iova));
        requests.reports.iter().try_for_each(|&iova| self.report(iova, sink))
    }

    fn report(&mut self, iova: IovaRange, sink: &mut Sink<'_>) -> Result<(), DeviceLogError> {
        let Some(Armed { chosen: granule, .. }) = self.armed else { return Ok(()) };
        let bits = usize::try_from(granule.bits_for(iova.len())).expect("a piece's bits");
        let words = zeroed(&mut self.words, bits.div_ceil(WORD_BITS));
        self.device.report(iova, granule, words).map_err(|source| DeviceLogError::Report { iova, source })?;
        mark(sink, iova, granule, words);
        Ok(())
    }

    /// Restarts a corrupt log over the same ranges; the caller marks every page dirty.
    fn rearm(&mut self) {
        let Some(armed) = self.armed.take() else { return };
        let _already_failed = self.device.stop();
        self.requests = None;
        self.armed = Some(self.armed_again(armed));
    }

    /// Restarts the stopped log over the same ranges; it is lost if the device refuses.
    fn armed_again(&self, before: Armed) -> Armed {
        match self.arm(&before.ranges, before.asked) {
            Ok(anew) => Armed { full: before.full, ..anew },
            Err(_) => Armed { lost: true, ..before },
        }
    }

    /// Restarts the log because it does not cover `iova`, which is mapped.
    ///
    /// # Errors
    /// The device refuses to log more; it logs what it did before.
    fn widen_over(&mut self, iova: IovaRange) -> Result<(), DeviceLogError> {
        self.widen().map_err(|refusal| {
            log::warn!("Cannot widen the DMA log of {}: {refusal}", self.id);
            DeviceLogError::Uncovered { iova }
        })
    }

    /// Restarts the log over what it covered and everything mapped, and from the second time on with room around; if the device refuses, over
    /// what it covered.
    ///
    /// What the device writes between stop and start is not logged, so everything mapped counts as written, once. The
    /// old log need not be read first: its pages are included.
    fn widen(&mut self) -> Result<(), DeviceLogError> {
        let Some(before) = self.armed.take() else { return Ok(()) };
        let wanted = united(before.ranges.iter().copied().chain(self.mapped_iovas()));
        let roomy = if self.widening.has_been() { with_room(&wanted) } else { Vec::new() };
        self.widening.count();
        let _start_tells = self.device.stop();
        let with_room = roomy.into_iter().find_map(|range| self.arm_over(&[range]).ok());
        let (armed, refusal) = match with_room.map_or_else(|| self.arm_over(&wanted), Ok) {
            Ok(wider) => (wider, None),
            Err(refusal) => (Armed { full: true, ..self.armed_again(before) }, Some(refusal)),
        };
        self.armed = Some(Armed { gap: true, ..armed });
        refusal.map_or(Ok(()), Err)
    }
}

/// The most ranges the kernel takes, whatever the device: a page of them.
fn kernel_max_ranges(page: Granule) -> usize {
    usize::try_from(page.bytes() / 16).expect("a page is small")
}

fn covers(ranges: &[IovaRange], iova: IovaRange) -> bool {
    ranges.iter().any(|range| range.covers(iova))
}

/// Bits one REPORT reads at most, so that its bitmap stays in a processor's cache: 256 KiB.
const REPORT_BITS: u64 = 1 << 21;

/// Words of zeros worth reading to save a request.
const GAP_WORDS: u64 = 64;

/// Works out what to read so that the bits of every mapping that the log covers come in.
fn requests(mapped: &Mapped, covered: &[IovaRange], granule: Granule) -> Requests {
    let gap = GAP_WORDS * word_bytes(granule);
    let mappings = || mapped.iter().map(|mapping| mapping.iova());
    let inside = |&armed: &IovaRange| {
        let spans = spans(mappings().filter(move |mapping| armed.covers(*mapping)), gap, u64::MAX);
        spans.into_iter().flat_map(move |span| reports(span, armed, granule))
    };
    Requests {
        reports: covered.iter().flat_map(inside).collect(),
        unknown: mappings().filter(|mapping| !covers(covered, *mapping)).collect(),
    }
}

/// Cuts `span`, a part of `armed`, into what one REPORT each reads: whole words of a bitmap that begins with `armed`, up to its end.
///
/// Some drivers (pds) clear their bitmap by the word, and drop the bits of it that were not asked for. What comes back of memory beside
/// `span` is marked like the rest.
fn reports(span: IovaRange, armed: IovaRange, granule: Granule) -> impl Iterator<Item = IovaRange> {
    let word = word_bytes(granule);
    let first = (span.start() - armed.start()) / word * word;
    let end = (span.end() - armed.start()).checked_next_multiple_of(word).unwrap_or(u64::MAX);
    let words = IovaRange::new(armed.start() + first, end.min(armed.len()) - first);
    words.expect("the words hold the span").pieces(REPORT_BITS << granule.shift())
}

/// Marks what a report of `iova` brought, past its end too, where a driver set bits in the rest of the last word.
fn mark(sink: &mut Sink<'_>, iova: IovaRange, granule: Granule, words: &[u64]) {
    let rest = usize::try_from(granule.bits_for(iova.len())).expect("a piece's bits") % WORD_BITS;
    let beyond = rest > 0 && words.last().is_some_and(|word| word >> rest != 0);
    let whole = word_bytes(granule).checked_mul(words.len() as u64);
    let told = whole.filter(|_| beyond).and_then(|bytes| IovaRange::new(iova.start(), bytes).ok());
    sink.iova_words(told.unwrap_or(iova), granule, words).expect("the words were counted for this range");
}

impl<F: DmaLogging + Send> DirtySource for DeviceLog<F> {
    fn id(&self) -> &str {
        &self.id
    }

    fn reports(&self) -> Reports {
        Reports::Devices
    }

    fn cover(&self) -> Cover {
        Cover { ranges: self.mapped.gpa_ranges(), precise: true }
    }

    fn start(&mut self, layout: &Layout, iova: &IovaMap) -> Result<(), SourceError> {
        if self.armed.is_some() {
            return Ok(());
        }
        self.mapped = Mapped::at_start(layout, iova);
        self.requests = None;
        self.widening.restart();
        let armed = self.try_start();
        self.armed = Some(armed.map_err(|cause| SourceError::new(&self.id, Operation::Start, cause))?);
        Ok(())
    }

    /// Reports what the device wrote; of mappings that the log does not cover, all.
    fn collect(&mut self, sink: &mut Sink<'_>) -> Result<(), SourceError> {
        let result = self.try_collect(sink);
        if result.is_err() {
            self.rearm();
        }
        result.map_err(|cause| SourceError::new(&self.id, Operation::Collect, cause))
    }

    /// Adds a mapping. If the log does not cover it, restarts the log and reports everything mapped once more; but not again and again: where
    /// the last restart is not long past, the mapping counts as dirty until a collect restarts the log. If the device refuses to log more,
    /// returns an error, and the mapping counts as dirty at every collect until it is removed or the log stops.
    fn mapped(&mut self, mapping: &Mapping) -> Result<(), SourceError> {
        self.mapped.add(*mapping);
        self.requests = None;
        let iova = mapping.iova();
        let Some(armed) = self.armed.as_ref().filter(|armed| !covers(&armed.ranges, iova)) else {
            return Ok(());
        };
        let widened = match armed.full {
            true => Err(DeviceLogError::Uncovered { iova }),
            false if self.widening.is_due() => self.widen_over(iova),
            false => Ok(()),
        };
        widened.map_err(|cause| SourceError::new(&self.id, Operation::Mapped, cause))
    }

    fn harvest(&self) -> Harvest {
        Harvest::AfterUnmap
    }

    fn unmapped(&mut self, mapping: &Mapping, sink: &mut Sink<'_>) -> Result<(), SourceError> {
        let mut one = Mapped::default();
        one.add(*mapping);
        let result = match &self.armed {
            Some(armed) if armed.lost => Err(DeviceLogError::Lost),
            Some(armed) => {
                if armed.gap {
                    sink.iova_range(mapping.iova());
                }
                let requests = requests(&one, &armed.ranges, armed.chosen);
                self.carry_out(&requests, sink)
            }
            None => Ok(()),
        };
        if result.is_err()
            && let Some(armed) = &mut self.armed
        {
            // The whole log is corrupt; only this mapping's part is reported here.
            armed.lost = true;
        }
        result.map_err(|cause| SourceError::new(&self.id, Operation::Unmapped, cause))
    }

    fn forget(&mut self, mapping: &Mapping) {
        self.mapped.remove(mapping.iova());
        self.requests = None;
    }

    fn stop(&mut self) -> Result<(), SourceError> {
        if self.armed.take().is_none() {
            return Ok(());
        }
        self.device
            .stop()
            .map_err(|source| SourceError::new(&self.id, Operation::Stop, DeviceLogError::Stop(source)))
    }
}

#[cfg(test)]
mod tests;
