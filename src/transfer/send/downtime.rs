// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How long the VM stands still: what that is spent on, and how long it may.

use std::fmt;
use std::time::{Duration, Instant};

use super::error::SendError;
use crate::units::Millis;

/// What a downtime was spent on; the parts add up to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct DowntimeParts {
    /// Pausing the VM: its vCPUs, and all in the VMM that writes guest memory.
    pub pause: Duration,
    /// Stopping its devices: quiescent first, then for good.
    pub devices_stop: Duration,
    /// Asking every source once more, and again after the capture.
    pub last_collect: Duration,
    /// Sending the pages that were dirty then, and those that the capture wrote, to the last acknowledgement.
    pub last_pages: Duration,
    /// Reading what is left of the devices' state.
    pub devices_save: Duration,
    /// Capturing the state of the VM.
    pub capture: Duration,
    /// Letting go of what the receiver takes, sending that state, and the receiver taking it.
    pub state: Duration,
    /// The receiver running the VM, or keeping it paused as asked.
    pub complete: Duration,
}

impl DowntimeParts {
    /// Their names and how long they took, in the order they come.
    ///
    /// ```
    /// use vfio_migration::transfer::DowntimeParts;
    /// let names: Vec<_> = DowntimeParts::default().parts().into_iter().map(|(name, _)| name).collect();
    /// assert_eq!(names, ["pause", "devices_stop", "last_collect", "last_pages", "devices_save", "capture", "state", "complete"]);
    /// ```
    pub fn parts(&self) -> [(&'static str, Duration); 8] {
        [
            ("pause", self.pause),
            ("devices_stop", self.devices_stop),
            ("last_collect", self.last_collect),
            ("last_pages", self.last_pages),
            ("devices_save", self.devices_save),
            ("capture", self.capture),
            ("state", self.state),
            ("complete", self.complete),
        ]
    }

    /// The downtime.
    pub fn total(&self) -> Duration {
        self.parts().into_iter().map(|(_, time)| time).sum()
    }
}

impl fmt::Display for DowntimeParts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.parts().into_iter().enumerate().try_for_each(|(at, (name, time))| {
            let comma = if at > 0 { ", " } else { "" };
            write!(f, "{comma}{} {}", name.replace('_', " "), Millis(time))
        })
    }
}

/// Times one part of a downtime after the other, with no gap between them.
#[derive(Debug, Default)]
pub(super) struct DowntimeClock {
    parts: DowntimeParts,
    /// When the part under way began; `None` while the VM runs.
    since: Option<Instant>,
}

impl DowntimeClock {
    /// Begins a downtime, at `now`.
    pub(super) fn start(&mut self, now: Instant) {
        *self = Self { parts: DowntimeParts::default(), since: Some(now) };
    }

    /// Ends a part now: adds the time since the last one ended to the part that `of` picks.
    pub(super) fn end_part(&mut self, of: impl FnOnce(&mut DowntimeParts) -> &mut Duration) {
        self.end_part_at(Instant::now(), of);
    }

    fn end_part_at(&mut self, now: Instant, of: impl FnOnce(&mut DowntimeParts) -> &mut Duration) {
        if let Some(since) = &mut self.since {
            *of(&mut self.parts) += now.saturating_duration_since(std::mem::replace(since, now));
        }
    }

    /// The parts that have ended.
    pub(super) fn parts(&self) -> DowntimeParts {
        self.parts
    }
}

/// Until when the VM may stand still before it is handed over.
#[derive(Debug, Clone, Copy)]
pub(super) struct Switchover {
    paused: Instant,
    limit: Duration,
}

impl Switchover {
    /// Begins with the pause.
    pub(super) fn new(paused: Instant, limit: Duration) -> Self {
        Self { paused, limit }
    }

    /// The time that is left.
    pub(super) fn left(self) -> Duration {
        self.limit.saturating_sub(self.paused.elapsed())
    }

    /// Looks whether the VM may stand still any longer.
    pub(super) fn check(self) -> Result<(), SendError> {
        match self.left() {
            Duration::ZERO => Err(SendError::SwitchoverTimedOut { limit_ms: self.limit.as_millis() }),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_have_no_gap_between_them_and_add_up_whatever_their_order() {
        let paused = Instant::now();
        let at = |ms| paused + Duration::from_millis(ms);
        let mut clock = DowntimeClock::default();
        clock.start(paused - Duration::from_secs(1));
        clock.end_part_at(paused, |parts| &mut parts.pause);
        // Taken back, and begun anew.
        clock.start(paused);
        clock.end_part_at(at(3), |parts| &mut parts.pause);
        clock.end_part_at(at(10), |parts| &mut parts.last_pages);
        clock.end_part_at(at(30), |parts| &mut parts.capture);
        clock.end_part_at(at(35), |parts| &mut parts.last_pages);
        let parts = clock.parts();
        assert_eq!(parts.last_pages, Duration::from_millis(12));
        assert_eq!(parts.total(), Duration::from_millis(35));
        assert!(parts.to_string().starts_with("pause 3.0 ms, devices stop 0.0 ms"), "{parts}");
    }
}
