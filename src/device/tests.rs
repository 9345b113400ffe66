// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Device sets against scripted devices, with a fault at any call.

use std::error::Error;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use vm_migration::Snapshot;

use super::saved::SavedState;
use super::*;
use DeviceState::{PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};

mod estimates;
mod fake;
mod faults;
mod resets;
#[cfg(feature = "transfer")]
mod streams;

pub(crate) use fake::{Effect, World};
use fake::{Script, Turn, devices, interface};

pub(crate) const ALL: Capabilities = Capabilities { p2p: true, pre_copy: true };
const P2P: Capabilities = Capabilities { p2p: true, pre_copy: false };
const PLAIN: Capabilities = Capabilities { p2p: false, pre_copy: false };

pub(crate) fn script(capabilities: Capabilities) -> Script {
    Script {
        capabilities,
        turns: vec![Turn::Bytes(vec![1; 24]), Turn::Pause, Turn::Bytes(vec![2; 8])],
        rest: vec![3; 36],
        segment: 7,
        tells: true,
    }
}

/// The kernel's sample serial device: 24 bytes in PRE_COPY, then 36 in STOP_COPY.
fn mtty() -> Script {
    Script {
        turns: vec![Turn::Bytes(vec![0xaa; 24])],
        rest: vec![0xbb; 36],
        segment: usize::MAX,
        ..script(ALL)
    }
}

/// A set of scripted devices, of which those that cannot be P2P-quiescent map only RAM.
pub(crate) fn set(scripts: Vec<Script>) -> (DeviceSet, Arc<Mutex<World>>) {
    let (devices, world) = devices(scripts);
    let declare = |device: Device| if device.capabilities().p2p { device } else { device.maps_only_ram() };
    (DeviceSet::new(devices.into_iter().map(declare).collect()).unwrap(), world)
}

pub(crate) fn states(world: &Mutex<World>) -> Vec<DeviceState> {
    world.lock().unwrap().states()
}

pub(crate) fn fail_at_next_call(world: &Mutex<World>, effect: Effect) {
    let mut world = world.lock().unwrap();
    world.fault = Some((world.calls, effect));
}

/// The error and all its sources, as a user sees them.
fn chain(error: &dyn Error) -> String {
    crate::error::Chain(error).to_string()
}

/// The stream of each device of a saved tree.
fn streams(tree: &Snapshot) -> Vec<Vec<u8>> {
    tree.snapshots.values().map(|node| SavedState::from_snapshot(node).unwrap().stream).collect()
}

/// A whole migration on the source, up to its saved state.
fn migrate(set: &mut DeviceSet) -> Result<Snapshot, DeviceSetError> {
    set.start_precopy()?;
    for _ in 0..3 {
        set.precopy_step(20)?;
        set.estimate()?;
    }
    set.stop_for_copy()?;
    set.save()
}

#[test]
fn an_empty_set_does_nothing_and_succeeds() {
    let mut set = DeviceSet::default();
    let tree = migrate(&mut set).unwrap();
    assert!(set.is_empty() && tree.snapshots.is_empty());
    assert_eq!(set.estimate().unwrap(), Estimate::NOTHING);
    set.load(&tree).unwrap();
    set.run().unwrap();
}

#[test]
fn c05_all_are_quiescent_before_any_is_stopped_and_reversed_on_resume() {
    let (mut set, world) = set(vec![script(P2P), script(P2P)]);
    set.stop().unwrap();
    set.run().unwrap();
    let log = std::mem::take(&mut world.lock().unwrap().log);
    let expected = [
        (0, RunningP2p),
        (1, RunningP2p),
        (0, Stop),
        (1, Stop),
        (0, RunningP2p),
        (1, RunningP2p),
        (0, Running),
        (1, Running),
    ];
    assert_eq!(log, expected);
}

#[test]
fn c05_the_order_check_of_these_tests_notices_a_wrong_order() {
    let (mut devices, world) = devices(vec![script(P2P), script(P2P)]);
    devices[0].go(Stop).unwrap();
    assert!(!world.lock().unwrap().violations.is_empty());
}

#[test]
fn c06_several_devices_without_p2p_are_refused_unless_they_map_only_ram() {
    let two = || devices(vec![script(PLAIN), script(PLAIN)]).0;
    let refused = DeviceSet::new(two()).unwrap_err();
    assert!(matches!(&refused, DeviceSetError::PeerToPeer { name } if name == "dev0"), "{refused}");
    assert!(DeviceSet::new(two().into_iter().map(Device::maps_only_ram).collect()).is_ok());
    assert!(DeviceSet::new(devices(vec![script(PLAIN)]).0).is_ok());
    assert!(DeviceSet::new(devices(vec![script(P2P), script(ALL)]).0).is_ok());
}

#[test]
fn names_are_unique_and_fit_the_saved_state() {
    let named =
        |name: &str, kind: &str| Device::new(name, interface(script(P2P), &Arc::default())).kind(kind);
    let twice = DeviceSet::new(vec![named("a", "x"), named("a", "y")]);
    assert!(matches!(twice, Err(DeviceSetError::DuplicateName { name }) if name == "a"));
    let long = "n".repeat(saved::NAME_LIMIT_BYTES + 1);
    for (name, kind) in [("", "x"), (&*long, "x"), ("a", &*long)] {
        assert!(matches!(DeviceSet::new(vec![named(name, kind)]), Err(DeviceSetError::Name { .. })));
    }
}

#[test]
fn c29_a_pause_is_not_the_end_and_precopy_bytes_stay_in_front() {
    let (mut set, world) = set(vec![mtty()]);
    set.start_precopy().unwrap();
    assert_eq!(set.precopy_step(u64::MAX).unwrap(), PrecopyStep { bytes: 24, drained: true });
    assert_eq!(set.precopy_step(u64::MAX).unwrap(), PrecopyStep { bytes: 0, drained: true });
    set.stop_for_copy().unwrap();
    let tree = set.save().unwrap();
    assert_eq!(streams(&tree), [[[0xaa; 24].as_slice(), &[0xbb; 36]].concat()]);
    assert_eq!((set.precopy_bytes(), set.state_bytes()), (24, 60));
    let log = world.lock().unwrap().log.clone();
    assert_eq!(log, [(0, PreCopy), (0, PreCopyP2p), (0, StopCopy)]);
}

#[test]
fn c29_a_device_that_never_entered_precopy_hands_over_all_at_once() {
    let (mut set, _) = set(vec![mtty()]);
    set.stop().unwrap();
    assert_eq!(streams(&set.save().unwrap())[0].len(), 60);
    assert_eq!((set.precopy_bytes(), set.state_bytes()), (0, 60));
}

#[test]
fn a_budget_is_shared_and_never_exceeded() {
    let (mut set, _) = set(vec![script(ALL), script(P2P), script(ALL)]);
    set.start_precopy().unwrap();
    assert_eq!(set.precopy_step(20).unwrap(), PrecopyStep { bytes: 20, drained: false });
    assert_eq!(set.precopy_step(0).unwrap(), PrecopyStep { bytes: 0, drained: false });
    assert_eq!(set.precopy_step(1000).unwrap(), PrecopyStep { bytes: 28, drained: true });
    assert_eq!(set.precopy_step(1000).unwrap(), PrecopyStep { bytes: 0, drained: true });
}

#[test]
fn saving_twice_gives_the_same_and_saving_a_running_device_is_refused() {
    let (mut set, world) = set(vec![script(ALL), script(PLAIN)]);
    let refused = set.save().err().unwrap();
    assert_eq!(
        chain(&refused),
        "Cannot save state of device \"dev0\": Device is in RUNNING and was not stopped"
    );
    assert_eq!(states(&world), [Running; 2]);
    set.start_precopy().unwrap();
    set.stop_for_copy().unwrap();
    assert_eq!(set.precopy_step(100).unwrap(), PrecopyStep { bytes: 0, drained: true });
    let once = set.save().unwrap();
    assert_eq!(streams(&once), streams(&set.save().unwrap()));
}

#[test]
fn a_nested_state_is_loaded_as_a_flat_one_is() {
    let (flat, _) = set(vec![script(ALL), script(P2P)]);
    let mut nested = flat.nesting(Nesting::Common);
    let tree = migrate(&mut nested).unwrap();
    assert!(tree.snapshots["dev0"].snapshots["vfio_common"].snapshots.contains_key("vfio_migration"));
    let (mut target, world) = set(vec![script(ALL), script(P2P)]);
    target.load(&tree).unwrap();
    assert_eq!(world.lock().unwrap().devices[1].loaded, Some(script(P2P).stream()));
    let (mut one, _) = set(vec![script(P2P)]);
    assert!(matches!(one.load(&tree), Err(DeviceSetError::Unclaimed { name }) if name == "dev1"));
}

#[test]
fn c33_stop_copy_is_left_only_on_retire_or_run() {
    let (mut set, world) = set(vec![script(ALL), script(P2P)]);
    migrate(&mut set).unwrap();
    assert_eq!(states(&world), [StopCopy; 2]);
    set.retire().unwrap();
    assert_eq!(states(&world), [Stop; 2]);
    assert_eq!(set.state_bytes(), 2 * 68);
    set.run().unwrap();
    assert_eq!(states(&world), [Running; 2]);
}

#[test]
fn c33_all_devices_are_retired_whichever_cannot_be() {
    let (mut set, world) = set(vec![script(ALL), script(P2P), script(P2P)]);
    migrate(&mut set).unwrap();
    fail_at_next_call(&world, Effect::Fails);
    let failed = set.retire().unwrap_err();
    assert!(matches!(&failed, DeviceSetError::Device { name, .. } if name == "dev0"), "{failed}");
    assert_eq!(states(&world)[1..], [Stop; 2]);
}

#[test]
fn c28_a_size_that_cannot_be_had_is_huge_and_one_that_cannot_be_asked_is_guessed() {
    let (mut set, world) = set(vec![script(ALL), Script { tells: false, ..script(ALL) }]);
    let guessed = |state_bytes, known_bytes, stop_copy_bytes| Estimate {
        state_bytes,
        known_bytes,
        stop_copy_bytes,
        initial_bytes: 0,
        early_bytes: 0,
        basis: Basis::Guessed,
    };
    let unasked = 68 + UNASKABLE_STATE_BYTES;
    assert_eq!(set.estimate().unwrap(), guessed(unasked, 68, unasked));
    set.start_precopy().unwrap();
    set.precopy_step(u64::MAX).unwrap();
    // Both have handed over 24 bytes; the second is taken to do so again.
    assert_eq!(set.estimate().unwrap(), guessed(68 + 48, 68 + 24, 44 + 24));
    set.precopy_step(u64::MAX).unwrap();
    assert_eq!(set.estimate().unwrap(), guessed(68 + 40, 68 + 32, 44 + 8));
    fail_at_next_call(&world, Effect::Fails);
    assert_eq!(set.estimate().unwrap().stop_copy_bytes, UNKNOWN_STATE_BYTES + 8);
    assert_eq!(set.estimate().unwrap(), guessed(68 + 40, 68 + 32, 44 + 8));
    set.stop_for_copy().unwrap();
    set.save().unwrap();
    assert_eq!(
        set.estimate().unwrap(),
        Estimate { state_bytes: 2 * 68, known_bytes: 2 * 68, ..Estimate::NOTHING }
    );
    set.run().unwrap();
    assert_eq!(set.estimate().unwrap(), guessed(2 * 68, 68, 2 * 68));
}

#[test]
fn c37_a_device_that_tells_no_sizes_has_initial_bytes_left_until_it_paused_once() {
    let (mut set, _) = set(vec![Script { tells: false, ..script(ALL) }]);
    assert_eq!(set.estimate().unwrap().initial_bytes, 0, "outside PRE_COPY");
    set.start_precopy().unwrap();
    assert_eq!(set.estimate().unwrap().initial_bytes, 1);
    assert!(!set.precopy_step(1).unwrap().drained);
    assert_eq!(set.estimate().unwrap().initial_bytes, 1);
    assert!(set.precopy_step(u64::MAX).unwrap().drained);
    assert_eq!(set.estimate().unwrap().initial_bytes, 0);
}

#[test]
fn c28_a_failing_size_query_keeps_no_downtime_promise() {
    for calls_before in 0..3 {
        let (mut set, world) = set(vec![script(ALL)]);
        set.start_precopy().unwrap();
        {
            let mut world = world.lock().unwrap();
            world.fault = Some((world.calls + calls_before, Effect::Fails));
        }
        let estimate = set.estimate().unwrap();
        assert_eq!((estimate.stop_copy_bytes, estimate.basis), (UNKNOWN_STATE_BYTES, Basis::Unknown));
    }
}

#[test]
fn c37_initial_bytes_that_grow_again_are_reported_again() {
    let (mut set, world) = set(vec![script(ALL)]);
    set.start_precopy().unwrap();
    assert_eq!(set.estimate().unwrap().initial_bytes, 24);
    set.precopy_step(24).unwrap();
    assert_eq!(set.estimate().unwrap().initial_bytes, 0);
    world.lock().unwrap().devices[0].left = vec![Turn::Bytes(vec![2; 8])];
    assert_eq!(set.estimate().unwrap().initial_bytes, 0, "asking has side effects");
    assert_eq!(set.estimate_anew().unwrap().initial_bytes, 8);
    assert_eq!(set.precopy_step(u64::MAX).unwrap(), PrecopyStep { bytes: 8, drained: true });
}

#[test]
fn c38_the_switchover_asks_once_more_when_all_are_quiescent() {
    let (mut set, _) = set(vec![script(ALL), script(P2P)]);
    set.start_precopy().unwrap();
    set.precopy_step(u64::MAX).unwrap();
    set.precopy_step(u64::MAX).unwrap();
    let last = set.stop_for_copy().unwrap();
    let expected = Estimate {
        state_bytes: 2 * 68,
        known_bytes: 2 * 68,
        stop_copy_bytes: 44 + 68,
        initial_bytes: 0,
        early_bytes: 0,
        basis: Basis::Told,
    };
    assert_eq!(last, expected);
}

#[test]
fn c39_a_failed_stop_leaves_a_paused_vm_paused_and_a_running_one_running() {
    let (mut set, world) = set(vec![script(P2P), script(P2P)]);
    set.stop().unwrap();
    {
        let mut world = world.lock().unwrap();
        // Two questions on the way to quiescence, four for the estimate, one before the first move.
        world.fault = Some((world.calls + 7, Effect::Fails));
    }
    assert!(set.stop_for_copy().is_err());
    assert_eq!(states(&world), [Stop; 2]);
    set.run().unwrap();
    {
        let mut world = world.lock().unwrap();
        world.fault = Some((world.calls + 9, Effect::Fails));
    }
    assert!(set.stop().is_err());
    assert_eq!(states(&world), [Running; 2]);
}

#[test]
fn a_paused_vm_skips_precopy() {
    let (mut set, world) = set(vec![script(ALL)]);
    set.stop().unwrap();
    set.start_precopy().unwrap();
    assert_eq!(states(&world), [Stop]);
    assert_eq!(set.precopy_step(100).unwrap(), PrecopyStep { bytes: 0, drained: true });
}

#[test]
fn a_snapshot_with_too_few_or_too_many_devices_is_refused_untouched() {
    let (mut one, _) = set(vec![script(P2P)]);
    let (mut two, _) = set(vec![script(P2P), script(P2P)]);
    let (of_one, mut of_two) = (migrate(&mut one).unwrap(), migrate(&mut two).unwrap());
    let (mut one, world) = set(vec![script(P2P)]);
    assert!(matches!(one.load(&of_two), Err(DeviceSetError::Unclaimed { name }) if name == "dev1"));
    let (mut two, _) = set(vec![script(P2P), script(P2P)]);
    assert!(matches!(two.load(&of_one), Err(DeviceSetError::Missing { name }) if name == "dev1"));
    // A node without a device's state is somebody else's.
    of_two.snapshots.get_mut("dev1").unwrap().snapshots.clear();
    assert!(matches!(two.load(&of_two), Err(DeviceSetError::Missing { name }) if name == "dev1"));
    assert_eq!(world.lock().unwrap().calls, 0);
    one.load(&of_two).unwrap();
}

#[test]
fn a_state_of_another_device_is_refused_with_both_names() {
    let (mut source, _) = set(vec![script(P2P)]);
    let mut tree = migrate(&mut source).unwrap();
    let node = tree.snapshots.remove("dev0").unwrap();
    tree.add_snapshot("net1".to_owned(), node);
    let world = Arc::default();
    let mut set =
        DeviceSet::new(vec![Device::new("net1", interface(script(P2P), &world)).kind("nic")]).unwrap();
    let refused = chain(&set.load(&tree).unwrap_err());
    assert_eq!(
        refused,
        "Cannot load state of device \"net1\": Saved state is of device \"dev0\" of kind \"fake\", \
         not of device \"net1\" of kind \"nic\""
    );
    assert_eq!(states(&world), [Running]);
}

#[test]
fn states_are_shown_as_the_uapi_names_them() {
    let shown: Vec<_> = DeviceState::ALL.iter().map(ToString::to_string).collect();
    let uapi = "ERROR STOP RUNNING STOP_COPY RESUMING RUNNING_P2P PRE_COPY PRE_COPY_P2P";
    assert_eq!(shown.join(" "), uapi);
}
