// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Receives a VM from a source that sends the input and no more: it ends, soon, with a VM or an error, and each request
//! taken has its answer.

#![no_main]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use vfio_migration::transfer::connection::Connection;
use vfio_migration::transfer::limits::PeerLimits;
use vfio_migration::transfer::receive::{Completion, Destination, GuestPages, PageStore, Receiver};
use vfio_migration::vm::VmError;
use vm_memory::{GuestAddress, GuestMemoryMmap};

/// Bytes a socket pair holds without anybody reading.
const INPUT_BYTES: usize = 64 << 10;

/// A VMM with two regions of RAM that believes everything.
#[derive(Default)]
struct Vmm {
    completed: bool,
    abandoned: bool,
}

impl Destination for Vmm {
    fn config(&mut self, _json: &[u8]) -> Result<Arc<dyn PageStore>, VmError> {
        let regions = [(GuestAddress(0), 1 << 16), (GuestAddress(1 << 32), 1 << 16)];
        let memory = GuestMemoryMmap::<()>::from_ranges(&regions)?;
        Ok(Arc::new(GuestPages::new(Arc::new(memory))?))
    }

    fn state(&mut self, _json: Vec<u8>) -> Result<(), VmError> {
        Ok(())
    }

    fn complete(&mut self, _paused: bool) -> Result<Completion, VmError> {
        self.completed = true;
        Ok(Completion::Moved)
    }

    fn abandoned(&mut self) {
        self.abandoned = true;
    }
}

fuzz_target!(|input: &[u8]| {
    if input.len() > INPUT_BYTES {
        return;
    }
    let limits = PeerLimits::default();
    let (near, mut far) = UnixStream::pair().expect("two descriptors are free");
    far.write_all(input).expect("the socket holds the input");
    far.shutdown(Shutdown::Write).expect("the socket is open");
    let connection = Connection::from_unix(near, &limits).expect("a socket takes its settings");

    let mut vmm = Vmm::default();
    let received = Receiver::new(limits, None).receive_from(connection, &mut vmm);
    assert_eq!(received.is_ok(), vmm.completed);
    assert_ne!(vmm.completed, vmm.abandoned);

    let mut answers = Vec::new();
    // What was left unread makes an error of the end, after the answers.
    let _ = far.read_to_end(&mut answers);
    let (answers, rest) = answers.as_chunks::<16>();
    assert!(rest.is_empty());
    let taken = answers.iter().take_while(|answer| answer[0] == 1).count();
    assert!(answers.len() - taken <= 1, "something followed an Error");
});
