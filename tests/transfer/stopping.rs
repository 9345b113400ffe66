// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A receiver stopped from another thread, and a destination whose source has gone.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use vfio_migration::transfer::connection::{Connection, Listener};
use vfio_migration::transfer::receive::{
    Completion, Destination, PageStore, ReceiveError, Received, Receiver, ReceiverHandle, Step,
};
use vfio_migration::vm::VmError;

use crate::certificates::Files;
use crate::frames::{ABANDON, COMPLETE, STATE, memory, message};
use crate::peer::{Peer, Vmm, quick};
use crate::stores::Difficult;

const SECOND: Duration = Duration::from_secs(1);

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
