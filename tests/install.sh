#!/bin/sh
# SPDX-License-Identifier: MIT
# usage: install.sh BUILD_DIR
# Installs a build to a fresh prefix, looks at its symbols, and builds and runs programs against it: by find_package from C
# and from C++ alone, by pkg-config with the shared library and with the static one; the one on CUDA where CUDA was built.
# Then what else people do: the source as a part of another project, missing packages, uninstalling.
set -eu

build=$(realpath "$1")
root=$(realpath "$(dirname "$0")/..")
examples=$root/examples
CC=${CC:-cc}
CXX=${CXX:-c++}
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
    "$prefix/cmake-build/first" | grep -q '^the last token.s first output is -*0\.[0-9]' || fail 'first failed'
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

# A project without C. Its targets are those of $1, lines of CMake; $2 and on go to cmake. Leaves the programs in app/.
cxx_project() {
    mkdir -p "$prefix/app"
    cat >"$prefix/app/app.cpp" <<'END'
#include <cstdio>
#include <flash_kda.h>
int main() { return std::puts(flash_kda_version()) < 0; }
END
    cat >"$prefix/app/CMakeLists.txt" <<END
cmake_minimum_required(VERSION 3.25)
project(app CXX)
$1
foreach(kind IN LISTS kinds)
  add_executable(\${kind} app.cpp)
  target_link_libraries(\${kind} PRIVATE flashkda::\${kind})
endforeach()
END
    shift
    rm -rf "$prefix/app/build"
    cmake -S "$prefix/app" -B "$prefix/app/build" -DCMAKE_EXPORT_COMPILE_COMMANDS=ON "$@" >/dev/null
    cmake --build "$prefix/app/build" --parallel 2 >/dev/null
}

runs() {
    for program; do "$prefix/app/build/$program" >"$prefix/printed" || fail "$program of a C++ project failed"; done
}

# shellcheck disable=SC2046 # as above
with_cxx_alone() {
    for compiler in "$CXX" clang++; do
        command -v "$compiler" >/dev/null || continue
        cxx_project 'find_package(flashkda REQUIRED)
            set(kinds shared static flashkda)' -DCMAKE_CXX_COMPILER="$compiler" -DCMAKE_PREFIX_PATH="$prefix"
        runs shared static flashkda
        "$compiler" -static "$prefix/app/app.cpp" -o "$prefix/app/build/pc" \
            $(pkg-config --static --cflags --libs flash_kda)
        runs pc
    done
}

# The same targets, without installing; of one kind, with the libraries in a folder of their own.
as_a_part_of_another_project() {
    compiler=$(command -v clang || echo "$CC")
    set -- -DCMAKE_C_COMPILER="$compiler" -DCMAKE_CXX_COMPILER="$CXX" -DCMAKE_BUILD_TYPE=Debug -DFLASH_KDA_CUDA=OFF \
        -DCMAKE_INSTALL_PREFIX="$prefix/part" -DCMAKE_INSTALL_LIBDIR="$prefix/libraries" -DBUILD_SHARED_LIBS=OFF
    cxx_project "add_subdirectory($root library)
        set(kinds static flashkda)" "$@"
    runs static flashkda
    if grep -q -e '-Werror' "$prefix/app/build/compile_commands.json"; then
        fail "warnings are errors in another project's build"
    fi
    cmake --install "$prefix/app/build" >/dev/null
    ls "$prefix/libraries" >"$prefix/laid"
    if grep -q '\.so' "$prefix/laid"; then fail 'BUILD_SHARED_LIBS is OFF, but a shared library was installed'; fi
    pc=$(PKG_CONFIG_PATH=$prefix/libraries/pkgconfig pkg-config --cflags --libs flash_kda)
    for word in "-I$prefix/part/include" "-L$prefix/libraries" -pthread -lm; do
        case " $pc " in *" $word "*) ;; *) fail "pkg-config prints '$pc'; expected $word among it" ;; esac
    done
    cxx_project 'find_package(flashkda REQUIRED)
        set(kinds static flashkda)' -Dflashkda_DIR="$prefix/libraries/cmake/flashkda"
    runs static flashkda
}

# DLPack where only its user knows.
pkg_config_knows_dlpack() {
    mkdir -p "$prefix/elsewhere"
    cp -r "$(sed -n 's/^DLPACK_INCLUDE_DIR:PATH=//p' "$build/CMakeCache.txt")/dlpack" "$prefix/elsewhere"
    cmake -S "$root" -B "$prefix/other" -DCMAKE_C_COMPILER="$CC" -DFLASH_KDA_CUDA=OFF -DFLASH_KDA_CLI=OFF \
        -DFLASH_KDA_TESTS=OFF -DDLPACK_INCLUDE_DIR="$prefix/elsewhere" >/dev/null
    pkg-config --cflags "$prefix/other/flash_kda.pc" | grep -q -e "-I$prefix/elsewhere" ||
        fail 'pkg-config does not know where DLPack is'
}

missing_packages_are_named() {
    if PKG_CONFIG_LIBDIR=/none PKG_CONFIG_PATH='' CXX=/none cmake -S "$root" -B "$prefix/missing" \
        -DCMAKE_C_COMPILER="$CC" -DFLASH_KDA_CUDA=OFF -DFLASH_KDA_PYTHON=ON -DPython_ROOT_DIR=/none \
        -DPython_FIND_STRATEGY=LOCATION -DPython_EXECUTABLE=/none -DCMAKE_IGNORE_PATH=/usr/include \
        >/dev/null 2>"$prefix/error"; then
        fail 'configured without any package'
    fi
    if cmake -S "$root" -B "$prefix/missing-too" -DCMAKE_C_COMPILER="$CC" -DFLASH_KDA_CUDA=OFF \
        -DCMAKE_DISABLE_FIND_PACKAGE_PkgConfig=ON >/dev/null 2>>"$prefix/error"; then
        fail 'configured without pkg-config'
    fi
    for package in libdlpack-dev libjansson-dev libcmocka-dev g++ python3-dev pkgconf; do
        grep -q -F ": $package" "$prefix/error" || fail "$package is missing, but the error does not name it"
    done
}

unknown_options_are_refused() {
    if cmake -S "$root" -B "$prefix/maybe" -DCMAKE_C_COMPILER="$CC" -DFLASH_KDA_CUDA=MAYBE >/dev/null 2>"$prefix/error"; then
        fail 'configured with FLASH_KDA_CUDA=MAYBE'
    fi
    grep -q "FLASH_KDA_CUDA is 'MAYBE', expected ON, OFF or AUTO" "$prefix/error" || fail 'FLASH_KDA_CUDA is not named'
}

nothing_is_left() {
    cmake --build "$build" --target uninstall >/dev/null
    left=$(find "$prefix/include" "$libdir" -type f -o -type l -o -name flashkda)
    [ -z "$left" ] || fail "left after uninstalling: $left"
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
with_cxx_alone
pkg_config_knows_dlpack
as_a_part_of_another_project
missing_packages_are_named
unknown_options_are_refused
nothing_is_left
