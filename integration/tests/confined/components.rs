// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Components with a dirty log of their own, and the log that a vhost-user back end writes.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use vfio_migration::granule::Granule;
use vfio_migration::iova::IovaMap;
use vfio_migration::layout::Layout;
use vfio_migration::ledger::{Ledger, Start};
use vfio_migration::range::GpaRange;
use vfio_migration::source::{
    DirtySource, LogBase, LogBaseAnswer, MigratableLog, VhostUserBackEnd, VhostUserError, VhostUserLog,
};
use vfio_migration::syscalls;
use vfio_migration_integration::confined::check;
use vm_migration::protocol::{MemoryRange, MemoryRangeTable};
use vm_migration::{Migratable, MigratableError, Pausable, Snapshottable, Transportable};

const BYTES: u64 = 1 << 20;

fn layout() -> Layout {
    Layout::new([GpaRange::new(0, BYTES).unwrap()], Granule::host_page()).unwrap()
}

/// Starts, collects one page and stops.
fn session(mut source: impl DirtySource) {
    source.start(&layout(), &IovaMap::Identity).unwrap();
    let mut ledger = Ledger::new(layout(), 1);
    let cursor = ledger.open(Start::Copied);
    source.collect(&mut ledger.sink(0, &IovaMap::Identity)).unwrap();
    ledger.absorb();
    assert!(ledger.outstanding(cursor).unwrap().pending_bytes > 0);
    source.stop().unwrap();
}

/// A component that says that its first page is dirty.
struct Component;

impl Pausable for Component {}
impl Snapshottable for Component {}
impl Transportable for Component {}
impl Migratable for Component {
    fn dirty_log(&mut self) -> Result<MemoryRangeTable, MigratableError> {
        let mut table = MemoryRangeTable::default();
        table.push(MemoryRange { gpa: 0, length: 4096 });
        Ok(table)
    }
}

#[test]
fn migratable_log() {
    check("components::migratable_log", syscalls::MIGRATABLE_LOG, &[], |confinement| {
        let component = Arc::new(Mutex::new(Component));
        // Somebody else holds the component's lock at first.
        let held = component.lock().unwrap();
        thread::scope(|scope| {
            let source = MigratableLog::new("component", component.clone());
            scope.spawn(|| confinement.run(|| session(source)));
            thread::sleep(Duration::from_millis(100));
            drop(held);
        });
    });
}

/// A back end on a thread without the filter, which sets the first page's bit in whatever log it is given.
struct BackEnd {
    logs: Sender<File>,
    written: Receiver<()>,
}

impl BackEnd {
    fn start() -> Self {
        let ((logs, given), (tell, written)) = (channel::<File>(), channel());
        thread::spawn(move || {
            for log in given {
                log.write_all_at(&[1], 0).unwrap();
                tell.send(()).unwrap();
            }
        });
        Self { logs, written }
    }
}

impl VhostUserBackEnd for BackEnd {
    fn set_log_base(&mut self, log: LogBase<'_>) -> Result<LogBaseAnswer, VhostUserError> {
        self.logs.send(File::from(log.fd().try_clone_to_owned()?))?;
        self.written.recv()?;
        Ok(LogBaseAnswer::Taken)
    }

    fn log_all(&mut self, _on: bool) -> Result<(), VhostUserError> {
        Ok(())
    }

    fn log_used_rings(&mut self, _on: bool) -> Result<(), VhostUserError> {
        Ok(())
    }
}

#[test]
fn vhost_user_log() {
    check("components::vhost_user_log", syscalls::VHOST_USER_LOG, &[], |confinement| {
        let back_end = BackEnd::start();
        confinement.run(|| session(VhostUserLog::new("disk0", back_end)));
    });
}
