// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Work over many words, compiled a second time for processors that count and find bits by one instruction.

/// Work that is worth compiling twice; its parts must be inlined for that to show.
pub(crate) trait Work {
    /// What comes of it.
    type Output;

    /// Does the work.
    fn run(self) -> Self::Output;
}

/// Does `work`, with the instructions that this processor has.
pub(crate) fn run<W: Work>(work: W) -> W::Output {
    #[cfg(target_arch = "x86_64")]
    if has_newer() {
        // SAFETY: this processor has the instructions that the function is compiled for.
        return unsafe { newer(work) };
    }
    work.run()
}

#[cfg(target_arch = "x86_64")]
fn has_newer() -> bool {
    #[cfg(test)]
    if plain::ONLY.get() {
        return false;
    }
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("bmi1")
        && is_x86_feature_detected!("bmi2")
        && is_x86_feature_detected!("lzcnt")
        && is_x86_feature_detected!("popcnt")
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,bmi1,bmi2,lzcnt,popcnt")]
fn newer<W: Work>(work: W) -> W::Output {
    work.run()
}

/// Lets a test do without the newer instructions, to compare.
#[cfg(test)]
pub(crate) mod plain {
    use std::cell::Cell;

    thread_local! {
        pub(crate) static ONLY: Cell<bool> = const { Cell::new(false) };
    }
}
