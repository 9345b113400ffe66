// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Decodes the transfer's messages and tables: what is accepted keeps its promises and is encoded the same.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vfio_migration::granule::Granule;
use vfio_migration::layout::Layout;
use vfio_migration::range::GpaRange;
use vfio_migration::transfer::frame::{
    Command, ConnectionRole, MemoryTable, PROTOCOL_VERSION, Request, Response, encode_ranges,
};
use vfio_migration::transfer::url::Url;

fuzz_target!(|input: &[u8]| {
    if let Some(bytes) = input.first_chunk() {
        check_request(*bytes);
        if let Ok(response) = Response::from_bytes(*bytes) {
            assert_eq!(response.to_bytes(), *bytes);
            let _ = response.agreed();
        }
    }
    if let Some(bytes) = input.first_chunk()
        && let Ok(role) = ConnectionRole::from_bytes(*bytes)
    {
        assert_eq!(role.to_bytes(), *bytes);
    }
    check_table(input);
    if let Ok(url) = str::from_utf8(input).unwrap_or_default().parse::<Url>() {
        assert_eq!(url.to_string().parse(), Ok(url));
    }
});

fn check_request(bytes: [u8; 16]) {
    let Ok(request) = Request::from_bytes(bytes) else { return };
    assert_eq!(request.to_bytes(), bytes);
    if let Ok(version) = request.version() {
        assert_eq!((request.command(), version), (Command::Start, PROTOCOL_VERSION));
    }
    assert!(request.offered().is_none() || request.version() == Ok(0));
}

/// Checks that a table that is accepted names RAM only, and is what it was parsed from.
fn check_table(bytes: &[u8]) {
    let range = |start, length| GpaRange::new(start, length).expect("a range of constants");
    let regions = [range(0, 3 << 30), range(4 << 30, 1 << 30)];
    let layout = Layout::new(regions, Granule::KIB_4).expect("two regions, apart and aligned");
    let Ok(table) = MemoryTable::parse(bytes.to_vec(), &layout) else { return };
    assert!(table.ranges().all(|range| regions.iter().any(|region| region.covers(range))));
    let sum = table.ranges().fold(0_u64, |sum, range| sum.saturating_add(range.len()));
    assert_eq!(table.memory_bytes(), sum);
    let mut encoded = Vec::new();
    encode_ranges(table.ranges(), &mut encoded);
    assert_eq!(encoded, bytes);
}
