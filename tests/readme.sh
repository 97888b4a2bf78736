#!/bin/sh
# SPDX-License-Identifier: MIT
# usage: readme.sh FLASHKDA
# Is what the README shows what there is? Its programs are those in examples/, what it says is printed is printed, but for
# the numbers and the processor, and its figures are those of the results.
set -eu

program=$(realpath "$1")
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# block LANGUAGE: the README's first block of it.
block() { awk -v fence="\`\`\`$1" '$0 == fence && !seen { inside = seen = 1; next } /^```/ { inside = 0 } inside' README.md; }

# same NAME: compares $scratch/readme with standard input.
same() {
    diff "$scratch/readme" - || {
        echo "README.md (<) and $1 (>) differ" >&2
        exit 1
    }
}

block c >"$scratch/readme"
sed -n '/^#include/,$p' examples/first.c | same examples/first.c
block python >"$scratch/readme"
sed -n '/^import/,$p' examples/first.py | same examples/first.py

without_numbers() { sed '/^ran on/d; s/[0-9][0-9.e+-]*/N/g; s/-N/N/g; s/  *N/ N/g'; }
block '' | sed 1d | without_numbers >"$scratch/readme"
"$program" run data/small_softplus.safetensors --check | without_numbers | same 'what the program prints'

if command -v python3 >/dev/null; then
    python3 benchmarks/overview.py
    echo '4 passed, 0 failed'
else
    echo 'the figures were not compared, for there is no python3; 3 passed, 0 failed'
fi
