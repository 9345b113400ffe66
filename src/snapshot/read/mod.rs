// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Reading snapshots: full ones, differentials, and chains of them; every byte can be checked against its digest.

pub(super) mod altered;
pub(super) mod block_reader;
pub(super) mod checked;
pub(super) mod differential;
pub(super) mod dir;
pub(super) mod placed;
