#!/usr/bin/env bash
# Puts `prometheus` and `promtool` into .tools/bin for the tests of deploy/: links to those on PATH, or else Debian's
# package, unpacked there rather than installed, since installing it would start a server. Needs no root.
set -euo pipefail
cd "$(dirname "$0")/../.."
tools="$PWD/.tools"

if [ -x "$tools/bin/promtool" ] && [ -x "$tools/bin/prometheus" ]; then
    exit 0
fi
mkdir -p "$tools/bin"

if command -v prometheus > /dev/null && command -v promtool > /dev/null; then
    ln -sf "$(command -v prometheus)" "$(command -v promtool)" "$tools/bin/"
    exit 0
fi

if ! command -v apt-get > /dev/null || ! command -v dpkg > /dev/null; then
    echo "prometheus and promtool were not found on PATH; install Prometheus 2.42 or later and try again." >&2
    exit 2
fi

unfinished=$(mktemp -d "$tools/unfinished-XXXXXX")
trap 'rm -rf "$unfinished"' EXIT
cd "$unfinished"
# A fresh image has no package lists yet, and only root may fetch them.
if ! apt-get -qq download prometheus 2> /dev/null; then
    apt-get -qq update
    apt-get -qq download prometheus
fi
dpkg -x prometheus_*.deb unpacked
mv unpacked/usr/bin/prometheus unpacked/usr/bin/promtool "$tools/bin/"
