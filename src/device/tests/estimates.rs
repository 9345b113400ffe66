// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Devices that tell sizes in each of the ways that drivers do.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::*;

pub(super) const MIB: u64 = 1 << 20;

/// What a device's `MIG_DATA_SIZE` means.
#[derive(Clone, Copy)]
pub(super) enum Size {
    /// The whole state, whatever was read: mlx5.
    Whole(u64),
    /// What is left of a state of so many bytes.
    Rest(u64),
}

/// A device that has nothing but sizes, and reads that bear them out.
pub(super) struct Teller {
    size: Size,
    state: DeviceState,
    pub(super) info: PrecopyInfo,
    /// Initial bytes that it gets when it is asked next.
    pub(super) grows: Arc<AtomicU64>,
    /// Bytes that have changed whenever it is asked.
    changes: u64,
    read: u64,
    asked: Arc<AtomicUsize>,
}

impl Teller {
    pub(super) fn new(size: Size, initial_bytes: u64) -> Self {
        let info = PrecopyInfo { initial_bytes, dirty_bytes: 0 };
        Self { size, state: Running, info, grows: Arc::default(), changes: 0, read: 0, asked: Arc::default() }
    }

    pub(super) fn changing(self, changes: u64) -> Self {
        Self { changes, ..self }
    }

    pub(super) fn in_set(self) -> DeviceSet {
        DeviceSet::new(vec![self.device()]).unwrap()
    }

    fn device(self) -> Device {
        Device::new("dev", Box::new(self))
    }
}

impl DeviceIo for Teller {
    fn capabilities(&self) -> Capabilities {
        ALL
    }

    fn state(&mut self) -> Result<DeviceState, DeviceError> {
        Ok(self.state)
    }

    fn set_state(&mut self, state: DeviceState) -> Result<(), DeviceError> {
        self.state = state;
        Ok(())
    }

    fn read_data(&mut self, buffer: &mut [u8]) -> Result<DataRead, DeviceError> {
        let left = self.info.initial_bytes + self.info.dirty_bytes;
        let count = usize::try_from(left).unwrap().min(buffer.len());
        let initial = self.info.initial_bytes.min(count as u64);
        self.info.initial_bytes -= initial;
        self.info.dirty_bytes -= count as u64 - initial;
        self.read += count as u64;
        Ok(match (count, self.state) {
            (0, StopCopy) => DataRead::End,
            (0, _) => DataRead::NothingNow,
            (count, _) => DataRead::Bytes(count),
        })
    }

    fn write_data(&mut self, _: &[u8]) -> Result<(), DeviceError> {
        Ok(())
    }

    fn precopy_info(&mut self) -> Result<Option<PrecopyInfo>, DeviceError> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        self.info.dirty_bytes = self.info.dirty_bytes.max(self.changes);
        self.info.initial_bytes += self.grows.swap(0, Ordering::Relaxed);
        Ok(Some(self.info))
    }

    fn data_size(&mut self) -> Result<Option<u64>, DeviceError> {
        Ok(Some(match self.size {
            Size::Whole(bytes) => bytes,
            Size::Rest(bytes) => bytes.saturating_sub(self.read),
        }))
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }
}

#[test]
fn c45_thirty_mib_are_thirty_mib_whatever_was_read() {
    for size in [Size::Whole(30 * MIB), Size::Rest(30 * MIB)] {
        let mut set = Teller::new(size, 20 * MIB).in_set();
        assert_eq!(set.estimate().unwrap().state_bytes, 30 * MIB, "while it runs");
        set.start_precopy().unwrap();
        for read in [0, 10, 20] {
            let estimate = set.estimate().unwrap();
            assert_eq!((estimate.state_bytes, estimate.stop_copy_bytes), (30 * MIB, (30 - read) * MIB));
            assert_eq!(estimate.initial_bytes, (20 - read) * MIB);
            set.precopy_step(10 * MIB).unwrap();
        }
        assert_eq!(set.stop_for_copy().unwrap().state_bytes, 30 * MIB, "once it is stopped");
    }
}

#[test]
fn c46_what_changes_again_is_not_read_again() {
    let teller = Teller::new(Size::Whole(5 * MIB), 5 * MIB).changing(5 * MIB);
    let asked = Arc::clone(&teller.asked);
    let mut set = teller.in_set();
    set.start_precopy().unwrap();
    for _ in 0..20 {
        set.precopy_step(64 * MIB).unwrap();
        let estimate = set.estimate().unwrap();
        assert_eq!((estimate.state_bytes, estimate.initial_bytes), (10 * MIB, 0));
    }
    assert_eq!(set.precopy_bytes(), 5 * MIB);
    assert_eq!(asked.load(Ordering::Relaxed), 2, "once to begin, and once to see that it was all");
    set.estimate_anew().unwrap();
    set.stop_for_copy().unwrap();
    set.save().unwrap();
    assert_eq!((set.state_bytes(), asked.load(Ordering::Relaxed)), (10 * MIB, 3));
}

#[test]
fn c47_initial_bytes_up_to_the_limit_are_read_and_more_are_refused_at_once() {
    let limit = 8 * MIB;
    let limited = |initial_bytes| {
        let device = Teller::new(Size::Rest(4 * MIB), initial_bytes).device();
        let mut set = DeviceSet::new(vec![device.state_limit(usize::try_from(limit).unwrap())]).unwrap();
        set.start_precopy().unwrap();
        set
    };
    let mut most = limited(limit);
    assert_eq!(most.estimate().unwrap().initial_bytes, limit);
    assert_eq!(most.precopy_step(u64::MAX).unwrap(), PrecopyStep { bytes: limit, drained: true });
    assert_eq!(most.estimate().unwrap().initial_bytes, 0);
    let refused = chain(&limited(limit + 1).estimate().unwrap_err());
    assert_eq!(
        refused,
        "Cannot estimate state of device \"dev\": Device has 8388609 bytes of state, more than the 8388608 that \
         Device::state_limit allows"
    );
}

#[test]
fn c48_a_state_larger_than_the_limit_is_refused_while_the_device_runs() {
    let device = Teller::new(Size::Whole(8 * MIB + 1), 0).device().state_limit(8 << 20);
    let mut set = DeviceSet::new(vec![device]).unwrap();
    let refused = set.estimate().unwrap_err();
    let expected = DeviceFailure::StateTooLarge { state_bytes: 8 * MIB + 1, limit_bytes: 8 * MIB };
    assert!(chain(&refused).ends_with(&expected.to_string()), "{}", chain(&refused));
    assert!(Teller::new(Size::Whole(8 * MIB), 0).in_set().estimate().is_ok());
}
