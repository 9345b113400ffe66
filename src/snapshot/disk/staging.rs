// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A directory that appears under its name whole, or not at all.
//!
//! It is filled under a temporary name beside the final one (see [`partial`]), through descriptors: replacing a name by a link does not
//! redirect the writer.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use thiserror::Error;

use super::directory::{Directory, is_mount_point};
use super::error::WriteError;
use super::files::is_unsupported;
use super::partial::{self, Partial, clear_leftovers};
use crate::snapshot::format::{CHANGES_FILE, CONFIG_FILE, MANIFEST_FILE, MEMORY_FILE, STATE_FILE, WORK_FILE};
use crate::sync;

/// All files that a writer may leave behind in a directory that it did not finish.
const FILES: [&str; 6] = [CONFIG_FILE, STATE_FILE, MEMORY_FILE, CHANGES_FILE, MANIFEST_FILE, WORK_FILE];

/// Files that a writer has open at a time, and a connection that brings their bytes.
const DESCRIPTORS: usize = 16;

/// A directory as its writer fills it.
#[derive(Debug)]
struct Staged(Directory);

impl Partial for Staged {
    fn make(parent: &Directory, name: &OsStr) -> io::Result<Option<Self>> {
        parent.make_directory(name)?;
        match Self::open(parent, name) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => {
                // It is empty, and no writer has it open. The first error matters more than a failure to remove it.
                let _stays = parent.remove_directory(name);
                Err(error)
            }
            Ok(opened) => Ok(Some(opened)),
        }
    }

    fn open(parent: &Directory, name: &OsStr) -> io::Result<Self> {
        parent.open_directory(name).map(Self)
    }

    fn file(&self) -> &File {
        self.0.file()
    }

    fn remove_leftover(&self, parent: &Directory, name: &OsStr) -> io::Result<()> {
        for file in self.0.names()? {
            // A file of somebody else: leave everything as it is.
            if !FILES.iter().any(|ours| file == *ours) || !self.0.is_file(&file)? {
                return Err(ErrorKind::DirectoryNotEmpty.into());
            }
        }
        self.remove(parent, name)
    }
}

impl Staged {
    /// Removes what writers make in it, and itself, which is `name` in `parent`, if nothing else is in it.
    fn remove(&self, parent: &Directory, name: &OsStr) -> io::Result<()> {
        for file in FILES {
            match self.0.remove_file(file.as_ref()) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        // If something else has that name by now, only an empty directory is removed.
        parent.remove_directory(name)
    }
}

/// A directory being filled. Dropped before it is published, it is removed.
#[derive(Debug)]
pub(crate) struct StagedDir {
    staged: Staged,
    temporary: OsString,
    parent: Directory,
    name: OsString,
    /// What its names must lead to when it is published. Held open, so that no other file gets the same inode number.
    files: Mutex<BTreeMap<&'static str, File>>,
    /// For messages.
    target: PathBuf,
    published: bool,
}

/// What was being written was moved, removed or replaced.
#[derive(Debug, Error)]
#[error("{name} was moved, removed or replaced while it was written", name = .name.display())]
struct Replaced {
    name: OsString,
}

impl From<Replaced> for io::Error {
    fn from(replaced: Replaced) -> Self {
        Self::other(replaced)
    }
}

impl StagedDir {
    /// Makes the directory that will be `target`, and clears up after dead writers of the same name.
    ///
    /// # Errors
    /// `target` is taken or cannot be made.
    pub(crate) fn create(target: &Path) -> Result<Self, WriteError> {
        let target = resolve(target)?;
        let name = target.file_name().ok_or_else(|| WriteError::Name { path: target.clone() })?.to_owned();
        let make = |source| WriteError::Make { path: target.clone(), source };
        let parent = Directory::open(target.parent().unwrap_or(Path::new(""))).map_err(make)?;
        check_descriptors(&parent).map_err(|source| WriteError::Descriptors {
            path: target.clone(),
            needed: DESCRIPTORS,
            source,
        })?;
        clear_leftovers::<Staged>(&parent, &name);
        let (temporary, staged) = partial::make(&parent, &name).map_err(make)?;
        let files = Mutex::default();
        Ok(Self { staged, temporary, parent, name, files, target, published: false })
    }

    /// Makes an empty file, readable by its owner alone.
    pub(crate) fn make_file(&self, name: &'static str) -> Result<File, WriteError> {
        let made = self.staged.0.make_file(name.as_ref()).and_then(|file| {
            self.files().insert(name, file.try_clone()?);
            Ok(file)
        });
        made.map_err(|source| self.write_error(name, source))
    }

    /// Makes a file with `content`, safe on disk.
    pub(crate) fn write_file(&self, name: &'static str, content: &[u8]) -> Result<(), WriteError> {
        let file = self.make_file(name)?;
        write_synced(&file, content).map_err(|source| self.write_error(name, source))
    }

    pub(crate) fn remove_file(&self, name: &'static str) -> Result<(), WriteError> {
        self.files().remove(name);
        self.staged.0.remove_file(name.as_ref()).map_err(|source| self.write_error(name, source))
    }

    /// The final path.
    pub(crate) fn target(&self) -> &Path {
        &self.target
    }

    fn files(&self) -> MutexGuard<'_, BTreeMap<&'static str, File>> {
        sync::lock(&self.files)
    }

    pub(crate) fn write_error(&self, name: &'static str, source: io::Error) -> WriteError {
        WriteError::File { name, path: self.target.clone(), source }
    }

    /// Moves the directory, whose files are synced already, to its final name; safe on disk when it returns.
    ///
    /// # Errors
    /// Nothing lies under the final name. It is also an error if what was written was moved, removed or replaced.
    pub(crate) fn publish(mut self) -> Result<(), WriteError> {
        let path = || self.target.clone();
        self.rename().map_err(|source| match source.kind() {
            ErrorKind::DirectoryNotEmpty | ErrorKind::NotADirectory | ErrorKind::AlreadyExists => {
                WriteError::Occupied { path: path() }
            }
            _ => WriteError::Publish { path: path(), source },
        })?;
        let renamed = expect_at(&self.parent, &self.name, self.staged.file());
        let published = match renamed.and_then(|()| sync_directory(self.parent.file())) {
            Ok(()) => Ok(()),
            Err(source) => Err(match self.parent.rename(&self.name, &self.temporary) {
                Ok(()) => return Err(WriteError::Publish { path: path(), source }),
                Err(taking_back) => WriteError::Stands { path: path(), taking_back, source },
            }),
        };
        // It has its final name from here on: nothing in it is removed.
        self.published = true;
        published
    }

    fn rename(&self) -> io::Result<()> {
        sync_directory(self.staged.file())?;
        for (name, file) in &*self.files() {
            expect_at(&self.staged.0, name.as_ref(), file)?;
        }
        expect_at(&self.parent, &self.temporary, self.staged.file())?;
        rename_opened(&self.parent, &self.temporary, &self.name, self.staged.file())
    }
}

impl Drop for StagedDir {
    fn drop(&mut self) {
        // A directory that has the final name, or may have it, is not removed.
        let is_unnamed = || matches!(self.parent.leads_to(&self.name, self.staged.file()), Ok(false));
        if !self.published
            && is_unnamed()
            && let Err(error) = self.staged.remove(&self.parent, &self.temporary)
        {
            log::warn!(
                "Cannot remove {}, to be {}: {error}",
                self.temporary.display(),
                self.target.display()
            );
        }
    }
}

/// Adds a file to the finished directory `dir`, in place of one of that name if there is one: whole or not at all, safe on disk
/// when it returns.
///
/// # Errors
/// [`WriteError::Unsynced`]: it has its name. Else what was there before is as it was.
pub(crate) fn add_file(dir: &Path, name: &'static str, content: &[u8]) -> Result<(), WriteError> {
    clear_added(dir, name);
    let failed = |source| WriteError::File { name, path: dir.to_owned(), source };
    let directory = Directory::open(dir).map_err(failed)?;
    let replaces = directory.has(name.as_ref()).map_err(failed)?;
    let (temporary, file) = partial::make::<File>(&directory, name.as_ref()).map_err(failed)?;
    let moved = write_synced(&file, content)
        .and_then(|()| rename_opened(&directory, &temporary, name.as_ref(), &file));
    moved.inspect_err(|_| discard(&directory, &temporary)).map_err(failed)?;
    sync_directory(directory.file()).map_err(|source| match replaces {
        // The old file is gone: the new one stays, which is better than none.
        true => WriteError::Unsynced { name, path: dir.to_owned(), source },
        false => {
            discard(&directory, name.as_ref());
            failed(source)
        }
    })
}

/// Moves `opened` from the name `from` to the name `to`. Whether that failed is decided by which name it has afterwards: a network file
/// system may report an error for a rename that was done.
fn rename_opened(directory: &Directory, from: &OsStr, to: &OsStr, opened: &File) -> io::Result<()> {
    match directory.rename(from, to) {
        Err(error) if matches!(directory.leads_to(to, opened), Ok(true)) => {
            log::warn!("{} has its name, whatever its file system says: {error}", to.display());
            Ok(())
        }
        renamed => renamed,
    }
}

/// Clears up after dead writers of the file `name` in the finished directory `dir`.
pub(crate) fn clear_added(dir: &Path, name: &'static str) {
    if let Ok(directory) = Directory::open(dir) {
        clear_leftovers::<File>(&directory, name.as_ref());
    }
}

/// Syncs a directory; a file system that does not support that is not an error.
fn sync_directory(directory: &File) -> io::Result<()> {
    match directory.sync_all() {
        Err(error) if is_unsupported(&error) => Ok(()),
        synced => synced,
    }
}

/// Checks that what was written is what has its name.
fn expect_at(directory: &Directory, name: &OsStr, file: &File) -> io::Result<()> {
    if directory.leads_to(name, file)? { Ok(()) } else { Err(Replaced { name: name.to_owned() }.into()) }
}

fn write_synced(mut file: &File, content: &[u8]) -> io::Result<()> {
    io::Write::write_all(&mut file, content)?;
    file.sync_all()
}

fn discard(directory: &Directory, temporary: &OsStr) {
    if let Err(error) = directory.remove_file(temporary) {
        log::warn!("Cannot remove {}: {error}", temporary.display());
    }
}

/// Checks that the descriptors that a writer needs are free; without them it would fail late.
fn check_descriptors(any: &Directory) -> io::Result<()> {
    let taken: io::Result<Vec<_>> = (0..DESCRIPTORS).map(|_| any.file().try_clone()).collect();
    taken.map(drop)
}

/// Follows `target` where it exists, as an empty directory.
fn resolve(target: &Path) -> Result<PathBuf, WriteError> {
    let occupied = || WriteError::Occupied { path: target.to_owned() };
    let make = |source| WriteError::Make { path: target.to_owned(), source };
    match fs::read_dir(target) {
        Ok(mut entries) => match entries.next() {
            None if is_mount_point(target).map_err(make)? => {
                Err(WriteError::MountPoint { path: target.to_owned() })
            }
            None => fs::canonicalize(target).map_err(make),
            Some(Ok(_)) => Err(occupied()),
            Some(Err(error)) => Err(make(error)),
        },
        // A dangling link occupies the name.
        Err(error) if error.kind() == ErrorKind::NotFound && target.is_symlink() => Err(occupied()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(target.to_owned()),
        Err(error) if error.kind() == ErrorKind::NotADirectory => Err(occupied()),
        Err(error) => Err(make(error)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::snapshot::disk::partial::remove_dead;

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
            assert!(matches!(refused, WriteError::Occupied { .. }), "{refused}");
        }
        assert!(matches!(StagedDir::create(Path::new("/")), Err(WriteError::Occupied { .. })));
        assert!(matches!(StagedDir::create(&dir.path().join("none/snapshot")), Err(WriteError::Make { .. })));

        let empty = dir.path().join("empty");
        fs::create_dir(&empty).unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("empty", &link).unwrap();
        StagedDir::create(&link).unwrap().publish().unwrap();
        assert!(link.is_symlink() && empty.is_dir());
    }

    #[test]
    fn a_name_as_long_as_any_has_room_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["n".repeat(255), "\u{e9}".repeat(127), "\u{20ac}".repeat(85)] {
            let target = dir.path().join(&name);
            StagedDir::create(&target).unwrap().publish().unwrap();
            assert!(target.is_dir(), "{name}");
        }
        assert_eq!(names(dir.path()).len(), 3);
        let refused = StagedDir::create(&dir.path().join("n".repeat(256)));
        assert!(matches!(refused, Err(WriteError::Make { .. })));
    }

    #[test]
    fn a_directory_filled_in_the_meantime_is_not_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("snapshot");
        let staged = StagedDir::create(&target).unwrap();
        staged.write_file(CONFIG_FILE, b"ours").unwrap();
        fs::create_dir(&target).unwrap();
        fs::write(target.join("theirs"), "theirs").unwrap();
        assert!(matches!(staged.publish(), Err(WriteError::Occupied { .. })));
        assert_eq!(names(&target), ["theirs"]);
        assert_eq!(names(dir.path()), ["snapshot"]);
    }

    #[test]
    fn a_file_removed_or_replaced_in_the_meantime_is_not_published() {
        let planted: [fn(&Path); 3] = [
            |_| {},
            |path| fs::write(path, "{}").unwrap(),
            |path| std::os::unix::fs::symlink("elsewhere", path).unwrap(),
        ];
        for plant in planted {
            let dir = tempfile::tempdir().unwrap();
            let target = dir.path().join("snapshot");
            let staged = StagedDir::create(&target).unwrap();
            staged.write_file(MEMORY_FILE, b"{}").unwrap();
            let file = dir.path().join(&staged.temporary).join(MEMORY_FILE);
            fs::remove_file(&file).unwrap();
            plant(&file);
            let WriteError::Publish { source, .. } = staged.publish().unwrap_err() else { panic!() };
            assert!(source.to_string().contains("memory-ranges was moved, removed or replaced"), "{source}");
            assert!(names(dir.path()).is_empty(), "{:?}", names(dir.path()));
        }
    }

    #[test]
    fn another_directory_in_the_place_of_ours_is_not_published() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("snapshot");
        let staged = StagedDir::create(&target).unwrap();
        staged.write_file(CONFIG_FILE, b"ours").unwrap();
        let temporary = dir.path().join(&staged.temporary);
        fs::rename(&temporary, dir.path().join("away")).unwrap();
        fs::create_dir(&temporary).unwrap();
        fs::write(temporary.join(CONFIG_FILE), "theirs").unwrap();
        let WriteError::Publish { source, .. } = staged.publish().unwrap_err() else { panic!() };
        assert!(source.to_string().contains("moved, removed or replaced"), "{source}");
        assert!(!target.exists());
        assert_eq!(fs::read(temporary.join(CONFIG_FILE)).unwrap(), b"theirs");
    }

    #[test]
    fn what_has_the_final_name_after_a_failure_is_left_whole() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("snapshot");
        let staged = StagedDir::create(&target).unwrap();
        staged.write_file(CONFIG_FILE, b"ours").unwrap();
        // As after a rename that took effect and failed.
        fs::rename(dir.path().join(&staged.temporary), &target).unwrap();
        drop(staged);
        assert_eq!(fs::read(target.join(CONFIG_FILE)).unwrap(), b"ours");
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
        fs::write(foreign.join(MEMORY_FILE), "pages").unwrap();
        let no_file = dir.path().join(".snapshot.partial-00000000deadbeef");
        fs::create_dir_all(no_file.join(WORK_FILE)).unwrap();
        fs::write(no_file.join(MEMORY_FILE), "pages").unwrap();
        let other = dir.path().join(".snapshot.partial-notes");
        fs::create_dir(&other).unwrap();

        let living = StagedDir::create(&target).unwrap();
        let second = StagedDir::create(&target).unwrap();
        assert!(!dead.exists());
        assert_eq!(names(&foreign), ["diary", MEMORY_FILE], "not touched");
        assert_eq!(names(&no_file), [MEMORY_FILE, WORK_FILE], "not touched");
        assert!(other.exists());
        assert!([&living, &second].iter().all(|staged| dir.path().join(&staged.temporary).exists()));
        living.publish().unwrap();
        second.write_file(CONFIG_FILE, b"second").unwrap();
        second.publish().unwrap();
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
        assert!(matches!(refused, Err(WriteError::File { name: CONFIG_FILE, .. })));
        let mut expected = [planted.as_str(), MANIFEST_FILE, CONFIG_FILE];
        expected.sort();
        assert_eq!(names(&target), expected);
    }

    #[test]
    fn a_link_in_the_place_of_a_leftover_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let precious = dir.path().join("precious");
        fs::create_dir(&precious).unwrap();
        fs::write(precious.join(CONFIG_FILE), "precious").unwrap();
        let name = ".snapshot.partial-0123456789abcdef";
        let link = dir.path().join(name);
        std::os::unix::fs::symlink(&precious, &link).unwrap();
        StagedDir::create(&dir.path().join("snapshot")).unwrap();
        assert!(precious.join(CONFIG_FILE).exists() && link.is_symlink());

        // Swapped between the look at it and its removal: neither the one nor the other is touched.
        fs::remove_file(&link).unwrap();
        fs::create_dir(&link).unwrap();
        fs::write(link.join(CONFIG_FILE), "left over").unwrap();
        let parent = Directory::open(dir.path()).unwrap();
        let leftover = Staged::open(&parent, name.as_ref()).unwrap();
        let moved = dir.path().join("moved");
        fs::rename(&link, &moved).unwrap();
        std::os::unix::fs::symlink(&precious, &link).unwrap();
        assert!(!remove_dead(&leftover, &parent, name.as_ref()).unwrap());
        assert_eq!((names(&precious), names(&moved)), (vec![CONFIG_FILE.into()], vec![CONFIG_FILE.into()]));
        assert!(link.is_symlink());
    }

    #[test]
    fn a_directory_published_between_the_look_at_it_and_its_lock_is_left_whole() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("snapshot");
        let writer = StagedDir::create(&target).unwrap();
        writer.write_file(CONFIG_FILE, b"{}").unwrap();
        let temporary = writer.temporary.clone();
        let parent = Directory::open(dir.path()).unwrap();
        let seen = Staged::open(&parent, &temporary).unwrap();
        assert!(!remove_dead(&seen, &parent, &temporary).unwrap(), "its writer lives");
        writer.publish().unwrap();
        assert!(!remove_dead(&seen, &parent, &temporary).unwrap());
        assert_eq!((names(dir.path()), names(&target)), (vec!["snapshot".into()], vec![CONFIG_FILE.into()]));
    }

    #[test]
    fn a_file_that_got_its_name_between_the_look_at_it_and_its_lock_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let parent = Directory::open(dir.path()).unwrap();
        let (temporary, written) = partial::make::<File>(&parent, MANIFEST_FILE.as_ref()).unwrap();
        let seen = <File as Partial>::open(&parent, &temporary).unwrap();
        parent.rename(&temporary, MANIFEST_FILE.as_ref()).unwrap();
        drop(written);
        // Another writer's, should it ever draw the same name.
        fs::write(dir.path().join(&temporary), "another's").unwrap();
        assert!(!remove_dead(&seen, &parent, &temporary).unwrap());
        assert_eq!(names(dir.path()).len(), 2);
    }

    #[test]
    fn a_directory_swapped_for_a_link_while_it_is_filled_leads_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        let precious = dir.path().join("precious");
        fs::create_dir(&precious).unwrap();
        fs::write(precious.join(STATE_FILE), "precious").unwrap();
        let staged = StagedDir::create(&dir.path().join("snapshot")).unwrap();
        let temporary = dir.path().join(&staged.temporary);
        fs::rename(&temporary, dir.path().join("moved")).unwrap();
        std::os::unix::fs::symlink(&precious, &temporary).unwrap();
        staged.write_file(CONFIG_FILE, b"{}").unwrap();
        drop(staged);
        assert_eq!(names(&precious), [STATE_FILE]);
        assert!(names(&dir.path().join("moved")).is_empty());
    }

    #[test]
    fn what_a_dead_seal_left_is_cleared_and_what_a_living_one_holds_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let partial = |digits: &str| format!(".{MANIFEST_FILE}.partial-{digits}");
        let [dead, held, linked] = ["0123456789abcdef", "fedcba9876543210", "00000000deadbeef"].map(partial);
        for name in [&dead, &held] {
            fs::write(dir.path().join(name), "half").unwrap();
        }
        let holder = File::open(dir.path().join(&held)).unwrap();
        holder.lock().unwrap();
        fs::write(dir.path().join("precious"), "precious").unwrap();
        std::os::unix::fs::symlink("precious", dir.path().join(&linked)).unwrap();

        add_file(dir.path(), MANIFEST_FILE, b"{}").unwrap();
        let mut expected = [linked.as_str(), held.as_str(), "precious", MANIFEST_FILE];
        expected.sort();
        assert_eq!(names(dir.path()), expected);
        drop(holder);
        clear_added(dir.path(), MANIFEST_FILE);
        assert!(!names(dir.path()).contains(&held));
    }
}
