// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Locks.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks a value that is consistent after every statement, so a panic of an earlier holder does not matter.
pub(crate) fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
