// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! DMA logging of a device in another process: what the device itself wrote.

use std::time::{Duration, Instant};

use thiserror::Error;

use super::{Cover, DirtySource, Operation, Reports, ShortBitmap, Sink, SourceError};
use crate::error::Chain;
use crate::granule::Granule;
use crate::iova::{IovaMap, Mapping};
use crate::layout::Layout;
use crate::range::{GpaRange, IovaRange};
use crate::vfio_user::feature::{FEATURE_GET, FEATURE_SET, Feature, MAX_LOGGING_RANGES};
use crate::vfio_user::{self, Client, SharedClient};

/// Why a vfio-user device's log cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum VfioUserSourceError {
    /// A request failed.
    #[error(transparent)]
    Client(#[from] vfio_user::Error),
    /// The device does not log its DMA.
    #[error("vfio-user device {device} does not log its DMA")]
    NoLogging {
        /// The device's name.
        device: String,
    },
    /// The log is off, or was lost in an earlier failure.
    #[error("DMA log of vfio-user device {device} is not running")]
    NotRunning {
        /// The device's name.
        device: String,
    },
    /// The device logs only what was mapped when its log was switched on, and does not take a log of everything.
    #[error("vfio-user device {device} does not log {iova}, mapped after its log was switched on")]
    MappedLater {
        /// The device's name.
        device: String,
        /// The mapping.
        iova: IovaRange,
    },
    /// The device took longer than the limit to report its log.
    #[error("vfio-user device {device} did not report its log within {} s", .limit.as_secs())]
    Slow {
        /// The device's name.
        device: String,
        /// The time for all requests of one report together.
        limit: Duration,
    },
    /// The device's bitmap is too short.
    #[error(transparent)]
    Bitmap(#[from] ShortBitmap),
}

/// How long the requests of one report may take together; past it no other is begun.
const REPORT_LIMIT: Duration = Duration::from_secs(20);

impl VfioUserSourceError {
    /// Whether the connection to the device carries no more requests.
    fn is_for_good(&self) -> bool {
        matches!(self, Self::Client(error) if !error.leaves_connection_usable())
    }
}

/// The DMA log of one vfio-user device, over all memory its client mapped for it.
///
/// Each REPORT names exactly the range of one DMA_MAP, since some servers accept nothing else; only a bitmap over the
/// server's limit is read in pieces. After a failed report the log is restarted: its content is lost, as the error
/// says, and the next report is valid again.
///
/// The log covers what was mapped when it started. For a later mapping, such as plugged-in RAM, it is restarted over
/// everything, and everything mapped counts as written once.
#[derive(Debug)]
pub struct VfioUserSource {
    id: String,
    client: SharedClient,
    on: bool,
    /// What the device chose when its log was switched on; none while it does not run.
    granule: Option<Granule>,
    host_page: Granule,
    /// What START named; none logs everything.
    logged: Option<Vec<IovaRange>>,
    /// The log was restarted since the last report and lacks what was written meanwhile.
    gap: bool,
    /// The pages any IOVA may lead to, when IOVAs are not GPAs.
    ram: Option<Vec<GpaRange>>,
}

impl VfioUserSource {
    /// Makes the source; the log is off until [`DirtySource::start`].
    ///
    /// # Errors
    /// The device does not support DMA logging, or does not answer.
    pub fn new(id: impl Into<String>, client: SharedClient) -> Result<Self, VfioUserSourceError> {
        {
            let client = &mut *vfio_user::lock(&client);
            let needed = [
                (Feature::DmaLoggingStart, FEATURE_SET),
                (Feature::DmaLoggingStop, FEATURE_SET),
                (Feature::DmaLoggingReport, FEATURE_GET),
            ];
            for (feature, methods) in needed {
                if !client.supports(feature, methods)? {
                    return Err(VfioUserSourceError::NoLogging { device: client.device().to_owned() });
                }
            }
        }
        Ok(Self {
            id: id.into(),
            client,
            on: false,
            granule: None,
            host_page: Granule::KIB_4,
            logged: None,
            gap: false,
            ram: None,
        })
    }

    fn failed(&self, operation: Operation, cause: impl Into<VfioUserSourceError>) -> SourceError {
        let cause = cause.into();
        let gone = cause.is_for_good();
        SourceError::new(&self.id, operation, cause).or_gone(gone)
    }

    /// Switches the log on over what is mapped now, or over everything.
    fn arm(&mut self) -> Result<(), vfio_user::Error> {
        let mut client = vfio_user::lock(&self.client);
        if let Some(logged) = &mut self.logged {
            logged.clear();
            logged.extend_from_slice(client.writeable_ranges());
        }
        let ranges = self.logged.as_deref().unwrap_or_default();
        self.granule = Some(client.start_dma_logging(self.host_page, ranges)?);
        Ok(())
    }

    fn disarm(&mut self) -> Result<(), vfio_user::Error> {
        self.granule = None;
        vfio_user::lock(&self.client).stop_dma_logging()
    }

    /// Starts the log anew over everything, for a mapping that it does not cover; where the device refuses, as it was.
    ///
    /// What the device writes between stop and start is not logged, so all that is mapped counts as written, once.
    fn widen(&mut self, iova: IovaRange) -> Result<(), VfioUserSourceError> {
        let before = self.logged.take();
        self.gap = true;
        let _start_tells = self.disarm();
        match self.arm() {
            Ok(()) => return Ok(()),
            Err(gone) if !gone.leaves_connection_usable() => return Err(gone.into()),
            Err(refusal) => log::warn!("{} logs no more than before: {}", self.id, Chain(&refusal)),
        }
        self.logged = before;
        let _next_report_says_so = self.arm();
        let device = vfio_user::lock(&self.client).device().to_owned();
        Err(VfioUserSourceError::MappedLater { device, iova })
    }

    /// Reports every mapped range; a failure starts the log anew, unless the device is found to be gone.
    fn report(&mut self, sink: &mut Sink<'_>) -> Result<(), VfioUserSourceError> {
        let Err(failure) = self.try_report(None, sink) else { return Ok(()) };
        if self.on && !failure.is_for_good() {
            let _log_known_lost = self.disarm();
            match self.arm().map_err(VfioUserSourceError::from) {
                Err(gone) if gone.is_for_good() => return Err(gone),
                _next_report_says_so => {}
            }
        }
        Err(failure)
    }

    /// Reports the mapped ranges that share IOVAs with `within`, or all.
    fn try_report(&self, within: Option<IovaRange>, sink: &mut Sink<'_>) -> Result<(), VfioUserSourceError> {
        let client = &mut *vfio_user::lock(&self.client);
        let Some(chosen) = self.granule else {
            return Err(VfioUserSourceError::NotRunning { device: client.device().to_owned() });
        };
        let deadline = Instant::now() + REPORT_LIMIT;
        for index in 0..client.writeable_ranges().len() {
            let range = client.writeable_ranges()[index];
            if within.is_none_or(|within| within.intersection(range).is_some()) {
                report_range(client, range, self.granule_for(range, chosen), deadline, sink)?;
            }
        }
        Ok(())
    }

    /// Returns the granule to report `range` at: the log's own, unless the range is not made of such granules.
    fn granule_for(&self, range: IovaRange, chosen: Granule) -> Granule {
        let fits = chosen.is_aligned(range.start() | range.len());
        if fits { chosen } else { self.host_page }
    }
}

fn report_range(
    client: &mut Client,
    range: IovaRange,
    granule: Granule,
    deadline: Instant,
    sink: &mut Sink<'_>,
) -> Result<(), VfioUserSourceError> {
    for piece in range.pieces(client.report_bytes(granule)) {
        if Instant::now() >= deadline {
            return Err(VfioUserSourceError::Slow {
                device: client.device().to_owned(),
                limit: REPORT_LIMIT,
            });
        }
        let words = client.report_dma_log(piece, granule)?;
        sink.iova_words(piece, granule, words)?;
    }
    Ok(())
}

impl DirtySource for VfioUserSource {
    fn id(&self) -> &str {
        &self.id
    }

    fn reports(&self) -> Reports {
        Reports::Devices
    }

    fn cover(&self) -> Cover {
        let identical = |range: &IovaRange| {
            GpaRange::from_bounds(range.start(), range.end()).expect("same bounds as a range")
        };
        let ranges = self.ram.clone().unwrap_or_else(|| {
            vfio_user::lock(&self.client).writeable_ranges().iter().map(identical).collect()
        });
        Cover { ranges, precise: true }
    }

    fn start(&mut self, layout: &Layout, iova: &IovaMap) -> Result<(), SourceError> {
        self.host_page = layout.host_page();
        let fixed = *iova == IovaMap::Identity;
        let fits = vfio_user::lock(&self.client).writeable_ranges().len() <= MAX_LOGGING_RANGES as usize;
        self.logged = (fixed && fits).then(Vec::new);
        self.ram = (!fixed).then(|| layout.regions().iter().map(|region| region.range()).collect());
        self.gap = false;
        self.arm().map_err(|cause| self.failed(Operation::Start, cause))?;
        self.on = true;
        Ok(())
    }

    fn collect(&mut self, sink: &mut Sink<'_>) -> Result<(), SourceError> {
        if std::mem::take(&mut self.gap) {
            vfio_user::lock(&self.client).writeable_ranges().iter().for_each(|&iova| sink.iova_range(iova));
        }
        self.report(sink).map_err(|cause| self.failed(Operation::Collect, cause))
    }

    fn mapped(&mut self, mapping: &Mapping) -> Result<(), SourceError> {
        let iova = mapping.iova();
        let logged = self.logged.as_ref().is_none_or(|logged| logged.iter().any(|range| range.covers(iova)));
        if !self.on || logged {
            return Ok(());
        }
        self.widen(iova).map_err(|cause| self.failed(Operation::Mapped, cause))
    }

    fn unmapped(&mut self, mapping: &Mapping, sink: &mut Sink<'_>) -> Result<(), SourceError> {
        if !self.on {
            return Ok(());
        }
        if self.gap {
            sink.iova_range(mapping.iova());
        }
        let reported = self.try_report(Some(mapping.iova()), sink);
        if reported.is_err() {
            // The whole log is lost, of which only this mapping's part is told here: the next collect fails, and starts it anew.
            self.granule = None;
        }
        reported.map_err(|cause| self.failed(Operation::Unmapped, cause))
    }

    fn stop(&mut self) -> Result<(), SourceError> {
        if !std::mem::take(&mut self.on) {
            return Ok(());
        }
        self.disarm().map_err(|cause| self.failed(Operation::Stop, cause))
    }
}
