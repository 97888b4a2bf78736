#!/bin/sh
# SPDX-License-Identifier: MIT
# usage: bare.sh FOLDER wheel FILE     installs a wheel where there is no compiler and no network, in Debian 12 and in 13, and
#                                      runs tests/wheel.py on it
#        bare.sh FOLDER source         installs the source in Debian 12 with a C compiler and Python, and nothing else
# Runs as root. FOLDER keeps the bare systems, which debootstrap makes at first.
set -eu
source=$(realpath "$(dirname "$0")/..")
mkdir -p "$1"
folder=$(realpath "$1")

# bare NAME SUITE PACKAGE...: a system of this suite with these packages, in $root.
bare() {
    root=$folder/$1 suite=$2
    shift 2
    if [ ! -e "$root/complete" ]; then
        rm -rf "$root"
        debootstrap --variant=minbase --include="$(echo "$*" | tr ' ' ,)" "$suite" "$root" >"$folder/debootstrap.log"
        touch "$root/complete"
    fi
    rm -rf "$root/trial" "$root/venv"
    mkdir "$root/trial"
    chroot "$root" python3 -m venv /venv
}

try_wheel() {
    for suite in bookworm trixie; do
        bare "$suite" "$suite" python3 python3-venv
        if chroot "$root" sh -c 'command -v cc gcc clang'; then
            echo "bare.sh: $root has a compiler" >&2
            exit 1
        fi
        version=$(chroot "$root" python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        python3 -m pip download --quiet --disable-pip-version-check --only-binary :all: --python-version "$version" \
            --dest "$root/trial" numpy
        cp "$1" "$source/tests/wheel.py" "$root/trial"
        chroot "$root" /venv/bin/pip install --quiet --disable-pip-version-check --no-index --find-links /trial numpy \
            "/trial/$(basename "$1")"
        echo "$(basename "$1") in $suite, Python $version:"
        chroot "$root" /venv/bin/python /trial/wheel.py
    done
}

try_source() {
    bare source bookworm gcc libc6-dev python3-dev python3-venv ca-certificates
    if chroot "$root" sh -c 'command -v cmake ninja make || ls /usr/include/dlpack 2>&1' | grep '^/'; then
        echo "bare.sh: $root has more than a compiler and Python" >&2
        exit 1
    fi
    # The network as this machine has it.
    cp -L /etc/resolv.conf "$root/etc"
    cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs"
    for part in CMakeLists.txt LICENSE pyproject.toml cmake docs include python src; do
        cp -r "$source/$part" "$root/trial"
    done
    chroot "$root" /venv/bin/pip install --quiet --disable-pip-version-check numpy /trial
    cp "$source/tests/wheel.py" "$root/trial"
    echo "from source in bookworm:"
    chroot "$root" /venv/bin/python /trial/wheel.py
}

case $2 in
wheel) try_wheel "$3" ;;
source) try_source ;;
esac
