// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The client against scripted servers that lie.

use std::io::{Read, Write};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use proptest::prelude::*;

use super::migration::mig_data;
use super::*;
use crate::range::IovaRange;
use crate::vfio_user::DmaRegion;
use crate::vfio_user::error::BrokenBy;
use crate::vfio_user::feature::{FEATURE_SET, Feature, MAX_LOGGING_RANGES as MAX_RANGES};
use crate::vfio_user::message::{HEADER_BYTES, Header, MessageKind, MigData};

mod serving;

/// One message a scripted server received.
struct Request {
    id: u16,
    command: u16,
    payload: Vec<u8>,
}

fn receive(stream: &mut UnixStream) -> Option<Request> {
    let mut header = [0; HEADER_BYTES];
    stream.read_exact(&mut header).ok()?;
    let header = Header::decode(&header).unwrap();
    let mut payload = vec![0; header.payload_bytes()];
    stream.read_exact(&mut payload).ok()?;
    Some(Request { id: header.id(), command: header.command(), payload })
}

fn message(id: u16, command: u16, kind: MessageKind, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Header::new(id, command, kind, payload.len()).unwrap().encode().to_vec();
    bytes.extend_from_slice(payload);
    bytes
}

/// Runs a server that answers VERSION with `version` and every later request with the bytes `script` returns for it.
fn server(
    version: Version,
    mut script: impl FnMut(&Request) -> Vec<u8> + Send + 'static,
) -> (UnixStream, JoinHandle<()>) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let thread = thread::spawn(move || {
        while let Some(request) = receive(&mut theirs) {
            let answer = match request.command {
                1 => message(request.id, 1, MessageKind::Reply, &version.encode()),
                _ => script(&request),
            };
            if theirs.write_all(&answer).is_err() {
                break;
            }
        }
    });
    (ours, thread)
}

fn options() -> Options {
    Options { request_timeout: Duration::from_millis(300), ..Options::default() }
}

fn defaults() -> Version {
    Version::current(PeerCapabilities::default())
}

fn client(script: impl FnMut(&Request) -> Vec<u8> + Send + 'static) -> Client {
    let (stream, _) = server(defaults(), script);
    Client::connect(stream, "dma0", &options()).unwrap()
}

fn iova(start: u64, length: u64) -> IovaRange {
    IovaRange::new(start, length).unwrap()
}

fn reply(request: &Request, payload: &[u8]) -> Vec<u8> {
    message(request.id, request.command, MessageKind::Reply, payload)
}

fn refusal(request: &Request, errno: i32) -> Vec<u8> {
    message(request.id, request.command, MessageKind::ErrorReply { errno }, &[])
}

#[test]
fn silent_server_times_out_and_the_client_stays_broken() {
    let mut client = client(|_| Vec::new());
    let error = client.reset().unwrap_err();
    assert!(matches!(error, Error::Timeout { timeout_ms: 300, .. }), "{error}");
    assert_eq!(error.to_string(), "vfio-user device dma0 did not answer DEVICE_RESET within 300 ms");
    let error = client.device_info().unwrap_err();
    assert_eq!(error.to_string(), "vfio-user device dma0 is lost: its connection was dropped");
    assert!(
        matches!(error, Error::Broken { source: BrokenBy::Timeout(VfioUserCommand::DeviceReset), .. }),
        "{error:?}"
    );
}

#[test]
fn dead_server_is_named() {
    let (stream, mut theirs) = UnixStream::pair().unwrap();
    let thread = thread::spawn(move || {
        let request = receive(&mut theirs).unwrap();
        theirs.write_all(&reply(&request, &defaults().encode())).unwrap();
        receive(&mut theirs).unwrap();
    });
    let mut client = Client::connect(stream, "dma0", &options()).unwrap();
    let error = client.reset().unwrap_err();
    assert_eq!(error.to_string(), "vfio-user device dma0 closed its connection during DEVICE_RESET");
    thread.join().unwrap();
}

#[test]
fn refusal_keeps_its_errno_and_the_connection() {
    let mut refused = false;
    let mut client = client(move |request| {
        let first = !std::mem::replace(&mut refused, true);
        if first { refusal(request, libc::EBUSY) } else { reply(request, &[]) }
    });
    let error = client.reset().unwrap_err();
    assert_eq!(error.errno(), Some(libc::EBUSY));
    assert!(error.to_string().contains("dma0 refused DEVICE_RESET with Device or resource busy"), "{error}");
    client.reset().unwrap();
}

#[test]
fn refusal_without_errno_is_still_a_refusal() {
    let mut client = client(|request| refusal(request, 0));
    let error = client.reset().unwrap_err();
    assert_eq!(error.errno(), Some(0));
    assert!(error.to_string().ends_with("an error it did not name"), "{error}");
}

#[test]
fn reply_to_another_request_is_rejected() {
    for (id, command) in [(1, 0), (0, 1)] {
        let mut client = client(move |request| {
            message(request.id + id, request.command + command, MessageKind::Reply, &[])
        });
        assert!(matches!(client.reset(), Err(Error::Malformed { .. })));
    }
}

#[test]
fn oversized_reply_is_rejected_before_its_bytes_are_awaited() {
    let mut client = client(|request| {
        let mut bytes = reply(request, &[]);
        bytes[4..8].copy_from_slice(&(1_u32 << 24).to_le_bytes());
        bytes
    });
    let begun = Instant::now();
    let error = client.reset().unwrap_err();
    assert!(matches!(error, Error::Malformed { source: DecodeError::OverLimit { .. }, .. }), "{error}");
    assert!(begun.elapsed() < Duration::from_millis(250));
    assert!(client.channel.buffers()[1].1 < 1 << 16, "no buffer grew on the announcement");
}

#[test]
fn server_requests_in_between_are_declined_and_skipped() {
    let mut client = client(|request| {
        let dma_read = message(77, 11, MessageKind::Command { no_reply: false }, &[0; 16]);
        let silent = message(78, 11, MessageKind::Command { no_reply: true }, &[0; 16]);
        match request.command {
            13 => [dma_read, silent, reply(request, &[])].concat(),
            11 => Vec::new(),
            other => panic!("command {other}"),
        }
    });
    client.reset().unwrap();
    client.reset().unwrap();
}

#[test]
fn version_that_cannot_work_is_rejected() {
    let with = |major, minor, xfer| Version {
        major,
        minor,
        capabilities: PeerCapabilities { max_data_xfer_size: xfer, ..PeerCapabilities::default() },
    };
    for version in [with(1, 0, None), with(0, 9, None), with(0, 1, Some(0))] {
        let (stream, _) = server(version.clone(), |_| Vec::new());
        let error = Client::connect(stream, "dma0", &options()).unwrap_err();
        assert!(
            matches!(error, Error::Malformed { command: VfioUserCommand::Version, .. }),
            "{version:?}: {error}"
        );
    }
}

#[test]
fn transfers_are_cut_to_the_smaller_limit() {
    let small = PeerCapabilities { max_data_xfer_size: Some(4096), ..PeerCapabilities::default() };
    let mut written = Vec::new();
    let (stream, _) = server(Version::current(small), move |request| match request.command {
        18 => {
            let data = MigData::decode_with_data(&request.payload).unwrap();
            assert!(data.len() <= 4096);
            written.extend_from_slice(data);
            reply(request, &[])
        }
        17 => {
            let size = MigData::decode(&request.payload).unwrap().size.get();
            let data: Vec<u8> = written.drain(..written.len().min(size as usize)).collect();
            let header = mig_data(data.len());
            reply(request, &[header.as_bytes(), &data].concat())
        }
        other => panic!("command {other}"),
    });
    let mut client = Client::connect(stream, "dma0", &options()).unwrap();
    assert_eq!(client.data_xfer_bytes(), 4096);
    let state: Vec<u8> = (0..=255).cycle().take(10_000).collect();
    client.write_migration_data(&state).unwrap();
    let (mut read, mut buf) = (Vec::new(), [0; 9000]);
    for expected in [4096, 4096, 1808, 0] {
        assert_eq!(client.read_migration_data(&mut buf).unwrap(), expected);
        read.extend_from_slice(&buf[..expected]);
    }
    assert_eq!(read, state);
}

#[test]
fn more_migration_data_than_asked_for_is_rejected() {
    let mut client = client(|request| reply(request, &[mig_data(9).as_bytes(), &[0; 9]].concat()));
    assert!(matches!(client.read_migration_data(&mut [0; 8]), Err(Error::Malformed { .. })));
}

#[test]
fn short_migration_data_padded_to_the_asked_size_is_read_short() {
    let mut client = client(|request| reply(request, &[mig_data(2).as_bytes(), &[1; 8]].concat()));
    assert_eq!(client.read_migration_data(&mut [0; 8]).unwrap(), 2);
}

#[test]
fn absent_features_are_an_answer() {
    for errno in [libc::ENOTTY, libc::EINVAL, libc::EOPNOTSUPP] {
        let mut client = client(move |request| refusal(request, errno));
        assert_eq!(client.migration_flags().unwrap(), None);
        assert!(!client.supports(Feature::DmaLoggingStart, FEATURE_SET).unwrap());
    }
    let mut client = client(|request| refusal(request, libc::EIO));
    assert_eq!(client.migration_flags().unwrap_err().errno(), Some(libc::EIO));
}

/// Answers a report with `words`, after `change` had its way with the echoed payload.
fn reporting(words: Vec<u64>, change: fn(&mut Vec<u8>)) -> Client {
    client(move |request| {
        let mut payload = request.payload.clone();
        payload.extend_from_slice(words.as_bytes());
        change(&mut payload);
        reply(request, &payload)
    })
}

#[test]
fn report_lends_the_words_of_the_bitmap() {
    let mut client = reporting(vec![5, u64::MAX], |_| {});
    let words = client.report_dma_log(iova(0x10_0000, 65 << 12), Granule::KIB_4).unwrap();
    assert_eq!(words, [5, u64::MAX]);
}

#[test]
fn report_that_is_short_or_about_something_else_is_rejected() {
    let short: fn(&mut Vec<u8>) = |payload| payload.truncate(payload.len() - 1);
    let other_iova: fn(&mut Vec<u8>) = |payload| payload[9] ^= 0x10;
    let other_granule: fn(&mut Vec<u8>) = |payload| payload[25] ^= 0x30;
    for change in [short, other_iova, other_granule] {
        let mut client = reporting(vec![0, 0], change);
        let error = client.report_dma_log(iova(0x10_0000, 65 << 12), Granule::KIB_4).unwrap_err();
        assert!(matches!(error, Error::Malformed { .. }), "{error}");
    }
}

#[test]
fn report_over_the_servers_bitmap_limit_is_not_sent() {
    let migration = MigrationCapability { pgsize: None, max_bitmap_size: Some(MIN_BITMAP_BYTES) };
    let version = PeerCapabilities { migration: Some(migration), ..PeerCapabilities::default() };
    let (stream, _) = server(Version::current(version), |_| panic!("nothing is to be sent"));
    let mut client = Client::connect(stream, "dma0", &options()).unwrap();
    assert_eq!(client.report_bytes(Granule::KIB_4), 2048 << 12);
    let error = client.report_dma_log(iova(0, 2049 << 12), Granule::KIB_4).unwrap_err();
    assert!(matches!(error, Error::TooLarge { .. }), "{error}");
    assert!(error.leaves_connection_usable());
}

#[test]
fn a_server_that_reports_its_log_in_crumbs_is_refused() {
    for max_bitmap_size in [0, 8, MIN_BITMAP_BYTES - 1] {
        let migration = MigrationCapability { pgsize: None, max_bitmap_size: Some(max_bitmap_size) };
        let version = PeerCapabilities { migration: Some(migration), ..PeerCapabilities::default() };
        let (stream, _) = server(Version::current(version), |_| panic!("nothing is to be sent"));
        let error = Client::connect(stream, "dma0", &options()).unwrap_err();
        let Error::Malformed { source, .. } = error else { panic!("{error}") };
        assert!(source.to_string().contains("max_bitmap_size"), "{source}");
    }
}

#[test]
fn chosen_granule_is_returned_and_a_senseless_one_rejected() {
    for (page_size, fine) in [(1_u64 << 16, true), (0, false), (4097, false)] {
        let mut client = client(move |request| {
            let mut payload = request.payload.clone();
            payload[8..16].copy_from_slice(&page_size.to_le_bytes());
            reply(request, &payload)
        });
        let chosen = client.start_dma_logging(Granule::KIB_4, &[iova(0, 1 << 20)]);
        assert_eq!(chosen.as_ref().ok().map(|granule| granule.bytes()), fine.then_some(page_size));
    }
}

#[test]
fn warm_reports_do_not_grow_the_buffers() {
    let mut client = reporting(vec![1; 16], |_| {});
    let range = iova(0, 1024 << 12);
    client.report_dma_log(range, Granule::KIB_4).unwrap();
    let before = client.channel.buffers();
    for _ in 0..10 {
        client.report_dma_log(range, Granule::KIB_4).unwrap();
    }
    assert_eq!(client.channel.buffers(), before);
}

#[test]
fn c59_no_request_is_larger_than_a_socket_buffer_takes_at_once() {
    let ranges: Vec<_> = (0..u64::from(MAX_RANGES)).map(|page| iova(page << 13, 4096)).collect();
    let mut client = client(|request| {
        assert!(request.payload.len() <= (32 << 10) + 256, "{} bytes", request.payload.len());
        match request.command {
            10 => reply(request, &request.payload[..16]),
            16 => reply(request, &request.payload),
            _ => reply(request, &[]),
        }
    });
    client.region_write(0, 0, &vec![0; 100_000]).unwrap();
    client.write_migration_data(&vec![0; 100_000]).unwrap();
    client.start_dma_logging(Granule::KIB_4, &ranges).unwrap();
    let error =
        client.channel.exchange(VfioUserCommand::MigDataWrite, &[&vec![0; 34_000]], None, 0).unwrap_err();
    assert!(matches!(error, Error::TooLarge { .. }) && error.leaves_connection_usable(), "{error}");
}

#[test]
fn c59_a_connection_out_of_step_is_hung_up_and_every_later_request_says_why() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let thread = thread::spawn(move || {
        let request = receive(&mut theirs).unwrap();
        theirs.write_all(&reply(&request, &defaults().encode())).unwrap();
        // The request's rest is taken for another: the refusal bears an identifier that nobody gave.
        let request = receive(&mut theirs).unwrap();
        theirs
            .write_all(&message(request.id + 7, 0x4141, MessageKind::ErrorReply { errno: 22 }, &[]))
            .unwrap();
        theirs.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        theirs.read(&mut [0])
    });
    let mut client = Client::connect(ours, "dma0", &options()).unwrap();
    let error = client.write_migration_data(&[0x41; 1000]).unwrap_err();
    assert!(matches!(error, Error::Malformed { .. }), "{error}");
    let seen = thread.join().unwrap();
    assert_eq!(seen.ok(), Some(0), "the server sees its client hang up, with the client still there");
    for _ in 0..2 {
        let error = client.device_state().unwrap_err();
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert_eq!(source, "MIG_DATA_WRITE was answered with a malformed message");
    }
}

#[test]
fn c61_a_server_that_allows_only_crumbs_is_refused() {
    for max_data_xfer_size in [1, MIN_DATA_XFER_BYTES - 1] {
        let version =
            PeerCapabilities { max_data_xfer_size: Some(max_data_xfer_size), ..PeerCapabilities::default() };
        let (stream, _) = server(Version::current(version), |_| panic!("nothing is to be sent"));
        let error = Client::connect(stream, "dma0", &options()).unwrap_err();
        let Error::Malformed { source, .. } = error else { panic!("{error}") };
        assert!(source.to_string().contains("max_data_xfer_size"), "{source}");
    }
}

#[test]
fn c61_a_transfer_of_many_requests_has_one_deadline() {
    let mut client = client(|request| {
        thread::sleep(Duration::from_millis(200));
        reply(request, &[])
    });
    let begun = Instant::now();
    let error = client.write_migration_data(&[0; 256 << 10]).unwrap_err();
    assert!(matches!(error, Error::Timeout { timeout_ms: 300, .. }), "{error}");
    assert!(begun.elapsed() < Duration::from_millis(1500), "eight answers of 200 ms each");
}

#[test]
fn c62_an_empty_answer_to_an_unmap_is_a_success() {
    let region = DmaRegion { iova: iova(0x1000, 0x2000), file_offset: 0, writeable: true };
    let mut unmaps = 0;
    let mut client = client(move |request| {
        unmaps += usize::from(request.command == 3);
        reply(request, if unmaps == 2 { &request.payload[..23] } else { &[] })
    });
    client.dma_map(&region, None).unwrap();
    client.dma_unmap(region.iova).unwrap();
    client.dma_map(&region, None).unwrap();
    let error = client.dma_unmap(region.iova).unwrap_err();
    assert!(matches!(error, Error::Malformed { command: VfioUserCommand::DmaUnmap, .. }), "{error}");
}

#[test]
fn c62_memory_that_is_not_whole_pages_or_mapped_already_is_not_sent() {
    let mut client = client(|request| {
        assert_eq!(request.payload[24..], 0x2000_u64.to_le_bytes(), "only the good one");
        reply(request, &[])
    });
    let region =
        |start, bytes, file_offset| DmaRegion { iova: iova(start, bytes), file_offset, writeable: true };
    for odd in [region(0x800, 0x1000, 0), region(0x1000, 0x1800, 0), region(0x1000, 0x1000, 1)] {
        let error = client.dma_map(&odd, None).unwrap_err();
        assert!(matches!(error, Error::NotWholePages { page_bytes: 4096, .. }), "{error}");
    }
    client.dma_map(&region(0x1000, 0x2000, 0), None).unwrap();
    for twice in [region(0x1000, 0x2000, 0), region(0x2000, 0x1000, 0), region(0, 0x9000, 0)] {
        let error = client.dma_map(&twice, None).unwrap_err();
        assert!(matches!(error, Error::AlreadyMapped { .. }) && error.leaves_connection_usable(), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn any_reply_is_answered_in_bounded_time_and_memory(
        garbage in proptest::collection::vec(any::<u8>(), 0..64), keep_header in any::<bool>(), pick in 0..7,
    ) {
        let mut client = client(move |request| {
            if keep_header { reply(request, &garbage) } else { garbage.clone() }
        });
        client.channel.set_timeout(Duration::from_millis(20));
        let range = iova(0, 1 << 20);
        let _ = match pick {
            0 => client.device_info().map(drop),
            1 => client.region_info(0).map(drop),
            2 => client.region_read(0, 0, &mut [0; 8]),
            3 => client.dma_unmap(range),
            4 => client.migration_flags().map(drop),
            5 => client.report_dma_log(range, Granule::KIB_4).map(drop),
            _ => client.read_migration_data(&mut [0; 32]).map(drop),
        };
        prop_assert!(client.channel.buffers()[1].1 < 1 << 20);
    }
}
