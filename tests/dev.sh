#!/bin/sh
# SPDX-License-Identifier: MIT
# usage: dev.sh SOURCE_DIR
# What ./dev does for somebody who may not install packages: with stand-ins for the tools that it calls, and none besides.
# shellcheck disable=SC2016 # the stand-ins expand what is in quotes
set -eu
home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT
tools=$home/tools
mkdir -p "$tools" "$home/build/Testing/Temporary"
cp "$1/dev" "$home"
touch "$home/build/Testing/Temporary/LastTest.log"
for tool in sh dirname basename cat sed awk nproc touch; do ln -s "$(command -v "$tool")" "$tools"; done

# tool NAME: a stand-in, whose lines are read from stdin.
tool() {
    { echo '#!/bin/sh' && cat; } >"$tools/$1"
    chmod +x "$tools/$1"
}
echo 'echo 1000' | tool id
echo 'exit 1' | tool sudo
echo 'echo x86_64' | tool uname
echo 'for name; do :; done; case " $MISSING " in *" $name "*) exit 1 ;; esac; printf installed' | tool dpkg-query
echo 'echo "cmake $*" >>"$CALLS"' | tool cmake
echo 'echo "ctest $*" >>"$CALLS"' | tool ctest

# dev MISSING HABIT: its output goes to printed, what it called to calls.
dev() {
    : >"$home/calls"
    env PATH="$tools" MISSING="$1" CALLS="$home/calls" "$home/dev" "$2" >"$home/printed" 2>&1
}

fail() {
    cat "$home/printed" >&2
    echo "$1" >&2
    exit 1
}

# asks_first HABIT MISSING: names these before it calls anything, and stops.
asks_first() {
    if dev "$2" "$1"; then fail "./dev $1 goes on without $2"; fi
    [ ! -s "$home/calls" ] || fail "./dev $1 builds before it asks for $2"
    for package in $2; do
        grep -q "apt-get install .* $package\( \|$\)" "$home/printed" || fail "./dev $1 does not ask for $package"
    done
}

asks_first test 'ninja-build qemu-user'
asks_first bench python3-venv
asks_first nightly 'qemu-user clang'
asks_first sanitize clang

dev '' test || fail './dev test fails'
grep -q 'the NEON level was not tested, which needs .*qemu-user' "$home/printed" || fail 'not said that qemu is missing'
dev qemu-user test || fail './dev test fails without qemu'
grep -q 'apt-get install .* qemu-user$' "$home/printed" || fail './dev test does not say how to install qemu'
grep -q 'ctest --preset release' "$home/calls" || fail './dev test without qemu leaves out the rest'
if grep -q aarch64 "$home/calls"; then fail './dev test builds for AArch64 without qemu'; fi
for name in qemu-aarch64 aarch64-linux-gnu-gcc; do echo : | tool "$name"; done
mkdir -p "$home/build-aarch64"
cp -r "$home/build/Testing" "$home/build-aarch64"
dev '' test || fail './dev test fails with qemu'
grep -q 'ctest --preset aarch64' "$home/calls" || fail './dev test leaves out the NEON level'
