// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use proptest::prelude::*;

use super::*;
use crate::granule::Granule;
use crate::layout::Layout;

/// Every message of the source: what it means, and its bytes.
const REQUESTS: [(Command, u64, [u8; 16]); 11] = [
    (Command::Start, 0, [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
    (Command::Config, 0x1857, [2, 0, 0, 0, 0, 0, 0, 0, 0x57, 0x18, 0, 0, 0, 0, 0, 0]),
    (Command::State, 0x6fb2, [3, 0, 0, 0, 0, 0, 0, 0, 0xb2, 0x6f, 0, 0, 0, 0, 0, 0]),
    (Command::Memory, 16, [4, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0]),
    (Command::Complete, 0, [5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
    (Command::Abandon, 0, [6, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
    (Command::MemoryFd, 4, [7, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0]),
    (Command::CompletePaused, 0, [8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
    (Command::PageFault, 16, [9, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0]),
    (Command::Devices, 8, [1, 0x80, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0]),
    (Command::DeviceState, 0x20, [2, 0x80, 0, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 0, 0, 0]),
];

const OK: [u8; 16] = [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
const ERROR: [u8; 16] = [2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

fn range(start: u64, length: u64) -> GpaRange {
    GpaRange::new(start, length).unwrap()
}

/// RAM with the hole below 4 GiB.
fn layout() -> Layout {
    Layout::new([range(0, 3 << 30), range(4 << 30, 1 << 30)], Granule::KIB_4).unwrap()
}

#[test]
fn requests_have_these_bytes_both_ways() {
    for (command, length, bytes) in REQUESTS {
        let request = Request::new(command, length);
        assert_eq!(request.to_bytes(), bytes, "{command}");
        assert_eq!(Request::from_bytes(bytes), Ok(request), "{command}");
    }
    assert_eq!(Request::start().to_bytes(), REQUESTS[0].2);
}

#[test]
fn lengths_take_all_eight_bytes() {
    let bytes = Request::new(Command::Memory, 0x1122_3344_5566_7788).to_bytes();
    assert_eq!(bytes[8..], [0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11]);
}

#[test]
fn responses_have_these_bytes_both_ways() {
    for (status, bytes) in [(Status::Ok, OK), (Status::Error, ERROR)] {
        assert_eq!(Response::new(status).to_bytes(), bytes);
        assert_eq!(Response::from_bytes(bytes), Ok(Response::new(status)));
    }
    // The answer to a PageFault: a page follows.
    let page = [1, 0, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0];
    assert_eq!(Response::from_bytes(page).unwrap().length(), 4096);
}

#[test]
fn roles_have_these_bytes_both_ways() {
    for (role, bytes) in [(ConnectionRole::PrecopyMemory, [1, 0]), (ConnectionRole::Fault, [2, 0])] {
        assert_eq!(role.to_bytes(), bytes);
        assert_eq!(ConnectionRole::from_bytes(bytes), Ok(role));
    }
    assert_eq!(ConnectionRole::from_bytes([0, 0]), Err(FrameError::Role { role: 0 }));
    assert_eq!(ConnectionRole::from_bytes([1, 1]), Err(FrameError::Role { role: 257 }));
}

#[test]
fn tables_have_these_bytes_both_ways() {
    let golden = [
        0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 0, 0, // 0x1000, 0x2000
        0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0x40, 0, 0, 0, 0, // 4 GiB, 1 GiB
    ];
    let ranges = [range(0x1000, 0x2000), range(4 << 30, 1 << 30)];
    let mut bytes = Vec::new();
    encode_ranges(ranges, &mut bytes);
    assert_eq!(bytes, golden);
    let table = MemoryTable::parse(bytes, &layout()).unwrap();
    assert!(table.ranges().eq(ranges));
    assert_eq!(table.memory_bytes(), (1 << 30) + 0x2000);
    assert_eq!(table.into_buffer(), golden);
}

#[test]
fn unknown_commands_and_statuses_are_refused() {
    let head = |kind: u16| join(kind, [0; 6], 0);
    for command in [0, 10, 0x100, u16::MAX] {
        assert_eq!(Request::from_bytes(head(command)), Err(FrameError::Command { command }));
    }
    for status in [0, 3, 0x101, u16::MAX] {
        assert_eq!(Response::from_bytes(head(status)), Err(FrameError::Status { status }));
    }
}

#[test]
fn only_a_start_of_a_known_version_begins_a_migration() {
    assert_eq!(Request::start().version(), Ok(0));
    let newer = Request::from_bytes([1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).unwrap();
    assert_eq!(newer.version(), Err(FrameError::Version { version: 1 }));
    let config = Request::new(Command::Config, 2);
    assert_eq!(config.version(), Err(FrameError::NotStart { command: Command::Config }));
}

/// The rule a v53 decodes by: the command, two bytes of version, the length, and nothing else.
fn as_v53_reads(bytes: [u8; 16]) -> (u16, u16, u64) {
    let (command, headers, length) = split(bytes);
    (command, u16::from_le_bytes([headers[0], headers[1]]), length)
}

#[test]
fn an_offer_and_its_answer_are_plain_messages_to_a_plain_peer() {
    let offer = Request::start_offering(Features::from_bits(0x8003)).to_bytes();
    assert_eq!(offer, [1, 0, 0, 0, b'v', b'M', 0x03, 0x80, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(as_v53_reads(offer), as_v53_reads(REQUESTS[0].2));

    let answer = Response::ok_agreeing(Features::from_bits(0x0003)).to_bytes();
    assert_eq!(answer, [1, 0, b'v', b'M', 0x03, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let ((status, _, length), (ok, _, ok_length)) = (split(answer), split(OK));
    assert_eq!((status, length), (ok, ok_length), "a v53 looks at status and length");
}

#[test]
fn features_are_read_from_peers_of_ours_only() {
    let features = Features::from_bits(0x8003);
    assert_eq!(Request::start_offering(features).version(), Ok(0));
    assert_eq!(Request::start_offering(features).offered(), Some(features));
    assert_eq!(Request::start_offering(Features::NONE).offered(), Some(Features::NONE));
    assert_eq!(Request::start().offered(), None);
    assert_eq!(Response::ok_agreeing(features).agreed(), Some(features));
    assert_eq!(Response::new(Status::Ok).agreed(), None);

    let another = |change: fn(&mut [u8; 16])| {
        let mut bytes = Request::start_offering(Features::NONE).to_bytes();
        change(&mut bytes);
        Request::from_bytes(bytes).unwrap().offered()
    };
    assert_eq!(another(|bytes| bytes[0] = 2), None, "only Start offers");
    assert_eq!(another(|bytes| bytes[2] = 1), None, "only with version 0");
    assert_eq!(another(|bytes| bytes[5] = b'X'), None, "only after the magic");
    let mut error = Response::ok_agreeing(features).to_bytes();
    error[0] = 2;
    assert_eq!(Response::from_bytes(error).unwrap().agreed(), None, "an Error agrees to nothing");
}

#[test]
fn c44_ranges_that_are_not_ram_are_refused_by_their_entry() {
    let parse = |entries: &[(u64, u64)]| {
        let bytes = entries.iter().flat_map(|(gpa, length)| [gpa.to_le_bytes(), length.to_le_bytes()]);
        MemoryTable::parse(bytes.flatten().collect(), &layout()).map(drop)
    };
    let outside = |index, start, length| Err(FrameError::OutsideRam { index, range: range(start, length) });
    assert_eq!(parse(&[(0, 1), (3 << 30, 1)]), outside(1, 3 << 30, 1));
    assert_eq!(parse(&[((3 << 30) - 1, 2)]), outside(0, (3 << 30) - 1, 2), "reaches into the hole");
    assert_eq!(parse(&[(0, 5 << 30)]), outside(0, 0, 5 << 30), "spans the hole");
    assert_eq!(parse(&[(5 << 30, 4096)]), outside(0, 5 << 30, 4096));
    let wraps = RangeError::Wraps { start: 1 << 63, length: 1 << 63 };
    assert_eq!(parse(&[(1 << 63, 1 << 63)]), Err(FrameError::Range { index: 0, source: wraps }));
    let empty = RangeError::Empty { start: 0x1000 };
    assert_eq!(parse(&[(0x1000, 0)]), Err(FrameError::Range { index: 0, source: empty }));
    assert_eq!(parse(&[]), Err(FrameError::EmptyTable));
    assert_eq!(MemoryTable::check_length(24), Err(FrameError::TableLength { bytes: 24 }));
    assert_eq!(MemoryTable::parse(vec![0; 24], &layout()), Err(FrameError::TableLength { bytes: 24 }));
}

#[test]
fn overlapping_unsorted_and_repeated_ranges_are_legal() {
    let ranges = [range(0x5000, 0x1000), range(0, 0x8000), range(0x5000, 0x1000), range(0x5001, 3)];
    let mut bytes = Vec::new();
    encode_ranges(ranges, &mut bytes);
    let table = MemoryTable::parse(bytes, &layout()).unwrap();
    assert!(table.ranges().eq(ranges));
    assert_eq!(table.memory_bytes(), 0xa003);
}

proptest! {
    #[test]
    fn whatever_decodes_is_encoded_as_it_came(bytes in any::<[u8; 16]>()) {
        if let Ok(request) = Request::from_bytes(bytes) {
            prop_assert_eq!(request.to_bytes(), bytes);
        }
        if let Ok(response) = Response::from_bytes(bytes) {
            prop_assert_eq!(response.to_bytes(), bytes);
        }
    }

    #[test]
    fn features_survive_the_wire(bits in any::<u16>()) {
        let features = Features::from_bits(bits);
        let request = Request::from_bytes(Request::start_offering(features).to_bytes());
        prop_assert_eq!(request.unwrap().offered(), Some(features));
        let response = Response::from_bytes(Response::ok_agreeing(features).to_bytes());
        prop_assert_eq!(response.unwrap().agreed(), Some(features));
    }

    #[test]
    fn any_bytes_are_a_table_of_ram_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Ok(table) = MemoryTable::parse(bytes.clone(), &layout()) {
            prop_assert!(table.ranges().all(|range| layout().holds(range)));
            let mut again = Vec::new();
            encode_ranges(table.ranges(), &mut again);
            prop_assert_eq!(again, bytes);
        }
    }
}
