// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What stands for TLS without the feature `tls`: nobody can ask for it.

use std::convert::Infallible;

/// What the source of a migration shows and trusts; there is none without the feature `tls`.
#[derive(Debug, Clone)]
pub struct ClientTls(pub(super) Infallible);

/// What the destination of a migration shows and trusts; there is none without the feature `tls`.
#[derive(Debug, Clone)]
pub struct ServerTls(pub(super) Infallible);
