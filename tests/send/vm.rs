// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A VM of threads that write memory, and sources and devices that fail on demand.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vfio_migration::device::{
    Capabilities, DataRead, Device, DeviceError, DeviceIo, DeviceOperation, DeviceSet, DeviceState,
    PrecopyInfo,
};
use vfio_migration::iova::IovaMap;
use vfio_migration::layout::Layout;
use vfio_migration::range::GpaRange;
use vfio_migration::source::{Cover, DirtySource, GuestMemoryLog, Operation, Reports, Sink, SourceError};
use vfio_migration::tracker::{Tracker, TrackerBuilder, VmMappings};
use vfio_migration::vm::{Backing, Captured, Vm, VmError};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vm_migration::Snapshot;

pub(crate) type Memory = GuestMemoryMmap<AtomicBitmap>;

pub(crate) const PAGE: u64 = 4096;
pub(crate) const LOW: (u64, u64) = (0, 4 << 20);
pub(crate) const HIGH: (u64, u64) = (4 << 30, 2 << 20);
pub(crate) const PAGES: u64 = (LOW.1 + HIGH.1) / PAGE;

/// What happened, in order.
pub(crate) type Log = Arc<Mutex<Vec<String>>>;

pub(crate) fn note(log: &Log, what: impl Into<String>) {
    log.lock().unwrap().push(what.into());
}

pub(crate) fn page_gpa(index: u64) -> u64 {
    let low_pages = LOW.1 / PAGE;
    if index < low_pages { index * PAGE } else { HIGH.0 + (index - low_pages) * PAGE }
}

pub(crate) fn empty_memory() -> Memory {
    let regions = [LOW, HIGH].map(|(start, len)| (GuestAddress(start), usize::try_from(len).unwrap()));
    Memory::from_ranges(&regions).unwrap()
}

/// Memory in memfds that are one hole.
pub(crate) fn sparse_memory() -> Memory {
    let regions = [LOW, HIGH].map(|(start, len)| {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let file = std::fs::File::from(rustix::fs::memfd_create("guest-ram", flags).unwrap());
        file.set_len(len).unwrap();
        (GuestAddress(start), usize::try_from(len).unwrap(), Some(FileOffset::new(file, 0)))
    });
    Memory::from_ranges_with_files(&regions).unwrap()
}

pub(crate) fn read_page(memory: &Memory, index: u64) -> Vec<u8> {
    let mut bytes = vec![0; PAGE as usize];
    memory.read_slice(&mut bytes, GuestAddress(page_gpa(index))).unwrap();
    bytes
}

/// A VM whose one vCPU writes at random, `writes_per_ms` times.
pub(crate) struct FakeVm {
    pub(crate) memory: Arc<Memory>,
    pub(crate) log: Log,
    pub(crate) can_throttle: bool,
    pub(crate) fail_state: bool,
    pub(crate) config: &'static str,
    /// Notes when it lets go of its locks, and when it takes them back.
    pub(crate) locks: bool,
    /// How long pausing takes, and capturing.
    pub(crate) takes: Duration,
    running: Arc<Mutex<bool>>,
    over: Arc<AtomicBool>,
    pub(crate) steps: Arc<AtomicU64>,
    writer: Option<JoinHandle<()>>,
}

impl FakeVm {
    pub(crate) fn new(writes_per_ms: u64) -> Self {
        let memory = empty_memory();
        for page in 0..PAGES {
            memory.write_obj(page ^ 0x5eed, GuestAddress(page_gpa(page))).unwrap();
        }
        Self::with_memory(memory, writes_per_ms)
    }

    pub(crate) fn with_memory(memory: Memory, writes_per_ms: u64) -> Self {
        let mut vm = Self {
            memory: Arc::new(memory),
            log: Log::default(),
            can_throttle: false,
            fail_state: false,
            config: r#"{"vm_config":{"memory":{}}}"#,
            locks: false,
            takes: Duration::ZERO,
            running: Arc::new(Mutex::new(true)),
            over: Arc::default(),
            steps: Arc::default(),
            writer: None,
        };
        if writes_per_ms > 0 {
            vm.writer = Some(vm.spawn_writer(writes_per_ms));
        }
        vm
    }

    fn spawn_writer(&self, writes_per_ms: u64) -> JoinHandle<()> {
        let (memory, running) = (Arc::clone(&self.memory), Arc::clone(&self.running));
        let (over, steps) = (Arc::clone(&self.over), Arc::clone(&self.steps));
        thread::spawn(move || {
            let mut random = 0x9e37_79b9_7f4a_7c15_u64;
            while !over.load(Ordering::Relaxed) {
                if *running.lock().unwrap() {
                    // Held while writing, so that a pause is over only when the last write is.
                    let _running = running.lock().unwrap();
                    if *_running {
                        for _ in 0..writes_per_ms {
                            random ^= random << 13;
                            random ^= random >> 7;
                            random ^= random << 17;
                            let gpa = page_gpa(random % PAGES) + (random >> 32) % 512 * 8;
                            memory.write_obj(random, GuestAddress(gpa)).unwrap();
                            steps.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                }
                thread::sleep(Duration::from_millis(1));
            }
        })
    }

    /// What another writer of the VM's memory needs.
    pub(crate) fn writes(&self) -> Writes {
        Writes { memory: Arc::clone(&self.memory), running: Arc::clone(&self.running) }
    }

    pub(crate) fn is_running(&self) -> bool {
        *self.running.lock().unwrap()
    }

    /// Whether the vCPU makes progress.
    pub(crate) fn makes_progress(&self) -> bool {
        let before = self.steps.load(Ordering::Relaxed);
        (0..500).any(|_| {
            thread::sleep(Duration::from_millis(2));
            self.steps.load(Ordering::Relaxed) > before
        })
    }

    pub(crate) fn builder(&self) -> TrackerBuilder {
        let layout = Layout::from_guest_memory(&*self.memory).unwrap();
        let memory = Arc::clone(&self.memory);
        Tracker::builder(layout)
            .mappings(move || VmMappings::of_memory(&*memory))
            .allow_imprecise()
            .source(Box::new(GuestMemoryLog::new(Arc::clone(&self.memory))))
    }

    pub(crate) fn machine(&self) -> Machine {
        self.builder().build().unwrap().into()
    }

    pub(crate) fn page(&self, index: u64) -> Vec<u8> {
        read_page(&self.memory, index)
    }
}

/// What a VM's sender shares with the VMM.
pub(crate) struct Machine {
    pub(crate) tracker: Mutex<Tracker>,
    pub(crate) devices: Mutex<DeviceSet>,
}

impl From<Tracker> for Machine {
    fn from(tracker: Tracker) -> Self {
        Self { tracker: Mutex::new(tracker), devices: Mutex::default() }
    }
}

impl Machine {
    pub(crate) fn with_device(self, device: Device) -> Self {
        Self { devices: Mutex::new(DeviceSet::new(vec![device]).unwrap()), ..self }
    }
}

/// Writes a VM's memory while it runs, from any thread.
pub(crate) struct Writes {
    memory: Arc<Memory>,
    running: Arc<Mutex<bool>>,
}

impl Writes {
    pub(crate) fn while_running(&self, write: impl FnOnce(&Memory)) {
        let running = self.running.lock().unwrap();
        if *running {
            write(&self.memory);
        }
    }
}

impl Drop for FakeVm {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(writer) = self.writer.take() {
            writer.join().unwrap();
        }
    }
}

impl Vm for FakeVm {
    type Memory = Memory;

    fn memory(&self) -> Arc<Memory> {
        Arc::clone(&self.memory)
    }

    fn backing(&self) -> Backing {
        Backing::of_mmap(&self.memory)
    }

    fn config(&mut self) -> Result<Vec<u8>, VmError> {
        Ok(self.config.as_bytes().to_vec())
    }

    fn pause(&mut self) -> Result<(), VmError> {
        note(&self.log, "pause");
        thread::sleep(self.takes);
        *self.running.lock().unwrap() = false;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        note(&self.log, "resume");
        *self.running.lock().unwrap() = true;
        Ok(())
    }

    /// Writes a page while it captures, as a VMM may.
    fn state(&mut self, devices: Snapshot) -> Result<Captured, VmError> {
        note(&self.log, "state");
        thread::sleep(self.takes);
        if self.fail_state {
            return Err("no state today".into());
        }
        self.memory.write_obj(0xc4c4_c4c4_u64, GuestAddress(page_gpa(3)))?;
        let mut snapshot = Snapshot::default();
        snapshot.add_snapshot("devices".into(), devices);
        Ok(snapshot.into())
    }

    fn release(&mut self) -> Result<(), VmError> {
        if self.locks {
            note(&self.log, "release");
        }
        Ok(())
    }

    fn reclaim(&mut self) -> Result<(), VmError> {
        if self.locks {
            note(&self.log, "reclaim");
        }
        Ok(())
    }

    fn can_throttle(&self) -> bool {
        self.can_throttle
    }

    fn throttle(&mut self, percent: u8) {
        note(&self.log, format!("throttle {percent}"));
    }
}

/// What a [`ScriptedSource`] does at one collect.
pub(crate) enum Report {
    Pages(std::ops::Range<u64>),
    Fail,
    Gone,
}

/// A source that says what its script says, and nothing once that is over.
pub(crate) struct ScriptedSource {
    pub(crate) script: VecDeque<Report>,
    pub(crate) precise: bool,
    pub(crate) fail_start: bool,
    /// Fails this often, after so many chunks that it let pass.
    pub(crate) fail_before_read: Option<u32>,
    pub(crate) log: Log,
}

impl ScriptedSource {
    pub(crate) fn new(log: &Log, script: impl IntoIterator<Item = Report>) -> Self {
        let script = script.into_iter().collect();
        Self { script, precise: true, fail_start: false, fail_before_read: None, log: Arc::clone(log) }
    }

    fn broken(operation: Operation) -> SourceError {
        SourceError::new("scripted", operation, "scripted to fail")
    }
}

impl DirtySource for ScriptedSource {
    fn id(&self) -> &str {
        "scripted"
    }

    fn reports(&self) -> Reports {
        Reports::Component
    }

    fn cover(&self) -> Cover {
        Cover { ranges: vec![GpaRange::new(LOW.0, LOW.1).unwrap()], precise: self.precise }
    }

    fn start(&mut self, _layout: &Layout, _iova: &IovaMap) -> Result<(), SourceError> {
        note(&self.log, "source on");
        if std::mem::take(&mut self.fail_start) { Err(Self::broken(Operation::Start)) } else { Ok(()) }
    }

    fn collect(&mut self, sink: &mut Sink<'_>) -> Result<(), SourceError> {
        match self.script.pop_front() {
            Some(Report::Pages(pages)) => {
                pages.for_each(|page| sink.gpa_range(GpaRange::new(page_gpa(page), PAGE).unwrap()));
                Ok(())
            }
            Some(Report::Fail) => Err(Self::broken(Operation::Collect)),
            Some(Report::Gone) => Err(Self::broken(Operation::Collect).or_gone(true)),
            None => Ok(()),
        }
    }

    fn before_read(&mut self, _chunk: &[GpaRange]) -> Result<(), SourceError> {
        match &mut self.fail_before_read {
            Some(0) => {
                self.fail_before_read = None;
                Err(Self::broken(Operation::BeforeRead))
            }
            Some(chunks) => {
                *chunks -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn stop(&mut self) -> Result<(), SourceError> {
        note(&self.log, "source off");
        Ok(())
    }
}

/// A device with P2P, PRE_COPY and a fixed state.
pub(crate) struct FakeDevice {
    pub(crate) log: Log,
    pub(crate) state: DeviceState,
    pub(crate) data: Vec<u8>,
    pub(crate) read: usize,
    pub(crate) size: Option<u64>,
    /// Has always one more initial byte than it hands out.
    pub(crate) restless: bool,
    /// Fails to tell what PRE_COPY has left.
    pub(crate) fail_info: bool,
    /// Writes the state's number to this page in each move but to STOP, as a device does that has work to finish.
    pub(crate) writes: Option<(Arc<Memory>, u64)>,
    /// Takes so long to move to this state.
    pub(crate) slow: Option<(DeviceState, Duration)>,
    /// Fails the next move to this state.
    pub(crate) fail: Option<DeviceState>,
    /// Answers so many questions where it is, and then it is gone.
    pub(crate) gone_after: Option<u32>,
}

impl FakeDevice {
    pub(crate) fn new(log: &Log, data: &[u8]) -> Self {
        let (state, data) = (DeviceState::Running, data.to_vec());
        Self {
            log: Arc::clone(log),
            state,
            data,
            read: 0,
            size: Some(0),
            restless: false,
            fail_info: false,
            writes: None,
            slow: None,
            fail: None,
            gone_after: None,
        }
    }

    /// Bytes handed out in PRE_COPY.
    fn early(&self) -> usize {
        self.data.len() / 2
    }
}

impl DeviceIo for FakeDevice {
    fn capabilities(&self) -> Capabilities {
        Capabilities { p2p: true, pre_copy: true }
    }

    fn state(&mut self) -> Result<DeviceState, DeviceError> {
        match &mut self.gone_after {
            Some(0) => return Err(DeviceError::new(DeviceOperation::State, "no such device").or_gone(true)),
            Some(questions) => *questions -= 1,
            None => {}
        }
        Ok(self.state)
    }

    fn set_state(&mut self, state: DeviceState) -> Result<(), DeviceError> {
        if self.fail == Some(state) {
            self.fail = None;
            return Err(DeviceError::new(DeviceOperation::SetState(state), "scripted to fail"));
        }
        note(&self.log, state.to_string());
        if let Some((_, takes)) = self.slow.filter(|(slow, _)| *slow == state) {
            thread::sleep(takes);
        }
        if matches!(state, DeviceState::PreCopy | DeviceState::Running | DeviceState::Stop) {
            self.read = 0;
        }
        if let (Some((memory, page)), true) = (&self.writes, state != DeviceState::Stop) {
            memory.write_obj(state as u32, GuestAddress(page_gpa(*page))).unwrap();
        }
        self.state = state;
        Ok(())
    }

    fn read_data(&mut self, buffer: &mut [u8]) -> Result<DataRead, DeviceError> {
        let stopped = self.state == DeviceState::StopCopy;
        let end = if stopped { self.data.len() } else { self.early() };
        let bytes = buffer.len().min(end - self.read);
        buffer[..bytes].copy_from_slice(&self.data[self.read..self.read + bytes]);
        self.read += bytes;
        Ok(match (bytes, stopped) {
            (0, true) => DataRead::End,
            (0, false) => DataRead::NothingNow,
            _ => DataRead::Bytes(bytes),
        })
    }

    fn write_data(&mut self, _data: &[u8]) -> Result<(), DeviceError> {
        unreachable!("a source's device takes no state")
    }

    fn precopy_info(&mut self) -> Result<Option<PrecopyInfo>, DeviceError> {
        if self.fail_info {
            return Err(DeviceError::new(DeviceOperation::PrecopyInfo, "scripted to fail"));
        }
        let initial_bytes = self.early().saturating_sub(self.read) as u64 + u64::from(self.restless);
        Ok(Some(PrecopyInfo { initial_bytes, dirty_bytes: 0 }))
    }

    fn data_size(&mut self) -> Result<Option<u64>, DeviceError> {
        Ok(self.size)
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        if self.gone_after == Some(0) {
            return Err(DeviceError::new(DeviceOperation::Reset, "no such device").or_gone(true));
        }
        note(&self.log, "reset");
        (self.state, self.read) = (DeviceState::Running, 0);
        Ok(())
    }
}
