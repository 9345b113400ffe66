// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where the pages go.

use std::io::{self, Read};
use std::sync::Arc;

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::ahead::{Ahead, Piece, pieces};
use super::through_file::MemoryFiles;
use crate::layout::{Layout, LayoutError};
use crate::range::GpaRange;
use crate::sys::guest::populate;
use crate::transfer::connection::Connection;
use crate::transfer::frame::MemoryTable;
use crate::vm::Backing;

/// Takes the pages of the VM, from several connections at a time.
pub trait PageStore: Send + Sync {
    /// The VM's RAM; a table that names anything else is refused before [`PageStore::fill`].
    fn layout(&self) -> &Layout;

    /// Puts the bytes that `pages` brings into the ranges of `table`, in the table's order, all of them.
    ///
    /// Ranges may overlap and repeat, within a table and across tables: the bytes that come last stay.
    ///
    /// # Errors
    /// The pages cannot be kept, or `pages` failed. Part of them may be in place.
    fn fill(&self, table: &MemoryTable, pages: &mut Pages<'_>) -> io::Result<()>;
}

/// The bytes of one Memory's ranges, as they come off the connection: never more of them, and an end before the last one is
/// an error.
#[derive(Debug)]
pub struct Pages<'a> {
    connection: &'a mut Connection,
    left: u64,
    failed: bool,
}

impl<'a> Pages<'a> {
    pub(super) fn new(connection: &'a mut Connection, bytes: u64) -> Self {
        Self { connection, left: bytes, failed: false }
    }

    /// Bytes that were not read yet.
    pub fn left(&self) -> u64 {
        self.left
    }

    /// Whether it was the connection that failed, and not what was done with its bytes.
    pub(super) fn failed(&self) -> bool {
        self.failed
    }

    /// Reads the bytes of `ranges` straight into guest memory, in their order.
    ///
    /// # Errors
    /// A range is not in `memory`, they are longer than what is left, or the connection failed, stalled or ended.
    pub fn read_guest<M: GuestMemoryBackend>(
        &mut self,
        memory: &M,
        ranges: impl Iterator<Item = GpaRange> + Clone,
    ) -> io::Result<()> {
        let bytes = ranges.clone().fold(0_u64, |bytes, range| bytes.saturating_add(range.len()));
        if bytes > self.left {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "The ranges are longer than what is left",
            ));
        }
        let outcome = self.connection.receive_guest(memory, ranges);
        self.failed = outcome.is_err();
        self.left -= outcome?;
        Ok(())
    }
}

impl Read for Pages<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let wanted = bytes.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        if wanted == 0 {
            return Ok(0);
        }
        let outcome = match self.connection.read(&mut bytes[..wanted]) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            outcome => outcome,
        };
        self.failed = outcome.is_err();
        self.left -= *outcome.as_ref().unwrap_or(&0) as u64;
        outcome
    }
}

/// Keeps the pages in a VMM's guest memory.
///
/// The memory of long ranges is readied a piece ahead of their bytes, which costs the kernel less than a fault for each page
/// does. What the source leaves out stays a hole.
#[derive(Debug, Clone)]
pub struct GuestPages<M> {
    memory: Arc<M>,
    layout: Layout,
    /// `None` where page faults allocate the memory, or all of it was allocated.
    ahead: Option<Arc<Ahead>>,
}

impl<M: GuestMemoryBackend> GuestPages<M> {
    /// Keeps the pages in `memory`, all of which is the VM's RAM.
    ///
    /// # Errors
    /// `memory` has no region, or one that is not aligned to this host's pages.
    pub fn new(memory: Arc<M>) -> Result<Self, LayoutError> {
        let layout = Layout::from_guest_memory(memory.as_ref())?;
        let ahead = Some(Arc::new(Ahead::new(&layout, MemoryFiles::default())));
        Ok(Self { memory, layout, ahead })
    }

    /// Says what is behind the memory, as a sender is told: bytes for holes of memfds (and other shared files on tmpfs) are written to
    /// the file then, which takes about half the time. Their pages are mapped when somebody touches them.
    ///
    /// Leave it out where memory was advised to be of huge pages, of which a write to a file knows nothing, or where a limit on the size of files
    /// (`RLIMIT_FSIZE`) is below that of the memory's: a write beyond it ends the process by SIGXFSZ.
    #[must_use]
    pub fn backed_by(self, backing: Backing) -> Self {
        let ahead = Some(Arc::new(Ahead::new(&self.layout, MemoryFiles::new(backing))));
        Self { ahead, ..self }
    }

    /// Leaves it to page faults to allocate the memory, as bytes arrive in it.
    #[must_use]
    pub fn by_faults(self) -> Self {
        Self { ahead: None, ..self }
    }

    /// Bytes whose memory was readied ahead of what came for them: allocated, or found to be a hole to write to.
    pub fn allocated_ahead_bytes(&self) -> u64 {
        self.ahead.as_ref().map_or(0, |ahead| ahead.bytes())
    }

    /// Has the kernel allocate all of the memory now, before the first page comes.
    ///
    /// For a VM with pass-through devices: to map its RAM for them pins it, and whatever of it nobody has touched would be
    /// allocated and zeroed only then, while the VM stands still. Takes about half a second for each GiB.
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn populated(self) -> io::Result<Self> {
        let page_bytes = usize::try_from(self.layout.host_page().bytes()).expect("a page is addressable");
        for region in self.memory.iter() {
            let slice = region.as_volatile_slice().map_err(io::Error::other)?;
            populate(&slice, page_bytes)?;
        }
        Ok(self.by_faults())
    }
}

impl<M: GuestMemoryBackend + Send + Sync> PageStore for GuestPages<M> {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn fill(&self, table: &MemoryTable, pages: &mut Pages<'_>) -> io::Result<()> {
        let memory = self.memory.as_ref();
        let Some(ahead) = &self.ahead else { return pages.read_guest(memory, table.ranges()) };
        let mut buffer = Vec::new();
        for piece in pieces(table.ranges()) {
            match piece {
                Piece::Short(ranges) => pages.read_guest(memory, ranges.into_iter())?,
                Piece::Long(range) => match ahead.ready(memory, range) {
                    Some(hole) => hole.fill(memory, pages, &mut buffer)?,
                    None => pages.read_guest(memory, std::iter::once(range))?,
                },
            }
        }
        Ok(())
    }
}
