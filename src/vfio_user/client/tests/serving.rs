// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Servers that read and write the guest's memory by message, at any time.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MmapRegion};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::*;
use crate::vfio_user::error::ServeError;
use crate::vfio_user::message::DmaAccess;

const DMA_READ: u16 = 11;
const DMA_WRITE: u16 = 12;

type Memory = GuestMemoryMmap<AtomicBitmap>;

/// A client whose device was given the first 64 KiB of `memory`, and what a scripted server needs.
struct Served {
    client: Client,
    memory: Arc<Memory>,
    /// Where the server makes its own requests.
    line: UnixStream,
    main: UnixStream,
}

/// Negotiates with or without a socket for the server's requests.
fn served(twin: bool) -> Served {
    let memory = Arc::new(Memory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap());
    let (ours, mut main) = UnixStream::pair().unwrap();
    let shared = Arc::clone(&memory);
    let client = thread::spawn(move || {
        let mut client = Client::connect_with_memory(ours, "dma0", &options(), shared).unwrap();
        let region = DmaRegion { iova: iova(0, 0x1_0000), file_offset: 0, writeable: true };
        client.dma_map(&region, None).unwrap();
        client
    });
    let request = receive(&mut main).unwrap();
    let asked = Version::decode(&request.payload).unwrap().capabilities.twin_socket;
    assert_eq!(asked, Some(TwinSocketCapability { supported: true, fd_index: None }));
    let line =
        if twin { answer_with_twin(&main, &request, Some(0)) } else { answer_plainly(&main, &request) };
    let mapped = receive(&mut main).unwrap();
    main.write_all(&reply(&mapped, &[])).unwrap();
    Served { client: client.join().unwrap(), memory, line, main }
}

fn answer_plainly(mut main: &UnixStream, version: &Request) -> UnixStream {
    main.write_all(&reply(version, &defaults().encode())).unwrap();
    main.try_clone().unwrap()
}

fn answer_with_twin(main: &UnixStream, version: &Request, fd_index: Option<u32>) -> UnixStream {
    let (line, passed) = UnixStream::pair().unwrap();
    let twin_socket = Some(TwinSocketCapability { supported: true, fd_index });
    let answer = Version::current(PeerCapabilities { twin_socket, ..PeerCapabilities::default() });
    main.send_with_fds(&[&reply(version, &answer.encode())[..]], &[passed.as_raw_fd()]).unwrap();
    line
}

fn dma(id: u16, command: u16, no_reply: bool, iova: u64, count: usize, data: &[u8]) -> Vec<u8> {
    let access = DmaAccess { iova: iova.into(), count: (count as u64).into() };
    message(id, command, MessageKind::Command { no_reply }, &[access.as_bytes(), data].concat())
}

fn write(id: u16, iova: u64, data: &[u8]) -> Vec<u8> {
    dma(id, DMA_WRITE, false, iova, data.len(), data)
}

/// Waits until the client's descriptor can be read, as an event loop does.
fn wait(client: &Client) {
    let mut polled = [PollFd::from_borrowed_fd(client.requests_fd(), PollFlags::IN)];
    let timeout = Timespec { tv_sec: 10, tv_nsec: 0 };
    assert_eq!(poll(&mut polled, Some(&timeout)).unwrap(), 1, "nothing came");
}

fn dirty_pages(memory: &Memory) -> Vec<usize> {
    let region = memory.find_region(GuestAddress(0)).unwrap();
    (0..256).filter(|page| region.bitmap().dirty_at(page << 12)).collect()
}

#[test]
fn a_server_is_served_while_nothing_is_asked_of_it_and_its_writes_are_marked_dirty() {
    for twin in [true, false] {
        let mut served = served(twin);
        assert_eq!(served.client.serve_requests().unwrap(), 0, "nothing was asked");
        served.memory.write_slice(b"guest", GuestAddress(0x3000)).unwrap();
        MmapRegion::bitmap(served.memory.find_region(GuestAddress(0)).unwrap()).reset();
        let requests =
            [write(1, 0x1ffe, b"device"), dma(2, DMA_READ, false, 0x3000, 5, &[]), write(3, 0x1_0000, b"!")];
        served.line.write_all(&requests.concat()).unwrap();
        wait(&served.client);
        assert_eq!(served.client.serve_requests().unwrap(), 3);

        let mut answers = [[0; 32], [0; 32]];
        served.line.read_exact(&mut answers[0]).unwrap();
        assert_eq!((answers[0][0], answers[0][2], answers[0][8]), (1, 12, 1), "a reply to the write");
        served.line.read_exact(&mut answers[1]).unwrap();
        let mut data = [0; 5];
        served.line.read_exact(&mut data).unwrap();
        assert_eq!((answers[1][0], &data), (2, b"guest"));
        let mut refusal = [0; HEADER_BYTES];
        served.line.read_exact(&mut refusal).unwrap();
        let refused = MessageKind::ErrorReply { errno: libc::EFAULT };
        assert_eq!(Header::decode(&refusal).unwrap().kind(), refused, "memory it was not given");

        served.memory.read_slice(&mut data, GuestAddress(0x1ffe)).unwrap();
        assert_eq!((&data, dirty_pages(&served.memory)), (b"devic", vec![1, 2]));
    }
}

#[test]
fn a_server_that_needs_memory_before_it_answers_gets_it() {
    for twin in [true, false] {
        let Served { mut client, memory, mut line, mut main } = served(twin);
        let server = thread::spawn(move || {
            let request = receive(&mut main).unwrap();
            line.write_all(&write(9, 0x5000, b"written")).unwrap();
            let mut answer = [0; 32];
            line.read_exact(&mut answer).unwrap();
            main.write_all(&reply(&request, &[])).unwrap();
            (line, main)
        });
        client.reset().unwrap();
        assert_eq!(dirty_pages(&memory), [5]);
        drop(server.join().unwrap());
    }
}

#[test]
fn memory_can_be_used_from_the_moment_on_that_the_server_reads_of_it() {
    let Served { mut client, memory, mut line, mut main } = served(true);
    let server = thread::spawn(move || {
        let request = receive(&mut main).unwrap();
        line.write_all(&dma(1, DMA_WRITE, true, 0x2_0000, 4, b"soon")).unwrap();
        main.write_all(&reply(&request, &[])).unwrap();
        let request = receive(&mut main).unwrap();
        line.write_all(&dma(1, DMA_WRITE, true, 0x3_0000, 4, b"none")).unwrap();
        main.write_all(&refusal(&request, libc::ENOSPC)).unwrap();
        (line, main)
    });
    let mut map = |start| {
        client.dma_map(&DmaRegion { iova: iova(start, 0x1000), file_offset: 0, writeable: true }, None)
    };
    map(0x2_0000).unwrap();
    map(0x3_0000).unwrap_err();
    client.serve_requests().unwrap();
    assert!(dirty_pages(&memory).contains(&0x20));
    assert_eq!(
        client.channel.dma.mappings.overlap(iova(0x3_0000, 1)),
        None,
        "what was refused is not mapped"
    );
    drop(server.join().unwrap());
}

#[test]
fn writes_that_want_no_reply_are_done_before_the_news_that_the_device_stopped() {
    let Served { mut client, memory, mut line, mut main } = served(true);
    let server = thread::spawn(move || {
        let request = receive(&mut main).unwrap();
        for page in 0..16 {
            line.write_all(&dma(page, DMA_WRITE, true, u64::from(page) << 12, 4096, &[7; 4096])).unwrap();
        }
        main.write_all(&reply(&request, &request.payload)).unwrap();
        (line, main)
    });
    client.set_device_state(1).unwrap();
    assert_eq!(dirty_pages(&memory), (0..16).collect::<Vec<_>>());
    drop(server.join().unwrap());
}

#[test]
fn a_flood_of_requests_neither_holds_a_request_nor_the_event_loop() {
    let Served { mut client, memory: _memory, line, mut main } = served(true);
    let flood = thread::spawn(move || {
        let posted = dma(1, DMA_WRITE, true, 0, 64, &[1; 64]);
        while (&line).write_all(&posted).is_ok() {}
    });
    let server = thread::spawn(move || {
        let request = receive(&mut main).unwrap();
        main.write_all(&reply(&request, &[])).unwrap();
        main
    });
    wait(&client);
    client.reset().unwrap();
    assert!(client.serve_requests().unwrap() <= 64);
    let _main = server.join().unwrap();
    drop(client);
    flood.join().unwrap();
}

#[test]
fn a_message_that_is_no_whole_request_ends_the_connection() {
    let late = write(1, 0, b"data")[..30].to_vec();
    let reply = message(1, DMA_WRITE, MessageKind::Reply, &[]);
    let mut huge = write(1, 0, b"data");
    huge[4..8].copy_from_slice(&(1_u32 << 27).to_le_bytes());
    for (bytes, twin) in [(late, true), (reply, false), (huge, true), (Vec::new(), true)] {
        let mut served = served(twin);
        if bytes.is_empty() {
            served.line.shutdown(std::net::Shutdown::Both).unwrap();
        }
        served.line.write_all(&bytes).unwrap_or_default();
        let error = served.client.serve_requests().unwrap_err();
        let Error::Serve { source, .. } = &error else { panic!("{error}") };
        match bytes.len() {
            0 => assert!(matches!(source, ServeError::Disconnected), "{source}"),
            30 => assert!(matches!(source, ServeError::Timeout { timeout_ms: 300 }), "{source}"),
            _ => assert!(matches!(source, ServeError::Malformed(_)), "{source}"),
        }
        let error = served.client.serve_requests().unwrap_err();
        assert!(matches!(error, Error::Broken { source: BrokenBy::Serving, .. }), "{error:?}");
        served.main.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let seen = served.main.read(&mut [0]);
        assert_eq!(seen.ok(), Some(0), "the server sees its client hang up");
    }
}

#[test]
fn a_server_that_says_it_passes_a_socket_along_must() {
    for (fd_index, passes) in [(Some(1), true), (None, true), (Some(0), false)] {
        let (ours, mut main) = UnixStream::pair().unwrap();
        let server = thread::spawn(move || {
            let request = receive(&mut main).unwrap();
            if passes {
                return Some(answer_with_twin(&main, &request, fd_index));
            }
            let twin_socket = Some(TwinSocketCapability { supported: true, fd_index });
            let answer = Version::current(PeerCapabilities { twin_socket, ..PeerCapabilities::default() });
            main.write_all(&reply(&request, &answer.encode())).unwrap();
            None
        });
        let memory = Arc::new(Memory::from_ranges(&[(GuestAddress(0), 4096)]).unwrap());
        let error = Client::connect_with_memory(ours, "dma0", &options(), memory).unwrap_err();
        let Error::Malformed { source, .. } = error else { panic!("{error}") };
        assert!(source.to_string().contains("twin_socket"), "{source}");
        drop(server.join().unwrap());
    }
}
