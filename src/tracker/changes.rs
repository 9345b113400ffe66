// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Changes of the VM while pages are tracked: mappings, RAM and sources are added and removed.
//!
//! The VMM makes these calls under the tracker's lock, so no collect and no take can fall in between.

use super::builder::check_sources;
use super::{Attached, SpaceId, Tracker, TrackerError, check_covers, check_memory};
use crate::iova::Mapping;
use crate::range::{GpaRange, IovaRange};
use crate::source::{DirtySource, Harvest, Operation, PluggedRam, SourceError};

impl Tracker {
    /// Adds a mapping that a virtual IOMMU has made.
    ///
    /// # Errors
    /// It overlaps an existing mapping, or a source would not see writes through it: unmap it again, or end the
    /// migration.
    pub fn map(&mut self, space: SpaceId, mapping: Mapping) -> Result<(), TrackerError> {
        self.spaces[space.0].map(mapping)?;
        Ok(self.tell_mapped(space, &mapping)?)
    }

    /// Removes the mappings in `iova` by calling `unmap`, and collects their dirty pages before or after that call,
    /// as each source requires.
    ///
    /// A type1 container whose log is on is unmapped by its source. `unmap` is then called only if the space also has
    /// sources that must be read before the unmapping (page tables, devices in another process), to unmap what the
    /// container does not. The IOVA is free when this returns.
    ///
    /// Returns the degradations: if a mapping's bits could not be read, all its pages count as written.
    ///
    /// # Errors
    /// `iova` would cut a mapping in two, or `unmap` or a container failed: the mappings and the bits behind them stay.
    pub fn unmap<E: From<TrackerError>>(
        &mut self,
        space: SpaceId,
        iova: IovaRange,
        unmap: impl FnOnce() -> Result<(), E>,
    ) -> Result<Vec<SourceError>, E> {
        let going = self.spaces[space.0].whole_mappings(iova).map_err(TrackerError::from)?;
        let mut degradations = Vec::new();
        self.harvest(space, &going, Harvest::BeforeUnmap, &mut degradations)?;
        if self.is_unmapped_by_caller(space) {
            unmap()?;
        }
        self.harvest(space, &going, Harvest::ByUnmapping, &mut degradations)?;
        self.harvest(space, &going, Harvest::AfterUnmap, &mut degradations)?;
        for mapping in &going {
            self.spaces[space.0].forget(mapping);
            self.in_space(space).for_each(|attached| attached.source.forget(mapping));
        }
        Ok(degradations)
    }

    /// Adds RAM that is about to be used: it is part of the guest memory and has its memory slot, and nobody writes
    /// to it yet. It is pending for every cursor.
    ///
    /// A Cloud Hypervisor at the other end refuses pages of RAM that its Config did not name: such a migration fails, and the VM
    /// runs on.
    ///
    /// # Errors
    /// It overlaps other RAM, or a source would not see writes to it. Nothing changed: leave the RAM unused, or end
    /// the migration.
    pub fn add_ram(&mut self, ram: &PluggedRam) -> Result<(), TrackerError> {
        let layout = self.layout().with(ram.gpa)?;
        let told = self.tell_plugged(ram).map_err(TrackerError::from).and_then(|()| {
            let Some(mappings) = &self.mappings else { return Ok(()) };
            let mappings = mappings();
            // What devices reach of it they are given afterwards.
            check_memory(&layout, &mappings.ram, &mappings.absent)?;
            Ok(check_covers(&layout, &self.sources, &mappings)?)
        });
        match told {
            Ok(()) => self.ledger.change_layout(layout),
            Err(_) => self.tell_unplugged(ram.gpa),
        }
        told
    }

    /// Removes RAM by calling `remove`, after which nobody can write to it and its memory slot is gone. It is pending
    /// for no cursor from then on.
    ///
    /// # Errors
    /// `gpa` is not one or more whole regions, nothing would be left, or `remove` failed: nothing changed.
    pub fn remove_ram<E: From<TrackerError>>(
        &mut self,
        gpa: GpaRange,
        remove: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        let layout = self.layout().without(gpa).map_err(TrackerError::from)?;
        remove()?;
        self.tell_unplugged(gpa);
        self.ledger.change_layout(layout);
        Ok(())
    }

    /// Adds a source that reports IOVAs of `space`; `devices` are those whose writes it reports, none for other
    /// writers. It is started if pages are being tracked: add it before its writer may write.
    ///
    /// # Errors
    /// It conflicts with another source, see [`super::TrackerBuilder::build`], or could not be started.
    pub fn add_source(
        &mut self,
        space: SpaceId,
        devices: impl IntoIterator<Item = impl Into<String>>,
        source: Box<dyn DirtySource>,
    ) -> Result<(), TrackerError> {
        let devices = devices.into_iter().map(Into::into).collect();
        self.sources.push(Attached::new(space, devices, source));
        let checked = check_sources(&self.sources, self.allow_imprecise, self.mappings.is_some());
        let started = checked.and_then(|()| self.start_last());
        match started {
            Ok(()) => self.ledger.add_source(),
            Err(_) => drop(self.sources.pop()),
        }
        started
    }

    /// Adds `device` to those whose writes the source `id` reports: the device joins a container or page table that
    /// is already tracked. Call it before the device may write.
    ///
    /// A container's bitmap is exact only while all its devices are mediated. A pass-through device in it needs a
    /// source of its own.
    ///
    /// # Errors
    /// There is no such source, it sees only devices of its own ([`DirtySource::devices_may_join`]), or it would not go together with the
    /// others for this device: nothing changed.
    pub fn add_device_to(&mut self, id: &str, device: impl Into<String>) -> Result<(), TrackerError> {
        let (index, device) = (self.index_of(id)?, device.into());
        if self.sources[index].devices.contains(&device) {
            return Ok(());
        }
        if !self.sources[index].source.devices_may_join() {
            return Err(TrackerError::CannotJoin { id: id.to_owned(), device });
        }
        self.sources[index].devices.push(device);
        check_sources(&self.sources, self.allow_imprecise, self.mappings.is_some()).inspect_err(|_| {
            self.sources[index].devices.pop();
        })
    }

    /// Removes `device`, which has stopped writing, from those whose writes the source `id` reports; the source goes
    /// on for the others.
    ///
    /// # Errors
    /// There is no such source, it does not report what `device` writes, or no device would be left: use
    /// [`Tracker::remove_source`] then. Nothing changed.
    pub fn remove_device_from(&mut self, id: &str, device: &str) -> Result<(), TrackerError> {
        let index = self.index_of(id)?;
        let devices = &mut self.sources[index].devices;
        let Some(at) = devices.iter().position(|name| name == device) else {
            return Err(TrackerError::NoSuchDevice { id: id.to_owned(), device: device.to_owned() });
        };
        if devices.len() == 1 {
            return Err(TrackerError::LastDevice { id: id.to_owned(), device: device.to_owned() });
        }
        devices.remove(at);
        Ok(())
    }

    fn index_of(&self, id: &str) -> Result<usize, TrackerError> {
        let index = self.sources.iter().position(|attached| attached.source.id() == id);
        index.ok_or_else(|| TrackerError::NoSuchSource { id: id.to_owned() })
    }

    /// Removes the source `id` after a last collect, and stops it. Its writer has stopped writing.
    ///
    /// Returns the degradations: if the source fails, all memory it covers is marked dirty.
    ///
    /// # Errors
    /// There is no such source.
    pub fn remove_source(&mut self, id: &str) -> Result<Vec<SourceError>, TrackerError> {
        let index = self.index_of(id)?;
        let mut degradations = Vec::new();
        if self.tracking {
            degradations.extend(self.collect_from(|attached| attached.source.id() == id));
            degradations.extend(self.sources[index].source.stop().err());
        }
        self.sources.remove(index);
        self.ledger.remove_source(index);
        Ok(degradations)
    }

    fn start_last(&mut self) -> Result<(), TrackerError> {
        let Some(Attached { source, space, .. }) = self.sources.last_mut().filter(|_| self.tracking) else {
            return Ok(());
        };
        Ok(source.start(self.ledger.layout(), &self.spaces[space.0])?)
    }

    fn in_space(&mut self, space: SpaceId) -> impl Iterator<Item = &mut Attached> {
        self.sources.iter_mut().filter(move |attached| attached.space == space)
    }

    /// Tells all sources of a mapping, even if one fails: a source that does not know the mapping would report it
    /// clean.
    fn tell_mapped(&mut self, space: SpaceId, mapping: &Mapping) -> Result<(), SourceError> {
        let tracking = self.tracking;
        let mut told = Ok(());
        for attached in self.in_space(space).filter(|_| tracking) {
            told = told.and(attached.source.mapped(mapping));
        }
        told
    }

    /// Tells all sources of new RAM, and those of the identity space that it is mapped there.
    fn tell_plugged(&mut self, ram: &PluggedRam) -> Result<(), SourceError> {
        for attached in &mut self.sources {
            attached.source.plugged(ram)?;
        }
        self.tell_mapped(SpaceId::IDENTITY, &Mapping::identity(ram.gpa))
    }

    fn tell_unplugged(&mut self, gpa: GpaRange) {
        for attached in &mut self.sources {
            attached.source.unplugged(gpa);
        }
        self.in_space(SpaceId::IDENTITY).for_each(|attached| attached.source.forget(&Mapping::identity(gpa)));
    }

    /// Whether the caller has to unmap in `space`, rather than a source.
    fn is_unmapped_by_caller(&mut self, space: SpaceId) -> bool {
        let tracking = self.tracking;
        let is = |harvest| move |attached: &mut Attached| attached.source.harvest() == harvest;
        let by_source = tracking && self.in_space(space).any(is(Harvest::ByUnmapping));
        !by_source || self.in_space(space).any(is(Harvest::BeforeUnmap))
    }

    /// Reads the bits of mappings about to be removed, from the sources that are read at this point.
    ///
    /// # Errors
    /// A source that unmaps by itself could not do so.
    fn harvest(
        &mut self,
        space: SpaceId,
        going: &[Mapping],
        when: Harvest,
        degradations: &mut Vec<SourceError>,
    ) -> Result<(), TrackerError> {
        let mut stands = None;
        let tracking = self.tracking;
        let asked =
            |attached: &Attached| tracking && attached.space == space && attached.source.harvest() == when;
        for (index, attached) in self.sources.iter_mut().enumerate().filter(|(_, attached)| asked(attached)) {
            for mapping in going {
                let mut sink = self.ledger.sink(index, &self.spaces[space.0]);
                match attached.source.unmapped(mapping, &mut sink) {
                    Ok(()) => {}
                    Err(error) if error.operation == Operation::Unmap => stands = stands.or(Some(error)),
                    Err(error) => {
                        sink.gpa_range(mapping.gpa());
                        degradations.push(error);
                    }
                }
            }
        }
        self.ledger.absorb();
        stands.map_or(Ok(()), |error| Err(error.into()))
    }
}
