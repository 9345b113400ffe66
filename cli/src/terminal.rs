// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The terminal behind standard error, as bars are drawn on it: by a [`Printer`](crate::printer::Printer), so that drawing
//! never waits for a terminal that was stopped.

use std::io::{self, IsTerminal};
use std::sync::{LazyLock, Mutex, PoisonError};

use indicatif::{MultiProgress, ProgressDrawTarget, TermLike};
use rustix::stdio::stderr;
use rustix::termios::tcgetwinsize;

use crate::printer::STDERR;

/// How often a second bars are drawn.
const FRAMES_PER_SECOND: u8 = 20;

/// What a terminal is taken for that does not tell.
const SIZE: (u16, u16) = (80, 24);

/// The bars on the terminal; whoever else writes there makes them step aside.
pub(crate) static BARS: LazyLock<MultiProgress> = LazyLock::new(|| {
    MultiProgress::with_draw_target(if io::stderr().is_terminal() {
        ProgressDrawTarget::term_like_with_hz(Box::new(Terminal::default()), FRAMES_PER_SECOND)
    } else {
        ProgressDrawTarget::hidden()
    })
});

/// Gathers a frame, and has it written as a whole or, where nobody looks, not at all.
#[derive(Debug, Default)]
struct Terminal {
    frame: Mutex<String>,
}

impl Terminal {
    fn add(&self, text: impl FnOnce(&mut String)) {
        text(&mut self.frame.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn move_cursor(&self, cells: usize, direction: char) {
        if cells > 0 {
            self.add(|frame| frame.push_str(&format!("\x1b[{cells}{direction}")));
        }
    }
}

fn size() -> (u16, u16) {
    tcgetwinsize(stderr()).map_or(SIZE, |size| match (size.ws_col, size.ws_row) {
        (0, _) | (_, 0) => SIZE,
        told => told,
    })
}

impl TermLike for Terminal {
    fn width(&self) -> u16 {
        size().0
    }

    fn height(&self) -> u16 {
        size().1
    }

    fn move_cursor_up(&self, n: usize) -> io::Result<()> {
        self.move_cursor(n, 'A');
        Ok(())
    }

    fn move_cursor_down(&self, n: usize) -> io::Result<()> {
        self.move_cursor(n, 'B');
        Ok(())
    }

    fn move_cursor_right(&self, n: usize) -> io::Result<()> {
        self.move_cursor(n, 'C');
        Ok(())
    }

    fn move_cursor_left(&self, n: usize) -> io::Result<()> {
        self.move_cursor(n, 'D');
        Ok(())
    }

    fn write_line(&self, s: &str) -> io::Result<()> {
        self.add(|frame| frame.extend([s, "\n"]));
        Ok(())
    }

    fn write_str(&self, s: &str) -> io::Result<()> {
        self.add(|frame| frame.push_str(s));
        Ok(())
    }

    fn clear_line(&self) -> io::Result<()> {
        self.add(|frame| frame.push_str("\r\x1b[2K"));
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.add(|frame| {
            let frame = std::mem::take(frame);
            if !frame.is_empty() {
                STDERR.offer(frame);
            }
        });
        Ok(())
    }
}
