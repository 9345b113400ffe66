// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Saying loudly that a test, or a part of it, cannot run here.

use std::fmt::Display;
use std::io::Write;

/// Prints `SKIPPED: what: why` where the test runner does not swallow it.
pub fn skip(what: &str, why: impl Display) {
    let _nobody_listens = writeln!(std::io::stderr(), "SKIPPED: {what}: {why}");
}
