// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The bytes of every message of protocol version 0, both ways.

use vm_migration::protocol::{
    Command, ConnectionRole, MemoryRange, MemoryRangeTable, Request, Response, Status,
};

/// What a peer sees of a request.
type RequestFields = (Command, [u8; 6], u64);

fn written(write: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut bytes = Vec::new();
    write(&mut bytes);
    bytes
}

fn decoded_request(mut bytes: &[u8]) -> RequestFields {
    let request = Request::read_from(&mut bytes).expect("a request");
    assert!(bytes.is_empty(), "a request is read to its last byte");
    (request.command(), *request.command_headers(), request.length())
}

fn decoded_response(mut bytes: &[u8]) -> (Status, u64) {
    let response = Response::read_from(&mut bytes).expect("a response");
    assert!(bytes.is_empty(), "a response is read to its last byte");
    (response.status(), response.length())
}

#[test]
fn every_request_has_its_bytes() {
    let golden: [(Request, Command, u64, [u8; 16]); 12] = [
        (Request::new(Command::Invalid, 0), Command::Invalid, 0, [0; 16]),
        (Request::start(), Command::Start, 0, [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        (
            Request::config(6180),
            Command::Config,
            6180,
            [2, 0, 0, 0, 0, 0, 0, 0, 0x24, 0x18, 0, 0, 0, 0, 0, 0],
        ),
        (
            Request::state(28467),
            Command::State,
            28467,
            [3, 0, 0, 0, 0, 0, 0, 0, 0x33, 0x6f, 0, 0, 0, 0, 0, 0],
        ),
        (Request::memory(16), Command::Memory, 16, [4, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0]),
        (Request::complete(), Command::Complete, 0, [5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        (Request::abandon(), Command::Abandon, 0, [6, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        (Request::memory_fd(4), Command::MemoryFd, 4, [7, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0]),
        (
            Request::complete_paused(),
            Command::CompletePaused,
            0,
            [8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ),
        (Request::page_fault(), Command::PageFault, 16, [9, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0]),
        (
            Request::new(Command::State, 0x0807_0605_0403_0201),
            Command::State,
            0x0807_0605_0403_0201,
            [3, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8],
        ),
        (
            Request::new(Command::Memory, u64::MAX),
            Command::Memory,
            u64::MAX,
            [4, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
        ),
    ];
    for (request, command, length, bytes) in golden {
        assert_eq!(written(|fd| request.write_to(fd).unwrap()), bytes, "{command:?}");
        assert_eq!(decoded_request(&bytes), (command, [0; 6], length));
    }
}

#[test]
fn every_response_has_its_bytes() {
    let golden: [(Response, Status, u64, [u8; 16]); 4] = [
        (Response::ok(), Status::Ok, 0, [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        (Response::error(), Status::Error, 0, [2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        (Response::new(Status::Invalid, 0), Status::Invalid, 0, [0; 16]),
        (
            Response::new(Status::Ok, 4096),
            Status::Ok,
            4096,
            [1, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0],
        ),
    ];
    for (response, status, length, bytes) in golden {
        assert_eq!(written(|fd| response.write_to(fd).unwrap()), bytes, "{status:?}");
        assert_eq!(decoded_response(&bytes), (status, length));
    }
}

#[test]
fn every_connection_role_has_its_bytes() {
    let golden = [
        (ConnectionRole::Invalid, [0, 0]),
        (ConnectionRole::PrecopyMemory, [1, 0]),
        (ConnectionRole::Fault, [2, 0]),
    ];
    for (role, bytes) in golden {
        assert_eq!(written(|fd| role.write_to(fd).unwrap()), bytes);
        assert_eq!(ConnectionRole::read_from(&mut bytes.as_slice()).unwrap(), role);
    }
}

#[test]
fn a_memory_range_and_a_table_have_their_bytes() {
    let low = MemoryRange { gpa: 0, length: 0x400_0000 };
    let high = MemoryRange { gpa: 0x0807_0605_0403_0201, length: 0x100f_0e0d_0c0b_0a09 };
    let low_bytes = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0];
    let high_bytes = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16];
    for (range, bytes) in [(low, low_bytes), (high, high_bytes)] {
        assert_eq!(written(|fd| range.write_to(fd).unwrap()), bytes);
        assert_eq!(MemoryRange::read_from(&mut bytes.as_slice()).unwrap(), range);
    }

    let mut table = MemoryRangeTable::default();
    table.push(high);
    table.push(low);
    let table_bytes = [high_bytes, low_bytes].concat();
    assert_eq!(table.length(), 32);
    assert_eq!(written(|fd| table.write_to(fd).unwrap()), table_bytes);
    let read = MemoryRangeTable::read_from(&mut table_bytes.as_slice(), 32).unwrap();
    assert_eq!(read.ranges(), table.ranges());
}

#[test]
fn an_empty_table_is_no_bytes() {
    let table = MemoryRangeTable::read_from(&mut [].as_slice(), 0).unwrap();
    assert!(table.is_empty());
    assert!(written(|fd| table.write_to(fd).unwrap()).is_empty());
}

#[test]
fn a_start_with_more_in_its_headers_is_a_plain_start_of_version_0() {
    let bytes = [1, 0, 0, 0, 0x56, 0x4d, 0x03, 0x80, 0, 0, 0, 0, 0, 0, 0, 0];
    let request = Request::read_from(&mut bytes.as_slice()).ok().unwrap();
    assert_eq!(request.sender_protocol_version().unwrap(), 0);
    assert_eq!(request.command_headers(), &[0, 0, 0x56, 0x4d, 0x03, 0x80]);
    assert_eq!(request.length(), 0);
    assert_eq!(written(|fd| request.write_to(fd).unwrap()), bytes);
}

#[test]
fn a_response_with_more_in_its_padding_is_a_plain_response() {
    let bytes = [1, 0, 0x56, 0x4d, 0x03, 0x80, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(decoded_response(&bytes), (Status::Ok, 0));
}

#[test]
fn a_request_and_a_response_are_written_in_one_call() {
    /// Counts the calls, which on a socket are packets.
    struct Calls(usize);

    impl std::io::Write for Calls {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0 += 1;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    let mut calls = Calls(0);
    Request::start().write_to(&mut calls).unwrap();
    Response::ok().write_to(&mut calls).unwrap();
    assert_eq!(calls.0, 2);
}
