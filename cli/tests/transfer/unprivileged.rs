// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The offload peer as a user without any privilege.

use std::fs::{self, Permissions};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use vfio_migration_integration::skip;

use crate::frames::{COMPLETE, OK};
use crate::local::{Source, config, guest};
use crate::local_send::{begin_by, memory_of};
use crate::on_demand::take_state;
use crate::raw::{NO_DISKS, RAM};
use crate::stored::{Place, assert_sound};
use crate::tool::Tool;

/// The tool as nobody runs it, with no capability and no way to get one; `None`, which is said, where this user cannot become nobody.
fn as_nobody(place: &Place) -> Option<Command> {
    // Nobody may not look into the directory that it was built in.
    let tool = place.path("vfio-migrate");
    fs::copy(env!("CARGO_BIN_EXE_vfio-migrate"), &tool).unwrap();
    fs::set_permissions(place.root(), Permissions::from_mode(0o777)).unwrap();
    let nobody =
        ["--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs", "--bounding-set=-all"];
    let as_nobody = |program: &Path| {
        let mut command = Command::new("setpriv");
        command.args(nobody).arg(program);
        command
    };
    match as_nobody(&tool).arg("--version").status() {
        Ok(status) if status.success() => Some(as_nobody(&tool)),
        _ => {
            skip("the tool cannot be run as nobody");
            None
        }
    }
}

/// A place that nobody may write to.
fn open_place() -> Place {
    let place = Place::new();
    fs::set_permissions(place.root(), Permissions::from_mode(0o777)).unwrap();
    place
}

#[test]
fn nobody_takes_a_snapshot_of_passed_memory() {
    let programs = Place::new();
    let Some(mut tool) = as_nobody(&programs) else { return };
    let (place, memory) = (open_place(), guest());
    let socket = format!("unix:{}", place.path("socket").display());
    let (tool, _) = Tool::receive_by(&mut tool, &socket, &place.path("into"), &[]);
    let mut source = Source::try_start(&place.path("socket")).unwrap();
    assert_eq!(source.pass(0, &[memory.as_fd()]), Some(OK));
    assert_eq!(source.ask(&config(NO_DISKS, &[(0, 0, RAM, 0)])), Some(OK));
    assert_eq!(source.finish(), Some(OK));
    drop(source);
    tool.end().succeeded();
    assert_sound(&place.path("into"));
}

#[test]
fn nobody_restores_a_vm_at_once_and_on_demand() {
    let programs = Place::new();
    let place = open_place();
    let from = place.stored("from", 1);
    fs::set_permissions(&from, Permissions::from_mode(0o755)).unwrap();
    for file in fs::read_dir(&from).unwrap() {
        fs::set_permissions(file.unwrap().path(), Permissions::from_mode(0o644)).unwrap();
    }
    let Some(mut tool) = as_nobody(&programs) else { return };
    let (vmm, tool_at_once) = begin_by(&mut tool, &place, &[&from], &[]);
    let mut line = vmm.accept();
    while line.next().is_some() {
        line.answer(OK);
    }
    tool_at_once.end().succeeded();
    assert!(line.passed.memory() == memory_of(&from));

    let Some(mut tool) = as_nobody(&programs) else { return };
    let (vmm, tool) = begin_by(&mut tool, &place, &[&from], &["--on-demand"]);
    let (mut line, mut faults) = take_state(&vmm);
    assert_eq!(faults.ask(0, 4096), Some(OK));
    line.answer(OK);
    assert_eq!(line.next(), Some(COMPLETE));
    line.answer(OK);
    let pages = u64::try_from(memory_of(&from).len()).unwrap() / 4096;
    assert!((0..pages).all(|page| faults.ask(page * 4096, 4096) == Some(OK)));
    drop(faults);
    tool.end().succeeded();
    assert!(line.passed.memory() == memory_of(&from));
}
