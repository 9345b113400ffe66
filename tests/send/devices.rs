// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Device state that does not fit, receivers that pin memory, and what a VM lets go of for its receiver.

use std::error::Error;
use std::iter::successors;
use std::time::Duration;

use vfio_migration::device::Device;
use vfio_migration::iova::IovaMap;
use vfio_migration::layout::Layout;
use vfio_migration::precopy::CancelReason;
use vfio_migration::range::GpaRange;
use vfio_migration::source::{Cover, DirtySource, Reports, Sink, SourceError};
use vfio_migration::tracker::{DeviceMappings, SpaceId, VmMappings};
use vfio_migration::transfer::limits::PeerLimits;
use vfio_migration::transfer::{PinningReceiver, Populated, SendError, SendOptions, Sender, Sent, SourceVm};
use vm_memory::{Bytes, GuestAddress};

use crate::frames::{COMPLETE, CONFIG, STATE};
use crate::peer::{Fault, Peer};
use crate::vm::{FakeDevice, FakeVm, HIGH, LOW, Machine, PAGE, PAGES, page_gpa, sparse_memory};
use crate::{log_of, options};

const MIB: u64 = 1 << 20;

/// The error and all its causes.
fn chain(error: &SendError) -> String {
    let causes = successors(Some(error as &dyn Error), |&error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

fn with_device(vm: &FakeVm, data: &[u8], script: impl FnOnce(&mut FakeDevice)) -> Machine {
    let mut io = FakeDevice::new(&vm.log, data);
    script(&mut io);
    vm.machine().with_device(Device::new("dev", Box::new(io)))
}

fn moved(vm: &mut FakeVm, machine: &Machine, options: SendOptions) -> Result<Sent, SendError> {
    Sender::new(options).send(vm, &machine.tracker, &machine.devices)
}

/// Checks that a migration was refused while the VM ran, with all of `words`.
fn assert_refused_running(vm: &FakeVm, error: &SendError, words: &[&str]) {
    let text = chain(error);
    assert!(words.iter().all(|word| text.contains(word)), "{text}");
    assert_eq!(error.source_vm(), SourceVm::AsBefore);
    let log = log_of(&vm.log);
    assert!(!log.iter().any(|step| step == "pause" || step == "STOP_COPY"), "{log:?}");
}

#[test]
fn c45_a_device_that_tells_its_whole_size_moves_within_a_limit_that_it_fits() {
    // 30 MiB take 210 ms. A busy host may need more than the limit now and then.
    let mut vm = FakeVm::new(0);
    let sent = (0..5).find_map(|_| {
        let machine = with_device(&vm, &vec![1; 20 << 20], |io| io.size = Some(30 * MIB));
        let peer = Peer::unix(Fault::None);
        let options = options(&peer).downtime(Duration::from_millis(250));
        moved(&mut vm, &machine, options).ok()
    });
    let sent = sent.expect("the device fits the limit");
    assert_eq!(
        (sent.device_state_bytes, sent.device_precopy_bytes, sent.progress.seen.back_outs),
        (20 * MIB, 0, 0)
    );
}

#[test]
fn c47_c48_a_state_beyond_the_devices_limit_is_refused_before_a_page_is_copied() {
    let mut vm = FakeVm::new(0);
    let machine = with_device(&vm, b"a state", |io| io.size = Some(100 << 30));
    let peer = Peer::unix(Fault::None);
    let error = moved(&mut vm, &machine, options(&peer)).unwrap_err();
    assert_refused_running(&vm, &error, &["107374182400 bytes of state", "Device::state_limit"]);
    assert!(peer.end().0.pages.is_empty());
}

#[test]
fn c48_the_share_that_base64_takes_counts_and_the_receivers_limit_is_named() {
    for (size, fits) in [(30_000, true), (30_001, false)] {
        let mut vm = FakeVm::new(0);
        let machine = with_device(&vm, b"a state", |io| io.size = Some(size));
        let peer = Peer::unix(Fault::None);
        let options = options(&peer).limits(PeerLimits { state_bytes: 40_000, ..PeerLimits::default() });
        match moved(&mut vm, &machine, options) {
            Ok(_) => assert!(fits),
            Err(error) => {
                assert!(!fits, "{error}");
                let words = ["40004 bytes", "30001 bytes", "40000 bytes", "PeerLimits::state_bytes"];
                assert_refused_running(&vm, &error, &words);
            }
        }
    }
}

#[test]
fn c48_what_a_device_tells_counts_beside_one_that_tells_nothing() {
    for (size, fits) in [(20_000, true), (31_000, false)] {
        let mut vm = FakeVm::new(0);
        let mut untold = FakeDevice::new(&vm.log, b"another state");
        untold.size = None;
        let machine = with_device(&vm, b"a state", |io| io.size = Some(size));
        machine.devices.lock().unwrap().add(Device::new("untold", Box::new(untold))).unwrap();
        let peer = Peer::unix(Fault::None);
        let limits = PeerLimits { state_bytes: 40_000, ..PeerLimits::default() };
        let options = options(&peer).limits(limits).downtime(Duration::from_secs(10));
        match moved(&mut vm, &machine, options) {
            Ok(_) => assert!(fits),
            Err(error) => {
                assert!(!fits, "{error}");
                assert_refused_running(&vm, &error, &["40000 bytes", "PeerLimits::state_bytes"]);
            }
        }
    }
}

#[test]
fn c48_a_captured_state_beyond_the_limit_lets_the_vm_run_on() {
    let mut vm = FakeVm::new(0);
    let machine = vm.machine();
    let peer = Peer::unix(Fault::None);
    let options = options(&peer).limits(PeerLimits { state_bytes: 8, ..PeerLimits::default() });
    let error = moved(&mut vm, &machine, options).unwrap_err();
    assert!(matches!(error, SendError::StateTooLarge { limit_bytes: 8, device_bytes: 0, .. }), "{error}");
    assert!(vm.is_running() && peer.end().0.of(STATE).is_empty());
}

fn pinning(peer: &Peer, pinning_receiver: PinningReceiver) -> SendOptions {
    options(peer).pinning_receiver(pinning_receiver)
}

/// A device's driver that keeps pages pinned: they are dirty whenever one asks.
struct Pins(u64);

impl DirtySource for Pins {
    fn id(&self) -> &str {
        "pins"
    }

    fn reports(&self) -> Reports {
        Reports::Component
    }

    fn cover(&self) -> Cover {
        Cover { ranges: vec![GpaRange::new(0, self.0 * PAGE).unwrap()], precise: true }
    }

    fn standing_bytes(&self) -> u64 {
        self.0 * PAGE
    }

    fn start(&mut self, _layout: &Layout, _iova: &IovaMap) -> Result<(), SourceError> {
        Ok(())
    }

    fn collect(&mut self, sink: &mut Sink<'_>) -> Result<(), SourceError> {
        sink.gpa_range(GpaRange::new(0, self.0 * PAGE).unwrap());
        Ok(())
    }

    fn stop(&mut self) -> Result<(), SourceError> {
        Ok(())
    }
}

#[test]
fn c54_pinned_pages_neither_hold_a_migration_up_nor_slow_the_vcpus_down() {
    // 512 pages in eight chunks, which take the slow peer 10 ms each.
    let pinned = |downtime_ms| {
        let mut vm = FakeVm::new(0);
        vm.can_throttle = true;
        let machine = Machine::from(vm.builder().source(Box::new(Pins(512))).build().unwrap());
        let peer = Peer::unix(Fault::Slow(Duration::from_millis(10)));
        let options = options(&peer).downtime(Duration::from_millis(downtime_ms)).throttle(true);
        let options = options.timeout(Duration::from_secs(20));
        let outcome = moved(&mut vm, &machine, options);
        assert!(!log_of(&vm.log).iter().any(|step| step.starts_with("throttle")));
        outcome
    };
    let error = pinned(10).unwrap_err();
    let SendError::GivenUp(CancelReason::StandingPagesTooLong { bytes, .. }) = error else {
        panic!("{error}")
    };
    assert_eq!(bytes, 512 * PAGE);
    let sent = pinned(1000).unwrap();
    let [degradation] = &sent.progress.degradations[..] else { panic!("{:?}", sent.progress.degradations) };
    assert!(degradation.to_string().starts_with("Pages that pins reports stay pinned"), "{degradation}");
}

/// A VM of holes, but for one page.
fn hollow_vm() -> FakeVm {
    let memory = sparse_memory();
    memory.write_obj(7_u8, GuestAddress(page_gpa(PAGES - 1))).unwrap();
    FakeVm::with_memory(memory, 0)
}

#[test]
fn c67_a_vm_with_devices_has_its_receivers_memory_populated_or_all_of_it_sent() {
    let plain = br#"{"vm_config":{"memory":{}}}"#.as_slice();
    let asking = br#"{"vm_config":{"memory":{"prefault":true}}}"#.as_slice();
    let cases = [
        (PinningReceiver::Prefault, Populated::Receiver, asking),
        (PinningReceiver::SendAll, Populated::Sender, plain),
        (PinningReceiver::Unheeded, Populated::Nobody, plain),
    ];
    for (pinning_receiver, populated, config) in cases {
        let mut vm = hollow_vm();
        let machine = with_device(&vm, b"a state", |_| ());
        let peer = Peer::unix(Fault::None);
        let options = pinning(&peer, pinning_receiver);
        let sent = moved(&mut vm, &machine, options).unwrap();
        let (transcript, _) = peer.end();
        assert_eq!(transcript.of(CONFIG)[0].payload, config);
        assert_eq!(sent.populated, populated);
        let left_out = sent.progress.skipped_hole_bytes > 0;
        assert_eq!(left_out, populated != Populated::Sender, "{pinning_receiver:?}");
        assert_eq!(transcript.pages.len() as u64 == PAGES, !left_out);
    }
}

#[test]
fn c67_a_vm_without_devices_is_sent_as_it_is() {
    let mut vm = hollow_vm();
    let machine = vm.machine();
    let peer = Peer::unix(Fault::None);
    let sent = moved(&mut vm, &machine, options(&peer)).unwrap();
    assert_eq!(sent.populated, Populated::Nobody);
    assert_eq!(peer.end().0.of(CONFIG)[0].payload, br#"{"vm_config":{"memory":{}}}"#);
    assert!(sent.progress.skipped_hole_bytes > (PAGES - 80) * PAGE);
}

/// The log of a device whose state the VMM moves itself: nothing is written.
struct Quiet;

impl DirtySource for Quiet {
    fn id(&self) -> &str {
        "quiet"
    }

    fn reports(&self) -> Reports {
        Reports::Devices
    }

    fn cover(&self) -> Cover {
        let ranges = [LOW, HIGH].map(|(start, len)| GpaRange::new(start, len).unwrap());
        Cover { ranges: ranges.to_vec(), precise: true }
    }

    fn start(&mut self, _layout: &Layout, _iova: &IovaMap) -> Result<(), SourceError> {
        Ok(())
    }

    fn collect(&mut self, _sink: &mut Sink<'_>) -> Result<(), SourceError> {
        Ok(())
    }

    fn stop(&mut self) -> Result<(), SourceError> {
        Ok(())
    }
}

#[test]
fn c67_a_vm_whose_vmm_moves_its_devices_itself_has_devices_too() {
    for has_log in [true, false] {
        let mut vm = hollow_vm();
        let ram = || Quiet.cover().ranges;
        let net0 =
            move || DeviceMappings { device: "net0".to_owned(), gpa: if has_log { ram() } else { vec![] } };
        let mappings = move || VmMappings { ram: ram(), devices: vec![net0()], ..VmMappings::default() };
        let mut builder = vm.builder().mappings(mappings);
        if has_log {
            builder = builder.source_of(SpaceId::IDENTITY, ["net0"], Box::new(Quiet));
        }
        let machine = Machine::from(builder.build().unwrap());
        let peer = Peer::unix(Fault::None);
        let sent = moved(&mut vm, &machine, options(&peer)).unwrap();
        assert_eq!(sent.populated, Populated::Receiver);
        assert_eq!(peer.end().0.of(CONFIG)[0].payload, br#"{"vm_config":{"memory":{"prefault":true}}}"#);

        let mut vm = hollow_vm();
        let peer = Peer::unix(Fault::SlowState(Duration::from_millis(400)));
        let sent = moved(&mut vm, &machine, pinning(&peer, PinningReceiver::Unheeded)).unwrap();
        let told = sent.progress.degradations.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert!(told.iter().any(|text| text.contains("SendOptions::pinning_receiver")), "{told:?}");
    }
}

#[test]
fn c67_a_config_that_cannot_ask_has_all_pages_sent() {
    for config in [r#"{"vm_config":{"memory":{"hotplug_method":"VirtioMem"}}}"#, r#"{"of":"another VMM"}"#] {
        let mut vm = hollow_vm();
        vm.config = config;
        let machine = with_device(&vm, b"a state", |_| ());
        let peer = Peer::unix(Fault::None);
        let sent = moved(&mut vm, &machine, options(&peer)).unwrap();
        let (transcript, _) = peer.end();
        assert_eq!(transcript.of(CONFIG)[0].payload, config.as_bytes());
        assert_eq!((sent.populated, sent.progress.skipped_hole_bytes), (Populated::Sender, 0));
        assert_eq!(transcript.pages.len() as u64, PAGES);
    }
}

#[test]
fn c67_a_missed_downtime_is_a_degradation_that_says_why() {
    let reasons = [
        (PinningReceiver::Unheeded, "SendOptions::pinning_receiver"),
        (PinningReceiver::SendAll, "expected"),
    ];
    for (pinning_receiver, reason) in reasons {
        let mut vm = hollow_vm();
        let machine = with_device(&vm, b"a state", |_| ());
        let peer = Peer::unix(Fault::SlowState(Duration::from_millis(400)));
        let sent = moved(&mut vm, &machine, pinning(&peer, pinning_receiver)).unwrap();
        let [degradation] = &sent.progress.degradations[..] else {
            panic!("{:?}", sent.progress.degradations)
        };
        let text = degradation.to_string();
        assert!(text.contains("and 300 ms were allowed") && text.contains(reason), "{text}");
        assert!(sent.downtime_exceeded);
    }
}

#[test]
fn what_the_receiver_takes_is_let_go_before_state_and_taken_back_on_a_failure() {
    for (fault, tail) in [
        (Fault::None, ["state", "release"].as_slice()),
        (Fault::Refuse(STATE), &["state", "release", "reclaim", "resume"]),
        (Fault::Refuse(COMPLETE), &["state", "release", "reclaim", "resume"]),
    ] {
        let mut vm = FakeVm::new(0);
        vm.locks = true;
        let machine = vm.machine();
        let _outcome = moved(&mut vm, &machine, options(&Peer::unix(fault)));
        let log = log_of(&vm.log);
        assert_eq!(log[1..], *tail, "{log:?}");
    }
    let mut vm = FakeVm::new(0);
    (vm.locks, vm.fail_state) = (true, true);
    let machine = vm.machine();
    moved(&mut vm, &machine, options(&Peer::unix(Fault::None))).unwrap_err();
    assert_eq!(log_of(&vm.log), ["pause", "state", "resume"], "nothing was let go");
}

#[test]
fn a_vm_that_was_paused_has_its_locks_back_and_stays_paused() {
    let mut vm = FakeVm::new(0);
    vm.locks = true;
    vfio_migration::vm::Vm::pause(&mut vm).unwrap();
    let machine = vm.machine();
    let peer = Peer::unix(Fault::Refuse(STATE));
    let options = options(&peer).complete_paused(true);
    moved(&mut vm, &machine, options).unwrap_err();
    assert_eq!(log_of(&vm.log).last().map(String::as_str), Some("reclaim"));
    assert!(!vm.is_running());
}
