// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A list in JSON that may have a bounded number of entries.

use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;
use std::vec;

use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};

/// At most `N` entries; reading stops at one more, so that short entries do not make much memory of a long text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct AtMost<const N: usize, T>(Vec<T>);

impl<const N: usize, T> Default for AtMost<N, T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<const N: usize, T> Deref for AtMost<N, T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<const N: usize, T> IntoIterator for AtMost<N, T> {
    type Item = T;
    type IntoIter = vec::IntoIter<T>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl<'de, const N: usize, T: Deserialize<'de>> Deserialize<'de> for AtMost<N, T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(Entries(PhantomData))
    }
}

struct Entries<const N: usize, T>(PhantomData<T>);

impl<'de, const N: usize, T: Deserialize<'de>> Visitor<'de> for Entries<N, T> {
    type Value = AtMost<N, T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at most {N} entries")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = seq.next_element()? {
            if entries.len() == N {
                return Err(A::Error::invalid_length(N + 1, &self));
            }
            entries.push(entry);
        }
        Ok(AtMost(entries))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_entry_too_many_is_refused() {
        let list: AtMost<3, u8> = serde_json::from_str("[1,2,3]").unwrap();
        assert_eq!(*list, [1, 2, 3]);
        let error = serde_json::from_str::<AtMost<3, u8>>("[1,2,3,4,").unwrap_err();
        assert!(error.to_string().starts_with("invalid length 4, expected at most 3 entries"), "{error}");
    }
}
