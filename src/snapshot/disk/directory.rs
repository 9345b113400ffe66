// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A directory held open: operations apply to it even if its path leads elsewhere by now.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, StatxAttributes, StatxFlags, fstat, mkdirat, open, openat,
    renameat, statat, statx, unlinkat,
};
use rustix::io::Errno;

/// Whether a file system is mounted on the directory `path`; `false` where the kernel is too old to say.
pub(super) fn is_mount_point(path: &Path) -> io::Result<bool> {
    let facts = statx(CWD, path, AtFlags::empty(), StatxFlags::TYPE)?;
    Ok(facts.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

/// An open directory. Links in it are not followed.
#[derive(Debug)]
pub(super) struct Directory(File);

impl Directory {
    /// Opens the directory that `path` leads to.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        Ok(Self(open(path, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?.into()))
    }

    /// Opens the directory `name` in this one.
    pub(super) fn open_directory(&self, name: &OsStr) -> io::Result<Self> {
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(Self(openat(&self.0, name, flags, Mode::empty())?.into()))
    }

    /// Opens the file `name` to read; opening a pipe instead does not block.
    pub(super) fn open_file(&self, name: &OsStr) -> io::Result<File> {
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        Ok(openat(&self.0, name, flags, Mode::empty())?.into())
    }

    /// Makes the directory `name`, for its owner alone.
    pub(super) fn make_directory(&self, name: &OsStr) -> io::Result<()> {
        Ok(mkdirat(&self.0, name, Mode::RWXU)?)
    }

    /// Makes the file `name`, for its owner alone, to read and write.
    pub(super) fn make_file(&self, name: &OsStr) -> io::Result<File> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(openat(&self.0, name, flags, Mode::RUSR | Mode::WUSR)?.into())
    }

    /// Moves `from` to `to`, and replaces what has that name.
    pub(super) fn rename(&self, from: &OsStr, to: &OsStr) -> io::Result<()> {
        Ok(renameat(&self.0, from, &self.0, to)?)
    }

    pub(super) fn remove_file(&self, name: &OsStr) -> io::Result<()> {
        Ok(unlinkat(&self.0, name, AtFlags::empty())?)
    }

    /// Removes the directory `name`, which has to be empty.
    pub(super) fn remove_directory(&self, name: &OsStr) -> io::Result<()> {
        Ok(unlinkat(&self.0, name, AtFlags::REMOVEDIR)?)
    }

    /// Whether anything has the name `name`, dangling links included.
    pub(super) fn has(&self, name: &OsStr) -> io::Result<bool> {
        match statat(&self.0, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => Ok(false),
            found => Ok(found.map(|_| true)?),
        }
    }

    /// Whether `name` leads to `file` and not to something else.
    pub(super) fn leads_to(&self, name: &OsStr, file: &File) -> io::Result<bool> {
        let named = match statat(&self.0, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(false),
            named => named?,
        };
        let held = fstat(file)?;
        Ok((named.st_dev, named.st_ino) == (held.st_dev, held.st_ino))
    }

    /// Names of what is in it.
    pub(super) fn names(&self) -> io::Result<Vec<OsString>> {
        let entries = Dir::read_from(&self.0)?;
        let name = |entry: rustix::fs::DirEntry| OsStr::from_bytes(entry.file_name().to_bytes()).to_owned();
        let names: Result<Vec<_>, _> = entries.map(|entry| entry.map(name)).collect();
        Ok(names?.into_iter().filter(|name| name != "." && name != "..").collect())
    }

    /// Whether `name` is a regular file.
    pub(super) fn is_file(&self, name: &OsStr) -> io::Result<bool> {
        let named = statat(&self.0, name, AtFlags::SYMLINK_NOFOLLOW)?;
        Ok(FileType::from_raw_mode(named.st_mode) == FileType::RegularFile)
    }

    /// The descriptor, to lock and sync it.
    pub(super) fn file(&self) -> &File {
        &self.0
    }
}
