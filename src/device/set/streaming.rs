// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! All devices of a VM whose states go from one end to the other as streams, several at a time, ahead of the Snapshot tree.

use super::{Attempt, DeviceSet, DeviceSetError, Phase, failed};
use crate::device::DeviceState;
use crate::device::identity::StreamIdentity;
use crate::device::member::Device;
use crate::device::outgoing::StreamLeft;
use crate::device::reader::{StateRead, StateReader};
use crate::device::sink::StateSink;

impl DeviceSet {
    /// Who the devices are to the other end of their streams, in the order in which they were given.
    pub fn stream_identities(&self) -> Vec<StreamIdentity> {
        self.devices.iter().map(Device::stream_identity).collect()
    }

    /// The name of the device whose stream has this number.
    pub(crate) fn name_of_stream(&self, number: u16) -> Option<&str> {
        let device = self.devices.iter().find(|device| device.stream_number() == Some(number))?;
        Some(&device.identity().name)
    }

    /// What each device whose state streams had left for the downtime when all were last asked.
    pub(crate) fn streams_left(&self) -> impl Iterator<Item = StreamLeft> {
        self.devices.iter().filter_map(Device::stream_left)
    }

    /// The device whose stream is known to have most, and how many bytes, when all were last asked.
    pub(crate) fn longest_stream(&self) -> Option<(&str, u64)> {
        let streaming = self.devices.iter().filter(|device| device.is_streaming());
        let longest = streaming.max_by_key(|device| device.known_bytes())?;
        Some((&longest.identity().name, longest.known_bytes()))
    }

    /// Streams the states of the devices in `listed`; each device's number is its place in the list.
    pub(crate) fn begin_streaming(&mut self, listed: &[StreamIdentity]) {
        for device in &mut self.devices {
            let number = (0..).zip(listed).find(|(_, listed)| listed.name == device.identity().name);
            if let Some((number, _)) = number {
                device.begin_streaming(number);
            }
        }
    }

    /// Puts all states into the Snapshot tree again, and streams none.
    pub(crate) fn end_streaming(&mut self) {
        self.devices.iter_mut().for_each(Device::end_streaming);
    }

    /// Returns a reader for each running device that has state worth reading now; each reader runs on its own thread.
    ///
    /// Beside them are the failures of the others: such a device's whole state follows in STOP_COPY. Or something reset it: it is in
    /// PRE_COPY again, and its state begins anew.
    pub(crate) fn precopy_readers(&mut self) -> (Vec<StateReader>, Vec<DeviceSetError>) {
        let (mut readers, mut failures) = (Vec::new(), Vec::new());
        if self.phase != Phase::Running {
            return (readers, failures);
        }
        for device in &mut self.devices {
            let mut next = || device.restart_after_reset().and_then(|()| device.precopy_reader());
            match next() {
                Ok(reader) => readers.extend(reader),
                Err(failure) => {
                    // It may have begun anew.
                    readers.extend(next().ok().flatten());
                    failures.push(failed(device, Attempt::Precopy)(failure));
                }
            }
        }
        (readers, failures)
    }

    /// Has running devices that something reset since they were last read enter PRE_COPY again.
    ///
    /// # Errors
    /// One was reset, and its state begins anew. All were looked at.
    pub(crate) fn restart_after_resets(&mut self) -> Result<(), DeviceSetError> {
        let restart =
            |device: &mut Device| device.restart_after_reset().map_err(failed(device, Attempt::Precopy));
        self.devices.iter_mut().map(restart).fold(Ok(()), Result::and)
    }

    /// Returns what reads the states of the stopped devices to their ends, each on a thread of its own.
    ///
    /// # Errors
    /// A device failed, or is not stopped.
    pub(crate) fn final_readers(&mut self) -> Result<Vec<StateReader>, DeviceSetError> {
        let readers = self.devices.iter_mut().map(|device| {
            let reader = device.final_reader();
            reader.map_err(failed(device, Attempt::Save)).transpose()
        });
        readers.flatten().collect()
    }

    /// Records a finished turn of a device's reader, after all its bytes have arrived at the destination.
    ///
    /// # Errors
    /// The device failed, and what it handed over in this session is worth nothing.
    pub(crate) fn finish_read(&mut self, read: StateRead) -> Result<(), DeviceSetError> {
        let number = read.device;
        let attempt = if self.phase == Phase::Running { Attempt::Precopy } else { Attempt::Save };
        let device = self.devices.iter_mut().find(|device| device.stream_number() == Some(number));
        // Unplugged meanwhile.
        let Some(device) = device else { return Ok(()) };
        let finished = device.finish_read(read);
        let restarted = if attempt == Attempt::Precopy { device.restart_after_reset() } else { Ok(()) };
        finished.and(restarted).map_err(failed(device, attempt))
    }

    /// Prepares all devices of a stopped VM to accept streamed states.
    ///
    /// # Errors
    /// A device failed; all were reset.
    pub(crate) fn begin_loading(&mut self) -> Result<Vec<StateSink>, DeviceSetError> {
        self.each(Attempt::Load, Device::prepare_to_load)?;
        let stopped = self.try_stop(DeviceState::Stop);
        self.or_run_on(stopped)?;
        self.phase = Phase::Loaded;
        let sinks = self.devices.iter_mut().map(|device| {
            let sink = device.begin_loading();
            sink.map_err(failed(device, Attempt::Load))
        });
        let sinks: Result<Vec<_>, _> = sinks.collect();
        sinks.inspect_err(|_| {
            self.devices.iter_mut().for_each(|device| {
                device.end_loading();
                device.discard_loaded();
            });
            self.phase = Phase::Stopped;
        })
    }

    /// Unless all states were loaded, drops what arrived: resets every device that accepted a part.
    pub(crate) fn abandon_loading(&mut self) {
        for device in self.devices.iter_mut().filter(|device| device.is_loading()) {
            device.end_loading();
            device.discard_loaded();
            self.phase = Phase::Stopped;
        }
    }

    /// Drops states that were loaded and have not run: resets the devices that hold them.
    pub(crate) fn abandon_loaded(&mut self) {
        for device in self.devices.iter_mut().filter(|device| device.holds_loaded()) {
            device.discard_loaded();
            self.phase = Phase::Stopped;
        }
    }

    /// Whether states come in.
    pub(crate) fn is_loading(&self) -> bool {
        self.loading_names().next().is_some()
    }

    /// The devices into which states come.
    pub(crate) fn loading_names(&self) -> impl Iterator<Item = &str> {
        let loading = self.devices.iter().filter(|device| device.is_loading());
        loading.map(|device| device.identity().name.as_str())
    }
}
