// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Decodes a vfio-user message's header and payload, whatever the other side's process wrote.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vfio_migration::vfio_user::message::{
    DeviceInfo, DmaAccess, DmaMap, DmaUnmap, HEADER_BYTES, Header, MigData, RegionAccess, RegionInfo,
};
use vfio_migration::vfio_user::{feature, version};

fuzz_target!(|input: &[u8]| {
    if let Some((header, _)) = input.split_first_chunk::<HEADER_BYTES>()
        && let Ok(header) = Header::decode(header)
    {
        assert_eq!(Header::decode(&header.encode()).ok(), Some(header));
    }
    let _refused_or_not = DmaMap::decode(input).is_ok();
    let _refused_or_not = DmaUnmap::decode(input).is_ok();
    let _refused_or_not = DeviceInfo::decode(input).is_ok();
    let _refused_or_not = RegionInfo::decode(input).is_ok();
    let _refused_or_not = MigData::decode(input).is_ok();
    if let Ok((access, data)) = RegionAccess::decode_with_data(input) {
        assert_eq!(data.len(), access.count.get() as usize);
    }
    if let Ok((access, data)) = DmaAccess::decode_with_data(input) {
        assert_eq!(data.len() as u64, access.count.get());
    }
    if let Ok(data) = MigData::decode_with_data(input) {
        assert!(data.len() <= input.len());
    }
    let _refused_or_not = version::Version::decode(input).is_ok();
    let _refused_or_not = feature::FeatureHeader::decode(input).is_ok();
});
