// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A source whose reports are thrown away, for a demo that must fail.

use vfio_migration::iova::{IovaMap, Mapping};
use vfio_migration::layout::Layout;
use vfio_migration::range::GpaRange;
use vfio_migration::source::{Cover, DirtySource, Reports, Sink, SourceError};

/// Passes everything on but the reports.
pub(super) struct Forgetful {
    source: Box<dyn DirtySource>,
}

impl Forgetful {
    pub(super) fn new(source: Box<dyn DirtySource>) -> Self {
        Self { source }
    }
}

impl DirtySource for Forgetful {
    fn id(&self) -> &str {
        self.source.id()
    }

    fn reports(&self) -> Reports {
        self.source.reports()
    }

    fn cover(&self) -> Cover {
        self.source.cover()
    }

    fn start(&mut self, layout: &Layout, iova: &IovaMap) -> Result<(), SourceError> {
        self.source.start(layout, iova)
    }

    fn collect(&mut self, _sink: &mut Sink<'_>) -> Result<(), SourceError> {
        Ok(())
    }

    fn before_read(&mut self, chunk: &[GpaRange]) -> Result<(), SourceError> {
        self.source.before_read(chunk)
    }

    fn mapped(&mut self, mapping: &Mapping) -> Result<(), SourceError> {
        self.source.mapped(mapping)
    }

    fn unmapped(&mut self, _mapping: &Mapping, _sink: &mut Sink<'_>) -> Result<(), SourceError> {
        Ok(())
    }

    fn stop(&mut self) -> Result<(), SourceError> {
        self.source.stop()
    }
}
