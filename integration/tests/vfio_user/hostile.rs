// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Servers that do what the protocol's text does not expect: the right result, or a clear error in bounded time.

use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use vfio_migration::device::{Device, DeviceError, DeviceSet};
use vfio_migration::vfio_user::feature::{
    FeatureHeader, MIGRATION_PRE_COPY, MIGRATION_STOP_COPY, MigrationFeature,
};
use vfio_migration::vfio_user::message::{HEADER_BYTES, Header, MessageKind, MigData};
use vfio_migration::vfio_user::version::{PeerCapabilities, Version};
use zerocopy::IntoBytes;

use super::*;

/// Sets how many MiB of state [`a_large_state_moves_to_another_device`] moves.
const STATE_MIB: &str = "VFIO_MIGRATE_TEST_STATE_MIB";

fn shared(client: Client) -> SharedClient {
    Arc::new(Mutex::new(client))
}

fn set_of(client: &SharedClient) -> DeviceSet {
    let io = VfioUserDevice::new(Arc::clone(client)).unwrap();
    DeviceSet::new(vec![Device::new("dma0", Box::new(io))]).unwrap()
}

/// Saves the state of a device with a programmed stream, loads it into another, and asserts that they are alike.
fn assert_moves(config: &DeviceConfig) -> (u64, Duration, Duration) {
    let (source, _ram) = programmed(config.clone());
    let source = shared(source);
    control::step(&mut source.lock().unwrap(), 500).unwrap();
    let mut devices = set_of(&source);
    devices.start_precopy().unwrap();
    devices.precopy_step(u64::MAX).unwrap();
    devices.stop_for_copy().unwrap();
    let begun = Instant::now();
    let tree = devices.save().unwrap();
    let saved = begun.elapsed();

    let destination = shared(device(config.clone()));
    let mut restored = set_of(&destination);
    let begun = Instant::now();
    restored.load(&tree).unwrap();
    let loaded = begun.elapsed();
    let status = |client: &SharedClient| control::status(&mut client.lock().unwrap()).unwrap();
    assert_eq!(status(&destination), status(&source));
    (devices.state_bytes(), saved, loaded)
}

#[test]
fn c58_a_state_handed_out_in_short_pieces_arrives_whole() {
    for (pre_copy, behaviour) in [(true, Behaviour::Strict), (false, Behaviour::LibvfioUser)] {
        let config =
            DeviceConfig { pre_copy, behaviour, state_piece_bytes: Some(30_000), ..DeviceConfig::default() };
        let (state_bytes, ..) = assert_moves(&config);
        assert!(state_bytes > 256 << 10, "{state_bytes} bytes");
    }
}

#[test]
fn c59_a_server_that_reads_with_one_recv_takes_a_state_under_load() {
    let done = Arc::new(AtomicBool::new(false));
    let load: Vec<_> = (0..4)
        .map(|_| {
            let done = Arc::clone(&done);
            thread::spawn(move || while !done.load(Ordering::Relaxed) {})
        })
        .collect();
    let config = DeviceConfig {
        state_bytes: 8 << 20,
        behaviour: Behaviour::LibvfioUser,
        max_data_xfer_bytes: 16 << 20,
        ..DeviceConfig::default()
    };
    let moved = std::panic::catch_unwind(|| assert_moves(&config));
    done.store(true, Ordering::Relaxed);
    load.into_iter().for_each(|thread| thread.join().unwrap());
    moved.unwrap();
}

#[test]
fn a_large_state_moves_to_another_device() {
    let mib = std::env::var(STATE_MIB).map_or(64, |mib| mib.parse::<u64>().unwrap());
    let config =
        DeviceConfig { state_bytes: mib << 20, behaviour: Behaviour::LibvfioUser, ..DeviceConfig::default() };
    let (state_bytes, saved, loaded) = assert_moves(&config);
    assert!(state_bytes >= mib << 20);
    eprintln!("{state_bytes} bytes of state saved in {saved:?} and loaded in {loaded:?}");
}

/// What a scripted server answers beside VERSION: the payload of a reply, or an errno.
type Answer = Result<Vec<u8>, i32>;

/// Runs a server of a migratable device whose states and data `script` has.
fn scripted(mut script: impl FnMut(&Header, &[u8]) -> Answer + Send + 'static) -> SharedClient {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    thread::spawn(move || {
        let mut bytes = [0; HEADER_BYTES];
        while theirs.read_exact(&mut bytes).is_ok() {
            let header = Header::decode(&bytes).unwrap();
            let mut payload = vec![0; header.payload_bytes()];
            theirs.read_exact(&mut payload).unwrap();
            let answer = match header.command() {
                1 => Ok(Version::current(PeerCapabilities::default()).encode()),
                _ => script(&header, &payload),
            };
            let (kind, payload) = match answer {
                Ok(payload) => (MessageKind::Reply, payload),
                Err(errno) => (MessageKind::ErrorReply { errno }, Vec::new()),
            };
            let reply = Header::new(header.id(), header.command(), kind, payload.len()).unwrap();
            if theirs.write_all(&[&reply.encode()[..], &payload].concat()).is_err() {
                break;
            }
        }
    });
    shared(Client::connect(ours, "dma0", &options()).unwrap())
}

/// A device that is in `state` and goes wherever `allows` lets it, whatever `reset` makes of it.
fn resettable(
    state: u32,
    allows: fn(u32) -> bool,
    reset: fn(u32) -> Result<u32, i32>,
) -> (SharedClient, Arc<Mutex<Vec<u32>>>) {
    let visited = Arc::new(Mutex::new(vec![state]));
    let seen = Arc::clone(&visited);
    let client = scripted(move |header, payload| {
        let mut visited = visited.lock().unwrap();
        let now = *visited.last().unwrap();
        match (header.command(), payload.get(4..8)) {
            (13, _) => {
                let next = reset(now)?;
                visited.extend((next != now).then_some(next));
                Ok(Vec::new())
            }
            (16, Some([1, ..])) => {
                Ok([&payload[..8], MigrationFeature { flags: 5.into() }.as_bytes()].concat())
            }
            (16, Some([2, 0, 1, 0])) => Ok([&payload[..8], &now.to_le_bytes(), &[0; 4]].concat()),
            (16, Some([2, 0, 2, 0])) if allows(u32::from(payload[8])) => {
                visited.push(payload[8].into());
                Ok(payload.to_vec())
            }
            _ => Err(libc::EINVAL),
        }
    });
    (client, seen)
}

fn reset(client: &SharedClient) -> Result<(), DeviceError> {
    VfioUserDevice::new(Arc::clone(client)).unwrap().reset()
}

#[test]
fn c60_a_device_that_a_reset_leaves_where_it_is_is_moved_to_running() {
    for (state, way) in [(RESUMING, &[RESUMING, STOP, RUNNING][..]), (PRE_COPY, &[PRE_COPY, RUNNING])] {
        let (client, visited) = resettable(state, |_| true, Ok);
        reset(&client).unwrap();
        assert_eq!(*visited.lock().unwrap(), way);
    }
    let refused = |state| if [STOP, STOP_COPY].contains(&state) { Err(libc::EINVAL) } else { Ok(state) };
    for (state, way) in [(STOP_COPY, &[STOP_COPY, STOP, RUNNING][..]), (STOP, &[STOP, RUNNING])] {
        let (client, visited) = resettable(state, |_| true, refused);
        reset(&client).unwrap();
        assert_eq!(*visited.lock().unwrap(), way);
    }
}

#[test]
fn c60_a_device_that_no_reset_makes_run_is_not_said_to_run() {
    let (client, visited) = resettable(RESUMING, |state| state != STOP, Ok);
    let error = reset(&client).unwrap_err();
    assert_eq!(error.cause.to_string(), "vfio-user device dma0 is in RESUMING after a reset");
    assert!(!error.gone && *visited.lock().unwrap() == [RESUMING]);
    let (client, _) = resettable(0, |_| true, Ok);
    let error = reset(&client).unwrap_err();
    assert_eq!(error.cause.to_string(), "vfio-user device dma0 is in ERROR after a reset");
    let (client, _) = resettable(RUNNING, |_| true, |_| Err(libc::EBUSY));
    assert!(reset(&client).unwrap_err().cause.to_string().contains("refused DEVICE_RESET"));
    let (client, _) = resettable(RESUMING, |_| true, |_| Ok(99));
    assert!(reset(&client).unwrap_err().cause.to_string().contains("says it is in state 99"));
}

#[test]
fn c60_a_device_like_the_c_librarys_runs_after_a_reset_from_any_state() {
    let config = DeviceConfig { behaviour: Behaviour::LibvfioUser, ..DeviceConfig::default() };
    for state in [RUNNING, STOP, STOP_COPY, RESUMING, PRE_COPY] {
        let (mut client, _ram) = programmed(config.clone());
        client.set_device_state(state).unwrap();
        let client = shared(client);
        reset(&client).unwrap();
        let mut client = client.lock().unwrap();
        assert_eq!(client.device_state().unwrap(), RUNNING);
        assert_eq!(control::status(&mut client).unwrap().position, 0, "wiped, from {state}");
    }
}

#[test]
fn c61_a_server_that_trickles_its_state_holds_nobody_up() {
    let mut state = RUNNING;
    let client = scripted(move |header, payload| match (header.command(), payload.get(4..8)) {
        (16, Some([1, ..])) => {
            let flags = (MIGRATION_STOP_COPY | MIGRATION_PRE_COPY).into();
            Ok([&payload[..8], MigrationFeature { flags }.as_bytes()].concat())
        }
        (16, Some([2, 0, 1, 0])) => Ok([&payload[..8], &state.to_le_bytes(), &[0; 4]].concat()),
        (16, Some([2, 0, 2, 0])) => {
            state = payload[8].into();
            Ok(payload.to_vec())
        }
        (17, _) => {
            thread::sleep(Duration::from_millis(500));
            Ok([MigData { argsz: 9.into(), size: 1.into() }.as_bytes(), &[7]].concat())
        }
        _ => Err(libc::EINVAL),
    });
    assert_eq!(size_of::<FeatureHeader>(), 8);
    let mut devices = set_of(&client);
    devices.start_precopy().unwrap();
    let begun = Instant::now();
    assert!(devices.precopy_step(1 << 20).unwrap().drained, "what it has left follows in STOP_COPY");
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    devices.stop_for_copy().unwrap();
    let begun = Instant::now();
    let error = devices.save().err().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(25), "{:?}", begun.elapsed());
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.starts_with("Device moves its state too slowly: after 2"), "{source}");
    devices.abort_to_running().unwrap();
    assert_eq!(client.lock().unwrap().device_state().unwrap(), RUNNING);
}
