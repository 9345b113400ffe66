// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Devices that fail, and what is left of the migration then.

use super::*;

fn with(fault: Fault) -> DeviceConfig {
    DeviceConfig { faults: vec![fault], ..DeviceConfig::default() }
}

fn nth(command: u16, nth: u64) -> When {
    When { command: Some(command), nth }
}

const DEVICE_FEATURE: u16 = 16;
const MIG_DATA_READ: u16 = 17;

#[test]
fn device_that_dies_is_named_at_once() {
    let (mut client, thread) = device_with(with(Fault::Die(nth(DEVICE_FEATURE, 2))), &options());
    client.device_state().unwrap();
    let error = client.device_state().unwrap_err();
    assert!(matches!(error, Error::Disconnected { .. }), "{error}");
    assert!(error.to_string().contains("dma0"));
    assert!(matches!(client.reset(), Err(Error::Broken { .. })));
    assert!(matches!(thread.join().unwrap(), Err(ServeError::Died)));
}

#[test]
fn device_that_stalls_is_given_up_in_time() {
    let quick = Options { request_timeout: Duration::from_millis(200), ..options() };
    let (mut client, thread) = device_with(with(Fault::Stall(When { command: None, nth: 2 })), &quick);
    let begun = Instant::now();
    let error = client.set_device_state(STOP).unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(5));
    drop(client);
    assert!(matches!(thread.join().unwrap(), Err(ServeError::Died)));
}

#[test]
fn refused_state_leaves_the_device_running_and_a_second_try_works() {
    let config = with(Fault::Refuse { when: nth(DEVICE_FEATURE, 1), errno: libc::EAGAIN });
    let (mut client, _ram) = programmed(config);
    let error = client.set_device_state(STOP_COPY).unwrap_err();
    assert_eq!(error.errno(), Some(libc::EAGAIN));
    assert_eq!(client.device_state().unwrap(), RUNNING);
    client.set_device_state(STOP_COPY).unwrap();
}

#[test]
fn data_that_cannot_be_read_fails_the_session_and_a_new_one_begins_afresh() {
    let (mut client, _ram) =
        programmed(with(Fault::Refuse { when: nth(MIG_DATA_READ, 2), errno: libc::EIO }));
    client.set_device_state(STOP_COPY).unwrap();
    let mut buffer = vec![0; 4096];
    client.read_migration_data(&mut buffer).unwrap();
    assert_eq!(client.read_migration_data(&mut buffer).unwrap_err().errno(), Some(libc::EIO));
    client.set_device_state(RUNNING).unwrap();
    client.set_device_state(STOP_COPY).unwrap();
    let image = read_all(&mut client);
    let mut destination = device(DeviceConfig::default());
    destination.set_device_state(RESUMING).unwrap();
    destination.write_migration_data(&image).unwrap();
    destination.set_device_state(STOP).unwrap();
}

#[test]
fn data_fails_at_the_byte_it_is_told_to() {
    let (mut client, _ram) = programmed(with(Fault::DataReadError { at_byte: 10_000 }));
    client.set_device_state(STOP_COPY).unwrap();
    let mut buffer = vec![0; 4000];
    let mut read = || client.read_migration_data(&mut buffer);
    assert_eq!((read().unwrap(), read().unwrap()), (4000, 4000));
    assert_eq!(read().unwrap_err().errno(), Some(libc::EIO));
}

#[test]
fn corrupt_image_is_refused_and_only_a_reset_helps() {
    for at_byte in [0, 5_000, 200_000] {
        let (mut source, _ram) = programmed(with(Fault::CorruptData { at_byte }));
        source.set_device_state(STOP_COPY).unwrap();
        let image = read_all(&mut source);
        let mut destination = device(DeviceConfig::default());
        destination.set_device_state(RESUMING).unwrap();
        destination.write_migration_data(&image).unwrap();
        assert_eq!(destination.set_device_state(RUNNING).unwrap_err().errno(), Some(libc::EINVAL));
        assert_eq!(destination.device_state().unwrap(), DeviceState::Error as u32);
        for state in [RUNNING, STOP, RESUMING] {
            assert_eq!(destination.set_device_state(state).unwrap_err().errno(), Some(libc::EINVAL));
        }
        destination.reset().unwrap();
        assert_eq!(destination.device_state().unwrap(), RUNNING);
    }
}

#[test]
fn forgotten_writes_are_missing_from_the_log() {
    let (mut client, _ram) = programmed(with(Fault::ForgetWrites { every: 10 }));
    start_logging(&mut client);
    control::step(&mut client, 10).unwrap();
    let status = control::status(&mut client).unwrap();
    assert_eq!(report(&mut client).len(), written(&status, 0).len() - 1);
}

#[test]
fn reset_stops_the_engine_and_keeps_memory_and_log() {
    let (mut client, ram) = programmed(DeviceConfig::default());
    start_logging(&mut client);
    control::run(&mut client, true).unwrap();
    wait_for_position(&mut client, 100);
    client.reset().unwrap();
    let status = control::status(&mut client).unwrap();
    assert_eq!((status.running, status.position), (false, 0));
    let before = ram.contents();
    assert!(!report(&mut client).is_empty());
    control::program(&mut client, &stream(), 0).unwrap();
    control::step(&mut client, 300).unwrap();
    assert!(report(&mut client).is_superset(&changed_pages(&before, &ram.contents())));
}
