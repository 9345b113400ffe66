// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How long page faults took: counts in buckets, an eighth apart.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Buckets for each power of two nanoseconds.
const PER_OCTAVE: usize = 8;

/// Every power of two nanoseconds that 64 bits hold.
const BUCKETS: usize = 64 * PER_OCTAVE;

/// Counts of durations, from any number of threads.
#[derive(Debug)]
pub(super) struct Latencies(Box<[AtomicU64]>);

impl Default for Latencies {
    fn default() -> Self {
        Self((0..BUCKETS).map(|_| AtomicU64::new(0)).collect())
    }
}

impl Latencies {
    pub(super) fn add(&self, took: Duration) {
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.0[bucket_of(nanos)].fetch_add(1, Ordering::Relaxed);
    }

    /// The counts of both, as they are now.
    pub(super) fn with(&self, other: &Self) -> Self {
        let both = self.0.iter().zip(&other.0);
        let sum = |(one, other): (&AtomicU64, &AtomicU64)| {
            AtomicU64::new(one.load(Ordering::Relaxed) + other.load(Ordering::Relaxed))
        };
        Self(both.map(sum).collect())
    }

    pub(super) fn count(&self) -> u64 {
        self.0.iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }

    /// The duration that `percent` of all do not exceed, an eighth too long at most; zero where there is none.
    pub(super) fn percentile(&self, percent: u64) -> Duration {
        let wanted = u128::from(self.count()) * u128::from(percent);
        let mut seen = 0;
        let found = self.0.iter().position(|count| {
            seen += u128::from(count.load(Ordering::Relaxed));
            seen > 0 && seen * 100 >= wanted
        });
        found.map_or(Duration::ZERO, |bucket| Duration::from_nanos(end_of(bucket)))
    }
}

/// The bucket of a number: its highest bit, and the three bits below that.
fn bucket_of(nanos: u64) -> usize {
    let octave = nanos.max(1).ilog2() as usize;
    let below = if octave >= 3 { nanos >> (octave - 3) } else { nanos << (3 - octave) };
    octave * PER_OCTAVE + (below & 7) as usize
}

/// The largest number in a bucket.
fn end_of(bucket: usize) -> u64 {
    let (octave, below) = (bucket / PER_OCTAVE, (bucket % PER_OCTAVE) as u128);
    let end = ((8 + below + 1) << octave).div_ceil(8);
    u64::try_from(end - 1).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn percentiles_are_those_of_what_was_added() {
        let latencies = Latencies::default();
        assert_eq!(latencies.percentile(99), Duration::ZERO);
        (0..98).for_each(|_| latencies.add(Duration::from_micros(10)));
        (0..2).for_each(|_| latencies.add(Duration::from_millis(5)));
        assert_eq!(latencies.count(), 100);
        let near = |percent, micros: u64| {
            let found = latencies.percentile(percent).as_nanos();
            let wanted = u128::from(micros) * 1000;
            (wanted..=wanted * 9 / 8).contains(&found)
        };
        assert!(near(50, 10) && near(98, 10) && near(99, 5000) && near(100, 5000));
    }

    proptest! {
        #[test]
        fn a_bucket_ends_an_eighth_above_what_is_in_it_at_most(shift in 0..64u32, low in any::<u64>()) {
            let nanos = (low >> shift).max(1);
            let end = end_of(bucket_of(nanos));
            prop_assert!(end >= nanos && u128::from(end) <= u128::from(nanos) * 9 / 8 + 1);
        }
    }
}
