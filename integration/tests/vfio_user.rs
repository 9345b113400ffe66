// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The client, the dirty source and the device interface against a real device in another process or thread.
#![expect(clippy::unwrap_used, reason = "a test may end at any surprise")]

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vfio_migration::device::{DataRead, DeviceIo, DeviceState, VfioUserDevice, VfioUserDeviceError};
use vfio_migration::granule::Granule;
use vfio_migration::iova::{IovaMap, Mapping};
use vfio_migration::layout::Layout;
use vfio_migration::ledger::{ChunkLimits, CursorId, Ledger, Start};
use vfio_migration::range::{GpaRange, IovaRange};
use vfio_migration::source::{DirtySource, SourceError, VfioUserSource, VfioUserSourceError};
use vfio_migration::vfio_user::feature::{FEATURE_GET, FEATURE_SET, Feature};
use vfio_migration::vfio_user::{Client, DmaRegion, Error, Options, SharedClient};
use vfio_migration_integration::device::control::{self, Status};
use vfio_migration_integration::device::{
    Behaviour, DeviceConfig, DmaDevice, Fault, PAGE_BYTES, ServeError, Stream, When, Window,
};

const PAGE: u64 = PAGE_BYTES as u64;
const REGIONS: [(u64, u64); 2] = [(0, 256 * PAGE), (1 << 32, 131 * PAGE)];
const SOCKET: &str = "VFIO_USER_TEST_SOCKET";
const CONFIG: &str = "VFIO_USER_TEST_CONFIG";

const RUNNING: u32 = DeviceState::Running as u32;
const STOP: u32 = DeviceState::Stop as u32;
const STOP_COPY: u32 = DeviceState::StopCopy as u32;
const RESUMING: u32 = DeviceState::Resuming as u32;
const PRE_COPY: u32 = DeviceState::PreCopy as u32;

/// Guest RAM of two regions, each a file.
struct Ram {
    files: [File; 2],
}

impl Ram {
    fn new() -> Self {
        let files = REGIONS.map(|(_, bytes)| {
            let file = tempfile::tempfile().unwrap();
            file.set_len(bytes).unwrap();
            file
        });
        Ram { files }
    }

    fn map(&self, client: &mut Client) {
        for ((start, bytes), file) in REGIONS.into_iter().zip(&self.files) {
            let region = DmaRegion { iova: iova(start, bytes), file_offset: 0, writeable: true };
            client.dma_map(&region, Some(file.as_fd())).unwrap();
        }
    }

    fn page(&self, gpa: u64) -> [u8; PAGE_BYTES] {
        let at = REGIONS.iter().position(|(start, bytes)| (*start..start + bytes).contains(&gpa)).unwrap();
        let mut page = [0; PAGE_BYTES];
        self.files[at].read_exact_at(&mut page, gpa - REGIONS[at].0).unwrap();
        page
    }

    fn write_page(&self, gpa: u64, page: &[u8; PAGE_BYTES]) {
        let at = REGIONS.iter().position(|(start, bytes)| (*start..start + bytes).contains(&gpa)).unwrap();
        self.files[at].write_all_at(page, gpa - REGIONS[at].0).unwrap();
    }

    fn contents(&self) -> Vec<u8> {
        let mut contents = Vec::new();
        pages().for_each(|gpa| contents.extend_from_slice(&self.page(gpa)));
        contents
    }

    /// Asserts that every page holds what the last position of `status` that reached it wrote.
    #[track_caller]
    fn assert_holds(&self, status: &Status) {
        let last = status.stream.last_writes(status.position);
        for gpa in pages() {
            assert_eq!(
                status.stream.check_page(gpa, &self.page(gpa)),
                Ok(last.get(&gpa).copied()),
                "{gpa:#x}"
            );
        }
    }
}

fn pages() -> impl Iterator<Item = u64> {
    REGIONS.into_iter().flat_map(|(start, bytes)| (start..start + bytes).step_by(PAGE_BYTES))
}

fn iova(start: u64, length: u64) -> IovaRange {
    IovaRange::new(start, length).unwrap()
}

/// Writes to parts of both regions, over word boundaries of the bitmap.
fn stream() -> Stream {
    let windows = [(8 * PAGE, 120 * PAGE), (250 * PAGE, 6 * PAGE), ((1 << 32) + 60 * PAGE, 71 * PAGE)];
    Stream { seed: 42, windows: windows.map(|(iova, bytes)| Window::new(iova, bytes).unwrap()).to_vec() }
}

fn options() -> Options {
    Options { request_timeout: Duration::from_secs(120), ..Options::default() }
}

/// A device on a thread of this process.
fn device_with(config: DeviceConfig, options: &Options) -> (Client, JoinHandle<Result<(), ServeError>>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let thread = thread::spawn(move || DmaDevice::serve(theirs, config));
    (Client::connect(ours, "dma0", options).unwrap(), thread)
}

fn device(config: DeviceConfig) -> Client {
    device_with(config, &options()).0
}

/// A device with its memory mapped and its stream programmed, engine off.
fn programmed(config: DeviceConfig) -> (Client, Ram) {
    let (mut client, ram) = (device(config), Ram::new());
    ram.map(&mut client);
    control::program(&mut client, &stream(), 20_000).unwrap();
    (client, ram)
}

fn start_logging(client: &mut Client) -> Granule {
    let ranges = client.writeable_ranges().to_vec();
    client.start_dma_logging(Granule::KIB_4, &ranges).unwrap()
}

/// Returns the pages the log reports dirty, region by region.
fn report(client: &mut Client) -> BTreeSet<u64> {
    let mut dirty = BTreeSet::new();
    for (start, bytes) in REGIONS {
        let words = client.report_dma_log(iova(start, bytes), Granule::KIB_4).unwrap();
        let set = (0..bytes / PAGE).filter(|page| words[(page / 64) as usize] >> (page % 64) & 1 == 1);
        dirty.extend(set.map(|page| start + page * PAGE));
    }
    dirty
}

fn written(status: &Status, from: u64) -> BTreeSet<u64> {
    (from..status.position).filter_map(|at| status.stream.target(at)).collect()
}

/// Reads migration data until there is no more for now.
fn read_all(client: &mut Client) -> Vec<u8> {
    let (mut data, mut buffer) = (Vec::new(), vec![0; 100_000]);
    loop {
        match client.read_migration_data(&mut buffer).unwrap() {
            0 => return data,
            read => data.extend_from_slice(&buffer[..read]),
        }
    }
}

fn changed_pages(before: &[u8], after: &[u8]) -> BTreeSet<u64> {
    let chunks = before.chunks(PAGE_BYTES).zip(after.chunks(PAGE_BYTES));
    pages().zip(chunks).filter(|(_, (before, after))| before != after).map(|(gpa, _)| gpa).collect()
}

fn wait_for_position(client: &mut Client, position: u64) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while control::status(client).unwrap().position < position {
        assert!(Instant::now() < deadline, "the engine does not move");
        thread::sleep(Duration::from_millis(2));
    }
}

#[path = "vfio_user/client.rs"]
mod client;
#[path = "vfio_user/faults.rs"]
mod faults;
#[path = "vfio_user/hostile.rs"]
mod hostile;
#[path = "vfio_user/process.rs"]
mod process;
#[path = "vfio_user/seams.rs"]
mod seams;
