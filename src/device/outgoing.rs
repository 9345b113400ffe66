// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How far a device's state has gone away as a stream.

/// A device's state on its way out.
#[derive(Debug, Clone, Copy)]
pub(super) struct Outgoing {
    pub(super) number: u16,
    pub(super) session: u32,
    pub(super) next_index: u64,
    /// Bytes of the whole state, as the device told them first.
    pub(super) told_bytes: Option<u64>,
    /// Bytes that one read brought at most.
    pub(super) largest_read: usize,
    /// PRE_COPY brings more than it saves in this session.
    pub(super) is_futile: bool,
    /// Something reset the device in this session: what was read is worthless.
    pub(super) was_reset: bool,
}

impl Outgoing {
    /// Begins the stream of the device with this number. `session` is 0 before the first.
    pub(super) fn new(number: u16, session: u32) -> Self {
        Self {
            number,
            session,
            next_index: 0,
            told_bytes: None,
            largest_read: 0,
            is_futile: false,
            was_reset: false,
        }
    }

    /// Begins another session.
    pub(super) fn restart(&mut self) {
        *self = Self::new(self.number, self.session + 1);
    }
}

/// What a device whose state streams has left for the downtime; an unknown size counts as huge.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StreamLeft {
    pub(crate) number: u16,
    pub(crate) bytes: u64,
    /// Of these, bytes that PRE_COPY may bring before.
    pub(crate) early_bytes: u64,
}
