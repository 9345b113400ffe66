// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! From the addresses a device puts on the bus to guest-physical ones.

use std::collections::BTreeMap;

use thiserror::Error;

use crate::range::{GpaRange, IovaRange};

/// Why the journal refuses a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum IovaError {
    /// The new mapping shares IOVAs with one that stands.
    #[error("Mapping at IOVA {new} overlaps the one at {old}")]
    Overlap {
        /// IOVAs asked for.
        new: IovaRange,
        /// The mapping in the way.
        old: IovaRange,
    },
    /// The two sides of a mapping differ in length.
    #[error("Mapping of IOVA {iova} to GPA {gpa} has sides of different length")]
    Lengths {
        /// IOVA side.
        iova: IovaRange,
        /// GPA side.
        gpa: GpaRange,
    },
    /// An unmap would cut a mapping in two, which type1v2 and iommufd refuse as well.
    #[error("Unmapping IOVA {unmap} bisects the mapping at {mapping}")]
    Bisects {
        /// IOVAs to unmap.
        unmap: IovaRange,
        /// The mapping that would be cut.
        mapping: IovaRange,
    },
    /// Identity has no mappings to change: there is no virtual IOMMU.
    #[error("IOVA {iova} cannot be mapped or unmapped where IOVA equals GPA")]
    Identity {
        /// IOVAs asked for.
        iova: IovaRange,
    },
}

/// One mapping of the address space: as many bytes on both sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    iova: IovaRange,
    gpa: GpaRange,
}

impl Mapping {
    /// Maps `iova` to `gpa`.
    ///
    /// # Errors
    /// The two differ in length.
    pub fn new(iova: IovaRange, gpa: GpaRange) -> Result<Self, IovaError> {
        if iova.len() == gpa.len() { Ok(Self { iova, gpa }) } else { Err(IovaError::Lengths { iova, gpa }) }
    }

    /// Makes the mapping of `gpa` to the same IOVAs.
    pub fn identity(gpa: GpaRange) -> Self {
        let iova = IovaRange::from_bounds(gpa.start(), gpa.end()).expect("same bounds as a range");
        Self { iova, gpa }
    }

    /// IOVA side.
    pub fn iova(&self) -> IovaRange {
        self.iova
    }

    /// GPA side.
    pub fn gpa(&self) -> GpaRange {
        self.gpa
    }

    /// Returns the part of the mapping inside `iova`.
    fn part(&self, iova: IovaRange) -> Option<Self> {
        let part = self.iova.intersection(iova)?;
        let gpa = GpaRange::new(self.gpa.start() + (part.start() - self.iova.start()), part.len())
            .expect("a part of a range is a range");
        Some(Self { iova: part, gpa })
    }
}

/// Where the IOVAs of one container, page table or device lead: straight through, or as a virtual IOMMU maps them now.
///
/// Dirty bits are translated through the mappings that stand when they are read, so a mapping's bits must be read
/// before it goes ([`crate::source::DirtySource::unmapped`]).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IovaMap {
    /// IOVA equals GPA: no virtual IOMMU, or one in pass-through mode.
    Identity,
    /// The mappings that stand, by first IOVA.
    Journal(Journal),
}

impl IovaMap {
    /// Starts a journal with no mapping.
    pub fn journal() -> Self {
        Self::Journal(Journal { mappings: BTreeMap::new() })
    }

    /// Adds a mapping.
    ///
    /// # Errors
    /// It overlaps one that stands, or the map is the identity.
    pub fn map(&mut self, mapping: Mapping) -> Result<(), IovaError> {
        match self {
            Self::Identity => Err(IovaError::Identity { iova: mapping.iova }),
            Self::Journal(journal) => journal.map(mapping),
        }
    }

    /// Returns the mappings that lie wholly inside `iova`, ascending; none is changed.
    ///
    /// # Errors
    /// A mapping reaches past an end of `iova`, or the map is the identity.
    pub fn whole_mappings(&self, iova: IovaRange) -> Result<Vec<Mapping>, IovaError> {
        match self {
            Self::Identity => Err(IovaError::Identity { iova }),
            Self::Journal(journal) => journal.whole_mappings(iova),
        }
    }

    /// Drops the mapping that begins at `mapping`'s first IOVA.
    pub fn forget(&mut self, mapping: &Mapping) {
        if let Self::Journal(journal) = self {
            journal.mappings.remove(&mapping.iova.start());
        }
    }

    /// Returns where the bytes of `iova` lead now, ascending by IOVA; unmapped bytes lead nowhere.
    pub fn translate(&self, iova: IovaRange) -> impl Iterator<Item = Mapping> {
        let (straight, journal) = match self {
            Self::Identity => {
                let gpa = GpaRange::from_bounds(iova.start(), iova.end()).expect("same bounds as a range");
                (Some(Mapping::identity(gpa)), None)
            }
            Self::Journal(journal) => (None, Some(journal)),
        };
        let mapped = journal.into_iter().flat_map(move |journal| journal.overlapping(iova));
        straight.into_iter().chain(mapped.filter_map(move |mapping| mapping.part(iova)))
    }
}

/// Mappings of a virtual IOMMU's address space, disjoint in IOVA; any number may lead to the same GPA.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Journal {
    mappings: BTreeMap<u64, Mapping>,
}

impl Journal {
    /// Mappings that stand, ascending by IOVA.
    pub fn mappings(&self) -> impl Iterator<Item = &Mapping> {
        self.mappings.values()
    }

    fn map(&mut self, mapping: Mapping) -> Result<(), IovaError> {
        if let Some(old) = self.overlapping(mapping.iova).next() {
            return Err(IovaError::Overlap { new: mapping.iova, old: old.iova });
        }
        self.mappings.insert(mapping.iova.start(), mapping);
        Ok(())
    }

    fn whole_mappings(&self, iova: IovaRange) -> Result<Vec<Mapping>, IovaError> {
        let whole = |mapping: &Mapping| match iova.covers(mapping.iova) {
            true => Ok(*mapping),
            false => Err(IovaError::Bisects { unmap: iova, mapping: mapping.iova }),
        };
        self.overlapping(iova).map(whole).collect()
    }

    fn overlapping(&self, iova: IovaRange) -> impl Iterator<Item = &Mapping> {
        let before = self.mappings.range(..iova.start()).next_back().map(|(_, mapping)| mapping);
        let inside = self.mappings.range(iova.start()..iova.end()).map(|(_, mapping)| mapping);
        before.filter(move |mapping| mapping.iova.end() > iova.start()).into_iter().chain(inside)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn mapping(iova: u64, gpa: u64, len: u64) -> Mapping {
        Mapping::new(IovaRange::new(iova, len).unwrap(), GpaRange::new(gpa, len).unwrap()).unwrap()
    }

    #[test]
    fn unmapping_half_a_mapping_is_refused_and_changes_nothing() {
        let mut map = IovaMap::journal();
        map.map(mapping(0x1000, 0x8000, 0x2000)).unwrap();
        let half = IovaRange::new(0x1000, 0x1000).unwrap();
        assert!(matches!(map.whole_mappings(half), Err(IovaError::Bisects { .. })));
        assert_eq!(map.translate(half).next(), Some(mapping(0x1000, 0x8000, 0x1000)));
    }

    proptest! {
        #[test]
        fn translation_equals_a_byte_at_a_time_oracle(
            ops in prop::collection::vec((0..64u64, 1..16u64, 0..64u64, any::<bool>()), 1..30),
            start in 0..64u64, len in 1..32u64,
        ) {
            let mut map = IovaMap::journal();
            let mut oracle = vec![None; 128];
            for (iova, len, gpa, unmap) in ops {
                let range = IovaRange::new(iova, len).unwrap();
                let slots = usize::try_from(iova).unwrap()..usize::try_from(iova + len).unwrap();
                if unmap {
                    for whole in map.whole_mappings(range).unwrap_or_default() {
                        map.forget(&whole);
                        oracle[usize::try_from(whole.iova().start()).unwrap()..usize::try_from(whole.iova().end()).unwrap()].fill(None);
                    }
                } else if map.map(mapping(iova, gpa, len)).is_ok() {
                    for (offset, slot) in slots.enumerate() {
                        prop_assert_eq!(oracle[slot], None);
                        oracle[slot] = Some(gpa + offset as u64);
                    }
                }
            }
            let asked = IovaRange::new(start, len).unwrap();
            let mut found = vec![None; 128];
            for part in map.translate(asked) {
                prop_assert!(asked.covers(part.iova()));
                for offset in 0..part.iova().len() {
                    found[usize::try_from(part.iova().start() + offset).unwrap()] = Some(part.gpa().start() + offset);
                }
            }
            for iova in 0..128 {
                let expected = if asked.contains(iova) { oracle[usize::try_from(iova).unwrap()] } else { None };
                prop_assert_eq!(found[usize::try_from(iova).unwrap()], expected);
            }
        }
    }
}
