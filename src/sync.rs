// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Locks.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks what stays whole whatever thread panicked while it held it.
pub(crate) fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
