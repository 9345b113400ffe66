// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a peer can send: every truncation and every lie about a length is an error, at bounded cost.

use std::io::{self, Read};

use proptest::prelude::*;
use vm_migration::MigratableError;
use vm_migration::protocol::{ConnectionRole, MemoryRange, MemoryRangeTable, Request, Response};

/// The longest table that is read, as `MemoryRangeTable::read_from` documents it.
const LIMIT_BYTES: u64 = 1 << 30;

/// The error with its sources, and the kind of the I/O error if it is one.
fn refusal<T>(result: Result<T, MigratableError>) -> (Option<io::ErrorKind>, String) {
    let error = result.err().expect("refused");
    let kind = match &error {
        MigratableError::MigrateSocket(error) => Some(error.kind()),
        MigratableError::MigrateReceive(_) => None,
        error => panic!("{error:?}"),
    };
    (kind, format!("{:#}", anyhow::Error::from(error)))
}

/// Checks that every proper prefix of `message` is refused as an end of file that says how far it got.
fn each_prefix_is_refused<T>(
    message: &[u8],
    name: &str,
    read: impl Fn(&mut &[u8]) -> Result<T, MigratableError>,
) {
    let expected = message.len();
    for received in 0..expected {
        let (kind, text) = refusal(read(&mut &message[..received]));
        assert_eq!(kind, Some(io::ErrorKind::UnexpectedEof), "{text}");
        let place = format!("Connection closed after {received} of {expected} bytes of {name}");
        assert!(text.ends_with(&place), "{text}");
    }
    assert!(read(&mut &message[..]).is_ok());
}

#[test]
fn every_truncated_prefix_of_a_message_is_an_error() {
    let mut request = Vec::new();
    Request::page_fault().write_to(&mut request).unwrap();
    each_prefix_is_refused(&request, "request", |fd| Request::read_from(fd));

    let mut response = Vec::new();
    Response::ok().write_to(&mut response).unwrap();
    each_prefix_is_refused(&response, "response", |fd| Response::read_from(fd));

    let mut role = Vec::new();
    ConnectionRole::PrecopyMemory.write_to(&mut role).unwrap();
    each_prefix_is_refused(&role, "connection role", |fd| ConnectionRole::read_from(fd));

    let mut range = Vec::new();
    MemoryRange { gpa: 0x1000, length: 0x2000 }.write_to(&mut range).unwrap();
    each_prefix_is_refused(&range, "memory range", |fd| MemoryRange::read_from(fd));

    let mut table = Vec::new();
    let three = MemoryRangeTable::from_dirty_bitmap([0b10101], 0, 0x1000);
    three.write_to(&mut table).unwrap();
    each_prefix_is_refused(&table, "memory range table", |fd| {
        MemoryRangeTable::read_from(fd, three.length())
    });
}

#[test]
fn an_unknown_command_status_or_role_is_refused_by_its_number() {
    let mut message = [0; 16];
    message[..2].copy_from_slice(&[0x0a, 0x01]);
    let (_, text) = refusal(Request::read_from(&mut message.as_slice()));
    assert_eq!(text, "Cannot receive migration: Request has unknown command 266");
    let (_, text) = refusal(Response::read_from(&mut message.as_slice()));
    assert_eq!(text, "Cannot receive migration: Response has unknown status 266");
    let (_, text) = refusal(ConnectionRole::read_from(&mut message.as_slice()));
    assert_eq!(text, "Cannot receive migration: Connection announces unknown role 266");
}

/// Counts what is asked of it and records the largest buffer it was handed.
struct Metered<'a> {
    stream: &'a [u8],
    largest_buffer: usize,
}

impl<'a> Metered<'a> {
    fn new(stream: &'a [u8]) -> Self {
        Self { stream, largest_buffer: 0 }
    }
}

impl Read for Metered<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.largest_buffer = self.largest_buffer.max(buffer.len());
        self.stream.read(buffer)
    }
}

#[test]
fn c44_a_table_length_that_cannot_be_is_refused_before_a_byte_is_read() {
    let lies = [
        (1, "is not a multiple of 16 bytes"),
        (15, "is not a multiple of 16 bytes"),
        (LIMIT_BYTES - 1, "is not a multiple of 16 bytes"),
        (u64::MAX, "is not a multiple of 16 bytes"),
        (LIMIT_BYTES + 16, "exceeds limit of 1073741824 bytes"),
        (1 << 45, "exceeds limit of 1073741824 bytes"),
        (1 << 62, "exceeds limit of 1073741824 bytes"),
        (1 << 63, "exceeds limit of 1073741824 bytes"),
        (u64::MAX - 15, "exceeds limit of 1073741824 bytes"),
    ];
    for (length, why) in lies {
        let mut fd = Metered::new(&[0xff; 64]);
        let (kind, text) = refusal(MemoryRangeTable::read_from(&mut fd, length));
        assert_eq!(kind, None, "{text}");
        assert_eq!(text, format!("Cannot receive migration: Length of memory range table, {length}, {why}"));
        assert_eq!((fd.stream.len(), fd.largest_buffer), (64, 0), "nothing was read");
    }
}

#[test]
fn c44_a_table_that_claims_more_than_arrives_is_an_end_of_file() {
    let stream = [0x5a; 40];
    let mut fd = Metered::new(&stream);
    let (kind, text) = refusal(MemoryRangeTable::read_from(&mut fd, LIMIT_BYTES));
    assert_eq!(kind, Some(io::ErrorKind::UnexpectedEof));
    assert!(text.ends_with("Connection closed after 40 of 1073741824 bytes of memory range table"), "{text}");
    assert!(fd.largest_buffer <= 64 << 10, "a buffer of {} bytes", fd.largest_buffer);
}

proptest! {
    #[test]
    fn c44_every_lie_about_the_length_of_a_table_is_refused(
        stream in prop::collection::vec(any::<u8>(), 0..256),
        claimed in prop_oneof![any::<u64>(), 0..512u64, (0..1u64 << 27).prop_map(|ranges| ranges * 16)],
    ) {
        let mut fd = Metered::new(&stream);
        let honest = claimed % 16 == 0 && claimed <= stream.len() as u64;
        match MemoryRangeTable::read_from(&mut fd, claimed) {
            Ok(table) => prop_assert!(honest && table.length() == claimed),
            Err(_) => prop_assert!(!honest),
        }
        prop_assert!(fd.largest_buffer <= 64 << 10);
    }

    #[test]
    fn any_16_bytes_are_read_and_written_back_or_refused(bytes in any::<[u8; 16]>()) {
        let mut written = Vec::new();
        if let Ok(request) = Request::read_from(&mut bytes.as_slice()) {
            request.write_to(&mut written).unwrap();
            prop_assert_eq!(written.as_slice(), bytes);
        }
        written.clear();
        if let Ok(response) = Response::read_from(&mut bytes.as_slice()) {
            response.write_to(&mut written).unwrap();
            prop_assert_eq!(written.as_slice(), bytes);
        }
        written.clear();
        MemoryRange::read_from(&mut bytes.as_slice()).unwrap().write_to(&mut written).unwrap();
        prop_assert_eq!(written.as_slice(), bytes);
    }
}
