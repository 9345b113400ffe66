// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Finds what a snapshot needs in the text of a tree of states, in one pass and without copying any of it.
//!
//! The states of devices, which can be as large as memory, are JSON texts inside JSON strings. Such a string is only scanned for its
//! end. The rest has to be a tree like `vm_migration::Snapshot`.

use std::fmt;
use std::ops::Range;

use serde::Deserialize;
use serde::de::{Deserializer, Error, MapAccess, Visitor};
use serde_json::value::RawValue;

/// Id of the component whose state lists the VM's memory.
pub(super) const MEMORY_MANAGER: &str = "memory-manager";

/// The states that are needed, each as raw text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(super) struct Tree<'a> {
    #[serde(borrow, rename = "snapshots")]
    children: Children<'a>,
    #[serde(borrow, rename = "snapshot_data")]
    data: Option<Data<'a>>,
}

impl<'a> Tree<'a> {
    /// Reads the tree that `text` is.
    ///
    /// # Errors
    /// It is not JSON, or not a tree.
    pub(super) fn read(text: &'a str) -> serde_json::Result<Self> {
        serde_json::from_str(text)
    }

    /// The state of the VM itself.
    pub(super) fn own(self) -> Option<Quoted<'a>> {
        self.data.map(|data| data.state)
    }

    /// The state of the memory manager.
    pub(super) fn memory_manager(self) -> Option<Quoted<'a>> {
        self.children.memory_manager
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
struct Data<'a> {
    #[serde(borrow)]
    state: Quoted<'a>,
}

/// The children of a node: all are checked, the state of one is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Children<'a> {
    memory_manager: Option<Quoted<'a>>,
}

impl<'de: 'a, 'a> Deserialize<'de> for Children<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(ChildrenVisitor)
    }
}

struct ChildrenVisitor;

impl<'de> Visitor<'de> for ChildrenVisitor {
    type Value = Children<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("snapshots by id")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut memory_manager = None;
        while let Some(id) = map.next_key::<Id>()? {
            let child: Tree<'de> = map.next_value()?;
            if id == Id::MemoryManager {
                memory_manager = child.own();
            }
        }
        Ok(Children { memory_manager })
    }
}

/// The id of a child; it is not kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(field_identifier)]
enum Id {
    #[serde(rename = "memory-manager")]
    MemoryManager,
    #[serde(other)]
    Other,
}

/// A JSON string as raw text, with its quotes and escapes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Quoted<'a>(&'a str);

impl<'a> Quoted<'a> {
    /// What the string says.
    ///
    /// # Errors
    /// An escape is invalid, such as half of a surrogate pair.
    pub(super) fn unquote(self) -> serde_json::Result<String> {
        serde_json::from_str(self.0)
    }

    /// Bytes of the raw text.
    pub(super) fn len(self) -> usize {
        self.0.len()
    }

    /// Where the string is in `text`, which contains it.
    pub(super) fn place_in(self, text: &str) -> Range<usize> {
        place(self.0, text)
    }

    /// Returns the string at `place` of `text`.
    pub(super) fn at(text: &'a str, place: Range<usize>) -> Self {
        Self(&text[place])
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Quoted<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match <&RawValue>::deserialize(deserializer)?.get() {
            text if text.starts_with('"') => Ok(Self(text)),
            _ => Err(D::Error::custom("a component's state is no string")),
        }
    }
}

/// Returns where `part` is in `text`, which contains it.
pub(super) fn place(part: &str, text: &str) -> Range<usize> {
    let start = part.as_ptr().addr() - text.as_ptr().addr();
    start..start + part.len()
}
