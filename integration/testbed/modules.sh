# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Builds what the guest boots: a kernel to boot, with VFIO and iommufd as modules, and the device fixtures beside it.
#
# A *platform* is one kernel: a folder with `vmlinuz`, the modules/ that belong to it, and build/, against which further
# modules are built. There are two:
#   stock  the distribution's kernel. It is built without iommufd, so its drivers/vfio and drivers/iommu/iommufd are
#          built once more, out of tree and with iommufd: then DMA logging reports, and devices have a cdev.
#   own    a small kernel from the distribution's sources and resources/kernel.config. It has iommufd's mock domain,
#          on which a page table's dirty tracking works.

# The options the stock kernel lacks, for the C compiler and for make.
readonly stock_cflags="-DCONFIG_IOMMUFD_MODULE=1 -DCONFIG_IOMMUFD_DRIVER=1 -DCONFIG_IOMMUFD_DRIVER_CORE=1 \
-DCONFIG_VFIO_DEVICE_CDEV=1 -DCONFIG_INTERVAL_TREE_SPAN_ITER=1"
readonly stock_config=(CONFIG_IOMMUFD=m CONFIG_IOMMUFD_DRIVER=m CONFIG_VFIO_DEVICE_CDEV=y)

# Of the stock kernel's own modules, those the guest loads.
readonly stock_modules=(irqbypass kvm kvm-amd ccp)

# Keys that change with what a build is made of, and with nothing else.
platform_key() {
    {
        declare -f "build_platform_$1" kernel_make extract_source
        case $1 in
            stock) echo "$stock_cflags ${stock_config[*]} ${stock_modules[*]}" ;;
            own) cat "$resources/kernel.config" ;;
        esac
    } | sha256sum | cut -c1-12
}

fixtures_key() {
    { declare -f provide_fixtures && cat "$resources"/modules/*; } | sha256sum | cut -c1-12
}

# Runs make for a platform's build tree, with private tools where the system has none.
kernel_make() {
    timeout --foreground "$build_limit" nice -n 5 env PATH="$PATH:$packages/tools/usr/bin:$packages/tools/bin" M4="$(command -v m4 || echo "$packages/tools/usr/bin/m4")" \
        BISON_PKGDATADIR="$(bison_data)" C_INCLUDE_PATH="$packages/tools/usr/include" LIBRARY_PATH="$tool_libraries" \
        LD_LIBRARY_PATH="$tool_libraries" make -j"$(nproc)" CC=gcc-12 CONFIG_DEBUG_INFO_BTF_MODULES= "$@"
}

# bison finds its skeletons by an absolute path, unless told otherwise.
bison_data() {
    [[ -d $packages/tools/usr/share/bison ]] && echo "$packages/tools/usr/share/bison" || echo /usr/share/bison
}

# Extracts the named parts of the kernel's sources; without any, all of them.
extract_source() {
    local into=$1 parts
    shift
    parts=("${@/#/linux-source-$series/}")
    tar -x -C "$into" --strip-components=1 -f "$packages/linux-source-$series.tar.xz" "${parts[@]}"
}

build_platform_stock() {
    local platform=$1 release headers build
    release=$(< "$packages/release")
    headers=$packages/linux/usr/src/linux-headers-${release}
    build=$platform/build
    mkdir -p "$build" "$platform/modules"

    # The headers' Makefile names the place where the package would have been installed.
    sed -i "s#include /usr/src/linux-headers#include $packages/linux/usr/src/linux-headers#" "$headers/Makefile"
    ln -s "$headers" "$platform/kernel"

    extract_source "$build" drivers/iommu/iommufd drivers/iommu/iommu-priv.h drivers/vfio lib/interval_tree.c \
        samples/vfio-mdev/mtty.c || return 1
    mv "$build"/drivers/{vfio,iommu/iommufd,iommu/iommu-priv.h} "$build"/lib/interval_tree.c "$build"
    mv "$build/samples/vfio-mdev/mtty.c" "$platform"
    # Two things that in a kernel built with iommufd lie elsewhere: the licence of the module iova_bitmap, which is
    # part of a larger one there, and the interval tree's span iterator, which the stock kernel left out.
    printf '\n#include <linux/module.h>\nMODULE_LICENSE("GPL");\n' >> "$build/iommufd/iova_bitmap.c"
    sed '/EXPORT_SYMBOL/d' "$build/interval_tree.c" > "$build/iommufd/interval_tree.c"
    echo 'iommufd-y += interval_tree.o' >> "$build/iommufd/Makefile"
    echo 'obj-m := iommufd/ vfio/' > "$build/Kbuild"

    kernel_make -C "$platform/kernel" M="$build" KCFLAGS="$stock_cflags" "${stock_config[@]}" modules ||
        return
    find "$build" -name '*.ko' -exec cp -t "$platform/modules" {} +
    collect_stock_modules "$release" "$platform/modules" || return 1
    cp "$packages/linux/boot/vmlinuz-$release" "$platform/vmlinuz"
}

collect_stock_modules() {
    local release=$1 into=$2 name file
    for name in "${stock_modules[@]}"; do
        file=$(find "$packages/linux/lib/modules/$release" -name "$name.ko*")
        case $file in
            *.xz) xz -dc "$file" > "$into/$name.ko" || return 1 ;;
            *.ko) cp "$file" "$into/$name.ko" || return 1 ;;
            *) say "Linux $release has no module $name" && return 1 ;;
        esac
    done
}

build_platform_own() {
    local platform=$1 source=$1/source build=$1/build
    mkdir -p "$source" "$build" "$platform/modules"
    extract_source "$source" || return 1
    cp "$source/samples/vfio-mdev/mtty.c" "$platform"
    ln -s build "$platform/kernel"

    kernel_make -C "$source" O="$build" tinyconfig || return
    cat "$resources/kernel.config" >> "$build/.config"
    kernel_make -C "$source" O="$build" olddefconfig || return
    check_config "$resources/kernel.config" "$build/.config" || return
    kernel_make -C "$source" O="$build" bzImage modules || return
    find "$build" -name '*.ko' -exec cp -t "$platform/modules" {} +
    cp "$build/arch/x86/boot/bzImage" "$platform/vmlinuz" || return
    # Modules can be built without most of it.
    rm -rf "$source"/{Documentation,drivers,fs,net,samples,sound,tools} "$build"/vmlinux*
    find "$build" -name '*.o' -delete
}

# Fails if the kernel's configuration dropped a line that was asked for.
check_config() {
    local missing
    missing=$(grep -vxFf "$2" "$1" | grep '^CONFIG_')
    [[ -z $missing ]] || { printf 'Dropped from the configuration:\n%s\n' "$missing" && return 1; }
}

# Makes $platform whole, building it unless the cache has it.
provide_platform() {
    local kernel=$1 platform=$2
    [[ -e $platform/complete ]] && return
    rm -rf "$platform"
    say "building the $kernel kernel: a minute for stock, ten for own"
    mkdir -p "$platform"
    "build_platform_$kernel" "$platform" > "$logs/platform-$kernel.log" 2>&1
    case $? in
        0) ;;
        124) skip "the $kernel kernel was not built within $build_limit s" ;;
        *) fail "building the $kernel kernel failed: see $logs/platform-$kernel.log" ;;
    esac
    find "$platform/modules" -name '*.ko' -exec strip -g {} +
    touch "$platform/complete"
}

# Builds the fixtures, and the kernel's sample mtty, against a platform.
provide_fixtures() {
    local kernel=$1 platform=$2 fixtures=$3 flags=()
    [[ -e $fixtures/complete ]] && return
    find "$platform" -maxdepth 1 -name 'fixtures-*' -mtime +7 -exec rm -r {} +
    mkdir -p "$fixtures"
    cp "$resources"/modules/* "$platform/mtty.c" "$fixtures"
    [[ $kernel = stock ]] &&
        flags=(KBUILD_EXTRA_SYMBOLS="$platform/build/Module.symvers" KCFLAGS="$stock_cflags" "${stock_config[@]}")
    say "building the device fixtures for the $kernel kernel"
    kernel_make -C "$platform/kernel" M="$fixtures" "${flags[@]}" modules > "$logs/fixtures-$kernel.log" 2>&1 ||
        fail "building the fixtures failed: see $logs/fixtures-$kernel.log"
    find "$fixtures" -name '*.ko' -exec strip -g {} +
    touch "$fixtures/complete"
}
