// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Ways to do it wrong, each of which the model has to find out.

use std::fmt;

use clap::ValueEnum;

/// One mistake, made at one place in the driver or in a source; the place says `mutated`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, ValueEnum)]
pub enum Mutation {
    /// A log's bits are reported first and cleared once the bytes were read, with what came in between.
    DrainAfterRead,
    /// KVM's bits of a chunk are cleared when its bytes were sent, not before they are read.
    ClearAfterRead,
    /// KVM's bits of a chunk are cleared although no report held them yet.
    ClearUnreported,
    /// The logs are on only from the first collect.
    ArmLate,
    /// A device is stopped while another is not P2P-quiescent yet.
    StopBeforeP2p,
    /// A device runs without restraint while another is still stopped.
    RunBeforeAllWoke,
    /// The devices are stopped before the vCPUs are paused.
    DevicesBeforeVcpus,
    /// The vCPUs are resumed before the devices run.
    VcpusBeforeDevices,
    /// The bits of a mapping that goes are not read.
    SkipHarvest,
    /// A page table's mapping is taken down before its bits are read.
    UnmapBeforeHarvest,
    /// A log that was started anew over more counts only what is new as written.
    MarkOnlyNewAfterRearm,
    /// A source whose log could not be read counts as having nothing to tell.
    NoWidenAfterFailedRead,
    /// A chunk that did not arrive is committed.
    DropRollback,
    /// A chunk that did not arrive is forgotten: its pages stay in flight.
    ForgetLostChunk,
    /// A chunk is committed once it is sent.
    CommitOnSend,
    /// The cursor of a receiver that failed goes on for the next one.
    AckForAnother,
    /// What the sources report is given to the first cursor only.
    OneCursorOnly,
    /// RAM that was plugged in is not pending.
    PluggedNotPending,
    /// Sources that report what could have been written are not asked at the end.
    ImpreciseOnceTooFew,
    /// The last collect comes when the vCPUs are paused, while devices still write.
    CollectBeforeStop,
    /// Nothing is collected after the capture, which writes.
    ForgetLastCollect,
    /// Pieces of a device's state from before its reset are kept, before those of its next session.
    KeepOldPieces,
    /// The devices' states are read before they stopped.
    CaptureBeforeStop,
    /// State is sent while chunks are on their way.
    StateBeforeDrained,
    /// The VM is resumed without what was released for the receiver.
    ResumeUnreclaimed,
    /// The VM is resumed when no answer to Complete comes.
    ResumeAfterSilence,
    /// The VM is resumed although Complete was answered.
    ResumeAfterAnswer,
}

impl Mutation {
    /// Its name on the command line.
    pub fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// Name of the scenario in which it shows.
    pub fn scenario(self) -> &'static str {
        match self {
            Self::ClearAfterRead
            | Self::ArmLate
            | Self::DropRollback
            | Self::ForgetLostChunk
            | Self::CommitOnSend
            | Self::AckForAnother
            | Self::ForgetLastCollect
            | Self::StateBeforeDrained
            | Self::ResumeUnreclaimed
            | Self::ResumeAfterSilence
            | Self::ResumeAfterAnswer => "writes",
            Self::ClearUnreported | Self::OneCursorOnly => "receivers",
            Self::StopBeforeP2p
            | Self::RunBeforeAllWoke
            | Self::DevicesBeforeVcpus
            | Self::VcpusBeforeDevices
            | Self::NoWidenAfterFailedRead
            | Self::CollectBeforeStop
            | Self::CaptureBeforeStop => "devices",
            Self::DrainAfterRead => "two-logs",
            Self::KeepOldPieces => "streams",
            Self::SkipHarvest | Self::UnmapBeforeHarvest => "mappings",
            Self::MarkOnlyNewAfterRearm => "re-arm",
            Self::PluggedNotPending => "hot-plug",
            Self::ImpreciseOnceTooFew => "imprecise",
        }
    }
}

impl fmt::Display for Mutation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())
    }
}
