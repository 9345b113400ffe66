// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device proper. One lock holds all of it, so that a request sees every write either done and logged, or not begun.

use std::fs::File;

use vfio_migration::vfio_user::feature::LoggingRange;
use vfio_migration::vfio_user::message::DmaMap;

use super::Errno;
use super::config::{Behaviour, DeviceConfig, Fault};
use super::image::{Loader, Saver};
use super::internals::{BLOCK_BYTES, Blocks, Registers};
use super::log::DirtyLog;
use super::memory::DmaMemory;
use super::registers;
use super::state::State;
use super::stream::{self, MAX_WINDOWS, PAGE_BYTES, Window};

/// Most positions one write of the STEP register passes.
const MAX_STEP: u64 = 1 << 20;

/// Is the device: registers, internal state, memory, log and migration session.
#[derive(Debug)]
pub(super) struct Engine {
    config: DeviceConfig,
    registers: Registers,
    blocks: Blocks,
    memory: DmaMemory,
    log: Option<Log>,
    state: State,
    session: Session,
    page: Box<[u8; PAGE_BYTES]>,
    writes: u64,
    /// The block that changes next beside those that follow from the pages.
    next_churned: usize,
}

#[derive(Debug)]
struct Log {
    dirty: DirtyLog,
    /// Regions mapped later are logged as well.
    everything: bool,
    reports: u64,
}

#[derive(Debug)]
enum Session {
    None,
    Saving(Saver),
    Loading(Box<Loader>),
}

impl Engine {
    /// Returns a device as it is after a reset.
    pub(super) fn new(config: DeviceConfig, state_bytes: usize) -> Self {
        Engine {
            config,
            registers: Registers::default(),
            blocks: Blocks::new(state_bytes),
            memory: DmaMemory::default(),
            log: None,
            state: State::Running,
            session: Session::None,
            page: Box::new([0; PAGE_BYTES]),
            writes: 0,
            next_churned: 0,
        }
    }

    /// Returns the pages to write each second: zero while the device is off or stopped.
    pub(super) fn pages_per_second(&self) -> u64 {
        if self.registers.run && self.state.runs() { self.registers.rate } else { 0 }
    }

    /// Returns the blocks to change each second beside those that follow from the pages: zero while the device is off or stopped.
    pub(super) fn changes_per_second(&self) -> u64 {
        let runs = self.registers.run && self.state.runs();
        if runs { self.config.state_changes_per_second.div_ceil(BLOCK_BYTES as u64) } else { 0 }
    }

    /// Changes so many blocks, one after the other around.
    pub(super) fn churn(&mut self, blocks: u64) {
        debug_assert!(self.state.runs());
        for _ in 0..blocks.min(self.blocks.count() as u64) {
            self.blocks.churn(self.next_churned);
            if let Session::Saving(saver) = &mut self.session {
                saver.changed(self.next_churned);
            }
            self.next_churned = (self.next_churned + 1) % self.blocks.count();
        }
    }

    /// Passes `positions` positions of the stream, each written and logged.
    pub(super) fn advance(&mut self, positions: u64) {
        debug_assert!(self.state.runs());
        (0..positions).for_each(|_| self.pass_position());
    }

    fn pass_position(&mut self) {
        let (seed, position) = (self.registers.seed, self.registers.position);
        self.registers.position += 1;
        if let Some(block) = self.blocks.pass(seed, position)
            && let Session::Saving(saver) = &mut self.session
        {
            saver.changed(block);
        }
        let Some(iova) = stream::target(seed, self.registers.windows(), position) else {
            self.registers.missed += 1;
            return;
        };
        stream::fill_page(seed, position, iova, &mut self.page);
        if !self.memory.write_page(iova, &self.page) {
            self.registers.missed += 1;
            return;
        }
        self.writes += 1;
        let forgotten = self.config.faults.iter().any(
            |fault| matches!(fault, Fault::ForgetWrites { every } if self.writes.is_multiple_of(*every)),
        );
        if let Some(log) = self.log.as_mut().filter(|_| !forgotten) {
            log.dirty.mark(iova);
        }
    }

    pub(super) fn read_register(&self, offset: u64) -> Result<u64, Errno> {
        let registers = &self.registers;
        Ok(match offset {
            registers::ID => registers::ID_VALUE,
            registers::CONTROL => u64::from(registers.run),
            registers::SEED => registers.seed,
            registers::RATE => registers.rate,
            registers::POSITION => registers.position,
            registers::MISSED => registers.missed,
            registers::DIGEST => self.blocks.digest_with(registers),
            registers::WINDOW_COUNT => registers.window_count as u64,
            offset => {
                let (index, length) = registers::window_of(offset).ok_or(Errno(libc::EINVAL))?;
                let window = registers.windows[index];
                if length { window.length() } else { window.iova() }
            }
        })
    }

    /// Writes a register; refused while a migration holds the device still.
    pub(super) fn write_register(&mut self, offset: u64, value: u64) -> Result<(), Errno> {
        if !self.state.runs() {
            return Err(Errno(libc::EBUSY));
        }
        match offset {
            registers::CONTROL if value <= 1 => self.registers.run = value == 1,
            registers::RATE => self.registers.rate = value,
            registers::STEP if value <= MAX_STEP => self.advance(value),
            offset if self.registers.run && registers::shapes_stream(offset) => {
                return Err(Errno(libc::EBUSY));
            }
            registers::SEED => (self.registers.seed, self.registers.position) = (value, 0),
            registers::WINDOW_COUNT => {
                let count = usize::try_from(value).ok().filter(|count| *count <= MAX_WINDOWS);
                self.registers.window_count = count.ok_or(Errno(libc::EINVAL))?;
            }
            offset => self.write_window(offset, value)?,
        }
        Ok(())
    }

    fn write_window(&mut self, offset: u64, value: u64) -> Result<(), Errno> {
        let (index, length) = registers::window_of(offset).ok_or(Errno(libc::EINVAL))?;
        let window = &mut self.registers.windows[index];
        let (iova, length) = if length { (window.iova(), value) } else { (value, window.length()) };
        *window = Window::new(iova, length).ok_or(Errno(libc::EINVAL))?;
        Ok(())
    }

    pub(super) fn map(&mut self, request: &DmaMap, file: Option<File>) -> Result<(), Errno> {
        self.memory.map(request, file)?;
        match &mut self.log {
            Some(log) if log.everything => log.dirty.cover(request.iova.get(), request.size.get()),
            _ => Ok(()),
        }
    }

    pub(super) fn unmap(&mut self, iova: u64, size: u64) -> Result<(), Errno> {
        self.memory.unmap(iova, size)?;
        if let Some(log) = self.log.as_mut().filter(|log| log.everything) {
            log.dirty.uncover(iova, size);
        }
        Ok(())
    }

    /// Starts to log and returns the granule chosen.
    pub(super) fn start_logging(&mut self, page_size: u64, ranges: &[LoggingRange]) -> Result<u64, Errno> {
        let as_library = self.config.behaviour == Behaviour::LibvfioUser;
        if let Some(log) = &self.log {
            let again = as_library && log.dirty.granule() == page_size;
            return if again { Ok(page_size) } else { Err(Errno(libc::EINVAL)) };
        }
        if !page_size.is_power_of_two() {
            return Err(Errno(libc::EINVAL));
        }
        let granule = self.config.log_page_bytes.unwrap_or(page_size.max(PAGE_BYTES as u64));
        let mut dirty = DirtyLog::new(granule);
        let everything = as_library || ranges.is_empty();
        if everything {
            for region in self.memory.regions() {
                dirty.cover(region.iova(), region.size())?;
            }
        } else {
            for range in ranges {
                let (iova, length) = (range.iova.get(), range.length.get());
                if !(iova | length).is_multiple_of(page_size) {
                    return Err(Errno(libc::EINVAL));
                }
                dirty.cover(iova, length)?;
            }
        }
        self.log = Some(Log { dirty, everything, reports: 0 });
        Ok(granule)
    }

    pub(super) fn stop_logging(&mut self) {
        self.log = None;
    }

    /// Returns the bitmap of a range of the log, which is clean from then on.
    pub(super) fn report(&mut self, iova: u64, length: u64, page_size: u64) -> Result<Vec<u64>, Errno> {
        let log = self.log.as_mut().ok_or(Errno(libc::EINVAL))?;
        if self.config.behaviour == Behaviour::LibvfioUser {
            let mut regions = self.memory.regions().iter();
            let exact = regions.find(|region| region.iova() == iova && region.size() == length);
            let region = exact.ok_or(Errno(libc::EOPNOTSUPP))?;
            if !region.is_mapped() {
                return Err(Errno(libc::EINVAL));
            }
        }
        log.reports += 1;
        let broken = |fault: &Fault| matches!(fault, Fault::ReportError { after } if log.reports > *after);
        if self.config.faults.iter().any(broken) {
            return Err(Errno(libc::EIO));
        }
        log.dirty.report(iova, length, page_size)
    }

    pub(super) fn state(&self) -> State {
        self.state
    }

    /// Walks to `to`, arc by arc; on failure the device stays where the walk ended.
    pub(super) fn set_state(&mut self, to: State) -> Result<(), Errno> {
        if to == State::PreCopy && !self.config.pre_copy || self.state == State::Error || to == State::Error {
            return Err(Errno(libc::EINVAL));
        }
        while self.state != to {
            let next = self.state.step_towards(to).ok_or(Errno(libc::EINVAL))?;
            self.enter(next)?;
        }
        Ok(())
    }

    fn enter(&mut self, next: State) -> Result<(), Errno> {
        let session = std::mem::replace(&mut self.session, Session::None);
        if let Session::Loading(loader) = session {
            let Ok((registers, blocks)) = loader.finish() else {
                self.state = State::Error;
                return Err(Errno(libc::EINVAL));
            };
            (self.registers, self.blocks) = (registers, blocks);
        } else if next.saves() {
            self.session = match session {
                Session::Saving(saver) => Session::Saving(saver),
                _ => Session::Saving(Saver::new(&self.blocks)),
            };
        } else if next == State::Resuming {
            self.session = Session::Loading(Box::new(Loader::new(self.blocks.bytes())));
        }
        self.state = next;
        Ok(())
    }

    /// Returns up to `size` bytes of the state; fewer mean no more for now.
    pub(super) fn read_data(&mut self, size: usize) -> Result<Vec<u8>, Errno> {
        let Session::Saving(saver) = &mut self.session else { return Err(Errno(libc::EINVAL)) };
        let begin = saver.read_bytes();
        let stopped = self.state == State::StopCopy;
        let mut data = saver.read(size, &self.registers, &self.blocks, stopped);
        let read = data.len();
        let inside = |at: u64| usize::try_from(at.checked_sub(begin)?).ok().filter(|at| *at < read);
        for fault in &self.config.faults {
            match fault {
                Fault::DataReadError { at_byte } if inside(*at_byte).is_some() || begin > *at_byte => {
                    return Err(Errno(libc::EIO));
                }
                Fault::CorruptData { at_byte } => {
                    if let Some(at) = inside(*at_byte) {
                        data[at] ^= 1;
                    }
                }
                _ => {}
            }
        }
        Ok(data)
    }

    pub(super) fn write_data(&mut self, data: &[u8]) -> Result<(), Errno> {
        let Session::Loading(loader) = &mut self.session else { return Err(Errno(libc::EINVAL)) };
        loader.write(data);
        Ok(())
    }

    /// Resets the device: it runs, with its engine off, or stays where it is as libvfio-user does. Mapped memory and the log
    /// stay.
    pub(super) fn reset(&mut self) -> Result<(), Errno> {
        let keeps_state = self.config.behaviour == Behaviour::LibvfioUser;
        match self.state {
            State::Stop | State::StopCopy if keeps_state => return Err(Errno(libc::EINVAL)),
            State::PreCopy | State::Resuming if keeps_state => {}
            _ => self.state = State::Running,
        }
        self.registers = Registers::default();
        self.blocks = Blocks::new(self.blocks.bytes());
        self.session = Session::None;
        Ok(())
    }
}
