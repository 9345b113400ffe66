// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The demo: a machine and its device move from one process to another, and what arrived is compared byte for byte.
//!
//! ```text
//!            ┌── control ── source process ──── vfio-user ── device process
//!  parent ───┤                   │ TCP or UNIX socket
//!            └── control ── destination process ─ vfio-user ── device process
//! ```
//! The parent made both sides' memfds, so it compares them without asking either side. The program that runs the demo is also
//! the program of its processes: run with [`PROCESS_ARGUMENT`], it calls [`process_main`].

mod checks;
pub(crate) mod child;
mod compare;
pub(crate) mod control;
mod error;
mod forget;
mod options;
pub(crate) mod process;
mod proxy;
mod report;
mod run;
pub(crate) mod side;
pub(crate) mod vm;

pub use child::process_main;
pub use compare::{Comparison, MAX_WRONG, compare};
pub use control::{Health, MachineSetup};
pub use error::DemoError;
pub use options::{DemoOptions, Inject, OptionError, Transport};
pub use report::{DeviceReport, DowntimeReport, MigrationFigures, Progress, Report, SourceReport};
pub use run::{Note, run};
pub use side::Side;
pub use vm::{DestinationVm, SourceVm};

/// First argument of a program that is to become a process of the demo.
pub const PROCESS_ARGUMENT: &str = "demo-process";

/// Environment variable that carries the log level to the processes.
pub const LOG_VARIABLE: &str = "VFIO_MIGRATE_LOG";
