// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The tree of a VM's states, of a text in which one state may be as large as memory.

use std::collections::BTreeMap;
use std::iter;
use std::ops::Range;

use serde::Deserialize;
use serde::de::value::{Error as ShapeError, MapDeserializer};
use serde_json::value::RawValue;
use vm_migration::{MigratableError, Snapshot, SnapshotData};

/// States that are no share of the text this small are copied, all others moved out of it.
const SHARES: usize = 64;

/// States shorter than this are copied.
const LEAST_MOVED_BYTES: usize = 64 << 10;

/// Escapes that are taken out of a state in place. The text of a device's state has four.
const MOST_ESCAPES: usize = 1024;

/// Makes the tree of the JSON text of a State, as `serde_json::from_slice` does, in little more memory than the text has.
///
/// Long states are moved out of the text, which is given back piece by piece. `serde_json` copies them: a device's state of 1 GiB, which is
/// 1.3 GiB of base64, takes 2.7 GiB there and 1.3 GiB here.
///
/// ```
/// use vfio_migration::vm::read_tree;
/// let tree = read_tree(br#"{"snapshots":{},"snapshot_data":{"state":"7"}}"#.to_vec())?;
/// assert_eq!(tree.to_state::<u8>()?, 7);
/// # Ok::<_, Box<dyn std::error::Error + Send + Sync>>(())
/// ```
///
/// # Errors
/// The text is no JSON, or not that of a tree.
#[cfg_attr(not(feature = "transfer"), expect(unreachable_pub, reason = "`vm::read_tree`, with that feature"))]
pub fn read_tree(json: Vec<u8>) -> serde_json::Result<Snapshot> {
    let mut text = match String::from_utf8(json) {
        Ok(text) => text,
        Err(error) => return serde_json::from_slice(error.as_bytes()),
    };
    let (mut tree, mut long) = read_short(&text)?;
    long.sort_by_key(|state| state.place.start);
    let Some(longest) = (0..long.len()).max_by_key(|&index| long[index].place.len()) else {
        return Ok(tree);
    };
    let mut longest = long.remove(longest);
    // From the last to the first, so that the places of those to come stay.
    for LongState { path, place } in long.into_iter().rev() {
        let state = text[place.clone()].to_owned();
        if place.start < longest.place.start {
            longest.place = longest.place.start - place.len()..longest.place.end - place.len();
        }
        text.drain(place);
        text.shrink_to_fit();
        put(&mut tree, &path, unquote(state)?)?;
    }
    text.truncate(longest.place.end);
    text.drain(..longest.place.start);
    text.shrink_to_fit();
    put(&mut tree, &longest.path, unquote(text)?)?;
    Ok(tree)
}

/// Makes a leaf of a state that is JSON text already, and may be large: it is moved.
pub(crate) fn leaf_of_text(text: String) -> Result<Snapshot, MigratableError> {
    let data = data_of_text::<ShapeError>(text).map_err(|error| MigratableError::Snapshot(error.into()))?;
    Ok(Snapshot::from_data(data))
}

/// Makes what a node holds of its text. The type is made of what it is written as, and has no other way to take a text.
fn data_of_text<E: serde::de::Error>(text: String) -> Result<SnapshotData, E> {
    SnapshotData::deserialize(MapDeserializer::<_, E>::new(iter::once(("state", text))))
}

/// A state that is still in the text.
struct LongState {
    /// Ids from the root to its node.
    path: Vec<String>,
    /// Where it is, with its quotes.
    place: Range<usize>,
}

/// Reads the tree but for its long states.
fn read_short(text: &str) -> serde_json::Result<(Snapshot, Vec<LongState>)> {
    let root: Node<'_> = serde_json::from_str(text)?;
    let mut reading = Reading {
        text,
        least: (text.len() / SHARES).max(LEAST_MOVED_BYTES),
        path: Vec::new(),
        long: Vec::new(),
    };
    let tree = reading.node(root)?;
    Ok((tree, reading.long))
}

#[derive(Deserialize)]
struct Node<'a> {
    #[serde(borrow)]
    snapshots: BTreeMap<String, Node<'a>>,
    #[serde(borrow)]
    snapshot_data: Option<Data<'a>>,
}

#[derive(Deserialize)]
struct Data<'a> {
    #[serde(borrow)]
    state: &'a RawValue,
}

struct Reading<'a> {
    text: &'a str,
    least: usize,
    path: Vec<String>,
    long: Vec<LongState>,
}

impl Reading<'_> {
    fn node(&mut self, node: Node<'_>) -> serde_json::Result<Snapshot> {
        let mut snapshot = Snapshot::default();
        match node.snapshot_data.map(|data| data.state.get()) {
            Some(state) if state.len() >= self.least && state.starts_with('"') => {
                let start = state.as_ptr().addr() - self.text.as_ptr().addr();
                self.long.push(LongState { path: self.path.clone(), place: start..start + state.len() });
            }
            Some(state) => snapshot.snapshot_data = Some(data_of_text(serde_json::from_str(state)?)?),
            None => {}
        }
        for (id, child) in node.snapshots {
            self.path.push(id);
            let child = self.node(child)?;
            let id = self.path.pop().unwrap_or_default();
            snapshot.add_snapshot(id, child);
        }
        Ok(snapshot)
    }
}

/// Puts a state into the node at `path`, which is there.
fn put(tree: &mut Snapshot, path: &[String], text: String) -> serde_json::Result<()> {
    let node = path.iter().try_fold(tree, |node, id| node.snapshots.get_mut(id));
    if let Some(node) = node {
        node.snapshot_data = Some(data_of_text(text)?);
    }
    Ok(())
}

/// Makes of the text of a JSON string what it says, in place if it has few escapes, all of them of a quote or a slash.
fn unquote(quoted: String) -> serde_json::Result<String> {
    let Some(escapes) = escapes(&quoted) else { return serde_json::from_str(&quoted) };
    let end = quoted.len() - 1;
    let mut bytes = quoted.into_bytes();
    let (mut from, mut to) = (1, 0);
    for escape in escapes.into_iter().chain([end]) {
        bytes.copy_within(from..escape, to);
        to += escape - from;
        // What is escaped stands for itself, and is copied with what follows it.
        from = escape + 1;
    }
    bytes.truncate(to);
    Ok(String::from_utf8(bytes).expect("ASCII was taken out of UTF-8"))
}

/// Where the escapes of a JSON string are; `None` where they are not few, or one is not of a character that stands for itself.
fn escapes(quoted: &str) -> Option<Vec<usize>> {
    let (mut escapes, mut from) = (Vec::new(), 0);
    while let Some(at) = quoted[from..].find('\\') {
        let escape = from + at;
        let of_itself = matches!(quoted.as_bytes().get(escape + 1), Some(b'"' | b'\\' | b'/'));
        if !of_itself || escapes.len() == MOST_ESCAPES {
            return None;
        }
        escapes.push(escape);
        from = escape + 2;
    }
    Some(escapes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What `serde_json` makes of a text, as text again.
    fn naive(json: &[u8]) -> Result<String, String> {
        let tree: Snapshot = serde_json::from_slice(json).map_err(|error| error.to_string())?;
        Ok(serde_json::to_string(&tree).unwrap())
    }

    fn ours(json: &[u8]) -> Result<String, String> {
        let tree = read_tree(json.to_vec()).map_err(|error| error.to_string())?;
        Ok(serde_json::to_string(&tree).unwrap())
    }

    #[test]
    fn long_states_anywhere_are_the_ones_that_serde_json_reads() {
        let long = |bytes: usize, end: &str| "Qb4/".repeat(bytes / 4) + end;
        let mut root = Snapshot::new_from_state(&long(200_000, "\u{1}\n\"é")).unwrap();
        for (id, bytes, end) in
            [("a", 300_000, "\\\""), ("b", 900_000, ""), ("c", 700_000, "é"), ("z", 100_000, "\\")]
        {
            let mut node = leaf_of_text(format!(r#"{{"blob":"{}"}}"#, long(bytes, end))).unwrap();
            node.add_snapshot(id.to_owned(), Snapshot::new_from_state(&long(80_000, end)).unwrap());
            root.add_snapshot(id.to_owned(), node);
        }
        let text = serde_json::to_vec(&root).unwrap();
        assert!(naive(&text).unwrap().as_bytes() == text && ours(&text).unwrap().as_bytes() == text);
        let many = format!("\"{}\"", "\\\"".repeat(100_000));
        let many = format!(r#"{{"snapshots":{{}},"snapshot_data":{{"state":{many}}},"other":1}}"#);
        assert_eq!(ours(many.as_bytes()), naive(many.as_bytes()));
    }

    #[test]
    fn what_is_no_tree_is_refused() {
        let long = "Q".repeat(100_000);
        for text in [
            "{}",
            r#"{"snapshots":{},"snapshot_data":{"state":7}}"#,
            r#"{"snapshots":{},"snapshot_data":{}}"#,
            r#"{"snapshots":{},"snapshots":{},"snapshot_data":null}"#,
            r#"{"snapshots":{},"snapshot_data":{"state":"\ud800"}}"#,
            &format!(r#"{{"snapshots":{{}},"snapshot_data":{{"state":"\ud800{long}"}}}}"#),
            &format!(r#"{{"snapshots":{{}},"snapshot_data":{{"state":["{long}"]}}}}"#),
            &format!(r#"{{"snapshots":{{}},"snapshot_data":{{"state":"{long}"}}"#),
        ] {
            naive(text.as_bytes()).unwrap_err();
            ours(text.as_bytes()).unwrap_err();
        }
        assert!(ours(b"{\"snapshots\":{\"\xff\":{}}").is_err());
        let deep = r#"{"snapshots":{"a":"#.repeat(100_000);
        assert!(ours(deep.as_bytes()).unwrap_err().contains("recursion limit"));
    }

    proptest! {
        #[test]
        fn an_escaped_text_is_unquoted_as_serde_json_does_it(text in any::<String>(), plain in "[a\"\\\\/é]{0,30}") {
            for text in [text, plain] {
                let quoted = serde_json::to_string(&text).unwrap();
                prop_assert_eq!(unquote(quoted.clone()).unwrap(), text);
                let slashes = quoted.replace('/', "\\/");
                prop_assert_eq!(unquote(slashes.clone()).unwrap(), serde_json::from_str::<String>(&slashes).unwrap());
            }
        }
    }
}
