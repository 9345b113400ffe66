// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`VfioUserSource`] and [`VfioUserDevice`] where they differ from the client they stand on.

use super::*;

struct Tracked {
    client: SharedClient,
    ram: Ram,
    source: VfioUserSource,
    ledger: Ledger,
    cursor: CursorId,
    map: IovaMap,
}

impl Tracked {
    fn start(config: DeviceConfig, map: IovaMap) -> Self {
        let (client, ram) = programmed(config);
        Self::over(client, ram, map)
    }

    fn over(client: Client, ram: Ram, map: IovaMap) -> Self {
        let client = Arc::new(Mutex::new(client));
        let ranges = REGIONS.map(|(start, bytes)| GpaRange::new(start, bytes).unwrap());
        let mut ledger = Ledger::new(Layout::new(ranges, Granule::KIB_4).unwrap(), 1);
        let cursor = ledger.open(Start::Copied);
        let mut source = VfioUserSource::new("device-log:dma0", Arc::clone(&client)).unwrap();
        source.start(ledger.layout(), &map).unwrap();
        Tracked { client, ram, source, ledger, cursor, map }
    }

    fn step(&self, positions: u64) -> Status {
        let client = &mut self.client.lock().unwrap();
        control::step(client, positions).unwrap();
        control::status(client).unwrap()
    }

    fn collect(&mut self) -> Result<BTreeSet<u64>, SourceError> {
        self.source.collect(&mut self.ledger.sink(0, &self.map))?;
        Ok(self.absorbed())
    }

    fn absorbed(&mut self) -> BTreeSet<u64> {
        self.ledger.absorb();
        let mut pages = BTreeSet::new();
        self.ledger.begin_round(self.cursor);
        while let Some(chunk) = self.ledger.take(self.cursor, ChunkLimits::NONE) {
            pages.extend(
                chunk.ranges().iter().flat_map(|range| (range.start()..range.end()).step_by(PAGE_BYTES)),
            );
            self.ledger.commit(chunk);
        }
        pages
    }
}

fn cause(error: &SourceError) -> &VfioUserSourceError {
    error.cause.downcast_ref().unwrap()
}

#[test]
fn source_reports_what_the_device_wrote_through_either_server() {
    for behaviour in [Behaviour::Strict, Behaviour::LibvfioUser] {
        let mut tracked =
            Tracked::start(DeviceConfig { behaviour, ..DeviceConfig::default() }, IovaMap::Identity);
        let mut from = 0;
        for positions in [0, 3, 200] {
            let status = tracked.step(positions);
            assert_eq!(tracked.collect().unwrap(), written(&status, from));
            from = status.position;
        }
        assert_eq!(tracked.source.cover().ranges.len(), 2);
        assert!(tracked.source.cover().precise);
    }
}

#[test]
fn granule_that_does_not_fit_a_region_is_reported_by_page() {
    let config = DeviceConfig { log_page_bytes: Some(2 << 20), ..DeviceConfig::default() };
    let mut tracked = Tracked::start(config, IovaMap::Identity);
    let status = tracked.step(5);
    assert!(tracked.collect().unwrap().is_superset(&written(&status, 0)));
}

#[test]
fn failed_report_says_the_log_is_lost_and_the_next_one_is_good() {
    let config = DeviceConfig { faults: vec![Fault::ReportError { after: 3 }], ..DeviceConfig::default() };
    let mut tracked = Tracked::start(config, IovaMap::Identity);
    tracked.step(10);
    tracked.collect().unwrap();
    tracked.step(10);
    let error = tracked.collect().unwrap_err();
    assert_eq!(error.to_string(), "Dirty source device-log:dma0 cannot report dirty pages");
    assert!(matches!(cause(&error), VfioUserSourceError::Client(Error::Refused { errno: libc::EIO, .. })));
    tracked.absorbed();
    let from = control::status(&mut tracked.client.lock().unwrap()).unwrap().position;
    let status = tracked.step(10);
    assert_eq!(tracked.collect().unwrap(), written(&status, from), "logging was started anew");
}

#[test]
fn stopped_source_can_be_started_again_and_stopped_twice() {
    let mut tracked = Tracked::start(DeviceConfig::default(), IovaMap::Identity);
    tracked.step(10);
    tracked.source.stop().unwrap();
    tracked.source.stop().unwrap();
    assert!(matches!(cause(&tracked.collect().unwrap_err()), VfioUserSourceError::NotRunning { .. }));
    tracked.source.start(tracked.ledger.layout(), &IovaMap::Identity).unwrap();
    assert!(tracked.collect().unwrap().is_empty());
}

#[test]
fn device_without_logging_makes_no_source() {
    let client = device(DeviceConfig { dma_logging: false, ..DeviceConfig::default() });
    let error = VfioUserSource::new("device-log:dma0", Arc::new(Mutex::new(client))).unwrap_err();
    assert!(matches!(error, VfioUserSourceError::NoLogging { .. }), "{error}");
}

#[test]
fn device_without_migration_makes_no_device() {
    let client = device(DeviceConfig { migration: false, ..DeviceConfig::default() });
    let error = VfioUserDevice::new(Arc::new(Mutex::new(client))).unwrap_err();
    assert!(matches!(error, VfioUserDeviceError::NotMigratable { .. }), "{error}");
}

/// Maps a part of the RAM where a virtual IOMMU's guest wants it.
fn map_at(tracked: &mut Tracked, at: u64, gpa: u64, bytes: u64) -> Mapping {
    let mapping = Mapping::new(iova(at, bytes), GpaRange::new(gpa, bytes).unwrap()).unwrap();
    let region = DmaRegion { iova: mapping.iova(), file_offset: gpa, writeable: true };
    tracked.client.lock().unwrap().dma_map(&region, Some(tracked.ram.files[0].as_fd())).unwrap();
    tracked.map.map(mapping).unwrap();
    tracked.source.mapped(&mapping).unwrap();
    mapping
}

#[test]
fn mappings_of_a_virtual_iommu_are_logged_as_they_come_and_reported_before_they_go() {
    for behaviour in [Behaviour::Strict, Behaviour::LibvfioUser] {
        let config = DeviceConfig { behaviour, ..DeviceConfig::default() };
        let mut tracked = Tracked::start(config, IovaMap::journal());
        let mapping = map_at(&mut tracked, 1 << 40, 16 * PAGE, 32 * PAGE);
        let windows = vec![Window::new(1 << 40, 32 * PAGE).unwrap()];
        let client = Arc::clone(&tracked.client);
        control::program(&mut client.lock().unwrap(), &Stream { seed: 1, windows }, 0).unwrap();
        let translate = |page: u64| page - (1 << 40) + 16 * PAGE;
        let status = tracked.step(5);
        let expected: BTreeSet<_> = written(&status, 0).into_iter().map(translate).collect();
        assert_eq!(tracked.collect().unwrap(), expected);
        let later = tracked.step(5);
        tracked.source.unmapped(&mapping, &mut tracked.ledger.sink(0, &tracked.map)).unwrap();
        client.lock().unwrap().dma_unmap(mapping.iova()).unwrap();
        tracked.map.forget(&mapping);
        let expected: BTreeSet<_> = written(&later, status.position).into_iter().map(translate).collect();
        assert_eq!(tracked.absorbed(), expected);
        assert!(tracked.collect().unwrap().is_empty());
        assert_eq!(tracked.source.cover().ranges.len(), 2, "a lost log may have held any page");
    }
}

#[test]
fn c07_a_report_that_fails_before_an_unmap_loses_no_other_mappings_writes() {
    // Three probes and START come before the report that is refused.
    let when = When { command: Some(16), nth: 5 };
    let faults = vec![Fault::Refuse { when, errno: libc::EIO }];
    let mut tracked = Tracked::start(DeviceConfig { faults, ..DeviceConfig::default() }, IovaMap::journal());
    let going = map_at(&mut tracked, 1 << 40, 0, 16 * PAGE);
    map_at(&mut tracked, 1 << 41, 16 * PAGE, 32 * PAGE);
    let windows = vec![Window::new(1 << 41, 32 * PAGE).unwrap()];
    let client = Arc::clone(&tracked.client);
    control::program(&mut client.lock().unwrap(), &Stream { seed: 1, windows }, 0).unwrap();
    let status = tracked.step(5);
    let expected: BTreeSet<_> =
        written(&status, 0).into_iter().map(|page| page - (1 << 41) + 16 * PAGE).collect();
    tracked.source.unmapped(&going, &mut tracked.ledger.sink(0, &tracked.map)).unwrap_err();
    client.lock().unwrap().dma_unmap(going.iova()).unwrap();
    tracked.map.forget(&going);
    match tracked.collect() {
        Ok(reported) => {
            assert!(reported.is_superset(&expected), "lost {:x?}", expected.difference(&reported));
        }
        Err(_) => drop(tracked.absorbed()),
    }
    let from = status.position;
    let status = tracked.step(5);
    let expected: BTreeSet<_> =
        written(&status, from).into_iter().map(|page| page - (1 << 41) + 16 * PAGE).collect();
    assert_eq!(tracked.collect().unwrap(), expected, "the next report is good");
}

/// The second region of a device that had the first alone when its log was switched on, as the tracker and the device are told of it.
fn plug(tracked: &mut Tracked) -> Result<(), SourceError> {
    let (start, bytes) = REGIONS[1];
    tracked.source.mapped(&Mapping::identity(GpaRange::new(start, bytes).unwrap()))?;
    let region = DmaRegion { iova: iova(start, bytes), file_offset: 0, writeable: true };
    tracked.client.lock().unwrap().dma_map(&region, Some(tracked.ram.files[1].as_fd())).unwrap();
    Ok(())
}

fn without_second_region(config: DeviceConfig) -> Tracked {
    let (mut client, ram) = programmed(config);
    client.dma_unmap(iova(REGIONS[1].0, REGIONS[1].1)).unwrap();
    let windows = vec![Window::new(8 * PAGE, 120 * PAGE).unwrap()];
    control::program(&mut client, &Stream { seed: 3, windows }, 0).unwrap();
    Tracked::over(client, ram, IovaMap::Identity)
}

#[test]
fn memory_that_is_mapped_later_is_logged_too_and_the_gap_counts_as_written() {
    for behaviour in [Behaviour::Strict, Behaviour::LibvfioUser] {
        let mut tracked = without_second_region(DeviceConfig { behaviour, ..DeviceConfig::default() });
        tracked.step(5);
        plug(&mut tracked).unwrap();
        assert_eq!(tracked.collect().unwrap(), pages().collect(), "once: {behaviour:?}");
        control::program(&mut tracked.client.lock().unwrap(), &stream(), 0).unwrap();
        let from = tracked.step(0).position;
        let status = tracked.step(200);
        let expected = written(&status, from);
        assert!(expected.iter().any(|page| *page >= REGIONS[1].0));
        assert_eq!(tracked.collect().unwrap(), expected, "{behaviour:?}");
    }
}

#[test]
fn memory_mapped_later_is_refused_where_the_device_logs_not_everything() {
    // Three probes and START, then STOP; the next START is that of everything.
    let when = When { command: Some(16), nth: 6 };
    let faults = vec![Fault::Refuse { when, errno: libc::ENOTSUP }];
    let mut tracked = without_second_region(DeviceConfig { faults, ..DeviceConfig::default() });
    tracked.step(5);
    let error = plug(&mut tracked).unwrap_err();
    assert!(matches!(cause(&error), VfioUserSourceError::MappedLater { .. }), "{error}");
    let first: BTreeSet<_> = pages().filter(|page| *page < REGIONS[1].0).collect();
    assert_eq!(tracked.collect().unwrap(), first);
    let from = tracked.step(0).position;
    let status = tracked.step(5);
    assert_eq!(tracked.collect().unwrap(), written(&status, from), "as before");
}

#[test]
fn memory_known_at_the_start_is_mapped_without_a_word_to_the_device() {
    let mut tracked = Tracked::start(DeviceConfig::default(), IovaMap::Identity);
    let known = Mapping::identity(GpaRange::new(PAGE, PAGE).unwrap());
    tracked.source.mapped(&known).unwrap();
    assert!(tracked.collect().unwrap().is_empty(), "no gap");
}

#[test]
fn end_of_data_is_told_from_its_temporary_end() {
    let (client, _ram) = programmed(DeviceConfig::default());
    let client = Arc::new(Mutex::new(client));
    let mut device = VfioUserDevice::new(Arc::clone(&client)).unwrap();
    assert!(device.capabilities().pre_copy && !device.capabilities().p2p);
    let mut buffer = vec![0; 1 << 20];
    assert!(device.read_data(&mut buffer).is_err(), "RUNNING has no data");
    device.set_state(DeviceState::PreCopy).unwrap();
    assert!(matches!(device.read_data(&mut buffer), Ok(DataRead::Bytes(_))));
    assert!(matches!(device.read_data(&mut buffer), Ok(DataRead::NothingNow)));
    assert!(matches!(device.read_data(&mut buffer), Ok(DataRead::NothingNow)));
    control::step(&mut client.lock().unwrap(), 64).unwrap();
    assert!(matches!(device.read_data(&mut buffer), Ok(DataRead::Bytes(_))));
    device.set_state(DeviceState::StopCopy).unwrap();
    assert!(matches!(device.read_data(&mut buffer), Ok(DataRead::Bytes(_))));
    assert!(matches!(device.read_data(&mut buffer), Ok(DataRead::End)));
    assert!(matches!(device.read_data(&mut buffer), Ok(DataRead::End)));
    assert_eq!((device.precopy_info().unwrap(), device.data_size().unwrap()), (None, None));
    device.reset().unwrap();
    assert_eq!(device.state().unwrap(), DeviceState::Running);
}
