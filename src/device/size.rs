// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The size of a device's state, from its answers. Pure: answers and counts in, bytes out.
//!
//! `MIG_DATA_SIZE` holds what PRE_COPY may still bring, so the answers to `VFIO_MIG_GET_PRECOPY_INFO` are never added to it.
//! Whether it holds what was read already differs between drivers: some (mlx5) tell the whole size whatever was read, others
//! tell what is left. Only the second kind's answers fall as the state is read.

use super::PrecopyInfo;

/// Share of the state that must have been read before a fallen answer means anything.
const TELLING_SHARE: u64 = 16;

/// What one device told about the size of its state in one session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct StateSize {
    /// The size it told before anything was read.
    first: Option<u64>,
    /// Whether its sizes leave out what was read.
    tells_rest: bool,
    /// What PRE_COPY had to bring when the device was last asked, less what was read since.
    precopy: Option<PrecopyInfo>,
    /// Whether it had no initial bytes left when it was last asked.
    is_past_initial: bool,
}

impl StateSize {
    /// Takes in an answer about PRE_COPY.
    pub(super) fn precopy_told(&mut self, info: PrecopyInfo) {
        self.precopy = Some(info);
        self.is_past_initial = info.initial_bytes == 0;
    }

    /// Whether the device said, the last time it was asked, that no initial bytes are left.
    pub(super) fn is_past_initial(&self) -> bool {
        self.is_past_initial
    }

    /// Takes in that so many bytes were read in PRE_COPY: initial bytes come first.
    pub(super) fn precopy_read(&mut self, bytes: u64) {
        if let Some(info) = &mut self.precopy {
            let initial = bytes.min(info.initial_bytes);
            info.initial_bytes -= initial;
            info.dirty_bytes = info.dirty_bytes.saturating_sub(bytes - initial);
        }
    }

    /// What PRE_COPY still has to bring, as far as it is known; `None` where the device was not asked.
    pub(super) fn precopy(&self) -> Option<PrecopyInfo> {
        self.precopy
    }

    /// Bytes that PRE_COPY still has to bring, as far as they are known.
    pub(super) fn unread(&self) -> u64 {
        self.precopy.map_or(0, |info| info.initial_bytes.saturating_add(info.dirty_bytes))
    }

    /// Least bytes that the whole state has, by what was read and by what PRE_COPY has left.
    pub(super) fn least(&self, read: u64) -> u64 {
        read.saturating_add(self.unread())
    }

    /// Bytes of the whole state, read and unread, now that the device tells `answer` and `read` bytes of it were read.
    pub(super) fn whole(&mut self, answer: u64, read: u64) -> u64 {
        if read == 0 {
            self.first = Some(answer);
        }
        self.tells_rest |= self.first.is_some_and(|first| fell_by(first, answer, read));
        let whole = if self.tells_rest { answer.saturating_add(read) } else { answer };
        whole.max(self.least(read))
    }
}

/// Whether an answer is smaller than the first by most of what was read, and that is enough to tell.
fn fell_by(first: u64, answer: u64, read: u64) -> bool {
    read >= first.div_ceil(TELLING_SHARE) && first.saturating_sub(answer) > read.min(first) / 2
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn c45_a_device_that_tells_its_whole_size_whatever_was_read_is_no_larger() {
        let mut size = StateSize::default();
        size.precopy_told(PrecopyInfo { initial_bytes: 20 * MIB, dirty_bytes: 10 * MIB });
        assert_eq!(size.whole(30 * MIB, 0), 30 * MIB);
        for read in [MIB, 10 * MIB, 20 * MIB] {
            let mut size = size;
            size.precopy_read(read);
            assert_eq!(size.whole(30 * MIB, read), 30 * MIB);
        }
    }

    #[test]
    fn c45_a_device_that_tells_what_is_left_is_no_smaller() {
        let mut size = StateSize::default();
        assert_eq!(size.whole(30 * MIB, 0), 30 * MIB);
        assert_eq!(size.whole(10 * MIB, 20 * MIB), 30 * MIB);
        assert_eq!(size.whole(10 * MIB, 25 * MIB), 35 * MIB, "5 MiB changed and were read again");
    }

    #[test]
    fn a_state_has_at_least_what_was_read_and_what_precopy_still_has() {
        let mut size = StateSize::default();
        size.precopy_told(PrecopyInfo { initial_bytes: 4 * MIB, dirty_bytes: MIB });
        assert_eq!(size.whole(0, 0), 5 * MIB);
        size.precopy_read(4 * MIB);
        assert_eq!(size.precopy(), Some(PrecopyInfo { initial_bytes: 0, dirty_bytes: MIB }));
        assert_eq!(size.whole(3 * MIB, 4 * MIB), 5 * MIB);
    }

    proptest! {
        #[test]
        fn c45_neither_kind_of_device_is_taken_for_the_other(total in 64..1u64 << 40, share in 1..=16u64, wobble in 0..4u64) {
            let read = total / 16 * share;
            for (answer, expected) in [(total - wobble, total), (total - read + wobble, total + wobble)] {
                let mut size = StateSize::default();
                size.whole(total, 0);
                let whole = size.whole(answer, read);
                prop_assert!(whole.abs_diff(expected) <= total / 16 + 2 * wobble, "{whole} for {expected}");
            }
        }
    }
}
