// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A fault at every call, over all capabilities of devices: none loses a state, and none leaves a device stopped.

use super::*;

fn capability_sets() -> impl Strategy<Value = Vec<Script>> {
    let bytes = || prop::collection::vec(any::<u8>(), 0..40);
    let turn = prop_oneof![3 => bytes().prop_map(Turn::Bytes), 1 => Just(Turn::Pause)];
    let one =
        (any::<bool>(), any::<bool>(), prop::collection::vec(turn, 0..6), bytes(), 1..50usize, any::<bool>());
    let one = one.prop_map(|(p2p, pre_copy, turns, rest, segment, tells)| Script {
        capabilities: Capabilities { p2p, pre_copy },
        turns,
        rest,
        segment,
        tells,
    });
    prop::collection::vec(one, 1..4)
}

fn effects() -> impl Strategy<Value = Effect> {
    prop::sample::select(vec![Effect::Fails, Effect::FailsHalfway, Effect::Breaks, Effect::IsReset])
}

/// What every device of `scripts` has to say.
fn whole(scripts: &[Script]) -> Vec<Vec<u8>> {
    scripts.iter().map(Script::stream).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn c39_after_any_single_fault_the_source_runs_on_and_a_second_attempt_is_whole(
        scripts in capability_sets(), call in 0..150usize, effect in effects(), plain_pause in any::<bool>(),
    ) {
        let (mut set, world) = set(scripts.clone());
        world.lock().unwrap().fault = Some((call, effect));
        let outcome = if plain_pause { set.stop().and_then(|()| set.save()) } else { migrate(&mut set) };
        match &outcome {
            Ok(tree) => prop_assert_eq!(streams(tree), whole(&scripts)),
            Err(DeviceSetError::Device { attempt: Attempt::Save, .. }) => {}
            // An estimate moves nothing: the abort that follows resets the device.
            Err(DeviceSetError::Device { attempt: Attempt::Estimate, .. }) => prop_assert_eq!(effect, Effect::Breaks),
            // Not even asked to, everything runs again.
            Err(error) => prop_assert!(states(&world).iter().all(|state| state.is_running()), "{error}: {:?}", states(&world)),
        }
        let aborted = set.abort_to_running();
        prop_assert_eq!(states(&world), vec![Running; scripts.len()]);
        if aborted.is_err() {
            prop_assert!(effect == Effect::Breaks && set.drain_resets().len() == 1);
        }
        let again = migrate(&mut set);
        // The fault may have been due only now.
        if let Ok(tree) = again {
            prop_assert_eq!(streams(&tree), whole(&scripts));
        }
        let world = world.lock().unwrap();
        prop_assert!(world.violations.is_empty(), "{:?}", world.violations);
    }

    #[test]
    fn c39_after_any_single_fault_in_a_resume_the_source_runs(
        scripts in capability_sets(), call in 0..40usize, effect in effects(),
    ) {
        let (mut set, world) = set(scripts.clone());
        migrate(&mut set).unwrap();
        {
            let mut world = world.lock().unwrap();
            world.fault = Some((world.calls + call, effect));
        }
        let outcome = set.run();
        prop_assert_eq!(states(&world), vec![Running; scripts.len()]);
        prop_assert_eq!(outcome.is_err(), !set.drain_resets().is_empty());
        let world = world.lock().unwrap();
        prop_assert!(world.violations.is_empty(), "{:?}", world.violations);
    }

    #[test]
    fn what_was_saved_is_loaded_byte_for_byte_whatever_the_segmentation(
        scripts in capability_sets(), segment in 1..50usize,
    ) {
        let (mut source, _) = set(scripts.clone());
        let tree = migrate(&mut source).unwrap();
        let (mut target, world) = set(scripts.iter().map(|s| Script { segment, ..s.clone() }).collect());
        target.load(&tree).unwrap();
        prop_assert_eq!(states(&world), vec![Stop; scripts.len()]);
        target.run().unwrap();
        prop_assert_eq!(states(&world), vec![Running; scripts.len()]);
        let world = world.lock().unwrap();
        let loaded: Vec<_> = world.devices.iter().map(|device| device.loaded.clone().unwrap()).collect();
        prop_assert_eq!(loaded, whole(&scripts));
        prop_assert!(world.violations.is_empty(), "{:?}", world.violations);
    }

    #[test]
    fn c32_after_any_single_fault_the_target_runs_with_all_that_was_saved_or_not_at_all(
        scripts in capability_sets(), call in 0..80usize, effect in effects(),
    ) {
        let (mut source, _) = set(scripts.clone());
        let tree = migrate(&mut source).unwrap();
        let (mut target, world) = set(scripts.clone());
        world.lock().unwrap().fault = Some((call, effect));
        if target.load(&tree).is_err() {
            prop_assert!(!states(&world).contains(&Resuming));
            target.load(&tree).unwrap();
        }
        if target.run().is_err() {
            let runs = |device: &fake::Inside| device.state.is_running() && !device.excused;
            prop_assert!(!world.lock().unwrap().devices.iter().any(runs), "{:?}", states(&world));
            let kept = effect != Effect::Breaks && effect != Effect::IsReset;
            prop_assert_eq!(target.run().is_ok(), kept);
            if !kept {
                target.load(&tree).unwrap();
                target.run().unwrap();
            }
        }
        prop_assert_eq!(states(&world), vec![Running; scripts.len()]);
        let world = world.lock().unwrap();
        for (device, stream) in world.devices.iter().zip(whole(&scripts)) {
            prop_assert!(device.loaded.as_ref() == Some(&stream) || device.excused);
        }
        prop_assert!(world.violations.is_empty(), "{:?}", world.violations);
    }
}
