// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A world that changes while pages are tracked: mappings, RAM and sources that come and go.
//!
//! Whoever changes it calls in here under the tracker's lock, so that no collect and no take falls in between.

use super::builder::check_sources;
use super::{Attached, SpaceId, Tracker, TrackerError, check_covers, check_memory};
use crate::iova::Mapping;
use crate::range::{GpaRange, IovaRange};
use crate::source::{DirtySource, Harvest, Operation, PluggedRam, SourceError};

impl Tracker {
    /// Takes in a mapping that a virtual IOMMU has made.
    ///
    /// # Errors
    /// It overlaps one that stands, or a source would not see writes through it: take it down again, or end the migration.
    pub fn map(&mut self, space: SpaceId, mapping: Mapping) -> Result<(), TrackerError> {
        self.spaces[space.0].map(mapping)?;
        Ok(self.tell_mapped(space, &mapping)?)
    }

    /// Takes the mappings in `iova` down, with `unmap`, and reports their dirty pages: before it or after it, as each source has
    /// to be asked.
    ///
    /// A type1 container whose log is on unmaps itself. Then `unmap` is called only where the space has sources besides that
    /// read before the unmapping, page tables or devices in another process, for what the container does not take down. The IOVA is
    /// free when this returns.
    ///
    /// Returns the degradations: a mapping whose bits could not be read counts as written all over.
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

    /// Takes in RAM that is about to be used: it is in the guest memory and has its slot, and nobody writes to it yet. It is pending
    /// for every cursor.
    ///
    /// A Cloud Hypervisor at the other end refuses pages of RAM that its Config did not name: such a migration fails, and the VM
    /// runs on.
    ///
    /// # Errors
    /// It overlaps other RAM, or a source would not see writes to it. Nothing changed: do not use the RAM, or end the migration.
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

    /// Takes RAM out, with `remove`, after which nobody can write to it any more and its slot is gone. No cursor lacks it any more.
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

    /// Adds a source that reports IOVAs of `space`, with the devices whose writes it reports, where it reports devices'. It is
    /// switched on if pages are being tracked: add it before its writer may write.
    ///
    /// # Errors
    /// It does not go together with the others, see [`super::TrackerBuilder::build`], or could not be switched on.
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

    /// Says that the source `id` reports what `device` writes, too: a device that joins a container or a page table which is tracked
    /// already. Call it before the device may write.
    ///
    /// A container's bitmap that is exact because all devices in it are mediated ones is so no more with a pass-through device in it:
    /// that one takes a source of its own.
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

    /// Says that the source `id` has no more to do with `device`, which has stopped writing and left; the source goes on for the others.
    ///
    /// # Errors
    /// There is no such source, it does not report what `device` writes, or no device would be left: that takes
    /// [`Tracker::remove_source`]. Nothing changed.
    pub fn remove_device_from(&mut self, id: &str, device: &str) -> Result<(), TrackerError> {
        let index = self.index_of(id)?;
        let devices = &mut self.sources[index].devices;
        let (id, device) = (|| id.to_owned(), || device.to_owned());
        if !devices.contains(&device()) {
            return Err(TrackerError::NoSuchDevice { id: id(), device: device() });
        }
        if devices.len() == 1 {
            return Err(TrackerError::LastDevice { id: id(), device: device() });
        }
        devices.retain(|name| *name != device());
        Ok(())
    }

    fn index_of(&self, id: &str) -> Result<usize, TrackerError> {
        let index = self.sources.iter().position(|attached| attached.source.id() == id);
        index.ok_or_else(|| TrackerError::NoSuchSource { id: id.to_owned() })
    }

    /// Removes the source `id`: collects what it has to say a last time, and switches it off. Its writer has stopped writing.
    ///
    /// Returns the degradations: a source that fails has all it covers marked dirty.
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

    /// Tells the sources of a mapping. All are told, whoever fails: one that did not know of it would take it for clean.
    fn tell_mapped(&mut self, space: SpaceId, mapping: &Mapping) -> Result<(), SourceError> {
        let tracking = self.tracking;
        let mut told = Ok(());
        for attached in self.in_space(space).filter(|_| tracking) {
            told = told.and(attached.source.mapped(mapping));
        }
        told
    }

    /// Tells the sources of RAM; those of the space where IOVA equals GPA, that it is mapped there.
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

    /// Whether somebody else than a source has to take mappings of `space` down.
    fn is_unmapped_by_caller(&mut self, space: SpaceId) -> bool {
        let tracking = self.tracking;
        let is = |harvest| move |attached: &mut Attached| attached.source.harvest() == harvest;
        let by_source = tracking && self.in_space(space).any(is(Harvest::ByUnmapping));
        !by_source || self.in_space(space).any(is(Harvest::BeforeUnmap))
    }

    /// Reads the bits of mappings that go from the sources whose time it is.
    ///
    /// # Errors
    /// A source that takes them down itself could not.
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
