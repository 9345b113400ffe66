// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The first SIGINT or SIGTERM asks to stop, a later one ends the tool.

use std::io;
use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::Builder;
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::exit::Exit;

/// How long after the first signal others count as the same wish: `timeout` sends one to the tool and one to its group.
const SAME_WISH: Duration = Duration::from_millis(300);

/// Returns a flag that the first SIGINT or SIGTERM raises; a later one exits at once.
pub(crate) fn stop_flag() -> io::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let raised = Arc::clone(&stop);
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let heed = move || {
        let mut asked: Option<Instant> = None;
        for _ in signals.forever() {
            match asked {
                None => asked = Some(Instant::now()),
                Some(first) if first.elapsed() < SAME_WISH => {}
                Some(_) => process::exit(Exit::Cancelled as i32),
            }
            raised.store(true, Ordering::Relaxed);
        }
    };
    Builder::new().name("signals".into()).spawn(heed)?;
    Ok(stop)
}
