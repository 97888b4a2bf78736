#!/bin/sh
# SPDX-License-Identifier: MIT
# parts.sh FLASHKDA_CHECK PARTS: is every case of the check program in one of so many parts, and in no other?
set -eu
check=$1 count=$2
all=$(mktemp)
parts=$(mktemp)
trap 'rm -f "$all" "$parts"' EXIT
"$check" --list --seed 1 | sort >"$all"
part=1
while [ "$part" -le "$count" ]; do
    "$check" --list --seed 1 --part "$part/$count"
    part=$((part + 1))
done | sort >"$parts"
test -s "$all"
diff "$all" "$parts"
