// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Medians, ratios, and what is wanted of them.

use std::fmt;
use std::time::Instant;

use crate::pattern::Pattern;

pub(crate) fn milliseconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64() * 1e3
}

/// The median.
pub(crate) fn median(times: impl Iterator<Item = f64>) -> f64 {
    let mut times: Vec<_> = times.collect();
    times.sort_unstable_by(f64::total_cmp);
    times[times.len() / 2]
}

/// A figure that is wanted to be small, and what it comes of.
pub(crate) struct Line {
    name: String,
    figure: f64,
    most: f64,
    parts: Vec<(&'static str, f64)>,
}

impl Line {
    pub(crate) fn new(name: String, figure: f64, most: f64) -> Self {
        Self { name, figure, most, parts: Vec::new() }
    }

    pub(crate) fn with(mut self, part: &'static str, value: f64) -> Self {
        self.parts.push((part, value));
        self
    }

    pub(crate) fn to_json(&self) -> serde_json::Value {
        let parts: serde_json::Map<_, _> =
            self.parts.iter().map(|(part, value)| ((*part).to_owned(), (*value).into())).collect();
        serde_json::json!({
            "name": self.name,
            "figure": self.figure,
            "at_most": self.most,
            "reached": self.figure <= self.most,
            "parts": parts,
        })
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = if self.figure <= self.most { "reached" } else { "missed" };
        write!(f, "{:<46} {:>8.3}, at most {}: {verdict};", self.name, self.figure, self.most)?;
        self.parts.iter().try_for_each(|(part, value)| write!(f, " {part} {value:.3}"))
    }
}

/// What each contender took, in milliseconds.
pub(crate) struct Round {
    pub(crate) floor: f64,
    pub(crate) scalar: f64,
    pub(crate) collect: f64,
    pub(crate) drain: f64,
    pub(crate) usual: f64,
}

/// Medians of all rounds over one pattern.
pub(crate) struct Figures {
    pattern: Pattern,
    pages: u64,
    median: Round,
}

/// A ratio that is wanted.
enum Limit {
    TimesFloor(f64),
    TimesScalar(f64),
    FasterThanUsual(f64),
}

impl Figures {
    pub(crate) const HEADER: &str = "pattern          pages    floor   scalar  collect + drain  = ours     usual | ours/floor ours/scalar usual/ours | wanted";

    pub(crate) fn new(pattern: Pattern, pages: u64, rounds: &[Round]) -> Self {
        let median = |of: fn(&Round) -> f64| median(rounds.iter().map(of));
        let median = Round {
            floor: median(|round| round.floor),
            scalar: median(|round| round.scalar),
            collect: median(|round| round.collect),
            drain: median(|round| round.drain),
            usual: median(|round| round.usual),
        };
        Self { pattern, pages, median }
    }

    fn ours(&self) -> f64 {
        self.median.collect + self.median.drain
    }

    fn limits(&self) -> &'static [Limit] {
        match self.pattern {
            Pattern::Idle => &[Limit::TimesFloor(1.3)],
            Pattern::Random(10) => &[Limit::TimesFloor(8.0), Limit::FasterThanUsual(6.0)],
            Pattern::Random(100) => &[Limit::TimesScalar(2.0), Limit::FasterThanUsual(2.0)],
            Pattern::Random(_) | Pattern::Alternating => &[Limit::TimesScalar(1.7)],
            Pattern::All => &[Limit::TimesFloor(6.0)],
            Pattern::Clustered => &[Limit::TimesFloor(4.0)],
        }
    }

    fn is_reached(&self, limit: &Limit) -> bool {
        match limit {
            Limit::TimesFloor(most) => self.ours() <= most * self.median.floor,
            Limit::TimesScalar(most) => self.ours() <= most * self.median.scalar,
            Limit::FasterThanUsual(least) => self.median.usual >= least * self.ours(),
        }
    }

    fn verdicts(&self) -> Vec<String> {
        let verdict =
            |limit| format!("{limit}: {}", if self.is_reached(limit) { "reached" } else { "missed" });
        self.limits().iter().map(verdict).collect()
    }

    pub(crate) fn to_json(&self) -> serde_json::Value {
        let Round { floor, scalar, collect, drain, usual } = self.median;
        serde_json::json!({
            "pattern": self.pattern.name(),
            "dirty_pages": self.pages,
            "floor_ms": floor,
            "scalar_ms": scalar,
            "collect_ms": collect,
            "drain_ms": drain,
            "usual_ms": usual,
            "ours_over_floor": self.ours() / floor,
            "ours_over_scalar": self.ours() / scalar,
            "usual_over_ours": usual / self.ours(),
            "wanted": self.verdicts(),
        })
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TimesFloor(most) => write!(f, "at most {most} x floor"),
            Self::TimesScalar(most) => write!(f, "at most {most} x scalar"),
            Self::FasterThanUsual(least) => write!(f, "at least {least} x faster than usual"),
        }
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Round { floor, scalar, collect, drain, usual } = self.median;
        let (name, pages, ours) = (self.pattern.name(), self.pages, self.ours());
        write!(
            f,
            "{name:<11} {pages:>10} {floor:>8.2} {scalar:>8.2} {collect:>8.2} {drain:>8.2} {ours:>8.2} {usual:>9.2} | "
        )?;
        write!(f, "{:>10.2} {:>11.2} {:>10.2} | ", ours / floor, ours / scalar, usual / ours)?;
        f.write_str(&self.verdicts().join("; "))
    }
}
