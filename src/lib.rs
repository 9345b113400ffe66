// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Live migration and snapshots of VMs with pass-through devices.
//!
//! To move a running VM, every page that changes has to be known. The vCPUs' writes are in KVM's dirty log, the VMM's own in
//! vm-memory's bitmap, and the devices' DMA is known only to the VFIO container, the device or the IOMMU. This crate merges
//! these reports exactly, and moves the devices' own state beside the memory.
//!
//! ```text
//!  source                  granule
//!   kvm log, ring  GPA     host page  ─┐
//!   VMM's writes   GPA     host page   │
//!   its components GPA     host page   │
//!   vhost-user     GPA     4 KiB       │
//!   container      IOVA    smallest    ├─► iova ─► LEDGER ─► runs ─► chunks ─► transfer ─► receiver
//!   device log     IOVA    negotiated  │   map     one bit per host page,          ◄── commit on ACK
//!   hwpt           IOVA    chosen      │           one cursor per receiver
//!   vfio-user      IOVA    negotiated ─┘
//!
//!  device state, beside it:  all run, all P2P-quiescent, all stopped ─► stream ─► receiver of this crate
//!                                                        all stopped ─► Snapshot tree ─► any receiver
//! ```
//!
//! The modules, in the order the data flows:
//!
//! | module | holds |
//! |---|---|
//! | [`range`], [`granule`], [`layout`] | checked half-open ranges; bytes per bit; the VM's RAM and where each page's bit lives |
//! | [`source`] | [`source::DirtySource`], one file per kernel or wire interface, and the sink they report to |
//! | [`iova`] | where a device's addresses lead |
//! | [`ledger`] | who still needs which page: pending, in flight, committed; who reported what |
//! | [`table`] | ranges as the `vm-migration` crate's table |
//! | [`device`] | [`device::DeviceIo`]; states, streams, order across devices, the saved form |
//! | [`tracker`] | [`tracker::Tracker`]: sources, address spaces, ledger and cursors; all that knows which pages are dirty |
//! | [`migratable`] | [`migratable::MigratableDevice`]: the `vm-migration` traits over a tracker and a device set |
//! | [`precopy`] | when to go on, slow down, switch over or give up: a pure function |
//! | [`transfer`] | frames, connections, sender and receiver of Cloud Hypervisor's protocol |
//! | [`snapshot`] | Cloud Hypervisor's snapshot directory: full, differential, received from a running VM, verified |
//! | [`offload`] | memory as descriptors between VMMs on one host: snapshots of it, and restores, on demand too |
//! | [`probe`] | what this host and its devices can do for a migration |
//! | [`error`] | an error and its causes as one line: how to print any of this crate's |
//! | [`threads`] | what the threads of the library do first |
//! | [`syscalls`] | the system calls of each source and part, for seccomp filters |
//! | [`vm`] | what a sender asks of a VMM |
//! | [`vfio_user`] | client for devices in another process |
//!
//! Words used throughout: a *granule* is the bytes one bit stands for; to *collect* is to read a source's log, which may clear it; to
//! *absorb* is to add what was collected to every *cursor*; a cursor is what one receiver, or one snapshot base, still lacks; pages
//! *taken* are *in flight* until they are *committed* or *rolled back*; *precopy* is copying while the VM runs, *switchover* the moment it
//! stops for good, *downtime* the time from pausing it here to running it there.
//!
//! # Features
//!
//! All are on by default. Without any of them the crate is the dirty path alone: sources, ledger, and the `vm-migration` traits.
//!
//! | feature | adds | pulls in |
//! |---|---|---|
//! | `device-state` | [`device::DeviceSet`]: the state of pass-through devices; without it a VMM moves that state itself | base64, versionize |
//! | `transfer` | [`transfer`], [`vm`]; needs `device-state` | socket2 |
//! | `tls` | TLS 1.3 under [`transfer`], with the cryptography that the process has installed | rustls |
//! | `ring` | cryptography for `tls` | ring |
//! | `snapshot` | [`snapshot`], [`offload`]; needs `transfer` | blake3 |
//! | `vfio-user` | [`vfio_user`] and its source and device | |
//! | `probe` | [`probe`] | |
//!
//! # Example
//!
//! The VMM's own writes, one receiver, one round:
//!
//! ```
//! use std::sync::Arc;
//! use vfio_migration::layout::Layout;
//! use vfio_migration::ledger::{ChunkLimits, Start};
//! use vfio_migration::source::GuestMemoryLog;
//! use vfio_migration::tracker::{Tracker, VmMappings};
//! use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, bitmap::AtomicBitmap};
//!
//! let memory = Arc::new(GuestMemoryMmap::<AtomicBitmap>::from_ranges(&[(GuestAddress(0), 1 << 20)])?);
//! let maps = memory.clone();
//! let mut tracker = Tracker::builder(Layout::from_guest_memory(&*memory)?)
//!     .mappings(move || VmMappings::of_memory(&*maps))
//!     .source(Box::new(GuestMemoryLog::new(memory.clone())))
//!     .build()?;
//! let receiver = tracker.begin(Start::Copied)?;
//! memory.write_obj(7u32, GuestAddress(0x5004))?;
//! assert!(tracker.collect().is_empty(), "no source failed");
//! let chunk = tracker.take(receiver, ChunkLimits::NONE)?.expect("a page was written");
//! assert!(chunk.ranges()[0].contains(0x5004));
//! // ... its bytes go to the receiver, which acknowledges them ...
//! tracker.commit(chunk);
//! tracker.end(receiver)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![cfg_attr(feature = "transfer", doc = "")]
#![cfg_attr(feature = "transfer", doc = include_str!("../docs/first-vmm.md"))]

mod bitmap;
pub mod device;
pub mod error;
pub mod granule;
pub mod iova;
pub mod layout;
pub mod ledger;
pub mod migratable;
#[cfg(feature = "snapshot")]
pub mod offload;
pub mod precopy;
#[cfg(feature = "probe")]
pub mod probe;
pub mod range;
#[cfg(feature = "snapshot")]
pub mod snapshot;
pub mod source;
#[cfg(feature = "device-state")]
#[cfg_attr(not(feature = "transfer"), expect(dead_code, reason = "a State comes in a transfer only"))]
mod state_tree;
mod sync;
pub mod syscalls;
pub mod table;
#[cfg(feature = "transfer")]
pub mod threads;
pub mod tracker;
#[cfg(feature = "transfer")]
pub mod transfer;
#[cfg(feature = "vfio-user")]
pub mod vfio_user;
#[cfg(feature = "transfer")]
pub mod vm;

#[cfg(test)]
#[path = "../integration/src/skip.rs"]
#[expect(dead_code, unreachable_pub, reason = "other crates' tests use the rest")]
mod skip;
mod sys;
mod units;

/// Compiles what `docs/embedding.md` shows.
#[cfg(all(doctest, feature = "transfer"))]
#[doc = include_str!("../docs/embedding.md")]
struct Embedding;
