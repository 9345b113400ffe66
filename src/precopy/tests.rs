// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use proptest::prelude::*;

use super::*;

fn policies() -> impl Strategy<Value = Policy> {
    let strategy = prop_oneof![Just(TimeoutStrategy::Cancel), Just(TimeoutStrategy::Ignore)];
    let cap = prop::option::of(0..40u32);
    (0..2000u64, 0..100_000u64, strategy, cap, any::<bool>()).prop_map(
        |(downtime_ms, timeout_ms, timeout_strategy, max_rounds, can_throttle)| Policy {
            downtime: Duration::from_millis(downtime_ms),
            timeout: Duration::from_millis(timeout_ms),
            timeout_strategy,
            max_rounds,
            can_throttle,
        },
    )
}

fn any_or_small() -> impl Strategy<Value = u64> {
    prop_oneof![Just(0), 0..1u64 << 32, any::<u64>()]
}

fn observations() -> impl Strategy<Value = Observation> {
    let device = prop_oneof![
        any_or_small().prop_map(DeviceLeft::Exact),
        any_or_small().prop_map(DeviceLeft::Estimate),
        Just(DeviceLeft::Unknown),
    ];
    let initial = prop_oneof![Just(0), any::<u64>()];
    let bytes = (
        any_or_small(),
        any_or_small(),
        any_or_small(),
        any_or_small(),
        any_or_small(),
        any_or_small(),
        initial,
    );
    (bytes, device, 0..150_000u64, 0..50u32, 0..=100u8, 0..5u32).prop_map(
        |(
            (
                pending_bytes,
                standing,
                in_flight_bytes,
                bandwidth,
                dirty_rate,
                state_rate,
                device_initial_bytes,
            ),
            device,
            elapsed_ms,
            rounds,
            throttle_percent,
            back_outs,
        )| {
            Observation {
                pending_bytes,
                standing_bytes: standing.min(pending_bytes),
                in_flight_bytes,
                bandwidth,
                dirty_rate,
                device,
                state_rate,
                late_state_rate: state_rate / 2 * u64::from(back_outs % 2),
                device_initial_bytes,
                device_early_bytes: device_initial_bytes / 2,
                elapsed_ms,
                rounds,
                throttle_percent,
                back_outs,
            }
        },
    )
}

fn switches_over(decision: Decision) -> bool {
    matches!(decision, Decision::SwitchOver { .. })
}

fn goes_on(decision: Decision) -> bool {
    matches!(decision, Decision::Continue | Decision::ContinueThrottled(_))
}

proptest! {
    #[test]
    fn more_bandwidth_never_delays_a_switchover(policy in policies(), seen in observations(), more in any_or_small()) {
        let faster = Observation { bandwidth: seen.bandwidth.saturating_add(more), ..seen };
        prop_assume!(policy.hopeless(&seen).is_none(), "which is no longer so when more rounds gain something");
        prop_assert!(!switches_over(policy.decide(&seen)) || switches_over(policy.decide(&faster)));
        prop_assert!(!switches_over(policy.confirm(&seen)) || switches_over(policy.confirm(&faster)));
    }

    #[test]
    fn fewer_bytes_never_delay_a_switchover(policy in policies(), seen in observations(), fewer in any_or_small()) {
        let pending_bytes = seen.pending_bytes.saturating_sub(fewer);
        let standing_bytes = seen.standing_bytes.min(pending_bytes);
        let lighter = Observation { pending_bytes, standing_bytes, ..seen };
        prop_assume!(policy.hopeless(&seen).is_none(), "which is no longer so when more rounds gain something");
        prop_assert!(!switches_over(policy.decide(&seen)) || switches_over(policy.decide(&lighter)));
    }

    #[test]
    fn an_estimate_above_the_limit_switches_over_only_when_told_to_ignore_it(policy in policies(), seen in observations()) {
        let within = seen.expected_downtime_ms().is_some_and(|ms| ms <= policy.downtime_ms());
        let given = policy.exhausted(&seen).or_else(|| policy.hopeless(&seen));
        let told = policy.timeout_strategy == TimeoutStrategy::Ignore && given.is_some();
        prop_assert!(!switches_over(policy.decide(&seen)) || within || told);
    }

    #[test]
    fn initial_bytes_are_waited_for(policy in policies(), seen in observations()) {
        // C37
        let early = Observation { device_initial_bytes: 1, ..seen };
        prop_assert!(policy.exhausted(&early).is_some() || !switches_over(policy.decide(&early)));
    }

    #[test]
    fn a_stopped_vm_goes_on_only_within_twice_the_limit_unless_told(policy in policies(), seen in observations()) {
        let bearable = seen.expected_downtime_ms().is_some_and(|ms| ms <= policy.downtime_ms() * 2);
        prop_assert!(!bearable || switches_over(policy.confirm(&seen)));
        if policy.timeout_strategy == TimeoutStrategy::Cancel {
            prop_assert_eq!(bearable, switches_over(policy.confirm(&seen)));
        }
    }

    #[test]
    fn the_timeout_and_the_round_cap_always_end_precopy(policy in policies(), seen in observations()) {
        let late = Observation { elapsed_ms: millis(policy.timeout), ..seen };
        prop_assert!(!goes_on(policy.decide(&late)) && !goes_on(policy.confirm(&late)));
        if let Some(rounds) = policy.max_rounds {
            let capped = Observation { rounds, ..seen };
            prop_assert!(!goes_on(policy.decide(&capped)) && !goes_on(policy.confirm(&capped)));
        }
        if policy.timeout_strategy == TimeoutStrategy::Ignore {
            prop_assert!(switches_over(policy.decide(&late)), "ignore never cancels");
        }
    }

    #[test]
    fn back_outs_are_bounded(policy in policies(), seen in observations()) {
        let last = Observation { back_outs: Policy::MAX_BACK_OUTS, ..seen };
        prop_assert!(!goes_on(policy.confirm(&last)));
    }

    #[test]
    fn an_unknown_device_size_counts_as_huge(policy in policies(), seen in observations()) {
        // C28
        let blind = Observation { device: DeviceLeft::Unknown, ..seen };
        prop_assert_eq!(blind.expected_downtime_ms(), None);
        prop_assert!(policy.exhausted(&blind).is_some() || !switches_over(policy.decide(&blind)));
    }

    #[test]
    fn no_bandwidth_divides_nothing(policy in policies(), seen in observations()) {
        let silent = Observation { bandwidth: 0, ..seen };
        let nothing = silent.pending_bytes == 0 && silent.in_flight_bytes == 0 && silent.device.bytes() == Some(0);
        prop_assert_eq!(silent.expected_downtime_ms(), nothing.then_some(0));
        prop_assert!(!matches!(policy.decide(&silent), Decision::ContinueThrottled(_)));
        prop_assert_eq!(Forecast::new(&policy, &silent, &[], "net0"), Forecast::Unmeasured);
    }

    #[test]
    fn throttling_only_tightens_and_only_where_allowed(policy in policies(), seen in observations()) {
        if let Decision::ContinueThrottled(percent) = policy.decide(&seen) {
            prop_assert!(policy.can_throttle && percent > seen.throttle_percent && percent <= 99);
            prop_assert!(seen.dirty_rate > seen.bandwidth / 2);
        }
    }

    #[test]
    fn forecasts_never_fail(policy in policies(), seen in observations(), rates in prop::collection::vec((any_or_small(), any_or_small()), 0..4)) {
        let sources: Vec<_> = rates
            .iter()
            .map(|&(dirty_rate, exclusive_dirty_rate)| SourceRate { id: "a", dirty_rate, exclusive_dirty_rate, standing_bytes: 0 })
            .collect();
        prop_assert!(!Forecast::new(&policy, &seen, &sources, "net0").to_string().is_empty());
    }
}

const GIB: u64 = 1 << 30;

fn losing() -> Observation {
    Observation {
        pending_bytes: 4 * GIB,
        bandwidth: GIB,
        dirty_rate: 2 * GIB,
        rounds: 2,
        ..Observation::default()
    }
}

#[test]
fn throttling_starts_at_twenty_and_ends_at_ninety_nine() {
    let policy = Policy { can_throttle: true, ..Policy::default() };
    let mut seen = losing();
    let mut steps = Vec::new();
    while let Decision::ContinueThrottled(percent) = policy.decide(&seen) {
        steps.push(percent);
        seen.throttle_percent = percent;
    }
    assert_eq!(steps, [20, 30, 40, 50, 60, 70, 80, 90, 99]);
    assert_eq!(policy.decide(&seen), Decision::Continue);
}

#[test]
fn the_source_that_alone_keeps_it_from_converging_is_named() {
    let rate = |id, dirty_rate, exclusive_dirty_rate| SourceRate {
        id,
        dirty_rate,
        exclusive_dirty_rate,
        standing_bytes: 0,
    };
    let sources = [rate("kvm-log", GIB, GIB / 2), rate("device-log:net0", 3 * GIB / 2, 5 * GIB / 4)];
    let forecast = Forecast::new(&Policy::default(), &losing(), &sources, "net0");
    let Forecast::Stuck(Blame::Source { id, .. }) = &forecast else { panic!("{forecast}") };
    assert_eq!(id, "device-log:net0");
    assert_eq!(
        forecast.to_string(),
        "does not converge: device-log:net0 alone dirties 1.2 GiB/s, and 1.0 GiB/s can be sent"
    );
}

#[test]
fn sources_that_share_the_blame_are_named_together() {
    let one = SourceRate { id: "kvm-log", dirty_rate: 2 * GIB, exclusive_dirty_rate: 0, standing_bytes: 0 };
    let sources = [one; 2];
    let forecast = Forecast::new(&Policy::default(), &losing(), &sources, "net0");
    assert_eq!(forecast, Forecast::Stuck(Blame::Together { dirty_rate: 2 * GIB, bandwidth: GIB }));
}

#[test]
fn a_device_state_beyond_the_limit_is_to_blame_before_any_source() {
    let seen = Observation { device: DeviceLeft::Estimate(GIB), dirty_rate: 0, ..losing() };
    let forecast = Forecast::new(&Policy::default(), &seen, &[], "net0");
    assert!(matches!(forecast, Forecast::Stuck(Blame::DeviceState { bytes: GIB, .. })), "{forecast}");
}

/// A device state that takes 447 ms, with little else left.
fn heavy() -> Observation {
    Observation {
        pending_bytes: 1 << 20,
        bandwidth: GIB,
        device: DeviceLeft::Exact(64 << 20),
        state_rate: 150_000_000,
        rounds: 2,
        ..Observation::default()
    }
}

#[test]
fn a_device_state_that_alone_exceeds_the_limit_ends_precopy_before_the_timeout() {
    let cancel = Policy::default();
    let Decision::Cancel { reason } = cancel.decide(&heavy()) else {
        panic!("{:?}", cancel.decide(&heavy()))
    };
    assert_eq!(
        reason.to_string(),
        "device state of 64.0 MiB takes about 448 ms, more than the downtime limit of 300 ms"
    );
    let ignore = Policy { timeout_strategy: TimeoutStrategy::Ignore, ..cancel };
    assert_eq!(ignore.decide(&heavy()), Decision::SwitchOver { expected_downtime_ms: Some(449) });
    let tight = Policy { downtime: Duration::from_millis(100), ..ignore };
    assert!(switches_over(tight.confirm(&heavy())), "no back-out makes it less");
    for policy in [cancel, ignore] {
        let much = Observation { pending_bytes: GIB, ..heavy() };
        assert_eq!(policy.decide(&much), Decision::Continue, "rounds still gain something");
        let early = Observation { device_initial_bytes: 1, ..heavy() };
        assert_eq!(policy.decide(&early), Decision::Continue, "it may be read while the VM runs");
        let streams = Observation { device_early_bytes: 32 << 20, ..heavy() };
        assert_eq!(
            policy.decide(&streams),
            Decision::Continue,
            "half of it goes ahead, and the other half fits"
        );
        let forecast = Forecast::new(&policy, &streams, &[], "net0");
        assert_eq!(forecast, Forecast::AwaitsDevices { initial_bytes: 32 << 20 });
        let untold =
            Observation { device: DeviceLeft::Unknown, device_initial_bytes: UNTOLD_BYTES, ..heavy() };
        let forecast = Forecast::new(&policy, &untold, &[], "net0").to_string();
        assert_eq!(forecast, "waits for device state of a size that nobody tells to be read");
        let late = Observation { device_early_bytes: 8 << 20, ..heavy() };
        assert_ne!(policy.decide(&late), Decision::Continue, "what cannot go ahead does not fit");
    }
    let slow = Observation { bandwidth: 10 << 20, device: DeviceLeft::Exact(4 << 20), rounds: 1, ..heavy() };
    assert_eq!(cancel.decide(&slow), Decision::Continue, "a bandwidth of one round says little");
    assert!(matches!(cancel.decide(&Observation { rounds: 5, ..slow }), Decision::Cancel { .. }));
    let guessed = Observation { device: DeviceLeft::Estimate(64 << 20), ..heavy() };
    assert_eq!(cancel.decide(&guessed), Decision::Continue, "a first guess may be twice the state");
    assert!(matches!(cancel.decide(&Observation { rounds: 5, ..guessed }), Decision::Cancel { .. }));
    let forecast = Forecast::new(&cancel, &heavy(), &[], "net0");
    assert!(matches!(forecast, Forecast::Stuck(Blame::DeviceState { allowed_bytes: 45_000_000, .. })));
    assert!(forecast.to_string().contains("most of it of \"net0\""), "{forecast}");
}

#[test]
fn a_back_out_takes_nothing_from_the_time_for_device_state() {
    let seen = Observation { device: DeviceLeft::Exact(30_000_000), back_outs: 3, ..heavy() };
    assert_eq!(seen.state_ms(), Some(200));
    assert!(switches_over(Policy::default().decide(&seen)));
}

#[test]
fn a_converging_migration_tells_when() {
    let seen = Observation { pending_bytes: 2 * GIB, dirty_rate: GIB / 2, ..losing() };
    let policy = Policy { downtime: Duration::from_millis(1000), ..Policy::default() };
    assert_eq!(Forecast::new(&policy, &seen, &[], "net0"), Forecast::Converges { in_ms: 2000 });
}

#[test]
fn each_back_out_halves_the_aim() {
    let policy = Policy { downtime: Duration::from_millis(400), ..Policy::default() };
    let seen = Observation { pending_bytes: GIB / 4, bandwidth: GIB, back_outs: 0, ..losing() };
    assert!(switches_over(policy.decide(&seen)));
    assert_eq!(policy.decide(&Observation { back_outs: 1, ..seen }), Decision::Continue);
}

/// A device that keeps 400 MiB pinned, which take 400 ms, and little else that changes.
fn pinned() -> Observation {
    Observation {
        pending_bytes: 401 << 20,
        standing_bytes: 400 << 20,
        bandwidth: 1000 << 20,
        rounds: 5,
        ..Observation::default()
    }
}

#[test]
fn c54_pages_that_come_back_in_every_round_are_not_waited_for() {
    let cancel = Policy::default();
    let Decision::Cancel { reason } = cancel.decide(&pinned()) else { panic!("more rounds gain nothing") };
    assert_eq!(
        reason.to_string(),
        "400.0 MiB of pinned pages come back in every round and take about 400 ms with the device state, more than the \
         downtime limit of 300 ms"
    );
    let ignore = Policy { timeout_strategy: TimeoutStrategy::Ignore, ..cancel };
    assert_eq!(ignore.decide(&pinned()), Decision::SwitchOver { expected_downtime_ms: Some(401) });
    let busy = Observation { pending_bytes: 2 * GIB, ..pinned() };
    assert_eq!(cancel.decide(&busy), Decision::Continue, "the rest still becomes less");
    assert_eq!(cancel.decide(&Observation { rounds: 4, ..pinned() }), Decision::Continue);
    let few = Observation { pending_bytes: 201 << 20, standing_bytes: 200 << 20, ..pinned() };
    assert_eq!(cancel.decide(&few), Decision::SwitchOver { expected_downtime_ms: Some(201) });
}

#[test]
fn c54_the_forecast_names_who_keeps_pages_pinned() {
    let rate =
        |id, standing_bytes| SourceRate { id, dirty_rate: GIB, exclusive_dirty_rate: GIB, standing_bytes };
    let forecast =
        Forecast::new(&Policy::default(), &pinned(), &[rate("kvm", 0), rate("container", 400 << 20)], "net0");
    assert_eq!(
        forecast.to_string(),
        "does not converge: container reports 400.0 MiB of pinned pages in every round, and the downtime limit carries 300.0 MiB"
    );
    let late = Observation { elapsed_ms: 3_600_000, pending_bytes: 2 * GIB, ..pinned() };
    let Decision::Cancel { reason } = Policy::default().decide(&late) else { panic!() };
    assert_eq!(
        reason.to_string(),
        "not converged within the timeout of 3600000 ms: 400.0 MiB of pinned pages come back in every round"
    );
}

#[test]
fn c47_a_timeout_says_what_it_waited_for() {
    let late = Observation { elapsed_ms: 3_600_000, bandwidth: GIB, rounds: 9, ..Observation::default() };
    let reason = |seen: Observation| match Policy::default().decide(&seen) {
        Decision::Cancel { reason: CancelReason::TimedOut { obstacle, .. } } => obstacle,
        other => panic!("{other:?}"),
    };
    let initial = Observation { device_initial_bytes: 3 * GIB, ..late };
    assert_eq!(reason(initial), Obstacle::InitialBytes { bytes: 3 * GIB });
    let blind = Observation { device: DeviceLeft::Unknown, ..late };
    assert_eq!(reason(blind), Obstacle::DeviceSizeUnknown);
    let large = Observation { device: DeviceLeft::Estimate(2 * GIB), device_initial_bytes: 1, ..late };
    assert_eq!(reason(large), Obstacle::DeviceState { bytes: 2 * GIB });
    let busy = Observation { pending_bytes: GIB, device_initial_bytes: 1, ..late };
    assert_eq!(reason(busy), Obstacle::Memory { bytes: GIB });
    assert_eq!(
        CancelReason::OutOfRounds { max_rounds: 9, obstacle: reason(initial) }.to_string(),
        "not converged within 9 rounds: 3.0 GiB of device state was to be read before the devices stop"
    );
}

#[test]
fn c47_a_forecast_does_not_call_ready_what_waits_for_its_devices() {
    let seen = Observation { bandwidth: GIB, device_initial_bytes: 5 << 20, ..Observation::default() };
    let forecast = Forecast::new(&Policy::default(), &seen, &[], "net0");
    assert_eq!(forecast.to_string(), "waits for 5.0 MiB of device state to be read");
}
