// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A man in the middle that flips one bit of one page on its way, for a demo that must fail.
//!
//! Its decoder is as naive as can be and shares nothing with the library's.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread::Builder;

/// Command number of a Memory message.
const MEMORY: u16 = 4;

/// Listens on loopback, passes one connection on to `upstream`, and flips the lowest bit at `gpa` each time it comes by.
///
/// Returns the address to connect to.
///
/// # Errors
/// No port can be bound, or there is no thread.
pub(super) fn flip_a_bit(upstream: String, gpa: u64) -> io::Result<String> {
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    let address = listener.local_addr()?.to_string();
    Builder::new().name("proxy".into()).spawn(move || {
        let passed = listener.accept().and_then(|(source, _)| pass(&source, &upstream, gpa));
        if let Err(error) = passed {
            log::debug!("The man in the middle ends: {error}");
        }
    })?;
    Ok(address)
}

fn pass(source: &TcpStream, upstream: &str, gpa: u64) -> io::Result<()> {
    let destination = TcpStream::connect(upstream)?;
    let (mut answers, mut back) = (destination.try_clone()?, source.try_clone()?);
    let answering = Builder::new().name("answers".into()).spawn(move || {
        let copied = io::copy(&mut answers, &mut back);
        let _peer_is_gone = back.shutdown(Shutdown::Both);
        copied
    })?;
    let passed = pass_requests(&mut &*source, &mut &destination, gpa);
    let _peer_is_gone = destination.shutdown(Shutdown::Write);
    passed.and(answering.join().map_err(|_| io::Error::other("copying thread panicked"))?).map(drop)
}

fn pass_requests(from: &mut impl Read, to: &mut impl Write, gpa: u64) -> io::Result<u64> {
    let mut header = [0; 16];
    loop {
        from.read_exact(&mut header)?;
        to.write_all(&header)?;
        let length = word(&header[8..]);
        if u16::from_le_bytes([header[0], header[1]]) != MEMORY {
            io::copy(&mut from.by_ref().take(length), to)?;
            continue;
        }
        let mut table = Vec::new();
        from.by_ref().take(length).read_to_end(&mut table)?;
        to.write_all(&table)?;
        for range in table.chunks_exact(16) {
            pass_range(from, to, word(range), word(&range[8..]), gpa)?;
        }
    }
}

fn pass_range(
    from: &mut impl Read,
    to: &mut impl Write,
    start: u64,
    length: u64,
    gpa: u64,
) -> io::Result<()> {
    if gpa < start || gpa >= start + length {
        return io::copy(&mut from.take(length), to).map(drop);
    }
    io::copy(&mut from.by_ref().take(gpa - start), to)?;
    let mut byte = [0];
    from.read_exact(&mut byte)?;
    to.write_all(&[byte[0] ^ 1])?;
    io::copy(&mut from.take(start + length - gpa - 1), to).map(drop)
}

fn word(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[..8]);
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn just_one_bit_of_just_one_page_changes() {
        let mut stream = Vec::new();
        stream.extend([4u16.to_le_bytes(), [0; 2], [0; 2], [0; 2]].concat());
        stream.extend(32u64.to_le_bytes());
        for (gpa, length) in [(0x1000u64, 16u64), (0x4000, 16)] {
            stream.extend(gpa.to_le_bytes());
            stream.extend(length.to_le_bytes());
        }
        stream.extend(0..32u8);
        let mut out = Vec::new();
        let end = pass_requests(&mut &stream[..], &mut out, 0x4003).unwrap_err();
        assert_eq!(end.kind(), io::ErrorKind::UnexpectedEof);
        let changed: Vec<_> = stream.iter().zip(&out).enumerate().filter(|(_, (a, b))| a != b).collect();
        assert_eq!(changed.len(), 1);
        assert_eq!(*changed[0].1.0 ^ 1, *changed[0].1.1);
        assert_eq!(changed[0].0, 16 + 32 + 16 + 3);
        assert_eq!(stream.len(), out.len());
    }
}
