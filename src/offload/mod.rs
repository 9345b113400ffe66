// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Cloud Hypervisor's local migrations: guest memory passed as descriptors, between a VMM and a process beside it.
//!
//! With `local=on` a source sends no bytes of memory but a descriptor for each memory slot. [`SnapshotDestination`] copies from them, most
//! of it while the VM still runs, for the source pauses it only when Config is answered. [`LocalSender`] is the way back.
//!
//! Descriptors of a peer are checked before they are believed ([`SlotError`]), and read with `pread`, never mapped: their owner may cut
//! them off at any time.
//!
//! This room lies above [`snapshot`](crate::snapshot) and uses it; nothing in there uses this one. To receive over descriptors is a way of
//! writing a snapshot, so its code is the wing `passed` of `snapshot`, below the destination that the transfer knows; what is public of it
//! is named here. To restore over descriptors is a way of reading snapshots and a protocol of its own, and is at home here.
//!
//! An orchestrator that keeps a VM takes two handles along, which work from any thread:
//!
//! ```
//! # use std::error::Error;
//! # use std::path::Path;
//! use std::thread;
//! use std::time::Duration;
//!
//! use vfio_migration::offload::LocalOptions;
//! use vfio_migration::snapshot::{DestinationOptions, SnapshotDestination};
//! use vfio_migration::transfer::connection::Listener;
//! use vfio_migration::transfer::limits::PeerLimits;
//! use vfio_migration::transfer::receive::{ReceiveError, Receiver};
//!
//! # fn keep(listener: &Listener, target: &Path) -> Result<(), Box<dyn Error>> {
//! let receiver = Receiver::new(PeerLimits::default(), None);
//! let handle = receiver.handle();
//! let warm_timeout = Some(Duration::from_secs(300));
//! let local = LocalOptions { warm_timeout, receiver: Some(handle.clone()), ..LocalOptions::default() };
//! let progress = local.progress.clone();
//! let options = DestinationOptions { checkpoint: true, local, ..DestinationOptions::default() };
//! let mut destination = SnapshotDestination::create(target, options)?;
//! let received = thread::scope(|scope| {
//!     let receiving = scope.spawn(|| receiver.receive(listener, &mut destination));
//!     println!("{} of {} bytes", progress.done_bytes(), progress.total_bytes());
//!     // The source's VM runs on, and nothing is left under the directory's name.
//!     assert!(handle.stop(), "it was not too late");
//!     receiving.join().expect("the receiver does not panic")
//! });
//! assert!(matches!(received, Err(ReceiveError::Stopped)));
//! # Ok(())
//! # }
//! # let place = tempfile::tempdir()?;
//! # let url = vfio_migration::transfer::url::Url::unix(place.path().join("socket"))?;
//! # keep(&Listener::bind(&url)?, &place.path().join("monday"))?;
//! # assert!(!place.path().join("monday").exists());
//! # Ok::<(), Box<dyn Error>>(())
//! ```
//!
//! One that restores a VM takes one along. Once the VM runs on demand, [`LocalSenderHandle::cancel`] comes too late, and
//! [`LocalSenderHandle::abort`] ends the VM:
//!
//! ```no_run
//! # use std::error::Error;
//! # use std::path::PathBuf;
//! use std::thread;
//! use std::time::Duration;
//!
//! use vfio_migration::offload::{LocalSendOptions, LocalSender, LocalSent};
//! use vfio_migration::snapshot::{SnapshotChain, SnapshotLimits};
//! use vfio_migration::transfer::url::Url;
//!
//! /// Restores the VM that a full snapshot and the differentials on top of it make up, unless it takes too long.
//! fn restore(chain: &[PathBuf], url: &Url, patience: u32) -> Result<LocalSent, Box<dyn Error>> {
//!     let chain = SnapshotChain::open(chain, &SnapshotLimits::default())?;
//!     let options = LocalSendOptions { on_demand: true, ..LocalSendOptions::default() };
//!     let sender = LocalSender::new(chain, options)?;
//!     let handle = sender.handle();
//!     thread::scope(|scope| {
//!         let sending = scope.spawn(|| sender.send(url));
//!         for _ in 0..patience {
//!             if sending.is_finished() || handle.progress().handed_over.is_some() {
//!                 break;
//!             }
//!             thread::sleep(Duration::from_secs(1));
//!         }
//!         if handle.progress().handed_over.is_none() && handle.cancel() {
//!             println!("the receiver gets no VM");
//!         }
//!         // Where the VM runs, this waits for the last page.
//!         Ok(sending.join().expect("the sender does not panic")?)
//!     })
//! }
//! ```
//!
//! [`SnapshotDestination`]: crate::snapshot::SnapshotDestination

mod restore;

pub use self::restore::{
    FaultProgress, LocalSendError, LocalSendOptions, LocalSendProgress, LocalSender, LocalSenderHandle,
    LocalSent,
};
pub use crate::snapshot::passed::{CopyProgress, LocalEvent, LocalOptions, SlotError};
