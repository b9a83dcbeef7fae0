#!/usr/bin/env bash
# What a client sees of the three ways to move a service: the example, small. Nothing that it was told is lost in any of them;
# in ours, and where the memory moves along, it keeps its connection.
# tests/run: timeout=600 memory=3072 disk=8
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
out=$(mktemp -d)
LAZY_MIGRATE=$LAZY_MIGRATE_BIN EXAMPLE_MIB=${EXAMPLE_MIB:-24} "$repo/examples/client-view.sh" --here "$out"
jq -e 'length == 3 and all(.[]; .gap_s > 0 and .replies > 20)
  and all(.[] | select(.way != "copy"); .lost == 0 and .connections == 1)
  and any(.[]; .way == "copy" and .connections > 1)' "$out/client-view.json" >/dev/null ||
  { echo "not what it should be: $(cat "$out/client-view.json")" >&2; exit 1; }
grep -q '<svg' "$out/client-view.svg"
[ "$(grep -c '^| ' "$out/client-view.md")" = 4 ]
left=$(ip netns list | grep lm-example || true
  grep client-view /proc/self/mountinfo || true
  pgrep -a rsync || pgrep -a service || pgrep -a lazy-migrate || true)
[ -z "$left" ] || { echo "left behind: $left" >&2; exit 1; }
