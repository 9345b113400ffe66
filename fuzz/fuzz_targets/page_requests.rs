// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Hands a VM over on demand to a receiver that asks for what the input says: what is a page of the VM is answered with its bytes,
//! anything else with an error after the memory was taken away, and the sender ends, soon.

#![no_main]

use std::fs::File;
use std::io::{self, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::OnceLock;
use std::thread;

use libfuzzer_sys::fuzz_target;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tempfile::TempDir;
use vfio_migration::granule::Granule;
use vfio_migration::layout::Layout;
use vfio_migration::offload::{LocalSendOptions, LocalSender};
use vfio_migration::range::GpaRange;
use vfio_migration::snapshot::{AnnouncedRam, SnapshotChain, SnapshotLimits, SnapshotWriter};
use vfio_migration::transfer::url::Url;

/// Two slots, and how much of each is not zeros.
const RAM: [(u64, u64); 2] = [(0, 1 << 18), (1 << 32, 1 << 17)];
const POPULATED: u64 = 1 << 16;

/// Requests that go out before an answer is read.
const REQUESTS: usize = 64;

/// Bytes of the input that make a request: what kind, and a range.
const PIECE: usize = 17;

const OK: u8 = 1;

fn byte_at(gpa: u64) -> u8 {
    if gpa % (1 << 32) < POPULATED { (gpa >> 12).to_le_bytes()[0] | 1 } else { 0 }
}

fn state() -> String {
    let range = |(gpa, length)| format!(r#"{{\"gpa\":{gpa},\"length\":{length}}}"#);
    let mapping = |number: usize| {
        let (gpa, size) = RAM[number];
        format!(r#"{{\"slot\":{number},\"gpa\":{gpa},\"size\":{size},\"virtio_mem\":false}}"#)
    };
    let ranges = format!(r#"\"memory_ranges\":{{\"data\":[{},{}]}}"#, range(RAM[0]), range(RAM[1]));
    let mappings = format!(r#"\"guest_ram_mappings\":[{},{}]"#, mapping(0), mapping(1));
    let child = format!(r#"{{"snapshots":{{}},"snapshot_data":{{"state":"{{{ranges},{mappings}}}"}}}}"#);
    let root = r#"{"state":"{\"common_cpuid\":[{\"function\":1}]}"}"#;
    format!(r#"{{"snapshots":{{"memory-manager":{child}}},"snapshot_data":{root}}}"#)
}

/// A stored VM, and a socket that waits for it: made once.
fn stored() -> &'static (TempDir, PathBuf, UnixListener) {
    static STORED: OnceLock<(TempDir, PathBuf, UnixListener)> = OnceLock::new();
    STORED.get_or_init(|| {
        let place = tempfile::tempdir().expect("a directory");
        let target = place.path().join("vm");
        let ranges = RAM.map(|(start, bytes)| GpaRange::new(start, bytes).expect("a range"));
        let ram = AnnouncedRam::all(Layout::new(ranges, Granule::host_page()).expect("a layout"));
        let writer = SnapshotWriter::create(&target, ram, None, SnapshotLimits::default()).expect("a writer");
        for gpa in RAM.into_iter().flat_map(|(start, _)| (start..start + POPULATED).step_by(4096)) {
            let page = GpaRange::new(gpa, 4096).expect("a page");
            writer.fill(page, &mut io::repeat(byte_at(gpa)).take(4096)).expect("a page is written");
        }
        writer.finish(br#"{"memory":{"size":393216}}"#, state().as_bytes()).expect("a snapshot");
        let listener = UnixListener::bind(place.path().join("socket")).expect("a socket");
        (place, target, listener)
    })
}

/// The main connection of a receiver.
struct Line(UnixStream, Vec<File>);

impl Line {
    /// Takes a message; returns its command.
    fn take(&mut self) -> Option<u8> {
        let mut head = [0; 16];
        self.0.read_exact(&mut head).ok()?;
        let length = u64::from_le_bytes(head[8..].try_into().expect("eight bytes"));
        if head[0] == 7 {
            self.descriptor();
        } else {
            io::copy(&mut (&self.0).take(length), &mut io::sink()).ok()?;
        }
        Some(head[0])
    }

    fn descriptor(&mut self) {
        let mut number = [0; 4];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut number)];
        recvmsg(&self.0, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC).expect("a descriptor");
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                self.1.extend(rights.map(File::from));
            }
        }
    }

    fn answer(&mut self) {
        let mut head = [0; 16];
        head[0] = OK;
        let _it_may_have_given_up = self.0.write_all(&head);
    }
}

/// A message, and the range that it asks for if it is a page of the VM.
fn request(piece: &[u8]) -> (Vec<u8>, Option<(u64, u64)>) {
    let number = |at: usize| u64::from_le_bytes(piece[at..at + 8].try_into().expect("eight bytes"));
    let (mut gpa, mut length) = (number(1), number(9));
    if piece[0] & 1 == 1 {
        gpa = gpa & 0x3_f000 | (gpa >> 63) << 32;
        length = 4096 << (length & 3);
    }
    let mut message = [&[9, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0][..], &[0; 16]].concat();
    message[16..24].copy_from_slice(&gpa.to_le_bytes());
    message[24..].copy_from_slice(&length.to_le_bytes());
    let is_raw = piece[0] & 6 == 6;
    if is_raw {
        message[..PIECE - 1].copy_from_slice(&piece[1..]);
    }
    let fits = |&(start, bytes): &(u64, u64)| {
        gpa >= start && gpa - start <= bytes && length <= bytes - (gpa - start)
    };
    let is_page = length.is_power_of_two() && (4096..=1 << 30).contains(&length) && gpa % 4096 == 0;
    (message, (!is_raw && is_page && RAM.iter().any(|slot| fits(slot))).then_some((gpa, length)))
}

fn check(files: &[File], gpa: u64, length: u64) {
    let (file, start) = if gpa < 1 << 32 { (&files[0], 0) } else { (&files[1], 1 << 32) };
    let mut bytes = vec![0xff; usize::try_from(length).expect("it fits")];
    // Memory that was taken away since is in nobody's hands.
    if file.read_exact_at(&mut bytes, gpa - start).is_ok() {
        let expected = (gpa..gpa + length).step_by(4096).flat_map(|page| [byte_at(page); 4096]);
        assert!(bytes.iter().copied().eq(expected), "page at {gpa:#x}");
    }
}

fuzz_target!(|input: &[u8]| {
    let (place, target, listener) = stored();
    let chain = SnapshotChain::open([target], &SnapshotLimits::default()).expect("the snapshot is whole");
    let options = LocalSendOptions { on_demand: true, ..LocalSendOptions::default() };
    let sender = LocalSender::new(chain, options).expect("a sender");
    let url = Url::unix(place.path().join("socket")).expect("a URL");
    thread::scope(|scope| {
        let sending = scope.spawn(|| sender.send(&url));
        let mut line = Line(listener.accept().expect("a sender").0, Vec::new());
        while line.take().expect("a message") != 2 {
            line.answer();
        }
        line.answer();
        let mut faults = listener.accept().expect("a second connection").0;
        faults.read_exact(&mut [0; 2]).expect("its role");
        assert_eq!(line.take(), Some(3));
        let requests: Vec<_> = input.chunks_exact(PIECE).take(REQUESTS).map(request).collect();
        for (message, _) in &requests {
            let _it_may_have_hung_up = faults.write_all(message);
        }
        let _it_may_have_hung_up = faults.shutdown(Shutdown::Write);
        let mut is_broken = false;
        for (_, page) in requests {
            let mut answer = [0; 16];
            if faults.read_exact(&mut answer).is_err() {
                break;
            }
            assert!(!is_broken, "an answer after an error");
            match page {
                Some((gpa, length)) if answer[0] == OK => check(&line.1, gpa, length),
                Some((gpa, _)) => panic!("no page at {gpa:#x}"),
                None => is_broken = answer[0] != OK,
            }
            // Whatever else comes is out of step.
            if page.is_none() {
                break;
            }
        }
        line.answer();
        let is_handed_over = line.take() == Some(5);
        line.answer();
        // It may still ask whether the connection is closed.
        drop((faults, line.0));
        let sent = sending.join().expect("the sender does not panic");
        if sent.is_err() && is_handed_over {
            assert!(line.1.iter().all(|file| file.metadata().is_ok_and(|found| found.len() == 0)));
        }
    });
});
