// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A directory that appears under its name whole, or not at all.
//!
//! It is filled under a name of its own beside the final one, `.NAME.partial-<16 hex digits>`, which its writer holds an
//! advisory lock on. A lock that can be taken shows that the writer is dead; the next writer of the same name clears up.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::files::{CHANGES_FILE, CONFIG_FILE, MANIFEST_FILE, MEMORY_FILE, STATE_FILE};

/// Where pages of a differential wait for their order to be known.
pub(super) const WORK_FILE: &str = "memory-work";

/// Everything a writer may leave behind in a directory it did not finish.
const FILES: [&str; 6] = [CONFIG_FILE, STATE_FILE, MEMORY_FILE, CHANGES_FILE, MANIFEST_FILE, WORK_FILE];

/// Attempts to make a directory that no one clears up before it is locked.
const ATTEMPTS: u32 = 8;

/// Why a directory was not written. Nothing lies under its name.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StagingError {
    /// The path has no last component to give the directory, as `..` has not.
    #[error("Path {path} names no directory to make", path = .path.display())]
    Name {
        /// The path.
        path: PathBuf,
    },
    /// Something lies there that would be overwritten.
    #[error("{path} exists and is not an empty directory", path = .path.display())]
    Occupied {
        /// The path.
        path: PathBuf,
    },
    /// The directory to hold it is absent, forbidden or full.
    #[error("Cannot make a directory beside {path}", path = .path.display())]
    Make {
        /// The final path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file of the directory could not be written.
    #[error("Cannot write {name} of {path}", path = .path.display())]
    Write {
        /// The file.
        name: &'static str,
        /// The final path of its directory.
        path: PathBuf,
        /// Why: as a rule, the disk is full.
        source: io::Error,
    },
    /// The finished directory could not be moved to its name.
    #[error("Cannot move the finished directory to {path}", path = .path.display())]
    Publish {
        /// The final path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A directory being filled. Dropped before it is published, it is removed.
#[derive(Debug)]
pub(super) struct StagedDir {
    /// Holds the lock.
    handle: File,
    temporary: PathBuf,
    parent: PathBuf,
    target: PathBuf,
    published: bool,
}

impl StagedDir {
    /// Makes the directory that will be `target`, and clears up after dead writers of the same name.
    ///
    /// # Errors
    /// `target` is taken or cannot be made.
    pub(super) fn create(target: &Path) -> Result<Self, StagingError> {
        let target = resolve(target)?;
        let (parent, name) = split(&target)?;
        let prefix = format!(".{}.partial-", name.display());
        clear_leftovers(&parent, &prefix, fs::FileType::is_dir, remove_staged);
        match make_locked(&parent, &prefix, make_dir) {
            Ok((temporary, handle)) => Ok(Self { handle, temporary, parent, target, published: false }),
            Err(source) => Err(StagingError::Make { path: target, source }),
        }
    }

    /// Makes an empty file, readable by its owner alone, of `bytes` bytes that are a hole.
    pub(super) fn make_file(&self, name: &'static str, bytes: u64) -> Result<File, StagingError> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        let made = options.open(self.temporary.join(name)).and_then(|file| {
            file.set_len(bytes)?;
            Ok(file)
        });
        made.map_err(|source| self.write_error(name, source))
    }

    /// Makes a file with `content`, safe on disk.
    pub(super) fn write_file(&self, name: &'static str, content: &[u8]) -> Result<(), StagingError> {
        let file = self.make_file(name, 0)?;
        let written = io::Write::write_all(&mut &file, content).and_then(|()| file.sync_all());
        written.map_err(|source| self.write_error(name, source))
    }

    pub(super) fn remove_file(&self, name: &'static str) -> Result<(), StagingError> {
        fs::remove_file(self.temporary.join(name)).map_err(|source| self.write_error(name, source))
    }

    /// Moves the file `from` to the place of the file `to`.
    pub(super) fn replace_file(&self, from: &'static str, to: &'static str) -> Result<(), StagingError> {
        let moved = fs::rename(self.temporary.join(from), self.temporary.join(to));
        moved.map_err(|source| self.write_error(to, source))
    }

    pub(super) fn write_error(&self, name: &'static str, source: io::Error) -> StagingError {
        StagingError::Write { name, path: self.target.clone(), source }
    }

    /// Moves the directory, whose files are synced already, to its final name; safe on disk when it returns.
    ///
    /// # Errors
    /// Nothing lies under the final name.
    pub(super) fn publish(mut self) -> Result<(), StagingError> {
        let published = self.rename_synced();
        self.published = published.is_ok();
        published.map_err(|source| match source.kind() {
            ErrorKind::DirectoryNotEmpty | ErrorKind::NotADirectory | ErrorKind::AlreadyExists => {
                StagingError::Occupied { path: self.target.clone() }
            }
            _ => StagingError::Publish { path: self.target.clone(), source },
        })
    }

    fn rename_synced(&self) -> io::Result<()> {
        self.handle.sync_all()?;
        let parent = File::open(&self.parent)?;
        fs::rename(&self.temporary, &self.target)?;
        parent.sync_all().inspect_err(|_| {
            if let Err(error) = fs::rename(&self.target, &self.temporary) {
                log::error!("Cannot take {} back: {error}", self.target.display());
            }
        })
    }
}

impl Drop for StagedDir {
    fn drop(&mut self) {
        if !self.published
            && let Err(error) = remove_staged(&self.temporary)
        {
            log::warn!("Cannot remove {}: {error}", self.temporary.display());
        }
    }
}

/// Adds a file to the finished directory `dir`: whole or not at all, safe on disk when it returns. Clears up after dead writers
/// of the same file.
pub(super) fn add_file(dir: &Path, name: &'static str, content: &[u8]) -> Result<(), StagingError> {
    let prefix = format!(".{name}.partial-");
    clear_leftovers(dir, &prefix, fs::FileType::is_file, |path| fs::remove_file(path));
    let added = make_locked(dir, &prefix, make_file).and_then(|(temporary, file)| {
        let moved = move_synced(&file, content, &temporary, &dir.join(name));
        moved.inspect_err(|_| discard(&temporary))?;
        File::open(dir)?.sync_all()
    });
    added.map_err(|source| StagingError::Write { name, path: dir.to_owned(), source })
}

/// Writes `content` to `file`, and moves it from `temporary` to `target`.
fn move_synced(mut file: &File, content: &[u8], temporary: &Path, target: &Path) -> io::Result<()> {
    io::Write::write_all(&mut file, content)?;
    file.sync_all()?;
    fs::rename(temporary, target)
}

fn discard(temporary: &Path) {
    if let Err(error) = fs::remove_file(temporary) {
        log::warn!("Cannot remove {}: {error}", temporary.display());
    }
}

/// Follows `target` where it exists, as an empty directory.
fn resolve(target: &Path) -> Result<PathBuf, StagingError> {
    let occupied = || StagingError::Occupied { path: target.to_owned() };
    let make = |source| StagingError::Make { path: target.to_owned(), source };
    match fs::read_dir(target) {
        Ok(mut entries) => match entries.next() {
            None => fs::canonicalize(target).map_err(make),
            Some(_) => Err(occupied()),
        },
        // A dangling link is there, though it leads nowhere.
        Err(error) if error.kind() == ErrorKind::NotFound && target.is_symlink() => Err(occupied()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(target.to_owned()),
        Err(error) if error.kind() == ErrorKind::NotADirectory => Err(occupied()),
        Err(error) => Err(make(error)),
    }
}

/// Splits into the directory above and the last component.
fn split(target: &Path) -> Result<(PathBuf, &std::ffi::OsStr), StagingError> {
    let name = target.file_name().ok_or_else(|| StagingError::Name { path: target.to_owned() })?;
    let parent = target.parent().filter(|parent| !parent.as_os_str().is_empty());
    Ok((parent.unwrap_or(Path::new(".")).to_owned(), name))
}

fn random() -> u64 {
    RandomState::new().hash_one(std::process::id())
}

/// Makes something in `parent`, under a name that begins with `prefix`, and locks it.
///
/// Nobody can foresee the name: a link that waits under it is refused, and never followed.
fn make_locked(
    parent: &Path,
    prefix: &str,
    make: impl Fn(&Path) -> io::Result<File>,
) -> io::Result<(PathBuf, File)> {
    let mut failed = ErrorKind::AlreadyExists.into();
    for _ in 0..ATTEMPTS {
        let path = parent.join(format!("{prefix}{:016x}", random()));
        match make(&path) {
            Ok(handle) if !is_taken(&handle)? => return Ok((path, handle)),
            Ok(_) => {}
            Err(error) if matches!(error.kind(), ErrorKind::AlreadyExists | ErrorKind::NotFound) => {
                failed = error;
            }
            Err(error) => return Err(error),
        }
    }
    Err(failed)
}

/// Locks what was just made; returns whether somebody took it for a leftover before. Where the file system has no locks
/// nobody does.
fn is_taken(made: &File) -> io::Result<bool> {
    Ok(matches!(made.try_lock(), Err(TryLockError::WouldBlock)) || made.metadata()?.nlink() == 0)
}

fn make_dir(path: &Path) -> io::Result<File> {
    DirBuilder::new().mode(0o700).create(path)?;
    File::open(path)
}

fn make_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

/// Removes what is of the same prefix and kind and whose writer is dead. What cannot be removed is left.
fn clear_leftovers(
    parent: &Path,
    prefix: &str,
    is_kind: impl Fn(&fs::FileType) -> bool,
    remove: impl Fn(&Path) -> io::Result<()>,
) {
    let Ok(entries) = fs::read_dir(if parent.as_os_str().is_empty() { Path::new(".") } else { parent })
    else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let tail = name.to_str().and_then(|name| name.strip_prefix(prefix));
        let ours = tail.is_some_and(|tail| tail.len() == 16 && tail.bytes().all(|c| c.is_ascii_hexdigit()));
        if ours && entry.file_type().is_ok_and(|kind| is_kind(&kind)) {
            clear_leftover(&entry.path(), &remove);
        }
    }
}

fn clear_leftover(path: &Path, remove: impl Fn(&Path) -> io::Result<()>) {
    let Ok(handle) = File::open(path) else { return };
    let removed = match handle.try_lock() {
        Ok(()) => remove(path),
        Err(TryLockError::WouldBlock) => return,
        Err(TryLockError::Error(error)) => Err(error),
    };
    match removed {
        Ok(()) => log::info!("Removed {}, which an interrupted run left behind", path.display()),
        Err(error) => log::warn!("Cannot remove {}: {error}", path.display()),
    }
}

/// Removes a directory with the files a writer makes; with anything else in it, it stays.
fn remove_staged(path: &Path) -> io::Result<()> {
    for name in FILES {
        match fs::remove_file(path.join(name)) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    fs::remove_dir(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_directory_appears_whole_and_nothing_stays_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("snapshot");
        let staged = StagedDir::create(&target).unwrap();
        staged.write_file(CONFIG_FILE, b"{}").unwrap();
        assert!(!target.exists());
        staged.publish().unwrap();
        assert_eq!(fs::read(target.join(CONFIG_FILE)).unwrap(), b"{}");
        assert_eq!(names(dir.path()), ["snapshot"]);
        assert_eq!(fs::metadata(target.join(CONFIG_FILE)).unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_dropped_directory_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let staged = StagedDir::create(&dir.path().join("snapshot")).unwrap();
        staged.write_file(STATE_FILE, b"{}").unwrap();
        drop(staged);
        assert!(names(dir.path()).is_empty());
    }

    #[test]
    fn what_exists_is_refused_unless_it_is_an_empty_directory() {
        let dir = tempfile::tempdir().unwrap();
        let full = dir.path().join("full");
        fs::create_dir(&full).unwrap();
        fs::write(full.join("x"), "x").unwrap();
        let dangling = dir.path().join("dangling");
        std::os::unix::fs::symlink("nowhere", &dangling).unwrap();
        for taken in [&full, &full.join("x"), &dangling] {
            let refused = StagedDir::create(taken).err().unwrap();
            assert!(matches!(refused, StagingError::Occupied { .. }), "{refused}");
        }
        assert!(matches!(StagedDir::create(Path::new("/")), Err(StagingError::Occupied { .. })));
        assert!(matches!(
            StagedDir::create(&dir.path().join("none/snapshot")),
            Err(StagingError::Make { .. })
        ));

        let empty = dir.path().join("empty");
        fs::create_dir(&empty).unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("empty", &link).unwrap();
        StagedDir::create(&link).unwrap().publish().unwrap();
        assert!(link.is_symlink() && empty.is_dir());
    }

    #[test]
    fn a_directory_filled_in_the_meantime_is_not_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("snapshot");
        let staged = StagedDir::create(&target).unwrap();
        staged.write_file(CONFIG_FILE, b"ours").unwrap();
        fs::create_dir(&target).unwrap();
        fs::write(target.join("theirs"), "theirs").unwrap();
        assert!(matches!(staged.publish(), Err(StagingError::Occupied { .. })));
        assert_eq!(names(&target), ["theirs"]);
        assert_eq!(names(dir.path()), ["snapshot"]);
    }

    #[test]
    fn leftovers_of_the_dead_are_cleared_and_those_of_the_living_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("snapshot");
        let dead = dir.path().join(".snapshot.partial-0123456789abcdef");
        fs::create_dir(&dead).unwrap();
        fs::write(dead.join(MEMORY_FILE), "pages").unwrap();
        let foreign = dir.path().join(".snapshot.partial-fedcba9876543210");
        fs::create_dir(&foreign).unwrap();
        fs::write(foreign.join("diary"), "dear").unwrap();
        let other = dir.path().join(".snapshot.partial-notes");
        fs::create_dir(&other).unwrap();

        let living = StagedDir::create(&target).unwrap();
        let second = StagedDir::create(&target).unwrap();
        assert!(!dead.exists());
        assert!(foreign.join("diary").exists() && other.exists());
        assert!(living.temporary.exists() && second.temporary.exists());
        living.publish().unwrap();
        second.write_file(CONFIG_FILE, b"second").unwrap();
        second.publish().unwrap();
    }

    #[test]
    fn leftovers_of_a_file_are_cleared_unless_their_writer_lives() {
        let dir = tempfile::tempdir().unwrap();
        let [dead, living, other, foreign] =
            ["0123456789abcdef", "fedcba9876543210", "notes", "00000000deadbeef"]
                .map(|tail| dir.path().join(format!(".{MANIFEST_FILE}.partial-{tail}")));
        for file in [&dead, &living, &other] {
            fs::write(file, "half").unwrap();
        }
        fs::create_dir(&foreign).unwrap();
        let lock = File::open(&living).unwrap();
        lock.lock().unwrap();

        add_file(dir.path(), MANIFEST_FILE, b"{}").unwrap();
        assert!(!dead.exists());
        assert!(living.exists() && other.exists() && foreign.exists());
        drop(lock);
        add_file(dir.path(), MANIFEST_FILE, b"{}").unwrap();
        assert!(!living.exists());
        assert_eq!(names(dir.path()).len(), 3);
    }

    #[test]
    fn a_file_is_added_past_planted_links_and_a_failure_leaves_none() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("snapshot");
        fs::create_dir(&target).unwrap();
        let victim = dir.path().join("victim");
        fs::write(&victim, "precious").unwrap();
        let planted = format!(".{MANIFEST_FILE}.partial");
        for link in [planted.as_str(), MANIFEST_FILE] {
            std::os::unix::fs::symlink(&victim, target.join(link)).unwrap();
        }

        add_file(&target, MANIFEST_FILE, b"{}").unwrap();
        assert_eq!(fs::read(&victim).unwrap(), b"precious");
        let made = fs::symlink_metadata(target.join(MANIFEST_FILE)).unwrap();
        assert!(made.is_file() && made.mode() & 0o777 == 0o600);
        assert_eq!(fs::read(target.join(MANIFEST_FILE)).unwrap(), b"{}");

        fs::create_dir(target.join(CONFIG_FILE)).unwrap();
        let refused = add_file(&target, CONFIG_FILE, b"{}");
        assert!(matches!(refused, Err(StagingError::Write { name: CONFIG_FILE, .. })));
        let mut expected = [planted.as_str(), MANIFEST_FILE, CONFIG_FILE];
        expected.sort();
        assert_eq!(names(&target), expected);
    }
}
