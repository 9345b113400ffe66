// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Devices in processes of their own, as the demo runs them.

use super::*;

/// Is the body of a device process, which [`DeviceProcess::spawn`] runs this very test binary for.
#[test]
#[ignore = "the body of the device processes that other tests start"]
fn device_process() {
    let Ok(socket) = std::env::var(SOCKET) else {
        vfio_migration_integration::skipped(
            "device process",
            format!("{SOCKET} is not set; this is no test of its own"),
        );
        return;
    };
    let config = serde_json::from_str(&std::env::var(CONFIG).unwrap()).unwrap();
    DmaDevice::serve(UnixStream::connect(socket).unwrap(), config).unwrap();
}

struct DeviceProcess {
    child: Child,
    client: SharedClient,
}

impl DeviceProcess {
    fn spawn(config: &DeviceConfig, ram: &Ram) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("device.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "process::device_process", "--nocapture"])
            .env(SOCKET, &path)
            .env(CONFIG, serde_json::to_string(config).unwrap())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let stream = accept(&listener);
        let mut client = Client::connect(stream, "dma0", &options()).unwrap();
        ram.map(&mut client);
        DeviceProcess { child, client: Arc::new(Mutex::new(client)) }
    }

    fn status(&self) -> Status {
        control::status(&mut self.client.lock().unwrap()).unwrap()
    }
}

/// Waits for the device process, which may have died before it connected.
fn accept(listener: &UnixListener) -> UnixStream {
    listener.set_nonblocking(true).unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        match listener.accept() {
            Ok((stream, _)) => return stream,
            Err(error) => assert!(Instant::now() < deadline, "no device process connects: {error}"),
        }
        thread::sleep(Duration::from_millis(2));
    }
}

impl Drop for DeviceProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Copies what `cursor` says from one RAM to the other and returns how many pages that was.
fn copy_round(ledger: &mut Ledger, cursor: CursorId, from: &Ram, to: &Ram) -> usize {
    let mut copied = 0;
    ledger.begin_round(cursor);
    while let Some(chunk) = ledger.take(cursor, ChunkLimits::NONE) {
        for range in chunk.ranges() {
            for page in (range.start()..range.end()).step_by(PAGE_BYTES) {
                to.write_page(page, &from.page(page));
                copied += 1;
            }
        }
        ledger.commit(chunk);
    }
    copied
}

fn read_data(device: &mut VfioUserDevice, end: DataRead) -> Vec<u8> {
    let (mut data, mut buffer) = (Vec::new(), vec![0; 64 << 10]);
    loop {
        match device.read_data(&mut buffer).unwrap() {
            DataRead::Bytes(read) => data.extend_from_slice(&buffer[..read]),
            other => {
                assert_eq!(other, end);
                return data;
            }
        }
    }
}

#[test]
fn running_device_moves_to_another_process_without_losing_a_page() {
    for behaviour in [Behaviour::Strict, Behaviour::LibvfioUser] {
        let config = DeviceConfig { state_bytes: 1 << 20, behaviour, ..DeviceConfig::default() };
        let (ram, copy) = (Ram::new(), Ram::new());
        let layout =
            Layout::new(REGIONS.map(|(start, bytes)| GpaRange::new(start, bytes).unwrap()), Granule::KIB_4);
        let mut ledger = Ledger::new(layout.unwrap(), 1);
        let cursor = ledger.open(Start::Empty);

        let source = DeviceProcess::spawn(&config, &ram);
        control::program(&mut source.client.lock().unwrap(), &stream(), 5_000).unwrap();
        let mut device = VfioUserDevice::new(Arc::clone(&source.client)).unwrap();
        let mut log = VfioUserSource::new("device-log:dma0", Arc::clone(&source.client)).unwrap();
        log.start(ledger.layout(), &IovaMap::Identity).unwrap();
        control::run(&mut source.client.lock().unwrap(), true).unwrap();

        device.set_state(DeviceState::PreCopy).unwrap();
        let mut image = Vec::new();
        for round in 0..5 {
            let copied = copy_round(&mut ledger, cursor, &ram, &copy);
            assert!(copied < 200 || round == 0, "{copied} pages in round {round}");
            image.extend(read_data(&mut device, DataRead::NothingNow));
            thread::sleep(Duration::from_millis(10));
            log.collect(&mut ledger.sink(0, &IovaMap::Identity)).unwrap();
            ledger.absorb();
        }
        device.set_state(DeviceState::StopCopy).unwrap();
        log.collect(&mut ledger.sink(0, &IovaMap::Identity)).unwrap();
        ledger.absorb();
        copy_round(&mut ledger, cursor, &ram, &copy);
        image.extend(read_data(&mut device, DataRead::End));
        let stopped = source.status();
        assert!(ram.contents() == copy.contents());
        copy.assert_holds(&stopped);

        let destination = DeviceProcess::spawn(&config, &copy);
        let mut restored = VfioUserDevice::new(Arc::clone(&destination.client)).unwrap();
        restored.set_state(DeviceState::Resuming).unwrap();
        image.chunks(10_000).for_each(|part| restored.write_data(part).unwrap());
        restored.set_state(DeviceState::Stop).unwrap();
        assert_eq!(destination.status(), stopped);
        restored.set_state(DeviceState::Running).unwrap();
        wait_for_position(&mut destination.client.lock().unwrap(), stopped.position + 50);
        restored.set_state(DeviceState::Stop).unwrap();
        copy.assert_holds(&destination.status());
        ram.assert_holds(&stopped);
        log.stop().unwrap();
    }
}

#[test]
fn killed_device_process_fails_the_next_request_by_name() {
    let ram = Ram::new();
    let mut source = DeviceProcess::spawn(&DeviceConfig::default(), &ram);
    let mut device = VfioUserDevice::new(Arc::clone(&source.client)).unwrap();
    source.child.kill().unwrap();
    source.child.wait().unwrap();
    let error = device.set_state(DeviceState::StopCopy).unwrap_err();
    assert_eq!(error.to_string(), "Device cannot move to STOP_COPY");
    assert!(error.cause.to_string().contains("dma0 closed its connection"), "{}", error.cause);
}

#[test]
fn device_process_ends_when_its_client_hangs_up() {
    let ram = Ram::new();
    let mut source = DeviceProcess::spawn(&DeviceConfig::default(), &ram);
    let (spare, _) = device_with(DeviceConfig::default(), &options());
    *source.client.lock().unwrap() = spare;
    let deadline = Instant::now() + Duration::from_secs(20);
    while source.child.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "the process is still there");
        thread::sleep(Duration::from_millis(5));
    }
    assert!(source.child.wait().unwrap().success());
}
