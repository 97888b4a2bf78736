#!/bin/sh
# SPDX-License-Identifier: MIT
# captured.sh FLASHKDA FLASHKDA_CHECK LEVEL DIRECTORY: runs every captured input in DIRECTORY, and in
# $FLASH_KDA_DATA if that is set, on one level and compares with the oracle and the file's own answer.
# Exit status 77: this machine cannot run the level.
set -eu
flashkda=$1 check=$2 level=$3 directory=$4

"$check" --level "$level" --list >/dev/null || exit $?

case $level in
reference | cuda) backend=$level ;;
*)
    backend=cpu
    export FLASH_KDA_CPU="$level"
    ;;
esac

count=0
for file in "$directory"/*.safetensors ${FLASH_KDA_DATA:+"$FLASH_KDA_DATA"/*.safetensors}; do
    [ -e "$file" ] || continue
    echo "== $file"
    "$flashkda" run "$file" --backend "$backend" --check
    "$flashkda" run "$file" --backend "$backend" --decode --repeat 1 --check
    count=$((count + 1))
done
if [ "$count" -eq 0 ]; then
    echo "no captured inputs in $directory"
    exit 1
fi
