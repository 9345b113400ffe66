// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `VmState` against a reader that makes a `serde_json::Value` of everything.

use std::collections::BTreeSet;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::guest::config_text;
use crate::range::GpaRange;
use crate::snapshot::*;

/// A node of a tree, as it is to be written: well or badly.
#[derive(Debug, Clone)]
struct Node {
    children: Option<Vec<(String, Node)>>,
    data: Data,
    data_first: bool,
    has_more: bool,
}

#[derive(Debug, Clone)]
enum Data {
    Absent,
    Null,
    Stateless,
    State(String),
    Other(Value),
}

/// How a tree is put in words.
#[derive(Debug, Clone, Copy)]
struct Style {
    escapes: bool,
    spaces: bool,
}

impl Style {
    fn quote(self, text: &str) -> String {
        if self.escapes {
            let escaped: String = text.encode_utf16().map(|unit| format!("\\u{unit:04x}")).collect();
            format!("\"{escaped}\"")
        } else {
            serde_json::to_string(text).unwrap()
        }
    }

    fn object(self, fields: &[(String, String)]) -> String {
        let (space, line) = if self.spaces { (" ", "\n\t") } else { ("", "") };
        let field =
            |(key, value): &(String, String)| format!("{line}{}{space}:{space}{value}", self.quote(key));
        let fields: Vec<_> = fields.iter().map(field).collect();
        format!("{{{}{line}}}", fields.join(","))
    }
}

impl Node {
    /// Leaves out children of which a value would keep the last only.
    fn without_repetitions(mut self) -> Self {
        let mut known = BTreeSet::new();
        self.children.iter_mut().for_each(|children| children.retain(|(id, _)| known.insert(id.clone())));
        self
    }

    fn write(&self, style: Style) -> String {
        let mut fields = Vec::new();
        if let Some(children) = &self.children {
            let children: Vec<_> =
                children.iter().map(|(id, child)| (id.clone(), child.write(style))).collect();
            fields.push(("snapshots".to_owned(), style.object(&children)));
        }
        let data = match &self.data {
            Data::Absent => None,
            Data::Null => Some("null".to_owned()),
            Data::Stateless => Some("{}".to_owned()),
            Data::State(state) => Some(style.object(&[("state".to_owned(), style.quote(state))])),
            Data::Other(value) => Some(style.object(&[("state".to_owned(), value.to_string())])),
        };
        fields.extend(data.map(|data| ("snapshot_data".to_owned(), data)));
        if self.data_first {
            fields.reverse();
        }
        if self.has_more {
            fields.push(("id".to_owned(), json!({"deep": [1, {"a": null}, "\""]}).to_string()));
        }
        style.object(&fields)
    }
}

fn any_ranges() -> impl Strategy<Value = Vec<(u64, u64)>> {
    let page = || 0..40u64;
    prop::collection::vec((page(), 0..4u64), 0..4)
        .prop_map(|pairs| pairs.into_iter().map(|(gpa, length)| (gpa << 12, length << 12)).collect())
}

/// The memory manager's state, mostly one.
fn any_memory_manager() -> impl Strategy<Value = String> {
    let table = |ranges: Vec<(u64, u64)>| {
        let data: Vec<_> = ranges.iter().map(|(gpa, length)| json!({"gpa": gpa, "length": length})).collect();
        json!({"memory_ranges": {"data": data, "more": true}, "guest_ram_mappings": ["é\n\"\\"], "z": 1})
            .to_string()
    };
    prop_oneof![
        8 => any_ranges().prop_map(table),
        1 => Just(r#"{"memory_ranges":{"data":7}}"#.to_owned()),
        1 => any_text(),
    ]
}

fn any_text() -> impl Strategy<Value = String> {
    prop_oneof![
        Just(String::new()),
        Just("{".to_owned()),
        Just(r#"{"common_cpuid":[1,{"eax":2}],"clock":null}"#.to_owned()),
        Just(r#"{"common_cpuid":null}"#.to_owned()),
        "\\PC{0,8}",
        any::<String>(),
    ]
}

fn any_data(state: BoxedStrategy<String>) -> impl Strategy<Value = Data> {
    prop_oneof![
        12 => state.prop_map(Data::State),
        1 => Just(Data::Absent),
        1 => Just(Data::Null),
        1 => Just(Data::Stateless),
        1 => prop_oneof![Just(json!(7)), Just(json!(null)), Just(json!(["x"]))].prop_map(Data::Other),
    ]
}

fn any_leaf(state: BoxedStrategy<String>) -> BoxedStrategy<Node> {
    let fields = (any_data(state), prop::bool::weighted(0.98), any::<bool>(), prop::bool::weighted(0.2));
    fields
        .prop_map(|(data, whole, data_first, has_more)| Node {
            children: whole.then(Vec::new),
            data,
            data_first,
            has_more,
        })
        .boxed()
}

fn any_tree() -> impl Strategy<Value = Node> {
    let id = prop_oneof![
        Just("memory-manager".to_owned()),
        Just("device-manager".to_owned()),
        Just("é\"\\".to_owned()),
        any::<String>(),
    ];
    let leaf = any_leaf(any_text().boxed());
    let below = leaf.prop_recursive(3, 12, 3, move |inner| {
        (any_leaf(any_text().boxed()), prop::collection::vec((id.clone(), inner), 0..3)).prop_map(
            |(mut node, children)| {
                node.children = node.children.map(|_| children);
                node.without_repetitions()
            },
        )
    });
    let manager = any_leaf(any_memory_manager().boxed());
    (below, manager, 0..3usize, prop::bool::weighted(0.95)).prop_map(|(mut root, manager, at, has_one)| {
        if let (Some(children), true) = (&mut root.children, has_one) {
            children.retain(|(id, _)| id != "memory-manager");
            children.insert(at.min(children.len()), ("memory-manager".to_owned(), manager));
        }
        root
    })
}

fn any_style() -> impl Strategy<Value = Style> {
    (any::<bool>(), any::<bool>()).prop_map(|(escapes, spaces)| Style { escapes, spaces })
}

/// Whether a value is a tree of states.
fn is_tree(node: &Value) -> bool {
    let data = match &node["snapshot_data"] {
        Value::Null => true,
        data => data["state"].is_string(),
    };
    data && node["snapshots"].as_object().is_some_and(|children| children.values().all(is_tree))
}

fn state_of(node: &Value) -> Option<Value> {
    serde_json::from_str(node["snapshot_data"]["state"].as_str()?).ok()
}

/// What the tree says, by way of a value of everything.
struct Naive {
    tree: Value,
    manager: Value,
    memory: Placement,
}

impl Naive {
    fn read(text: &str) -> Option<Self> {
        let tree: Value = serde_json::from_str(text).ok().filter(is_tree)?;
        let manager = state_of(&tree["snapshots"]["memory-manager"])?;
        let range = |range: &Value| Some((range["gpa"].as_u64()?, range["length"].as_u64()?));
        let ranges: Option<Vec<_>> = manager["memory_ranges"]["data"].as_array()?.iter().map(range).collect();
        let memory = Placement::from_pairs(ranges?, &SnapshotLimits::default()).ok()?;
        Some(Self { tree, manager, memory })
    }

    fn config_message(&self, config: &[u8]) -> Option<Value> {
        let own = state_of(&self.tree)?;
        let mut manager = self.manager.clone();
        manager["memory_ranges"] = json!({"data": []});
        let mut message = json!({"vm_config": serde_json::from_slice::<Value>(config).ok()?, "memory_manager_data": manager});
        match own.as_object()?.get("common_cpuid") {
            None | Some(Value::Null) => {}
            Some(cpuid) => message["common_cpuid"] = cpuid.clone(),
        }
        Some(message)
    }

    /// The tree and the memory manager's state in it, with other memory.
    fn relisted(mut self, memory: &Placement) -> (Value, Value) {
        let entry = |range: GpaRange| json!({"gpa": range.start(), "length": range.len()});
        if !self.memory.ranges().eq(memory.ranges()) {
            self.manager["memory_ranges"] = json!({"data": memory.ranges().map(entry).collect::<Vec<_>>()});
        }
        split(self.tree, self.manager)
    }
}

/// Takes the memory manager's text out of a tree, whose spelling is free.
fn split(mut tree: Value, manager: Value) -> (Value, Value) {
    tree["snapshots"]["memory-manager"]["snapshot_data"]["state"] = Value::Null;
    (tree, manager)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn a_state_read_in_place_says_what_one_read_as_a_value_says(tree in any_tree(), style in any_style()) {
        let text = tree.write(style);
        let limits = SnapshotLimits::default();
        let read = VmState::parse(text.clone().into_bytes(), &limits);
        let naive = Naive::read(&text);
        prop_assert_eq!(read.is_ok(), naive.is_some(), "{}: {:?}", text, read.err());
        let (Ok(state), Some(naive)) = (read, naive) else { return Ok(()) };
        prop_assert_eq!(state.text(), text.as_bytes());
        prop_assert_eq!(state.memory(), &naive.memory);
        let config = VmConfig::parse(&config_text(1), &limits).unwrap();
        let value = |message: Vec<u8>| serde_json::from_slice::<Value>(&message).unwrap();
        let message = state.config_message(&config).ok().map(value);
        prop_assert_eq!(&message, &naive.config_message(&config_text(1)));

        let mut ranges: Vec<_> = state.memory().ranges().collect();
        ranges.reverse();
        let reversed = Placement::new(ranges, &limits).unwrap();
        let relisted = state.clone().relist(&reversed).unwrap();
        prop_assert_eq!(state.text(), text.as_bytes(), "a clone is another state");
        let again = VmState::parse(relisted.text().to_vec(), &limits).unwrap();
        prop_assert_eq!(again.memory(), &reversed);
        prop_assert_eq!(relisted.config_message(&config).ok().map(value), message);
        let tree: Value = serde_json::from_slice(relisted.text()).unwrap();
        let manager = state_of(&tree["snapshots"]["memory-manager"]).unwrap();
        prop_assert!(split(tree, manager) == naive.relisted(&reversed));
    }

    #[test]
    fn a_text_with_anything_changed_is_refused_or_read_but_never_panics(
        tree in any_tree(), style in any_style(), at: prop::sample::Index, byte: u8, keep: prop::sample::Index,
    ) {
        let mut text = tree.write(style).into_bytes();
        let at = at.index(text.len());
        text[at] = byte;
        text.truncate(keep.index(text.len() + 1).max(text.len() / 2));
        if let Ok(state) = VmState::parse(text, &SnapshotLimits::default()) {
            let _ = state.config_message(&VmConfig::parse(&config_text(1), &SnapshotLimits::default()).unwrap());
        }
    }
}

#[test]
fn everything_but_the_list_stays_byte_for_byte_when_ranges_are_put_in_order() {
    let entry = |gpa: u64| format!(r#"{{\"gpa\":{gpa},\"length\":4096}}"#);
    let before = r#"{ "snapshots" : {"memory-manager":{"snapshots":{},"snapshot_data":{"state":"{\"z\":1.50,\"memory_ranges\":"#;
    let after = r#",\"a\":\"\\u00e9\"}"}}},"snapshot_data":{"state":"{\"common_cpuid\":[1]}"},"later":[]}"#;
    let table = |gpas: [u64; 2]| format!(r#"{{\"data\":[{},{}]}}"#, entry(gpas[0]), entry(gpas[1]));
    let text = format!("{before}{}{after}", table([8192, 0]));
    let state = VmState::parse(text.into_bytes(), &SnapshotLimits::default()).unwrap();
    let mut ranges: Vec<_> = state.memory().ranges().collect();
    ranges.sort_unstable();
    let state = state.relist(&Placement::new(ranges, &SnapshotLimits::default()).unwrap()).unwrap();
    assert_eq!(std::str::from_utf8(state.text()).unwrap(), format!("{before}{}{after}", table([0, 8192])));
}

/// A tree with two children.
fn pair(first: (&str, &str), second: (&str, &str)) -> Vec<u8> {
    let child = |(id, state): (&str, &str)| {
        format!(r#""{id}":{{"snapshots":{{}},"snapshot_data":{{"state":{}}}}}"#, Value::from(state))
    };
    format!(r#"{{"snapshots":{{{},{}}}}}"#, child(first), child(second)).into_bytes()
}

#[test]
fn of_two_children_with_one_id_the_last_counts_as_in_any_map() {
    let state = |gpa: u64| json!({"memory_ranges": {"data": [{"gpa": gpa, "length": 4096}]}}).to_string();
    let (one, other) = (state(0), state(8192));
    let text = pair(("memory-manager", &one), (r"memory\u002dmanager", &other));
    let read = VmState::parse(text, &SnapshotLimits::default()).unwrap();
    assert_eq!(read.memory().ranges().next(), GpaRange::new(8192, 4096).ok());
}
