#!/bin/sh
# SPDX-License-Identifier: MIT
# usage: test-install.sh BUILD_DIR
# Installs a build to a fresh prefix, looks at its symbols, and builds and runs the examples in C against it:
# find_package, pkg-config with the shared library, pkg-config with the static one; the one on CUDA with find_package,
# where CUDA was built.
set -eu

build=$(realpath "$1")
examples=$(realpath "$(dirname "$0")")
CC=${CC:-cc}
NM=${NM:-nm}
prefix=$(mktemp -d)
trap 'rm -rf "$prefix"' EXIT
libdir=$prefix/${LIBDIR:-lib}
export PKG_CONFIG_PATH="$libdir/pkgconfig"

fail() {
    echo "$1" >&2
    exit 1
}

# Hidden symbols of a static library still meet those of the program it is linked to. _ZN3kda: of namespace kda;
# __device_stub__: what nvcc makes of a kernel in it that is no template.
static_symbols_are_ours() {
    "$NM" --extern-only --defined-only --format=just-symbols "$libdir/libflash_kda.a" |
        sed '/:$/d; /^$/d' >"$prefix/global"
    if grep -v -e '^flash_kda_' -e '^kda_' -e '^_ZN3kda' -e '^_Z[0-9]*__device_stub__ZN3kda' "$prefix/global"; then
        fail 'the static library has the symbols above, which are neither flash_kda_* nor kda_* nor in namespace kda'
    fi
}

exactly_the_header_is_exported() {
    sed -n 's/^FLASH_KDA_API .*[ *]\(flash_kda_[a-z_]*\)(.*/\1/p' "$prefix/include/flash_kda.h" |
        sort >"$prefix/declared"
    "$NM" --dynamic --defined-only --format=just-symbols "$libdir/libflash_kda.so" | sort >"$prefix/exported"
    diff "$prefix/declared" "$prefix/exported" || fail 'the header (<) and the shared library (>) differ'
}

# prints_outputs COMMAND...: runs an example, which must end well and print finite outputs.
prints_outputs() {
    "$@" >"$prefix/printed" || fail "$1 failed"
    grep -q '^o\[ *[1-9][0-9]*, 0, 0..2\] = .*[0-9]\.[0-9]' "$prefix/printed" || fail "$1 printed no outputs"
    if grep -i -w -e nan -e inf "$prefix/printed"; then fail "$1 printed values that are not finite"; fi
}

with_find_package() {
    cmake -S "$examples" -B "$prefix/cmake-build" -DCMAKE_C_COMPILER="$CC" \
        -DCMAKE_PREFIX_PATH="$prefix" >/dev/null
    cmake --build "$prefix/cmake-build" >/dev/null
    prints_outputs "$prefix/cmake-build/prefill"
    prints_outputs "$prefix/cmake-build/prefill_static"
}

# Without a GPU the program must say so.
with_cuda() {
    grep -q cudart "$libdir/pkgconfig/flash_kda.pc" || return 0
    program=$prefix/cmake-build/prefill_cuda
    [ -x "$program" ] || fail 'CUDA was built, but prefill_cuda was not'
    if "$build/flashkda_check" --level cuda --list >/dev/null 2>&1; then
        prints_outputs "$program"
    elif "$program" 2>"$prefix/error"; then
        fail 'prefill_cuda succeeded without a GPU'
    else
        grep -q '^there is no GPU' "$prefix/error" || fail 'prefill_cuda does not say that there is no GPU'
    fi
}

# pkg-config prints words for a command line, hence the missing quotes.
# shellcheck disable=SC2046
with_pkg_config() {
    "$CC" -std=c99 "$examples/prefill.c" -o "$prefix/shared" $(pkg-config --cflags --libs flash_kda) -lm
    prints_outputs env LD_LIBRARY_PATH="$libdir" "$prefix/shared"
    "$CC" -std=c99 -static "$examples/prefill.c" -o "$prefix/static" \
        $(pkg-config --static --cflags --libs flash_kda)
    prints_outputs "$prefix/static"
}

# They are made where help2man was found.
with_man_pages() {
    for page in "$build"/flashkda*.1; do
        [ ! -e "$page" ] || [ -e "$prefix/share/man/man1/$(basename "$page")" ] || fail "$page is not installed"
    done
}

cmake --install "$build" --prefix "$prefix" >/dev/null
with_man_pages
static_symbols_are_ours
exactly_the_header_is_exported
with_find_package
with_cuda
with_pkg_config
