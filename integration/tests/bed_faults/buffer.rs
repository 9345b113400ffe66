// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The bitmap's buffer is gone when the kernel writes to it: EFAULT, half-way through a read that clears.

use std::collections::BTreeSet;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vfio_bindings::bindings::vfio::VFIO_TYPE1v2_IOMMU;
use vfio_migration::layout::Layout;
use vfio_migration::source::{ContainerLog, DeviceLog, DirtySource, Meaning, Reports};
use vfio_migration::tracker::{DeviceMappings, SpaceId, Tracker, VmMappings};
use vfio_migration_integration::bed::{BedSetup, Here, Mirror};

use crate::trap::{self, Trap, Trapped};
use crate::{chain, setups};

const PAGE_BYTES: u64 = 4096;
/// Words the engine writes at a time.
const WORDS: u64 = 20;

/// A VM with one source, over a trapped descriptor, whose buffer was caught.
struct Bench {
    tracker: Tracker,
    mirror: Mirror,
    trap: Arc<Trap>,
    here: Here,
}

impl Bench {
    fn new<F: AsRawFd>(
        setup: BedSetup,
        readable: bool,
        descriptor: impl FnOnce(&Here) -> F,
        source: impl FnOnce(Trapped<F>) -> Box<dyn DirtySource>,
    ) -> Self {
        let here = Here::new(setup).unwrap();
        here.side.boot().unwrap();
        let trap = Arc::new(Trap::default());
        let source = source(Trapped { inner: descriptor(&here), readable, trap: Arc::clone(&trap) });
        let layout = Layout::from_guest_memory(here.side.machine().memory()).unwrap();
        let ram: Vec<_> = layout.regions().iter().map(|region| region.range()).collect();
        let device = (source.reports() == Reports::Devices).then_some("mdev0");
        let devices = device.map(|name| DeviceMappings { device: name.to_owned(), gpa: ram.clone() });
        let devices = devices.into_iter().collect();
        let mappings = VmMappings { ram, devices, ..VmMappings::default() };
        let builder = Tracker::builder(layout).mappings(move || mappings.clone());
        let mut tracker = builder.source_of(SpaceId::IDENTITY, device, source).build().unwrap();
        let mirror = Mirror::start(&here.memory, &mut tracker).unwrap();
        // The first collect allocates the buffer: a bit for each page of the first region, the largest.
        let pages = here.memory.regions()[0].len / PAGE_BYTES;
        trap::catch(usize::try_from(pages / 8).unwrap());
        let mut bench = Self { tracker, mirror, trap, here };
        bench.assert_exact();
        bench
    }

    /// Lets the engine write, and takes the buffer away while that is collected, for the region of this number, from 1.
    fn lose_the_buffer(&mut self, region: usize) -> Vec<String> {
        self.here.side.engine().burst(WORDS).unwrap();
        self.trap.set(region);
        let errors = self.tracker.collect();
        self.trap.open();
        errors.iter().map(|error| chain(error)).collect()
    }

    fn assert_all_counts_as_written(&mut self) {
        let copied = self.mirror.copy(&mut self.tracker).unwrap();
        assert_eq!(copied.len() as u64, self.here.memory.layout().total_bytes() / PAGE_BYTES);
        assert_eq!(self.mirror.differing().unwrap(), BTreeSet::new());
    }

    fn assert_exact(&mut self) {
        let engine = self.here.side.engine();
        let first = engine.position().unwrap();
        engine.burst(WORDS).unwrap();
        assert!(self.tracker.collect().is_empty());
        assert_eq!(self.mirror.copy(&mut self.tracker).unwrap(), pages_of(&self.here, first, WORDS));
    }
}

fn pages_of(here: &Here, first: u64, words: u64) -> BTreeSet<u64> {
    here.side.stream().words(first, words).map(|(iova, _)| iova & !(PAGE_BYTES - 1)).collect()
}

#[test]
fn c07_container_bitmap_whose_buffer_is_gone_loses_no_page() {
    let Some([setup, _]) = setups("container bitmap without a buffer") else { return };
    let mut bench = Bench::new(
        setup,
        false,
        |here| Arc::clone(here.side.engine().pass_through().container()),
        |container| {
            Box::new(ContainerLog::new("trapped", container, VFIO_TYPE1v2_IOMMU, Meaning::Written).unwrap())
        },
    );
    for region in [1, 2] {
        let told = bench.lose_the_buffer(region);
        assert!(told.len() == 1 && told[0].contains("Bad address"), "{told:?}");
        bench.assert_all_counts_as_written();
        // The log was started anew: it is exact again.
        bench.assert_exact();
        assert_eq!(bench.mirror.differing().unwrap(), BTreeSet::new());
    }
}

/// Linux 6.12 pins a REPORT's buffer only as it sets bits, and drops the bits where it cannot, with success: nobody is told. So the
/// only defence is that the buffer is the source's own, and ordinary memory. A kernel that does tell is believed.
#[test]
fn device_log_into_a_buffer_that_cannot_be_written_fails_or_is_lost_without_a_word() {
    let Some([setup, _]) = setups("device log without a buffer") else { return };
    let mut bench = Bench::new(
        setup,
        true,
        |here| Arc::clone(here.side.engine().pass_through().device()),
        |device| Box::new(DeviceLog::new("trapped", device).unwrap()),
    );
    let first = bench.here.side.engine().position().unwrap();
    let told = bench.lose_the_buffer(2);
    if told.is_empty() {
        let border = bench.here.memory.regions()[1].gpa;
        let written = pages_of(&bench.here, first, WORDS);
        let (below, above): (BTreeSet<_>, BTreeSet<_>) = written.into_iter().partition(|gpa| *gpa < border);
        assert_eq!(bench.mirror.copy(&mut bench.tracker).unwrap(), below);
        assert_eq!(bench.mirror.differing().unwrap(), above, "the kernel dropped the bits");
        eprintln!("this kernel's DMA_LOGGING_REPORT succeeds where it cannot write its bitmap");
    } else {
        assert!(told[0].contains("Bad address"), "{told:?}");
        bench.assert_all_counts_as_written();
    }
    bench.assert_exact();
}
