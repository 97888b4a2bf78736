# SPDX-License-Identifier: MIT
# For tests of the program: sourced with its path in $1. Works in a folder of its own.
# shellcheck shell=sh
set -u
flashkda=$(realpath "$1")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder" || exit 1
tests=0
wrong=0

# judge NAME STATUS EXPECTED PATTERN: looks at the file `said`, not for an empty pattern.
judge() {
    tests=$((tests + 1))
    if [ "$2" != "$3" ]; then
        reason="ended with status $2, expected $3"
    elif [ -n "$4" ] && ! grep -qe "$4" said; then
        reason="did not say '$4'"
    elif LC_ALL=C grep -q "$(printf '[\001-\010\013-\037]')" said; then
        reason="printed control characters"
    else
        return
    fi
    wrong=$((wrong + 1))
    printf 'FAIL %s: %s; it said\n' "$1" "$reason"
    sed 's/^/    /' said
}

# says STATUS PATTERN ARGUMENT...: the program ends with this status and says, on either stream, what matches.
says() {
    expected=$1 pattern=$2
    shift 2
    "$flashkda" "$@" >said 2>&1
    judge "flashkda $*" $? "$expected" "$pattern"
}

# table STATUS <<ROWS: "PATTERN | ARGUMENTS" a row.
table() {
    while IFS='|' read -r row_pattern row_arguments; do
        # shellcheck disable=SC2086 # words on purpose
        says "$1" "$(printf %s "$row_pattern" | sed 's/ *$//')" $row_arguments
    done
}

# holds NAME COMMAND...: the command ends well.
holds() {
    name=$1
    shift
    "$@" >said 2>&1
    judge "$name" $? 0 ''
}

# file NAME HEADER BYTES: a safetensors file of this header, and data in printf's escapes.
file() {
    length=${#2}
    {
        # shellcheck disable=SC2059 # the format is made of numbers
        printf "\\$(printf %o $((length % 256)))\\$(printf %o $((length / 256)))\\0\\0\\0\\0\\0\\0"
        printf '%s' "$2"
        # shellcheck disable=SC2059 # data in escapes
        printf "$3"
    } >"$1"
}

finish() {
    echo "$((tests - wrong)) passed, $wrong failed"
    [ "$wrong" -eq 0 ] && [ "$tests" -gt 0 ]
}
