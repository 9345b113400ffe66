// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The first SIGINT or SIGTERM asks to stop, the second one ends the tool.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::exit::Exit;

/// Returns a flag that the first SIGINT or SIGTERM raises; the second one exits at once.
pub(crate) fn stop_flag() -> io::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // In this order: the exit is armed by the flag that the signal before it raised.
        flag::register_conditional_shutdown(signal, i32::from(Exit::Cancelled as u8), Arc::clone(&stop))?;
        flag::register(signal, Arc::clone(&stop))?;
    }
    Ok(stop)
}
