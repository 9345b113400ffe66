// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Faults against the real kernel, while a VM moves: either no page is lost, or the migration ends and the source runs on as before.
//!
//! Runs inside the test bed: `integration/testbed/run --test bed_faults`. Elsewhere each test says that it was skipped.

#![expect(clippy::unwrap_used, reason = "a test's own steps must succeed")]

mod buffer;
mod devices;
mod logs;
mod ring;
mod streams;
mod trap;

use std::collections::BTreeSet;
use std::error::Error;
use std::thread::sleep;
use std::time::Duration;

use vfio_migration::error::Chain;
use vfio_migration::transfer::{MissedDowntime, Sent};
use vfio_migration_integration::bed::{Bed, BedSetup, Here, Moving, migrate};
use vfio_migration_integration::vmm::{MIN_RAM_BYTES, Phase};

#[global_allocator]
static ALLOCATOR: trap::Allocator = trap::Allocator;

/// What a source and its destination are made of, if the bed has the devices.
fn setups(test: &str) -> Option<[BedSetup; 2]> {
    let bed = Bed::find(test)?;
    let (mdevs, edus) = (bed.two(test, "dirty_mdev")?, bed.two(test, "edu_vfio")?);
    let [source, destination] = mdevs;
    let [first, second] = edus.map(Some);
    let setup = |mdev, edu| BedSetup {
        memory_bytes: MIN_RAM_BYTES,
        dirty_ring_bytes: None,
        vcpu_harvests: true,
        guest_rate: Some(400),
        engine_rate: 200,
        seed: 0xfa17,
        mdev,
        edu,
        served_state_bytes: None,
    };
    Some([setup(source, first), setup(destination, second)])
}

/// A VM whose guest and devices run.
fn running(setup: BedSetup) -> Here {
    let here = Here::new(setup).unwrap();
    here.side.start().unwrap();
    sleep(Duration::from_millis(200));
    here
}

/// What every migration of the mdev says: its driver keeps the pages pinned, and the container reports pinned pages again and again.
const PINNED: &str = "Pages that container:mdev0 reports stay pinned: they are sent in every round, and once more while the VM stands still";

/// What went wrong on the way of a VM that arrived, but for what the mdev pins and a missed downtime limit: on a busy host the
/// emulated machine is too slow.
fn degradations(sent: &Sent) -> Vec<String> {
    let errors = sent.progress.degradations.iter().map(|degradation| &*degradation.error);
    let failed = errors.filter(|error| !error.is::<MissedDowntime>()).map(|error| chain(error));
    failed.filter(|error| error != PINNED).collect()
}

fn chain(error: &dyn Error) -> String {
    Chain(error).to_string()
}

/// The VM stands still on both sides, equal to the last byte.
#[track_caller]
fn assert_arrived(source: &Here, destination: &Here) {
    assert_eq!(source.side.machine().phase(), Phase::Paused);
    assert_eq!(source.differing(destination).unwrap(), BTreeSet::new(), "pages were lost");
    let position = |here: &Here| here.side.engine().position().unwrap();
    assert_eq!(position(source), position(destination), "the engine arrived as it was");
}

/// The VM runs as if nothing had been: guest, engine and edu get on.
#[track_caller]
fn assert_runs_on(source: &Here) {
    assert_eq!(source.side.machine().phase(), Phase::Running);
    let before = (source.side.machine().pages_written().unwrap(), source.side.engine().position().unwrap());
    let health = source.side.check_all(1).unwrap();
    assert!(health.wrong_pages.is_empty() && health.wrong_device_pages.is_empty(), "{health:?}");
    sleep(Duration::from_millis(50));
    let after = (source.side.machine().pages_written().unwrap(), source.side.engine().position().unwrap());
    assert!(after.0 > before.0 && after.1 > before.1, "{before:?}, {after:?}");
}

/// Moves the VM, undisturbed, to a fresh destination.
#[track_caller]
fn assert_moves(source: &mut Here, destination: BedSetup) {
    let mut destination = Here::new(destination).unwrap();
    let sent = migrate(source, &mut destination, Moving::default(), |_| {}).unwrap();
    assert_eq!(degradations(&sent), Vec::<String>::new());
    assert_arrived(source, &destination);
}
