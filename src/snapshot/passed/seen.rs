// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What memory held when it was copied: a code of a few bytes for each unit of it, made with a key that nobody else knows.
//!
//! Comparing codes takes a third of the time that digests take, and no page of what was stored has to be in memory still. They are a
//! message authentication code (AEGIS-128X4), not a checksum: no guest can write bytes that pass for those it had before.

use std::sync::OnceLock;
use std::{fmt, io};

use aegis::aegis128x4::{Aegis128X4Mac, Key, Tag};
use rustix::rand::{GetRandomFlags, getrandom};

use crate::range::{GpaRange, united};
use crate::snapshot::reserve::{index, list_of};

/// Memory that one thread looks at in one go: what stays in its processor's cache, so that it is read from memory once.
const PIECE_BYTES: u64 = 256 << 10;

/// Bytes of a code.
const CODE_BYTES: usize = 16;

/// The code of each unit that was copied as a whole.
pub(crate) struct Seen {
    key: Key,
    unit_bytes: u64,
    slots: Vec<SlotUnits>,
}

impl fmt::Debug for Seen {
    /// Keeps the key to itself.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Seen").field("unit_bytes", &self.unit_bytes).finish_non_exhaustive()
    }
}

/// Of one slot; units are counted from its first byte on.
struct SlotUnits {
    range: GpaRange,
    codes: Vec<OnceLock<Tag<CODE_BYTES>>>,
}

impl Seen {
    /// Has seen nothing of `slots` yet; codes are for `unit_bytes` each, a power of two.
    ///
    /// # Errors
    /// There is no memory for the codes, or the system has no random bytes.
    pub(crate) fn nothing(slots: impl Iterator<Item = GpaRange>, unit_bytes: u64) -> io::Result<Self> {
        let mut key = Key::default();
        let mut rest = key.as_mut_slice();
        while !rest.is_empty() {
            let got = getrandom(&mut *rest, GetRandomFlags::empty())?;
            rest = &mut rest[got..];
        }
        let slots = slots.map(|range| {
            let units = index(range.len().div_ceil(unit_bytes));
            Ok(SlotUnits { range, codes: list_of(units, std::iter::repeat_with(OnceLock::new))? })
        });
        let slots: io::Result<_> = slots.collect();
        Ok(Self { key, unit_bytes, slots: slots? })
    }

    /// Bytes to look at in one go: whole units, and few enough for a processor's cache.
    pub(crate) fn piece_bytes(&self) -> u64 {
        PIECE_BYTES.max(self.unit_bytes)
    }

    /// The whole units that hold any of `ranges`, ascending in each slot.
    pub(crate) fn units_of(&self, ranges: &[GpaRange]) -> Vec<GpaRange> {
        let of_slot = |slot: &SlotUnits| {
            let (start, end) = (slot.range.start(), slot.range.end());
            let parts = ranges.iter().filter_map(|range| range.intersection(slot.range));
            united(parts.filter_map(|part| {
                let from = (part.start() - start) / self.unit_bytes * self.unit_bytes;
                let to = (part.end() - start).next_multiple_of(self.unit_bytes);
                GpaRange::from_bounds(start + from, end.min(start.saturating_add(to))).ok()
            }))
        };
        self.slots.iter().flat_map(of_slot).collect()
    }

    /// Takes in that `range`, of whole units of one slot, holds `bytes`.
    pub(crate) fn note(&self, range: GpaRange, bytes: &[u8]) {
        for (_, bytes, code) in self.units(range, bytes) {
            // What came first was stored first, and what is stored changes only once the VM is paused.
            let _again = code.set(self.code(bytes));
        }
    }

    /// The parts of `range`, of whole units of one slot, whose `bytes` are not as they were, or were not seen; those that touch are one.
    pub(crate) fn changed(&self, range: GpaRange, bytes: &[u8]) -> Vec<GpaRange> {
        let units = self.units(range, bytes);
        united(units.filter(|(_, bytes, code)| code.get() != Some(&self.code(bytes))).map(|(unit, ..)| unit))
    }

    fn units<'a>(
        &'a self,
        range: GpaRange,
        bytes: &'a [u8],
    ) -> impl Iterator<Item = (GpaRange, &'a [u8], &'a OnceLock<Tag<CODE_BYTES>>)> {
        let slot = self.slots.iter().find(|slot| slot.range.intersection(range) == Some(range));
        let codes = slot.map_or(&[][..], |slot| {
            &slot.codes[index((range.start() - slot.range.start()) / self.unit_bytes)..]
        });
        let units = range.pieces(self.unit_bytes).zip(bytes.chunks(index(self.unit_bytes)));
        units.zip(codes).map(|((unit, bytes), code)| (unit, bytes, code))
    }

    fn code(&self, bytes: &[u8]) -> Tag<CODE_BYTES> {
        let mut mac = Aegis128X4Mac::<CODE_BYTES>::new(&self.key);
        mac.update(bytes);
        mac.finalize()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const UNIT: u64 = 64;

    fn range(start: u64, end: u64) -> GpaRange {
        GpaRange::from_bounds(start, end).unwrap()
    }

    /// Two slots, none of them of whole units, at addresses that are no multiples of one.
    fn slots() -> [GpaRange; 2] {
        [range(16, 16 + 5 * UNIT + 8), range(1000, 1000 + 3 * UNIT + 16)]
    }

    proptest! {
        #[test]
        fn a_unit_has_changed_where_a_byte_of_it_has_or_it_was_not_seen(
            copied in prop::collection::vec((0..400_u64, 1..200_u64), 0..4),
            writes in prop::collection::vec((0..1300_usize, any::<u8>()), 0..6),
        ) {
            let seen = Seen::nothing(slots().into_iter(), UNIT).unwrap();
            let memory = vec![1_u8; 1300];
            let mut later = memory.clone();
            writes.iter().for_each(|&(at, byte)| later[at] = byte);
            let bytes_of = |memory: &[u8], range: GpaRange| memory[index(range.start())..index(range.end())].to_vec();
            let ranges: Vec<_> = copied.iter().map(|&(start, length)| range(start * 3, start * 3 + length)).collect();
            let units = seen.units_of(&ranges);
            for &unit in &units {
                seen.note(unit, &bytes_of(&memory, unit));
            }
            for slot in slots() {
                let mut naive = Vec::new();
                for unit in slot.pieces(UNIT) {
                    let was_seen = units.iter().any(|seen| seen.intersection(unit) == Some(unit));
                    prop_assert_eq!(was_seen, ranges.iter().any(|range| range.intersection(unit).is_some()));
                    if !was_seen || bytes_of(&memory, unit) != bytes_of(&later, unit) {
                        naive.push(unit);
                    }
                }
                prop_assert_eq!(seen.changed(slot, &bytes_of(&later, slot)), united(naive));
            }
        }
    }

    #[test]
    fn codes_depend_on_a_key_that_is_drawn_anew() {
        let code = || Seen::nothing(slots().into_iter(), UNIT).unwrap().code(&[0; 64]);
        assert_ne!(code(), code());
    }
}
