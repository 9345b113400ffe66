// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is refused before the demo starts.

use super::error::DemoError;
use super::options::{DemoOptions, Inject, Transport};
use super::side::{DEVICE_LOG, KVM_LOG};
use crate::vmm::{MAX_RAM_BYTES, Map, PAGE_BYTES, RamLayout};

/// Bytes of sparse RAM for which a machine and its device keep a byte of bitmaps: eight bits a page.
const BITMAPS_SHARE: u64 = PAGE_BYTES;

/// Refuses a fault that could not show.
pub(super) fn check_fault(options: &DemoOptions) -> Result<(), DemoError> {
    let contradiction = match &options.inject {
        _ if options.sparse && !options.no_kvm && options.memory_bytes > MAX_RAM_BYTES => {
            "more than 128 GiB needs --no-kvm: a KVM guest's page tables map no more"
        }
        Some(Inject::CorruptPage) if options.transport == Transport::Unix => {
            "corrupt-page needs --transport tcp"
        }
        Some(Inject::Forget(source)) if source == KVM_LOG && options.guest_dirty_rate == 0 => {
            "forget-kvm-log needs a guest that writes: --guest-dirty-rate is 0"
        }
        Some(Inject::Forget(source)) if source == DEVICE_LOG && options.device_dirty_rate == 0 => {
            "forget-device-log needs a device that writes: --device-dirty-rate is 0"
        }
        _ => return Ok(()),
    };
    Err(DemoError::Contradiction(contradiction))
}

/// What both machines populate and both devices' state must fit the host at once, with the bitmaps of all processes.
pub(super) fn check_host_memory(options: &DemoOptions, layout: &RamLayout) -> Result<(), DemoError> {
    let ram_bytes = match options.sparse {
        true => Map::new(layout).populated_bytes() + options.memory_bytes / BITMAPS_SHARE,
        false => options.memory_bytes,
    };
    let needed_bytes = ram_bytes.saturating_add(options.device_state_bytes).saturating_mul(2);
    match crate::vmm::host_available_bytes() {
        Some(available_bytes) if needed_bytes > available_bytes => {
            Err(DemoError::HostTooSmall { needed_bytes, available_bytes, sparse: options.sparse })
        }
        _ => Ok(()),
    }
}
