# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Builds the tests, packs them into an initramfs, boots it, and reads from the guest's output how the tests went.

# What the guest says first and last; see guest-init.
readonly reached_init='vfio-migration bed: init'
readonly guest_done='vfio-migration bed: exit status '

# What the kernel says when it runs into the breakpoint that it patched over an instruction for a moment: with several
# CPUs, QEMU's software emulation may run a stale translation of code that another CPU has changed meanwhile.
readonly emulator_fault='Oops: int3'

# Builds the tests and programs as static executables, in a target folder of their own, and sets $executables (to run)
# and $programs (to put in /bin).
build_programs() {
    local test_flags=("${tests[@]/#/--test=}") target=x86_64-unknown-linux-gnu bin
    export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$workspace/target}/testbed
    export RUSTFLAGS='-C target-feature=+crt-static'
    say "building ${tests[*]} ${bins[*]}"
    mapfile -t executables < <(
        cd "$workspace" && cargo test --no-run --target $target -p vfio-migration-integration "${test_flags[@]}" 2>&1 |
            tee -a /dev/stderr | sed -n 's/^ *Executable .*(\(.*\))$/\1/p'
    )
    ((${#executables[@]} == ${#tests[@]})) || fail "building the tests failed"
    programs=()
    for bin in "${bins[@]}"; do
        (cd "$workspace" && cargo build --workspace --target $target --bin "$bin") || fail "building $bin failed"
        programs+=("$CARGO_TARGET_DIR/$target/debug/$bin")
    done
}

# Prints the path of a tool that may be the system's or a private one.
tool() {
    local private
    for private in "$packages"/tools/{usr/bin,bin}/"$1"; do
        [[ ! -x $private ]] || { echo "$private" && return; }
    done
    command -v "$1"
}

# Packs folder/initramfs: busybox, the modules, the tests in the order given, and what guest-init wants to know.
pack_initramfs() {
    local folder=$1 root=$1/root i busybox
    busybox=$(tool busybox) || return
    mkdir -p "$root"/{bin,dev,etc,modules,proc,sys,tests,tmp}
    cp "$busybox" "$root/bin/busybox" && ln -s busybox "$root/bin/sh"
    cp "$here/guest-init" "$root/init" && chmod +x "$root/init"
    cp "$platform"/modules/*.ko "$root/modules" && cp "$fixtures"/*.ko "$root/modules" || return
    for i in "${!tests[@]}"; do
        strip -g -o "$root/tests/$i-${tests[i]}" "${executables[i]}" || return
    done
    ((!${#programs[@]})) || cp "${programs[@]}" "$root/bin" || return
    printf '%s=%s\n' scenario "$scenario" kernel "$kernel" iommu "$iommu" > "$root/etc/vfio-migration-bed"
    ((!${#test_arguments[@]})) || printf '%s\n' "${test_arguments[@]}" > "$root/etc/test-arguments"
    (cd "$root" && find . | "$busybox" cpio -o -H newc | gzip -1) > "$folder/initramfs"
}

qemu() {
    LD_LIBRARY_PATH=$tool_libraries timeout --foreground -k 5 "$boot_limit" "$(tool qemu-system-x86_64)" "$@"
}

boot_guest() {
    local initramfs=$1 shares=$packages/tools/usr/share iommu_device=()
    [[ $iommu = none ]] || iommu_device=(-device 'intel-iommu,intremap=on')
    qemu -L "$shares/qemu" -L "$shares/seabios" -nodefaults -no-user-config -display none -serial stdio -no-reboot \
        -machine q35,kernel-irqchip=split -accel tcg,thread=multi -cpu max -smp "$cpus" -m "$memory" \
        "${iommu_device[@]}" \
        -device edu,dma_mask=0xffffffffffffffff -device edu,dma_mask=0xffffffffffffffff \
        -kernel "$platform/vmlinuz" -initrd "$initramfs" \
        -append "console=ttyS0 rdinit=/init panic=-1 quiet loglevel=4 nokaslr mitigations=off nopti tsc=reliable \
no_timer_check random.trust_cpu=on intel_iommu=on" < /dev/null
}

# Boots the guest, shows what it says, and exits with what the tests said.
boot() {
    local initramfs=$1 log attempt
    log=$logs/boot-$(date +%Y%m%d-%H%M%S)-$$.log
    for attempt in 1 2; do
        say "booting the $kernel kernel, scenario $scenario; the log is $log"
        boot_guest "$initramfs" 2>&1 | stdbuf -oL tr -d '\r' | tee "$log"
        local status=${PIPESTATUS[0]}
        if grep -q "$reached_init" "$log" && ! grep -q "$emulator_fault" "$log"; then
            ((status != 124 && status != 137)) || fail "the guest did not finish within $boot_limit s: see $log"
            summarize "$log"
        fi
        mv "$log" "$log.attempt-$attempt"
        say "attempt $attempt never reached /init, or broke down in the emulator"
    done
    fail "the guest does not boot: see $log.attempt-2"
}

summarize() {
    local log=$1 status passed failed ignored skipped
    status=$(sed -n "s/^$guest_done//p" "$log")
    passed=$(sum_of passed "$log") failed=$(sum_of failed "$log") ignored=$(sum_of ignored "$log")
    skipped=$(grep -c 'SKIPPED[ :]' "$log")
    echo "test bed ($kernel kernel, $scenario): $passed passed, $failed failed, $ignored ignored, $skipped said SKIPPED," \
        "in ${SECONDS} s"
    [[ -n $status ]] || fail "the guest ended before its tests did: see $log"
    ((status == 0 && failed == 0)) || exit 1
    ((passed > 0)) || fail "no test ran"
    exit 0
}

# Sums up "N passed", "N failed", ... of the `test result:` lines.
sum_of() {
    sed -n "s/^test result:.* \([0-9]*\) $1.*/\1/p" "$2" | awk '{ n += $1 } END { print n + 0 }'
}
