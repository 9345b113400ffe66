// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A file system that knows no holes: it passes everything on to another one, but for what some network file systems do not know.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use fuser::{
    BackgroundSession, BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyWrite, Request, TimeOrNow,
    WriteFlags,
};
use tempfile::TempDir;
use vfio_migration_integration::skip;

/// Nothing is remembered: what the next request finds is what there is.
const FOR_NO_TIME: Duration = Duration::ZERO;

/// What goes wrong on a file system, from the moment that it is told.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    /// The disk reads nothing of files of this name any more.
    pub(crate) unreadable: Mutex<Option<&'static str>>,
    /// The disk answers no read of files of this name, for as long as it says so.
    pub(crate) hangs: Mutex<Option<&'static str>>,
    /// A directory that is moved is answered with an error, though it was moved.
    pub(crate) denies_moves: AtomicBool,
}

/// A mounted file system that knows no holes, refuses to lengthen files, and makes none.
pub(crate) struct Dense {
    _session: BackgroundSession,
    mounted_at: TempDir,
    /// What the files really are in; removed last.
    _backing: TempDir,
    pub(crate) faults: Arc<Faults>,
}

impl Dense {
    /// Mounts one; says so where this host does not allow it.
    pub(crate) fn mount() -> Option<Self> {
        let [mounted_at, backing] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let faults = Arc::<Faults>::default();
        let passing = Passing::new(backing.path(), Arc::clone(&faults));
        match fuser::spawn_mount(passing, mounted_at.path(), &Config::default()) {
            Ok(session) => Some(Self { _session: session, mounted_at, _backing: backing, faults }),
            Err(error) => {
                skip(format!("cannot mount a file system of our own through /dev/fuse: {error}"));
                None
            }
        }
    }

    pub(crate) fn path(&self) -> &Path {
        self.mounted_at.path()
    }
}

/// Passes requests on to the directory `root`.
struct Passing {
    root: PathBuf,
    /// Where each file that somebody looked up lies in `root`.
    paths: Mutex<BTreeMap<u64, PathBuf>>,
    opened: Mutex<BTreeMap<u64, Arc<File>>>,
    next: AtomicU64,
    faults: Arc<Faults>,
}

impl Passing {
    fn new(root: &Path, faults: Arc<Faults>) -> Self {
        let paths = Mutex::new(BTreeMap::from([(INodeNo::ROOT.0, PathBuf::new())]));
        Self { root: root.to_owned(), paths, opened: Mutex::default(), next: AtomicU64::new(1), faults }
    }

    fn paths(&self) -> MutexGuard<'_, BTreeMap<u64, PathBuf>> {
        self.paths.lock().unwrap()
    }

    fn path(&self, inode: INodeNo) -> io::Result<PathBuf> {
        let paths = self.paths();
        paths.get(&inode.0).map(|path| self.root.join(path)).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Remembers what `name` in `parent` is.
    fn find(&self, parent: INodeNo, name: &OsStr) -> io::Result<FileAttr> {
        let path = self.path(parent)?.join(name);
        let attributes = attributes(&fs::symlink_metadata(&path)?);
        let path = path.strip_prefix(&self.root).map_err(io::Error::other)?.to_owned();
        self.paths().insert(attributes.ino.0, path);
        Ok(attributes)
    }

    fn metadata(&self, inode: INodeNo, handle: Option<FileHandle>) -> io::Result<Metadata> {
        match handle.and_then(|handle| self.file(handle)) {
            Some(file) => file.metadata(),
            None => fs::symlink_metadata(self.path(inode)?),
        }
    }

    fn open_as(&self, file: File) -> FileHandle {
        let handle = self.next.fetch_add(1, Ordering::Relaxed);
        self.opened.lock().unwrap().insert(handle, Arc::new(file));
        FileHandle(handle)
    }

    fn file(&self, handle: FileHandle) -> Option<Arc<File>> {
        self.opened.lock().unwrap().get(&handle.0).cloned()
    }

    fn shorten(&self, inode: INodeNo, handle: Option<FileHandle>, bytes: u64) -> io::Result<()> {
        let file = match handle.and_then(|handle| self.file(handle)) {
            Some(file) => file,
            None => Arc::new(File::options().write(true).open(self.path(inode)?)?),
        };
        match bytes > file.metadata()?.len() {
            true => Err(io::ErrorKind::PermissionDenied.into()),
            false => file.set_len(bytes),
        }
    }

    fn read_at(&self, inode: INodeNo, handle: FileHandle, offset: u64, bytes: u32) -> io::Result<Vec<u8>> {
        let unreadable = *self.faults.unreadable.lock().unwrap();
        if unreadable.is_some_and(|name| self.path(inode).is_ok_and(|path| path.ends_with(name))) {
            return Err(io::Error::from_raw_os_error(rustix::io::Errno::IO.raw_os_error()));
        }
        let is_hung = || {
            let hangs = *self.faults.hangs.lock().unwrap();
            hangs.is_some_and(|name| self.path(inode).is_ok_and(|path| path.ends_with(name)))
        };
        // A test that has failed waits for nothing.
        let began = Instant::now();
        while is_hung() && began.elapsed() < Duration::from_secs(60) {
            thread::sleep(Duration::from_millis(10));
        }
        let file = self.file(handle).ok_or(io::ErrorKind::NotFound)?;
        let mut buffer = vec![0; usize::try_from(bytes).unwrap()];
        let mut read = 0;
        while read < buffer.len() {
            match file.read_at(&mut buffer[read..], offset + read as u64)? {
                0 => break,
                more => read += more,
            }
        }
        buffer.truncate(read);
        Ok(buffer)
    }

    fn move_to(
        &self,
        (parent, name): (INodeNo, &OsStr),
        (new_parent, new_name): (INodeNo, &OsStr),
    ) -> io::Result<()> {
        let [from, to] = [self.path(parent)?.join(name), self.path(new_parent)?.join(new_name)];
        let is_directory = from.is_dir();
        fs::rename(&from, &to)?;
        let [from, to] = [from, to].map(|path| path.strip_prefix(&self.root).unwrap().to_owned());
        for path in self.paths().values_mut() {
            if let Ok(rest) = path.strip_prefix(&from) {
                *path = if rest.as_os_str().is_empty() { to.clone() } else { to.join(rest) };
            }
        }
        match is_directory && self.faults.denies_moves.load(Ordering::Relaxed) {
            true => Err(io::Error::from_raw_os_error(rustix::io::Errno::IO.raw_os_error())),
            false => Ok(()),
        }
    }
}

fn attributes(metadata: &Metadata) -> FileAttr {
    let kind = if metadata.is_dir() { FileType::Directory } else { FileType::RegularFile };
    let narrow = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
    FileAttr {
        ino: INodeNo(metadata.ino()),
        size: metadata.len(),
        blocks: metadata.blocks(),
        atime: SystemTime::UNIX_EPOCH,
        mtime: SystemTime::UNIX_EPOCH,
        ctime: SystemTime::UNIX_EPOCH,
        crtime: SystemTime::UNIX_EPOCH,
        kind,
        perm: u16::try_from(metadata.mode() & 0o7777).unwrap(),
        nlink: narrow(metadata.nlink()),
        uid: metadata.uid(),
        gid: metadata.gid(),
        rdev: 0,
        blksize: narrow(metadata.blksize()),
        flags: 0,
    }
}

impl Filesystem for Passing {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.find(parent, name) {
            Ok(found) => reply.entry(&FOR_NO_TIME, &found, Generation(0)),
            Err(error) => reply.error(error.into()),
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, handle: Option<FileHandle>, reply: ReplyAttr) {
        match self.metadata(inode, handle) {
            Ok(metadata) => {
                let root = FileAttr { ino: inode, ..attributes(&metadata) };
                reply.attr(&FOR_NO_TIME, &root);
            }
            Err(error) => reply.error(error.into()),
        }
    }

    fn setattr(
        &self,
        request: &Request,
        inode: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        bytes: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        handle: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        match bytes.map_or(Ok(()), |bytes| self.shorten(inode, handle, bytes)) {
            Ok(()) => self.getattr(request, inode, handle, reply),
            // As file systems do that know no other size than that of what was written.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => reply.error(Errno::EPERM),
            Err(error) => reply.error(error.into()),
        }
    }

    fn mkdir(&self, _: &Request, parent: INodeNo, name: &OsStr, mode: u32, _: u32, reply: ReplyEntry) {
        let made =
            self.path(parent).and_then(|parent| fs::DirBuilder::new().mode(mode).create(parent.join(name)));
        match made.and_then(|()| self.find(parent, name)) {
            Ok(found) => reply.entry(&FOR_NO_TIME, &found, Generation(0)),
            Err(error) => reply.error(error.into()),
        }
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        answer(self.path(parent).and_then(|parent| fs::remove_file(parent.join(name))), reply);
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        answer(self.path(parent).and_then(|parent| fs::remove_dir(parent.join(name))), reply);
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        _: RenameFlags,
        reply: ReplyEmpty,
    ) {
        answer(self.move_to((parent, name), (new_parent, new_name)), reply);
    }

    fn open(&self, _: &Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let writes = flags.0 & access_mode() != 0;
        let opened = self.path(inode).and_then(|path| File::options().read(true).write(writes).open(path));
        match opened {
            Ok(file) => reply.opened(self.open_as(file), FopenFlags::empty()),
            Err(error) => reply.error(error.into()),
        }
    }

    fn create(&self, _: &Request, parent: INodeNo, name: &OsStr, _: u32, _: u32, _: i32, reply: ReplyCreate) {
        let path = self.path(parent).map(|parent| parent.join(name));
        let made = path.and_then(|path| {
            File::options().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
        });
        match made.and_then(|file| Ok((file, self.find(parent, name)?))) {
            Ok((file, found)) => {
                reply.created(&FOR_NO_TIME, &found, Generation(0), self.open_as(file), FopenFlags::empty());
            }
            Err(error) => reply.error(error.into()),
        }
    }

    fn read(
        &self,
        _: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        bytes: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.read_at(inode, handle, offset, bytes) {
            Ok(read) => reply.data(&read),
            Err(error) => reply.error(error.into()),
        }
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let file = self.file(handle).ok_or_else(|| io::ErrorKind::NotFound.into());
        match file.and_then(|file: Arc<File>| file.write_all_at(data, offset)) {
            Ok(()) => reply.written(u32::try_from(data.len()).unwrap()),
            Err(error) => reply.error(error.into()),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.opened.lock().unwrap().remove(&handle.0);
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn readdir(&self, _: &Request, inode: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let entries = self.path(inode).and_then(|path| fs::read_dir(path)?.collect::<io::Result<Vec<_>>>());
        let entries = match entries {
            Ok(entries) => entries,
            Err(error) => return reply.error(error.into()),
        };
        for (entry, index) in entries.iter().zip(1..).skip(usize::try_from(offset).unwrap()) {
            let Ok(metadata) = entry.metadata() else { continue };
            let attributes = attributes(&metadata);
            if reply.add(attributes.ino, index, attributes.kind, entry.file_name()) {
                break;
            }
        }
        reply.ok();
    }

    fn lseek(&self, _: &Request, _: INodeNo, _: FileHandle, _: i64, _: i32, reply: ReplyLseek) {
        reply.error(Errno::EINVAL);
    }

    fn fallocate(&self, _: &Request, _: INodeNo, _: FileHandle, _: u64, _: u64, _: i32, reply: ReplyEmpty) {
        reply.error(Errno::EOPNOTSUPP);
    }
}

fn answer(done: io::Result<()>, reply: ReplyEmpty) {
    match done {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(error.into()),
    }
}

/// The bits of open flags that say whether a file is read or written.
fn access_mode() -> i32 {
    i32::try_from(rustix::fs::OFlags::RWMODE.bits()).unwrap()
}
