// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A VM in the test's own process, so that the test can reach into its devices while it moves.

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use vfio_migration::migratable::MigratableDevice;
use vfio_migration::transfer::connection::Listener;
use vfio_migration::transfer::limits::{ConnectionCount, PeerLimits};
use vfio_migration::transfer::receive::Receiver;
use vfio_migration::transfer::{SendError, SendOptions, Sender, Sent};

use super::mirror::differing;
use super::pair::Moving;
use super::side::{BedSetup, BedSide};
use crate::demo::child::Hosted;
use crate::demo::vm::DestinationVm;
use crate::vmm::{Memory, RamLayout, Split};

/// A VM and the library over it.
pub struct Here {
    /// The devices' states and the sources of dirty pages.
    pub devices: MigratableDevice,
    /// The machine and its devices.
    pub side: BedSide,
    /// A second handle on its RAM, for looking at it from outside.
    pub memory: Memory,
}

impl Here {
    /// Makes a VM that has not booted.
    ///
    /// # Errors
    /// RAM, KVM or a device refuse.
    pub fn new(setup: BedSetup) -> anyhow::Result<Self> {
        let memory = Memory::create(&RamLayout::new(setup.memory_bytes, Split::default())?)?;
        let files =
            memory.regions().iter().map(|region| region.file.try_clone()).collect::<Result<_, _>>()?;
        let side = BedSide::new(setup, files)?;
        Ok(Self { devices: side.migratable()?, side, memory })
    }

    /// Returns the addresses of the pages in which the RAM of two VMs, which stand still, differs.
    ///
    /// # Errors
    /// A memfd cannot be read.
    pub fn differing(&self, other: &Self) -> io::Result<BTreeSet<u64>> {
        differing(&self.memory, &other.memory)
    }
}

/// Moves a running VM over TCP; `meanwhile` is called with its side once all logs are on and pages are on their way, or
/// it has failed before.
///
/// # Errors
/// It did not move.
pub fn migrate(
    source: &mut Here,
    destination: &mut Here,
    moving: Moving,
    meanwhile: impl FnOnce(&BedSide),
) -> Result<Sent, SendError> {
    let any_port = "tcp:127.0.0.1:0".parse().expect("a URL");
    let listener = Listener::bind(&any_port).expect("the loopback interface has a free port");
    let options = SendOptions::new(listener.url().clone())
        .downtime(Duration::from_millis(moving.downtime_ms))
        .timeout(Duration::from_secs(moving.timeout_s))
        .rate_limit(Some(moving.bytes_per_second))
        .expect("a limit that lets something through")
        .connections(ConnectionCount::new(moving.connections).expect("1 to 128"))
        .expect("TCP has as many");
    let sender = Sender::new(options);
    let (migration, over) = (sender.handle(), AtomicBool::new(false));
    let Here { devices, side, .. } = source;
    let side = &*side;
    thread::scope(|scope| {
        let received = scope.spawn(|| {
            let mut vm = DestinationVm::new(destination.side.machine(), &mut destination.devices);
            Receiver::new(PeerLimits::default(), None).receive(&listener, &mut vm).map(drop)
        });
        let sent = scope.spawn(|| {
            let sent = sender.send(&mut side.source(), devices.tracker(), devices.devices());
            over.store(true, Ordering::SeqCst);
            sent
        });
        while !over.load(Ordering::SeqCst) && migration.progress().round == 0 {
            thread::sleep(Duration::from_millis(1));
        }
        meanwhile(side);
        let sent = sent.join().expect("the sender does not panic");
        let received = received.join().expect("the receiver does not panic");
        assert!(sent.is_err() || received.is_ok(), "sent and not received: {received:?}");
        sent
    })
}
