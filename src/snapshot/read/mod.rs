// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Reading snapshots: full ones, differentials, and chains of them; every byte can be checked against its digest.

pub(super) mod altered;
pub(super) mod chain;
pub(super) mod differential;
pub(super) mod documents;
pub(super) mod either;
pub(super) mod full;
pub(super) mod placed;
pub(super) mod reader;
