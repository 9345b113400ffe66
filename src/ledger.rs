// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Who still needs which page: the exact union of all sources, one cursor per receiver or snapshot base.
//!
//! A page of a cursor is clean, *pending* (changed since the receiver's last copy), *in flight* (a copy is on its way), or
//! both of the latter. [`Ledger::take`] moves pending pages into flight, [`Ledger::commit`] forgets them once the receiver has
//! acknowledged, [`Ledger::roll_back`] makes them pending again.

use crate::iova::IovaMap;
use crate::layout::Layout;
use crate::range::GpaRange;
use crate::source::{Marks, Sink};

mod collection;
mod cursor;
mod terms;

pub(crate) use collection::Collection;
pub use cursor::Chunk;
pub use terms::{Attribution, ChunkLimits, CursorId, Outstanding, Start};

use collection::Spare;
use cursor::Cursor;

/// The dirty pages of a VM: what its sources reported, and what each receiver still needs of it.
///
/// ```
/// use vfio_migration::{granule::Granule, layout::Layout, ledger::*, range::GpaRange};
/// let ram = GpaRange::new(0, 1 << 20)?;
/// let mut ledger = Ledger::new(Layout::new([ram], Granule::KIB_4)?, 1);
/// let cursor = ledger.open(Start::Copied);
/// ledger.mark(GpaRange::new(0x3000, 0x2000)?);
/// ledger.begin_round(cursor);
/// let chunk = ledger.take(cursor, ChunkLimits::NONE).expect("two pages are pending");
/// assert_eq!(chunk.ranges(), [GpaRange::new(0x3000, 0x2000)?]);
/// ledger.commit(chunk);
/// assert_eq!(ledger.outstanding(cursor), Some(Outstanding::default()));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Ledger {
    layout: Layout,
    marks: Vec<Marks>,
    attribution: Vec<Attribution>,
    cursors: Vec<Cursor>,
    next_id: u64,
    spare: Spare,
}

impl Ledger {
    /// Makes a ledger for `sources` sources and no cursor.
    pub fn new(layout: Layout, sources: usize) -> Self {
        Self {
            marks: vec![Marks::new(&layout); sources],
            layout,
            attribution: vec![Attribution::default(); sources],
            cursors: Vec::new(),
            next_id: 0,
            spare: Spare::default(),
        }
    }

    /// The VM's RAM.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Opens a cursor for a receiver that holds what `start` says.
    pub fn open(&mut self, start: Start) -> CursorId {
        let id = CursorId(self.next_id);
        self.next_id += 1;
        let mut cursor = Cursor::new(id, &self.layout);
        if start == Start::Empty {
            for region in self.layout.regions() {
                cursor.mark(&self.layout, region.range());
            }
        }
        self.cursors.push(cursor);
        id
    }

    /// Closes a cursor; its chunks may still be committed or rolled back, to no effect.
    pub fn close(&mut self, cursor: CursorId) {
        self.cursors.retain(|open| open.id != cursor);
    }

    /// Whether any cursor is open.
    pub fn has_cursors(&self) -> bool {
        !self.cursors.is_empty()
    }

    /// Returns where source number `source` reports to, until the next [`Ledger::absorb`].
    ///
    /// # Panics
    /// There is no such source.
    pub fn sink<'a>(&'a mut self, source: usize, iova: &'a IovaMap) -> Sink<'a> {
        Sink::new(&self.layout, iova, &mut self.marks[source])
    }

    /// Unites what the sources marked, adds it to every cursor's pending pages, and clears the marks.
    ///
    /// One pass, block by block; untouched blocks cost a summary bit each. Allocates nothing.
    pub fn absorb(&mut self) {
        self.collection().absorb();
    }

    /// Begins a collect in which sources may lend their words.
    pub(crate) fn collection(&mut self) -> Collection<'_> {
        Collection::new(
            &self.layout,
            &mut self.marks,
            &mut self.attribution,
            &mut self.cursors,
            &mut self.spare,
        )
    }

    /// Makes the pages of `range` pending for every cursor, attributed to no source.
    pub fn mark(&mut self, range: GpaRange) {
        for cursor in &mut self.cursors {
            cursor.mark(&self.layout, range);
        }
    }

    /// Changes the RAM: every cursor keeps what it knows of what stays, and new RAM is pending for all.
    ///
    /// Nothing may be marked that was not absorbed.
    pub fn change_layout(&mut self, layout: Layout) {
        for cursor in &mut self.cursors {
            cursor.change_layout(&self.layout, &layout);
        }
        self.marks.iter_mut().for_each(|marks| *marks = Marks::new(&layout));
        self.layout = layout;
    }

    /// Makes room for one source more, which gets the next number.
    pub fn add_source(&mut self) {
        self.marks.push(Marks::new(&self.layout));
        self.attribution.push(Attribution::default());
    }

    /// Forgets source number `source`; those after it move up. Nothing may be marked that was not absorbed.
    ///
    /// # Panics
    /// There is no such source.
    pub fn remove_source(&mut self, source: usize) {
        self.marks.remove(source);
        self.attribution.remove(source);
    }

    /// What each source reported so far, by source number.
    pub fn attribution(&self) -> &[Attribution] {
        &self.attribution
    }

    /// How much the cursor's receiver still lacks; `None` once the cursor is closed.
    pub fn outstanding(&self, cursor: CursorId) -> Option<Outstanding> {
        let cursor = self.cursors.iter().find(|open| open.id == cursor)?;
        Some(cursor.outstanding(&self.layout))
    }

    /// Bytes of pages reported dirty at least once since the cursor was opened; `None` once it is closed.
    pub fn dirtied_bytes(&self, cursor: CursorId) -> Option<u64> {
        let cursor = self.cursors.iter().find(|open| open.id == cursor)?;
        Some(cursor.dirtied_bytes(&self.layout))
    }

    /// RAM plugged in since the cursor was opened, whether it is there by now or not. What was known before of what lies behind these
    /// addresses, their holes for one, may be of RAM that is gone.
    pub fn plugged(&self, cursor: CursorId) -> &[GpaRange] {
        self.cursors.iter().find(|open| open.id == cursor).map_or(&[], Cursor::plugged)
    }

    /// How often RAM was plugged in since the cursor was opened, each time at whatever address.
    pub fn plugs(&self, cursor: CursorId) -> u64 {
        self.cursors.iter().find(|open| open.id == cursor).map_or(0, Cursor::plugs)
    }

    /// Begins a round: the next [`Ledger::take`] starts again at the lowest page.
    pub fn begin_round(&mut self, cursor: CursorId) {
        if let Some(cursor) = self.cursors.iter_mut().find(|open| open.id == cursor) {
            cursor.begin_round(&self.layout);
        }
    }

    /// Takes the round's next pages into flight; `None` at the end of the round or after the cursor was closed.
    ///
    /// Chunks of one round ascend, so no page is in two of them. Pages still in flight from an earlier round are passed over
    /// and stay pending. Allocates only while the number of chunks in flight grows.
    pub fn take(&mut self, cursor: CursorId, limits: ChunkLimits) -> Option<Chunk> {
        let cursor = self.cursors.iter_mut().find(|open| open.id == cursor)?;
        cursor.take(&self.layout, limits)
    }

    /// Forgets pages that the receiver acknowledged. Pages written since they were taken stay pending.
    pub fn commit(&mut self, chunk: Chunk) {
        if let Some(cursor) = self.cursors.iter_mut().find(|open| open.id == chunk.cursor) {
            cursor.land(&self.layout, chunk);
        }
    }

    /// Makes pages pending again whose copy did not arrive, for the same receiver.
    pub fn roll_back(&mut self, chunk: Chunk) {
        if let Some(cursor) = self.cursors.iter_mut().find(|open| open.id == chunk.cursor) {
            cursor.roll_back(&self.layout, chunk);
        }
    }
}

#[cfg(test)]
mod tests;
