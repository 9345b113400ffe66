// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The tree of component states that a snapshot or the State message carries.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::MigratableError;

/// Holds the state of one component as JSON text.
///
/// On the wire it is `{"state": "<JSON text>"}`: JSON inside a JSON string, so that a tree can be
/// read and forwarded without knowing the shape of any component.
#[derive(Clone, Default, Deserialize, Serialize)]
pub struct SnapshotData {
    state: String,
}

impl SnapshotData {
    /// Parses the state.
    ///
    /// # Errors
    ///
    /// [`MigratableError::Restore`] when the text is not JSON or not the shape of a `T`.
    pub fn to_state<'a, T>(&'a self) -> Result<T, MigratableError>
    where
        T: Deserialize<'a>,
    {
        self.parse().map_err(restore_error)
    }

    /// Captures `state` as JSON text.
    ///
    /// # Errors
    ///
    /// [`MigratableError::Snapshot`] when `state` has no JSON form, as a map with keys that are not
    /// strings.
    pub fn new_from_state<T>(state: &T) -> Result<Self, MigratableError>
    where
        T: Serialize,
    {
        let state = serde_json::to_string(state)
            .map_err(|source| MigratableError::Snapshot(StateError::Serialize { source }.into()))?;
        Ok(Self { state })
    }

    fn parse<'a, T>(&'a self) -> Result<T, StateError>
    where
        T: Deserialize<'a>,
    {
        serde_json::from_str(&self.state)
            .map_err(|source| StateError::Parse { text_bytes: self.state.len(), source })
    }
}

/// Holds the state of a component and of all components beneath it.
///
/// A leaf usually has data and no children, an inner node children and no data; neither is required.
/// A child is found by the id its parent filed it under.
#[derive(Clone, Default, Deserialize, Serialize)]
pub struct Snapshot {
    /// The snapshots of the components beneath this one, by id.
    pub snapshots: BTreeMap<String, Snapshot>,

    /// The state of this component itself.
    pub snapshot_data: Option<SnapshotData>,
}

impl Snapshot {
    /// Makes a leaf of `data`.
    pub fn from_data(data: SnapshotData) -> Self {
        Self { snapshots: BTreeMap::new(), snapshot_data: Some(data) }
    }

    /// Makes a leaf that holds `state`.
    ///
    /// # Errors
    ///
    /// [`MigratableError::Snapshot`] when `state` has no JSON form.
    pub fn new_from_state<T>(state: &T) -> Result<Self, MigratableError>
    where
        T: Serialize,
    {
        SnapshotData::new_from_state(state).map(Self::from_data)
    }

    /// Files `snapshot` under `id`, in place of an earlier one of the same id.
    pub fn add_snapshot(&mut self, id: String, snapshot: Snapshot) {
        self.snapshots.insert(id, snapshot);
    }

    /// Parses this component's own state.
    ///
    /// # Errors
    ///
    /// [`MigratableError::Restore`] when the node holds no state, or not that of a `T`.
    pub fn to_state<'a, T>(&'a self) -> Result<T, MigratableError>
    where
        T: Deserialize<'a>,
    {
        self.parse().map_err(restore_error)
    }

    fn parse<'a, T>(&'a self) -> Result<T, StateError>
    where
        T: Deserialize<'a>,
    {
        self.snapshot_data.as_ref().ok_or(StateError::Missing)?.parse()
    }
}

/// Finds the child `id` of `snapshot`, if there is a snapshot and it has one.
pub fn snapshot_from_id<'a>(snapshot: Option<&'a Snapshot>, id: &str) -> Option<&'a Snapshot> {
    snapshot?.snapshots.get(id)
}

/// Parses the state of the child `id` of `snapshot`, if there is a snapshot and it has one.
///
/// # Errors
///
/// [`MigratableError::Restore`] when the child is there but holds no state, or not that of a `T`.
pub fn state_from_id<'a, T>(snapshot: Option<&'a Snapshot>, id: &str) -> Result<Option<T>, MigratableError>
where
    T: Deserialize<'a>,
{
    snapshot_from_id(snapshot, id)
        .map(Snapshot::parse)
        .transpose()
        .map_err(|source| restore_error(StateError::Child { id: id.to_string(), source: Box::new(source) }))
}

fn restore_error(error: StateError) -> MigratableError {
    MigratableError::Restore(error.into())
}

/// Says why a state could not be written or read.
#[derive(Debug, Error)]
enum StateError {
    #[error("Cannot serialize state as JSON")]
    Serialize { source: serde_json::Error },

    #[error("Cannot parse JSON state of length {text_bytes}")]
    Parse { text_bytes: usize, source: serde_json::Error },

    #[error("Snapshot holds no state")]
    Missing,

    #[error("Cannot read state of snapshot {id:?}")]
    Child { id: String, source: Box<StateError> },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Registers {
        pc: u64,
        flags: Vec<u8>,
    }

    fn registers() -> Registers {
        Registers { pc: 0xffff_8000_0000_0000, flags: vec![0, 255] }
    }

    /// The error and all its sources, as a user sees them.
    fn chain(error: MigratableError) -> String {
        format!("{:#}", anyhow::Error::from(error))
    }

    #[test]
    fn a_state_comes_back_as_it_went_in() {
        let snapshot = Snapshot::new_from_state(&registers()).unwrap();
        assert_eq!(snapshot.to_state::<Registers>().unwrap(), registers());
        assert_eq!(snapshot.snapshot_data.unwrap().to_state::<Registers>().unwrap(), registers());
    }

    #[test]
    fn a_tree_has_the_json_shape_of_the_wire() {
        let mut root = Snapshot::default();
        root.add_snapshot("timer".to_string(), Snapshot::new_from_state(&"on").unwrap());

        let json = r#"{"snapshots":{"timer":{"snapshots":{},"snapshot_data":{"state":"\"on\""}}},"snapshot_data":null}"#;
        assert_eq!(serde_json::to_string(&root).unwrap(), json);

        let parsed: Snapshot = serde_json::from_str(json).unwrap();
        assert_eq!(state_from_id::<String>(Some(&parsed), "timer").unwrap().unwrap(), "on");
    }

    #[test]
    fn a_state_can_borrow_from_its_snapshot() {
        let snapshot = Snapshot::new_from_state(&"borrowed").unwrap();
        assert_eq!(snapshot.to_state::<&str>().unwrap(), "borrowed");
    }

    #[test]
    fn the_child_is_found_by_its_id_and_replaced_by_a_second_of_the_same() {
        let mut root = Snapshot::default();
        root.add_snapshot("cpu".to_string(), Snapshot::new_from_state(&1).unwrap());
        root.add_snapshot("cpu".to_string(), Snapshot::new_from_state(&2).unwrap());

        assert_eq!(root.snapshots.len(), 1);
        assert_eq!(snapshot_from_id(Some(&root), "cpu").unwrap().to_state::<u32>().unwrap(), 2);
        assert_eq!(state_from_id::<u32>(Some(&root), "cpu").unwrap(), Some(2));
    }

    #[test]
    fn an_absent_snapshot_or_child_is_not_an_error() {
        let root = Snapshot::default();
        assert!(snapshot_from_id(None, "cpu").is_none());
        assert!(snapshot_from_id(Some(&root), "cpu").is_none());
        assert_eq!(state_from_id::<u32>(None, "cpu").unwrap(), None);
        assert_eq!(state_from_id::<u32>(Some(&root), "cpu").unwrap(), None);
    }

    #[test]
    fn each_failure_says_what_was_wrong_and_where() {
        let unkeyed = BTreeMap::from([((1, 2), 3)]);
        let serialize = Snapshot::new_from_state(&unkeyed).err().unwrap();
        assert!(matches!(serialize, MigratableError::Snapshot(_)));
        assert!(chain(serialize).contains("Cannot serialize state as JSON: key must be a string"));

        let parse = Snapshot::new_from_state(&"text").unwrap().to_state::<u32>().unwrap_err();
        assert!(matches!(parse, MigratableError::Restore(_)));
        assert!(chain(parse).contains("Cannot parse JSON state of length 6: invalid type"));

        let missing = Snapshot::default().to_state::<u32>().unwrap_err();
        assert!(matches!(missing, MigratableError::Restore(_)));
        assert!(chain(missing).contains("Snapshot holds no state"));

        let mut root = Snapshot::default();
        root.add_snapshot("cpu".to_string(), Snapshot::default());
        let child = state_from_id::<u32>(Some(&root), "cpu").unwrap_err();
        assert!(matches!(child, MigratableError::Restore(_)));
        assert!(chain(child).contains(r#"Cannot read state of snapshot "cpu": Snapshot holds no state"#));
    }

    #[test]
    fn a_tree_nested_beyond_reason_is_an_error_and_not_a_stack_overflow() {
        const LEVELS: usize = 100_000;
        let json = r#"{"snapshots":{"a":"#.repeat(LEVELS);
        let error = serde_json::from_str::<Snapshot>(&json).err().unwrap();
        assert!(error.to_string().contains("recursion limit"), "{error}");
    }
}
