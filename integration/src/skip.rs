// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Saying loudly that a test, or a part of it, cannot run here.

use std::fmt::Display;
use std::io::Write;
use std::thread;

/// Prints `SKIPPED test: why` where the test runner does not swallow it: `.ci/skips` counts a test that says so wherever
/// it runs.
pub fn skip(why: impl Display) {
    say(test().as_deref().unwrap_or("a test"), why);
}

/// As [`skip`], of a test that calls itself `name` where its thread does not.
pub fn skipped(name: &str, why: impl Display) {
    say(test().as_deref().unwrap_or(name), why);
}

/// The test that this thread runs; `None` where tests run one after the other, on the main thread: then the line before
/// names it.
fn test() -> Option<String> {
    thread::current().name().filter(|name| *name != "main").map(str::to_owned)
}

fn say(test: &str, why: impl Display) {
    // One write: tests on other threads do not break the line up.
    let line = format!("SKIPPED {test}: {why}\n");
    let _nobody_listens = std::io::stderr().write_all(line.as_bytes());
}
