#!/bin/sh
# SPDX-License-Identifier: MIT
# usage: cuda_architectures.sh SOURCE_DIR
# Configures for lists of GPUs, without compiling: Hopper's level is built, as sm_90a, however Hopper is named, and what
# cannot be is said.
set -eu
source=$1
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

configure() {
    cmake -S "$source" -B "$build" -D FLASH_KDA_CUDA=ON -D FLASH_KDA_CLI=OFF -D FLASH_KDA_TESTS=OFF \
        -D CMAKE_EXPORT_COMPILE_COMMANDS=ON -D CMAKE_CUDA_ARCHITECTURES="$1" >"$build/printed" 2>&1
}

fail() {
    cat "$build/printed" >&2
    echo "CMAKE_CUDA_ARCHITECTURES=$1: $2" >&2
    exit 1
}

# with_hopper LIST GPUS: what is printed names these GPUs, and Hopper's kernels are compiled for sm_90a.
with_hopper() {
    configure "$1" || fail "$1" 'not configured'
    grep -q "^-- CUDA backend: yes .*, for GPUs $2: levels sm80 and sm90$" "$build/printed" || fail "$1" 'not said so'
    grep '"command": .* -x cu .*/cuda/sm90/' "$build/compile_commands.json" >"$build/hopper" ||
        fail "$1" "Hopper's kernels are not compiled"
    if grep -v 'code=\[*sm_90a' "$build/hopper"; then fail "$1" 'the kernels above are not compiled for sm_90a'; fi
}

without_hopper() {
    configure "$1" || fail "$1" 'not configured'
    grep -q "^-- CUDA backend: yes .*, for GPUs $2: level sm80 alone" "$build/printed" || fail "$1" 'not said so'
    if grep -q 'cuda/sm90/' "$build/compile_commands.json"; then fail "$1" "Hopper's kernels are compiled"; fi
}

refused() {
    if configure "$1"; then fail "$1" 'configured'; fi
    tr -s '\n ' ' ' <"$build/printed" | grep -q "$2" || fail "$1" "not said: $2"
}

with_hopper 90 90
with_hopper 90-real 90-real
with_hopper 90-virtual 90-virtual
with_hopper 90a 90a
with_hopper '80-real;90;120' '80-real 90 120'
with_hopper all-major '80-real 90a-real 100-real 120'
without_hopper '80-real;100' '80-real 100'
refused '75;90' 'has 75; expected GPUs from 80 on'
# CMake asks the GPUs once, while it tries nvcc out, and keeps the answer in this file.
for gpu in 90-real 89-real ''; do
    sed -i "s/set(CMAKE_CUDA_ARCHITECTURES_NATIVE .*)/set(CMAKE_CUDA_ARCHITECTURES_NATIVE \"$gpu\")/" \
        "$build"/CMakeFiles/*/CMakeCUDACompiler.cmake
    case $gpu in
    90*) with_hopper native "$gpu" ;;
    89*) without_hopper native "$gpu" ;;
    *) refused native 'shows nvcc no GPU' ;;
    esac
done
