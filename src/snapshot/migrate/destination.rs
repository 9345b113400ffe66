// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A directory as the destination of a migration: a running VM is received into a snapshot.

use std::fmt;
use std::io::{self, BufReader, ErrorKind};
use std::os::fd::OwnedFd;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::thread;
use std::time::Instant;

use thiserror::Error;

use crate::layout::Layout;
use crate::snapshot::disk::{StagedDir, WriteError};
use crate::snapshot::format::{
    ConfigMessage, Digest, FormatError, PlacementError, SnapshotLimits, VmConfig, VmState, ZoneFile,
};
use crate::snapshot::passed::{
    self, Copied, Ended, LocalEvent, LocalOptions, PassedSlots, Seen, SlotError, SlotFiles, Watch,
};
use crate::snapshot::write::{AnnouncedRam, Base, Completed, SnapshotWriter};
use crate::transfer::frame::MemoryTable;
use crate::transfer::receive::{Completion, Destination, PageStore, Pages};
use crate::vm::VmError;

/// Bytes read ahead, so that tables of single pages do not take a system call each.
const READ_BYTES: usize = 256 << 10;

/// Why a VM is not received into a directory. Nothing lies under the directory's name, but for what [`WriteError`] says.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DestinationError {
    /// The disks would go on changing, or be out of step with the memory.
    #[error(
        "VM writes to {}, which a snapshot of memory and state leaves out",
        listed(.disks)
    )]
    WritableDisks {
        /// Their paths.
        disks: Vec<String>,
    },
    /// vDPA devices stay suspended when a source takes its VM back.
    #[error("VM has vDPA devices {}, whose state is in no snapshot", listed(.devices))]
    Vdpa {
        /// Their paths.
        devices: Vec<String>,
    },
    /// Cloud Hypervisor leaves such memory out of snapshots.
    #[error("VM shares memory with files, which snapshots leave out: {}", zone_files(.zones))]
    SharedZones {
        /// The memory zones and their files.
        zones: Vec<ZoneFile>,
    },
    /// The descriptor of such memory lacks what the guest wrote.
    #[error("VM passes memory as descriptors that do not hold what it wrote: {}", zone_files(.zones))]
    FileZones {
        /// The memory zones and their files.
        zones: Vec<ZoneFile>,
    },
    /// Descriptors that were passed are not the VM's memory.
    #[error("Cannot take the memory that the source passed")]
    Slot(#[from] SlotError),
    /// Memory in descriptors could not be copied.
    #[error("Cannot copy the memory that the source passed")]
    Copy(#[source] io::Error),
    /// A message is not what it should be.
    #[error(transparent)]
    Document(#[from] FormatError),
    /// The VM's RAM cannot be placed.
    #[error("Cannot place the VM's RAM")]
    Placement(#[from] PlacementError),
    /// The snapshot cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The hook that runs while the VM is paused failed.
    #[error("On-paused hook failed")]
    OnPaused(#[source] VmError),
    /// A message came twice or too early.
    #[error("{message} came twice or too early")]
    OutOfTurn {
        /// The message.
        message: &'static str,
    },
}

/// Names that a source gave, with control characters escaped.
fn listed(names: &[String]) -> String {
    let names: Vec<_> = names.iter().map(|name| name.escape_debug().to_string()).collect();
    names.join(", ")
}

fn zone_files(zones: &[ZoneFile]) -> String {
    zones.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Warns, before anything is stored, if a VM can only be restored from disk because of its pass-through devices.
fn warn_of_devices(config: &VmConfig) {
    let stuck: Vec<_> = config.devices().iter().filter(|device| !device.is_sendable()).collect();
    if !stuck.is_empty() {
        let stuck = stuck.into_iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        log::warn!(
            "VM has pass-through devices that no receiver can be handed: {stuck}; Cloud Hypervisor will only restore it from disk"
        );
    }
}

/// A hook that runs between the State and its answer, while the VM is paused: the place to snapshot its disks.
///
/// Memory that came as descriptors is stored meanwhile, on other threads. Where that fails, the hook is waited for all the same: one that
/// takes long looks at [`CopyProgress::has_failed`](crate::offload::CopyProgress::has_failed).
pub type OnPaused = Box<dyn FnMut() -> Result<(), VmError> + Send>;

/// Names the directory for a VM whose configuration has come.
pub type NameSnapshot = Box<dyn FnOnce(&VmConfig) -> PathBuf + Send>;

/// What is kept of a VM, and what becomes of the VM.
#[derive(Default)]
pub struct DestinationOptions {
    /// Only what differs from another snapshot is kept.
    pub base: Option<Base>,
    /// The source is told that the migration failed once everything is safe on disk, and so runs its VM again.
    ///
    /// A Cloud Hypervisor v53 has let go of its disks' locks by then, and does not take them again.
    pub checkpoint: bool,
    /// A VM with writable disks is taken though nothing is done about them.
    pub memory_only: bool,
    /// Done while the VM is paused.
    pub on_paused: Option<OnPaused>,
    /// How memory is copied that comes as descriptors.
    pub local: LocalOptions,
    /// How large messages and memory may be.
    pub limits: SnapshotLimits,
}

impl fmt::Debug for DestinationOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DestinationOptions")
            .field("base", &self.base)
            .field("checkpoint", &self.checkpoint)
            .field("memory_only", &self.memory_only)
            .field("on_paused", &self.on_paused.is_some())
            .field("local", &self.local)
            .field("limits", &self.limits)
            .finish()
    }
}

/// A snapshot to be, which a source's VM is received into.
///
/// Pages go straight to their place on disk. The directory appears under its name before Complete is answered, whole and safe;
/// if anything fails before that, nothing appears.
#[derive(Debug)]
pub struct SnapshotDestination {
    options: DestinationOptions,
    phase: Phase,
    passed: PassedSlots,
    /// Where memory is, from Config to State, if it came as descriptors, and what was seen of it where it was copied meanwhile.
    files: Option<(SlotFiles, Option<Seen>)>,
}

#[derive(Debug)]
enum Phase {
    Waiting(Target),
    Receiving { config: VmConfig, store: Arc<Store> },
    Paused { config: VmConfig, state: VmState, store: Arc<Store> },
    Kept(Digest),
    Over,
}

/// The directory to be.
enum Target {
    Staged(StagedDir),
    Unnamed(NameSnapshot),
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Staged(staged) => staged.fmt(f),
            Self::Unnamed(_) => f.write_str("Unnamed"),
        }
    }
}

impl SnapshotDestination {
    /// Takes the name `target`; a source may then come.
    ///
    /// # Errors
    /// `target` is there and not an empty directory, or cannot be made.
    pub fn create(target: &Path, options: DestinationOptions) -> Result<Self, WriteError> {
        let staged = StagedDir::create(target)?;
        Ok(Self::waiting(Target::Staged(staged), options))
    }

    /// Has `name` choose the directory when the VM's configuration has come. A name that cannot be taken ends the migration then.
    pub fn named_by(name: NameSnapshot, options: DestinationOptions) -> Self {
        Self::waiting(Target::Unnamed(name), options)
    }

    fn waiting(target: Target, options: DestinationOptions) -> Self {
        Self { options, phase: Phase::Waiting(target), passed: PassedSlots::default(), files: None }
    }

    /// What names the snapshot, once it is whole and safe on disk.
    pub fn kept(&self) -> Option<Digest> {
        match self.phase {
            Phase::Kept(digest) => Some(digest),
            _ => None,
        }
    }

    fn begin(&mut self, json: &[u8]) -> Result<Arc<Store>, DestinationError> {
        let Phase::Waiting(target) = std::mem::replace(&mut self.phase, Phase::Over) else {
            return Err(DestinationError::OutOfTurn { message: "Config" });
        };
        let limits = self.options.limits;
        let message = ConfigMessage::parse(json, &limits)?;
        self.check(message.vm_config())?;
        warn_of_devices(message.vm_config());
        let passed = std::mem::take(&mut self.passed);
        let files = if passed.is_empty() { None } else { Some(local_files(passed, &message)?) };
        let layout = message.layout().clone();
        let announced = AnnouncedRam::with_hotpluggable(layout.clone(), message.hotpluggable(), &limits)?
            .plugged_bytes(message.vm_config().hotplugged_bytes());
        let staged = match target {
            Target::Staged(staged) => staged,
            Target::Unnamed(name) => StagedDir::create(&name(message.vm_config()))?,
        };
        let writer = SnapshotWriter::begin(staged, announced, self.options.base.clone(), limits)?;
        // A migration brings all memory, but for pages that a fresh receiver's memory has already: zeros.
        writer.presume_zeros()?;
        let store =
            Arc::new(Store { layout, writer: RwLock::new(Some(writer)), closed: AtomicBool::new(false) });
        self.phase = Phase::Receiving { config: message.vm_config().clone(), store: Arc::clone(&store) };
        if let Some(files) = files {
            let seen = self.copy_warm(&files, &store)?;
            self.files = Some((files, seen));
        }
        Ok(store)
    }

    /// Refuses VMs whose snapshot would be of no use.
    fn check(&self, config: &VmConfig) -> Result<(), DestinationError> {
        if !config.vdpa().is_empty() {
            return Err(DestinationError::Vdpa { devices: config.vdpa().to_vec() });
        }
        if !config.shared_files().is_empty() {
            return Err(DestinationError::SharedZones { zones: config.shared_files().to_vec() });
        }
        let disks_are_seen_to = self.options.memory_only || self.options.on_paused.is_some();
        if !disks_are_seen_to && !config.writable_disks().is_empty() {
            return Err(DestinationError::WritableDisks { disks: config.writable_disks().to_vec() });
        }
        Ok(())
    }

    fn pause(&mut self, json: Vec<u8>) -> Result<(), DestinationError> {
        let Phase::Receiving { config, store } = std::mem::replace(&mut self.phase, Phase::Over) else {
            return Err(DestinationError::OutOfTurn { message: "State" });
        };
        let state = VmState::parse(json, &self.options.limits)?;
        store.check(&state)?;
        store.hurry();
        self.while_paused(&store)?;
        self.phase = Phase::Paused { config, state, store };
        Ok(())
    }

    /// Runs the hook, and beside it stores what the descriptors hold now, if memory came as some.
    fn while_paused(&mut self, store: &Store) -> Result<(), DestinationError> {
        let files = self.files.take();
        let DestinationOptions { on_paused, local, limits, .. } = &mut self.options;
        let hook = on_paused.as_mut().map(|hook| || hook().map_err(DestinationError::OnPaused));
        let (files, hook) = match (files, hook) {
            (Some(files), Some(hook)) => (files, hook),
            (files, hook) => {
                hook.map_or(Ok(()), |mut hook| hook())?;
                return files
                    .map_or(Ok(()), |files| copy_paused(local, &files, store, &AtomicBool::new(false)));
            }
        };
        let ended = AtomicBool::new(false);
        thread::scope(|scope| {
            let copy = || copy_paused(local, &files, store, &ended);
            let copying = limits.thread_start.spawn_scoped(scope, "snapshot-passed", copy);
            let copying = copying.map_err(DestinationError::Copy)?;
            let (mut hook, ended) = (hook, &ended);
            let hooked = hook().inspect_err(|_| ended.store(true, Ordering::Relaxed));
            let copied = copying.join().unwrap_or_else(|panic| resume_unwind(panic));
            match copied {
                // A hook may have ended for this very reason, and what fails after the hook does so because of it.
                Err(DestinationError::Copy(error)) if !Ended::is(&error) => {
                    Err(DestinationError::Copy(error))
                }
                copied => hooked.and(copied),
            }
        })
    }

    /// Copies the memory of the VM, which runs, for as long as it may.
    fn copy_warm(&mut self, files: &SlotFiles, store: &Store) -> Result<Option<Seen>, DestinationError> {
        let local = &mut self.options.local;
        let warm_timeout = local.warm_timeout;
        local.tell(LocalEvent::Passed { ram_bytes: store.layout.bytes(), warm_timeout });
        let Some(timeout) = warm_timeout else { return Ok(None) };
        let began = Instant::now();
        let guard = store.writer();
        let writer = guard.as_ref().ok_or(DestinationError::OutOfTurn { message: "Config" })?;
        let ended = AtomicBool::new(false);
        let until = began.checked_add(timeout);
        writer.wait_until(until);
        let copy = || {
            let seen = Seen::nothing(files.ranges(), writer.block_bytes())?;
            let copied = passed::copy_warm(files, &seen, writer, until, watch(local, &ended))?;
            // What is done and on disk by now takes no time once the VM is paused.
            writer.prepare(until).map_err(io::Error::other)?;
            writer.sync_until(until)?;
            Ok((seen, copied))
        };
        let copied = copy();
        // What comes once the VM is paused has to be safe, however long that takes.
        writer.wait_until(None);
        let (seen, Copied { bytes, whole, .. }) = copied.map_err(DestinationError::Copy)?;
        local.tell(LocalEvent::Copied { bytes, whole, took: began.elapsed() });
        Ok(Some(seen))
    }

    fn keep(&mut self) -> Result<Completion, DestinationError> {
        let Phase::Paused { config, state, store } = std::mem::replace(&mut self.phase, Phase::Over) else {
            return Err(DestinationError::OutOfTurn { message: "Complete" });
        };
        let writer = store.close().ok_or(DestinationError::OutOfTurn { message: "Complete" })?;
        let Completed { digest, moved_bytes } = writer.complete(&config, state, Vec::new())?;
        if moved_bytes > 0 {
            self.options.local.tell(LocalEvent::Moved { bytes: moved_bytes });
        }
        self.phase = Phase::Kept(digest);
        Ok(if self.options.checkpoint { Completion::Checkpointed } else { Completion::Moved })
    }
}

/// Stores the memory of the VM, which is paused, as far as it is not stored already.
fn copy_paused(
    local: &mut LocalOptions,
    (files, seen): &(SlotFiles, Option<Seen>),
    store: &Store,
    ended: &AtomicBool,
) -> Result<(), DestinationError> {
    let began = Instant::now();
    let guard = store.writer();
    let writer = guard.as_ref().ok_or(DestinationError::OutOfTurn { message: "State" })?;
    let copied = match seen {
        Some(seen) => passed::update(files, seen, writer, watch(local, ended)),
        None => passed::copy(files, writer, watch(local, ended)),
    };
    let copied = copied.inspect_err(|_| local.progress.fail());
    let Copied { bytes, written, .. } = copied.map_err(DestinationError::Copy)?;
    local.tell(LocalEvent::Stored { read_bytes: bytes, written_bytes: written, took: began.elapsed() });
    Ok(())
}

fn watch<'a>(local: &'a LocalOptions, ended: &'a AtomicBool) -> Watch<'a> {
    Watch { receiver: local.receiver.as_ref(), progress: &local.progress, ended }
}

/// Checks descriptors against the Config that says what is in them.
fn local_files(passed: PassedSlots, message: &ConfigMessage) -> Result<SlotFiles, DestinationError> {
    let zones = message.vm_config().file_zones();
    if !zones.is_empty() {
        return Err(DestinationError::FileZones { zones: zones.to_vec() });
    }
    Ok(passed.settle(message.slots())?)
}

impl Destination for SnapshotDestination {
    fn takes_descriptors(&self) -> bool {
        matches!(self.phase, Phase::Waiting(_))
    }

    fn descriptor(&mut self, slot: u32, memory: OwnedFd) -> Result<(), VmError> {
        Ok(self.passed.add(slot, memory).map_err(DestinationError::Slot)?)
    }

    fn config(&mut self, json: &[u8]) -> Result<Arc<dyn PageStore>, VmError> {
        Ok(self.begin(json)?)
    }

    fn state(&mut self, json: Vec<u8>) -> Result<(), VmError> {
        Ok(self.pause(json)?)
    }

    /// Keeps the snapshot, of a running VM and a paused one alike.
    fn complete(&mut self, _paused: bool) -> Result<Completion, VmError> {
        Ok(self.keep()?)
    }

    fn abandoned(&mut self) {
        if let Phase::Receiving { store, .. } | Phase::Paused { store, .. } = &self.phase {
            store.close();
        }
        self.phase = Phase::Over;
    }
}

/// Hands pages to the writer until it is taken away; other threads may hold the store for longer.
#[derive(Debug)]
struct Store {
    layout: Layout,
    writer: RwLock<Option<SnapshotWriter>>,
    /// Ends writing early: threads that hold the lock look at it between ranges.
    closed: AtomicBool,
}

impl Store {
    fn check(&self, state: &VmState) -> Result<(), WriteError> {
        self.writer().as_ref().map_or(Ok(()), |writer| writer.check(state))
    }

    /// Lets the disk catch up while the paused VM's hook runs.
    fn hurry(&self) {
        self.writer().iter().for_each(SnapshotWriter::hurry);
    }

    fn writer(&self) -> RwLockReadGuard<'_, Option<SnapshotWriter>> {
        self.writer.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the writer away once the ranges that are being written are done; no further range is written.
    fn close(&self) -> Option<SnapshotWriter> {
        self.closed.store(true, Ordering::Relaxed);
        self.writer.write().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl PageStore for Store {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn fill(&self, table: &MemoryTable, pages: &mut Pages<'_>) -> io::Result<()> {
        let writer = self.writer();
        let mut pages = BufReader::with_capacity(READ_BYTES, pages);
        table.ranges().try_for_each(|range| match &*writer {
            Some(writer) if !self.closed.load(Ordering::Relaxed) => writer.fill(range, &mut pages),
            _ => Err(ended()),
        })
    }
}

fn ended() -> io::Error {
    io::Error::new(ErrorKind::BrokenPipe, "The snapshot was ended")
}
