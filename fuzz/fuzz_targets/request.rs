// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Reads requests, responses, connection roles and ranges: what is accepted is written back the same.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vm_migration::MigratableError;
use vm_migration::protocol::{
    Command, ConnectionRole, MemoryRange, Request, Response, Status, supported_protocol_versions,
};

fuzz_target!(|stream: &[u8]| {
    check(stream, |fd| Request::read_from(fd), Request::write_to);
    check(stream, |fd| Response::read_from(fd), Response::write_to);
    check(stream, |fd| ConnectionRole::read_from(fd), |role, fd| role.write_to(fd));
    check(stream, |fd| MemoryRange::read_from(fd), MemoryRange::write_to);

    let mut fd = stream;
    if let Ok(request) = Request::read_from(&mut fd) {
        match request.sender_protocol_version() {
            Ok(version) => assert!(supported_protocol_versions().contains(&version)),
            Err(error) => assert!(matches!(error, MigratableError::MigrateReceive(_))),
        }
        assert!(request.command() == Command::Start || request.sender_protocol_version().is_err());
    }
    let mut fd = stream;
    if let Ok(response) = Response::read_from(&mut fd) {
        let status = response.status();
        let passed = response.ok_or_fatal_error(MigratableError::DeviceDisconnected(String::new()));
        assert_eq!(passed.is_ok(), status == Status::Ok);
    }
});

/// Checks that what `read` accepts, `write` turns back into the bytes that were read.
fn check<T>(
    stream: &[u8],
    read: impl Fn(&mut &[u8]) -> Result<T, MigratableError>,
    write: impl Fn(&T, &mut dyn std::io::Write) -> Result<(), MigratableError>,
) {
    let mut rest = stream;
    let Ok(message) = read(&mut rest) else { return };
    let mut written = Vec::new();
    write(&message, &mut written).expect("a vector takes all bytes");
    assert_eq!(written, stream[..stream.len() - rest.len()]);
}
