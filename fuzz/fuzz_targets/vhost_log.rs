// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a vhost-user back end does to its dirty log: any bytes, in and out of turn, over swaps that fail.
#![no_main]

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use libfuzzer_sys::fuzz_target;
use vfio_migration::granule::Granule;
use vfio_migration::iova::IovaMap;
use vfio_migration::layout::Layout;
use vfio_migration::ledger::{ChunkLimits, Ledger, Start};
use vfio_migration::range::GpaRange;
use vfio_migration::source::{
    DirtySource, LogBase, LogBaseAnswer, VhostUserBackEnd, VhostUserError, VhostUserLog,
};

const PAGE: u64 = 4096;

/// Pages of RAM; two regions share a word of the log.
const RAM: [(u64, u64); 3] = [(0, 130), (135, 200), (1 << 12, 70)];

/// Logs that a back end was given, the one in use last; and what it answers next.
#[derive(Default)]
struct Model {
    logs: Vec<File>,
    refuses: bool,
    loses_the_answer: bool,
    stopped: bool,
}

#[derive(Default, Clone)]
struct Shared(Arc<Mutex<Model>>);

impl VhostUserBackEnd for Shared {
    fn set_log_base(&mut self, log: LogBase<'_>) -> Result<LogBaseAnswer, VhostUserError> {
        let mut model = self.0.lock().expect("one thread");
        if model.stopped {
            return Ok(LogBaseAnswer::Stopped);
        }
        if std::mem::take(&mut model.refuses) {
            return Err("refused".into());
        }
        model.logs.push(File::from(log.fd().try_clone_to_owned()?));
        if std::mem::take(&mut model.loses_the_answer) {
            Err("no answer".into())
        } else {
            Ok(LogBaseAnswer::Taken)
        }
    }

    fn log_all(&mut self, _on: bool) -> Result<(), VhostUserError> {
        Ok(())
    }

    fn log_used_rings(&mut self, _on: bool) -> Result<(), VhostUserError> {
        Ok(())
    }
}

impl Shared {
    /// Sets bits of the byte at `offset`, past the end of RAM perhaps; returns the pages of RAM that they stand for.
    fn logs(&self, offset: u64, bits: u8) -> impl Iterator<Item = u64> + use<> {
        let model = self.0.lock().expect("one thread");
        let log = model.logs.last().expect("it was started with one");
        let mut byte = [0];
        log.read_exact_at(&mut byte, offset).expect("inside the log");
        log.write_all_at(&[byte[0] | bits], offset).expect("inside the log");
        let in_ram = |page: &u64| RAM.iter().any(|&(first, count)| (first..first + count).contains(page));
        (0..8).filter(move |bit| bits >> bit & 1 == 1).map(move |bit| offset * 8 + bit).filter(in_ram)
    }
}

fuzz_target!(|input: &[u8]| {
    let regions = RAM.map(|(page, pages)| GpaRange::new(page * PAGE, pages * PAGE).expect("RAM"));
    let layout = Layout::new(regions, Granule::KIB_4).expect("a layout");
    let back_end = Shared::default();
    let mut log = VhostUserLog::new("back-end", back_end.clone());
    log.start(&layout, &IovaMap::Identity).expect("it starts");
    let mut ledger = Ledger::new(layout, 1);
    let cursor = ledger.open(Start::Copied);
    let mut written = BTreeSet::new();
    let mut marked = BTreeSet::new();
    for step in input.chunks_exact(4) {
        let offset = u64::from(u16::from_le_bytes([step[1], step[2]])) % 600;
        match step[0] % 8 {
            0..4 => written.extend(back_end.logs(offset, step[3])),
            4 => back_end.0.lock().expect("one thread").refuses = true,
            5 => back_end.0.lock().expect("one thread").loses_the_answer = true,
            6 => back_end.0.lock().expect("one thread").stopped = step[1] & 1 == 1,
            _ => {
                let whole = log.collect(&mut ledger.sink(0, &IovaMap::Identity)).is_ok();
                ledger.absorb();
                ledger.begin_round(cursor);
                if let Some(chunk) = ledger.take(cursor, ChunkLimits::NONE) {
                    let pages = |range: &GpaRange| range.start() / PAGE..range.end() / PAGE;
                    marked.extend(chunk.ranges().iter().flat_map(pages));
                    ledger.commit(chunk);
                }
                assert!(marked.is_subset(&written), "a page that was not logged");
                if whole {
                    assert_eq!(marked, written, "a page that was logged and not reported");
                    written.clear();
                    marked.clear();
                }
            }
        }
    }
});
