# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Fetches the distribution's packages the bed is made of, and unpacks them in the cache.
# The system stays untouched: apt keeps lists and archives of its own here, nothing is installed, and root is not needed.

# The newest kernel series that Debian's default suites carry with its sources.
readonly series=6.12

# The commands a build needs, each with the package to fetch when the system has none.
readonly build_tools=(make:make gcc-12:gcc-12 ld:binutils flex:flex bison:bison bc:bc xz:xz-utils)

apt_private() {
    local command=$1
    shift
    "$command" -q -o Dir::State::lists="$cache/apt/lists" -o Dir::Cache="$cache/apt/cache" \
        -o Debug::NoLocking=1 -o APT::Sandbox::User=root "$@"
}

# Prints the packages to unpack so that those named work: they, and of what they depend on all that the system lacks.
closure_of() {
    apt_private apt-get --simulate --no-install-recommends install "$@" | awk '$1 == "Inst" { print $2 }'
}

# Prints the packages of QEMU, busybox and the build tools this system lacks.
tool_packages() {
    local wanted=(qemu-system-x86 busybox-static) tool
    for tool in "${build_tools[@]}"; do
        command -v "${tool%%:*}" > /dev/null || wanted+=("${tool#*:}")
    done
    # Every kernel build links objtool against libelf. The library itself must lie beside the link to it.
    if [[ ! -e /usr/include/libelf.h ]]; then
        wanted+=(libelf-dev)
        echo libelf1
    fi
    closure_of "${wanted[@]}"
}

unpack() {
    local into=$1 package
    shift
    for package in "$@"; do
        dpkg -x "$package" "$into" || return 1
    done
}

# Fills $packages with tools/, linux/ (image, headers, kbuild) and the source archive, and writes the kernel's release to
# its file `release` last: a folder with that file is whole.
fetch_packages() {
    local packages=$1 new=$1.new release version debs
    rm -rf "$new"
    mkdir -p "$cache"/apt/{lists,cache/archives}/partial "$new"/{debs,tools,linux}
    apt_private apt-get update > "$logs/apt.log" 2>&1 || skip "apt-get update failed: see $logs/apt.log"

    release=$(apt_private apt-cache depends "linux-image-$series-amd64" 2> /dev/null |
        sed -n "s/.*Depends: linux-image-\($series.*\)/\1/p")
    [[ -n $release ]] || skip "apt offers no linux-image-$series-amd64 (Debian 12 or later does)"
    version=$(apt_private apt-cache policy "linux-image-$release" | awk '/Candidate/ { print $2 }')

    say "fetching Linux $release and QEMU"
    debs=("linux-image-$release" "linux-headers-$release" "linux-headers-${release%-amd64}-common"
        "linux-kbuild-${release%-amd64}" "linux-source-$series=$version")
    # shellcheck disable=SC2046
    (cd "$new/debs" && apt_private apt-get download "${debs[@]}" $(tool_packages)) >> "$logs/apt.log" 2>&1 ||
        skip "apt-get download failed: see $logs/apt.log"

    unpack "$new/linux" "$new"/debs/linux-{image,headers,kbuild}-*.deb || return 1
    dpkg-deb --fsys-tarfile "$new"/debs/linux-source-*.deb |
        tar -x -C "$new" --strip-components=3 "./usr/src/linux-source-$series.tar.xz" || return 1
    rm "$new"/debs/linux-*.deb
    unpack "$new/tools" "$new"/debs/*.deb || return 1
    rm -r "$new/debs"

    echo "$release" > "$new/release"
    rm -rf "$packages"
    mv "$new" "$packages"
}
