// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A decoder of the protocol that knows nothing of the library: numbers as they are described, one byte after the other.
//!
//! It accounts for every byte that went over every connection, both ways, or fails.

use crate::frames::{ABANDON, COMPLETE, COMPLETE_PAUSED, CONFIG, ERROR, MEMORY, OK, START, STATE};
use crate::relay::{Said, Spoken};

/// Reads bytes from the front.
struct Bytes<'a> {
    said: &'a Said,
    at: usize,
}

impl<'a> Bytes<'a> {
    fn are_left(&self) -> bool {
        self.at < self.said.bytes.len()
    }

    fn take(&mut self, count: u64) -> &'a [u8] {
        let end = self.at + usize::try_from(count).unwrap();
        assert!(end <= self.said.bytes.len(), "bytes {} to {end} of {}", self.at, self.said.bytes.len());
        let taken = &self.said.bytes[self.at..end];
        self.at = end;
        taken
    }

    fn number(&mut self, bytes: u64) -> u64 {
        self.take(bytes).iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte))
    }

    fn short(&mut self) -> u16 {
        u16::try_from(self.number(2)).unwrap()
    }

    /// When the next byte came.
    fn next_came(&self) -> usize {
        self.said.when(self.at)
    }

    /// When the byte before came.
    fn last_came(&self) -> usize {
        self.said.when(self.at - 1)
    }
}

/// What a source asked.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) command: u16,
    pub(crate) headers: [u8; 6],
    /// What its length counts; of a Memory, the table.
    pub(crate) payload: Vec<u8>,
    /// A Memory's ranges.
    pub(crate) table: Vec<(u64, u64)>,
    /// A Memory's bytes.
    pub(crate) pages: Vec<u8>,
    /// When its first byte came, and when its last.
    pub(crate) began: usize,
    pub(crate) ended: usize,
}

/// What a receiver answered.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) came: usize,
}

/// One connection, decoded.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) role: Option<u16>,
    pub(crate) role_came: usize,
    pub(crate) requests: Vec<Request>,
    pub(crate) answers: Vec<Answer>,
}

impl Connection {
    fn decode(spoken: &Spoken, is_main: bool) -> Self {
        let mut bytes = Bytes { said: &spoken.by_source, at: 0 };
        let role_came = bytes.next_came();
        let role = (!is_main).then(|| bytes.short());
        let mut requests = Vec::new();
        while bytes.are_left() {
            requests.push(decode_request(&mut bytes));
        }
        let mut bytes = Bytes { said: &spoken.by_receiver, at: 0 };
        let mut answers = Vec::new();
        while bytes.are_left() {
            answers.push(decode_answer(&mut bytes));
        }
        Self { role, role_came, requests, answers }
    }

    pub(crate) fn commands(&self) -> Vec<u16> {
        self.requests.iter().map(|request| request.command).collect()
    }

    pub(crate) fn statuses(&self) -> Vec<u16> {
        self.answers.iter().map(|answer| answer.status).collect()
    }

    /// The only request of this kind.
    pub(crate) fn sole(&self, command: u16) -> &Request {
        let mut of_kind = self.requests.iter().filter(|request| request.command == command);
        let sole = of_kind.next().unwrap();
        assert!(of_kind.next().is_none(), "{command} came twice");
        sole
    }
}

fn decode_request(bytes: &mut Bytes<'_>) -> Request {
    let began = bytes.next_came();
    let command = bytes.short();
    let headers = bytes.take(6).try_into().unwrap();
    let length = bytes.number(8);
    let payload = bytes.take(length).to_vec();
    let (mut table, mut pages) = (Vec::new(), Vec::new());
    if command == MEMORY {
        assert_eq!(length % 16, 0, "a table of {length} bytes");
        let number = |at: usize| u64::from_le_bytes(payload[at..at + 8].try_into().unwrap());
        table = (0..payload.len()).step_by(16).map(|at| (number(at), number(at + 8))).collect();
        pages = bytes.take(table.iter().map(|range| range.1).sum()).to_vec();
    }
    Request { command, headers, payload, table, pages, began, ended: bytes.last_came() }
}

fn decode_answer(bytes: &mut Bytes<'_>) -> Answer {
    let status = bytes.short();
    assert_eq!(bytes.take(6), [0; 6], "padding");
    assert_eq!(bytes.number(8), 0, "an answer to a source has no payload");
    Answer { status, came: bytes.last_came() }
}

/// All that source and receiver said to each other.
#[derive(Debug)]
pub(crate) struct Exchange {
    /// The main connection first.
    pub(crate) connections: Vec<Connection>,
}

impl Exchange {
    /// Decodes every byte, and checks what holds for every exchange, however it ends.
    pub(crate) fn decode(spoken: &[Spoken]) -> Self {
        let connections =
            spoken.iter().enumerate().map(|(index, spoken)| Connection::decode(spoken, index == 0));
        let exchange = Self { connections: connections.collect() };
        for connection in &exchange.connections {
            exchange.check_connection(connection);
        }
        exchange.lanes().iter().for_each(|lane| exchange.check_lane(lane));
        let begin = &exchange.main().requests[0];
        assert_eq!((begin.command, begin.payload.len()), (START, 0));
        exchange
    }

    pub(crate) fn main(&self) -> &Connection {
        &self.connections[0]
    }

    pub(crate) fn lanes(&self) -> &[Connection] {
        &self.connections[1..]
    }

    fn check_connection(&self, connection: &Connection) {
        let Connection { requests, answers, .. } = connection;
        assert_eq!(requests.len(), answers.len(), "as many answers as requests: {:?}", connection.commands());
        for (request, answer) in requests.iter().zip(answers) {
            // Version 0, and nothing else in any header.
            assert_eq!(request.headers, [0; 6], "headers of {}", request.command);
            assert!(request.ended < answer.came, "{} answered before it was all there", request.command);
            match request.command {
                START | COMPLETE | COMPLETE_PAUSED | ABANDON => assert!(request.payload.is_empty()),
                CONFIG | STATE => assert!(request.payload.starts_with(b"{")),
                MEMORY => check_table(&request.table),
                command => panic!("a source does not say {command}"),
            }
        }
        // Only Memory may follow before the answer, and only on another Memory.
        for (index, pair) in requests.windows(2).enumerate() {
            let pipelined = pair[1].began < answers[index].came;
            assert!(
                !pipelined || pair.iter().all(|request| request.command == MEMORY),
                "{}",
                pair[1].command
            );
        }
        let (last, before) = answers.split_last().unwrap_or((&Answer { status: OK, came: 0 }, &[]));
        assert!(before.iter().all(|answer| answer.status == OK), "nothing follows an Error");
        assert!([OK, ERROR].contains(&last.status));
    }

    /// An additional connection comes when Config is answered, carries Memory alone, and is done before State.
    fn check_lane(&self, lane: &Connection) {
        assert_eq!(lane.role, Some(1));
        assert!(lane.requests.iter().all(|request| request.command == MEMORY), "{:?}", lane.commands());
        let main = self.main();
        let config = main.requests.iter().position(|request| request.command == CONFIG).unwrap();
        assert!(lane.role_came > main.answers[config].came);
        if let (Some(after), Some(last)) = (main.requests.get(config + 1), lane.answers.last()) {
            assert!(after.began > last.came, "{} before the last acknowledgement", after.command);
        }
    }

    /// Checks an exchange that went through to `last`, with a Complete that may have been refused.
    pub(crate) fn assert_whole(&self, lanes: usize, last: u16) {
        assert_eq!(self.lanes().len(), lanes);
        let commands = self.main().commands();
        let [START, CONFIG, memory @ .., STATE, end] = &commands[..] else { panic!("{commands:?}") };
        assert!(memory.iter().all(|&command| command == MEMORY), "{commands:?}");
        assert_eq!(*end, last);
        if lanes > 0 {
            // At most what capturing the state wrote.
            assert!(memory.len() <= 1, "{commands:?}");
        }
    }

    /// Checks that no additional connection has two chunks on their way.
    pub(crate) fn assert_one_chunk_at_a_time(&self) {
        for lane in self.lanes() {
            let next = lane.requests.iter().skip(1);
            assert!(next.zip(&lane.answers).all(|(next, answer)| next.began > answer.came));
        }
    }

    /// All Memory of all connections, in the order in which it was all there.
    pub(crate) fn memory(&self) -> Vec<&Request> {
        let requests = self.connections.iter().flat_map(|connection| &connection.requests);
        let mut memory: Vec<_> = requests.filter(|request| request.command == MEMORY).collect();
        memory.sort_by_key(|request| request.ended);
        memory
    }

    /// Puts the pages that came into `image`, which is the memory from `start` on; what lies elsewhere is left out.
    pub(crate) fn replay(&self, start: u64, image: &mut [u8]) {
        let end = start + image.len() as u64;
        for request in self.memory() {
            let mut pages = &request.pages[..];
            for &(gpa, length) in &request.table {
                let (now, later) = pages.split_at(usize::try_from(length).unwrap());
                pages = later;
                if (start..end).contains(&gpa) {
                    let at = usize::try_from(gpa - start).unwrap();
                    image[at..at + now.len()].copy_from_slice(now);
                }
            }
        }
    }
}

fn check_table(table: &[(u64, u64)]) {
    assert!(!table.is_empty(), "an empty table");
    assert!(table.iter().all(|&(gpa, length)| length > 0 && gpa % 4096 == 0 && length % 4096 == 0));
    assert!(table.iter().map(|range| range.1).sum::<u64>() <= 64 << 20, "a chunk is at most 64 MiB");
}
