// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The kernel's interfaces, with nothing in between: ioctl numbers, and structures as arrays of words.

#![expect(unsafe_code, reason = "the point is to call the kernel with nothing in between")]

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::ptr;
use std::slice;

use vfio_migration_integration::skipped;

pub(crate) const PAGE: usize = 4096;
pub(crate) const PAGES: usize = 256;
pub(crate) const IOVA: u64 = 0x100_0000;

/// What the guest's init found, if this is the bed's guest.
pub(crate) fn bed(test: &str) -> Option<BTreeMap<String, String>> {
    let Ok(text) = fs::read_to_string("/etc/vfio-migration-bed") else {
        skipped(test, "not inside the test bed (integration/testbed/run)");
        return None;
    };
    let pairs = text.lines().filter_map(|line| line.split_once('='));
    Some(pairs.map(|(k, v)| (k.into(), v.into())).collect())
}

/// The devices of a kind, if the bed has two of it.
pub(crate) fn two(test: &str, kind: &str) -> Option<[String; 2]> {
    let bed = bed(test)?;
    let names: Vec<String> =
        bed.get(kind).map_or(Vec::new(), |names| names.split_whitespace().map(String::from).collect());
    let two = names.try_into().ok();
    if two.is_none() {
        let (kernel, scenario) = (&bed["kernel"], &bed["scenario"]);
        skipped(test, format!("no two {kind} in scenario {scenario} on the {kernel} kernel"));
    }
    two
}

/// One of VFIO's or iommufd's ioctls, with a pointer to `argument` or a plain number in its place.
pub(crate) fn vfio<T>(fd: &impl AsRawFd, number: u64, argument: *mut T) -> io::Result<i32> {
    // SAFETY: `argument` is a number, or points to the kernel's structure for this call, whose size it states.
    let ret = unsafe { libc::ioctl(fd.as_raw_fd(), (0x3b00 + number) as _, argument) };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(ret) }
}

/// A call of iommufd, whose structures all begin with their size; returns the structure it wrote.
#[track_caller]
pub(crate) fn iommufd<const N: usize>(iommu: &File, number: u64, mut words: [u64; N]) -> [u64; N] {
    words[0] |= 8 * N as u64;
    vfio(iommu, number, words.as_mut_ptr()).unwrap();
    words
}

pub(crate) const IOAS_ALLOC: u64 = 0x81;
pub(crate) const IOAS_MAP: u64 = 0x85;

pub(crate) const SET_IOMMU: u64 = 102;
pub(crate) const GROUP_SET_CONTAINER: u64 = 104;
pub(crate) const GROUP_GET_DEVICE_FD: u64 = 106;
pub(crate) const DEVICE_GET_REGION_INFO: u64 = 108;
pub(crate) const DEVICE_RESET: u64 = 111;
pub(crate) const IOMMU_MAP_DMA: u64 = 113;
pub(crate) const IOMMU_DIRTY_PAGES: u64 = 117;
pub(crate) const DEVICE_FEATURE: u64 = 117;
pub(crate) const DEVICE_BIND_IOMMUFD: u64 = 118;
pub(crate) const DEVICE_ATTACH_IOMMUFD_PT: u64 = 119;
pub(crate) const MIG_GET_PRECOPY_INFO: u64 = 121;

pub(crate) const FEATURE_GET: u32 = 1 << 16;
pub(crate) const FEATURE_SET: u32 = 1 << 17;
pub(crate) const MIGRATION: u32 = 1;
pub(crate) const MIG_DEVICE_STATE: u32 = 2;
pub(crate) const DMA_LOGGING_START: u32 = 6;
pub(crate) const DMA_LOGGING_STOP: u32 = 7;
pub(crate) const DMA_LOGGING_REPORT: u32 = 8;
pub(crate) const MIG_DATA_SIZE: u32 = 9;

pub(crate) const ERROR: u32 = 0;
pub(crate) const STOP: u32 = 1;
pub(crate) const RUNNING: u32 = 2;
pub(crate) const STOP_COPY: u32 = 3;
pub(crate) const RESUMING: u32 = 4;
pub(crate) const RUNNING_P2P: u32 = 5;
pub(crate) const PRE_COPY: u32 = 6;

/// 1 MiB of zeroed memory; it is never unmapped.
pub(crate) fn anonymous_memory() -> *mut u8 {
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping takes nothing from anybody.
    let memory = unsafe { libc::mmap(ptr::null_mut(), PAGES * PAGE, prot, flags, -1, 0) };
    assert_ne!(memory, libc::MAP_FAILED);
    memory.cast()
}

/// A device in a container of its own, with 1 MiB of memory mapped at `IOVA`.
pub(crate) struct Device {
    pub(crate) file: File,
    pub(crate) container: File,
    pub(crate) memory: *mut u8,
}

impl Device {
    pub(crate) fn open(bus: &str, name: &str) -> Self {
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

        let memory = anonymous_memory();
        let mut map = [32 | 3 << 32, memory.addr() as u64, IOVA, (PAGES * PAGE) as u64];
        vfio(&container, IOMMU_MAP_DMA, &raw mut map).unwrap();
        // SAFETY: the kernel has just made this descriptor for us.
        let file = unsafe { File::from_raw_fd(fd) };
        Self { file, container, memory: memory.cast() }
    }

    /// The same through the device's cdev and an I/O address space of iommufd.
    pub(crate) fn open_cdev(bus: &str, name: &str) -> Self {
        let cdev =
            fs::read_dir(format!("/sys/bus/{bus}/devices/{name}/vfio-dev")).unwrap().next().unwrap().unwrap();
        let open = |path: &str| OpenOptions::new().read(true).write(true).open(path).unwrap();
        let file = open(&format!("/dev/vfio/devices/{}", cdev.file_name().to_str().unwrap()));
        let iommu = open("/dev/iommu");
        let mut bind = [16, u64::try_from(iommu.as_raw_fd()).unwrap()];
        vfio(&file, DEVICE_BIND_IOMMUFD, &raw mut bind).unwrap();
        let ioas = iommufd(&iommu, IOAS_ALLOC, [0; 2])[1];
        let mut attach = [12, ioas];
        vfio(&file, DEVICE_ATTACH_IOMMUFD_PT, &raw mut attach).unwrap();
        let memory = anonymous_memory();
        iommufd(&iommu, IOAS_MAP, [7 << 32, ioas, memory.addr() as u64, (PAGES * PAGE) as u64, IOVA]);
        Self { file, container: iommu, memory }
    }

    pub(crate) fn memory(&self) -> Vec<u64> {
        // SAFETY: the mapping is this long and stays. Devices may write to it meanwhile, so it is copied out.
        let words = unsafe { slice::from_raw_parts(self.memory.cast::<u64>(), PAGES * PAGE / 8) };
        words.to_vec()
    }

    pub(crate) fn fill(&self, words: &[u64]) {
        assert!(words.len() <= PAGES * PAGE / 8);
        // SAFETY: the mapping is at least this long, and no reference to it is alive.
        unsafe { ptr::copy_nonoverlapping(words.as_ptr(), self.memory.cast(), words.len()) };
    }

    pub(crate) fn write(&self, register: u64, value: u64) -> io::Result<()> {
        self.file.write_all_at(&value.to_le_bytes(), register)
    }

    pub(crate) fn read(&self, register: u64) -> u64 {
        let mut bytes = [0; 8];
        self.file.read_exact_at(&mut bytes, register).unwrap();
        u64::from_le_bytes(bytes)
    }

    /// Size and file offset of a region that can be read and written.
    pub(crate) fn region(&self, index: u64) -> (u64, u64) {
        const READ_AND_WRITE: u64 = 3;
        let mut info = [32, index, 0, 0];
        vfio(&self.file, DEVICE_GET_REGION_INFO, &raw mut info).unwrap();
        assert_eq!(info[0] >> 32 & 3, READ_AND_WRITE);
        (info[2], info[3])
    }

    /// `VFIO_DEVICE_FEATURE` with `N` words of data, in and out.
    pub(crate) fn feature<const N: usize>(&self, feature: u32, data: [u64; N]) -> io::Result<[u64; N]> {
        let argsz = 8 + 8 * N as u64;
        let mut argument: Vec<u64> = vec![argsz | u64::from(feature) << 32];
        argument.extend(data);
        vfio(&self.file, DEVICE_FEATURE, argument.as_mut_ptr())?;
        Ok(argument[1..].try_into().unwrap())
    }

    /// Starts the log of these ranges, each an IOVA and a length, and returns the granule chosen.
    pub(crate) fn start_log_of(&self, ranges: &[u64]) -> io::Result<u64> {
        let control = [PAGE as u64, ranges.len() as u64 / 2, ranges.as_ptr().addr() as u64];
        self.feature(FEATURE_SET | DMA_LOGGING_START, control).map(|[granule, ..]| granule)
    }

    pub(crate) fn try_start_log(&self) -> io::Result<u64> {
        self.start_log_of(&[IOVA, (PAGES * PAGE) as u64])
    }

    pub(crate) fn start_log(&self) {
        assert_eq!(self.try_start_log().unwrap(), PAGE as u64);
    }

    pub(crate) fn stop_log(&self) {
        let [] = self.feature(FEATURE_SET | DMA_LOGGING_STOP, []).unwrap();
    }

    /// The dirty pages the device's log reports, and clears.
    pub(crate) fn try_log(&self) -> io::Result<Vec<usize>> {
        let mut bitmap = [0u64; PAGES / 64];
        let pointer = (&raw mut bitmap).addr() as u64;
        let report = [IOVA, (PAGES * PAGE) as u64, PAGE as u64, pointer];
        self.feature(FEATURE_GET | DMA_LOGGING_REPORT, report)?;
        Ok(set_bits(&bitmap))
    }

    pub(crate) fn log(&self) -> Vec<usize> {
        self.try_log().unwrap()
    }

    /// `VFIO_IOMMU_DIRTY_PAGES` with one flag and no data.
    pub(crate) fn container_dirty(&self, flag: u64) {
        let mut argument = 8 | flag << 32;
        vfio(&self.container, IOMMU_DIRTY_PAGES, &raw mut argument).unwrap();
    }

    /// The dirty pages the container reports, and clears.
    pub(crate) fn container_bitmap(&self) -> Vec<usize> {
        let mut bitmap = [0u64; PAGES / 64];
        let pointer = (&raw mut bitmap).addr() as u64;
        let size = (PAGES * PAGE) as u64;
        let mut get = [48 | 4 << 32, IOVA, size, PAGE as u64, (PAGES / 8) as u64, pointer];
        vfio(&self.container, IOMMU_DIRTY_PAGES, &raw mut get).unwrap();
        set_bits(&bitmap)
    }

    pub(crate) fn try_set_state(&self, state: u32) -> io::Result<Option<File>> {
        let data = u64::from(state) | 0xffff_ffff << 32;
        let [data] = self.feature(FEATURE_SET | MIG_DEVICE_STATE, [data])?;
        let fd = (data >> 32) as i32;
        // SAFETY: where it is one, the kernel has just made this descriptor for us.
        Ok((fd >= 0).then(|| unsafe { File::from_raw_fd(fd) }))
    }

    pub(crate) fn set_state(&self, state: u32) -> Option<File> {
        self.try_set_state(state).unwrap()
    }

    pub(crate) fn state(&self) -> u32 {
        let [data] = self.feature(FEATURE_GET | MIG_DEVICE_STATE, [0]).unwrap();
        u32::try_from(data & 0xffff_ffff).unwrap()
    }

    pub(crate) fn data_size(&self) -> u64 {
        let [bytes] = self.feature(FEATURE_GET | MIG_DATA_SIZE, [0]).unwrap();
        bytes
    }

    pub(crate) fn reset(&self) {
        vfio(&self.file, DEVICE_RESET, ptr::null_mut::<u8>()).unwrap();
    }

    /// Saves the device through PRE_COPY; it ends in STOP_COPY.
    pub(crate) fn save(&self) -> Vec<u8> {
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

    pub(crate) fn load(&self, image: &[u8]) {
        self.set_state(RESUMING).unwrap().write_all(image).unwrap();
        self.set_state(STOP);
        self.set_state(RUNNING);
    }
}

pub(crate) fn set_bits(bitmap: &[u64]) -> Vec<usize> {
    let is_set = |i: &usize| bitmap[i / 64] >> (i % 64) & 1 == 1;
    (0..bitmap.len() * 64).filter(is_set).collect()
}
