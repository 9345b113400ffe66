// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The client's messages, each against the device.

use super::*;

fn errno<T: std::fmt::Debug>(answer: Result<T, Error>) -> i32 {
    answer.unwrap_err().errno().unwrap()
}

#[test]
fn device_describes_itself() {
    let mut client = device(DeviceConfig::default());
    assert_eq!(client.capabilities().max_data_xfer_size, Some(1 << 20));
    assert_eq!(client.device_info().unwrap().num_regions.get(), 9);
    assert_eq!(client.region_info(0).unwrap().size.get(), 0x1000);
    assert_eq!(client.region_info(7).unwrap().size.get(), 0);
    assert_eq!(errno(client.region_info(9)), libc::EINVAL);
    assert_eq!(client.migration_flags().unwrap(), Some(0b101));
    assert!(client.supports(Feature::DmaLoggingReport, FEATURE_GET).unwrap());
    assert!(!client.supports(Feature::DmaLoggingReport, FEATURE_SET).unwrap());
}

#[test]
fn what_the_device_does_not_offer_is_absent() {
    let config = DeviceConfig { migration: false, dma_logging: false, ..DeviceConfig::default() };
    let mut client = device(config);
    assert_eq!(client.migration_flags().unwrap(), None);
    assert!(!client.supports(Feature::DmaLoggingStart, FEATURE_SET).unwrap());
    let mut client = device(DeviceConfig { pre_copy: false, ..DeviceConfig::default() });
    assert_eq!(client.migration_flags().unwrap(), Some(1));
    assert_eq!(errno(client.set_device_state(PRE_COPY)), libc::EINVAL);
    assert_eq!(client.device_state().unwrap(), RUNNING);
}

#[test]
fn mappings_are_exact() {
    let (mut client, ram) = (device(DeviceConfig::default()), Ram::new());
    ram.map(&mut client);
    let low = DmaRegion { iova: iova(PAGE, PAGE), file_offset: 0, writeable: true };
    let twice = client.dma_map(&low, Some(ram.files[0].as_fd()));
    assert!(matches!(twice, Err(Error::AlreadyMapped { .. })), "{twice:?}");
    assert_eq!(errno(client.dma_unmap(low.iova)), libc::ENOENT);
    client.dma_unmap(iova(0, 256 * PAGE)).unwrap();
    client.dma_map(&low, Some(ram.files[0].as_fd())).unwrap();
    assert_eq!(client.writeable_ranges(), [iova(1 << 32, 131 * PAGE), low.iova]);
}

#[test]
fn device_does_not_touch_memory_once_it_is_unmapped() {
    let (mut client, ram) = programmed(DeviceConfig::default());
    control::run(&mut client, true).unwrap();
    wait_for_position(&mut client, 50);
    for (start, bytes) in REGIONS {
        client.dma_unmap(iova(start, bytes)).unwrap();
    }
    let before = ram.contents();
    let position = control::status(&mut client).unwrap().position;
    wait_for_position(&mut client, position + 50);
    assert!(ram.contents() == before);
    assert!(control::status(&mut client).unwrap().missed >= 50);
}

#[test]
fn log_reports_exactly_the_pages_written_and_clears_them() {
    let (mut client, ram) = programmed(DeviceConfig::default());
    assert_eq!(start_logging(&mut client), Granule::KIB_4);
    let mut from = 0;
    for positions in [0, 1, 7, 60, 500] {
        let before = ram.contents();
        control::step(&mut client, positions).unwrap();
        let status = control::status(&mut client).unwrap();
        let dirty = report(&mut client);
        assert_eq!(dirty, written(&status, from));
        assert_eq!(dirty, changed_pages(&before, &ram.contents()));
        ram.assert_holds(&status);
        from = status.position;
    }
    assert!(report(&mut client).is_empty());
}

#[test]
fn nothing_is_logged_before_start_and_after_stop() {
    let (mut client, _ram) = programmed(DeviceConfig::default());
    control::step(&mut client, 20).unwrap();
    assert_eq!(errno(client.report_dma_log(iova(0, PAGE), Granule::KIB_4)), libc::EINVAL);
    start_logging(&mut client);
    assert!(report(&mut client).is_empty());
    control::step(&mut client, 20).unwrap();
    client.stop_dma_logging().unwrap();
    client.stop_dma_logging().unwrap();
    start_logging(&mut client);
    assert!(report(&mut client).is_empty());
}

#[test]
fn reports_of_a_running_device_lose_nothing_and_stop_is_exact() {
    let (mut client, ram) = programmed(DeviceConfig::default());
    start_logging(&mut client);
    let mut before = ram.contents();
    control::run(&mut client, true).unwrap();
    let mut from = 0;
    for _ in 0..10 {
        wait_for_position(&mut client, from + 40);
        let mut dirty = report(&mut client);
        wait_for_position(&mut client, from + 60);
        client.set_device_state(STOP).unwrap();
        let after = ram.contents();
        let status = control::status(&mut client).unwrap();
        thread::sleep(Duration::from_millis(5));
        assert!(ram.contents() == after, "DMA after STOP was answered");
        assert_eq!(control::status(&mut client).unwrap(), status);
        dirty.extend(report(&mut client));
        assert_eq!(dirty, written(&status, from));
        assert!(dirty.is_superset(&changed_pages(&before, &after)));
        ram.assert_holds(&status);
        (before, from) = (after, status.position);
        client.set_device_state(RUNNING).unwrap();
    }
}

#[test]
fn coarse_log_covers_what_was_written() {
    let config = DeviceConfig { log_page_bytes: Some(1 << 16), ..DeviceConfig::default() };
    let (mut client, _ram) = programmed(config);
    assert_eq!(start_logging(&mut client).bytes(), 1 << 16);
    control::step(&mut client, 10).unwrap();
    let status = control::status(&mut client).unwrap();
    let touched: BTreeSet<_> = written(&status, 0).into_iter().map(|page| page >> 16).collect();
    let expected: BTreeSet<_> = pages().filter(|page| touched.contains(&(page >> 16))).collect();
    assert_eq!(report(&mut client), expected);
}

#[test]
fn strict_device_wants_its_ranges_right_and_once() {
    let (mut client, _ram) = programmed(DeviceConfig::default());
    let overlap = [iova(0, 2 * PAGE), iova(PAGE, 2 * PAGE)];
    assert_eq!(errno(client.start_dma_logging(Granule::KIB_4, &overlap)), libc::EINVAL);
    let odd = [iova(PAGE, PAGE)];
    assert_eq!(errno(client.start_dma_logging(Granule::new(1 << 16).unwrap(), &odd)), libc::EINVAL);
    start_logging(&mut client);
    assert_eq!(errno(client.start_dma_logging(Granule::KIB_4, &[])), libc::EINVAL);
    client.report_dma_log(iova(8 * PAGE, 9 * PAGE), Granule::KIB_4).unwrap();
    let outside = iova(255 * PAGE, 2 * PAGE);
    assert_eq!(errno(client.report_dma_log(outside, Granule::KIB_4)), libc::EINVAL);
}

#[test]
fn common_c_server_takes_start_again_and_reports_whole_regions_only() {
    let config = DeviceConfig { behaviour: Behaviour::LibvfioUser, ..DeviceConfig::default() };
    let (mut client, _ram) = programmed(config);
    client.start_dma_logging(Granule::KIB_4, &[iova(0, PAGE)]).unwrap();
    client.start_dma_logging(Granule::KIB_4, &[]).unwrap();
    let other = client.start_dma_logging(Granule::new(1 << 16).unwrap(), &[]);
    assert_eq!(errno(other), libc::EINVAL);
    control::step(&mut client, 100).unwrap();
    assert_eq!(errno(client.report_dma_log(iova(0, 255 * PAGE), Granule::KIB_4)), libc::EOPNOTSUPP);
    let status = control::status(&mut client).unwrap();
    assert_eq!(report(&mut client), written(&status, 0), "the ranges of START are ignored");
    let unmappable = DmaRegion { iova: iova(1 << 40, PAGE), file_offset: 0, writeable: true };
    client.dma_map(&unmappable, None).unwrap();
    assert_eq!(errno(client.report_dma_log(unmappable.iova, Granule::KIB_4)), libc::EINVAL);
    assert_eq!(client.writeable_ranges().len(), 2);
}

#[test]
fn state_moves_to_another_device_which_goes_on_where_the_first_stopped() {
    for pre_copy in [true, false] {
        let (mut source, ram) = programmed(DeviceConfig { pre_copy, ..DeviceConfig::default() });
        control::run(&mut source, true).unwrap();
        let mut image = Vec::new();
        if pre_copy {
            source.set_device_state(PRE_COPY).unwrap();
            image = read_all(&mut source);
            assert!(image.len() > 256 << 10, "the initial bytes");
            let read_up_to = control::status(&mut source).unwrap().position;
            wait_for_position(&mut source, read_up_to + 100);
            let dirty = read_all(&mut source);
            assert!(!dirty.is_empty(), "what the device wrote since");
            image.extend(dirty);
        }
        wait_for_position(&mut source, 500);
        source.set_device_state(STOP_COPY).unwrap();
        image.extend(read_all(&mut source));
        assert!(read_all(&mut source).is_empty());
        let stopped = control::status(&mut source).unwrap();
        assert_eq!(errno(source.set_device_state(PRE_COPY)), libc::EINVAL);

        let mut destination = device(DeviceConfig::default());
        ram.map(&mut destination);
        destination.set_device_state(RESUMING).unwrap();
        image.chunks(7777).for_each(|part| destination.write_migration_data(part).unwrap());
        destination.set_device_state(STOP).unwrap();
        assert_eq!(control::status(&mut destination).unwrap(), stopped);
        ram.assert_holds(&stopped);
        destination.set_device_state(RUNNING).unwrap();
        wait_for_position(&mut destination, stopped.position + 100);
        destination.set_device_state(STOP).unwrap();
        ram.assert_holds(&control::status(&mut destination).unwrap());
    }
}

#[test]
fn migration_data_is_cut_to_what_both_sides_take() {
    let (mut source, _ram) =
        programmed(DeviceConfig { max_data_xfer_bytes: 5000, ..DeviceConfig::default() });
    assert_eq!(source.data_xfer_bytes(), 5000);
    source.set_device_state(STOP_COPY).unwrap();
    let image = read_all(&mut source);
    let small = Options { max_data_xfer_bytes: 4096, ..options() };
    let (mut destination, _) = device_with(DeviceConfig::default(), &small);
    destination.set_device_state(RESUMING).unwrap();
    destination.write_migration_data(&image).unwrap();
    destination.set_device_state(STOP).unwrap();
    assert_eq!(control::status(&mut source).unwrap(), control::status(&mut destination).unwrap());
}

#[test]
fn registers_that_shape_the_stream_are_fixed_while_it_runs() {
    let (mut client, _ram) = programmed(DeviceConfig::default());
    control::run(&mut client, true).unwrap();
    let seed = client.region_write(0, 0x10, &7_u64.to_le_bytes());
    assert_eq!(errno(seed), libc::EBUSY);
    client.set_device_state(STOP).unwrap();
    assert_eq!(errno(control::step(&mut client, 1)), libc::EBUSY);
    assert_eq!(errno(client.region_read(0, 0x1000, &mut [0; 8])), libc::EINVAL);
    assert_eq!(errno(client.region_read(0, 4, &mut [0; 8])), libc::EINVAL);
    assert_eq!(errno(client.region_read(1, 0, &mut [0; 8])), libc::EINVAL);
}
