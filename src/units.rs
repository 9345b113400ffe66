// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Numbers as text for log lines and errors.

use std::fmt;
#[cfg(feature = "transfer")]
use std::time::Duration;

/// Bytes in the largest binary unit of which there is one: `512 B`, `2.9 MiB`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bytes(pub(crate) u64);

const PREFIXES: [&str; 6] = ["K", "M", "G", "T", "P", "E"];

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let power = self.0.checked_ilog2().unwrap_or(0) / 10;
        let Some(prefix) = power.checked_sub(1).and_then(|at| PREFIXES.get(at as usize)) else {
            return write!(f, "{} B", self.0);
        };
        let tenths = (u128::from(self.0) * 10) >> (10 * power);
        write!(f, "{}.{} {prefix}iB", tenths / 10, tenths % 10)
    }
}

/// A number of things: `1 range`, `2 ranges`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Count<'a, N>(pub(crate) &'a N, pub(crate) &'static str);

impl<N: fmt::Display + PartialEq + From<u8>> fmt::Display for Count<'_, N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(number, thing) = self;
        let plural = if **number == N::from(1) { "" } else { "s" };
        write!(f, "{number} {thing}{plural}")
    }
}

/// Milliseconds with one decimal: `17.1 ms`.
#[cfg(feature = "transfer")]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Millis(pub(crate) Duration);

#[cfg(feature = "transfer")]
impl fmt::Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tenths = self.0.as_micros() / 100;
        write!(f, "{}.{} ms", tenths / 10, tenths % 10)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_in_the_largest_unit_of_which_there_is_one() {
        let told = [0, 1023, 1024, (3 << 20) - 1, 5 << 30, u64::MAX].map(|bytes| Bytes(bytes).to_string());
        assert_eq!(told, ["0 B", "1023 B", "1.0 KiB", "2.9 MiB", "5.0 GiB", "15.9 EiB"]);
    }

    #[test]
    fn one_thing_is_no_plural() {
        let told = [0_u64, 1, 2].map(|number| Count(&number, "byte").to_string());
        assert_eq!(told, ["0 bytes", "1 byte", "2 bytes"]);
    }

    #[cfg(feature = "transfer")]
    #[test]
    fn milliseconds_have_one_decimal() {
        assert_eq!(Millis(Duration::from_micros(17_190)).to_string(), "17.1 ms");
        assert_eq!(Millis(Duration::ZERO).to_string(), "0.0 ms");
    }
}
