// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Files and directories that are being written and do not have their final name yet.
//!
//! Such a file is beside its final place as `.NAME.partial-<16 hex digits>`, and its writer holds an advisory lock on it. If the lock can
//! be taken, the writer is dead, and the next writer of the same name removes the leftover.

use std::ffi::{OsStr, OsString};
use std::fs::{File, TryLockError};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;

use super::directory::Directory;

/// Attempts to make something that is not removed by others before it is locked.
const ATTEMPTS: u32 = 8;

/// A file or directory that can be written under a temporary name.
pub(super) trait Partial: Sized {
    /// Makes it as `name` in `parent`; `None` if another writer removed it before it was open.
    fn make(parent: &Directory, name: &OsStr) -> io::Result<Option<Self>>;

    /// Opens it as `name` in `parent`; something else of that name is an error.
    fn open(parent: &Directory, name: &OsStr) -> io::Result<Self>;

    /// What its writer locks.
    fn file(&self) -> &File;

    /// Removes it, which is `name` in `parent`; leaves it whole if it has anything in it that writers do not make.
    fn remove_leftover(&self, parent: &Directory, name: &OsStr) -> io::Result<()>;
}

impl Partial for File {
    fn make(parent: &Directory, name: &OsStr) -> io::Result<Option<Self>> {
        parent.make_file(name).map(Some)
    }

    fn open(parent: &Directory, name: &OsStr) -> io::Result<Self> {
        let file = parent.open_file(name)?;
        if file.metadata()?.is_file() { Ok(file) } else { Err(ErrorKind::InvalidInput.into()) }
    }

    fn file(&self) -> &File {
        self
    }

    fn remove_leftover(&self, parent: &Directory, name: &OsStr) -> io::Result<()> {
        parent.remove_file(name)
    }
}

/// Bytes a file system allows in a name, and those of a partial's that are not its final name's.
const NAME_BYTES: usize = 255;
const ADDED_BYTES: usize = ".".len() + ".partial-".len() + DIGITS;
const DIGITS: usize = 16;

/// How every temporary name of `name` begins: with as much of `name` as there is room for.
fn prefix(name: &OsStr) -> String {
    let name = name.to_string_lossy();
    let room = name.len().min(NAME_BYTES - ADDED_BYTES);
    let end = (0..=room).rfind(|&end| name.is_char_boundary(end)).unwrap_or(0);
    format!(".{}.partial-", &name[..end])
}

/// Makes and locks what will have the name `name` in `parent`; returns the name it has until then.
pub(super) fn make<T: Partial>(parent: &Directory, name: &OsStr) -> io::Result<(OsString, T)> {
    for _ in 0..ATTEMPTS {
        // The name cannot be predicted, and a link under it is refused.
        let random = RandomState::new().hash_one(std::process::id());
        let temporary = OsString::from(format!("{}{random:016x}", prefix(name)));
        match make_locked(parent, &temporary) {
            Ok(Some(made)) => return Ok((temporary, made)),
            Ok(None) => {}
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(ErrorKind::AlreadyExists.into())
}

/// Makes and locks something; `None` if another writer removed it in between. A failure leaves nothing.
fn make_locked<T: Partial>(parent: &Directory, name: &OsStr) -> io::Result<Option<T>> {
    let Some(made) = T::make(parent, name)? else { return Ok(None) };
    // Without locks on the file system it is never taken for a leftover.
    let taken = matches!(made.file().try_lock(), Err(TryLockError::WouldBlock));
    match made.file().metadata() {
        Ok(metadata) => Ok((!taken && metadata.nlink() > 0).then_some(made)),
        Err(error) => {
            // Best effort: the first error matters more.
            let _stays = made.remove_leftover(parent, name);
            Err(error)
        }
    }
}

/// Removes what dead writers of `name` in `parent` left behind, as far as it can be removed.
pub(super) fn clear_leftovers<T: Partial>(parent: &Directory, name: &OsStr) {
    let prefix = prefix(name);
    let is_ours = |name: &OsStr| {
        let tail = name.to_str().and_then(|name| name.strip_prefix(&prefix));
        tail.is_some_and(|tail| tail.len() == DIGITS && tail.bytes().all(|c| c.is_ascii_hexdigit()))
    };
    for leftover in parent.names().into_iter().flatten().filter(|name| is_ours(name)) {
        // Something else may have the name.
        let Ok(opened) = T::open(parent, &leftover) else { continue };
        let removed = remove_dead(&opened, parent, &leftover);
        let leftover = leftover.display();
        match removed {
            Ok(true) => log::info!("Removed {leftover}, which an interrupted run left behind"),
            Ok(false) => {}
            Err(error) => log::warn!("Cannot remove {leftover}: {error}"),
        }
    }
}

/// Removes `opened`, which had the name `name` in `parent` when it was opened, if its writer is dead.
///
/// Returns whether it was removed: what is still being written or has another name by now is left whole.
pub(super) fn remove_dead<T: Partial>(opened: &T, parent: &Directory, name: &OsStr) -> io::Result<bool> {
    match opened.file().try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(false),
        Err(TryLockError::Error(error)) => return Err(error),
    }
    // Its writer may have finished since it was opened: then it is whole, and has its final name. A writer moves it only while it
    // holds the lock, so that the name does not change from here on.
    if !parent.leads_to(name, opened.file())? {
        return Ok(false);
    }
    opened.remove_leftover(parent, name)?;
    Ok(true)
}
