// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Devices that are reset: by something else, to make them run again, and after a refused state.

use super::*;

#[test]
fn c30_a_device_reset_in_precopy_is_noticed_and_its_whole_state_follows_later() {
    let (mut set, world) = set(vec![script(ALL), script(ALL)]);
    set.start_precopy().unwrap();
    set.precopy_step(u64::MAX).unwrap();
    fail_at_next_call(&world, Effect::IsReset);
    let lost = set.precopy_step(u64::MAX).unwrap_err();
    assert_eq!(
        chain(&lost),
        "Cannot read state of running device \"dev0\": Device left its data session for RUNNING unasked"
    );
    assert_eq!(states(&world), [Running, PreCopy]);
    set.precopy_step(u64::MAX).unwrap();
    set.stop_for_copy().unwrap();
    assert_eq!(streams(&set.save().unwrap()), [script(ALL).stream(), script(ALL).stream()]);
    assert_eq!(set.precopy_bytes(), 24);
}

#[test]
fn c30_a_device_reset_while_a_state_is_loaded_into_it_is_noticed() {
    let (mut source, _) = set(vec![script(P2P)]);
    let tree = migrate(&mut source).unwrap();
    let mut noticed = 0;
    for call in 0.. {
        let (mut set, world) = set(vec![script(P2P)]);
        world.lock().unwrap().fault = Some((call, Effect::IsReset));
        let outcome = set.load(&tree).and_then(|()| set.run());
        let world = world.lock().unwrap();
        if world.calls <= call {
            break;
        }
        // A reset after the last move is one of a running device.
        let last = world.calls == call + 1;
        assert!(outcome.is_err() || last || world.devices[0].loaded.is_some(), "reset at call {call}");
        noticed += usize::from(outcome.is_err());
    }
    assert!(noticed > 3, "{noticed}");
}

#[test]
fn c31_a_broken_device_is_reset_and_named() {
    let (mut set, world) = set(vec![script(ALL), script(ALL)]);
    migrate(&mut set).unwrap();
    world.lock().unwrap().devices[1].state = DeviceState::Error;
    let error = set.abort_to_running().unwrap_err();
    assert_eq!(chain(&error), "Cannot run device \"dev1\": Device was reset, its state is lost");
    assert_eq!(states(&world), [Running; 2]);
    assert_eq!(set.drain_resets(), ["dev1"]);
    assert!(set.drain_resets().is_empty());
}

#[test]
fn c60_a_device_that_ignores_its_reset_is_not_said_to_run() {
    let (mut set, world) = set(vec![script(ALL)]);
    world.lock().unwrap().devices[0].state = DeviceState::Error;
    world.lock().unwrap().devices[0].ignores_reset = true;
    let error = set.abort_to_running().unwrap_err();
    assert_eq!(chain(&error), "Cannot run device \"dev0\": Device is in ERROR after a reset");
}

#[test]
fn c31_a_device_that_fails_once_is_not_reset() {
    for effect in [Effect::Fails, Effect::FailsHalfway] {
        for call in 0..12 {
            let (mut set, world) = set(vec![script(ALL), script(ALL)]);
            migrate(&mut set).unwrap();
            {
                let mut world = world.lock().unwrap();
                world.fault = Some((world.calls + call, effect));
            }
            set.run().unwrap();
            assert_eq!(states(&world), [Running; 2]);
            assert!(set.drain_resets().is_empty());
        }
    }
}

#[test]
fn c32_a_refused_state_ends_in_a_reset_and_the_next_may_be_taken() {
    let (mut source, _) = set(vec![script(P2P), script(P2P)]);
    let good = migrate(&mut source).unwrap();
    let (mut set, world) = set(vec![script(P2P), script(P2P)]);
    world.lock().unwrap().devices[1].expects = Some(b"another".to_vec());
    let refused = chain(&set.load(&good).unwrap_err());
    assert!(
        refused.starts_with("Cannot load state of device \"dev1\": Device cannot move to STOP"),
        "{refused}"
    );
    assert_eq!(states(&world), [Running; 2]);
    assert_eq!(set.drain_resets(), ["dev0", "dev1"]);
    world.lock().unwrap().devices[1].expects = None;
    set.load(&good).unwrap();
    assert_eq!(states(&world), [Stop; 2]);
    set.run().unwrap();
}
