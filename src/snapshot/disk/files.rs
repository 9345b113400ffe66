// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Opening and reading the files of a snapshot without trusting them.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, ErrorKind, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use thiserror::Error;

use super::error::ReadError;
use crate::snapshot::reserve::reserve;
use crate::units::Count;

/// Bytes of zeros written at once where a file system makes no holes.
const ZEROS_AT_ONCE: usize = 1 << 20;

/// Opens a regular file to read. Opening a pipe instead does not block.
pub(crate) fn open_regular(path: &Path) -> Result<File, ReadError> {
    let mut options = OpenOptions::new();
    let opened = options.read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let file = opened.map_err(|source| ReadError::Open { path: path.to_owned(), source })?;
    let metadata = file.metadata().map_err(|source| ReadError::Read { path: path.to_owned(), source })?;
    if metadata.is_file() { Ok(file) } else { Err(ReadError::NotRegular { path: path.to_owned() }) }
}

/// Opens a regular file that must have `expected` bytes.
pub(crate) fn open_sized(path: &Path, expected: u64) -> Result<File, ReadError> {
    let file = open_regular(path)?;
    let metadata = file.metadata().map_err(|source| ReadError::Read { path: path.to_owned(), source })?;
    if metadata.len() == expected {
        Ok(file)
    } else {
        Err(ReadError::Size { path: path.to_owned(), bytes: metadata.len(), expected })
    }
}

/// Reads a whole regular file of at most `limit` bytes into as much memory as it has bytes.
///
/// A file that says it is larger is not read.
pub(crate) fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>, ReadError> {
    let file = open_regular(path)?;
    let read = || {
        let length = file.metadata()?.len();
        let mut bytes = Vec::new();
        if length <= limit {
            // One byte more than the length, to notice if there is more.
            reserve(&mut bytes, usize::try_from(length).unwrap_or(usize::MAX).saturating_add(1))?;
            (&file).take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
        }
        Ok((length.max(bytes.len() as u64), bytes))
    };
    match read() {
        Ok((length, bytes)) if length <= limit => Ok(bytes),
        Ok(_) => Err(ReadError::TooLarge { path: path.to_owned(), limit }),
        Err(source) => Err(ReadError::Read { path: path.to_owned(), source }),
    }
}

/// Returns the parts of a file of `length` bytes that are not holes, ascending.
///
/// A file system without holes reports one part, the whole file.
pub(crate) fn data_parts(file: &File, length: u64) -> impl Iterator<Item = io::Result<std::ops::Range<u64>>> {
    let mut next = 0;
    std::iter::from_fn(move || {
        let part = next_data(file, next, length);
        next = part.as_ref().map_or(length, |part| part.as_ref().map_or(length, |part| part.end));
        part.transpose()
    })
}

/// Returns the first part at or after `from` that is not a hole, in a file of `length` bytes.
///
/// # Errors
/// The file cannot be read, or was cut off: what is missing is not taken for a hole.
pub(crate) fn next_data(file: &File, from: u64, length: u64) -> io::Result<Option<std::ops::Range<u64>>> {
    if from >= length {
        return Ok(None);
    }
    part_from(from, length, |whence| rustix::fs::seek(file, whence), || expect_length(file, length))
}

/// Finds the part that [`next_data`] returns by `seek`; `expect` checks that the file is as long as ever.
///
/// If the file system cannot say, everything from `from` on counts as data.
fn part_from(
    from: u64,
    length: u64,
    seek: impl Fn(SeekFrom) -> rustix::io::Result<u64>,
    expect: impl Fn() -> io::Result<()>,
) -> io::Result<Option<std::ops::Range<u64>>> {
    let found = match seek(SeekFrom::Data(from)) {
        Ok(start) if start < length => seek(SeekFrom::Hole(start)).map(|end| start..end.min(length)),
        Ok(_) | Err(Errno::NXIO) => return expect().map(|()| None),
        Err(error) => Err(error),
    };
    let found = match found.map_err(io::Error::from) {
        Err(error) if is_unsupported(&error) => from..length,
        // Nonsense from a file system must not lead to an endless loop.
        Ok(part) if part.start < from || part.end <= part.start => from..length,
        found => found?,
    };
    expect()?;
    Ok(Some(found))
}

/// Whether an error means that the file system does not support the operation; file systems use different codes for it.
pub(crate) fn is_unsupported(error: &io::Error) -> bool {
    let words = [Errno::INVAL, Errno::OPNOTSUPP, Errno::NOSYS, Errno::NOTTY, Errno::PERM, Errno::NODEV];
    error.raw_os_error().is_some_and(|code| words.contains(&Errno::from_raw_os_error(code)))
}

/// Makes an empty file `bytes` bytes long, all zeros: a hole, or, where the file system has none, zeros that are written.
pub(crate) fn extend(file: &File, bytes: u64) -> io::Result<()> {
    extend_by(file, bytes, || file.set_len(bytes))
}

fn extend_by(file: &File, bytes: u64, set_len: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    match set_len() {
        Err(error) if is_unsupported(&error) => {
            let mut writer = BufWriter::with_capacity(ZEROS_AT_ONCE, file);
            io::copy(&mut io::repeat(0).take(bytes), &mut writer)?;
            writer.flush()
        }
        extended => extended,
    }
}

/// Reads the bytes at `offset` of `file`, which is called `path`.
///
/// # Errors
/// The error holds a [`ReadError`], which names the file.
pub(crate) fn read_named(
    file: &File,
    path: impl FnOnce() -> PathBuf,
    bytes: &mut [u8],
    offset: u64,
) -> io::Result<()> {
    let read = file.read_exact_at(bytes, offset).or_else(|error| match error.kind() {
        ErrorKind::UnexpectedEof => {
            expect_length(file, offset.saturating_add(bytes.len() as u64)).and(Err(error))
        }
        _ => Err(error),
    });
    read.map_err(named(path))
}

/// Wraps an error in a [`ReadError`] that names the file `path`.
pub(crate) fn named(path: impl FnOnce() -> PathBuf) -> impl FnOnce(io::Error) -> io::Error {
    |source| io::Error::new(source.kind(), ReadError::Read { path: path(), source })
}

/// A file that was cut off since it was opened.
#[derive(Debug, Error)]
#[error("File was cut off at {} of {expected}", Count(.bytes, "byte"))]
struct CutOff {
    bytes: u64,
    expected: u64,
}

/// Checks that a file still has at least `expected` bytes.
pub(crate) fn expect_length(file: &File, expected: u64) -> io::Result<()> {
    let bytes = file.metadata()?.len();
    if bytes < expected {
        return Err(io::Error::new(ErrorKind::UnexpectedEof, CutOff { bytes, expected }));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_told_from_data() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8 << 20).unwrap();
        file.write_all_at(&[1; 4096], 2 << 20).unwrap();
        let parts: Vec<_> = data_parts(&file, 8 << 20).collect::<Result<_, _>>().unwrap();
        assert_eq!(parts.len(), 1);
        assert!(parts[0].contains(&(2 << 20)) && parts[0].end < 8 << 20, "{parts:?}");
        assert_eq!(data_parts(&file, 1 << 20).count(), 0);
    }

    #[test]
    fn c56_a_file_system_that_knows_no_holes_has_one_part_that_is_the_whole_file() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8 << 20).unwrap();
        let whole = || expect_length(&file, 8 << 20);
        for refusal in [Errno::INVAL, Errno::OPNOTSUPP, Errno::NOSYS, Errno::NOTTY, Errno::PERM] {
            let part = part_from(4096, 8 << 20, |_| Err(refusal), whole).unwrap();
            assert_eq!(part, Some(4096..8 << 20), "{refusal}");
            let only_data = |whence| match whence {
                SeekFrom::Data(from) => Ok(from),
                _ => Err(refusal),
            };
            assert_eq!(part_from(4096, 8 << 20, only_data, whole).unwrap(), Some(4096..8 << 20));
        }
        for nonsense in [0, 4096] {
            assert_eq!(part_from(4096, 8 << 20, |_| Ok(nonsense), whole).unwrap(), Some(4096..8 << 20));
        }
        assert!(part_from(0, 8 << 20, |_| Err(Errno::IO), whole).is_err());
        assert_eq!(part_from(0, 8 << 20, |_| Err(Errno::NXIO), whole).unwrap(), None);
        assert!(part_from(0, 9 << 20, |_| Err(Errno::INVAL), || expect_length(&file, 9 << 20)).is_err());
    }

    #[test]
    fn c56_a_file_that_cannot_be_extended_is_filled_with_zeros() {
        let filled = |refusal: Errno| {
            let file = tempfile::tempfile().unwrap();
            let outcome = extend_by(&file, (3 << 20) + 5, || Err(refusal.into()));
            outcome.map(|()| file.metadata().unwrap().len())
        };
        assert_eq!(filled(Errno::PERM).unwrap(), (3 << 20) + 5);
        assert_eq!(filled(Errno::INVAL).unwrap(), (3 << 20) + 5);
        assert_eq!(filled(Errno::FBIG).unwrap_err().raw_os_error(), Some(Errno::FBIG.raw_os_error()));
    }

    #[test]
    fn the_end_of_a_file_cut_off_is_no_hole() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[1; 4096], 0).unwrap();
        for length in [4097, 8 << 20] {
            let error = data_parts(&file, length).find_map(Result::err).unwrap();
            assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
            assert_eq!(error.to_string(), format!("File was cut off at 4096 bytes of {length}"));
            assert!(next_data(&file, 4096, length).is_err());
        }
        assert!(next_data(&file, 0, 4096).unwrap().is_some());
    }

    #[test]
    fn a_pipe_a_directory_and_an_endless_file_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0)
            .unwrap();
        assert!(matches!(read_bounded(&pipe, 1), Err(ReadError::NotRegular { .. })));
        assert!(matches!(read_bounded(dir.path(), 1), Err(ReadError::NotRegular { .. })));
        assert!(matches!(read_bounded(&dir.path().join("none"), 1), Err(ReadError::Open { .. })));

        let large = dir.path().join("large");
        std::fs::write(&large, [0; 65]).unwrap();
        assert!(matches!(read_bounded(&large, 64), Err(ReadError::TooLarge { limit: 64, .. })));
        assert_eq!(read_bounded(&large, 65).unwrap().len(), 65);
        assert!(matches!(open_sized(&large, 64), Err(ReadError::Size { bytes: 65, expected: 64, .. })));
    }
}
