// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Shows that the test bed's devices do what the tests of the library count on, with nothing of the library in between.
//!
//! Runs inside the bed: `integration/testbed/run`. Elsewhere each test says that it was skipped.

#![expect(unsafe_code, reason = "the point is to call the kernel with nothing in between")]
#![expect(clippy::unwrap_used, reason = "a test's own steps must succeed")]

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::ptr;
use std::slice;
use std::thread::sleep;
use std::time::Duration;

const PAGE: usize = 4096;
const PAGES: usize = 256;
const IOVA: u64 = 0x100_0000;

/// What the guest's init found, if this is the bed's guest.
fn bed(test: &str) -> Option<BTreeMap<String, String>> {
    let Ok(text) = fs::read_to_string("/etc/vfio-migration-bed") else {
        eprintln!("SKIPPED {test}: not inside the test bed (integration/testbed/run)");
        return None;
    };
    let pairs = text.lines().filter_map(|line| line.split_once('='));
    Some(pairs.map(|(k, v)| (k.into(), v.into())).collect())
}

/// The devices of a kind, if the bed has two of it.
fn two(test: &str, kind: &str) -> Option<[String; 2]> {
    let bed = bed(test)?;
    let names: Vec<String> =
        bed.get(kind).map_or(Vec::new(), |names| names.split_whitespace().map(String::from).collect());
    let two = names.try_into().ok();
    if two.is_none() {
        let (kernel, scenario) = (&bed["kernel"], &bed["scenario"]);
        eprintln!("SKIPPED {test}: no two {kind} in scenario {scenario} on the {kernel} kernel");
    }
    two
}

/// One of VFIO's or iommufd's ioctls, with a pointer to `argument` or a plain number in its place.
fn vfio<T>(fd: &impl AsRawFd, number: u64, argument: *mut T) -> io::Result<i32> {
    // SAFETY: `argument` is a number, or points to the kernel's structure for this call, whose size it states.
    let ret = unsafe { libc::ioctl(fd.as_raw_fd(), (0x3b00 + number) as _, argument) };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(ret) }
}

const SET_IOMMU: u64 = 102;
const GROUP_SET_CONTAINER: u64 = 104;
const GROUP_GET_DEVICE_FD: u64 = 106;
const IOMMU_MAP_DMA: u64 = 113;
const IOMMU_DIRTY_PAGES: u64 = 117;
const DEVICE_FEATURE: u64 = 117;
const MIG_GET_PRECOPY_INFO: u64 = 121;

const FEATURE_GET: u32 = 1 << 16;
const FEATURE_SET: u32 = 1 << 17;
const MIG_DEVICE_STATE: u32 = 2;
const DMA_LOGGING_START: u32 = 6;
const DMA_LOGGING_STOP: u32 = 7;
const DMA_LOGGING_REPORT: u32 = 8;

const STOP: u32 = 1;
const RUNNING: u32 = 2;
const STOP_COPY: u32 = 3;
const RESUMING: u32 = 4;
const RUNNING_P2P: u32 = 5;
const PRE_COPY: u32 = 6;

/// A device in a container of its own, with 1 MiB of memory mapped at `IOVA`.
struct Device {
    file: File,
    container: File,
    memory: *mut u8,
}

impl Device {
    fn open(bus: &str, name: &str) -> Self {
        let group = fs::read_link(format!("/sys/bus/{bus}/devices/{name}/iommu_group")).unwrap();
        let group = format!("/dev/vfio/{}", group.file_name().unwrap().to_str().unwrap());
        let open = |path: &str| OpenOptions::new().read(true).write(true).open(path).unwrap();
        let (group, container) = (open(&group), open("/dev/vfio/vfio"));
        let mut fd: RawFd = container.as_raw_fd();
        vfio(&group, GROUP_SET_CONTAINER, &raw mut fd).unwrap();
        let type1v2 = ptr::without_provenance_mut::<u8>(3);
        vfio(&container, SET_IOMMU, type1v2).unwrap();
        let mut c_name = [name.as_bytes(), b"\0"].concat();
        let fd = vfio(&group, GROUP_GET_DEVICE_FD, c_name.as_mut_ptr()).unwrap();

        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping, of which nobody knows yet; it is never unmapped.
        let memory = unsafe { libc::mmap(ptr::null_mut(), PAGES * PAGE, prot, flags, -1, 0) };
        assert_ne!(memory, libc::MAP_FAILED);
        let mut map = [32 | 3 << 32, memory as u64, IOVA, (PAGES * PAGE) as u64];
        vfio(&container, IOMMU_MAP_DMA, &raw mut map).unwrap();
        // SAFETY: the kernel has just made this descriptor for us.
        let file = unsafe { File::from_raw_fd(fd) };
        Self { file, container, memory: memory.cast() }
    }

    fn memory(&self) -> Vec<u64> {
        // SAFETY: the mapping is this long and stays. Devices may write to it meanwhile, so it is copied out.
        let words = unsafe { slice::from_raw_parts(self.memory.cast::<u64>(), PAGES * PAGE / 8) };
        words.to_vec()
    }

    fn fill(&self, words: &[u64]) {
        assert!(words.len() <= PAGES * PAGE / 8);
        // SAFETY: the mapping is at least this long, and no reference to it is alive.
        unsafe { ptr::copy_nonoverlapping(words.as_ptr(), self.memory.cast(), words.len()) };
    }

    fn write(&self, register: u64, value: u64) -> io::Result<()> {
        self.file.write_all_at(&value.to_le_bytes(), register)
    }

    fn read(&self, register: u64) -> u64 {
        let mut bytes = [0; 8];
        self.file.read_exact_at(&mut bytes, register).unwrap();
        u64::from_le_bytes(bytes)
    }

    /// `VFIO_DEVICE_FEATURE` with `N` words of data, in and out.
    fn feature<const N: usize>(&self, feature: u32, data: [u64; N]) -> io::Result<[u64; N]> {
        let argsz = 8 + 8 * N as u64;
        let mut argument: Vec<u64> = vec![argsz | u64::from(feature) << 32];
        argument.extend(data);
        vfio(&self.file, DEVICE_FEATURE, argument.as_mut_ptr())?;
        Ok(argument[1..].try_into().unwrap())
    }

    fn start_log(&self) {
        let mut range = [IOVA, (PAGES * PAGE) as u64];
        let control = [PAGE as u64, 1, (&raw mut range).addr() as u64];
        self.feature(FEATURE_SET | DMA_LOGGING_START, control).unwrap();
    }

    /// The dirty pages the device's log reports, and clears.
    fn log(&self) -> Vec<usize> {
        let mut bitmap = [0u64; PAGES / 64];
        let pointer = (&raw mut bitmap).addr() as u64;
        let report = [IOVA, (PAGES * PAGE) as u64, PAGE as u64, pointer];
        self.feature(FEATURE_GET | DMA_LOGGING_REPORT, report).unwrap();
        set_bits(&bitmap)
    }

    /// `VFIO_IOMMU_DIRTY_PAGES` with one flag and no data.
    fn container_dirty(&self, flag: u64) {
        let mut argument = 8 | flag << 32;
        vfio(&self.container, IOMMU_DIRTY_PAGES, &raw mut argument).unwrap();
    }

    /// The dirty pages the container reports, and clears.
    fn container_bitmap(&self) -> Vec<usize> {
        let mut bitmap = [0u64; PAGES / 64];
        let pointer = (&raw mut bitmap).addr() as u64;
        let size = (PAGES * PAGE) as u64;
        let mut get = [48 | 4 << 32, IOVA, size, PAGE as u64, (PAGES / 8) as u64, pointer];
        vfio(&self.container, IOMMU_DIRTY_PAGES, &raw mut get).unwrap();
        set_bits(&bitmap)
    }

    fn try_set_state(&self, state: u32) -> io::Result<Option<File>> {
        let data = u64::from(state) | 0xffff_ffff << 32;
        let [data] = self.feature(FEATURE_SET | MIG_DEVICE_STATE, [data])?;
        let fd = (data >> 32) as i32;
        // SAFETY: where it is one, the kernel has just made this descriptor for us.
        Ok((fd >= 0).then(|| unsafe { File::from_raw_fd(fd) }))
    }

    fn set_state(&self, state: u32) -> Option<File> {
        self.try_set_state(state).unwrap()
    }

    /// Saves the device through PRE_COPY; it ends in STOP_COPY.
    fn save(&self) -> Vec<u8> {
        let mut file = self.set_state(PRE_COPY).unwrap();
        let mut image = Vec::new();
        let end = file.read_to_end(&mut image).unwrap_err();
        assert_eq!(end.raw_os_error(), Some(libc::ENOMSG));
        let mut info = [24u64, 0, 0];
        vfio(&file, MIG_GET_PRECOPY_INFO, &raw mut info).unwrap();
        assert_eq!(info[1], 0, "the initial bytes were read");
        assert!(self.set_state(STOP_COPY).is_none(), "the session goes on");
        file.read_to_end(&mut image).unwrap();
        image
    }

    fn load(&self, image: &[u8]) {
        self.set_state(RESUMING).unwrap().write_all(image).unwrap();
        self.set_state(STOP);
        self.set_state(RUNNING);
    }
}

fn set_bits(bitmap: &[u64]) -> Vec<usize> {
    let is_set = |i: &usize| bitmap[i / 64] >> (i % 64) & 1 == 1;
    (0..bitmap.len() * 64).filter(is_set).collect()
}

// dirty_mdev: see resources/modules/dirty_mdev.h.
const CONTROL: u64 = 0x08;
const SEED: u64 = 0x10;
const POSITION: u64 = 0x18;
const COUNT: u64 = 0x20;
const RATE: u64 = 0x30;
const BURST: u64 = 0x38;
const WRITE_AT: u64 = 0x40;
const PIN: u64 = 0x48;
const UNPIN: u64 = 0x50;
const WINDOW: u64 = 0x100;

/// The words dirty_mdev writes to one window over all memory, from `first` on: index and word.
fn stream(seed: u64, first: u64, count: u64) -> impl Iterator<Item = (usize, u64)> {
    let random = move |n: u64| {
        let z = seed.wrapping_add((n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let slots = (PAGES * PAGE / 8) as u64;
    (first..first + count).map(move |p| (usize::try_from(random(2 * p) % slots).unwrap(), random(2 * p + 1)))
}

/// The pages a part of the stream dirties, in order.
fn stream_pages(seed: u64, first: u64, count: u64) -> Vec<usize> {
    let mut pages: Vec<usize> = stream(seed, first, count).map(|(word, _)| word * 8 / PAGE).collect();
    pages.sort_unstable();
    pages.dedup();
    pages
}

fn open_mdev(name: &str, seed: u64) -> Device {
    let device = Device::open("mdev", name);
    device.write(WINDOW, IOVA).unwrap();
    device.write(WINDOW + 8, (PAGES * PAGE) as u64).unwrap();
    device.write(SEED, seed).unwrap();
    device
}

#[test]
fn container_bitmap_names_exactly_what_an_mdev_wrote() {
    let Some([name, _]) = two("container bitmap", "dirty_mdev") else {
        return;
    };
    let device = open_mdev(&name, 7);
    device.container_dirty(1);
    assert_eq!(device.container_bitmap(), []);

    device.write(BURST, 40).unwrap();
    device.write(WRITE_AT, IOVA + 200 * PAGE as u64).unwrap();
    let mut pages = stream_pages(7, 0, 40);
    pages.push(200);
    pages.sort_unstable();
    pages.dedup();
    assert_eq!(device.container_bitmap(), pages);
    assert_eq!(device.container_bitmap(), [], "reading clears");

    device.write(PIN, IOVA + 5 * PAGE as u64).unwrap();
    assert_eq!(device.container_bitmap(), [5]);
    assert_eq!(device.container_bitmap(), [5], "a pinned page stays dirty");
    device.write(UNPIN, IOVA + 5 * PAGE as u64).unwrap();
    device.container_dirty(2);
}

#[test]
fn mdev_log_names_exactly_what_it_wrote() {
    let Some([name, _]) = two("mdev log", "dirty_mdev") else {
        return;
    };
    let device = open_mdev(&name, 11);
    device.write(BURST, 10).unwrap();
    device.start_log();
    assert_eq!(device.log(), []);
    device.write(BURST, 30).unwrap();
    assert_eq!(device.log(), stream_pages(11, 10, 30));
    assert_eq!(device.log(), [], "reporting clears");
    device.feature(FEATURE_SET | DMA_LOGGING_STOP, []).map(|[]| ()).unwrap();
}

#[test]
fn mdev_moves_and_its_stream_continues() {
    let Some([source, destination]) = two("mdev migration", "dirty_mdev") else {
        return;
    };
    let (source, destination) = (open_mdev(&source, 23), open_mdev(&destination, 0));
    source.write(RATE, 20_000).unwrap();
    source.write(CONTROL, 1).unwrap();
    sleep(Duration::from_millis(200));
    let image = source.save();
    let written = source.read(POSITION);
    assert!(written > 0 && source.read(COUNT) == written, "{written} writes");
    sleep(Duration::from_millis(50));
    assert_eq!(source.read(POSITION), written, "the stopped engine is silent");

    let mut expected = vec![0; PAGES * PAGE / 8];
    stream(23, 0, written).for_each(|(word, value)| expected[word] = value);
    assert!(source.memory() == expected, "the source wrote its stream and nothing else");

    destination.fill(&expected);
    destination.load(&image);
    sleep(Duration::from_millis(100));
    destination.write(CONTROL, 0).unwrap();
    destination.write(BURST, 100).unwrap();
    let more = destination.read(POSITION) - written;
    assert!(more > 100, "{more} writes: the engine ran on by itself");
    stream(23, written, more).for_each(|(word, value)| expected[word] = value);
    assert!(destination.memory() == expected, "the destination continued the stream");
}

#[test]
fn damaged_image_does_not_leave_resuming() {
    let Some([source, destination]) = two("damaged image", "dirty_mdev") else {
        return;
    };
    let (source, destination) = (open_mdev(&source, 1), open_mdev(&destination, 0));
    let mut image = source.save();
    let middle = image.len() / 2;
    image[middle] ^= 1;
    destination.set_state(RESUMING).unwrap().write_all(&image).unwrap();
    destination.try_set_state(STOP).unwrap_err();
}

// edu: its DMA registers, and its buffer as a DMA address.
const DMA_SRC: u64 = 0x80;
const DMA_DST: u64 = 0x88;
const DMA_COUNT: u64 = 0x90;
const DMA_CMD: u64 = 0x98;
const TO_DEVICE: u64 = 1;
const TO_MEMORY: u64 = 3;
const BUFFER: u64 = 0x4_0000;
const BUFFER_BYTES: u64 = 4088;

fn open_edu(name: &str) -> Device {
    let device = Device::open("pci", name);
    let command = (7 << 40) + 4;
    let memory_and_master = 6u16.to_le_bytes();
    device.file.write_all_at(&memory_and_master, command).unwrap();
    device
}

impl Device {
    fn start_dma(&self, src: u64, dst: u64, count: u64, command: u64) {
        self.write(DMA_SRC, src).unwrap();
        self.write(DMA_DST, dst).unwrap();
        self.write(DMA_COUNT, count).unwrap();
        self.write(DMA_CMD, command).unwrap();
    }

    fn finish_dma(&self) {
        while self.read(DMA_CMD) & 1 == 1 {
            sleep(Duration::from_millis(5));
        }
    }

    fn dma(&self, src: u64, dst: u64, count: u64, command: u64) {
        self.start_dma(src, dst, count, command);
        self.finish_dma();
    }
}

#[test]
fn edu_page_stays_dirty_until_its_dma_has_landed() {
    let Some([name, _]) = two("edu log", "edu_vfio") else {
        return;
    };
    let device = open_edu(&name);
    device.fill(&[0x1234_5678_9abc_def0]);
    device.dma(IOVA, BUFFER, 64, TO_DEVICE);

    device.start_log();
    assert_eq!(device.log(), []);
    device.start_dma(BUFFER, IOVA + 30 * PAGE as u64 - 32, 64, TO_MEMORY);
    if device.read(DMA_CMD) & 1 == 1 {
        assert_eq!(device.log(), [29, 30]);
    }
    device.finish_dma();
    assert_eq!(device.log(), [29, 30], "once more when it is done");
    assert_eq!(device.log(), []);
    assert_eq!(device.memory()[30 * PAGE / 8 - 4], 0x1234_5678_9abc_def0, "the DMA is real");
}

#[test]
fn edu_is_not_quiescent_before_its_dma_has_landed() {
    let Some([name, _]) = two("edu quiescence", "edu_vfio") else {
        return;
    };
    let device = open_edu(&name);
    device.fill(&[42]);
    device.dma(IOVA, BUFFER, 8, TO_DEVICE);
    device.start_dma(BUFFER, IOVA + 8, 8, TO_MEMORY);
    device.set_state(RUNNING_P2P);
    assert_eq!(device.memory()[1], 42);
    device.write(DMA_CMD, TO_MEMORY).unwrap_err();
}

#[test]
fn edu_moves_with_its_registers_and_its_buffer() {
    let Some([source, destination]) = two("edu migration", "edu_vfio") else {
        return;
    };
    let (source, destination) = (open_edu(&source), open_edu(&destination));
    let buffer: Vec<u64> = stream(3, 0, BUFFER_BYTES / 8).map(|(_, word)| word).collect();
    source.fill(&buffer);
    source.dma(IOVA, BUFFER, BUFFER_BYTES, TO_DEVICE);
    source.file.write_all_at(&5u32.to_le_bytes(), 0x08).unwrap();

    destination.load(&source.save());
    assert_eq!(destination.read(DMA_SRC), IOVA);
    assert_eq!(destination.read(DMA_COUNT), BUFFER_BYTES);
    let mut factorial = [0; 4];
    destination.file.read_exact_at(&mut factorial, 0x08).unwrap();
    assert_eq!(u32::from_le_bytes(factorial), 120);
    destination.dma(BUFFER, IOVA, BUFFER_BYTES, TO_MEMORY);
    assert!(destination.memory()[..buffer.len()] == buffer);

    // The source, resumed after all, has lost nothing either.
    source.set_state(RUNNING);
    source.dma(BUFFER, IOVA + PAGE as u64, BUFFER_BYTES, TO_MEMORY);
    assert!(source.memory()[512..][..buffer.len()] == buffer);
}

const IOAS_ALLOC: u64 = 0x81;
const IOAS_MAP: u64 = 0x85;
const HWPT_ALLOC: u64 = 0x89;
const HWPT_SET_DIRTY_TRACKING: u64 = 0x8b;
const HWPT_GET_DIRTY_BITMAP: u64 = 0x8c;
const TEST_CMD: u64 = 0xa0;
const TEST_OP_MOCK_DOMAIN: u64 = 2;
const TEST_OP_MOCK_DOMAIN_REPLACE: u64 = 10;
const TEST_OP_DIRTY: u64 = 13;

/// A call of iommufd, whose structures all begin with their size; returns the structure it wrote.
fn iommufd<const N: usize>(iommu: &File, number: u64, mut words: [u64; N]) -> [u64; N] {
    words[0] |= 8 * N as u64;
    vfio(iommu, number, words.as_mut_ptr()).unwrap();
    words
}

#[test]
fn mock_domain_tracks_what_the_kernel_pretends_was_written() {
    let Some(bed) = bed("mock domain") else { return };
    if bed["kernel"] != "own" || bed["scenario"] == "no-vfio" {
        eprintln!("SKIPPED mock domain: only the own kernel has it");
        return;
    }
    let iommu = OpenOptions::new().read(true).write(true).open("/dev/iommu").unwrap();
    let ioas = iommufd(&iommu, IOAS_ALLOC, [0; 2])[1];
    let mock = iommufd(&iommu, TEST_CMD, [TEST_OP_MOCK_DOMAIN << 32, ioas, 0, 0, 0, 0, 0, 0, 0]);
    let (mock_device, device) = (mock[2] & 0xffff_ffff, mock[3] & 0xffff_ffff);
    let hwpt = iommufd(&iommu, HWPT_ALLOC, [2 << 32, device | ioas << 32, 0, 0, 0, 0])[2];
    let replace = [TEST_OP_MOCK_DOMAIN_REPLACE << 32, mock_device, hwpt, 0, 0, 0, 0, 0, 0];
    iommufd(&iommu, TEST_CMD, replace);
    let (memory, size) = (vec![0u8; PAGES * PAGE], (PAGES * PAGE) as u64);
    iommufd(&iommu, IOAS_MAP, [7 << 32, ioas, memory.as_ptr().addr() as u64, size, IOVA]);
    iommufd(&iommu, HWPT_SET_DIRTY_TRACKING, [1 << 32, hwpt]);

    // The mock domain's pages are half as large as the machine's.
    let (half, mut written, mut dirty) = (PAGE as u64 / 2, [0u64; PAGES / 32], [0u64; PAGES / 64]);
    for page in [0, 1, 6, 100, 511] {
        written[page / 64] |= 1 << (page % 64);
    }
    let written = (&raw mut written).addr() as u64;
    iommufd(&iommu, TEST_CMD, [TEST_OP_DIRTY << 32, hwpt, 0, IOVA, size, half, written, 0, 0]);
    let get = [hwpt << 32, 0, IOVA, size, PAGE as u64, (&raw mut dirty).addr() as u64];
    iommufd(&iommu, HWPT_GET_DIRTY_BITMAP, get);
    assert_eq!(set_bits(&dirty), [0, 3, 50, 255]);
}

#[test]
fn the_scenario_has_what_it_says() {
    let Some(bed) = bed("scenario") else { return };
    let kvm = kvm_ioctls::Kvm::new().is_ok_and(|kvm| kvm.create_vm().is_ok());
    assert_eq!(kvm, bed["scenario"] != "no-kvm");
    let vfio = fs::exists("/dev/vfio/vfio").unwrap() && fs::exists("/dev/iommu").unwrap();
    assert_eq!(vfio, bed["scenario"] != "no-vfio");
}
