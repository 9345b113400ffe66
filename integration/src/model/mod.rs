// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A model of a migration, explored to exhaustion: no page is lost, and never do two VMs run.
//!
//! Everything that decides on pages is the library's own: [`vfio_migration::tracker::Tracker`] with its ledger, cursors and
//! IOVA journals, and the arcs between device states. Modelled are what is around it: the guest and its devices that write, the logs
//! of the kernel, the way to the receivers, and the sender that drives the tracker in the order of `transfer`.
//!
//! A page's content is whether each copy of it, at a receiver or on its way, is what the source holds; so the guest may write
//! as often as it likes, a migration may be tried as often, and the number of states is finite all the same.

mod action;
mod enabled;
mod explore;
mod machine;
mod mutation;
mod step;
mod world;

pub use explore::{Explored, Violation, explore};
pub use mutation::Mutation;

/// What takes part, and how much of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scenario {
    /// Its name.
    pub name: &'static str,
    /// Pages of RAM that are always there.
    pub ram_pages: u8,
    /// Whether one page more comes and goes.
    pub plugs: bool,
    /// Receivers at once.
    pub receivers: u8,
    /// Whether two devices take part.
    pub devices: bool,
    /// IOVAs that the devices reach memory through.
    pub slots: u8,
    /// Whether the guest maps and unmaps them.
    pub remaps: bool,
    /// Whether a device's state goes ahead as a stream, and something may reset that device.
    pub streams: bool,
    /// Whether devices' logs fail to be read.
    pub faults: bool,
    /// Whether one of the devices is behind a source that calls all it reaches written.
    pub imprecise: bool,
    /// Whether KVM begins with every page's bit set.
    pub initially_set: bool,
    /// Whether the vCPUs write nothing, so that devices' logs alone have to tell.
    pub quiet_vcpus: bool,
    /// Pages of a chunk.
    pub chunk_pages: u64,
    /// Chunks on their way at once.
    pub window: usize,
}

/// What a scenario has unless it says otherwise.
const PLAIN: Scenario = Scenario {
    name: "",
    ram_pages: 2,
    plugs: false,
    receivers: 1,
    devices: false,
    slots: 0,
    remaps: false,
    streams: false,
    faults: false,
    imprecise: false,
    initially_set: false,
    quiet_vcpus: false,
    chunk_pages: 1,
    window: 2,
};

/// Small scenarios, a second for all of them.
pub const SMALL: [Scenario; 7] = [
    Scenario { name: "writes", ..PLAIN },
    Scenario { name: "receivers", ram_pages: 1, receivers: 2, ..PLAIN },
    Scenario { name: "devices", ram_pages: 1, devices: true, slots: 1, faults: true, ..PLAIN },
    Scenario { name: "mappings", ram_pages: 1, devices: true, slots: 1, remaps: true, faults: true, ..PLAIN },
    Scenario { name: "streams", ram_pages: 1, devices: true, streams: true, ..PLAIN },
    Scenario { name: "hot-plug", ram_pages: 1, plugs: true, ..PLAIN },
    Scenario {
        name: "imprecise",
        ram_pages: 1,
        devices: true,
        slots: 1,
        remaps: true,
        imprecise: true,
        ..PLAIN
    },
];

/// Larger ones, in which more of it comes together.
pub const LARGE: [Scenario; 9] = [
    Scenario { name: "many-pages", ram_pages: 4, initially_set: true, ..PLAIN },
    Scenario { name: "large-chunks", ram_pages: 3, chunk_pages: 2, ..PLAIN },
    Scenario { name: "two-receivers", receivers: 2, initially_set: true, window: 1, ..PLAIN },
    Scenario { name: "plug-for-two", plugs: true, receivers: 2, ram_pages: 1, window: 1, ..PLAIN },
    Scenario { name: "two-logs", devices: true, slots: 2, quiet_vcpus: true, window: 1, ..PLAIN },
    Scenario { name: "re-arm", devices: true, slots: 2, remaps: true, quiet_vcpus: true, window: 1, ..PLAIN },
    Scenario { name: "busy", devices: true, slots: 2, remaps: true, window: 1, ..PLAIN },
    Scenario {
        name: "devices-for-two",
        receivers: 2,
        ram_pages: 1,
        devices: true,
        slots: 1,
        faults: true,
        ..PLAIN
    },
    Scenario {
        name: "all",
        devices: true,
        slots: 2,
        remaps: true,
        faults: true,
        plugs: true,
        ram_pages: 1,
        window: 1,
        ..PLAIN
    },
];
