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
    /// PRE_COPY brings more than it saves in this session.
    pub(super) is_futile: bool,
}

impl Outgoing {
    /// Begins another session.
    pub(super) fn restart(&mut self) {
        (self.session, self.next_index) = (self.session + 1, 0);
        (self.told_bytes, self.is_futile) = (None, false);
    }
}
