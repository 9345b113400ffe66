// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Ranges to and from the `vm-migration` crate's table.

use vm_migration::protocol::{MemoryRange, MemoryRangeTable};

use crate::range::GpaRange;

/// Builds the whole table of `ranges`, in their order, for callers that need one in hand.
pub fn table_of(ranges: impl IntoIterator<Item = GpaRange>) -> MemoryRangeTable {
    let mut table = MemoryRangeTable::default();
    for range in ranges {
        table.push(MemoryRange { gpa: range.start(), length: range.len() });
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_keeps_order_and_sizes() {
        let ranges = [GpaRange::new(0x1000, 0x1000).unwrap(), GpaRange::new(0x8000, 0x3000).unwrap()];
        let table = table_of(ranges);
        let pairs: Vec<_> = table.regions().iter().map(|range| (range.gpa, range.length)).collect();
        assert_eq!(pairs, [(0x1000, 0x1000), (0x8000, 0x3000)]);
    }
}
