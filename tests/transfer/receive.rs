// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The receiver and sources that keep to the protocol, or nearly so.

use std::error::Error;
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use vfio_migration::granule::Granule;
use vfio_migration::layout::Layout;
use vfio_migration::range::GpaRange;
use vfio_migration::transfer::connection::{Connection, Listener};
use vfio_migration::transfer::frame::{Features, MemoryTable};
use vfio_migration::transfer::limits::{ConnectionCount, Pace, PeerLimits};
use vfio_migration::transfer::receive::{
    Completion, Destination, PageStore, Pages, ReceiveError, Received, Receiver, ReceiverHandle, Step,
};
use vfio_migration::transfer::tls::ServerTls;
use vfio_migration::vm::VmError;

use crate::certificates::Files;
use crate::peer::{
    ABANDON, COMPLETE, COMPLETE_PAUSED, CONFIG, HIGH, MEMORY, MEMORY_FD, PAGE_FAULT, Peer, REGION, START,
    STATE, Vmm, announce, memory, message, quick, receive_on_pair, receive_on_tcp, request,
};
use crate::skip::skip;

const SECOND: Duration = Duration::from_secs(1);

/// A page that looks like no other.
fn page(seed: u64) -> Vec<u8> {
    (0..4096_u64).map(|at| (at * 31 + seed * 7 + (at >> 8)).to_le_bytes()[0]).collect()
}

/// The whole of an error, its sources after it.
fn text_of(error: &dyn Error) -> String {
    let causes = std::iter::successors(error.source(), |&error| error.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

fn check_migrated(vmm: &Vmm, received: &Received, connections: usize) {
    for index in 0..REGION / 4096 {
        let expected = if index == 5 { page(9999) } else { page(index) };
        assert!(vmm.bytes(index * 4096, 4096) == expected, "low page {index}");
        assert!(vmm.bytes(HIGH + index * 4096, 4096) == page(index + REGION / 4096), "high page {index}");
    }
    assert_eq!(vmm.calls, ["config {}", "state {}", "complete"]);
    assert_eq!(received.memory_messages, 2 * REGION / 4096 + 1);
    assert_eq!(received.memory_ranges, received.memory_messages);
    assert_eq!(received.memory_bytes, 2 * REGION + 4096);
    assert_eq!(received.connections, connections);
    assert_eq!(received.features, None);
    assert!(received.confirmed && !received.paused);
}

fn migrates_over(url: &str, connections: usize) {
    let listener = Listener::bind(&url.parse().unwrap()).unwrap();
    let mut vmm = Vmm::new();
    let received = thread::scope(|scope| {
        scope.spawn(|| {
            let mut main = Peer::to(&listener);
            main.begin();
            let mut additional: Vec<_> = (0..connections).map(|_| Peer::to(&listener)).collect();
            additional.iter_mut().for_each(announce);
            migrate_memory(&mut main, additional);
        });
        Receiver::new(quick(), None).receive(&listener, &mut vmm).unwrap()
    });
    check_migrated(&vmm, &received, connections);
    let heads = 16 * (4 + received.memory_messages) + 4;
    let exact = heads + 16 * received.memory_ranges + received.memory_bytes + 2 * connections as u64;
    assert_eq!(received.received_bytes, exact);
}

/// Sends all of RAM over `additional`, where there is one, then a last page over `main`, and completes.
fn migrate_memory(main: &mut Peer, mut additional: Vec<Peer>) {
    for index in 0..2 * REGION / 4096 {
        let gpa = if index < REGION / 4096 { index * 4096 } else { HIGH + (index * 4096 - REGION) };
        let message = memory(&[(gpa, &page(index))]);
        let slot = usize::try_from(index).unwrap() % additional.len().max(1);
        assert_eq!(additional.get_mut(slot).unwrap_or(main).ask(&message), Some(1));
    }
    drop(additional);
    main.say(&[memory(&[(0x5000, &page(9999))])]);
    main.end();
}

#[test]
fn a_vm_comes_over_a_unix_socket() {
    let directory = tempfile::tempdir().unwrap();
    migrates_over(&format!("unix:{}", directory.path().join("vm.sock").display()), 0);
}

#[test]
fn a_vm_comes_over_tcp() {
    migrates_over("tcp:127.0.0.1:0", 0);
}

#[test]
fn a_vm_comes_over_ipv6() {
    if std::net::TcpListener::bind("[::1]:0").is_err() {
        return skip("this host has no IPv6 loopback");
    }
    migrates_over("tcp:[::1]:0", 1);
}

#[test]
fn a_vm_comes_over_several_connections() {
    migrates_over("tcp:127.0.0.1:0", 4);
    migrates_over("tcp:127.0.0.1:0", 128);
}

#[test]
fn a_vm_comes_over_tls() {
    let (files, listener) = (Files::good(), Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap());
    let mut vmm = Vmm::new();
    let received = thread::scope(|scope| {
        scope.spawn(|| {
            let connect = || {
                let client = files.client();
                Peer(Box::new(Connection::connect(listener.url(), Some(&client), &quick()).unwrap()))
            };
            let mut main = connect();
            main.begin();
            let mut additional: Vec<_> = (0..4).map(|_| connect()).collect();
            additional.iter_mut().for_each(announce);
            migrate_memory(&mut main, additional);
        });
        Receiver::new(quick(), Some(files.server())).receive(&listener, &mut vmm).unwrap()
    });
    check_migrated(&vmm, &received, 4);
    assert!(received.received_bytes > received.memory_bytes);
}

#[test]
fn later_bytes_win_where_ranges_overlap_and_repeat() {
    let mut vmm = Vmm::new();
    let (received, ()) = receive_on_pair(quick(), &mut vmm, |mut peer| {
        peer.begin();
        peer.say(&[
            memory(&[
                (0x2000, &[1; 0x2000]),
                (0x1000, &[2; 0x1800]),
                (0x2000, &[3; 0x400]),
                (0x2000, &[4; 1]),
            ]),
            memory(&[(0x1000, &[5; 0x10])]),
        ]);
        peer.end();
    });
    assert_eq!(received.unwrap().memory_ranges, 5);
    assert_eq!(vmm.bytes(0x1000, 0x10), [5; 0x10]);
    assert_eq!(vmm.bytes(0x1010, 0xff0), [2; 0xff0]);
    assert_eq!(vmm.bytes(0x2000, 1), [4]);
    assert_eq!(vmm.bytes(0x2001, 0x3ff), [3; 0x3ff]);
    assert_eq!(vmm.bytes(0x2400, 0x400), [2; 0x400]);
    assert_eq!(vmm.bytes(0x2800, 0x1800), [1; 0x1800]);
}

#[test]
fn requests_in_flight_are_answered_in_order() {
    let mut vmm = Vmm::new();
    let (received, ()) = receive_on_tcp(quick(), &mut vmm, |listener| {
        let mut main = Peer::to(listener);
        main.begin();
        let mut additional = Peer::to(listener);
        announce(&mut additional);
        for seed in 0..50 {
            additional.send(&memory(&[(0x3000, &page(seed))]));
        }
        for _ in 0..50 {
            assert_eq!(additional.answer(), Some(1));
        }
        main.end();
    });
    assert_eq!(received.unwrap().memory_messages, 50);
    assert!(vmm.bytes(0x3000, 4096) == page(49), "the last one wins");
}

#[test]
fn everything_in_flight_at_once_is_taken() {
    let mut vmm = Vmm::new();
    let (received, ()) = receive_on_pair(quick(), &mut vmm, |mut peer| {
        let messages =
            [message(START, &[]), message(CONFIG, b"{}"), memory(&[(0, &page(3))]), message(STATE, b"{}")];
        peer.send(&[messages.concat(), message(COMPLETE_PAUSED, &[])].concat());
        assert_eq!((0..5).map(|_| peer.answer()).collect::<Vec<_>>(), [Some(1); 5]);
    });
    assert!(received.unwrap().paused);
    assert_eq!(vmm.calls, ["config {}", "state {}", "complete paused"]);
}

/// The messages that lead to a step, and its name.
fn steps() -> [(Vec<Vec<u8>>, Step); 4] {
    let messages = [message(START, &[]), message(CONFIG, b"{}"), message(STATE, b"{}")];
    let steps = [Step::Nothing, Step::Start, Step::Config, Step::State];
    [0, 1, 2, 3].map(|count| (messages[..count].to_vec(), steps[count]))
}

#[test]
fn every_command_out_of_order_is_refused_and_every_other_taken() {
    let payload = |command| match command {
        CONFIG | STATE => message(command, b"{}"),
        MEMORY => memory(&[(0, &[7; 16])]),
        MEMORY_FD => message(command, &[0; 4]),
        PAGE_FAULT => message(command, &[0; 16]),
        _ => message(command, &[]),
    };
    for (before, step) in steps() {
        for command in START..=PAGE_FAULT {
            let legal = match step {
                Step::Nothing => [START, ABANDON].contains(&command),
                Step::Start => [CONFIG, ABANDON].contains(&command),
                Step::Config => [MEMORY, STATE, ABANDON].contains(&command),
                Step::State => [COMPLETE, COMPLETE_PAUSED, ABANDON].contains(&command),
            };
            let (received, answer) = receive_on_pair(quick(), &mut Vmm::new(), |mut peer| {
                peer.say(&before);
                peer.ask(&payload(command))
            });
            assert_eq!(answer, Some(if legal { 1 } else { 2 }), "command {command} {step}");
            let in_order = match received {
                Err(ReceiveError::OutOfOrder { step: found, .. }) => {
                    assert_eq!(found, step);
                    false
                }
                Err(ReceiveError::LocalMemory | ReceiveError::Postcopy | ReceiveError::Start { .. }) => false,
                _ => true,
            };
            assert_eq!(in_order, legal, "command {command} {step}");
        }
    }
}

#[test]
fn memory_before_config_is_refused_by_name() {
    let (received, answer) = receive_on_pair(quick(), &mut Vmm::new(), |mut peer| {
        peer.say(&[message(START, &[])]);
        peer.ask(&memory(&[(0, &[1; 4096])]))
    });
    assert_eq!(answer, Some(2));
    assert_eq!(received.unwrap_err().to_string(), "Memory came after Start");
}

#[test]
fn abandon_is_taken_at_any_point() {
    for (before, step) in steps() {
        let mut vmm = Vmm::new();
        let (received, answer) = receive_on_pair(quick(), &mut vmm, |mut peer| {
            peer.say(&before);
            peer.ask(&message(ABANDON, &[]))
        });
        assert_eq!(answer, Some(1));
        let error = received.unwrap_err();
        assert!(matches!(error, ReceiveError::Abandoned { step: found } if found == step), "{error}");
        assert_eq!(vmm.calls.last().unwrap(), "abandoned");
    }
}

#[test]
fn an_end_between_messages_of_the_main_connection_is_named() {
    for (before, step) in steps() {
        let mut vmm = Vmm::new();
        let (received, ()) = receive_on_pair(quick(), &mut vmm, |mut peer| peer.say(&before));
        let error = received.unwrap_err();
        assert_eq!(error.to_string(), format!("Source closed the connection {step}"));
        assert_eq!(vmm.calls.last().unwrap(), "abandoned");
    }
}

#[test]
fn another_version_is_refused_by_its_number() {
    let (received, answer) = receive_on_pair(quick(), &mut Vmm::new(), |mut peer| {
        peer.ask(&[1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    });
    assert_eq!(answer, Some(2));
    let text = text_of(&received.unwrap_err());
    assert_eq!(
        text,
        "Cannot begin a migration with this source: Peer speaks protocol version 1, this side 0"
    );
}

#[test]
fn a_source_of_ours_learns_that_the_destination_is_too() {
    let (received, answer) = receive_on_pair(quick(), &mut Vmm::new(), |mut peer| {
        peer.send(&[1, 0, 0, 0, b'v', b'M', 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]);
        let mut answer = [0; 16];
        peer.0.read_exact(&mut answer).unwrap();
        peer.say(&[message(CONFIG, b"{}")]);
        peer.end();
        answer
    });
    assert_eq!(answer, [1, 0, b'v', b'M', 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(received.unwrap().features, Some(Features::NONE));
}

#[test]
fn local_memory_and_postcopy_are_refused_by_name() {
    let refusal = |message: Vec<u8>| {
        let (received, answer) = receive_on_pair(quick(), &mut Vmm::new(), |mut peer| {
            peer.say(&steps()[1].0);
            peer.ask(&message)
        });
        assert_eq!(answer, Some(2));
        received.unwrap_err().to_string()
    };
    assert!(refusal(message(MEMORY_FD, &[0; 4])).contains("local=on"));
    assert!(refusal(message(PAGE_FAULT, &[0; 16])).contains("postcopy"));

    let (received, answer) = receive_on_tcp(quick(), &mut Vmm::new(), |listener| {
        let mut main = Peer::to(listener);
        main.begin();
        let mut fault = Peer::to(listener);
        fault.send(&[2, 0]);
        thread::sleep(SECOND / 10);
        main.ask(&message(STATE, b"{}"))
    });
    assert_eq!(answer, Some(2));
    assert!(matches!(received, Err(ReceiveError::Postcopy)));
}

#[test]
fn postcopy_is_refused_when_it_shows_only_after_state() {
    let (received, answer) = receive_on_tcp(quick(), &mut Vmm::new(), |listener| {
        let mut main = Peer::to(listener);
        main.begin();
        main.say(&[message(STATE, b"{}")]);
        let mut fault = Peer::to(listener);
        fault.send(&[2, 0]);
        main.answer()
    });
    assert_eq!(answer, None, "no request waits for an answer");
    assert!(matches!(received, Err(ReceiveError::Postcopy)));
}

#[test]
fn postcopy_over_tls_is_refused_at_once() {
    let (files, listener) = (Files::good(), Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap());
    let received = thread::scope(|scope| {
        scope.spawn(|| {
            let connect = || {
                let client = files.client();
                Peer(Box::new(Connection::connect(listener.url(), Some(&client), &quick()).unwrap()))
            };
            let mut main = connect();
            main.begin();
            let mut fault = connect();
            fault.send(&[2, 0]);
            assert_eq!(main.answer(), None, "no request waits for an answer");
        });
        Receiver::new(quick(), Some(files.server())).receive(&listener, &mut Vmm::new())
    });
    assert!(matches!(received, Err(ReceiveError::Postcopy)));
}

#[test]
fn what_the_destination_does_not_take_is_answered_with_error() {
    for (call, command) in [("config", CONFIG), ("state", STATE), ("complete", COMPLETE)] {
        let mut vmm = Vmm::failing_at(call);
        let (received, answers) = receive_on_pair(quick(), &mut vmm, |mut peer| {
            let messages = [
                message(START, &[]),
                message(CONFIG, b"{}"),
                memory(&[(0, &[1; 64])]),
                message(STATE, b"{}"),
                message(COMPLETE, &[]),
            ];
            messages.iter().map(|message| peer.ask(message)).take_while(|&answer| answer == Some(1)).count()
        });
        let taken = [0, 0, 1, 3, 0, 4][usize::from(command)];
        assert_eq!(answers, taken, "{call}");
        let text = text_of(&received.unwrap_err());
        assert!(text.starts_with("Destination cannot take "), "{text}");
        assert!(text.ends_with(&format!(": no {call} today")), "{text}");
        // A checkpoint fails its completion on purpose and keeps everything.
        assert_eq!(vmm.calls.last().unwrap() == "abandoned", call != "complete");
    }
}

/// A store that works slowly, or not at all.
struct Difficult {
    layout: Layout,
    time: Option<Duration>,
    begun: AtomicBool,
    done: AtomicBool,
}

impl Difficult {
    fn new(time: Option<Duration>) -> Arc<Self> {
        let layout = Layout::new([GpaRange::new(0, REGION).unwrap()], Granule::KIB_4).unwrap();
        Arc::new(Self { layout, time, begun: AtomicBool::new(false), done: AtomicBool::new(false) })
    }
}

impl PageStore for Difficult {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn fill(&self, _table: &MemoryTable, pages: &mut Pages<'_>) -> io::Result<()> {
        let Some(time) = self.time else { return Err(io::ErrorKind::StorageFull.into()) };
        self.begun.store(true, Ordering::Release);
        thread::sleep(time);
        io::copy(pages, &mut io::sink())?;
        self.done.store(true, Ordering::Release);
        Ok(())
    }
}

#[test]
fn a_store_that_fails_is_not_mistaken_for_the_connection() {
    let mut vmm = Vmm { store: Some(Difficult::new(None)), ..Vmm::new() };
    let (received, answer) = receive_on_pair(quick(), &mut vmm, |mut peer| {
        peer.begin();
        peer.ask(&memory(&[(0, &[1; 4096])]))
    });
    assert_eq!(answer, Some(2));
    assert_eq!(
        text_of(&received.unwrap_err()),
        "Destination cannot keep the pages of Memory: no storage space"
    );
}

/// A store that panics, at whoever fills it.
struct Broken(Layout);

impl PageStore for Broken {
    fn layout(&self) -> &Layout {
        &self.0
    }

    fn fill(&self, _table: &MemoryTable, _pages: &mut Pages<'_>) -> io::Result<()> {
        panic!("this store is broken")
    }
}

#[test]
fn a_store_that_panics_on_another_connections_thread_is_an_error_in_good_time() {
    let store: Arc<dyn PageStore> = Arc::new(Broken(Difficult::new(None).layout.clone()));
    let mut vmm = Vmm { store: Some(store), ..Vmm::new() };
    let (received, answers) = receive_on_tcp(quick(), &mut vmm, |listener| {
        let mut main = Peer::to(listener);
        main.begin();
        let mut additional = Peer::to(listener);
        announce(&mut additional);
        additional.send(&memory(&[(0, &[1; 4096])]));
        [additional.answer(), main.answer()]
    });
    assert_eq!(answers, [None, None]);
    assert!(matches!(received.unwrap_err(), ReceiveError::Store { .. }));
    assert_eq!(vmm.calls.last().unwrap(), "abandoned");
}

#[test]
fn a_slow_store_is_not_mistaken_for_a_slow_source() {
    let limits = PeerLimits { pace: Pace { window: Duration::from_millis(100), bytes: 1 << 20 }, ..quick() };
    let mut vmm = Vmm { store: Some(Difficult::new(Some(Duration::from_millis(300)))), ..Vmm::new() };
    let (received, ()) = receive_on_pair(limits, &mut vmm, |mut peer| {
        peer.begin();
        peer.say(&[memory(&[(0, &[1; 4096])]), memory(&[(0, &[1; 4096])])]);
        peer.end();
    });
    received.unwrap();
}

#[test]
fn state_waits_until_the_memory_of_every_connection_is_in_place() {
    let store = Difficult::new(Some(Duration::from_millis(300)));
    let seen = Arc::clone(&store);
    let mut vmm = Vmm { store: Some(store), ..Vmm::new() };
    let (received, ()) = receive_on_tcp(quick(), &mut vmm, |listener| {
        let mut main = Peer::to(listener);
        main.begin();
        let mut additional = Peer::to(listener);
        announce(&mut additional);
        additional.send(&memory(&[(0, &[1; 4096])]));
        thread::sleep(Duration::from_millis(150));
        assert_eq!(main.ask(&message(STATE, b"{}")), Some(1));
        assert!(seen.done.load(Ordering::Acquire), "State was answered before the memory was in place");
        assert_eq!(additional.answer(), Some(1));
        main.say(&[message(COMPLETE, &[])]);
    });
    received.unwrap();
}

/// Answers to State and Complete that came while a Memory was under way which is cut off in mid-pages.
fn answers_past_a_cut() -> [Option<u16>; 2] {
    let store = Difficult::new(Some(Duration::ZERO));
    let seen = Arc::clone(&store);
    let mut vmm = Vmm { store: Some(store), ..Vmm::new() };
    let (received, answers) = receive_on_tcp(quick(), &mut vmm, |listener| {
        let mut main = Peer::to(listener);
        main.begin();
        let mut additional = Peer::to(listener);
        announce(&mut additional);
        let whole = memory(&[(0, &[1; 8192])]);
        additional.send(&whole[..whole.len() - 8192 + 100]);
        while !seen.begun.load(Ordering::Acquire) {
            thread::sleep(Duration::from_millis(1));
        }
        main.send(&[message(STATE, b"{}"), message(COMPLETE, &[])].concat());
        thread::sleep(Duration::from_millis(30));
        drop(additional);
        [main.answer(), main.answer()]
    });
    let error = text_of(&received.unwrap_err());
    assert!(error.starts_with("Cannot read the pages of Memory: "), "{error}");
    assert_eq!(vmm.calls, ["config {}", "abandoned"]);
    answers
}

#[test]
fn memory_cut_off_on_an_additional_connection_is_never_taken_for_whole() {
    // What could go wrong is a matter of microseconds.
    thread::scope(|scope| {
        for _ in 0..5 {
            scope.spawn(|| (0..10).for_each(|_| assert_eq!(answers_past_a_cut(), [Some(2), None])));
        }
    });
}

#[test]
fn memory_after_state_is_refused_on_every_connection() {
    let (received, answer) = receive_on_tcp(quick(), &mut Vmm::new(), |listener| {
        let mut main = Peer::to(listener);
        main.begin();
        let mut additional = Peer::to(listener);
        announce(&mut additional);
        additional.ask(&memory(&[(0, &[1; 64])]));
        main.say(&[message(STATE, b"{}")]);
        let answer = additional.ask(&memory(&[(0, &[1; 64])]));
        (answer, main.answer())
    });
    assert_eq!(answer, (Some(2), None));
    assert_eq!(received.unwrap_err().to_string(), "Memory came after State");
}

#[test]
fn an_additional_connection_that_fails_ends_the_migration() {
    let outcome = |bytes: &[u8]| {
        let (received, answer) = receive_on_tcp(quick(), &mut Vmm::new(), |listener| {
            let mut main = Peer::to(listener);
            main.begin();
            let mut additional = Peer::to(listener);
            announce(&mut additional);
            additional.send(bytes);
            drop(additional);
            main.answer()
        });
        assert_eq!(answer, None);
        text_of(&received.unwrap_err())
    };
    let whole = memory(&[(0, &[1; 4096])]);
    let cut = outcome(&whole[..whole.len() - 1]);
    assert!(cut.starts_with("Cannot read the pages of Memory: "), "{cut}");
    let cut = outcome(&whole[..20]);
    assert!(cut.starts_with("Cannot read the table of Memory: "), "{cut}");
    let cut = outcome(&[&whole[..], &whole[..3]].concat());
    assert!(cut.starts_with("Cannot read the head of a message: "), "{cut}");
    assert_eq!(outcome(&message(CONFIG, b"{}")), "Config came on a connection for Memory");
    let outside = outcome(&memory(&[(REGION, &[1; 16])]));
    assert!(
        outside.ends_with("Range 0x100000..0x100010 in entry 0 of the memory table is not in the VM's RAM")
    );
}

#[test]
fn the_tables_of_all_connections_are_held_to_the_limit_of_one() {
    let limits = PeerLimits { table_bytes: 6 << 10, ..quick() };
    let (received, ()) = receive_on_tcp(limits, &mut Vmm::new(), |listener| {
        let mut main = Peer::to(listener);
        main.begin();
        // One after the other they may be as long as they like, up to the limit.
        let ranges = vec![(0, &[7; 1][..]); 6 << 6];
        main.say(&[memory(&ranges), memory(&ranges)]);
        let mut additional: Vec<_> = (0..2).map(|_| Peer::to(listener)).collect();
        for connection in &mut additional {
            announce(connection);
            connection.send(&request(MEMORY, 4 << 10));
        }
        assert_eq!(main.answer(), None);
    });
    let error = received.unwrap_err();
    assert!(
        matches!(error, ReceiveError::Tables { length: 0x1000, taken: 0x1000, limit: 0x1800 }),
        "{error:?}"
    );
}

#[test]
fn the_connection_over_the_limit_is_refused() {
    let limits = PeerLimits { connections: ConnectionCount::new(2).unwrap(), ..quick() };
    refuses_one_more_than(2, limits);
    refuses_one_more_than(128, quick());
}

fn refuses_one_more_than(limit: usize, limits: PeerLimits) {
    let (received, answer) = receive_on_tcp(limits, &mut Vmm::new(), |listener| {
        let mut main = Peer::to(listener);
        main.begin();
        let mut additional: Vec<_> = (0..limit).map(|_| Peer::to(listener)).collect();
        for connection in &mut additional {
            announce(connection);
            assert_eq!(connection.ask(&memory(&[(0, &[1; 64])])), Some(1));
        }
        let mut another = Peer::to(listener);
        announce(&mut another);
        another.ask(&memory(&[(0, &[1; 64])]))
    });
    assert_eq!(answer, Some(2));
    let text = received.unwrap_err().to_string();
    assert_eq!(text, format!("Source opened more than {limit} additional connections"));
}

#[test]
fn a_source_that_falls_silent_is_given_up() {
    let limits = PeerLimits { idle_timeout: Duration::from_millis(200), ..quick() };
    let begun = Instant::now();
    let (received, _peer) = receive_on_pair(limits, &mut Vmm::new(), |mut peer| {
        peer.begin();
        peer
    });
    assert!(begun.elapsed() < 2 * SECOND);
    let text = received.unwrap_err().to_string();
    assert!(text.starts_with("Source was silent for ") && text.ends_with(" s after Config"), "{text}");
}

#[test]
fn an_idle_main_connection_lives_by_the_others() {
    let limits = PeerLimits { idle_timeout: Duration::from_millis(400), ..quick() };
    let (received, ()) = receive_on_tcp(limits, &mut Vmm::new(), |listener| {
        let mut main = Peer::to(listener);
        main.begin();
        let mut additional = Peer::to(listener);
        announce(&mut additional);
        for _ in 0..10 {
            thread::sleep(Duration::from_millis(100));
            assert_eq!(additional.ask(&memory(&[(0, &[1; 64])])), Some(1));
        }
        main.end();
    });
    assert_eq!(received.unwrap().memory_messages, 10);
}

#[test]
fn a_slow_store_is_not_mistaken_for_a_silent_source() {
    let limits = PeerLimits { idle_timeout: Duration::from_millis(200), ..quick() };
    let mut vmm = Vmm { store: Some(Difficult::new(Some(Duration::from_millis(600)))), ..Vmm::new() };
    let (received, ()) = receive_on_tcp(limits, &mut vmm, |listener| {
        let mut main = Peer::to(listener);
        main.begin();
        let mut additional = Peer::to(listener);
        announce(&mut additional);
        assert_eq!(additional.ask(&memory(&[(0, &[1; 4096])])), Some(1));
        main.end();
    });
    assert_eq!(received.unwrap().memory_messages, 1);
}

#[test]
fn a_source_that_stalls_or_trickles_in_mid_message_is_given_up() {
    let limits = PeerLimits { pace: Pace { window: Duration::from_millis(200), bytes: 4096 }, ..quick() };
    for trickles in [false, true] {
        for cut in [3, 20, 40] {
            let begun = Instant::now();
            let (received, answer) = receive_on_pair(limits.clone(), &mut Vmm::new(), |mut peer| {
                peer.begin();
                let message = memory(&[(0, &[1; 4096])]);
                peer.send(&message[..cut]);
                for byte in message[cut..].iter().take(if trickles { 1000 } else { 0 }) {
                    if peer.0.write_all(&[*byte]).is_err() {
                        break;
                    }
                    thread::sleep(Duration::from_millis(10));
                }
                peer.answer()
            });
            assert!(begun.elapsed() < 3 * SECOND);
            assert_eq!(answer, Some(2));
            let text = text_of(&received.unwrap_err());
            assert!(text.contains("of Memory: Peer stalled: ") || cut == 3, "{text}");
            assert!(text.contains("Peer stalled: "), "{text}");
        }
    }
}

#[test]
fn an_additional_connection_that_stalls_is_given_up() {
    let limits = PeerLimits { pace: Pace { window: Duration::from_millis(200), bytes: 4096 }, ..quick() };
    let (received, (answer, _additional)) = receive_on_tcp(limits, &mut Vmm::new(), |listener| {
        let mut main = Peer::to(listener);
        main.begin();
        let mut additional = Peer::to(listener);
        announce(&mut additional);
        additional.send(&memory(&[(0, &[1; 4096])])[..100]);
        (additional.answer(), additional)
    });
    assert_eq!(answer, Some(2));
    assert!(text_of(&received.unwrap_err()).starts_with("Cannot read the pages of Memory: Peer stalled: "));
}

#[test]
fn tls_over_a_unix_socket_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let url = format!("unix:{}", directory.path().join("vm.sock").display());
    let listener = Listener::bind(&url.parse().unwrap()).unwrap();
    let tls = ServerTls::from_directory(Files::good().path()).unwrap();
    let error = Receiver::new(quick(), Some(tls)).receive(&listener, &mut Vmm::new()).unwrap_err();
    assert!(text_of(&error).contains("TLS goes over TCP, not over unix:"));
}

/// Receives from `source`, stopped when that returns; its connections stay open.
fn stopped_after(source: impl FnOnce(&Listener) + Send) -> (Result<Received, ReceiveError>, Duration) {
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let receiver = Receiver::new(quick(), None);
    let handle = receiver.handle();
    thread::scope(|scope| {
        let stopping = scope.spawn(|| {
            source(&listener);
            assert!(handle.stop());
            Instant::now()
        });
        let received = receiver.receive(&listener, &mut Vmm::new());
        let ended = Instant::now();
        (received, ended.saturating_duration_since(stopping.join().unwrap()))
    })
}

#[test]
fn a_receiver_can_be_stopped_at_any_point() {
    let sources: [fn(&Listener); 3] = [
        |_| {},
        |listener| {
            let mut main = Peer::to(listener);
            main.begin();
            std::mem::forget(main);
        },
        |listener| {
            let mut main = Peer::to(listener);
            main.begin();
            main.send(&memory(&[(0, &[1; 4096])])[..100]);
            std::mem::forget(main);
        },
    ];
    for source in sources {
        let (received, took) = stopped_after(source);
        assert!(matches!(received, Err(ReceiveError::Stopped)), "{received:?}");
        assert!(took < SECOND, "{took:?}");
    }
}

/// A destination that takes the VM only once its source has gone, be it with State or with Complete.
struct Patient {
    handle: ReceiverHandle,
    waits_at: &'static str,
    waited: Option<Duration>,
}

impl Patient {
    fn call(&mut self, name: &str) {
        let begun = Instant::now();
        if name == self.waits_at {
            while !self.handle.source_has_gone() && begun.elapsed() < 5 * SECOND {
                thread::sleep(Duration::from_millis(5));
            }
            self.waited = Some(begun.elapsed());
        }
    }
}

impl Destination for Patient {
    fn config(&mut self, _json: &[u8]) -> Result<Arc<dyn PageStore>, VmError> {
        Ok(Difficult::new(Some(Duration::ZERO)))
    }

    fn state(&mut self, _json: Vec<u8>) -> Result<(), VmError> {
        self.call("state");
        Ok(())
    }

    fn complete(&mut self, _paused: bool) -> Result<Completion, VmError> {
        self.call("complete");
        Ok(Completion::Moved)
    }

    fn abandoned(&mut self) {}
}

/// Receives on `url` from a source that is there for a while after its last `messages`, and reads no answer to them.
fn receive_patiently(
    url: &str,
    waits_at: &'static str,
    messages: &[Vec<u8>],
) -> (Result<Received, ReceiveError>, Duration) {
    let listener = Listener::bind(&url.parse().unwrap()).unwrap();
    let receiver = Receiver::new(quick(), None);
    assert!(!receiver.handle().source_has_gone(), "there is none");
    let mut patient = Patient { handle: receiver.handle(), waits_at, waited: None };
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut main = Peer::to(&listener);
            main.begin();
            main.send(&messages.concat());
            thread::sleep(SECOND / 4);
        });
        let received = receiver.receive(&listener, &mut patient);
        (received, patient.waited.unwrap())
    })
}

#[test]
fn a_destination_can_tell_that_its_source_has_gone_and_takes_no_bytes_off_it() {
    let folder = tempfile::tempdir().unwrap();
    let socket = format!("unix:{}", folder.path().join("socket").display());
    // With bytes that nobody reads, the end of the connection is not the next thing to read.
    let messages = [message(STATE, b"{}"), message(COMPLETE, &[])];
    for url in ["tcp:127.0.0.1:0", &socket] {
        for sent in [&messages[..1], &messages] {
            let waited = receive_patiently(url, "state", sent).1;
            assert!((SECOND / 10..2 * SECOND).contains(&waited), "{url}: {waited:?}");
        }
    }
}

/// How long a destination waits with the State of a source that stays and abandons the migration a quarter of a second later.
fn abandoned_after(tls: Option<&Files>) -> Duration {
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let receiver = Receiver::new(quick(), tls.map(Files::server));
    let mut patient = Patient { handle: receiver.handle(), waits_at: "state", waited: None };
    thread::scope(|scope| {
        scope.spawn(|| {
            let client = tls.map(Files::client);
            let connection = Connection::connect(listener.url(), client.as_ref(), &quick()).unwrap();
            let mut main = Peer(Box::new(connection));
            main.begin();
            main.send(&message(STATE, b"{}"));
            thread::sleep(SECOND / 4);
            main.send(&message(ABANDON, &[]));
            assert_eq!(main.answer(), Some(1), "the State was taken");
            assert_eq!(main.answer(), Some(1), "so is the Abandon");
        });
        let received = receiver.receive(&listener, &mut patient);
        assert!(matches!(received, Err(ReceiveError::Abandoned { step: Step::State })), "{received:?}");
    });
    patient.waited.unwrap()
}

#[test]
fn a_source_that_abandons_while_its_state_is_taken_has_gone() {
    for tls in [None, Some(&Files::good())] {
        let waited = abandoned_after(tls);
        assert!((SECOND / 10..2 * SECOND).contains(&waited), "{waited:?}");
    }
}

#[test]
fn a_source_that_is_gone_before_the_last_answer_leaves_the_vm_here() {
    let messages = [message(STATE, b"{}"), message(COMPLETE, &[])];
    let folder = tempfile::tempdir().unwrap();
    let socket = format!("unix:{}", folder.path().join("socket").display());
    let received = receive_patiently(&socket, "complete", &messages).0.unwrap();
    assert!(!received.confirmed, "the source cannot have heard");
}

#[test]
fn a_receiver_can_receive_again() {
    let receiver = Receiver::new(quick(), None);
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    for _ in 0..2 {
        let received = thread::scope(|scope| {
            scope.spawn(|| {
                let mut main = Peer::to(&listener);
                main.begin();
                main.end();
            });
            receiver.receive(&listener, &mut Vmm::new()).unwrap()
        });
        assert_eq!(received.received_bytes, 16 * 4 + 4);
    }
}

#[test]
fn messages_without_a_payload_may_announce_none() {
    for (before, command) in [(0, START), (3, COMPLETE), (3, COMPLETE_PAUSED), (1, ABANDON)] {
        let mut vmm = Vmm::new();
        let (received, answer) = receive_on_pair(quick(), &mut vmm, |mut peer| {
            peer.say(&steps()[before].0);
            peer.ask(&request(command, 1 << 62))
        });
        assert_eq!(answer, Some(2));
        let text = received.unwrap_err().to_string();
        assert!(
            text.ends_with(" announces a payload of 4611686018427387904 bytes and may have none"),
            "{text}"
        );
        assert!(!vmm.calls.contains(&"complete".into()));
    }
}
