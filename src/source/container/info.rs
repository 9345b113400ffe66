// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A type1 container's `struct vfio_iommu_type1_info` and its capability chain.

use vfio_bindings::bindings::vfio::VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION as CAP_MIGRATION;

const FLAG_PGSIZES: u32 = 1;
const FLAG_CAPS: u32 = 2;

const FIXED_BYTES: usize = 24;
const CAP_HEADER_BYTES: usize = 8;
/// Limit on capabilities, so that a circular chain ends.
const CAPS_MAX: usize = 64;

/// What a type1 container says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ContainerInfo {
    /// Page sizes its IOMMU maps, one bit per size; 0 where it does not say.
    pub page_sizes: u64,
    /// What its dirty bitmap can do; `None` where it has none.
    pub dirty_bitmap: Option<DirtyBitmapInfo>,
}

/// What a container's dirty bitmap can do (`struct vfio_iommu_type1_info_cap_migration`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirtyBitmapInfo {
    /// Bytes per bit it can be read at, one bit per size.
    pub page_sizes: u64,
    /// Bytes the bitmap of one read may take.
    pub max_bytes: u64,
}

impl ContainerInfo {
    /// Reads the bytes of `VFIO_IOMMU_GET_INFO`, as many as there are; what is malformed counts as absent.
    pub fn parse(bytes: &[u8]) -> Self {
        let flags = u32_at(bytes, 4).unwrap_or(0);
        let page_sizes = u64_at(bytes, 8).filter(|_| flags & FLAG_PGSIZES != 0).unwrap_or(0);
        let first = u32_at(bytes, 16).filter(|_| flags & FLAG_CAPS != 0).unwrap_or(0);
        let dirty_bitmap = capabilities(bytes, first)
            .find(|&(id, version, _)| (id, version) == (CAP_MIGRATION, 1))
            .and_then(|(.., at)| DirtyBitmapInfo::parse(bytes, at));
        Self { page_sizes, dirty_bitmap }
    }
}

impl DirtyBitmapInfo {
    fn parse(bytes: &[u8], at: usize) -> Option<Self> {
        Some(Self {
            page_sizes: u64_at(bytes, at.checked_add(16)?)?,
            max_bytes: u64_at(bytes, at.checked_add(24)?)?,
        })
    }
}

/// Walks the chain from the capability at `first`: each one's id, version and offset.
fn capabilities(bytes: &[u8], first: u32) -> impl Iterator<Item = (u32, u32, usize)> {
    let mut next = first;
    std::iter::from_fn(move || {
        let at = usize::try_from(next).ok().filter(|&at| at >= FIXED_BYTES)?;
        let id_and_version = u32_at(bytes, at)?.to_ne_bytes();
        next = u32_at(bytes, at.checked_add(CAP_HEADER_BYTES - 4)?)?;
        let [id, version] = [[id_and_version[0], id_and_version[1]], [id_and_version[2], id_and_version[3]]]
            .map(|half| u32::from(u16::from_ne_bytes(half)));
        Some((id, version, at))
    })
    .take(CAPS_MAX)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().copied().map(u32::from_ne_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().copied().map(u64::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fixed(flags: u32, cap_offset: u32) -> Vec<u8> {
        let mut bytes = 0u32.to_ne_bytes().to_vec();
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(0x4020_1000u64.to_ne_bytes());
        bytes.extend(cap_offset.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes
    }

    fn capability(id: u16, next: u32, body: &[u64]) -> Vec<u8> {
        let mut bytes = [id.to_ne_bytes(), 1u16.to_ne_bytes()].concat();
        bytes.extend(next.to_ne_bytes());
        body.iter().for_each(|word| bytes.extend(word.to_ne_bytes()));
        bytes
    }

    #[test]
    fn the_migration_capability_is_found_behind_others() {
        let mut bytes = fixed(3, 24);
        bytes.extend(capability(1, 48, &[1, 0xfee0_0000]));
        bytes.extend(capability(2, 0, &[0, 0x1000, 256 << 20]));
        let dirty_bitmap = Some(DirtyBitmapInfo { page_sizes: 0x1000, max_bytes: 256 << 20 });
        assert_eq!(ContainerInfo::parse(&bytes), ContainerInfo { page_sizes: 0x4020_1000, dirty_bitmap });
    }

    #[test]
    fn a_chain_is_not_followed_without_its_flag_nor_past_the_end_nor_in_a_circle() {
        let none = ContainerInfo { page_sizes: 0x4020_1000, dirty_bitmap: None };
        let good = capability(2, 0, &[0, 0x1000, 1]);
        assert_eq!(ContainerInfo::parse(&[fixed(1, 24), good.clone()].concat()), none);
        assert_eq!(ContainerInfo::parse(&[fixed(3, u32::MAX), good.clone()].concat()), none);
        assert_eq!(ContainerInfo::parse(&[fixed(3, 24), capability(1, 24, &[])].concat()), none);
        assert_eq!(ContainerInfo::parse(&[fixed(3, 24), good[..31].to_vec()].concat()), none);
        assert_eq!(ContainerInfo::parse(&[fixed(3, 4), good].concat()), none);
    }

    #[test]
    fn a_newer_version_of_the_capability_is_not_guessed_at() {
        let mut newer = capability(2, 0, &[0, 0x1000, 1]);
        newer[2] = 2;
        assert_eq!(ContainerInfo::parse(&[fixed(3, 24), newer].concat()).dirty_bitmap, None);
    }

    #[test]
    fn an_older_kernels_shorter_answer_has_no_capabilities() {
        assert_eq!(ContainerInfo::parse(&fixed(1, 0)[..16]).page_sizes, 0x4020_1000);
        assert_eq!(ContainerInfo::parse(&[]), ContainerInfo::default());
    }

    proptest! {
        #[test]
        fn no_answer_makes_it_panic_or_loop(mut bytes in prop::collection::vec(any::<u8>(), 0..120), offset in 0..120u32) {
            if bytes.len() >= 24 {
                bytes[4] |= 3;
                bytes[16..20].copy_from_slice(&offset.to_ne_bytes());
            }
            let _answer = ContainerInfo::parse(&bytes);
        }
    }
}
