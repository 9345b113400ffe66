// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The service manager that started the tool: the socket that it passes (`LISTEN_FDS`), and what it is told (`NOTIFY_SOCKET`).

use std::io;

use listenfd::ListenFd;
use sd_notify::NotifyState;
use vfio_migration::transfer::connection::Listener;

use crate::exit::Exit;
use crate::failure::Failure;

/// Takes the listening socket that the service manager passed.
pub(crate) fn passed_listener() -> Result<Listener, Failure> {
    let mut passed = ListenFd::from_env();
    let usage = |message: String| Failure { exit: Exit::Usage, message };
    match passed.len() {
        0 => {
            let reason = "There is no URL, and no service manager passed a socket (LISTEN_FDS)";
            return Err(usage(reason.to_owned()));
        }
        1 => {}
        count => return Err(usage(format!("The service manager passed {count} sockets, not one"))),
    }
    take(&mut passed).map_err(|error| {
        usage(format!("Cannot listen on the socket that the service manager passed: {error}"))
    })
}

fn take(passed: &mut ListenFd) -> io::Result<Listener> {
    // Whichever kind it is not is an error, and leaves it in its place.
    if let Ok(Some(unix)) = passed.take_unix_listener(0) {
        return Listener::from_unix(unix);
    }
    let tcp = passed.take_tcp_listener(0)?.ok_or_else(|| io::Error::other("It is gone"))?;
    Listener::from_tcp(tcp)
}

/// Tells the service manager, if there is one, that sources may come.
pub(crate) fn tell_ready(status: &str) {
    tell(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// Tells the service manager what is being done.
pub(crate) fn tell_status(status: &str) {
    tell(&[NotifyState::Status(status)]);
}

/// Tells the service manager that this is the end.
pub(crate) fn tell_stopping() {
    tell(&[NotifyState::Stopping]);
}

fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        log::warn!("Cannot tell the service manager: {error}");
    }
}
